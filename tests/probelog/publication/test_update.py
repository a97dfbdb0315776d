"""An update of a generation answers as a generation that was built whole from the same models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from probelog.errors import QueryError
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.rows import LogitBatch
from probelog.publication.update import Changes, write_update
from probelog.search.client import Index
from probelog.storage.store import Store
from tests.support.worlds import small_index
from tests.support.worlds.small_index import Model, SmallIndex

BASE = tuple(
    Model(
        f"base/{number}",
        tuple(f"thing {number}.{logit}" for logit in range(1 + number % 4)),
        head="single" if number % 4 == 0 else "softmax",
        weights=f"weights {number % 7}" if number % 4 == number % 7 % 4 and number % 3 else None,
        licence="mit" if number % 2 else "other",
        downloads=number,
    )
    for number in range(16)
)
CAME = (
    Model("new/first", ("new a", "new b"), licence="mit"),
    Model("new/copy-of-new", ("new a", "new b"), weights="digest of new/first"),
    Model("new/copy-of-base", BASE[5].labels, weights=BASE[5].digest, licence="other"),
    Model("new/single", ("alone",), head="single", downloads=3),
    Model("base/6", BASE[6].labels, weights=BASE[6].digest, licence="apache-2.0"),  # only its facts changed
    Model("base/9", ("trained", "again", "on", "more"), weights="other weights"),
)


def written_update(
    base: SmallIndex,
    name: str,
    gone: list[str],
    came: tuple[Model, ...],
    kind: str = "siglip",
    tamper: Callable[[LogitBatch], LogitBatch] = lambda batch: batch,
) -> Generation:
    """An update, written with the logits that a whole generation of the models that came has."""
    index = base.store
    opened = Generation(index, base.pointer)
    numbers = {model.repo: number for number, model in enumerate(base.models)}
    batches = []
    if came:
        source = small_index.build(index, f"{name}-source", came, kind, False, live=False, like=base)
        batch = tamper(source.batch)
        batches = [batch.at(batch.model == n) for n in range(len(came))]
    writer = GenerationWriter(index, name)
    identities = [str(model.digest) for model in came]
    changes = Changes(
        small_index.model_facts(came), identities, np.array([numbers[repo] for repo in gone], np.int64)
    )
    written = write_update(writer, opened, changes, batches)
    settings = replace(opened.settings, **written.settings, logits=written.logits)
    writer.write_meta({"settings": settings.to_bytes(), **written.meta})
    writer.finish()
    return Generation(index, Pointer(name, "s", ""))


SCENARIOS = {
    "nothing": ([], ()),
    "only additions": ([], CAME[:4]),
    "only removals": (["base/0", "base/5", "base/12", "base/15"], ()),
    "all sorts": (["base/5", "base/6", "base/9", "base/0"], CAME),
    "every original": ([f"base/{number}" for number in range(8)], CAME[:3]),
    "all that there was": ([model.repo for model in BASE], CAME),
}


@pytest.mark.parametrize(
    ("scenario", "large"), [*((name, False) for name in SCENARIOS), ("all sorts", True), ("nothing", True)]
)
def test_an_update_answers_as_a_whole_generation(tmp_path: Path, scenario: str, large: bool) -> None:
    gone, came = SCENARIOS[scenario]
    store = Store(str(tmp_path / "index"))
    limit = 1 if large else 1000
    base = small_index.build(store, "base", BASE, exact_logits=limit)
    updated = written_update(base, "update", gone, came)
    left = (*(model for model in BASE if model.repo not in gone), *came)
    whole = small_index.build(store, "whole", left, live=False, like=base)
    ours = Index(store, pinned=updated)
    theirs = Index(store, pinned=Generation(store, whole.pointer))

    assert updated.is_update
    assert (ours.models, ours.logits) == (theirs.models, theirs.logits)
    conditions = [None, "licence = 'mit'", "downloads > 2", "library = 'timm'"]
    for text in ("cat", "a violin"):
        for condition in conditions:
            for k in (3, 500):
                _same_hits(ours, theirs, text, condition, k)
    by_repo = {
        row["repo"]: row
        for row in theirs._generation.models_table(["repo", "copies", "licence", "rows"]).to_pylist()
    }
    found = updated.models_table(["repo", "copies", "licence", "rows"]).to_pylist()
    assert {row["repo"] for row in found} == by_repo.keys()
    for row in found:
        assert {**row, "id": 0, "weights": 0} == {**by_repo[row["repo"]], "id": 0, "weights": 0}
    assert updated.count_models("licence = 'mit'") == sum(row["licence"] == "mit" for row in found)
    for model in {model.repo: model for model in (*left[::3], *came)}.values():
        _same_summary(ours, theirs, model.repo)
        _same_scores(
            [(hit.score, hit.duplicates) for hit in ours.models_like(model.repo, k=100)],
            [(hit.score, hit.duplicates) for hit in theirs.models_like(model.repo, k=100)],
        )
        like = f"{model.repo}#0"
        _same_scores(
            [(hit.score, hit.duplicates) for hit in ours.search(like=like, k=500)],
            [(hit.score, hit.duplicates) for hit in theirs.search(like=like, k=500)],
        )
    for repo in set(gone) - {model.repo for model in came}:
        with pytest.raises(QueryError, match="does not hold"):
            ours.show(repo)


def _same_scores(ours: list[tuple[float, int]], theirs: list[tuple[float, int]]) -> None:
    """Scores are of float32 products of matrices of different shapes: their last digits differ."""
    assert len(ours) == len(theirs)
    np.testing.assert_allclose(sorted(ours), sorted(theirs), atol=1e-3)


def _same_summary(ours: Index, theirs: Index, repo: str) -> None:
    mine, other = (asdict(index.show(repo)) for index in (ours, theirs))
    assert sorted(mine.pop("same_weights")) == sorted(other.pop("same_weights"))
    for logit, wanted in zip(mine["logits"], other["logits"], strict=True):
        np.testing.assert_allclose(logit.pop("scores"), wanted.pop("scores"), atol=1e-3)
    assert mine == other
    ends = [index.evidence_of(index.show(repo), pictures=False) for index in (ours, theirs)]
    assert ends[0] == ends[1]


def _same_hits(ours: Index, theirs: Index, text: str, condition: str | None, k: int) -> None:
    """The same answers. Which of several copies stands for all is not told."""
    mine, other = (_hits(index, text, condition, k) for index in (ours, theirs))
    assert mine.keys() == other.keys()
    for key, (numbers, facts) in mine.items():
        np.testing.assert_allclose(numbers, other[key][0], atol=1e-3)
        assert facts == other[key][1]


def _hits(
    index: Index, text: str, condition: str | None, k: int
) -> dict[tuple[str, int, bool], tuple[tuple[float, ...], object]]:
    pinned = index._pinned
    assert pinned is not None
    identity = {row["repo"]: row["identity"] for row in pinned.models_table(["repo", "identity"]).to_pylist()}
    return {
        (identity[hit.repo], hit.logit, hit.negated): (
            (hit.score, hit.distance, hit.confidence or 0.0),
            (hit.duplicates, tuple(hit.probes)),
        )
        for hit in index.search(text, k=k, where=condition)
    }

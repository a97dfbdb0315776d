"""How the checks of answers count: recall, exact scores, blocks of models."""

from __future__ import annotations

import datetime as dt
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.complete.descriptors import ModelDescriptors
from pipelines.crawl.stage import Catalogue
from pipelines.publish import answers
from pipelines.publish.answers import Asked, Exact, Questions, _blocks, _Canary, _Offsets, _recall
from pipelines.publish.stage import ListingSnapshot, _Sample
from probelog.index.schema import EVIDENCE
from probelog.ranking import matched_heads
from probelog.search.results import Hit
from probelog.storage.layout import CatalogueFolder
from probelog.storage.schemas import CatalogueRow
from probelog.storage.store import Store
from tests.probelog.storage.test_receipts import model


def unit(seed: int, count: int, dimension: int = 5) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dimension))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def described(number: int, logits: int, repo: str | None = None, **facts: Any) -> ModelDescriptors:
    made = model(repo or f"a/{number}", logits=logits, **({"weight_digest": f"d{number}"} | facts))
    return ModelDescriptors(
        made, number, np.arange(logits), np.zeros(logits, bool),
        unit(number, logits).astype(np.float32), np.zeros((logits, 2), int), np.zeros(logits, EVIDENCE),
    )  # fmt: skip


def hit(repo: str, logit: int, score: float) -> Hit:
    given = dict.fromkeys(item.name for item in fields(Hit) if item.init)
    return Hit(**(given | {"repo": repo, "logit": logit, "score": score, "negated": False, "distance": 0.5}))


@pytest.mark.parametrize("excluded", [[], [2], [0, 3], [0, 1, 2, 3]])
def test_offsets_follow_from_their_definition(excluded: list[int]) -> None:
    gallery, background = unit(0, 6), unit(1, 4)
    found = _Offsets(gallery, background, 7.0).without(np.array(excluded, np.int64))
    # Where all names are excluded, all count.
    kept = background if len(excluded) == 4 else np.delete(background, excluded, axis=0)
    np.testing.assert_allclose(found, np.log(np.exp(7.0 * gallery @ kept.T).mean(axis=1)))
    np.testing.assert_allclose(
        _Offsets(gallery, background, 7.0).without(np.empty(0, np.int64)),
        matched_heads.offsets(gallery, background, 7.0),
    )
    assert _Offsets(gallery, background[:0], 7.0).without(np.empty(0, np.int64)).tolist() == [0.0] * 6


def test_blocks_keep_the_order_and_hold_some_thousand_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_BLOCK_LOGITS", 4)
    models = [described(number, logits) for number, logits in enumerate([1, 3, 5, 2, 1])]
    found = [[item.number for item in block] for block in _blocks(models)]
    assert found == [[0, 1], [2], [3, 4]]
    assert list(_blocks([])) == []


def asked(hits: list[Hit], same: dict[str, str]) -> Asked:
    return _Canary("x", np.zeros(5), np.empty(0, np.int64), hits).asked(same)


def exact(one: Asked, *blocks: tuple[list[ModelDescriptors], np.ndarray]) -> Exact:
    """Exact answers to one query, of blocks with the given scores, each added as a worker's."""
    found = Exact(Questions([one], np.zeros((0, 5)), np.zeros((0, 5)), 1.0))
    for models, scores in blocks:
        some = Exact(Questions([one], np.zeros((0, 5)), np.zeros((0, 5)), 1.0))
        some._add(0, one, models, scores)
        found.add(some)
    return found


def test_the_exact_first_ten_are_of_all_blocks_and_copies_count_once() -> None:
    models = [described(0, 8), described(1, 8), described(2, 3, weight_digest="d0")]
    one = asked([hit("a/1", 3, 9.0), hit("a/2", 1, 8.0)], {"a/1": "d1", "a/2": "d0"})
    others = np.concatenate([np.arange(8.0) + 0.5, [99.0, 0.0, 5.0]])
    found = exact(one, (models[:1], np.arange(8.0)), (models[1:], others))
    (best,), (scores,) = found.best, found.scores
    assert best[("d0", 0, False)] == 99.0, "the best of what a model and its copies have"
    assert sorted(best.values(), reverse=True) == [99.0, 7.5, 7.0, 6.5, 6.0, 5.5, 5.0, 5.0, 4.5, 4.0]
    assert scores[("a/1", 3, False)] == 3.5
    assert scores[("a/2", 1, False)] == 0.0


def test_recall_is_the_share_of_the_exact_ones() -> None:
    def recall(logits: list[int], scores: np.ndarray, tolerance: float) -> float:
        hits = [hit("a/0", logit, 0.0) for logit in logits]
        found = exact(asked(hits, {"a/0": "d0"}), ([described(0, len(scores))], scores))
        return _recall(hits, found.best[0], found.scores[0], tolerance)

    for logits, share in (([0, 1, 2, 3], 1.0), ([0, 1], 0.5), ([], 0.0)):
        assert recall(logits, np.array([5.0, 4.0, 3.0, 2.0]), 0.1) == share
    many = np.array([*range(20, 9, -1), 5.0])
    assert recall([10, 11], many, 0.5) == 0.0, "neither is among the first ten"
    assert recall([10, 11], many, 1.0) == 0.1, "as good as the tenth"
    assert _recall([], {}, {}, 0.1) == 1.0, "nothing to be answered"


def test_a_sample_keeps_the_first_model_and_the_labels_of_its_own_logits() -> None:
    sample = _Sample(0.0)
    first = described(0, 2, labels=["only one"])
    opposite = ModelDescriptors(
        first.model, 0, np.array([0, 1, 0]), np.array([False, False, True]), unit(0, 3).astype(np.float32),
        np.zeros((3, 2), int), np.zeros(3, EVIDENCE),
    )  # fmt: skip
    background = matched_heads.Background(np.eye(first.directions.shape[1]), 2.0)
    sample.add(opposite, background)
    sample.add(described(1, 4), background)
    assert sample._labels == ["only one", "", ""]
    assert (np.concatenate(sample._offsets) == background.offsets(opposite.directions)).all()
    every = _Sample(1.0)
    for number in range(3):
        every.add(described(number, 2), background)
    assert len(every._labels) == 6


def test_a_watermark_is_the_newest_change_that_is_not_from_the_future(tmp_path: Path) -> None:
    day = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
    started, finished = "2025-01-05T00:00:00+00:00", "2025-01-06T00:00:00+00:00"

    def watermark(*days: int | None) -> str | None:
        receipt = {"run": "1", "rows": [], "failures": [], "started": started, "finished": finished}
        rows = [
            CatalogueRow(f"a/{n}", "1", last_modified=None if n is None else day + dt.timedelta(days=n))
            for n in days
        ]
        folder = CatalogueFolder.of("-".join(map(str, days)) or "none")
        snapshot = ListingSnapshot.of(Catalogue(Store(tmp_path), folder, receipt).add(rows, None))
        assert (snapshot.at, snapshot.finished) == (started, finished)
        return snapshot.watermark

    assert watermark(1, 3, None, 2) == "2025-01-04T00:00:00+00:00"
    assert watermark(1, 5, 6) == "2025-01-06T00:00:00+00:00", "at the very end counts"
    assert watermark(6) is watermark() is None

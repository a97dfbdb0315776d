"""What a publish is made from: by what it is known, when there is nothing to do, and what it must not take away."""

from __future__ import annotations

import datetime as dt
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest

from pipelines.complete.record import CompletionRecord
from pipelines.config.model import Config
from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.publish import stage
from pipelines.publish.release import LiveIndex, PublishResult
from pipelines.publish.stage import ListingSnapshot, model_table, publish
from pipelines.quality.failures import FailureCounts
from probelog.errors import UsageError
from probelog.index.schema import MODEL_FACTS
from probelog.probes.probe_set import VERSION, ProbeSet
from probelog.publication.lifecycle import go_live
from probelog.storage.schemas import CatalogueRow, Parent
from tests.support.worlds.probed_models import probed_model
from tests.support.worlds.small_index import build

FINISHED = "2026-01-02T00:00:00+00:00"
ROWS = (CatalogueRow("a/2", "2", downloads=5), CatalogueRow("a/1", "1", licence="mit"))


@dataclass(frozen=True)
class Encoder:
    """Of an encoder only its digest matters here."""

    digest: str = "digest"


@dataclass(frozen=True)
class Inputs:
    """What `publish` is given, each to be replaced."""

    folder: Path
    rows: tuple[CatalogueRow, ...] = ROWS
    finished: str = FINISHED
    completion: str = "completion"
    probe_set: str = "a" * 64
    encoder: str = "digest"
    names: tuple[str, ...] | None = ("cat", "dog")
    prompt: tuple[str, ...] = ("a {}", "the {}")

    def job(self) -> Job:
        (self.folder / "names.txt").write_text("\n".join(self.names or ()))
        keys = {"store": str(self.folder / "store"), "probes": "unused", "prompt": list(self.prompt)}
        background = "hub" if self.names is None else str(self.folder / "names.txt")
        config = Config.model_validate(keys | {"background": background})
        return Job.of(config, Report(io.StringIO()))

    def publish(self, job: Job | None = None, live: LiveIndex | None = None) -> PublishResult:
        job = job or self.job()
        manifest = {"kind": "probe-set", "version": VERSION, "hash": self.probe_set, "count": 1, "files": []}
        return publish(
            job,
            ListingSnapshot(self.rows, None, "2026-01-01T00:00:00+00:00", self.finished),
            ProbeSet(job.store, manifest),
            cast("Any", Encoder(self.encoder)),
            "observations",
            [],
            CompletionRecord(self.completion, 1, 0.1, 0.5, 0.5, 1, 1, 0, {}),
            FailureCounts(0),
            live=live,
        )


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Callable[[Inputs], str]:
    """The key of what a publish is made from; nothing is built."""

    def of(inputs: Inputs) -> str:
        seen: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(
                stage, "release_generation", lambda job, live, source, *_, **__: seen.append(source)
            )
            inputs.publish()
        return seen[0]

    return of


def test_whatever_changes_an_index_changes_its_source(
    tmp_path: Path, source: Callable[[Inputs], str]
) -> None:
    usual = Inputs(tmp_path)
    assert source(replace(usual, rows=ROWS[::-1])) == source(usual), "rows have an order of their own"
    changes: dict[str, Any] = {
        "rows": (ROWS[0], replace(ROWS[1], licence="other")),
        "completion": "other",
        "probe_set": "b" * 64,
        "encoder": "other",
        "names": ("cat", "owl"),
        "prompt": ("the {}", "a {}"),
    }
    sources = [source(usual), *(source(replace(usual, **{name: value})) for name, value in changes.items())]
    assert len(set(sources)) == len(sources)
    of_the_hub = source(replace(usual, names=None))
    assert of_the_hub not in sources, "the names that its models declare are of its source"


def test_what_is_live_already_is_not_built_again(tmp_path: Path, source: Callable[[Inputs], str]) -> None:
    usual = Inputs(tmp_path)
    output = io.StringIO()
    job = Job.of(usual.job().config, Report(output))
    index = job.store.child("index")
    build(index, "first", images=False, live=False)
    pointer = go_live(index, "first", source(usual))
    done = usual.publish(job)
    assert (done.pointer, done.is_new, done.models) == (pointer, False, 8)
    assert "publish: generation first is already live" in output.getvalue()
    assert source(replace(usual, completion="other")) != pointer.source


@pytest.mark.parametrize(("seconds", "refused"), [(-1, True), (0, False), (1, False)])
def test_a_listing_older_than_a_nightly_run_takes_nothing_away(
    tmp_path: Path, source: Callable[[Inputs], str], seconds: int, refused: bool
) -> None:
    finished = dt.datetime.fromisoformat(FINISHED) + dt.timedelta(seconds=seconds)
    inputs = Inputs(tmp_path, finished=finished.isoformat())
    index = inputs.job().store.child("index")
    build(index, "live", images=False, settings={"night": FINISHED})
    if refused:
        with pytest.raises(UsageError, match=r"older than the nightly run of .* whose models are live"):
            inputs.publish()
    else:
        source(inputs)
    # What cannot be read is to be replaced.
    index.delete_folder("generations/live")
    source(inputs)


def test_the_facts_of_a_model_come_from_probing_and_from_the_catalogue() -> None:
    probed = probed_model(
        "a/1", sha="1", logits=3, labels=["x", "y", "z"], probes=[1, 4], parameters=77, weight_digest="w"
    )
    parents = [Parent("b/base", "finetune", "card")]
    listed = CatalogueRow("a/1", "1", licence="mit", downloads=9, tags=["t"], parents=parents)
    other = probed_model("a/2", sha="2", logits=1, labels=[], probes=[])
    rows = {
        ("a/1", "1"): listed,
        ("a/2", "2"): CatalogueRow("a/2", "2"),
        ("a/1", "2"): CatalogueRow("a/1", "2"),
    }
    table = model_table([other, probed], rows, {})
    assert table.schema.names == [name for name in MODEL_FACTS.names if name != "copies"]
    second, first = table.to_pylist()
    assert (first["repo"], first["sha"], first["logits"], first["labels"]) == ("a/1", "1", 3, ["x", "y", "z"])
    assert (first["observed"], first["parameters"], first["weight_digest"]) == (2, 77, "w")
    assert (first["licence"], first["downloads"], first["tags"]) == ("mit", 9, ["t"])
    assert [parent["repo"] for parent in first["parents"]] == ["b/base"]
    assert (second["repo"], second["observed"], second["licence"]) == ("a/2", 0, None)

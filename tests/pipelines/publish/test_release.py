"""From built to live: whatever fails on the way is removed, and what is live stays."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.model import Config
from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.publish.release import LiveIndex, release_generation
from pipelines.quality.failures import FailureCounts
from pipelines.quality.report import last_report
from probelog.errors import ConflictError, QualityError, StoreError
from probelog.index.generation import Generation
from probelog.index.pointer import read_pointer
from probelog.index.settings import GenerationSettings
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.lifecycle import go_live
from probelog.storage.layout import POINTER
from probelog.storage.store import Store
from tests.support.worlds import small_index
from tests.support.worlds.small_index import MODELS_OF_ALL_SORTS, Model, some_settings

SETTINGS = some_settings(models=3, logits=12, probes=1, sharpness=1.0, rows=0, large=False, middle_offset=0.0)


class Publisher:
    """Builds generations that hold settings alone; ``steps`` notes what was done with them."""

    def __init__(self, store: Path) -> None:
        self.out = io.StringIO()
        content = {"store": str(store), "probes": "unused"}
        self.job = Job.of(Config.model_validate(content), Report(self.out))
        self.index = self.job.store.child("index")
        self.steps: list[str] = []
        self.fails: dict[str, BaseException] = {}

    def step(self, name: str) -> None:
        self.steps.append(name)
        if name in self.fails:
            raise self.fails[name]

    def build(self, name: str) -> GenerationSettings:
        writer = GenerationWriter(self.index, name)
        self.step("build")
        writer.write_meta({"settings": SETTINGS.to_bytes()})
        writer.finish()
        return SETTINGS

    def check(self, generation: Generation) -> None:
        assert generation.settings == SETTINGS
        self.step("check")

    def release(self, live: LiveIndex | None = None, source: str = "source", **more: Any) -> Any:
        return release_generation(
            self.job, live, source, self.build, self.check, FailureCounts(0),
            allowed=lambda: self.step("allowed"), **more,
        )  # fmt: skip

    def first(self, name: str = "first") -> None:
        self.build(name)
        go_live(self.index, name, "s")

    @property
    def generations(self) -> set[str]:
        return {name.split("/")[1] for name in self.index.names("generations")}


@pytest.fixture
def publisher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publisher:
    """The quality gate has nothing to ask of a generation without models: it only notes that it was asked."""
    from pipelines.publish import release

    made = Publisher(tmp_path)

    def gate(job: Job, candidate: Generation, *_: object) -> None:
        made.step("gate")

    monkeypatch.setattr(release, "_apply_quality_gate", gate)
    return made


def test_checks_and_gate_come_before_the_swap(publisher: Publisher) -> None:
    done = publisher.release()
    assert publisher.steps == ["build", "check", "gate", "allowed"]
    pointer = read_pointer(publisher.index)[0]
    assert (done.pointer, done.is_new, done.models, done.logits) == (pointer, True, 3, 12)
    assert (pointer.source, pointer.base) == ("source", None)
    assert f"generation {pointer.generation} is live: 3 models, 12 logits" in publisher.out.getvalue()


@pytest.mark.parametrize("step", ["build", "check", "gate", "allowed"])
@pytest.mark.parametrize("error", [StoreError("damaged"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failed_generation_is_removed_and_the_live_one_stays(
    publisher: Publisher, step: str, error: BaseException
) -> None:
    publisher.first()
    before = publisher.index.read(POINTER)
    publisher.fails[step] = error
    publisher.steps.clear()
    if step == "build":
        publisher.fails = {"build": error}
    with pytest.raises(type(error)):
        publisher.release(LiveIndex.open(publisher.index))
    assert publisher.steps[-1] == step
    assert publisher.index.read(POINTER) == before
    assert publisher.generations == {"first"}


@pytest.mark.parametrize("began", ["without an index", "before another publish"])
def test_the_generation_of_an_overtaken_publisher_is_removed(publisher: Publisher, began: str) -> None:
    if began == "before another publish":
        publisher.first()
    live = LiveIndex.open(publisher.index)
    publisher.first("meanwhile")
    with pytest.raises(ConflictError, match="meanwhile is live"):
        publisher.release(live)
    assert read_pointer(publisher.index)[0].generation == "meanwhile"
    assert publisher.generations == {"meanwhile", *(["first"] if live else [])}


def test_an_update_names_its_base(publisher: Publisher) -> None:
    publisher.first()
    done = publisher.release(LiveIndex.open(publisher.index), base="first")
    assert done.pointer.base == "first"
    assert done.pointer.choice[1:] == ["first"]


def test_old_generations_are_swept_and_a_failed_sweep_is_reported(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.index.write("generations/ruin/x", b"1")
    publisher.job.store.write("encoders/old/receipt.json", b"{}")
    os.utime(publisher.job.store.path("encoders/old/receipt.json"), (0, 0))
    publisher.release()
    assert publisher.job.store.names("encoders") == []
    assert list(read_pointer(publisher.index)[0].retired) == ["ruin"]

    def refused(_: Store) -> None:
        raise StoreError("no room")

    monkeypatch.setattr(Store, "time", refused)
    done = publisher.release(LiveIndex.open(publisher.index), "other")
    assert done.is_new
    assert (
        "old generations were not removed, the next publish tries again: no room" in publisher.out.getvalue()
    )


def _live(publisher: Publisher, change: Callable[[Store], object]) -> LiveIndex:
    publisher.first()
    change(publisher.index)
    live = LiveIndex.open(publisher.index)
    assert live is not None
    return live


def test_the_live_index(publisher: Publisher) -> None:
    assert LiveIndex.open(publisher.index) is None
    live = _live(publisher, lambda _: None)
    assert live.pointer == read_pointer(publisher.index)[0]
    assert live.generation.settings == SETTINGS
    unchanged = live.unchanged()
    assert (unchanged.pointer, unchanged.is_new, unchanged.models, unchanged.logits) == (live.pointer, False, 3, 12)  # fmt: skip


def test_a_live_generation_that_cannot_be_read_keeps_a_comparison_from_being_made(
    publisher: Publisher,
) -> None:
    live = _live(publisher, lambda index: index.delete_folder("generations/first"))
    with pytest.raises(StoreError):
        live.unchanged()
    publisher.steps.clear()
    with pytest.raises(StoreError, match=r"Roll back, or publish without comparing"):
        publisher.release(live)
    assert publisher.steps == []
    config = publisher.job.config.model_copy(deep=True)
    config.quality.__dict__["enforce"] = False
    publisher.job = Job(config, publisher.job.store, publisher.job.report)
    assert publisher.release(live).is_new
    assert "the new generation is not compared with the live one" in publisher.out.getvalue()


# The quality gate


class Gated:
    """Publishes small indexes through the real gate."""

    def __init__(self, folder: Path, enforce: bool = True) -> None:
        self.out = io.StringIO()
        content = {"store": str(folder), "probes": "unused", "quality": {"enforce": enforce}}
        self.job = Job.of(Config.model_validate(content), Report(self.out))
        self.index = self.job.store.child("index")

    def live(self, models: tuple[Model, ...], run: FailureCounts) -> LiveIndex:
        small_index.build(self.index, "live", models, images=False, settings={"run": run.to_dict()})
        live = LiveIndex.open(self.index)
        assert live is not None
        return live

    def release(self, live: LiveIndex | None, run: FailureCounts, **more: Any) -> dict[str, Any]:
        """Publish the usual models; returns what the gate measured, by name."""

        def build(name: str) -> GenerationSettings:
            made = small_index.build(self.index, name, images=False, live=False)
            return Generation(self.index, made.pointer).settings

        release_generation(self.job, live, "source", build, lambda _: None, run, **more)
        report = last_report(self.job.store)
        assert report is not None
        return {item["name"]: item for item in report["measures"]}


BAD, GOOD = FailureCounts(100, {"timeout": 60}), FailureCounts(100, {"gated": 3})


def test_a_run_is_compared_with_the_one_that_made_what_is_live(tmp_path: Path) -> None:
    gated = Gated(tmp_path)
    measures = gated.release(gated.live(MODELS_OF_ALL_SORTS, BAD), BAD)
    assert (measures["failed: timeout"]["before"], measures["failed: timeout"]["verdict"]) == (0.6, "passed")
    assert "worse than its limits" not in gated.out.getvalue()
    measures = Gated(tmp_path / "other").release(None, BAD)
    assert measures["failed models"]["note"] == "no run to compare with"


def test_a_run_that_is_worse_is_published_only_where_limits_are_not_enforced(tmp_path: Path) -> None:
    strict = Gated(tmp_path)
    live = strict.live(MODELS_OF_ALL_SORTS, GOOD)
    with pytest.raises(QualityError, match=r"failed: timeout: 60.0% \(before: 0.0%\)"):
        strict.release(live, BAD)
    assert read_pointer(strict.index)[0] == live.pointer
    assert {name.split("/")[1] for name in strict.index.names("generations")} == {"live"}
    lenient = Gated(tmp_path, enforce=False)
    lenient.release(live, BAD)
    assert (
        "worse than its limits in failed models, failed: timeout; published all the same, because quality.enforce is "
        "false\n"
    ) in lenient.out.getvalue()
    assert read_pointer(strict.index)[0] != live.pointer


def test_the_gate_looks_at_the_models_that_were_added(tmp_path: Path) -> None:
    gated = Gated(tmp_path, enforce=False)
    first = MODELS_OF_ALL_SORTS[0]
    live = gated.live(MODELS_OF_ALL_SORTS[3:], GOOD)
    new = "new models named as declared"
    assert gated.release(live, GOOD)[new]["counted"] == 1, "what is new is found by comparing"
    live = LiveIndex.open(gated.index)
    assert gated.release(live, GOOD)[new]["counted"] == 0
    live = LiveIndex.open(gated.index)
    assert gated.release(live, GOOD, added=[(first.repo, first.sha)])[new]["counted"] == 1

"""The figures of the last run of a command: kept whatever becomes of the run, and never the reason why it ends."""

from __future__ import annotations

import datetime as dt
import io
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.model import Config
from pipelines.job.figures import recorded, recorded_as
from pipelines.job.job import Job
from pipelines.job.progress import Report
from probelog.errors import QualityError, StoreError
from probelog.hub.usage import METER, HubUsage
from probelog.storage.store import Store


def job(folder: Path) -> Job:
    content = {"store": str(folder), "probes": "unused", "scratch": str(folder.parent / "scratch")}
    return Job.of(Config.model_validate(content), Report(io.StringIO()))


def kept(folder: Path, command: str = "nightly") -> dict[str, Any]:
    return Store(folder).read_json(f"runs/{command}.json")


def test_a_run_that_succeeds(tmp_path: Path) -> None:
    made = job(tmp_path / "store")
    before = dt.datetime.now(dt.UTC).replace(microsecond=0)
    with recorded(made, "nightly"):
        for _ in range(2):
            with made.figures.stage("list"):
                assert kept(tmp_path / "store")["outcome"] == "running"
                time.sleep(0.01)
        METER.add(HubUsage(api=3, wait_seconds=1.5))
        made.figures.hub += HubUsage(api=1, file=2, throttled=1)
        with made.figures.stage("publish"):
            assert kept(tmp_path / "store")["stages"].keys() == {"list"}
        made.figures.counts["added"] = 7
    found = kept(tmp_path / "store")
    assert found["outcome"] == "succeeded"
    assert found["succeeded"] == found["updated"]
    assert (
        before <= dt.datetime.fromisoformat(found["started"]) <= dt.datetime.fromisoformat(found["updated"])
    )
    assert 0.02 <= found["stages"]["list"] < 10
    assert found["counts"] == {"added": 7}
    assert found["hub"] == {"api": 4, "file": 2, "throttled": 1, "wait_seconds": 1.5}
    assert found["disk_free_bytes"] > 0


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(QualityError("worse"), "QualityError"), (KeyboardInterrupt(), "interrupted"), (SystemExit(143), "interrupted")],
)  # fmt: skip
def test_how_a_run_ends_otherwise_and_when_the_last_one_succeeded(
    tmp_path: Path, error: BaseException, outcome: str
) -> None:
    with recorded(job(tmp_path), "nightly"):
        pass
    last = kept(tmp_path)["succeeded"]

    @recorded_as("nightly")
    def fail(made: Job, stage: str) -> None:
        with made.figures.stage(stage):
            raise error

    with pytest.raises(type(error)):
        fail(job(tmp_path), "publish")
    found = kept(tmp_path)
    assert (found["outcome"], found["succeeded"]) == (outcome, last)
    assert found["stages"].keys() == {"publish"}
    with recorded(job(tmp_path), "full"):
        pass
    assert kept(tmp_path, "full")["succeeded"] is not None
    assert kept(tmp_path)["outcome"] == outcome


def test_a_run_that_is_refused_before_its_first_stage_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError), recorded(job(tmp_path / "wrong"), "probe"):
        raise StoreError("no catalogue")
    assert not (tmp_path / "wrong").exists()


def test_a_store_that_refuses_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StoreError("full")

    monkeypatch.setattr(Store, "write_json", refuse)
    done = []
    with recorded(job(tmp_path), "nightly"):
        done.append(1)
    assert done


def test_figures_that_are_damaged_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/nightly.json").write_text("{")
    with recorded(job(tmp_path), "nightly"):
        pass
    assert kept(tmp_path)["outcome"] == "succeeded"

"""Whole nightly runs that have nothing to probe, so that they need no Ray: what they lead to, what they say, their lease."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.complete.record import CompletionRecord, measure_file, write_record
from pipelines.config.model import Config
from pipelines.job.job import Job
from pipelines.job.lease import LeaseHeldError, hold_lease
from pipelines.job.progress import Report
from pipelines.nightly.drift import Drift
from pipelines.nightly.run import NightlyRun, _report, run_nightly
from pipelines.publish.release import PublishResult
from probelog.hub.client import HubError
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer, read_pointer
from probelog.probes.probe_set import VERSION
from probelog.storage.encoding import npy
from probelog.storage.layout import LEASE
from probelog.storage.store import Store
from tests.support.hub.faults import answer
from tests.support.hub.live_hub import LiveHub, live_hub
from tests.support.worlds.small_index import PROMPT, Model, build

PROBE_SET, NAMES = "a" * 64, ["cat", "dog", "owl", "tree"]
HELD = (Model("owner/a", ("x", "y")), Model("owner/b", ("x", "y", "z")), Model("owner/c", ("x",)))


class Nightly:
    """An index of three models, their Hub, and all else that a nightly run starts from."""

    def __init__(self, folder: Path, hub: LiveHub) -> None:
        self.folder, self.hub, self.store = folder, hub, Store(folder / "store")
        self.index = self.store.child("index")
        (folder / "names.txt").write_text("\n".join(NAMES))
        observations = self.job().observations_key(PROBE_SET)
        self.store.write("completion/finished/columns.npy", npy(np.zeros((0, 3), np.float32)))
        columns = {"columns.npy": measure_file(self.store, "completion/finished/columns.npy")}
        completion = CompletionRecord("finished", 3, 0.1, 0.5, 0.6, 3, 6, 0, {})
        write_record(self.store, completion, columns, observations)
        manifest = {"kind": "probe-set", "version": VERSION, "hash": PROBE_SET, "count": 0, "files": []}
        self.store.write_json(f"probes/{PROBE_SET[:16]}/manifest.json", manifest)
        settings = {"observations": observations, "completion": "finished", "encoder": "an encoder"}
        build(
            self.index, "base", HELD, "clip", images=False, names=NAMES, settings=settings,
            further={"failed.npy": npy(np.empty(0, np.uint64))},
        )  # fmt: skip
        for number, model in enumerate(HELD):
            hub.put(model.repo, number, sha=model.sha)
        hub.remove("owner/model-0")

    def job(self, **nightly: Any) -> Job:
        self.output = io.StringIO()
        always = {"reconcile_days": 0.0, "max_removed_share": 1.0, "rebuild_share": 1.0, "max_drift": 100.0}
        content = {
            "store": self.store.uri,
            "probes": "unused",
            "encoder": "an encoder",
            "background": str(self.folder / "names.txt"),
            "prompt": [PROMPT],
            "fraction": 1.0,
            "seed": 0,
            "quality": {"enforce": False},
            "nightly": always | nightly,
        }
        return Job.of(Config.model_validate(content), Report(self.output))

    def run(self, **nightly: Any) -> NightlyRun:
        return run_nightly(self.job(**nightly))

    @property
    def pointer(self) -> Pointer:
        return read_pointer(self.index)[0]


@pytest.fixture
def nightly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nightly]:
    with live_hub(tmp_path / "hub", 1) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield Nightly(tmp_path, hub)


def test_nothing_new(nightly: Nightly) -> None:
    done = nightly.run()
    assert done == NightlyRun(done.published, 0, 0, 0, [], None, None)
    assert (done.published.pointer, done.published.is_new) == (nightly.pointer, False)
    assert "nightly: nothing new; generation base stays live" in nightly.output.getvalue()
    assert "a full run is due" not in nightly.output.getvalue()


def test_what_was_removed_is_published_and_said(nightly: Nightly) -> None:
    nightly.hub.remove("owner/b")
    done = nightly.run()
    assert (done.tried, done.added, done.removed, done.failures, done.refit_due) == (0, 0, 1, [], None)
    assert done.drift is not None
    assert done.published.is_new
    assert (nightly.pointer, nightly.pointer.base) == (done.published.pointer, "base")
    update = Generation(nightly.index, nightly.pointer)
    assert update.models_table(["repo"])["repo"].to_pylist() == ["owner/a", "owner/c"]
    said = nightly.output.getvalue()
    name, largest = done.drift.largest()
    assert (
        f"0 models added by this run; since the last full run 0 added, 1 removed, drift {largest:.1%} ({name})"
        in said
    )
    assert "nothing new" not in said
    assert "a full run is due" not in said
    again = nightly.run(max_drift=0.0)
    assert (again.published.is_new, again.drift, again.refit_due) == (False, None, None)


def test_what_is_said_of_a_run_with_drift(tmp_path: Path) -> None:
    drift = Drift(2, 0.6, 0.5, 0.2, 0.01, 0.05, 3, 0.1)

    def said(refit_due: str | None) -> str:
        output = io.StringIO()
        job = Job.of(Config.model_validate({"store": str(tmp_path), "probes": "unused"}), Report(output))
        published = PublishResult(Pointer("new", "s", "p"), True, 6, 12)
        _report(job, NightlyRun(published, 4, 1, 3, [], drift, refit_due), 2)
        return output.getvalue()

    assert "1 models added by this run; since the last full run 2 added, 3 removed" in said(None)
    assert "drift 20.0% (held-out error)" in said(None)
    assert "is due" not in said(None)
    assert "nightly: a full run is due: the error has grown" in said("the error has grown")


def test_one_run_at_a_time_also_after_one_that_failed(nightly: Nightly) -> None:
    with hold_lease(nightly.store, LEASE, seconds=60), pytest.raises(LeaseHeldError, match="at work"):
        nightly.run()
    nightly.hub.faults.spoil("/api/models", answer(404))
    with pytest.raises(HubError):
        nightly.run()
    nightly.hub.faults.rules.clear()
    assert not nightly.run().published.is_new

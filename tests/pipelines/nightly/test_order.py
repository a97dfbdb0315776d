"""The order of a nightly run's stages, what its decision leads to, and what is said of it; the stages themselves are
tested one by one beside this.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipelines.config.model import Config
from pipelines.job.job import Job
from pipelines.job.lease import LeaseHeldError, hold_lease
from pipelines.job.progress import Report
from pipelines.nightly import run as nightly
from pipelines.nightly.decision import Decision
from pipelines.nightly.drift import Drift
from pipelines.nightly.run import NightlyRun, run_nightly
from pipelines.publish.release import PublishResult
from probelog.index.pointer import Pointer
from probelog.storage.layout import LEASE

DRIFT = Drift(2, 0.6, 0.5, 0.2, 0.01, 0.05, 3, 0.1)
LIVE = PublishResult(Pointer("live", "s", "p"), False, 5, 9)
NEW = PublishResult(Pointer("new", "s", "p"), True, 6, 12)
ADDED = [("a/new", "1")]


class Stages:
    """Stands in for every stage, and notes which came when."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, decision: Decision | None) -> None:
        self.output, self.calls = io.StringIO(), list[str]()
        config = Config.model_validate({"store": str(folder), "probes": "unused"})
        self.job = Job.of(config, Report(self.output))
        self.allowed: Any = None
        live = SimpleNamespace(generation="the live generation", unchanged=lambda: LIVE)
        self.start = SimpleNamespace(live=live)
        self.changes = SimpleNamespace(
            rows=dict.fromkeys("abcd"),
            removed={"a/old": 3, "a/older": 4},
            descriptors=SimpleNamespace(models=["a/new", "a/newer"]),
            missing_in=lambda generation: ADDED if generation == live.generation else [],
        )
        hub = [SimpleNamespace(to_index=["a row"], number=number) for number in range(3)]
        self.probed = SimpleNamespace(run="counts", ledger=SimpleNamespace(failures=["one failure"]))
        self._expect(patch, "open_start", self.start, self.job)
        self._expect(patch, "list_changes", hub[0], self.job, self.start)
        self._expect(patch, "reconcile_changes", hub[1], self.job, self.start, hub[0])
        self._expect(patch, "save_changes", hub[2], self.job, self.start, hub[1])
        patch.setattr(nightly, "probe_changes", self._probe)
        self._expect(patch, "describe_changes", "described", self.job, self.start, self.probed)
        gathered = (self.job, self.start, hub[2], self.probed, "described")
        self._expect(patch, "changes_since_base", self.changes, *gathered)
        self._expect(patch, "decide", decision, self.job, self.changes)
        patch.setattr(nightly, "publish_rebuilt", self._rebuild)
        patch.setattr(nightly, "publish_update", self._update)

    def _expect(self, patch: pytest.MonkeyPatch, name: str, result: object, *expected: object) -> None:
        def stage(*given: object) -> object:
            assert given == expected
            with pytest.raises(LeaseHeldError), hold_lease(self.job.store, LEASE, seconds=2):
                pass
            self.calls.append(name)
            return result

        patch.setattr(nightly, name, stage)

    def _probe(self, job: Job, start: object, rows: object, ray: contextlib.ExitStack) -> object:
        assert (job, start, rows) == (self.job, self.start, ["a row"])
        ray.callback(self.calls.append, "ray ends")
        self.calls.append("probe_changes")
        return self.probed

    def _rebuild(self, job: Job, changes: object, run: object, allowed: Any) -> PublishResult:
        assert (job, changes, run) == (self.job, self.changes, "counts")
        allowed()  # the lease is this run's
        self.calls.append("publish_rebuilt")
        return NEW

    def _update(
        self, job: Job, changes: object, run: object, drift: Drift, added: object, allowed: Any
    ) -> PublishResult:
        assert (job, changes, run, drift, added) == (self.job, self.changes, "counts", DRIFT, ADDED)
        allowed()
        self.calls.append("publish_update")
        return NEW


BEFORE = [
    *("open_start", "list_changes", "reconcile_changes", "save_changes", "probe_changes", "describe_changes"),
    *("ray ends", "changes_since_base", "decide"),
]


@pytest.mark.parametrize(
    ("decision", "then", "published"),
    [
        (None, [], LIVE),
        (Decision(True, DRIFT, None), ["publish_rebuilt"], NEW),
        (Decision(False, DRIFT, "because"), ["publish_update"], NEW),
    ],
)
def test_stages_follow_each_other_under_one_lease(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    decision: Decision | None,
    then: list[str],
    published: PublishResult,
) -> None:
    stages = Stages(tmp_path, monkeypatch, decision)
    done = run_nightly(stages.job)
    assert stages.calls == [*BEFORE, *then]
    drift = None if decision is None else DRIFT
    refit_due = None if decision is None else decision.refit_due
    failures = cast("Any", ["one failure"])
    assert done == NightlyRun(published, 4, 1, 2, failures, drift, refit_due)
    with hold_lease(stages.job.store, LEASE, seconds=2):
        pass  # it was given back


def test_what_is_said_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(decision: Decision | None) -> str:
        stages = Stages(tmp_path, monkeypatch, decision)
        run_nightly(stages.job)
        return stages.output.getvalue()

    assert "nightly: nothing new; generation live stays live" in said(None)
    told = said(Decision(False, DRIFT, "the error has grown"))
    assert "1 models added by this run; since the last full run 2 added, 2 removed" in told
    assert "drift 20.0% (held-out error)" in told
    assert "nightly: a full run is due: the error has grown" in told
    assert "a full run is due" not in said(Decision(False, DRIFT, None))


def test_a_stage_that_fails_gives_the_lease_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(tmp_path, monkeypatch, None)

    def fails(*_: object) -> None:
        raise ValueError("no more")

    monkeypatch.setattr(nightly, "describe_changes", fails)
    with pytest.raises(ValueError, match="no more"):
        run_nightly(stages.job)
    assert stages.calls == [*BEFORE[:5], "ray ends"]
    with hold_lease(stages.job.store, LEASE, seconds=2):
        pass

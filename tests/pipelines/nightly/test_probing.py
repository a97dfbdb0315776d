"""What probing comes to where earlier runs have done it all, and how failures are counted; without Ray."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import pytest

from pipelines.config.model import Config
from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.nightly.probing import ProbedChanges, probe_changes
from pipelines.nightly.record import NightlyFiles
from pipelines.nightly.run import NightlyRun
from pipelines.nightly.start import FailedVersions, NightlyStart
from pipelines.probe import run
from pipelines.probe.run import StageResult
from pipelines.quality.failures import FailureCounts
from probelog.errors import FailureReason
from probelog.probes.probe_set import VERSION, ProbeSet
from probelog.storage.ledger import ItemResult, Ledger, item_key
from probelog.storage.schemas import FAILURES, CatalogueRow, Failure
from probelog.storage.store import Store
from tests.probelog.storage.test_ledger import spool

SHA = "s" * 40


@pytest.fixture
def start(tmp_path: Path) -> NightlyStart:
    """Of which only the ledger, the probe set and the address matter here."""
    store = Store(tmp_path)
    manifest = {"kind": "probe-set", "version": VERSION, "hash": "a" * 64, "count": 7, "files": []}
    return NightlyStart(
        live=cast("Any", None),
        base=cast("Any", None),
        completion=cast("Any", None),
        probe_set=ProbeSet(store, manifest),
        files=NightlyFiles(store, "key", "base"),
        failed=FailedVersions(np.empty(0, np.uint64)),
        endpoint="http://127.0.0.1:9",
        at="2026-01-01T00:00:00+00:00",
    )


class SessionAskedForError(Exception):
    """For a Ray to probe on."""


@pytest.fixture(autouse=True)
def _no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs no probing starts no Ray."""

    def refuse(address: str | None) -> NoReturn:
        raise SessionAskedForError

    monkeypatch.setattr(run, "session", refuse)


def probed(start: NightlyStart, *repos: str, **changes: str) -> ProbedChanges:
    content = {"store": str(start.files.store.root), "probes": "unused"} | changes
    job = Job.of(Config.model_validate(content), Report(io.StringIO()))
    rows = [CatalogueRow(repo, SHA) for repo in repos]
    return probe_changes(job, start, rows)


def test_nothing_was_added(start: NightlyStart) -> None:
    assert probed(start) == ProbedChanges(
        StageResult("key-base", [], 0, FAILURES.empty_table()), FailureCounts(0)
    )
    assert start.files.store.names("observations") == []


def test_what_earlier_runs_probed_is_entered_in_the_main_ledger_and_not_counted_again(
    start: NightlyStart,
) -> None:
    ledger = start.files.ledger
    hopeless = item_key("a/3", SHA)
    failure = Failure.of("a/3", SHA, "probe", FailureReason.UNSUPPORTED, "x")
    ledger.spool(hopeless, ItemResult.failure(failure))
    receipts = [ledger.seal([spool(ledger, "a/1"), spool(ledger, "a/2")]), ledger.seal([hopeless])]
    result = probed(start, "a/1", "a/3")
    assert sorted(receipt.name for receipt in result.ledger.receipts) == sorted(
        item.name for item in receipts
    )
    assert (result.ledger.key, result.ledger.models, result.ledger.tried) == ("key-base", 1, 2)
    assert [failure.repo for failure in result.ledger.failures] == ["a/3"]
    assert result.run == FailureCounts(0, {})
    assert Ledger(start.files.store, "observations/key").receipt_names() == sorted(
        item.name for item in receipts
    )
    assert len(probed(start).ledger.receipts) == 2, (
        "what was probed is described though nothing is listed now"
    )


def test_what_is_left_to_probe_needs_a_ray(start: NightlyStart) -> None:
    with pytest.raises(SessionAskedForError):
        probed(start, "a/1", ray_address="elsewhere")


def test_the_share_of_failures_is_of_all_that_were_tried() -> None:
    failure = Failure.of("a/1", SHA, "probe", FailureReason.TIMEOUT, "x")

    def run(tried: int, failures: int) -> NightlyRun:
        return NightlyRun(cast("Any", None), tried, 0, 0, [failure] * failures, None, None)

    assert [run(4, 1).failed_share, run(4, 4).failed_share, run(0, 0).failed_share] == [0.25, 1.0, 0.0]

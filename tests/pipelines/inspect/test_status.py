"""The status of a ledger is a recount from scratch, however the ledger came to be."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.inspect.status import LedgerStatus, status
from pipelines.probe.plan import ProbingPlan, first_keys, make_plan
from pipelines.probe.summary import Running, Summary
from probelog.errors import FailureReason
from probelog.storage.ledger import (
    LEDGER_VERSION,
    TIMED_PHASES,
    ItemResult,
    Ledger,
    key_numbers,
    open_failures,
)
from probelog.storage.observations import to_rows
from probelog.storage.schemas import CATALOGUE, CatalogueRow, Failure, to_table
from probelog.storage.store import Store
from tests.probelog.storage.test_ledger import model

SHA = "s" * 40
MODELS = [CatalogueRow(f"o/m{i}", SHA) for i in range(7)]
TABLE = to_table(MODELS, CATALOGUE)
FOLDER = "observations/x"


def ledger_in(folder: Path) -> Ledger:
    ledger = Ledger(Store(folder), FOLDER)
    manifest = {
        "probe_set": "p",
        "fraction": 1.0,
        "seed": 0,
        "planned": len(MODELS),
        "version": LEDGER_VERSION,
    }
    ledger.store.write_json(f"{FOLDER}/manifest.json", manifest)
    return ledger


def plan_for(ledger: Ledger, retry_failed: bool = True) -> ProbingPlan:
    """As the probe stage makes it."""
    receipts = ledger.receipts()
    sealed = key_numbers(item for receipt in receipts for item in receipt.items)
    failures = open_failures(ledger.failure_rows(receipts), sealed)
    return make_plan(TABLE, first_keys(TABLE), sealed, failures, 3, retry_failed)


def result(repo: str, attempt: int, draw: int) -> ItemResult:
    """A failure for two draws of five, a copy for one."""
    if draw < 2:
        reason = [FailureReason.TIMEOUT, FailureReason.TOO_LARGE][draw]
        return ItemResult.failure(Failure.of(repo, SHA, "probe", reason, "", attempt))
    seconds = {f"seconds_{part}": float(draw + i) for i, part in enumerate(TIMED_PHASES)}
    copy = {"copy_of_repo": "o/other", "copy_of_sha": SHA} if draw == 4 else {}
    facts = model(repo, logits=draw, bytes=100 * draw, identity=f"i-{repo}", **seconds, **copy)
    return ItemResult.success(facts, to_rows(repo, SHA, np.zeros((draw, 7), np.float32)))


def recount(ledger: Ledger) -> dict[str, object]:
    """All of it from the rows."""
    receipts = ledger.receipts()
    models = ledger.models(receipts)
    failed = Counter(failure.reason for failure in ledger.failures(receipts, models))
    sealed = {item for receipt in receipts for item in receipt.items}
    unsealed = len(ledger.spooled() - sealed)
    return {
        "indexed": len(models),
        "copies": sum(found.copy_of_repo is not None for found in models),
        "logits": sum(found.logits for found in models),
        "bytes": sum(found.bytes or 0 for found in models),
        "failed": dict(failed),
        "unsealed": unsealed,
        "left": max(0, len(MODELS) - len(models) - failed.total() - unsealed),
        "seconds_a_model": {
            part: sum(getattr(found, f"seconds_{part}") for found in models) / len(models)
            for part in TIMED_PHASES
        }
        if models
        else {},
    }


def told(found: LedgerStatus) -> dict[str, object]:
    return {
        name: getattr(found, name)
        for name in ("indexed", "copies", "logits", "bytes", "failed", "unsealed", "left", "seconds_a_model")
    }


ROUND = st.tuples(
    st.lists(st.integers(0, 4), min_size=7, max_size=7),  # what comes of each model
    st.integers(1, 3),  # batches done before the driver is killed
    st.sampled_from(["no summary", "summary before", "summary after", "killed in sealing"]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ROUND, min_size=1, max_size=4))
def test_status_is_a_recount(history) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ledger = ledger_in(Path(folder))
        for draws, batches, ending in history:
            ledger.drop_sealed_spool(ledger.receipts())
            if ending == "summary before":
                Summary.covering(ledger, ledger.receipts()).write(ledger, now=True)
            plan = plan_for(ledger)
            for number in range(min(batches, len(plan.starts) - 1)):
                here = np.arange(plan.starts[number], plan.starts[number + 1])
                for item in plan.items(here):
                    ledger.spool(item.key, result(item.row.repo, item.attempt, draws[item.number]))
                ledger.seal(plan.batch(number), plan.replaced(number))
                if ending == "killed in sealing":
                    ledger.spool(item.key, result(item.row.repo, item.attempt, draws[item.number]))
            if ending == "summary after":
                Summary.covering(ledger, ledger.receipts()).write(ledger, now=True)
            assert told(status(folder).ledgers[0]) == recount(ledger)
        # What a plan holds is what is not through yet.
        left = len(plan_for(ledger, retry_failed=False))
        receipts = ledger.receipts()
        models = ledger.models(receipts)
        final = [failure for failure in ledger.failures(receipts, models) if not failure.retryable]
        assert left == len(MODELS) - len(models) - len(final)


def test_a_summary_of_other_receipts_is_thrown_away(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    plan = plan_for(ledger)
    for item in plan.items(np.arange(3)):
        ledger.spool(item.key, result(item.row.repo, 1, 3))
    receipt = ledger.seal(plan.batch(0))
    summary = Summary.covering(ledger, [receipt])
    summary.sealed["gone"] = (0.0, 5)
    summary.write(ledger, now=True)
    assert status(str(tmp_path)).ledgers[0].indexed == 3
    (tmp_path / FOLDER / "summary.json").write_text("{")
    assert status(str(tmp_path)).ledgers[0].indexed == 3


def test_status_reads_no_receipt_that_the_summary_covers(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    plan = plan_for(ledger)
    for item in plan.items(np.arange(3)):
        ledger.spool(item.key, result(item.row.repo, 1, 3))
    receipt = ledger.seal(plan.batch(0))
    Summary.covering(ledger, [receipt]).write(ledger, now=True)
    (tmp_path / FOLDER / f"receipts/{receipt.name}.json").write_text("unreadable")
    assert status(str(tmp_path)).ledgers[0].indexed == 3


def test_the_estimate_of_a_running_driver_is_shown_and_that_of_a_dead_one_is_not(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    for age, running in ((1.0, True), (1000.0, False)):
        Summary().write(ledger, Running(time.time() - age, 7, 120.0, 210.0), now=True)
        found = status(str(tmp_path)).ledgers[0]
        assert found.running is running
        assert found.eta_seconds == (pytest.approx(210.0) if running else None)
    Summary().write(ledger, Running.now(7, 120.0, 210.0), now=True)
    assert "120 models an hour, 3 min 30 s to go" in "\n".join(status(str(tmp_path)).lines())


def test_receipts_name_the_originals(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    for draw, key in ((3, "a"), (4, "b"), (0, "c")):
        ledger.spool(key, result(f"o/{key}", 1, draw))
    receipt = ledger.seal(["a", "b", "c"])
    assert receipt.originals == {"i-o/a": ["o/a", SHA]}
    assert ledger.receipts() == [receipt]
    assert (
        json.loads((tmp_path / FOLDER / f"receipts/{receipt.name}.json").read_text())["counts"]["copies"] == 1
    )

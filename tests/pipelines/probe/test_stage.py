"""The probe stage's driver: its log of items, its patience with the store, what it tells."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pipelines.full import run_probe
from pipelines.inspect.status import status
from pipelines.job.job import Job
from pipelines.job.progress import Report
from probelog.errors import StoreError
from probelog.storage.ledger import Ledger, item_key
from probelog.storage.store import Store
from tests.support.processes.processes import command_of, descends_from, eventually, probers
from tests.support.worlds.tiny_world import MODELS, Indexed

FIELDS = {
    "at", "repo", "sha", "attempt", "result", "detail", "seconds", "bytes", "logits", "parameters", "worker",
}  # fmt: skip


@pytest.mark.acceptance
def test_a_store_that_refuses_for_a_while(
    indexed: Indexed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file lies where the parts of models go. The first run has no patience, the second has."""
    monkeypatch.setenv("HF_ENDPOINT", indexed.endpoint)
    store = indexed.copy_store(tmp_path / "store", "observations", "completion", "index")
    folder = f"observations/{indexed.run.probed.key}"
    ledger = Ledger(Store(store), folder)
    log = tmp_path / "logs/items.jsonl"
    in_the_way = store / folder / "models"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("in the way")

    with pytest.raises(StoreError, match="models"):
        run_probe(indexed.job(store, store_retry_seconds=0.0, item_log=str(log)))
    # Workers that are about to end may spool what they have in hand.
    assert eventually(lambda: not probers(indexed.world.root / "scratch/probelog"), 30)
    kept = ledger.spooled()
    assert len(kept) >= 3, "a batch was through"
    asked = len(indexed.hub.requests)

    def clear() -> None:
        while len(ledger.spooled()) < len(MODELS):
            time.sleep(0.1)
        in_the_way.unlink()

    clearing = threading.Thread(target=clear)
    clearing.start()
    probed = run_probe(indexed.job(store, store_retry_seconds=240.0, item_log=str(log)))
    clearing.join()
    assert (probed.models, probed.failures) == (len(MODELS), [])
    assert not ledger.spooled()
    by_name = {receipt.name: receipt.observations for receipt in indexed.run.probed.receipts}
    assert {receipt.name: receipt.observations for receipt in probed.receipts} == by_name

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(set(line) == FIELDS for line in lines)
    # Both runs append; what lay in the spool did not run again, and of that the driver that died may not have heard.
    told = {item_key(line["repo"], line["sha"], line["attempt"]) for line in lines}
    assert told | kept == set().union(*(receipt.items for receipt in probed.receipts))
    assert len(indexed.hub.requests) >= asked
    found = status(str(store)).ledgers[0]
    assert (found.indexed, found.left, found.unsealed) == (len(MODELS), 0, 0)
    assert found.logits == sum(logits for logits, _ in MODELS.values())


def test_a_lost_coordinator_turns_copy_detection_off_and_is_reported_once(
    indexed: Indexed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process is killed before the first model is through."""
    monkeypatch.setenv("HF_ENDPOINT", indexed.endpoint)
    store = indexed.copy_store(tmp_path / "store", "observations", "completion", "index")
    killed: list[int] = []

    def coordinators() -> set[int]:
        # Of this run's Ray: other tests have coordinators too.
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return {
            pid for pid in pids if "ray::Coordinator" in command_of(pid) and descends_from(pid, os.getpid())
        }

    earlier = coordinators()  # those of jobs before may be on their way out

    def is_killed() -> bool:
        killed.extend(coordinators() - earlier)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        return bool(killed)

    def kill() -> None:
        eventually(lambda: killed or is_killed(), 60)

    killing = threading.Thread(target=kill)
    killing.start()
    said = io.StringIO()
    job = Job.of(indexed.world.config(store, item_log=str(tmp_path / "items.jsonl")), Report(said))
    probed = run_probe(job)
    killing.join()
    assert len(killed) == 1, "one coordinator a job"
    assert (probed.models, probed.failures) == (len(MODELS), [])
    assert said.getvalue().count("the coordinator of the workers is lost") == 1
    lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert {line["result"] for line in lines} == {"indexed"}, "without it copies are run"
    assert f"{len(MODELS)} not compared with the others for copies" in said.getvalue()
    assert {receipt.name: receipt.observations for receipt in probed.receipts} == {
        receipt.name: receipt.observations for receipt in indexed.run.probed.receipts
    }


def test_every_model_has_a_line_in_the_log(indexed: Indexed) -> None:
    file = indexed.world.root / f"scratch/probelog/items-{indexed.run.probed.key}.jsonl"
    lines = {line["repo"]: line for line in map(json.loads, file.read_text().splitlines())}
    assert lines.keys() >= MODELS.keys()
    for repo, (logits, _) in MODELS.items():
        assert lines[repo]["result"] in ("indexed", "copy")
        assert lines[repo]["logits"] == logits
        assert lines[repo]["attempt"] == 1


def test_the_receipts_counts_are_their_rows(indexed: Indexed) -> None:
    for receipt in indexed.run.probed.receipts:
        assert receipt.counts.indexed == receipt.models.rows
        if not receipt.counts.copies:  # a copy has no rows of its own
            assert receipt.counts.logits == receipt.observations.rows
        assert not receipt.counts.failed

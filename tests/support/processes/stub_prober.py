"""The probe stage with workers that make up what they see, from the item's name alone, in milliseconds.

Everything else is real: the plan, the scheduler, the ledger, Ray. As a program (``python -m tests.support.processes.stub_prober``) it
reads jobs from its input and forks a driver for each, since importing the libraries takes longer than a job.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.probing.drain import Drain
from cluster.probing.prober import ProberSpec
from cluster.probing.results import ItemReport, Requeued
from cluster.probing.scheduler import kill
from cluster.probing.worker import Workers
from pipelines.probe.plan import COLUMNS, Item
from probelog.errors import FailureReason
from probelog.probes.probe_set import ProbeSet
from probelog.storage.encoding import short_key
from probelog.storage.ledger import ItemResult, Ledger
from probelog.storage.observations import to_rows
from probelog.storage.schemas import CATALOGUE, CatalogueRow, Failure, ProbedModel, RepoFile, to_table
from probelog.storage.store import Store

WORKERS, IN_FLIGHT = 3, 2
LONGEST = 0.25  # seconds of an item
DRAIN_SECONDS = 2.0
PROBES = 20


def catalogue(models: int, failing: bool) -> pa.Table:
    """Repositories; of ``failing`` ones every seventh fails the first time, and every eleventh always."""
    kinds = ["again" if i % 7 == 3 else "never" if i % 11 == 5 else "fine" for i in range(models)]
    rows = [
        CatalogueRow(
            f"stub/{kind if failing else 'fine'}-{i:03}",
            f"{i:040x}",
            library="timm",
            files=[RepoFile("model.safetensors", 1000)],
        )
        for i, kind in enumerate(kinds)
    ]
    return to_table(rows, CATALOGUE).select(COLUMNS)


def result(item: Item) -> tuple[ItemResult, FailureReason | None]:
    """What an item comes to: always the same."""
    row = item.row
    if "never" in row.repo or ("again" in row.repo and item.attempt == 1):
        reason = FailureReason.CORRUPT_WEIGHTS if "never" in row.repo else FailureReason.DOWNLOAD_FAILED
        return ItemResult.failure(
            Failure.of(row.repo, row.sha, "probe", reason, "a stub", item.attempt)
        ), reason
    rng = np.random.default_rng(int(short_key(row.repo), 16))
    logits = int(rng.integers(1, 5))
    probes = np.sort(rng.permutation(PROBES)[: PROBES // 2]).tolist()
    model = ProbedModel(
        repo=row.repo, sha=row.sha, logits=logits, head="softmax", labels=[], probes=probes, library="timm",
        architecture="stub", parameters=1, recipe="{}", dtype="float32", device="cpu",
        weight_digest=short_key(row.repo), weight_mean=0.0, weight_std=1.0, identity=short_key(row.repo),
    )  # fmt: skip
    values = rng.standard_normal((logits, len(probes)), np.float32)
    return ItemResult.success(model, to_rows(row.repo, row.sha, values)), None


class StubProber:
    """Keeps a log: a line when it is ready, and at the beginning and the end of each item."""

    def __init__(self, spec: ProberSpec, log: str) -> None:
        self._drain = Drain(spec.settings.drain_seconds, lambda seconds: None)
        self._ledger = Ledger(Store(spec.store), spec.folder)
        self._log = log
        self._turn = threading.Lock()
        self._random = random.Random(os.getpid())

    def ready(self) -> None:
        self._note("ready", "")

    def run(self, item: Item) -> ItemReport | Requeued:
        with self._turn:
            if self._drain.noticed:
                return Requeued()
            self._note("begin", item.key)
            time.sleep(self._random.uniform(0, LONGEST))
            made, reason = result(item)
            self._ledger.spool(item.key, made)
            self._note("end", item.key)
        return ItemReport(
            None if reason is None else reason.value, seconds={"forward": 0.1}, worker=str(os.getpid())
        )

    def _note(self, what: str, key: str) -> None:
        with open(self._log, "a") as stream:
            stream.write(f"{what} {os.getpid()} {key}\n")


def stub_probers(log: str, spec: ProberSpec) -> Workers:
    """In place of `cluster.probing.prober.probers`."""
    import ray

    actor: Any = ray.remote(StubProber).options(
        num_cpus=1, max_restarts=0, max_task_retries=0, max_concurrency=IN_FLIGHT + 1
    )
    return Workers(lambda: actor.remote(spec, log), kill)


def drive(root: Path, address: str, models: int, failing: bool, retry_failed: bool) -> None:
    """One run of the stage over a store below ``root``."""
    from cluster.runtime.session import session
    from pipelines.config.model import Config
    from pipelines.job.job import Job
    from pipelines.job.progress import Report
    from pipelines.probe import stage

    config = Config.model_validate(
        {
            "store": str(root / "store"), "probes": "none", "encoder": "none", "probe_count": PROBES, "top_r": 8,
            "scratch": str(root / "scratch"), "workers": WORKERS, "in_flight": IN_FLIGHT, "batch_models": 5,
            "drain_seconds": DRAIN_SECONDS, "store_retry_seconds": 5.0,
        }
    )  # fmt: skip
    log = str(root / "runs.log")
    stage.probers = lambda spec, coordinator: stub_probers(log, spec)
    job = Job.of(config, Report(io.StringIO()))
    probe_set = ProbeSet(job.store, {"hash": "ab" * 32, "count": PROBES, "files": []})
    with session(address):
        stage.probe(job, catalogue(models, failing), probe_set, "http://127.0.0.1:9", retry_failed)


def _main() -> None:
    import ray  # noqa: F401 - once, not in every driver

    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                sys.stdin.close()
                drive(Path(job.pop("root")), **job)
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(json.dumps({"pid": pid}), flush=True)
        _, ended = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(ended)}), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _main()

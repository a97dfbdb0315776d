"""The probe stage: run every model of the catalogue on its own random subset of the probes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from cluster.originals import start_originals
from cluster.prober import ProberSpec, probers
from cluster.scheduler import Policy, Scheduler
from cluster.session import worker_count
from pipelines.stages import Job
from probelog.ledger import Ledger, Receipt, Spooled, item_key
from probelog.probes import ProbeSet
from probelog.schemas import CatalogueRow, Failure

STAGE = "probe"


@dataclass(frozen=True)
class Probed:
    """State of the ledger after the stage."""

    key: str
    receipts: list[Receipt]
    models: int
    failures: list[Failure]

    @property
    def failed_share(self) -> float:
        """Share of the models that failed."""
        total = self.models + len(self.failures)
        return len(self.failures) / total if total else 0.0


@dataclass(frozen=True)
class _Item:
    key: str
    row: CatalogueRow
    attempt: int


def probe(
    job: Job, rows: Sequence[CatalogueRow], probe_set: ProbeSet, endpoint: str, retry_failed: bool
) -> Probed:
    """Probe what the ledger does not hold yet; needs a running Ray session.

    Failures that a retry can cure are tried again; the others only with ``retry_failed``.
    """
    config = job.config
    key = job.observations_key(probe_set.hash)
    folder = f"observations/{key}"
    ledger = Ledger(job.store, folder)
    job.store.write_json(
        f"{folder}/manifest.json",
        {
            "probe_set": probe_set.hash,
            "probes": probe_set.count,
            "fraction": config.fraction,
            "seed": config.seed,
            "planned": len(rows),
            "version": 1,
        },
    )
    ledger.drop_sealed_spool(ledger.receipts())
    batches = _plan(ledger, rows, config.batch_models, retry_failed)
    todo = sum(len(batch) for batch in batches)
    if todo:
        _run(job, ledger, batches, probe_set, endpoint, done=len(rows) - todo)
    receipts = ledger.receipts()
    wanted = {(row.repo, row.sha) for row in rows}
    models = [model for model in ledger.models(receipts) if (model.repo, model.sha) in wanted]
    failures = [f for f in ledger.failures(receipts, models) if (f.repo, f.sha) in wanted]
    reasons = Counter(failure.reason for failure in failures)
    told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    job.report.say(
        f"probe: {len(models):,} of {len(rows):,} models indexed"
        + (f", {len(failures):,} failed ({told})" if failures else "")
        + ("" if todo else "; nothing was left to do")
    )
    return Probed(key, receipts, len(models), failures)


def _plan(
    ledger: Ledger, rows: Sequence[CatalogueRow], batch_models: int, retry_failed: bool
) -> list[list[_Item]]:
    """What is left to do, in batches whose boundaries do not move when a run is resumed.

    Fresh items and retries are cut apart: sealed batches are whole ones, so what remains of the fresh items falls
    into the same batches again.
    """
    receipts = ledger.receipts()
    sealed = {item for receipt in receipts for item in receipt.items}
    models = ledger.models(receipts)
    good = {(model.repo, model.sha) for model in models}
    failed = {(f.repo, f.sha): f for f in ledger.failures(receipts, models)}
    fresh, again = [], []
    for row in sorted(rows, key=lambda row: (row.repo, row.sha)):
        if (row.repo, row.sha) in good:
            continue
        failure = failed.get((row.repo, row.sha))
        if failure is None:
            item = _Item(item_key(row.repo, row.sha), row, 1)
            if item.key not in sealed:
                fresh.append(item)
        elif failure.retryable or retry_failed:
            attempt = failure.attempts + 1
            again.append(_Item(item_key(row.repo, row.sha, attempt), row, attempt))
    return [
        group[start : start + batch_models]
        for group in (fresh, again)
        for start in range(0, len(group), batch_models)
    ]


def _run(
    job: Job,
    ledger: Ledger,
    batches: Sequence[Sequence[_Item]],
    probe_set: ProbeSet,
    endpoint: str,
    done: int,
) -> None:
    config = job.config
    spooled = ledger.spooled()
    waiting = {number: {item.key for item in batch} for number, batch in enumerate(batches)}
    batch_of = {item.key: number for number, batch in enumerate(batches) for item in batch}
    todo = [item for batch in batches for item in batch if item.key not in spooled]
    counter = job.report.counter("probe", done + len(batch_of), "models", done + len(batch_of) - len(todo))
    spec = ProberSpec(
        store=job.store.uri,
        folder=ledger.folder,
        probe_set=probe_set.hash,
        fraction=config.fraction,
        seed=config.seed,
        endpoint=endpoint,
        batch_size=config.batch_size,
        max_bytes=config.filters.max_bytes,
        max_params=config.filters.max_params,
        allow_pickle=config.allow_pickle,
        cache_bytes=config.cache_bytes,
        scratch=None if config.scratch is None else str(config.scratch),
        cpus=config.cpus_per_worker,
        gpus=config.gpus_per_worker,
        item_seconds=config.item_seconds,
        in_flight=config.in_flight,
        precision=config.precision,
        memory_bytes=config.memory_per_worker,
        drain_seconds=config.drain_seconds,
        preload=tuple(config.preload),
        probes=probe_set.count,
    )
    originals = start_originals({}, config.item_seconds)
    # Two threads are enough to seal: parts are small and the workers compute meanwhile.
    with ThreadPoolExecutor(2) as pool, probers(spec, originals) as make:
        sealing: list[Future[Receipt]] = []

        def finished(key: str) -> None:
            number = batch_of[key]
            waiting[number].discard(key)
            if not waiting[number]:
                sealing.append(pool.submit(ledger.seal, [item.key for item in batches[number]]))

        for key in sorted(spooled & batch_of.keys()):
            finished(key)
        workers = config.workers or worker_count(config.cpus_per_worker, config.gpus_per_worker)
        scheduler: Scheduler[_Item] = Scheduler(
            make, min(workers, max(1, len(todo))), Policy(item_seconds=config.item_seconds)
        )
        for outcome in scheduler.run(todo, tick=lambda _: counter.show()):
            item = outcome.item
            reason = None if outcome.result is None else outcome.result.reason
            if outcome.reason is not None:
                failure = Failure.of(
                    item.row.repo, item.row.sha, STAGE, outcome.reason, outcome.detail, item.attempt
                )
                ledger.spool(item.key, Spooled.failure(failure))
                reason = outcome.reason.value
            counter.add(reason=reason)
            finished(item.key)
            for future in [future for future in sealing if future.done()]:
                future.result()
                sealing.remove(future)
        for future in sealing:
            future.result()
    counter.show(final=True)

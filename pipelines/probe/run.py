"""One run of a stage over the models that its ledger does not hold yet, whatever kind of model it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.probing.coordinator import CoordinatorHandle, Original, coordinator
from cluster.probing.results import ItemReport
from cluster.probing.scheduler import ItemOutcome, Policy, Scheduler
from cluster.probing.worker import Workers
from cluster.runtime.scratch import scratch_folder
from cluster.runtime.session import session, worker_count
from pipelines.job.eta import Pace
from pipelines.job.job import Job
from pipelines.probe.item_log import ItemLog
from pipelines.probe.metrics import Metrics
from pipelines.probe.plan import Item, ProbingPlan, first_keys, make_plan, untried
from pipelines.probe.summary import Running, Summary
from pipelines.probe.timeline import Timeline
from probelog.arrays import values_of
from probelog.errors import FailureReason
from probelog.hub.client import endpoint_with_login
from probelog.kinds.kind import Kind
from probelog.storage.ledger import LEDGER_VERSION, ItemResult, Ledger, Receipt, key_numbers, open_failures
from probelog.storage.schemas import Failure, from_table
from probelog.storage.store import retry_with_backoff
from probelog.storage.versions import MADE_BY

# Parts of a worker's time that lie inside other parts, or that it spent on other models.
_NOT_ADDED = ("wait", "weights", "sketch")

WorkersOf = Callable[[CoordinatorHandle], Workers]


@dataclass(frozen=True)
class StageResult:
    """State of the ledger after the stage.

    Attributes:
        key: of the ledger.
        receipts: all receipts of the ledger, without their ``originals``.
        models: number of the catalogue's models that are indexed.
        failed: failures of the catalogue's other models (``FAILURES``).
    """

    key: str
    receipts: list[Receipt]
    models: int
    failed: pa.Table

    @property
    def failures(self) -> list[Failure]:
        """The failures as records: half a kilobyte each."""
        return from_table(self.failed, Failure)

    @property
    def tried(self) -> int:
        """Number of the catalogue's models that were indexed or failed."""
        return self.models + int(self.failed.num_rows)

    @property
    def failed_share(self) -> float:
        """Share of the models that failed."""
        return self.failed.num_rows / self.tried if self.tried else 0.0

    @property
    def reasons(self) -> dict[str, int]:
        """Number of failures by reason, most frequent first."""
        return dict(Counter(values_of(self.failed["reason"], str)).most_common())


@dataclass(frozen=True)
class LedgerState:
    """State of a ledger by its receipts.

    Attributes:
        receipts: sorted by name.
        sealed: sorted keys of the sealed items.
        recorded: all failures that were ever recorded.
        failures: those that no later attempt has replaced.
    """

    receipts: list[Receipt]
    sealed: npt.NDArray[np.uint64]
    recorded: pa.Table
    failures: pa.Table

    @classmethod
    def of(cls, ledger: Ledger, receipts: list[Receipt]) -> LedgerState:
        return cls([], np.zeros(0, np.uint64), pa.table({}), pa.table({})).after(ledger, receipts)

    def after(self, ledger: Ledger, receipts: list[Receipt]) -> LedgerState:
        """The state after further receipts, of which ``originals`` are dropped: a million names that are used only once."""
        sealed = np.union1d(self.sealed, key_numbers(item for receipt in receipts for item in receipt.items))
        tables = [table for table in (self.recorded, ledger.failure_rows(receipts)) if table.column_names]
        recorded = pa.concat_tables(tables)
        slim = [replace(receipt, originals={}) if receipt.originals else receipt for receipt in receipts]
        every = sorted([*self.receipts, *slim], key=lambda receipt: receipt.name)
        return LedgerState(every, sealed, recorded, open_failures(recorded, sealed))


def run_stage(
    job: Job,
    kind: Kind,
    ledger: Ledger,
    settings: Mapping[str, Any],
    table: pa.Table,
    endpoint: str,
    workers_of: WorkersOf,
    retry_failed: bool,
    only: npt.NDArray[np.bool_] | None = None,
) -> StageResult:
    """Run the models that the ledger does not hold yet, on Ray where there are any.

    Retryable failures are retried; the others only with ``retry_failed``.

    Args:
        job: configuration and store.
        kind: of the models.
        ledger: of its results.
        settings: what the ledger's results depend on, for its manifest.
        table: the catalogue (at least the columns `pipelines.probe.plan.COLUMNS`), each (repo, sha) once.
        endpoint: the Hub's address.
        workers_of: makes actors that share a coordinator.
        retry_failed: also retry failures that a retry is not expected to cure.
        only: mask of the table's rows to run now; all by default.

    Raises:
        StoreError: the store refused for longer than ``store_retry_seconds``. A later run resumes.
    """
    config = job.config
    manifest = {**settings, "planned": table.num_rows, "version": LEDGER_VERSION, "made_by": MADE_BY}
    retry_with_backoff(
        lambda: job.store.write_json(ledger.paths.manifest, manifest), config.store_retry_seconds
    )
    receipts = ledger.receipts(originals=False)
    ledger.bundle(receipts)
    state = LedgerState.of(ledger, receipts)
    ledger.drop_sealed_spool(receipts)
    keys = first_keys(table)
    now = np.ones(len(keys), bool) if only is None else only
    plan = make_plan(
        table if now.all() else table.filter(pa.array(now)),  # no copy of a whole catalogue
        keys[now],
        state.sealed,
        state.failures,
        config.batch_models,
        retry_failed,
        kind.together,
    )
    summary = Summary.covering(ledger, state.receipts)
    unchecked = 0
    if len(plan):
        with _item_log(job, kind, ledger.paths.key) as log, session(config.ray_address):
            run = _Run(job, kind, ledger, plan, summary, log)
            known = {
                identity: Original(repo, sha, receipt=receipt.name)
                for receipt, identity, repo, sha in ledger.originals()
            }
            sealed = run.run(endpoint_with_login(endpoint), workers_of, known)
            ledger.bundle(sealed)
            state = state.after(ledger, sealed)
            unchecked = run.unchecked
    summary.write(ledger, now=True)
    failed = state.failures.filter(pa.array(np.isin(first_keys(state.failures), keys)))
    models = int(np.isin(keys, state.sealed).sum()) - failed.num_rows
    result = StageResult(ledger.paths.key, state.receipts, models, failed)
    reasons = ", ".join(f"{reason} {count}" for reason, count in result.reasons.items())
    job.report.say(
        f"{kind.stage}: {models:,} of {table.num_rows:,} models indexed"
        + (f", {failed.num_rows:,} failed ({reasons})" if reasons else "")
        + (f", {unchecked:,} not compared with the others for copies" if unchecked else "")
        + ("" if len(plan) else "; already complete")
    )
    return result


def has_remaining_work(job: Job, table: pa.Table, ledger: Ledger) -> bool:
    """Whether `run_stage` has models left to run, retryable failures included."""
    state = LedgerState.of(ledger, ledger.receipts(originals=False))
    first_attempts, retries, _ = untried(first_keys(table), state.sealed, state.failures, False)
    return bool((first_attempts | retries).any())


def _item_log(job: Job, kind: Kind, key: str) -> ItemLog:
    config = job.config
    file = config.item_log or Path(scratch_folder(config.scratch)) / f"items-{key}.jsonl"
    job.report.say(f"{kind.stage}: a line for every model goes to {file}")
    return ItemLog(file, kind.contents.counted)


class _Run:
    """One run over a plan: follows its items from the workers to spool and receipts, and reports progress."""

    def __init__(
        self, job: Job, kind: Kind, ledger: Ledger, plan: ProbingPlan, summary: Summary, log: ItemLog
    ) -> None:
        self._job, self._kind, self._ledger, self._plan = job, kind, ledger, plan
        self._summary, self._log = summary, log
        self._retry_seconds = job.config.store_retry_seconds
        self._metrics = Metrics(kind.contents.counted)
        spooled = key_numbers(ledger.spooled())
        self._spooled = np.isin(plan.keys, spooled)
        self._unspooled = np.flatnonzero(~self._spooled)
        self._open = np.diff(plan.starts)
        self._pace = Pace(len(self._unspooled), float(plan.sizes[self._unspooled].sum()))
        self._timeline = Timeline(job.config, kind.contents)
        total = plan.table.num_rows
        self._counter = job.report.counter(
            kind.stage, total, "models", total - len(self._unspooled), self._pace
        )
        self._coordinator: Any = None
        self.unchecked = 0
        self._sealing: list[Future[Receipt]] = []
        self._sealed: list[Receipt] = []

    def run(self, endpoint: str, workers_of: WorkersOf, known: Mapping[str, Original]) -> list[Receipt]:
        """Run all items; returns the new receipts. ``known``: originals of earlier runs, by identity.

        Raises:
            StoreError: the store refused for longer than ``store_retry_seconds``. Nothing is lost: another run goes on
                from there.
        """
        config = self._job.config
        policy = Policy(in_flight=config.in_flight, item_seconds=config.item_seconds)
        with coordinator(endpoint, known, config.item_seconds) as self._coordinator:
            workers = workers_of(self._coordinator)
            scheduler: Scheduler[Item] = Scheduler(workers.make, self._workers, policy, workers.end)
            # Two threads are enough to seal: parts are small and the workers compute meanwhile.
            pool = ThreadPoolExecutor(2)
            try:
                for number in np.flatnonzero(self._spooled).tolist():
                    self._item_spooled(number, pool)
                items = self._plan.items(self._unspooled)
                with closing(scheduler.run(items, partial(self._tick, scheduler))) as outcomes:
                    for outcome in outcomes:
                        self._record(outcome)
                        self._item_spooled(outcome.item.number, pool)
                        self._collect()
                self._collect(wait=True)
            finally:
                # After an error the next run seals the waiting batches: the store may be refusing writes.
                pool.shutdown(cancel_futures=True)
            self._tick(scheduler, in_flight=0)
        self._timeline.write(self._ledger)
        self._counter.show(final=True)
        return self._sealed

    def _workers(self) -> int:
        """Number of workers that there should be now."""
        config = self._job.config
        return config.workers or worker_count(config.cpus_per_worker, config.gpus_per_worker)

    def _record(self, outcome: ItemOutcome[Item]) -> None:
        """Count and report one finished item; writes its failure if no worker could."""
        item, report = outcome.item, outcome.result
        if outcome.reason is not None:
            report = ItemReport(reason=outcome.reason.value, detail=outcome.detail, spooled=False)
        if not report.spooled:
            reason = FailureReason(report.reason)
            failure = Failure.of(
                item.row.repo, item.row.sha, self._kind.stage, reason, report.detail, item.attempt
            )
            retry_with_backoff(
                lambda: self._ledger.spool(item.key, ItemResult.failure(failure, self._kind.contents)),
                self._retry_seconds,
            )
        seconds = sum(spent for part, spent in report.seconds.items() if part not in _NOT_ADDED)
        self._pace.add(item.size, seconds)
        self._metrics.add(report, seconds)
        self._job.figures.hub += report.hub
        self._timeline.add(report)
        self._log.write(item, report)
        self._counter.add(reason=report.reason)
        if not report.copies_checked:
            self._count_unchecked()

    def _count_unchecked(self) -> None:
        if not self.unchecked:
            self._job.report.say(
                f"{self._kind.stage}: the coordinator of the workers is lost: copies are run like other models, and each worker "
                "keeps the Hub's rate limit by itself; the results are the same"
            )
        self.unchecked += 1

    def _item_spooled(self, number: int, pool: ThreadPoolExecutor) -> None:
        """Note that an item's result is in the spool; after the last item of a batch, seal it."""
        batch = int(self._plan.batches[number])
        self._open[batch] -= 1
        if not self._open[batch]:
            self._sealing.append(pool.submit(self._seal, batch))

    def _seal(self, batch: int) -> Receipt:
        items, replaced = self._plan.batch(batch), self._plan.replaced(batch)
        return retry_with_backoff(lambda: self._ledger.seal(items, replaced), self._retry_seconds)

    def _collect(self, wait: bool = False) -> None:
        """Take the receipts of sealed batches."""
        for future in [future for future in self._sealing if wait or future.done()]:
            self._sealing.remove(future)
            receipt = future.result()
            self._sealed.append(receipt)
            self._coordinator.sealed.remote(receipt.name, receipt.items)
            self._summary.add([receipt])

    def _tick(self, scheduler: Scheduler[Item], in_flight: int) -> None:
        """Report progress; called about once a second."""
        self._counter.show()
        rate, eta = self._pace.models_an_hour, self._pace.eta_seconds
        self._metrics.publish(self._pace.remaining, scheduler.workers, in_flight, rate, eta)
        self._summary.write(self._ledger, Running.now(self._pace.remaining, rate, eta))

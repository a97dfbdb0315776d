"""Weights of repositories that are not probed: parts of them are read from the Hub, within its rate limits.

What is read becomes rows of ``WEIGHTS`` in a ledger of its own (`probelog.storage.layout.tree_weights`), whose models
have no logits. A killed run goes on where it was. Reading waits for the network, so threads of this process do it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config.model import Config, Filters
from pipelines.crawl.stage import crawl_all
from pipelines.job.job import Job
from pipelines.probe.plan import COLUMNS, Item, ProbingPlan, first_keys, make_plan
from pipelines.probe.run import LedgerState
from pipelines.trees.remote import RemoteFacts, RemoteWeights
from probelog.errors import FailureReason, ItemFailure
from probelog.hub import huggingface
from probelog.hub.client import HubClient
from probelog.hub.rate_limit import Kind, SlidingWindowLimit
from probelog.storage.encoding import short_key
from probelog.storage.layout import tree_weights
from probelog.storage.ledger import LEDGER_VERSION, ItemResult, Ledger, Receipt, key_numbers
from probelog.storage.schemas import (
    OBSERVATIONS,
    CatalogueRow,
    Failure,
    ProbedModel,
    from_table,
)
from probelog.storage.store import retry_with_backoff
from probelog.storage.versions import MADE_BY
from probelog.weights import blocks, sketch
from probelog.weights.reader import layer_table

STAGE = "trees"
# No limit: of large weights no more is read than of small ones.
_ANY = 1 << 62

_log = logging.getLogger(__name__)


class _StoppedError(Exception):
    """The run ends; what is being read is not recorded."""


@dataclass(frozen=True)
class TreeWeights:
    """What was read of the repositories that the configuration lists.

    Attributes:
        receipts: of the ledger; they hold other commits and other repositories, too.
        rows: of the catalogue, by repository and commit, of all that are listed now and were not probed.
        failures: of these.
    """

    receipts: list[Receipt]
    rows: Mapping[tuple[str, str], CatalogueRow]
    failures: list[Failure]


def weights_key(config: Config) -> str:
    """Key of the ledger: what decides which numbers are read."""
    if config.trees.whole:
        return short_key("tree weights", "whole", sketch.VERSION)
    return short_key("tree weights", "parts", blocks.VERSION, config.trees.bytes_per_model)


def listed_filters(config: Config) -> list[Filters]:
    """Which repositories get trees without being probed, as filters of crawls; none by default."""
    trees = config.trees
    everything = {"library": [], "max_bytes": _ANY, "max_params": _ANY}
    filters = [Filters(pipeline_tag=task, limit=trees.limit, **everything) for task in trees.tasks]
    if trees.repos is not None:
        filters.append(Filters(pipeline_tag=None, list=trees.repos, **everything))
    return filters


def read_weights(
    job: Job,
    endpoint: str,
    probed: Collection[str] = (),
    *,
    refresh: bool = False,
    retry_failed: bool = False,
) -> TreeWeights:
    """List the repositories and read those that the ledger does not hold yet, but for the probed ones.

    Retryable failures are retried; the others only with ``retry_failed``.

    Raises:
        HubError: the Hub does not list.
        UsageError: the list of repositories cannot be read.
        StoreError: the store refused for longer than ``store_retry_seconds``. A later run resumes.
    """
    config = job.config
    filters = listed_filters(config)
    if not filters:
        return TreeWeights([], {}, [])
    table = crawl_all(job, endpoint, filters, COLUMNS, refresh)
    table = table.filter(pc.invert(pc.is_in(table["repo"], pa.array(list(probed), pa.string()))))
    ledger = Ledger(job.store, tree_weights(weights_key(config)))
    manifest = {
        "bytes_per_model": config.trees.bytes_per_model,
        "planned": table.num_rows,
        "version": LEDGER_VERSION,
        "made_by": MADE_BY,
    }
    retry_with_backoff(
        lambda: job.store.write_json(ledger.paths.manifest, manifest), config.store_retry_seconds
    )
    receipts = ledger.receipts(originals=False)
    ledger.bundle(receipts)
    state = LedgerState.of(ledger, receipts)
    ledger.drop_sealed_spool(receipts)
    keys = first_keys(table)
    plan = make_plan(table, keys, state.sealed, state.failures, config.batch_models, retry_failed)
    if len(plan):
        sealed = _Run(job, ledger, plan, endpoint).run()
        ledger.bundle(sealed)
        state = state.after(ledger, sealed)
    failures = from_table(state.failures.filter(pa.array(np.isin(first_keys(state.failures), keys))), Failure)
    _report(job, table.num_rows, failures, state.receipts)
    rows = {(row.repo, row.sha): row for row in from_table(table, CatalogueRow)}
    return TreeWeights(state.receipts, rows, failures)


def _report(job: Job, listed: int, failures: list[Failure], receipts: list[Receipt]) -> None:
    reasons = Counter(failure.reason for failure in failures)
    shown = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    size = sum(receipt.counts.bytes for receipt in receipts)
    job.report.say(
        f"weights: {'all' if job.config.trees.whole else 'parts'} of those of {listed - len(failures):,} of {listed:,} "
        f"repositories read, {size / 1e6:,.1f} MB"
        + (f", {len(failures):,} failed ({shown})" if failures else "")
    )


class _Limit:
    """A limiter whose waits end with the run: the Hub's are minutes long."""

    def __init__(self, limiter: SlidingWindowLimit, stopped: threading.Event) -> None:
        self._limiter, self._stopped = limiter, stopped

    def acquire(self, kind: Kind) -> None:
        """As `Limiter.acquire`."""
        while (seconds := self._limiter.try_acquire(kind)) > 0:
            if self._stopped.wait(seconds):
                raise _StoppedError

    def penalise(self, kind: Kind, seconds: float) -> None:
        """As `Limiter.penalise`."""
        self._limiter.penalise(kind, seconds)


class _Run:
    """One run over a plan: reads its repositories, spools each result, and seals batches."""

    def __init__(self, job: Job, ledger: Ledger, plan: ProbingPlan, endpoint: str) -> None:
        self._job, self._ledger, self._plan, self._endpoint = job, ledger, plan, endpoint
        spooled = np.isin(plan.keys, key_numbers(ledger.spooled()))
        self._unread = np.flatnonzero(~spooled)
        self._open = np.diff(plan.starts) - np.bincount(plan.batches[spooled], minlength=len(plan.starts) - 1)
        self._counter = job.report.counter(
            "weights", len(plan), "repositories", len(plan) - len(self._unread)
        )
        self._stopped = threading.Event()
        self._receipts: list[Receipt] = []

    def run(self) -> list[Receipt]:
        """Read everything; returns the new receipts."""
        for batch in np.flatnonzero(self._open == 0).tolist():
            self._seal(batch)
        readers = self._job.config.trees.readers
        with_token = huggingface.token() is not None
        limit = SlidingWindowLimit.for_endpoint(self._endpoint, with_token=with_token)
        with HubClient(self._endpoint, limiter=_Limit(limit, self._stopped)) as client:
            pool = ThreadPoolExecutor(readers, "weights")
            try:
                for item in self._finished(pool, client, 2 * readers):
                    batch = int(self._plan.batches[item.number])
                    self._open[batch] -= 1
                    if not self._open[batch]:
                        self._seal(batch)
            finally:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)
        self._counter.show(final=True)
        return self._receipts

    def _finished(self, pool: ThreadPoolExecutor, client: HubClient, most: int) -> Iterator[Item]:
        """The items, each when its result is in the spool; ``most`` are under way at a time."""
        running: dict[Future[str | None], Item] = {}
        items = self._plan.items(self._unread)
        while True:
            while len(running) < most and (item := next(items, None)) is not None:
                running[pool.submit(self._read, client, item)] = item
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item = running.pop(future)
                self._counter.add(reason=future.result())
                yield item

    def _read(self, client: HubClient, item: Item) -> str | None:
        """Read one repository and spool the result; returns the reason where it failed."""
        row, begun, reason = item.row, time.monotonic(), None
        try:
            settings = self._job.config.trees
            weights = RemoteWeights(client, row, settings.bytes_per_model, lambda: self._check(begun))
            facts = weights.read_whole() if settings.whole else weights.sample()
            result = _result(row, facts, time.monotonic() - begun)
        except ItemFailure as failure:
            reason, detail = failure.reason, failure.detail
        except _StoppedError:
            raise
        except MemoryError:
            reason, detail = FailureReason.OUT_OF_MEMORY, "no memory for the headers or blocks"
        except Exception as error:  # reason: one repository must not end the run
            _log.exception("%s could not be read", row.repo)
            reason, detail = FailureReason.INTERNAL, f"{type(error).__name__}: {error}"
        if reason is not None:
            result = ItemResult.failure(Failure.of(row.repo, row.sha, STAGE, reason, detail, item.attempt))
        retry_with_backoff(lambda: self._ledger.spool(item.key, result), self._job.config.store_retry_seconds)
        return None if reason is None else reason.value

    def _check(self, begun: float) -> None:
        if self._stopped.is_set():
            raise _StoppedError
        seconds = self._job.config.item_seconds
        if time.monotonic() - begun > seconds:
            raise ItemFailure(FailureReason.TIMEOUT, f"not read after {seconds:g} s")

    def _seal(self, batch: int) -> None:
        items, replaced = self._plan.batch(batch), self._plan.replaced(batch)
        self._receipts.append(
            retry_with_backoff(
                lambda: self._ledger.seal(items, replaced), self._job.config.store_retry_seconds
            )
        )


def _result(row: CatalogueRow, read: RemoteFacts, seconds: float) -> ItemResult:
    kinds = Counter[str]()
    for layer in read.layers:
        kinds[layer.dtype] += int(np.prod(layer.shape, dtype=float))
    model = ProbedModel(
        repo=row.repo,
        sha=row.sha,
        logits=0,
        head="",
        labels=[],
        probes=[],
        library=row.library or "",
        architecture=row.architecture or row.model_type or "",
        parameters=read.elements,
        recipe="",
        dtype=kinds.most_common(1)[0][0],
        device="",
        weight_digest=read.digest,
        weight_mean=read.mean,
        weight_std=read.std,
        seconds_download=seconds,
        bytes=read.asked,
    )
    return ItemResult.success(model, OBSERVATIONS.empty_table(), layer_table(row.repo, row.sha, read.layers))

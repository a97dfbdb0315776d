"""``--dry-run`` of full and nightly runs: what would be done, from the catalogue, the ledgers and the pointer.

Nothing is written, started or downloaded, and the Hub is not asked: what it has changed since is not known.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipelines.crawl.changes import full_listing_due
from pipelines.crawl.stage import Catalogue, hub_endpoint, is_crawled
from pipelines.job.job import Job
from pipelines.nightly.record import NightlyRecord
from pipelines.nightly.start import open_start
from pipelines.probe.plan import COLUMNS, first_keys, make_plan
from pipelines.probe.run import LedgerState
from pipelines.publish.release import LiveIndex, refuse_older_listing
from pipelines.sample.stage import jobs_of, listed_generators, samples_here
from probelog.errors import HeldError
from probelog.kinds.kind import Kind
from probelog.kinds.registry import CLASSIFIER, GENERATOR
from probelog.probes.probe_set import find_probe_set
from probelog.publication.lifecycle import refuse_held
from probelog.storage.layout import INDEX, LedgerFolder
from probelog.storage.ledger import Ledger
from probelog.storage.schemas import CATALOGUE, FAILURES, to_table


def full_lines(job: Job, refresh: bool = False, retry_failed: bool = False) -> Iterator[str]:
    """What `run_full` would do.

    Raises:
        UsageError: it would be refused, because the catalogue is older than what nightly runs have published.
    """
    endpoint, config = hub_endpoint(), job.config
    live = LiveIndex.open(job.store.child(INDEX))
    probe_set = find_probe_set(config.probes, config.probe_count, config.seed, job.store)
    if probe_set is None:
        yield f"probes: would make a set out of {config.probes}"
    else:
        yield f"probes: set {probe_set.hash[:16]} of {probe_set.count:,} images is there"
    if refresh or not is_crawled(job, endpoint):
        yield f"crawl: would list {endpoint}" + (
            " again" if refresh else ", which was not listed with these filters"
        )
        yield "probe, complete, trees, publish: for what is listed and not done yet"
        yield from _sample_lines(job, endpoint, refresh, retry_failed)
        yield from _hold_line(job, live)
        return
    catalogue = Catalogue.open(job, endpoint)
    refuse_older_listing(catalogue.finished, live)
    table = catalogue.table(COLUMNS)
    yield f"crawl: {table.num_rows:,} models were listed on {catalogue.finished[:10]} (--refresh lists them again)"
    key = None if probe_set is None else job.observations_key(probe_set.hash)
    ledger = None if key is None else Ledger(job.store, LedgerFolder.of(key).path)
    left, line = _run_line(job, CLASSIFIER, table, ledger, retry_failed)
    yield line
    yield from _sample_lines(job, endpoint, refresh, retry_failed)
    if left:
        yield "complete, trees, publish: again, with what was probed"
    else:
        yield "complete, trees, publish: what is not done yet; nothing where the live index was made from all of this"
    yield from _hold_line(job, live)


def nightly_lines(job: Job) -> Iterator[str]:
    """What `run_nightly` would do.

    Raises:
        UsageError: nothing was published yet, or with other settings.
    """
    start = open_start(job)
    settings, files = start.base.settings, start.files
    record = files.read() or NightlyRecord(files.base, settings.watermark, settings.listed)
    yield f"nightly: would add to generation {files.base} ({settings.models:,} models)"
    yield (
        f"changes: would list {hub_endpoint()} down to {record.watermark or 'its end'}"
        + (f", less {job.config.nightly.overlap_hours:g} hours" if record.watermark else "")
    )
    age = dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(record.reconciled)
    due = job.config.nightly.reconcile_days - age / dt.timedelta(days=1)
    yield "reconcile: " + (
        f"would compare the whole index with the Hub (last time: {record.reconciled})"
        if due <= 0
        else f"not before {due:.1f} days have passed (last time: {record.reconciled})"
    )
    rows = [row for row in files.rows(record) if row.repo not in record.removed]
    yield f"recorded by earlier runs: {len(rows):,} models to add, {len(record.removed):,} to remove"
    yield _run_line(job, CLASSIFIER, to_table(rows, CATALOGUE), files.ledger, False)[1]
    if job.config.generators.enabled:
        in_full = sum(full_listing_due(one, start.endpoint) for one in jobs_of(job))
        if in_full:
            yield "sample: would list generators in full, and sample those that are not done yet"
        else:
            yield "sample: would list what has changed of the generators, and sample it"
            yield from _sample_lines(job, start.endpoint, False, False)
    yield "publish: an update, where anything changed"
    yield from _hold_line(job, start.live)


def _sample_lines(job: Job, endpoint: str, refresh: bool, retry_failed: bool) -> Iterator[str]:
    """What the sample stage would do; nothing where a job wants no generators."""
    if not job.config.generators.enabled:
        return
    if refresh or not all(is_crawled(one, endpoint) for one in jobs_of(job)):
        yield "sample: would list generators, and sample those that are not done yet"
        return
    table, ledger = listed_generators(job, endpoint), samples_here(job)
    if ledger is None:
        yield f"sample: would download the encoder, which says what is done of {table.num_rows:,} generators"
    else:
        yield _run_line(job, GENERATOR, table, ledger, retry_failed)[1]


def _run_line(
    job: Job, kind: Kind, table: pa.Table, ledger: Ledger | None, retry_failed: bool
) -> tuple[int, str]:
    """Number of models that would be run, and the line that says so."""
    keys = first_keys(table)
    sealed, failures = np.zeros(0, np.uint64), FAILURES.empty_table()
    if ledger is not None:
        state = LedgerState.of(ledger, ledger.receipts(originals=False))
        sealed, failures = state.sealed, state.failures
    plan = make_plan(table, keys, sealed, failures, job.config.batch_models, retry_failed, kind.together)
    retried = int((plan.attempts > 1).sum())
    failed = int(np.isin(first_keys(failures), keys).sum())
    indexed = int(np.isin(keys, sealed).sum()) - failed
    line = f"{kind.stage}: would run {len(plan):,} models ({plan.sizes.sum() / 1e9:,.1f} GB of weights)"
    if retried:
        line += f", {retried:,} of them again"
    return len(plan), f"{line}; {indexed:,} are indexed, {failed - retried:,} failed and are not tried again"


def _hold_line(job: Job, live: LiveIndex | None) -> Iterator[str]:
    try:
        refuse_held(job.store.child(INDEX), None if live is None else live.pointer)
    except HeldError as error:
        yield f"publish: not now: {error}"

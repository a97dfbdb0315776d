"""Probes and describes the models that the Hub added, in a separate ledger beside the main one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.runtime.warm_up import preloaded_libraries
from pipelines.complete.record import CompletionRecord
from pipelines.complete.stage import fold_in
from pipelines.job.job import Job
from pipelines.nightly.start import NightlyStart
from pipelines.probe.run import StageResult, has_remaining_work
from pipelines.probe.stage import probe
from pipelines.quality.failures import FailureCounts
from probelog.storage.ledger import Counts
from probelog.storage.schemas import CATALOGUE, FAILURES, CatalogueRow, to_table


@dataclass(frozen=True)
class ProbedChanges:
    """Results of probing.

    Attributes:
        ledger: result of all nightly runs since the base.
        run: counts of the models that this run tried and of its failures.
    """

    ledger: StageResult
    run: FailureCounts


def probe_changes(job: Job, start: NightlyStart, rows: Sequence[CatalogueRow]) -> ProbedChanges:
    """Probe the commits that were not probed yet."""
    files, config = start.files, job.config
    earlier = set(files.ledger.receipt_names())
    if not rows and not earlier:
        return ProbedChanges(StageResult(files.key, [], 0, FAILURES.empty_table()), FailureCounts(0))
    table = to_table(rows, CATALOGUE)
    with contextlib.ExitStack() as warm:
        if has_remaining_work(job, table, files.ledger):
            warm.enter_context(
                preloaded_libraries(config.ray_address, config.scratch, config.preload, config.device)
            )
        probed = probe(job, table, start.probe_set, start.endpoint, False, key=files.key)
    files.enter_in_main(receipt.name for receipt in probed.receipts)
    new_receipts = [receipt for receipt in probed.receipts if receipt.name not in earlier]
    counts = sum((receipt.counts for receipt in new_receipts), Counts())
    return ProbedChanges(probed, FailureCounts.of(counts.indexed, counts.failed))


def describe_changes(job: Job, start: NightlyStart, probed: ProbedChanges) -> CompletionRecord:
    """Describe all models that nightly runs since the base have probed, with the base's columns."""
    key = f"{start.completion.key}-{start.files.base}"
    embeddings = start.base.probe_embeddings
    return fold_in(job, start.completion, key, start.files.key, probed.ledger.receipts, embeddings)

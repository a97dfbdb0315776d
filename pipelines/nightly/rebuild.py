"""Publishes a whole generation of the base and all changes since, with the base's columns."""

from __future__ import annotations

from collections.abc import Callable

from pipelines.complete.record import joined
from pipelines.job.job import Job
from pipelines.nightly.update import ChangesSinceBase
from pipelines.publish.generators import SampledGenerators
from pipelines.publish.release import PublishResult
from pipelines.publish.stage import ListingSnapshot, publish
from pipelines.quality.failures import FailureCounts
from pipelines.trees.stage import trees_of
from probelog.encoders.torch_encoder import deferred_encoder
from probelog.storage.layout import LedgerFolder
from probelog.storage.ledger import Ledger
from probelog.storage.schemas import LISTED_FACTS, CatalogueRow, from_table

# Columns of the catalogue that the index keeps.
_LISTED = ["repo", "sha", *LISTED_FACTS]


def publish_rebuilt(
    job: Job,
    changes: ChangesSinceBase,
    run: FailureCounts,
    allowed: Callable[[], None],
    sampled: SampledGenerators | None = None,
) -> PublishResult:
    """Publish the base and all changes since as one generation.

    Args:
        job: configuration and store.
        changes: since the base.
        run: counts of this run's models and failures.
        allowed: raises if this run may not publish any more.
        sampled: all generators.

    Raises:
        QualityError, StoreError, ConflictError: as `publish`.
    """
    job.report.say(
        "nightly: nightly runs have added more of the index than nightly.rebuild_share: it is rebuilt as a whole"
    )
    start, record = changes.start, changes.hub.record
    key = start.base.settings.observations
    removed = set(changes.removed.values())
    base_models = start.base.models_table(_LISTED)
    rows = [
        row
        for row, number in zip(
            from_table(base_models, CatalogueRow), base_models["id"].to_pylist(), strict=True
        )
        if number not in removed
    ]
    listed = ListingSnapshot([*rows, *changes.rows.values()], record.watermark, record.reconciled, start.at)
    receipts = Ledger(job.store, LedgerFolder.of(key).path).receipts(originals=False)
    return publish(
        job,
        listed,
        start.probe_set,
        deferred_encoder(job.config.encoder),
        key,
        receipts,
        joined(job.store, start.completion, changes.described, key),
        run,
        allowed,
        last_nightly_run=start.at,
        live=start.live,
        read=changes.descriptors,
        background_of=start.base,
        trees=trees_of(job, receipts, listed.rows, sampled=sampled),
        sampled=sampled,
    )

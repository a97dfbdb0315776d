"""A whole generation of all that the index holds by now, with the base's columns as they are."""

from __future__ import annotations

from collections.abc import Callable

from pipelines.complete.record import joined
from pipelines.job.job import Job
from pipelines.nightly.update import ChangesSinceBase
from pipelines.publish.release import PublishResult
from pipelines.publish.stage import ListingSnapshot, publish
from pipelines.quality.failures import FailureCounts
from probelog.encoders.torch_encoder import load_encoder
from probelog.storage.ledger import Ledger
from probelog.storage.schemas import LISTED_FACTS, CatalogueRow, from_table

# What the catalogue says of a model and the index keeps.
_LISTED = ["repo", "sha", *LISTED_FACTS]


def publish_rebuilt(
    job: Job, changes: ChangesSinceBase, run: FailureCounts, allowed: Callable[[], None]
) -> PublishResult:
    """Publish the base and all changes since as one generation.

    Args:
        job: what is asked for, and where it is kept.
        changes: since the base.
        run: what this run's models came to.
        allowed: raises where this run may not publish any more.

    Raises:
        QualityError, StoreError, ConflictError: as `publish`.
    """
    job.report.say("nightly: much of the index was added by nightly runs: it is rebuilt as a whole")
    start, record = changes.start, changes.hub.record
    key = start.base.settings.observations
    removed = set(changes.removed.values())
    held = start.base.models_table(_LISTED)
    rows = [
        row
        for row, number in zip(from_table(held, CatalogueRow), held["id"].to_pylist(), strict=True)
        if number not in removed
    ]
    return publish(
        job,
        ListingSnapshot([*rows, *changes.rows.values()], record.watermark, record.reconciled, start.at),
        start.probe_set,
        load_encoder(job.config.encoder),
        key,
        Ledger(job.store, f"observations/{key}").receipts(),
        joined(job.store, start.completion, changes.described, key),
        run,
        allowed,
        night=start.at,
        live=start.live,
        read=changes.descriptors,
    )

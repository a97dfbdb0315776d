"""Models added to and removed from the Hub since the base, from the listing and from a comparison with the index."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from pipelines.crawl.changes import listed_since
from pipelines.crawl.reconcile import reconcile
from pipelines.job.job import Job
from pipelines.nightly.record import NightlyRecord
from pipelines.nightly.start import NightlyStart
from pipelines.quality.samples import Version
from probelog.arrays import values_of
from probelog.storage.schemas import CatalogueRow


@dataclass(frozen=True)
class HubChanges:
    """Changes on the Hub since the base.

    Attributes:
        record: how far the Hub's listing was read, and which repositories were removed from it.
        rows: rows of the catalogue, by repository, of commits that the base may not hold.
    """

    record: NightlyRecord
    rows: Mapping[str, CatalogueRow]

    @property
    def to_index(self) -> list[CatalogueRow]:
        """The rows of the models that belong into the index: without those of removed repositories."""
        return [row for repo, row in self.rows.items() if repo not in self.record.removed]


def list_changes(job: Job, start: NightlyStart) -> HubChanges:
    """The changes that earlier nightly runs recorded, and those of the Hub's listing down to the watermark.

    Raises:
        HubError: the listing was interrupted.
        StoreError: the record is damaged.
    """
    settings = start.base.settings
    record = start.files.read() or NightlyRecord(start.files.base, settings.watermark, settings.listed)
    watermark = None if record.watermark is None else dt.datetime.fromisoformat(record.watermark)
    listed = listed_since(job, start.endpoint, watermark, start.failed)
    if listed.watermark is not None:
        record = replace(record, watermark=listed.watermark.isoformat())
    rows = {row.repo: row for row in start.files.rows(record)}
    rows |= {row.repo: row for row in listed.rows}
    # A removed repository that is listed exists again, unless it is listed as gated or disabled.
    again = {row.repo for row in listed.rows if not (row.gated or row.disabled)}
    removed = {repo: facts for repo, facts in record.removed.items() if repo not in again}
    return HubChanges(replace(record, removed=removed), rows)


def reconcile_changes(job: Job, start: NightlyStart, changes: HubChanges) -> HubChanges:
    """Compare the index with the whole Hub, where that is due: a listing by time does not show removals.

    Raises:
        TooManyRemovedError: more would be removed than ``nightly.max_removed_share`` allows.
        HubError: the listing was interrupted.
    """
    record = changes.record
    age = dt.datetime.fromisoformat(start.at) - dt.datetime.fromisoformat(record.reconciled)
    if age < dt.timedelta(days=job.config.nightly.reconcile_days):
        return changes
    compared = reconcile(job, start.endpoint, _versions(start, changes.rows), start.failed)
    rows = {**changes.rows, **{row.repo: row for row in (*compared.changed, *compared.missed)}}
    removed = {
        repo: {"reason": removal.reason.value, "detail": removal.detail}
        for repo, removal in compared.removed.items()
    }
    return HubChanges(replace(record, reconciled=start.at, removed=removed), rows)


def save_changes(job: Job, start: NightlyStart, changes: HubChanges) -> HubChanges:
    """Record the changes for the next nightly run, without the models that the base holds at the same commit."""
    indexed_shas = {repo: row["sha"] for repo, row in start.rows_in_base(changes.rows).items()}
    rows = {repo: row for repo, row in changes.rows.items() if indexed_shas.get(repo) != row.sha}
    record = start.files.write(changes.record, list(rows.values()))
    job.report.say(
        f"nightly: {len(rows):,} commits that the index of {start.base.settings.listed[:10]} does not hold"
        + (f", {len(record.removed):,} repositories to remove from it" if record.removed else "")
    )
    return HubChanges(record, rows)


def _versions(start: NightlyStart, rows: Mapping[str, CatalogueRow]) -> Iterator[Version]:
    """The models in the index and those about to be added, removed ones included."""
    table = start.base.models_table(["repo", "sha"])
    for repo, sha in zip(values_of(table["repo"], str), values_of(table["sha"], str), strict=True):
        if repo not in rows:
            yield repo, sha
    for row in rows.values():
        yield row.repo, row.sha

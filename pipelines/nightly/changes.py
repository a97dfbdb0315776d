"""What the Hub added and removed since the base: the listing since the last nightly run, and the index compared with it."""

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
    """What changed on the Hub since the base.

    Attributes:
        record: how far the Hub was looked at, and what was removed from it.
        rows: of the catalogue, by repository: what has a commit that the base may not hold.
    """

    record: NightlyRecord
    rows: Mapping[str, CatalogueRow]

    @property
    def to_index(self) -> list[CatalogueRow]:
        """Those that the index is to hold: not the removed ones."""
        return [row for repo, row in self.rows.items() if repo not in self.record.removed]


def list_changes(job: Job, start: NightlyStart) -> HubChanges:
    """What earlier nightly runs recorded, and what the Hub's listing adds to it, newest first down to the watermark."""
    settings = start.base.settings
    record = start.files.read() or NightlyRecord(start.files.base, settings.watermark, settings.listed)
    watermark = None if record.watermark is None else dt.datetime.fromisoformat(record.watermark)
    listed = listed_since(job, start.endpoint, watermark, start.failed)
    if listed.watermark is not None:
        record = replace(record, watermark=listed.watermark.isoformat())
    rows = {row.repo: row for row in start.files.rows(record)}
    rows |= {row.repo: row for row in listed.rows}
    # What is listed is there again; what is gated stays listed.
    again = {row.repo for row in listed.rows if not (row.gated or row.disabled)}
    removed = {repo: facts for repo, facts in record.removed.items() if repo not in again}
    return HubChanges(replace(record, removed=removed), rows)


def reconcile_changes(job: Job, start: NightlyStart, changes: HubChanges) -> HubChanges:
    """Compare the index with the whole Hub, where that is due: a listing by time does not tell what was removed."""
    record = changes.record
    age = dt.datetime.fromisoformat(start.at) - dt.datetime.fromisoformat(record.reconciled)
    if age < dt.timedelta(days=job.config.nightly.reconcile_days):
        return changes
    compared = reconcile(job, start.endpoint, _versions(start, changes.rows), start.failed)
    rows = {**changes.rows, **{row.repo: row for row in (*compared.changed, *compared.missed)}}
    removed = {
        repo: {"reason": gone.reason.value, "detail": gone.detail} for repo, gone in compared.gone.items()
    }
    return HubChanges(replace(record, reconciled=start.at, removed=removed), rows)


def save_changes(job: Job, start: NightlyStart, changes: HubChanges) -> HubChanges:
    """Record the changes for the next nightly run, without what the base holds at the same commit."""
    held = {repo: row["sha"] for repo, row in start.held(changes.rows).items()}
    rows = {repo: row for repo, row in changes.rows.items() if held.get(repo) != row.sha}
    record = start.files.write(changes.record, list(rows.values()))
    job.report.say(
        f"nightly: {len(rows):,} commits that the index of {start.base.settings.listed[:10]} does not hold"
        + (f", {len(record.removed):,} repositories that it must not hold any more" if record.removed else "")
    )
    return HubChanges(record, rows)


def _versions(start: NightlyStart, rows: Mapping[str, CatalogueRow]) -> Iterator[Version]:
    """All that the index holds or is about to hold, whether it was removed meanwhile or not."""
    table = start.base.models_table(["repo", "sha"])
    for repo, sha in zip(values_of(table["repo"], str), values_of(table["sha"], str), strict=True):
        if repo not in rows:
            yield repo, sha
    for row in rows.values():
        yield row.repo, row.sha

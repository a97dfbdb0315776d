"""Changes on the Hub since the last nightly run: its listing, newest first, down to a watermark.

The Hub has no query for "since": its listing is read from the newest row down to the newest change that the last
nightly run read, less an overlap. All times are the Hub's. A change without a new ``lastModified`` (a rename, a
repository made public) does not show here; `pipelines.crawl.reconcile` finds it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

from pipelines.crawl.stage import Catalogue, crawl, is_crawled, listing_filters
from pipelines.job.job import Job
from probelog.arrays import values_of
from probelog.hub.client import PATIENT, Retry
from probelog.hub.listing import ListingFilters, iter_pages
from probelog.hub.rate_limit import Limiter
from probelog.storage.schemas import CatalogueRow, Failure

_FIRST = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


@dataclass(frozen=True, slots=True)
class Changes:
    """The changes that one listing shows.

    Attributes:
        rows: repositories with a commit that was not known, each once, at its newest commit; newest first.
        failures: rows of the listing that could not be read.
        watermark: time of the newest change that was read, where the next nightly run continues; None without any.
        listed: number of repositories that were read, the known ones included.
    """

    rows: list[CatalogueRow]
    failures: list[Failure]
    watermark: dt.datetime | None
    listed: int


def listed_since(
    job: Job,
    endpoint: str,
    watermark: dt.datetime | None,
    known: Container[tuple[str, str]],
    *,
    limiter: Limiter | None = None,
    retry: Retry = PATIENT,
    page_size: int = 200,
) -> Changes:
    """Repositories that are new, or have a new commit, since a watermark.

    The job's filters hold as in a full crawl: of their ``since`` and the watermark the later one counts, and of more
    than ``limit`` repositories the newest are taken. An explicit list has no order and is looked at as a whole, and
    so is the listing of a server that ignores the order asked for.

    Args:
        job: whose filters and ``nightly.overlap_hours``; progress goes to its report.
        endpoint: the Hub's address.
        watermark: of the last successful nightly run; None: list everything.
        known: pairs of repository and commit that need no work: those in the index, and those that cannot be indexed.
        limiter: as for `probelog.hub.listing.iter_pages`.
        retry: as for `probelog.hub.listing.iter_pages`.
        page_size: as for `probelog.hub.listing.iter_pages`.

    Raises:
        HubError: the listing was interrupted. No part of it is returned: the watermark must not pass unread changes.
    """
    filters = _since(
        listing_filters(job.config.filters), watermark, dt.timedelta(hours=job.config.nightly.overlap_hours)
    )
    newest: dict[str, CatalogueRow] = {}
    failures: list[Failure] = []
    latest: dt.datetime | None = None
    counter = job.report.counter("changes", None, "repositories")
    pages = iter_pages(filters, endpoint=endpoint, limiter=limiter, retry=retry, page_size=page_size)
    for page in pages:
        for row in page.rows:
            newest_row = newest.get(row.repo)
            if newest_row is None or _modified(row) > _modified(newest_row):
                newest[row.repo] = row
        failures += page.failures
        latest = _latest(latest, page.rows, page.date)
        counter.add(len(page.rows))
    rows = [row for row in newest.values() if (row.repo, row.sha) not in known]
    rows.sort(key=_modified, reverse=True)
    job.report.say(
        f"changes: {len(newest):,} repositories listed by {endpoint}"
        + (
            f", changed since {filters.since:%Y-%m-%d %H:%M} UTC"
            if filters.since and not filters.repos
            else ""
        )
        + (f", {len(failures):,} rows could not be read" if failures else "")
    )
    known_times = [time for time in (watermark, latest) if time is not None]
    return Changes(rows, failures, max(known_times, default=None), len(newest))


def crawl_since(job: Job, endpoint: str) -> Catalogue:
    """A job's catalogue with what has changed on the Hub since it was listed.

    It is listed in full where that was never done, and every ``nightly.reconcile_days``: what is gone does not show in
    changes.

    Raises:
        HubError: the listing was interrupted.
        UsageError: a filter is invalid.
    """
    if full_listing_due(job, endpoint):
        return crawl(job, endpoint, refresh=True)
    catalogue = Catalogue.open(job, endpoint)
    listed = catalogue.table(["repo", "sha"])
    known = set(zip(values_of(listed["repo"], str), values_of(listed["sha"], str), strict=True))
    changes = listed_since(job, endpoint, catalogue.watermark, known)
    return catalogue.add(changes.rows, changes.watermark)


def full_listing_due(job: Job, endpoint: str) -> bool:
    """Whether `crawl_since` lists in full."""
    if not is_crawled(job, endpoint):
        return True
    age = dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(Catalogue.open(job, endpoint).finished)
    return age >= dt.timedelta(days=job.config.nightly.reconcile_days)


def _since(filters: ListingFilters, watermark: dt.datetime | None, overlap: dt.timedelta) -> ListingFilters:
    if watermark is None:
        return filters
    floor = watermark - overlap if watermark - _FIRST > overlap else _FIRST
    return replace(filters, since=floor if filters.since is None else max(floor, filters.since))


def _latest(
    so_far: dt.datetime | None, rows: Iterable[CatalogueRow], sent: dt.datetime | None
) -> dt.datetime | None:
    # A row with a time in the future (commits carry their author's clock) would move the watermark past all changes
    # until then.
    times = (row.last_modified for row in rows if row.last_modified is not None)
    past = [time for time in times if sent is None or time <= sent]
    return max([*past, *([so_far] if so_far is not None else [])], default=None)


def _modified(row: CatalogueRow) -> dt.datetime:
    return row.last_modified or _FIRST

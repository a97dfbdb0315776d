"""The crawl stage: the Hub's listing becomes the catalogue, page by page, resumable at any page."""

from __future__ import annotations

import datetime as dt
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.config.model import Filters
from pipelines.job.job import Job, read_repos
from probelog.credentials import split_login
from probelog.errors import UsageError
from probelog.hub.listing import ListingFilters, Page, iter_pages
from probelog.storage.encoding import digest, parquet_bytes
from probelog.storage.layout import CatalogueFolder
from probelog.storage.parquet_parts import Part, count_rows, read_part
from probelog.storage.schemas import CATALOGUE, FAILURES, CatalogueRow, Failure, from_table, to_table
from probelog.storage.store import Store
from probelog.storage.versions import MADE_BY, check_version

CRAWL_VERSION = 1
_PART_ROWS = 5000
_READERS = 8
_ENCODED = ["files.list.element.path"]
_PART_SECONDS = 30.0


def hub_endpoint() -> str:
    """The Hub's address: ``HF_ENDPOINT`` without a user and password (`HubClient` sends these), or the public Hub.

    Read when a job starts, not when huggingface_hub is imported, so that a program may set it first.
    """
    from huggingface_hub import constants

    return split_login((os.environ.get("HF_ENDPOINT") or str(constants.ENDPOINT)).rstrip("/"))[0]


def listing_filters(filters: Filters) -> ListingFilters:
    """A configuration's filters, the listed repositories read from their file.

    Raises:
        UsageError: the file cannot be read or names nothing.
    """
    return ListingFilters(
        libraries=tuple(filters.library),
        pipeline_tag=filters.pipeline_tag,
        author=filters.author,
        licences=tuple(filters.licence),
        since=filters.since,
        max_bytes=filters.max_bytes,
        max_params=filters.max_params,
        repos=tuple(read_repos(filters.repos)),
        limit=filters.limit,
    )


@dataclass(frozen=True)
class Catalogue:
    """A finished crawl in a store."""

    store: Store
    folder: CatalogueFolder
    receipt: dict[str, Any]

    @classmethod
    def open(cls, job: Job, endpoint: str) -> Catalogue:
        """The catalogue of a job's filters.

        Raises:
            UsageError: it was never crawled, or not to the end.
        """
        if not is_crawled(job, endpoint):
            raise UsageError(
                f"{endpoint} was not crawled with these filters yet: run `probelog-index crawl` first"
            )
        folder = _folder(job, endpoint)
        receipt = job.store.read_json(folder.receipt)
        check_version(receipt, CRAWL_VERSION, job.store.path(folder.receipt), "crawl")
        return cls(job.store, folder, receipt)

    def rows(self) -> list[CatalogueRow]:
        """Every repository once, at its newest listed commit, by name."""
        rows_by_repo: dict[str, CatalogueRow] = {}
        # Newest first: a repository that changed during the crawl shows up twice, and its first row is the newer.
        for part in self.receipt["rows"]:
            for row in from_table(read_part(self.store, Part(**part), CATALOGUE), CatalogueRow):
                rows_by_repo.setdefault(row.repo, row)
        return [rows_by_repo[repo] for repo in sorted(rows_by_repo)]

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The same rows as an Arrow table, in the order of the listing, with all columns or some of them.

        Names of files come with dictionaries: the same few in nearly every repository.
        """
        names = CATALOGUE.names if columns is None else list(columns)
        parts = list(self.parts(names))
        if not parts:
            return CATALOGUE.empty_table().select(names)
        newest = first_of_each([part["repo"] for part in parts])
        starts = np.cumsum([0, *(part.num_rows for part in parts)])
        return pa.concat_tables(
            part if kept.all() else part.filter(pa.array(kept))
            for part, kept in zip(parts, np.split(newest, starts[1:-1]), strict=True)
        )

    def parts(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rows of `table` as they were listed, some repositories twice: some thousand in memory at a time."""
        listed = [Part(**part) for part in self.receipt["rows"]]

        def read(part: Part) -> pa.Table:
            return read_part(self.store, part, CATALOGUE, columns, encoded=_ENCODED)

        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(listed), _READERS):
                yield from pool.map(read, listed[start : start + _READERS])

    def failures(self) -> list[Failure]:
        """The rows of the listing that could not be read, with the reasons."""
        parts = (read_part(self.store, Part(**part), FAILURES) for part in self.receipt["failures"])
        return [failure for table in parts for failure in from_table(table, Failure)]

    @property
    def watermark(self) -> dt.datetime | None:
        """The time of the newest change that was listed; None where no row has one.

        A commit carries its author's clock: a time in the future would hide all changes until then.
        """
        noted = self.receipt.get("watermark")
        if noted is not None:
            return dt.datetime.fromisoformat(noted)
        end = dt.datetime.fromisoformat(self.finished)
        times = self.table(["repo", "last_modified"])["last_modified"].to_pylist()
        return max((time for time in times if time is not None and time <= end), default=None)

    def add(self, rows: Sequence[CatalogueRow], watermark: dt.datetime | None) -> Catalogue:
        """The catalogue with rows that were listed since, which stand for older ones of their repositories."""
        receipt = self.receipt | ({} if watermark is None else {"watermark": watermark.isoformat()})
        if rows:
            path = self.folder.part(receipt["run"], "rows", len(receipt["rows"]))
            receipt["rows"] = [_write_part(self.store, path, rows, CATALOGUE), *receipt["rows"]]
        if receipt != self.receipt:
            self.store.write_json(self.folder.receipt, receipt)
        return replace(self, receipt=receipt)

    @property
    def started(self) -> str:
        """When the listing began (UTC, ISO 8601)."""
        return str(self.receipt["started"])

    @property
    def finished(self) -> str:
        """When the listing ended (UTC, ISO 8601)."""
        return str(self.receipt["finished"])


def is_crawled(job: Job, endpoint: str) -> bool:
    """Whether the Hub was listed with a job's filters, to the end."""
    return job.store.exists(_folder(job, endpoint).receipt)


def _folder(job: Job, endpoint: str) -> CatalogueFolder:
    return CatalogueFolder.of(job.catalogue_key(endpoint))


def crawl(job: Job, endpoint: str, refresh: bool = False) -> Catalogue:
    """List the Hub's classifiers into the catalogue.

    A no-op where that was done; ``refresh`` lists again. Rows are written every half minute, with the address of the
    next page, so that a killed crawl resumes there.

    Raises:
        HubError: the Hub refuses or does not answer. The rows listed so far are kept.
        UsageError: a filter is invalid.
    """
    config = job.config
    folder = _folder(job, endpoint)
    store = job.store
    if not refresh and is_crawled(job, endpoint):
        catalogue = Catalogue.open(job, endpoint)
        job.report.say(
            f"crawl: {count_rows(catalogue.receipt['rows']):,} models were listed on {catalogue.finished[:10]} already "
            "(--refresh lists them again)"
        )
        return catalogue
    filters = listing_filters(config.filters)
    of = config.filters.pipeline_tag if config.filters.repos is None else config.filters.repos.name
    progress = _Progress(store, folder, refresh, of)
    counter = job.report.counter("crawl", None, "models", progress.listed)
    if not progress.state["ended"]:
        pages = iter_pages(filters, progress.state["next_url"], already=progress.listed, endpoint=endpoint)
        try:
            for page in pages:
                progress.add(page)
                counter.add(len(page.rows))
        except BaseException:
            progress.save()
            raise
        progress.save(ended=True)
    last = store.read_json_or_none(folder.receipt)
    store.write_json(
        folder.receipt,
        {
            "run": progress.state["run"],
            "rows": progress.state["rows"],
            "failures": progress.state["failures"],
            "endpoint": endpoint,
            "of": progress.state.get("of"),
            "started": progress.state["started"],
            "finished": _now(),
            "version": CRAWL_VERSION,
            "made_by": MADE_BY,
        },
    )
    store.delete(progress.name)
    runs_to_keep = {progress.state["run"], *([last["run"]] if last is not None else [])}
    _drop_old_runs(store, folder, runs_to_keep)
    finished_catalogue = Catalogue.open(job, endpoint)
    failures = count_rows(finished_catalogue.receipt["failures"])
    job.report.say(
        f"crawl: {count_rows(finished_catalogue.receipt['rows']):,} models listed by {endpoint}"
        + (f", {failures:,} rows could not be read" if failures else "")
    )
    return finished_catalogue


def crawl_all(
    job: Job, endpoint: str, listings: Sequence[Filters], columns: Sequence[str], refresh: bool = False
) -> pa.Table:
    """Some columns of several catalogues, listed where that was not done yet: every repository once.

    Raises:
        HubError, UsageError: as `crawl`.
    """
    return united((crawl(one, endpoint, refresh) for one in each_listing(job, listings)), columns)


def each_listing(job: Job, listings: Sequence[Filters]) -> Iterator[Job]:
    """The job with the filters of each of several listings."""
    return (replace(job, config=job.config.model_copy(update={"filters": filters})) for filters in listings)


def united(catalogues: Iterable[Catalogue], columns: Sequence[str]) -> pa.Table:
    """Some columns of several catalogues: every repository once."""
    listed = [table for catalogue in catalogues if (table := catalogue.table(columns)).num_rows]
    table = pa.concat_tables(listed) if listed else CATALOGUE.empty_table().select(list(columns))
    return table.filter(pa.array(first_of_each([table["repo"]])))


def first_of_each(columns: Sequence[pa.ChunkedArray[Any]]) -> npt.NDArray[np.bool_]:
    """Mask of the rows of some columns, one after the other, in which a name occurs for the first time."""
    names = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())
    codes = pa.chunked_array([names.combine_chunks().dictionary_encode().indices]).to_numpy()
    first = np.zeros(len(codes), bool)
    first[np.unique(codes, return_index=True)[1]] = True
    return first


class _Progress:
    """The state of a crawl: pages are gathered into parts, and written pages are never requested again."""

    def __init__(self, store: Store, folder: CatalogueFolder, refresh: bool, of: str | None = None) -> None:
        """``of``: what is listed, for people: a task, or the name of a list."""
        self.name = folder.progress
        self._store, self._folder = store, folder
        self._rows: list[CatalogueRow] = []
        self._failures: list[Failure] = []
        self._saved = time.monotonic()
        self.state: dict[str, Any] = {
            # A refresh writes beside the parts of the last crawl, which running jobs may still read.
            "run": dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S%f") if refresh else "first",
            "of": of,
            "next_url": None,
            "rows": [],
            "failures": [],
            "ended": False,
            "version": CRAWL_VERSION,
            "made_by": MADE_BY,
            "started": _now(),
        }
        saved = store.read_json_or_none(self.name)
        if saved is not None:
            check_version(saved, CRAWL_VERSION, store.path(self.name), "crawl")
            self.state = saved

    @property
    def listed(self) -> int:
        """Number of rows that are written."""
        return count_rows(self.state["rows"])

    def add(self, page: Page) -> None:
        """Add a page; write the gathered rows if they fill a part or are older than ``_PART_SECONDS``."""
        self._rows += page.rows
        self._failures += page.failures
        self.state["next_url"] = page.next_url
        if len(self._rows) >= _PART_ROWS or time.monotonic() - self._saved > _PART_SECONDS:
            self.save()

    def save(self, ended: bool = False) -> None:
        """Write the gathered rows, then the state with the address of the next page."""
        for kind, records, schema in (
            ("rows", self._rows, CATALOGUE),
            ("failures", self._failures, FAILURES),
        ):
            if records:
                number = len(self.state[kind])
                path = self._folder.part(self.state["run"], kind, number)
                self.state[kind].append(_write_part(self._store, path, records, schema))
        self._rows, self._failures, self._saved = [], [], time.monotonic()
        self.state["ended"] = ended
        self._store.write_json(self.name, self.state)


def _write_part(
    store: Store, path: str, records: Sequence[CatalogueRow] | Sequence[Failure], schema: pa.Schema
) -> dict[str, Any]:
    """Write rows, and describe them for a receipt."""
    data = parquet_bytes(to_table(records, schema))
    store.write(path, data)
    return asdict(Part(path, len(records), len(data), digest(data)))


def _drop_old_runs(store: Store, folder: CatalogueFolder, keep: set[str]) -> None:
    """Delete the parts of earlier crawls, but for the last one: a running job may be reading it."""
    for run in {name.split("/")[2] for name in store.names(folder.path, suffix=".parquet")} - keep:
        store.delete_folder(folder.run(run))


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")

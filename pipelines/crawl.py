"""The crawl stage: the Hub's listing becomes the catalogue, page by page, resumable at any page."""

from __future__ import annotations

import datetime as dt
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.stages import Job, read_repos
from probelog.errors import UsageError
from probelog.listing import ListingFilters, iter_pages
from probelog.schemas import CATALOGUE, FAILURES, CatalogueRow, Failure, check_schema, from_table, to_table
from probelog.storage import Store, parquet_bytes


def hub_endpoint() -> str:
    """The Hub's address: ``HF_ENDPOINT``, or the public Hub.

    Read when a job starts, not when huggingface_hub is imported, so that a program may set it first.
    """
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or str(constants.ENDPOINT)).rstrip("/")


@dataclass(frozen=True)
class Catalogue:
    """One finished crawl in a store."""

    store: Store
    folder: str
    receipt: dict[str, Any]

    @classmethod
    def open(cls, job: Job, endpoint: str) -> Catalogue:
        """The catalogue of a job's filters.

        Raises:
            UsageError: it was never crawled, or not to the end.
        """
        folder = f"catalogue/{job.catalogue_key(endpoint)}"
        if not job.store.exists(f"{folder}/receipt.json"):
            raise UsageError(
                f"{endpoint} was not crawled with these filters yet: run `probelog-index crawl` first"
            )
        return cls(job.store, folder, job.store.read_json(f"{folder}/receipt.json"))

    def rows(self) -> list[CatalogueRow]:
        """Every repository once, at its newest listed commit, by name."""
        found: dict[str, CatalogueRow] = {}
        # Newest first: a repository that changed during the crawl shows up twice, and its first row is the newer.
        for table in self._tables("rows"):
            check_schema(table.schema, CATALOGUE, self.folder)
            for row in from_table(table, CatalogueRow):
                found.setdefault(row.repo, row)
        return [found[repo] for repo in sorted(found)]

    def failures(self) -> list[Failure]:
        """What could not be read of the listing."""
        found: list[Failure] = []
        for table in self._tables("failures"):
            check_schema(table.schema, FAILURES, self.folder)
            found += from_table(table, Failure)
        return found

    def _tables(self, kind: str) -> Iterator[Any]:
        for number in range(int(self.receipt["pages"])):
            yield self.store.read_table(_page(self.folder, self.receipt["run"], kind, number))


def crawl(job: Job, endpoint: str, refresh: bool = False) -> Catalogue:
    """List the Hub's classifiers into the catalogue.

    A no-op where that was done; ``refresh`` lists again. Every page is written before the next one is asked for,
    with the address of the next one, so that a killed crawl goes on there.
    """
    config = job.config
    folder = f"catalogue/{job.catalogue_key(endpoint)}"
    store = job.store
    receipt = f"{folder}/receipt.json"
    if not refresh and store.exists(receipt):
        found = Catalogue.open(job, endpoint)
        job.report.say(
            f"crawl: {found.receipt['rows']:,} models were listed on {found.receipt['finished'][:10]} already "
            "(--refresh lists them again)"
        )
        return found
    filters = ListingFilters(
        libraries=tuple(config.filters.library),
        pipeline_tag=config.filters.pipeline_tag,
        author=config.filters.author,
        licences=tuple(config.filters.licence),
        since=config.filters.since,
        max_bytes=config.filters.max_bytes,
        max_params=config.filters.max_params,
        repos=tuple(read_repos(config.filters.repos)),
        limit=config.filters.limit,
    )
    state = _state(store, folder, refresh)
    counter = job.report.counter("crawl", None, "models", state["rows"])
    reasons: Counter[str] = Counter()
    if not state["finished"]:
        for page in iter_pages(filters, state["next_url"], already=state["rows"], endpoint=endpoint):
            number = state["pages"]
            store.write(
                _page(folder, state["run"], "rows", number), parquet_bytes(to_table(page.rows, CATALOGUE))
            )
            store.write(
                _page(folder, state["run"], "failures", number),
                parquet_bytes(to_table(page.failures, FAILURES)),
            )
            state |= {
                "pages": number + 1,
                "next_url": page.next_url,
                "rows": state["rows"] + len(page.rows),
                "failures": state["failures"] + len(page.failures),
                "finished": page.next_url is None,
            }
            store.write_json(f"{folder}/progress.json", state)
            reasons.update(failure.reason for failure in page.failures)
            counter.add(len(page.rows))
    store.write_json(
        receipt,
        {
            "run": state["run"],
            "pages": state["pages"],
            "rows": state["rows"],
            "failures": state["failures"],
            "endpoint": endpoint,
            "started": state["started"],
            "finished": _now(),
            "version": 1,
        },
    )
    store.delete(f"{folder}/progress.json")
    told = f", {state['failures']:,} rows could not be read" if state["failures"] else ""
    job.report.say(f"crawl: {state['rows']:,} models listed by {endpoint}{told}")
    return Catalogue.open(job, endpoint)


def _state(store: Store, folder: str, refresh: bool) -> dict[str, Any]:
    """Where an interrupted crawl was, or the start of a new one under a name of its own."""
    if store.exists(f"{folder}/progress.json"):
        state: dict[str, Any] = store.read_json(f"{folder}/progress.json")
        return state
    run = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S%f") if refresh else "first"
    return {
        "run": run,
        "pages": 0,
        "next_url": None,
        "rows": 0,
        "failures": 0,
        "finished": False,
        "started": _now(),
    }


def _page(folder: str, run: str, kind: str, number: int) -> str:
    return f"{folder}/{run}/{kind}-{number:06d}.parquet"


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")

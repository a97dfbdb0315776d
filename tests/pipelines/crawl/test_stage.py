"""The crawl stage over a Hub on loopback: page by page, resumable, each repository once."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.model import Config
from pipelines.crawl import stage
from pipelines.crawl.stage import Catalogue, _Progress, crawl, hub_endpoint, is_crawled
from pipelines.job.job import Job
from pipelines.job.progress import Report
from probelog.errors import FailureReason, StoreError, UsageError
from probelog.hub.client import HubError
from probelog.hub.listing import Page
from probelog.storage.layout import CatalogueFolder
from probelog.storage.schemas import CatalogueRow, Failure
from probelog.storage.store import Store
from tests.support.hub import faults
from tests.support.hub.live_hub import LiveHub, live_hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LiveHub]:
    with live_hub(tmp_path / "hub", 7) as running:
        yield running


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def job(tmp_path: Path, out: io.StringIO) -> Job:
    content = {"store": str(tmp_path / "store"), "probes": "unused"}
    return Job.of(Config.model_validate(content), Report(out))


def row(repo: str, sha: str = "1", **facts: Any) -> CatalogueRow:
    return CatalogueRow(repo, sha, **facts)


def test_a_crawl_is_done_once(hub: LiveHub, job: Job, out: io.StringIO) -> None:
    with pytest.raises(UsageError, match="run `probelog-index crawl` first"):
        Catalogue.open(job, hub.endpoint)
    done = crawl(job, hub.endpoint)
    assert {found.repo: found.sha for found in done.rows()} == hub.state()
    assert [found.repo for found in done.rows()] == sorted(hub.state())
    assert done.started <= done.finished
    assert f"crawl: 7 models listed by {hub.endpoint}\n" in out.getvalue()
    asked = len(hub.faults.requests)
    hub.put("owner/later", 99)
    assert crawl(job, hub.endpoint).receipt == done.receipt
    assert len(hub.faults.requests) == asked
    assert "7 models were listed on" in out.getvalue()
    assert job.store.names("catalogue", suffix="progress.json") == []


def test_a_refresh_keeps_the_last_crawl_for_its_readers(hub: LiveHub, job: Job) -> None:
    first = crawl(job, hub.endpoint)
    hub.remove("owner/model-0")
    second = crawl(job, hub.endpoint, refresh=True)
    assert len(second.rows()) == 6
    assert len(first.rows()) == 7, "a running job may be reading it"
    third = crawl(job, hub.endpoint, refresh=True)
    with pytest.raises(FileNotFoundError):
        first.rows()
    assert len(second.rows()) == len(third.rows()) == 6


def test_rows_that_cannot_be_read_are_counted(hub: LiveHub, job: Job, out: io.StringIO) -> None:
    hub.faults.spoil("/api/models?", faults.rows(lambda rows: [None, *rows, 7]), times=1)
    done = crawl(job, hub.endpoint)
    assert [failure.reason for failure in done.failures()] == [FailureReason.MALFORMED_ROW] * 2
    assert "7 models listed" in out.getvalue()
    assert ", 2 rows could not be read" in out.getvalue()


def test_a_crawl_whose_receipt_could_not_be_written_is_not_made_again(
    hub: LiveHub, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Store.write_json

    def write(self: Store, name: str, value: Any) -> None:
        if name.endswith("receipt.json"):
            raise StoreError("no room")
        real(self, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_json", write)
        with pytest.raises(StoreError, match="no room"):
            crawl(job, hub.endpoint)
    asked = len(hub.faults.requests)
    assert len(crawl(job, hub.endpoint).rows()) == 7
    assert len(hub.faults.requests) == asked


def test_an_interrupted_crawl_is_resumed(hub: LiveHub, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stage.iter_pages
    starts: list[Any] = []

    def small(filters: Any, start: str | None, **more: Any) -> Iterator[Page]:
        starts.append((start, more["already"]))
        return real(filters, start, page_size=3, **more)

    monkeypatch.setattr(stage, "iter_pages", small)
    hub.faults.spoil("cursor=", faults.answer(404), skip=1)
    with pytest.raises(HubError):
        crawl(job, hub.endpoint)
    assert not is_crawled(job, hub.endpoint)
    hub.faults.rules.clear()
    done = crawl(job, hub.endpoint)
    assert {found.repo: found.sha for found in done.rows()} == hub.state()
    assert [already for _, already in starts] == [0, 6]
    assert starts[0][0] is None
    assert starts[1][0] is not None


def test_a_crawl_that_ended_without_a_receipt_sends_no_request(hub: LiveHub, job: Job) -> None:
    progress = _Progress(job.store, CatalogueFolder.of(job.catalogue_key(hub.endpoint)), refresh=False)
    progress.add(Page([row("a/1")]))
    progress.save(ended=True)
    asked = len(hub.faults.requests)
    assert [found.repo for found in crawl(job, hub.endpoint).rows()] == ["a/1"]
    assert len(hub.faults.requests) == asked


def test_of_one_repository_the_first_row_counts(job: Job, hub: LiveHub) -> None:
    progress = _Progress(job.store, CatalogueFolder.of(job.catalogue_key(hub.endpoint)), refresh=False)
    progress.add(Page([row("b/2", "new"), row("a/1", "new")]))
    progress.save()
    progress.add(Page([row("a/1", "old"), row("c/3", downloads=5), row("b/2", "old"), row("c/3", "old")]))
    progress.save(ended=True)
    done = crawl(job, hub.endpoint)
    assert [(found.repo, found.sha) for found in done.rows()] == [
        ("a/1", "new"),
        ("b/2", "new"),
        ("c/3", "1"),
    ]
    table = done.table()
    assert table["repo"].to_pylist() == ["b/2", "a/1", "c/3"], "in the order of the listing"
    assert table["sha"].to_pylist() == ["new", "new", "1"]
    some = done.table(["downloads", "repo"])
    assert some.column_names == ["downloads", "repo"]
    assert some["downloads"].to_pylist() == [None, None, 5]


def test_an_empty_catalogue(job: Job, hub: LiveHub) -> None:
    _Progress(job.store, CatalogueFolder.of(job.catalogue_key(hub.endpoint)), refresh=False).save(ended=True)
    done = crawl(job, hub.endpoint)
    assert (done.rows(), done.table().num_rows, done.table(["repo"]).column_names) == ([], 0, ["repo"])


def test_pages_are_gathered_until_they_are_worth_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    monkeypatch.setattr(stage, "_PART_ROWS", 3)
    progress = _Progress(store, CatalogueFolder("c"), refresh=False)
    progress.add(Page([row("a/1"), row("a/2")], next_url="second"))
    assert store.names("c") == []
    failure = Failure.of("x", "", "crawl", FailureReason.MALFORMED_ROW, "odd")
    progress.add(Page([row("a/3")], [failure], next_url="third"))
    assert store.names("c") == ["c/first/failures-00000.parquet", "c/first/rows-00000.parquet", "c/progress.json"]  # fmt: skip
    assert progress.listed == 3
    again = _Progress(store, CatalogueFolder("c"), refresh=True)
    assert (again.listed, again.state["next_url"], again.state["run"], again.state["ended"]) == (3, "third", "first", False)  # fmt: skip
    monkeypatch.setattr(stage, "_PART_SECONDS", -1.0)
    again.add(Page([row("a/4")]))
    assert again.listed == 4
    assert store.read_json("c/progress.json")["next_url"] is None


def test_a_row_is_written_before_the_crawl_is_said_to_be_beyond_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, real = [], Store.write

    def write(self: Store, name: str, data: bytes) -> None:
        names.append(name)
        real(self, name, data)

    monkeypatch.setattr(Store, "write", write)
    progress = _Progress(Store(tmp_path), CatalogueFolder("c"), refresh=False)
    progress.add(Page([row("a/1")]))
    progress.save()
    assert names == ["c/first/rows-00000.parquet", "c/progress.json"]


def test_the_address_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/")
    assert hub_endpoint() == "http://127.0.0.1:9"
    monkeypatch.delenv("HF_ENDPOINT")
    assert hub_endpoint().startswith("https://")

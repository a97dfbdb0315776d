"""What a nightly run finds on a Hub that changed since the last one."""

from __future__ import annotations

import datetime as dt
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.model import Config
from pipelines.crawl.changes import Changes, crawl_since, listed_since
from pipelines.crawl.stage import Catalogue
from pipelines.inspect.verify import verify
from pipelines.job.job import Job
from pipelines.job.progress import Report
from probelog.errors import FailureReason
from probelog.hub.client import HubError, HubUnavailableError, Retry
from tests.support.hub import faults
from tests.support.hub.live_hub import BEGINNING, LiveHub, live_hub

FAST = Retry(attempts=2, first_wait=0.01, longest_wait=0.02)
MODELS = 40


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LiveHub]:
    with live_hub(tmp_path / "hub", MODELS) as running:
        yield running


def job(tmp_path: Path, **settings: Any) -> Job:
    content = {"store": str(tmp_path / "store"), "probes": "unused", **settings}
    return Job.of(Config.model_validate(content), Report(io.StringIO()))


def look(
    hub: LiveHub, job: Job, watermark: dt.datetime | None, known: dict[str, str] | None = None
) -> Changes:
    pairs = set((known or {}).items())
    return listed_since(job, hub.endpoint, watermark, pairs, retry=FAST, page_size=6)


def names(found: Changes) -> list[str]:
    return [row.repo.removeprefix("owner/") for row in found.rows]


def at(hours: float) -> dt.datetime:
    return BEGINNING + dt.timedelta(hours=hours)


def test_a_nightly_run_continues_at_the_watermark(hub: LiveHub, tmp_path: Path) -> None:
    nightly_job = job(tmp_path, nightly={"overlap_hours": 2})
    first = look(hub, nightly_job, None)
    assert names(first) == [f"model-{number}" for number in reversed(range(MODELS))]
    assert first.watermark == at(MODELS - 1)
    known = {row.repo: row.sha for row in first.rows}

    second = look(hub, nightly_job, first.watermark, known)
    assert (second.rows, second.failures, second.watermark) == ([], [], first.watermark)
    assert second.listed == 3  # the overlap

    hub.put("owner/new", MODELS + 5)
    changed = hub.put("owner/model-3", MODELS + 6)
    before = len(hub.faults.requests)
    third = look(hub, nightly_job, first.watermark, known)
    assert names(third) == ["model-3", "new"]
    assert third.rows[0].sha == changed
    assert third.watermark == at(MODELS + 6)
    assert len(hub.faults.requests) - before == 1  # and not the whole listing


def test_a_catalogue_grows_by_what_changed_until_all_is_listed_again(hub: LiveHub, tmp_path: Path) -> None:
    first = crawl_since(job(tmp_path), hub.endpoint)
    assert (len(first.rows()), first.watermark) == (MODELS, at(MODELS - 1))
    same = crawl_since(job(tmp_path), hub.endpoint)
    assert (same.receipt["rows"], same.watermark) == (first.receipt["rows"], first.watermark)
    hub.put("owner/new", MODELS + 5)
    changed = hub.put("owner/model-3", MODELS + 6)
    hub.remove("owner/model-4")
    grown = crawl_since(job(tmp_path), hub.endpoint)
    added, *before = grown.receipt["rows"]
    assert (added["rows"], before, grown.watermark) == (2, first.receipt["rows"], at(MODELS + 6))
    rows = {row.repo: row.sha for row in Catalogue.open(job(tmp_path), hub.endpoint).rows()}
    assert (len(rows), rows["owner/model-3"]) == (MODELS + 1, changed)
    assert verify(str(tmp_path / "store"), Report(io.StringIO())).clean
    again = crawl_since(job(tmp_path, nightly={"reconcile_days": 0}), hub.endpoint)
    assert {row.repo for row in again.rows()} == rows.keys() - {"owner/model-4"}


def test_a_change_below_the_watermark_is_found_within_the_overlap(hub: LiveHub, tmp_path: Path) -> None:
    known = hub.state()
    hub.put("owner/late", MODELS - 6)
    hub.put("owner/too-late", MODELS - 20)
    found = look(hub, job(tmp_path, nightly={"overlap_hours": 8}), at(MODELS - 1), known)
    assert names(found) == ["late"]
    assert found.watermark == at(MODELS - 1)


def test_the_later_of_watermark_and_filter_counts(hub: LiveHub, tmp_path: Path) -> None:
    settings = {"filters": {"since": at(35)}, "nightly": {"overlap_hours": 0}}
    assert look(hub, job(tmp_path, **settings), at(20)).listed == MODELS - 35
    assert look(hub, job(tmp_path, **settings), at(38)).listed == 2


def test_of_more_than_the_limit_the_newest_are_taken(hub: LiveHub, tmp_path: Path) -> None:
    found = look(hub, job(tmp_path, filters={"limit": 3}), at(10))
    assert names(found) == ["model-39", "model-38", "model-37"]
    assert found.watermark == at(39)


def test_an_explicit_list_is_looked_at_as_a_whole(hub: LiveHub, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("owner/model-2\nowner/model-39\nowner/not-there\n")
    found = look(hub, job(tmp_path, filters={"list": tmp_path / "list.txt"}), at(100))
    assert names(found) == ["model-39", "model-2"]
    assert [(row.repo, row.reason) for row in found.failures] == [
        ("owner/not-there", FailureReason.NOT_FOUND)
    ]
    assert found.watermark == at(100)


def test_a_server_that_ignores_the_order_is_read_to_the_end(hub: LiveHub, tmp_path: Path) -> None:
    # The first page is in disorder; those that follow happen to look sorted.
    hub.faults.spoil("/api/models?", faults.rows(lambda rows: rows[3:] + rows[:3]), times=1)
    hub.put("owner/deep", 1)
    found = look(hub, job(tmp_path, nightly={"overlap_hours": 0}), at(MODELS - 1), hub.state())
    assert found.listed == 1
    assert len(hub.faults.asked("/api/models?")) == 7


def test_hostile_rows_are_failures_and_do_no_harm(hub: LiveHub, tmp_path: Path) -> None:
    hostile: list[Any] = [
        None,
        7,
        {"id": "../../etc", "sha": "0" * 40},
        {"id": "owner/no-commit", "sha": 9},
        {"id": "owner/\ud800", "sha": "1" * 40, "lastModified": "2025-01-03T00:00:00Z"},
        {"id": "owner/odd-time", "sha": "2" * 40, "lastModified": "9" * 40, "library_name": "timm",
         "pipeline_tag": "image-classification"},
    ]  # fmt: skip
    hub.faults.spoil("/api/models?", faults.rows(lambda rows: hostile + rows), times=1)
    found = look(hub, job(tmp_path), at(MODELS - 1), hub.state())
    assert names(found) == ["odd-time"]
    assert [row.reason for row in found.failures] == [FailureReason.MALFORMED_ROW] * 5
    assert found.watermark == at(MODELS - 1)


def test_a_row_from_the_future_does_not_move_the_watermark(hub: LiveHub, tmp_path: Path) -> None:
    hub.put("owner/prophet", 24 * 365 * 100)
    nightly_job = job(tmp_path)
    first = look(hub, nightly_job, None)
    assert names(first)[0] == "prophet"
    assert first.watermark == at(MODELS - 1)
    known = hub.state()
    hub.put("owner/new", MODELS)
    assert names(look(hub, nightly_job, first.watermark, known)) == ["new"]


def test_a_repository_counts_once_at_its_newest_commit(hub: LiveHub, tmp_path: Path) -> None:
    def with_older(rows: list[Any]) -> list[Any]:
        older = {**rows[0], "sha": "f" * 40, "lastModified": at(-5).isoformat()}
        return [older, *rows, older]

    hub.faults.spoil("/api/models?", faults.rows(with_older), times=1)
    found = look(hub, job(tmp_path), None)
    assert found.listed == len(found.rows) == MODELS
    assert {row.repo: row.sha for row in found.rows} == hub.state()
    # The known newest commit is not passed over for an older one.
    hub.faults.spoil("/api/models?", faults.rows(with_older), times=1)
    assert look(hub, job(tmp_path), None, hub.state()).rows == []


def test_of_two_rows_of_the_same_time_the_first_listed_is_the_newer(hub: LiveHub, tmp_path: Path) -> None:
    hub.faults.spoil("/api/models?", faults.rows(lambda rows: [*rows, {**rows[0], "sha": "f" * 40}]), times=1)
    found = look(hub, job(tmp_path), None)
    assert {row.repo: row.sha for row in found.rows} == hub.state()


def test_what_is_said_of_the_changes(hub: LiveHub, tmp_path: Path) -> None:
    def said(watermark: dt.datetime | None, **filters: Any) -> str:
        output = io.StringIO()
        nightly_job = job(tmp_path, filters=filters, nightly={"overlap_hours": 2})
        told = Job.of(nightly_job.config, Report(output))
        listed_since(told, hub.endpoint, watermark, set(), retry=FAST)
        return output.getvalue().splitlines()[-1]

    (tmp_path / "list.txt").write_text("owner/model-2\nowner/not-there\n")
    assert said(None) == f"changes: 40 repositories listed by {hub.endpoint}"
    assert (
        said(at(30))
        == f"changes: 12 repositories listed by {hub.endpoint}, changed since 2025-01-02 04:00 UTC"
    )
    assert said(at(30), list=tmp_path / "list.txt") == (
        f"changes: 1 repositories listed by {hub.endpoint}, 1 rows could not be read"
    )


def test_a_listing_that_breaks_off_gives_nothing(hub: LiveHub, tmp_path: Path) -> None:
    hub.faults.spoil("/api/models?", faults.answer(500), skip=2)
    with pytest.raises(HubUnavailableError):
        look(hub, job(tmp_path), None)
    hub.faults.rules.clear()
    hub.faults.spoil("/api/models?", faults.answer(401, {"x-error-message": "Invalid credentials"}))
    with pytest.raises(HubError):
        look(hub, job(tmp_path), None)

"""Crawling a real Hub on loopback, whole and spoiled."""

from __future__ import annotations

import datetime as dt
import itertools
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.hubserver import running
from probelog.errors import FailureReason, ItemFailure, UsageError
from probelog.hub.client import HubError, HubRefusalError, HubUnavailableError, Retry, parse_json
from probelog.hub.listing import ListingFilters, Page, fetch_files, item_failure, iter_pages, looked_at
from probelog.hub.model_info import read_brief_row, read_row
from probelog.hub.rate_limit import SlidingWindowLimit
from probelog.storage.schemas import CATALOGUE, FAILURES, CatalogueRow, Parent, from_table, to_table
from tests.support.hub import faults
from tests.support.hub.faults import faulty
from tests.support.hub.repositories import TIMM, Write

FAST = Retry(attempts=3, first_wait=0.01, longest_wait=0.02, longest_penalty=0.2)
Listing = Callable[[object], Path]
ALL = ListingFilters(libraries=(), pipeline_tag=None)


def entry(number: int, **more: Any) -> dict[str, Any]:
    time = dt.datetime(2025, 1, 1, tzinfo=dt.UTC) + dt.timedelta(
        hours=number // 2
    )  # in pairs: ties in the order
    return {
        "id": f"owner-{number % 7}/model-{number}", "sha": f"{number:040x}", "library": ("timm", "transformers", "keras")[number % 3],
        "pipeline_tag": "image-classification", "lastModified": time.isoformat(), "license": "mit" if number % 2 else None,
        "downloads": number, **more,
    }  # fmt: skip


def crawl(filters: ListingFilters, endpoint: str, **options: Any) -> list[Page]:
    return list(iter_pages(filters, endpoint=endpoint, **{"retry": FAST, **options}))


def repos(pages: list[Page]) -> list[str]:
    return [row.repo for page in pages for row in page.rows]


def test_a_large_catalogue_is_paged_newest_first(write_listing: Listing) -> None:
    with running(write_listing([entry(number) for number in range(2500)])) as endpoint:
        pages = crawl(ALL, endpoint, page_size=400)
    assert len(pages) == 7
    rows = [row for page in pages for row in page.rows]
    assert len({row.repo for row in rows}) == len(rows) == 2500
    times = [row.last_modified for row in rows]
    assert all(time is not None for time in times)
    assert times == sorted(times, reverse=True)
    assert from_table(to_table(rows, CATALOGUE), CatalogueRow) == rows


def test_an_interrupted_crawl_resumes(write_listing: Listing) -> None:
    with running(write_listing([entry(number) for number in range(60)])) as endpoint:
        undisturbed = crawl(ALL, endpoint, page_size=7)
        first = list(itertools.islice(iter_pages(ALL, endpoint=endpoint, page_size=7), 3))
        rest = crawl(ALL, endpoint, page_size=7, start_url=first[-1].next_url)
    assert repos(first) + repos(rest) == repos(undisturbed)


@pytest.mark.parametrize("server_filters", [True, False])
def test_filters(write_listing: Listing, write_repository: Write, server_filters: bool) -> None:
    write_repository("ada/small", TIMM, values=100)
    write_repository("ada/large", TIMM, values=5000)
    write_repository("bea/text", {"architectures": ["BertModel"], "model_type": "bert"})
    root = write_listing(
        [
            {"id": "ada/small", "lastModified": "2025-03-01T00:00:00Z", "license": "mit"},
            {"id": "ada/large", "lastModified": "2025-02-01T00:00:00Z"},
            {"id": "bea/text", "lastModified": "2025-01-01T00:00:00Z", "license": "apache-2.0"},
        ]
    )
    with faulty(root) as (endpoint, hub):

        def found(**filters: Any) -> list[str]:
            if not server_filters:  # a mirror that knows the whole list only
                everything = crawl_json(endpoint)
                hub.spoil("pipeline_tag=", faults.rows(lambda _: everything), times=1)
                hub.spoil("sort=", faults.rows(lambda _: everything), times=1)
            result = repos(crawl(ListingFilters(**filters), endpoint))
            hub.rules.clear()
            return result

        assert found() == ["ada/small", "ada/large"]
        assert found(libraries=("transformers",), pipeline_tag=None) == ["bea/text"]
        assert found(libraries=("timm",)) == ["ada/small", "ada/large"]
        assert found(libraries=(), pipeline_tag=None, author="bea") == ["bea/text"]
        assert found(licences=("mit", "bsd")) == ["ada/small"]
        assert found(max_params=100) == ["ada/small"]
        assert found(max_bytes=400) == ["ada/small"]  # float32, estimated from the counts
        assert found(since=dt.datetime(2025, 2, 10, tzinfo=dt.UTC)) == ["ada/small"]
        assert found(limit=1) == ["ada/small"]


def crawl_json(endpoint: str) -> Any:
    import httpx

    from probelog.hub.listing import EXPAND

    return httpx.get(f"{endpoint}/api/models", params={"expand": list(EXPAND), "sort": "lastModified"}).json()


def test_several_libraries_are_not_asked_for_at_once(write_listing: Listing) -> None:
    """The Hub's repeated filter means "and"."""
    with faulty(write_listing([entry(number) for number in range(9)])) as (endpoint, hub):
        assert len(repos(crawl(ListingFilters(), endpoint))) == 6
        assert "filter=" not in hub.requests[0].address
        assert len(repos(crawl(ListingFilters(libraries=("timm",)), endpoint))) == 3
        assert "filter=timm" in hub.requests[-1].address


def test_since_stops_below_the_watermark(write_listing: Listing) -> None:
    since = dt.datetime(2025, 1, 2, tzinfo=dt.UTC)
    with faulty(write_listing([entry(number) for number in range(100)])) as (endpoint, hub):
        pages = crawl(ListingFilters((), None, since=since), endpoint, page_size=10)
        assert sorted(repos(pages)) == sorted(entry(number)["id"] for number in range(48, 100))
        assert len(hub.requests) == 6  # of 10
        assert pages[-1].next_url is None


@pytest.mark.parametrize(("page_size", "pages"), [(20, 2), (21, 1), (22, 1)])
def test_a_listing_ends_with_the_first_row_below_the_watermark(
    write_listing: Listing, page_size: int, pages: int
) -> None:
    since = dt.datetime(2025, 1, 1, tzinfo=dt.UTC) + dt.timedelta(hours=40)
    with running(write_listing([entry(number) for number in range(100)])) as endpoint:
        read = crawl(ListingFilters((), None, since=since), endpoint, page_size=page_size)
    assert len(read) == pages
    assert len(repos(read)) == 20


@pytest.mark.parametrize(
    ("status", "code", "message", "reason"),
    [
        (401, "", "", FailureReason.NOT_FOUND),
        (404, "RepoNotFound", "", FailureReason.NOT_FOUND),
        (410, "", "", FailureReason.NOT_FOUND),
        (401, "", "Invalid credentials in Authorization header", FailureReason.DOWNLOAD_FAILED),
        (403, "", "", FailureReason.DOWNLOAD_FAILED),
        (403, "GatedRepo", "", FailureReason.GATED),
        (401, "GatedRepo", "", FailureReason.GATED),
        (403, "", "Access to this resource is disabled.", FailureReason.DISABLED),
        (451, "", "", FailureReason.DISABLED),
        (400, "", "", FailureReason.DOWNLOAD_FAILED),
    ],
)
def test_the_reason_of_a_refusal(status: int, code: str, message: str, reason: FailureReason) -> None:
    failure = item_failure(HubRefusalError("http://hub/x", status, code, message))
    assert failure.reason is reason
    assert f"http://hub/x answered {status}" in failure.detail
    assert item_failure(HubUnavailableError("nobody")).reason is FailureReason.DOWNLOAD_FAILED


def test_a_limit_counts_over_interruptions(write_listing: Listing) -> None:
    filters = ListingFilters((), None, limit=10)
    with running(write_listing([entry(number) for number in range(30)])) as endpoint:
        first = next(iter_pages(filters, endpoint=endpoint, page_size=4))
        rest = crawl(filters, endpoint, page_size=4, start_url=first.next_url, already=len(first.rows))
        assert len(first.rows + [row for page in rest for row in page.rows]) == 10
        assert rest[-1].next_url is None


def test_an_explicit_list(tmp_path: Path, write_repository: Write) -> None:
    write_repository("ada/vit")
    write_repository("plain")
    wanted = ("ada/vit", "ada/missing", "plain", *(f"no/model-{n}" for n in range(30)))
    with running(tmp_path / "hub") as endpoint:
        pages = crawl(ListingFilters(repos=wanted), endpoint)
        assert repos(pages) == ["ada/vit", "plain"]
        weights = {file.path: file for file in pages[0].rows[0].files}["model.safetensors"]
        assert weights.size == (tmp_path / "hub/ada/vit/model.safetensors").stat().st_size
        assert len(weights.sha256 or "") == 64
        failures = [failure for page in pages for failure in page.failures]
        assert {failure.reason for failure in failures} == {"not-found"}
        assert len(failures) == 31
        again = crawl(ListingFilters(repos=wanted), endpoint, start_url=pages[0].next_url)
        assert [failure.repo for failure in again[0].failures] == [f"no/model-{n}" for n in range(17, 30)]


def test_malformed_rows_are_recorded_and_the_rest_survives(write_listing: Listing) -> None:
    def spoil(rows: list[Any]) -> list[Any]:
        odd = {
            "library_name": 7, "downloads": "many", "likes": True, "tags": {"a": 1}, "lastModified": "yesterday",
            "safetensors": {"total": -5, "parameters": []}, "config": [], "cardData": "x", "siblings": [{"rfilename": 3}, 4],
            "gated": "manual", "pipeline_tag": "lone \ud800 surrogate",
        }  # fmt: skip
        return [
            None, 17, "text", [], {"sha": "a" * 40}, {"id": "../up", "sha": "a" * 40}, {"id": 5, "sha": "b" * 40},
            {"id": "ok/bad-sha", "sha": "main"}, {"id": "ok/odd", "sha": "c" * 40, **odd},
            {"id": "ok/many-tags", "sha": "d" * 40, "tags": ["x" * 1000] * 10_000}, {"id": "sur\ud800", "sha": "e" * 40},
            *rows,
        ]  # fmt: skip

    with faulty(write_listing([entry(number) for number in range(5)])) as (endpoint, hub):
        hub.spoil("/api/models", faults.rows(spoil))
        (page,) = crawl(ALL, endpoint)
    assert [row.repo for row in page.rows][:2] == ["ok/odd", "ok/many-tags"]
    assert len(page.rows) == 7
    odd = page.rows[0]
    assert (odd.library, odd.downloads, odd.likes, odd.tags, odd.last_modified) == (
        None,
        None,
        None,
        [],
        None,
    )
    assert (odd.parameters, odd.files, odd.gated, odd.pipeline_tag) == (None, [], True, "lone ? surrogate")
    assert sum(map(len, page.rows[1].tags)) <= 100_000
    assert len(page.failures) == 9
    assert {failure.reason for failure in page.failures} == {FailureReason.MALFORMED_ROW}
    assert {failure.stage for failure in page.failures} == {"crawl"}
    assert to_table(page.rows, CATALOGUE).num_rows == 7
    assert to_table(page.failures, FAILURES).num_rows == 9


TEXT = st.sampled_from(
    ["", "x", "0", "1", "license:mit", "base_model:a/b", "2025-01-01T00:00:00Z", "\ud800", "9" * 400]
)
LEAF = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT
JSON = LEAF | st.lists(LEAF, max_size=3) | st.dictionaries(TEXT, LEAF, max_size=3)
KEYS = (
    "library_name", "pipeline_tag", "config", "safetensors", "siblings", "cardData", "tags", "downloads", "likes",
    "lastModified", "createdAt", "gated", "disabled",
)  # fmt: skip
INNER = (
    "architectures",
    "model_type",
    "id2label",
    "label_names",
    "total",
    "parameters",
    "license",
    "base_model",
    "base_model_relation",
    "peft",
    "base_model_name_or_path",
    "_name_or_path",
)


def has_sizes(item: dict[str, Any]) -> bool:
    """Whether the listing tells sizes of files, which the Hub does not and brief rows leave out."""
    files = item.get("siblings")
    return isinstance(files, list) and any(isinstance(file, dict) and "size" in file for file in files)


@given(
    st.dictionaries(st.sampled_from(KEYS), JSON | st.dictionaries(st.sampled_from(INNER), JSON, max_size=4))
)
def test_any_row_with_an_id_and_a_commit_fits_the_schema(fields: dict[str, Any]) -> None:
    item = {**fields, "id": "a/b", "sha": "f" * 40}
    row = read_row(item)
    assert from_table(to_table([row], CATALOGUE), CatalogueRow)[0].repo == "a/b"
    for filters in (
        ALL,
        ListingFilters(max_bytes=1, max_params=1),
        ListingFilters((), None, licences=("x",)),
    ):
        brief = read_brief_row(item, looked_at(filters))
        unsized = replace(row, weight_bytes=brief.weight_bytes) if has_sizes(item) else row
        assert filters.accepts(brief) == filters.accepts(unsized)
        assert (brief.gated, brief.disabled, brief.last_modified) == (
            row.gated,
            row.disabled,
            row.last_modified,
        )


@given(JSON)
def test_anything_else_is_a_malformed_row(item: Any) -> None:
    with pytest.raises(ItemFailure) as caught:
        read_row(item)
    assert caught.value.reason is FailureReason.MALFORMED_ROW


def test_rows_without_a_commit_are_looked_up(tmp_path: Path, write_repository: Write) -> None:
    write_repository("ada/vit")

    def without(rows: list[Any]) -> list[Any]:
        return [{key: value for key, value in row.items() if key != "sha"} for row in rows]

    with faulty(tmp_path / "hub") as (endpoint, hub):
        hub.spoil("/api/models?", faults.rows(without))
        (page,) = crawl(ALL, endpoint)
        assert [len(row.sha) for row in page.rows] == [40]
        hub.spoil("/api/models/ada", faults.rows(lambda row: {"id": row["id"]}))
        (page,) = crawl(ALL, endpoint)
        assert (page.rows, [failure.reason for failure in page.failures]) == ([], ["malformed-row"])


def test_next_addresses_stay_on_the_endpoint(write_listing: Listing) -> None:
    with faulty(write_listing([entry(number) for number in range(20)])) as (endpoint, hub):
        hub.spoil(
            "/api/models",
            faults.header("link", lambda value: value.replace(endpoint, "https://huggingface.co") or None),
        )
        assert len(set(repos(crawl(ALL, endpoint, page_size=6)))) == 20
        hub.rules.clear()
        hub.spoil("/api/models", faults.header("link", lambda _: f'<{endpoint}/logout>; rel="next"'))
        with pytest.raises(HubError, match="outside its API"):
            crawl(ALL, endpoint, page_size=6)


def test_a_circle_of_pages_ends(write_listing: Listing) -> None:
    with faulty(write_listing([entry(number) for number in range(20)])) as (endpoint, hub):
        hub.spoil(
            "/api/models", faults.header("link", lambda _: f'<{endpoint}/api/models?cursor=x>; rel="next"')
        )
        hub.spoil(
            "cursor=x", faults.answer(200, {"link": f'<{endpoint}/api/models?cursor=x>; rel="next"'}, b"[]")
        )
        hub.rules.reverse()
        with pytest.raises(HubError, match="lists in a circle"):
            crawl(ALL, endpoint, page_size=6)


@pytest.mark.parametrize(
    "fault",
    [
        faults.answer(500),
        faults.answer(503, {"retry-after": "0"}),
        faults.answer(429, {"retry-after": "0"}),
        faults.answer(429, {"ratelimit": '"api";r=0;t=0'}),
        faults.cut(50),
        faults.body(lambda data: data[: len(data) // 2]),
    ],
)
def test_passing_faults_are_waited_out(write_listing: Listing, fault: faults.Fault) -> None:
    with faulty(write_listing([entry(number) for number in range(20)])) as (endpoint, hub):
        undisturbed = repos(crawl(ALL, endpoint, page_size=6))
        hub.spoil("cursor=", fault, times=2, skip=1)
        assert repos(crawl(ALL, endpoint, page_size=6)) == undisturbed
        assert len(hub.requests) == 4 + 6


def test_a_page_that_hardly_comes_is_asked_for_again(write_listing: Listing) -> None:
    with faulty(write_listing([entry(number) for number in range(20)])) as (endpoint, hub):
        undisturbed = repos(crawl(ALL, endpoint, page_size=6))
        hub.spoil("cursor=", faults.slow(30.0, 200), times=2, skip=1)
        hurried = replace(FAST, read_timeout=0.5)
        assert repos(crawl(ALL, endpoint, page_size=6, retry=hurried)) == undisturbed
        assert len(hub.requests) >= 4 + 6


def test_a_lasting_fault_ends_with_what_to_do(write_listing: Listing) -> None:
    with faulty(write_listing([entry(number) for number in range(20)])) as (endpoint, hub):
        hub.spoil("cursor=", faults.answer(504))
        pages = iter_pages(ALL, endpoint=endpoint, retry=FAST, page_size=6)
        assert len(next(pages).rows) == 6  # kept
        with pytest.raises(HubUnavailableError, match=r"answered 504 \(3 tries.*HF_ENDPOINT"):
            next(pages)


def test_too_many_requests_bar_everybody_for_as_long_as_the_hub_says(write_listing: Listing) -> None:
    slept: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    limiter = SlidingWindowLimit({}, clock=lambda: now[0], sleep=sleep)
    patient = Retry(attempts=1, longest_penalty=300)
    with faulty(write_listing([entry(1)])) as (endpoint, hub):
        hub.spoil("/api/models", faults.answer(429, {"ratelimit": '"api";r=0;t=55'}), times=1)
        hub.spoil(
            "/api/models", faults.answer(429, {"retry-after": "7", "ratelimit": '"api";r=0;t=55'}), times=1
        )
        assert len(repos(crawl(ALL, endpoint, retry=patient, limiter=limiter))) == 1
    assert slept == [56.0, 7.0]


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_token_is_named(write_listing: Listing, status: int) -> None:
    with faulty(write_listing([entry(1)])) as (endpoint, hub):
        hub.spoil(
            "/api/models",
            faults.answer(status, {"x-error-message": "Invalid credentials in Authorization header"}),
        )
        with pytest.raises(HubError, match="HF_TOKEN"):
            crawl(ALL, endpoint)
        assert len(hub.requests) == 1


def test_a_server_that_is_no_hub_is_named(write_listing: Listing) -> None:
    with faulty(write_listing([entry(1)])) as (endpoint, hub):
        hub.spoil("/api/models", faults.answer(404), times=1)
        hub.spoil("/api/models", faults.answer(200, body=b'{"hello": 1}'))
        for _ in range(2):
            with pytest.raises(HubError, match="does not answer as a Hub does"):
                crawl(ALL, endpoint)
        hub.rules[:] = [faults.Rule("/api", faults.answer(307, {"location": "http://127.0.0.2/api/models"}))]
        with pytest.raises(HubError, match="set HF_ENDPOINT to it"):
            crawl(ALL, endpoint)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(HubUnavailableError, match=r"refuses connections.*HF_ENDPOINT"):
        crawl(ALL, f"http://127.0.0.1:{port}")
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        crawl(ALL, "file:///etc")


def test_filters_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="limit"):
        ListingFilters(limit=-1)
    with pytest.raises(UsageError, match="time zone"):
        ListingFilters(since=dt.datetime(2025, 1, 1))
    with pytest.raises(UsageError, match=r"'\.\./x'"):
        ListingFilters(repos=("a/b", "../x"))


def test_fetch_files(tmp_path: Path, write_repository: Write) -> None:
    write_repository(
        "ada/vit", files={f"extra-{n:04d}.txt": b"x" for n in range(1005)} | {"sub/deep.bin": b"y"}
    )
    with running(tmp_path / "hub") as endpoint:
        sha = crawl(ALL, endpoint)[0].rows[0].sha
        files = {file.path: file for file in fetch_files("ada/vit", sha, endpoint=endpoint)}
        assert len(files) == 1007  # two pages; nothing below the root
        assert files["config.json"].size == (tmp_path / "hub/ada/vit/config.json").stat().st_size
        assert (files["config.json"].sha256, len(files["model.safetensors"].sha256 or "")) == (None, 64)
        with pytest.raises(ItemFailure) as caught:
            fetch_files("ada/vit", "0" * 40, endpoint=endpoint)
        assert caught.value.reason is FailureReason.NOT_FOUND


def test_numbers_and_bytes_that_break_parsers() -> None:
    assert parse_json(b'[1e999, NaN, 1, "\\ud800", "\xff", ' + b"9" * 5000 + b"]")[1:3] == [None, 1]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@given(st.integers(1, 20), st.lists(st.floats(0, 100), max_size=80))
def test_no_window_sees_more_than_the_limit(limit: int, pauses: list[float]) -> None:
    clock = Clock()
    bucket = SlidingWindowLimit({"api": limit}, window=60, clock=clock, sleep=clock.sleep)
    sent = []
    for pause in pauses:
        clock.now += pause
        bucket.acquire("api")
        sent.append(clock.now)
        bucket.acquire("file")
    assert all(later - earlier >= 60 - 1e-6 for earlier, later in zip(sent, sent[limit:], strict=False))


def test_a_bucket_is_shared_by_threads() -> None:
    bucket = SlidingWindowLimit({"api": 50}, window=0.5)
    taken: list[float] = []

    def take() -> None:
        for _ in range(20):
            bucket.acquire("api")
            taken.append(bucket._clock())

    threads = [threading.Thread(target=take) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken.sort()
    assert len(taken) == 100
    assert taken[50] - taken[0] >= 0.45
    assert SlidingWindowLimit.for_endpoint("http://127.0.0.1:1", with_token=False).try_acquire("api") == 0.0


def test_when_a_repository_was_made_and_what_from() -> None:
    row = read_row(
        {
            "id": "ada/vit",
            "sha": "f" * 40,
            "createdAt": "2024-05-06T07:08:09.000Z",
            "cardData": {"base_model": ["google/vit", "bea/resnet"], "base_model_relation": "merge"},
            "tags": [
                "base_model:google/vit",
                "base_model:merge:google/vit",
                "base_model:odd:bea/x",
                "base_model:",
            ],
            "config": {"peft": {"base_model_name_or_path": "cleo/base"}, "_name_or_path": "dora/older"},
        }
    )
    assert row.created_at == dt.datetime(2024, 5, 6, 7, 8, 9, tzinfo=dt.UTC)
    assert row.base_model == "google/vit"
    assert row.parents == [
        Parent("google/vit", "merge", "card"),
        Parent("bea/resnet", "merge", "card"),
        Parent("google/vit", "merge", "tag"),
        Parent("cleo/base", "adapter", "adapter"),
        Parent("dora/older", "unknown", "config"),
    ]
    assert from_table(to_table([row], CATALOGUE), CatalogueRow) == [row]


ODD_PARENTS: list[tuple[dict[str, Any], list[Parent]]] = [
    ({"cardData": {"base_model": "ada/vit"}}, []),  # itself
    (
        {"cardData": {"base_model": "a/b", "base_model_relation": ["merge"]}},
        [Parent("a/b", "unknown", "card")],
    ),
    (
        {"cardData": {"base_model": "a/b", "base_model_relation": "cousin"}},
        [Parent("a/b", "unknown", "card")],
    ),
    ({"cardData": {"base_model": {"a": 1}}}, []),
    (
        {"cardData": {"base_model": [None, 3, ["a/b"], "../../etc", "/home/me/vit", "a/b\ud800", "x" * 500]}},
        [],
    ),
    ({"config": {"peft": "a/b", "_name_or_path": "./checkpoint-100"}}, []),
    ({"config": {"peft": {"base_model_name_or_path": 7}, "_name_or_path": ["a/b"]}}, []),
]


@pytest.mark.parametrize(("facts", "parents"), ODD_PARENTS)
def test_odd_parents_are_passed_over(facts: dict[str, Any], parents: list[Parent]) -> None:
    row = read_row({"id": "ada/vit", "sha": "f" * 40, "createdAt": 3, **facts})
    assert (row.parents, row.created_at) == (parents, None)


def test_parents_without_end_are_cut() -> None:
    many = [f"a/model-{number}" for number in range(10_000)]
    row = read_row({"id": "ada/vit", "sha": "f" * 40, "cardData": {"base_model": many}})
    assert [parent.repo for parent in row.parents] == many[:20]


def test_a_hub_serves_the_time_of_creation_and_the_parents(write_listing: Listing) -> None:
    facts = {"createdAt": "2024-01-02T03:04:05Z", "base_model": ["a/b"], "base_model_relation": "finetune"}
    with running(write_listing([{**entry(0), **facts}])) as endpoint:
        (row,) = [row for page in crawl(ALL, endpoint) for row in page.rows]
    assert row.created_at == dt.datetime(2024, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
    assert row.parents == [Parent("a/b", "finetune", "card"), Parent("a/b", "finetune", "tag")]


def test_every_entry_of_an_explicit_list_fails_alone(tmp_path: Path, write_repository: Write) -> None:
    """A renamed model behind a mirror that sends its API elsewhere; a page that the Hub cannot make."""
    names = ("ada/first", "ada/renamed", "ada/broken", "ada/last")
    for name in names:
        write_repository(name)
    with faulty(tmp_path / "hub") as (endpoint, hub):
        moved = {"location": "http://localhost:1/api/models/ada/new"}
        hub.spoil("/api/models/ada/renamed", faults.answer(307, moved))
        hub.spoil("/api/models/ada/broken", faults.answer(500))
        (page,) = crawl(ListingFilters(repos=names), endpoint)
        assert [row.repo for row in page.rows] == ["ada/first", "ada/last"]
        assert {(failure.repo, failure.reason) for failure in page.failures} == {
            ("ada/renamed", "download-failed"), ("ada/broken", "download-failed"),
        }  # fmt: skip
        assert all(failure.retryable for failure in page.failures)
        assert any("redirects its API to http://localhost:1" in failure.detail for failure in page.failures)
        hub.rules.clear()
        hub.spoil("/api/models/", faults.answer(500))
        with pytest.raises(HubUnavailableError):
            crawl(ListingFilters(repos=names), endpoint)


def test_a_hub_that_answers_now_and_then_is_no_silent_one(tmp_path: Path, write_repository: Write) -> None:
    """Three entries in a row that it does not answer end a crawl; three in all do not."""
    names = ("ada/one", "bad/one", "ada/two", "bad/two", "bad/three", "ada/three", "bad/four", "none/here")
    for name in names[:-1]:
        write_repository(name)
    with faulty(tmp_path / "hub") as (endpoint, hub):
        hub.spoil("/api/models/bad/", faults.answer(500))
        (page,) = crawl(ListingFilters(repos=names), endpoint)
        assert [row.repo for row in page.rows] == ["ada/one", "ada/two", "ada/three"]
        assert len(page.failures) == 5
        with pytest.raises(HubUnavailableError):
            crawl(ListingFilters(repos=(*names[:5], "bad/four", "ada/three")), endpoint)


def test_a_renamed_model_of_an_explicit_list_keeps_the_name_that_was_asked_for(
    write_listing: Listing,
) -> None:
    hub = write_listing([{**entry(0), "id": "ada/new", "formerly": ["ada/old"]}])
    with running(hub) as endpoint:
        assert repos(crawl(ListingFilters(repos=("ada/old",)), endpoint)) == ["ada/old"]


def test_a_page_that_makes_no_sense_is_a_failure_of_an_explicit_list(
    tmp_path: Path, write_repository: Write
) -> None:
    for name in ("ada/good", "ada/odd"):
        write_repository(name)
    with faulty(tmp_path / "hub") as (endpoint, hub):
        hub.spoil("/api/models/ada/odd", faults.rows(lambda page: page | {"sha": "none"}))
        (page,) = crawl(ListingFilters(repos=("ada/good", "ada/odd", "ada/missing")), endpoint)
    assert [row.repo for row in page.rows] == ["ada/good"]
    assert {(failure.repo, failure.reason) for failure in page.failures} == {
        ("ada/odd", "malformed-row"), ("ada/missing", "not-found"),
    }  # fmt: skip

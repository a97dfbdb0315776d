"""The public Hub's answers, as the crawler and as `huggingface_hub` itself read them: both must see the same.

Where the answers come from: docs/hub-answers.md.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from probelog.errors import FailureReason, ItemFailure
from probelog.hub.client import HubClient, HubError, HubUnavailableError, Retry
from probelog.hub.download import Downloaded, download_model
from probelog.hub.listing import EXPAND, ListingFilters, fetch_files, iter_pages
from probelog.hub.rate_limit import Kind
from probelog.storage.schemas import CatalogueRow, Failure, RepoFile
from tests.support.hub import faults
from tests.support.hub.public_hub import (
    BAD_TOKEN,
    DISABLED,
    MEMBER,
    OUTSIDER,
    HostedRepository,
    PublicHub,
    public_hub,
    repositories,
    written,
)

FAST = Retry(attempts=3, first_wait=0.01, longest_wait=0.02, longest_penalty=5.0, read_timeout=5.0)
ALL = ListingFilters(libraries=(), pipeline_tag=None)
LISTED = [
    "lab/vit-tiny",
    "lab/sharded",
    "timm-lab/resnet18.a1_in1k",
    "lab/gated-auto",
    "lab/gated-manual",
    "lab/taken-down",
    "lab/vit-renamed",
    "lab/empty-card",
]
OPEN = ["lab/vit-tiny", "lab/sharded", "timm-lab/resnet18.a1_in1k", "lab/vit-renamed", "lab/empty-card"]
GATED = ["lab/gated-auto", "lab/gated-manual"]
LOCATIONS: list[Any] = ["storage", "storage without scheme", "mirror", "mirror without host"]


@pytest.fixture(scope="module")
def served() -> Iterator[PublicHub]:
    with public_hub() as hub:
        yield hub


@pytest.fixture
def public(served: PublicHub, monkeypatch: pytest.MonkeyPatch) -> PublicHub:
    """The two hosts, with nothing asked of them yet. The library downloads over HTTP, as the crawler does."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    served.location = "storage"
    for host in (served.hub, served.storage):
        host.rules.clear()
        host.requests.clear()
    return served


def use_token(monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    """The token of the environment, which the library sends as well."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", token is None)
    monkeypatch.setenv("HF_TOKEN", token or "")


class Recording:
    """A limiter that lets everybody through and keeps what it was told."""

    def __init__(self) -> None:
        self.penalties: list[tuple[Kind, float]] = []

    def acquire(self, kind: Kind) -> None:
        pass

    def penalise(self, kind: Kind, seconds: float) -> None:
        self.penalties.append((kind, seconds))


def crawl(public: PublicHub, filters: ListingFilters = ALL) -> tuple[list[CatalogueRow], list[Failure]]:
    pages = list(iter_pages(filters, endpoint=public.endpoint, retry=FAST, page_size=3))
    rows = [row for page in pages for row in page.rows]
    return rows, [failure for page in pages for failure in page.failures]


def described(public: PublicHub, *names: str) -> list[CatalogueRow]:
    """Rows from the models' own pages, with sizes and digests."""
    rows, failures = crawl(public, replace(ALL, repos=names))
    assert failures == []
    return rows


def download(public: PublicHub, row: CatalogueRow, folder: Path) -> Downloaded:
    with HubClient(public.endpoint, retry=FAST) as client:
        return download_model(client, row, folder / row.repo)


def facts(row: CatalogueRow) -> dict[str, Any]:
    """What the library says as well."""
    return {
        "id": row.repo,
        "sha": row.sha,
        "library": row.library,
        "task": row.pipeline_tag,
        "tags": row.tags,
        "downloads": row.downloads,
        "likes": row.likes,
        "modified": row.last_modified,
        "created": row.created_at,
        "gated": row.gated,
        "disabled": row.disabled,
        "parameters": row.parameters,
        "licence": row.licence,
        "files": sorted((file.path, file.size, file.sha256) for file in row.files),
    }


def facts_of_library(info: huggingface_hub.ModelInfo) -> dict[str, Any]:
    return {
        "id": info.id,
        "sha": info.sha,
        "library": info.library_name,
        "task": info.pipeline_tag,
        "tags": info.tags or [],
        "downloads": info.downloads,
        "likes": info.likes,
        "modified": info.last_modified,
        "created": info.created_at,
        "gated": info.gated in ("auto", "manual"),
        "disabled": info.disabled,
        "parameters": info.safetensors.total if info.safetensors else None,
        "licence": info.card_data.license if info.card_data else None,
        "files": sorted(
            (file.rfilename, file.size, file.lfs.sha256 if file.lfs else None) for file in info.siblings or []
        ),
    }


# What there is


def test_a_listing_over_several_pages(public: PublicHub) -> None:
    rows, failures = crawl(public)
    assert failures == []
    assert [row.repo for row in rows] == LISTED
    asked = public.hub.asked("/api/models?")
    assert len(asked) == 3
    assert "cursor=" in asked[1].address
    theirs = HfApi(public.endpoint, token=False).list_models(sort="last_modified", expand=list(EXPAND))
    assert [facts(row) for row in rows] == [facts_of_library(info) for info in theirs]


def test_filters_find_what_the_library_finds_with_them(public: PublicHub) -> None:
    filters = ListingFilters(libraries=("timm",), author="timm-lab")
    rows, _ = crawl(public, filters)
    api = HfApi(public.endpoint, token=False)
    theirs = api.list_models(filter="timm", author="timm-lab", pipeline_tag="image-classification")
    assert [row.repo for row in rows] == [info.id for info in theirs] == ["timm-lab/resnet18.a1_in1k"]


def test_pages_of_models_with_sizes_and_digests(public: PublicHub, monkeypatch: pytest.MonkeyPatch) -> None:
    use_token(monkeypatch, MEMBER)
    names = [name for name in LISTED if name != "lab/taken-down"] + ["lab/vit-private"]
    rows = described(public, *names)
    api = HfApi(public.endpoint)
    assert [facts(row) for row in rows] == [
        facts_of_library(api.model_info(name, files_metadata=True)) for name in names
    ]
    large = {file.path: file for file in rows[0].files}["model.safetensors"]
    hosted = public.find("lab/vit-tiny").files["model.safetensors"]
    assert (large.size, large.sha256) == (len(hosted.content), hosted.sha256)
    assert hosted.sha256 != hosted.xet_hash


@pytest.mark.parametrize("name", OPEN)
def test_trees(public: PublicHub, name: str) -> None:
    sha = public.find(name).sha
    files = fetch_files(name, sha, endpoint=public.endpoint, retry=FAST)
    assert len(public.hub.asked("/tree/")) > 1, "the tree has several pages"
    tree = HfApi(public.endpoint, token=False).list_repo_tree(name, revision=sha)
    theirs = [
        RepoFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None)
        for entry in tree
        if isinstance(entry, huggingface_hub.hf_api.RepoFile)
    ]
    assert files == theirs
    at_root = [file for file in described(public, name)[0].files if "/" not in file.path]
    assert sorted(files, key=lambda file: file.path) == sorted(at_root, key=lambda file: file.path)


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("name", [*OPEN, *GATED, "lab/vit-private"])
def test_files(
    public: PublicHub, name: str, location: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes, size, digest and commit, whether the row tells them or only the answers' headers do."""
    use_token(monkeypatch, MEMBER)
    public.location = location
    (row,) = described(public, name)
    public.hub.requests.clear()
    done = download(public, row, tmp_path / "listed")
    assert written(public, name, done.folder)
    assert not public.hub.asked("/api/models/")
    unlisted = replace(row, files=[RepoFile(file.path) for file in row.files])
    assert download(public, unlisted, tmp_path / "unlisted").bytes == done.bytes
    asked_of_storage = bool(public.storage.requests)
    assert asked_of_storage == (location.startswith("storage"))
    listed = {file.path: file for file in row.files}
    for path in done.files:
        url = hf_hub_url(name, path, revision=row.sha, endpoint=public.endpoint)
        metadata = get_hf_file_metadata(url, endpoint=public.endpoint, token=True)
        hosted = public.find(name).files[path]
        assert metadata.commit_hash == row.sha
        assert metadata.size == listed[path].size
        assert metadata.etag == (listed[path].sha256 or hosted.oid)
        if location == "storage without scheme":
            continue  # the library does not complete such an address
        theirs = hf_hub_download(
            name, path, revision=row.sha, endpoint=public.endpoint, local_dir=tmp_path / "theirs", token=True
        )
        assert Path(theirs).read_bytes() == (done.folder / path).read_bytes()


def test_a_transfer_that_breaks_off_goes_on_at_the_storage(public: PublicHub, tmp_path: Path) -> None:
    """A new address is signed for the rest; the storage's ETag, which is no digest of the file, is its condition."""
    (row,) = described(public, "lab/vit-tiny")
    public.storage.spoil("/xet-bridge-us/", faults.cut(5000), times=1)
    done = download(public, row, tmp_path)
    assert written(public, row.repo, done.folder)
    first, second = public.storage.requests
    hosted = public.find(row.repo).files["model.safetensors"]
    assert "range" not in first.headers
    assert second.headers["range"].startswith("bytes=")
    assert second.headers["if-range"] == f'"{hosted.xet_hash}"'
    assert len(public.hub.asked("/resolve/")) == len(done.files) + 1


# The token


@pytest.mark.parametrize("location", LOCATIONS)
def test_the_token_stays_with_the_hub(
    public: PublicHub,
    location: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use_token(monkeypatch, MEMBER)
    public.location = location
    with caplog.at_level(logging.DEBUG, "probelog"):
        rows, _ = crawl(public)
        for row in rows:
            if not row.disabled:
                download(public, row, tmp_path)
    assert public.hub.requests
    api = [request for request in public.hub.requests if "/xet-bridge-us/" not in request.address]
    assert {request.headers.get("authorization") for request in api} == {f"Bearer {MEMBER}"}
    assert all("authorization" not in request.headers for request in public.storage.requests)
    assert all("cookie" not in request.headers for request in public.storage.requests)
    assert MEMBER not in caplog.text
    assert "X-Amz-Signature" not in caplog.text


def test_without_a_token_none_is_sent(public: PublicHub, tmp_path: Path) -> None:
    for row in described(public, *OPEN):
        download(public, row, tmp_path)
    assert all("authorization" not in request.headers for request in public.hub.requests)


def test_a_mirror_that_sends_files_to_another_hub(
    public: PublicHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers count as the Hub's, refusals included; the mirror's token does not go there."""
    use_token(monkeypatch, MEMBER)
    elsewhere = public.endpoint.replace("127.0.0.1", "localhost")
    vit, gated = described(public, "lab/vit-tiny", "lab/gated-auto")
    address = f"{elsewhere}/{vit.repo}/resolve/{vit.sha}/config.json"
    public.hub.spoil("/config.json", faults.answer(308, {"location": address}), times=1)
    public.hub.requests.clear()
    assert written(public, vit.repo, download(public, vit, tmp_path).folder)
    sent = [request.headers.get("authorization") for request in public.hub.asked("/config.json")]
    assert sent == [f"Bearer {MEMBER}", None, None], "the mirror, the other Hub and its cache"
    address = f"{elsewhere}/{gated.repo}/resolve/{gated.sha}/config.json"
    public.hub.spoil("/config.json", faults.answer(308, {"location": address}), times=1)
    public.hub.requests.clear()
    assert file_failure(public, gated, tmp_path).reason is FailureReason.GATED
    assert len(public.hub.requests) == 2


# Names that changed


@pytest.mark.parametrize("name", ["old-lab/vit", "vit-without-owner"])
def test_a_renamed_repository_answers_to_its_old_name(
    public: PublicHub, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API and the files redirect, by addresses without a host; the row keeps the name that was asked for."""
    use_token(monkeypatch, MEMBER)
    row, now = described(public, name, "lab/vit-renamed")
    assert facts(row) == facts(now) | {"id": name}
    info = HfApi(public.endpoint).model_info(name, files_metadata=True)
    assert facts_of_library(info) == facts(now)
    assert fetch_files(name, row.sha, endpoint=public.endpoint) == [
        file for file in row.files if "/" not in file.path
    ]
    done = download(public, row, tmp_path / "ours")
    assert written(public, "lab/vit-renamed", done.folder)
    theirs = hf_hub_download(
        name, "model.safetensors", endpoint=public.endpoint, local_dir=tmp_path / "theirs", token=True
    )
    assert Path(theirs).read_bytes() == (done.folder / "model.safetensors").read_bytes()
    assert all(request.headers.get("authorization") == f"Bearer {MEMBER}" for request in public.hub.requests)


# Refusals


def file_failure(public: PublicHub, row: CatalogueRow, folder: Path) -> ItemFailure:
    with pytest.raises(ItemFailure) as caught:
        download(public, row, folder)
    return caught.value


@pytest.mark.parametrize(
    ("name", "token", "raised", "reason"),
    [
        # 401 without a code: the library takes that for a missing repository on https addresses only.
        ("lab/nowhere", None, HfHubHTTPError, FailureReason.NOT_FOUND),
        ("lab/nowhere", MEMBER, RepositoryNotFoundError, FailureReason.NOT_FOUND),
        ("lab/vit-private", None, HfHubHTTPError, FailureReason.NOT_FOUND),
        ("lab/vit-private", OUTSIDER, RepositoryNotFoundError, FailureReason.NOT_FOUND),
        ("lab/taken-down", None, DisabledRepoError, FailureReason.DISABLED),
        ("lab/taken-down", MEMBER, DisabledRepoError, FailureReason.DISABLED),
    ],
)
def test_refused_pages_and_files(
    public: PublicHub,
    name: str,
    token: str | None,
    raised: type[Exception],
    reason: FailureReason,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_token(monkeypatch, token)
    with pytest.raises(raised):
        HfApi(public.endpoint).model_info(name, files_metadata=True)
    rows, (failure,) = crawl(public, replace(ALL, repos=(name,)))
    assert (rows, failure.reason) == ([], reason)
    row = CatalogueRow(name, "0" * 40, files=[RepoFile("config.json"), RepoFile("model.safetensors")])
    refused = file_failure(public, row, tmp_path)
    assert (refused.reason, refused.reason.retryable) == (reason, False)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("token", [None, OUTSIDER])
def test_gated_files(
    public: PublicHub, name: str, token: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page of a gated model is public; its files answer 401 without a token and 403 to one without access."""
    use_token(monkeypatch, token)
    (row,) = described(public, name)
    assert row.gated
    assert HfApi(public.endpoint).model_info(name).gated == name.removeprefix("lab/gated-")
    url = hf_hub_url(name, "config.json", endpoint=public.endpoint)
    with pytest.raises(GatedRepoError) as caught:
        get_hf_file_metadata(url, endpoint=public.endpoint, token=token is not None)
    assert caught.value.response.status_code == (401 if token is None else 403)
    failure = file_failure(public, replace(row, gated=False), tmp_path)
    assert (failure.reason, failure.reason.retryable) == (FailureReason.GATED, False)
    before = len(public.hub.requests)
    if token is None:  # the listing says it already
        assert file_failure(public, row, tmp_path).reason is FailureReason.GATED
        assert len(public.hub.requests) == before


@pytest.mark.parametrize(
    ("revision", "path", "raised"),
    [
        (None, "config.json", RevisionNotFoundError),
        ("main", "absent.json", RemoteEntryNotFoundError),
    ],
)
def test_a_commit_or_a_file_that_is_gone(
    public: PublicHub, revision: str | None, path: str, raised: type[Exception], tmp_path: Path
) -> None:
    (row,) = described(public, "lab/vit-tiny")
    sha = row.sha if revision else "1" * 40
    with pytest.raises(raised):
        get_hf_file_metadata(hf_hub_url(row.repo, path, revision=sha, endpoint=public.endpoint))
    if revision is None:
        failure = file_failure(public, replace(row, sha=sha), tmp_path)
        with pytest.raises(ItemFailure, match="RevisionNotFound"):
            fetch_files(row.repo, sha, endpoint=public.endpoint)
    else:
        del public.find(row.repo).files["preprocessor_config.json"]
        try:
            failure = file_failure(public, row, tmp_path)
        finally:
            public.repositories = repositories()
    assert (failure.reason, failure.reason.retryable) == (FailureReason.NOT_FOUND, False)


def test_a_wrong_token_ends_the_crawl_and_excludes_no_model(
    public: PublicHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = described(public, "lab/vit-tiny")
    use_token(monkeypatch, "hf_revoked")
    with pytest.raises(HfHubHTTPError, match=BAD_TOKEN):
        list(HfApi(public.endpoint).list_models())
    for filters in (ALL, replace(ALL, repos=("lab/vit-tiny",))):
        with pytest.raises(HubError, match="HF_TOKEN"):
            crawl(public, filters)
    failure = file_failure(public, row, tmp_path)
    assert (failure.reason, failure.reason.retryable) == (FailureReason.DOWNLOAD_FAILED, True)


@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (410, {}, FailureReason.NOT_FOUND),
        (451, {}, FailureReason.DISABLED),
        (403, {"x-error-message": DISABLED}, FailureReason.DISABLED),
        (403, {}, FailureReason.DOWNLOAD_FAILED),
        (400, {"x-error-message": "Bad request"}, FailureReason.DOWNLOAD_FAILED),
    ],
)
def test_rarer_refusals_of_the_hub(
    public: PublicHub, status: int, headers: dict[str, str], reason: FailureReason, tmp_path: Path
) -> None:
    (row,) = described(public, "lab/vit-tiny")
    public.hub.spoil("model.safetensors", faults.answer(status, headers))
    assert file_failure(public, row, tmp_path).reason is reason


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_refusal_of_the_storage_says_nothing_about_the_model(
    public: PublicHub, status: int, tmp_path: Path
) -> None:
    """An address that has expired, or a copy that is not there yet: the Hub signs another one, another time."""
    (row,) = described(public, "lab/vit-tiny")
    refused = faults.answer(status, {"content-type": "application/xml"}, b"<Error/>")
    public.storage.spoil("/xet-bridge-us/", refused, times=1)
    assert written(public, row.repo, download(public, row, tmp_path).folder)
    assert len(public.hub.asked("model.safetensors")) == 2
    public.storage.spoil("/xet-bridge-us/", refused)
    failure = file_failure(public, row, tmp_path)
    assert (failure.reason, failure.reason.retryable) == (FailureReason.DOWNLOAD_FAILED, True)
    assert "X-Amz-Signature" not in failure.detail
    assert str(status) in failure.detail


def test_a_listed_row_without_a_commit_that_is_disabled(public: PublicHub) -> None:
    gone = HostedRepository("odd/gone", {}, disabled=True, facts={"sha": None})
    public.repositories = [gone, public.find("lab/vit-tiny")]
    try:
        rows, (failure,) = crawl(public)
    finally:
        public.repositories = repositories()
    assert [row.repo for row in rows] == ["lab/vit-tiny"]
    assert (failure.repo, failure.reason) == ("odd/gone", FailureReason.DISABLED)


# Rates

LIMITED = b"<!DOCTYPE html><h1>429</h1><p>We had to rate limit your IP.</p>"
POLICY = {"ratelimit-policy": '"fixed window";"api";q=500;w=300', "content-type": "text/html; charset=utf-8"}


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ({"ratelimit": '"api";r=0;t=3'}, 3.0, 5.0),
        # The window ends within the second: at once would be too early, and twenty times as early.
        ({"ratelimit": '"api";r=0;t=0'}, 0.5, 2.0),
        ({"ratelimit": '"api";r=0;t=290'}, 5.0, 5.0),
        ({"ratelimit": '"api";r=489;t=189'}, 0.0, 0.02),
        ({"ratelimit": '"api";r=489;t=189', "retry-after": "2"}, 2.0, 2.0),
        ({"retry-after": "2"}, 2.0, 2.0),
        ({}, 0.0, 0.02),
    ],
)
def test_too_many_requests_are_waited_out_as_the_headers_say(
    public: PublicHub, headers: dict[str, str], least: float, most: float
) -> None:
    """The headers come with every answer: they are the reason of a refusal only where nothing remains."""
    limiter = Recording()
    public.hub.spoil("/api/models?", faults.answer(429, POLICY | headers, LIMITED), times=1)
    pages = list(iter_pages(ALL, endpoint=public.endpoint, limiter=limiter, retry=FAST))
    assert [row.repo for page in pages for row in page.rows] == LISTED
    ((kind, seconds),) = limiter.penalties
    assert kind == "api"
    assert least <= seconds <= most


def test_the_limit_on_files_is_another_one(public: PublicHub, tmp_path: Path) -> None:
    (row,) = described(public, "lab/vit-tiny")
    limiter = Recording()
    headers = POLICY | {"ratelimit": '"resolvers";r=0;t=1'}
    public.hub.spoil("/resolve/", faults.answer(429, headers, LIMITED), times=1)
    with HubClient(public.endpoint, limiter=limiter, retry=FAST) as client:
        done = download_model(client, row, tmp_path)
    assert written(public, row.repo, done.folder)
    assert [kind for kind, _ in limiter.penalties] == ["file"]


def test_headers_of_ordinary_answers_delay_nothing(public: PublicHub, tmp_path: Path) -> None:
    limiter = Recording()
    list(iter_pages(ALL, endpoint=public.endpoint, limiter=limiter, retry=FAST))
    assert limiter.penalties == []


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_hub_that_is_down_is_no_verdict_on_a_model(public: PublicHub, status: int, tmp_path: Path) -> None:
    (row,) = described(public, "lab/vit-tiny")
    body = b'{"error":"Internal Error - We\'re working hard to fix this as soon as possible!"}'
    public.hub.spoil("/", faults.answer(status, {"content-type": "application/json"}, body))
    with pytest.raises(HubUnavailableError):
        crawl(public)
    failure = file_failure(public, row, tmp_path)
    assert (failure.reason, failure.reason.retryable) == (FailureReason.DOWNLOAD_FAILED, True)


# Cards

JANUARY = dt.datetime(2024, 1, 2, tzinfo=dt.UTC)
# Facts of a listing row, what is read of them, and whether the library reads the row at all.
ODD: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "none": ({"cardData": None, "tags": None, "config": None}, {"licence": None, "tags": []}, True),
    "a list": ({"cardData": ["license: mit"]}, {"licence": None}, True),
    "a text": ({"cardData": "license: mit"}, {"licence": None}, True),
    "licences": ({"cardData": {"license": ["mit", "apache-2.0"]}}, {"licences": ["mit", "apache-2.0"]}, True),
    "no licence": ({"cardData": {"license": None}}, {"licence": None}, True),
    "a licence that is a number": ({"cardData": {"license": 2.0}}, {"licence": None}, True),
    "licence in the tags": (
        {"cardData": {"license": []}, "tags": ["license:openrail"]},
        {"licence": "openrail"},
        True,
    ),
    "another licence": (
        {"cardData": {"license": "other", "license_name": "lab-1.0", "license_link": "LICENSE"}},
        {"licence": "other"},
        True,
    ),
    "one parent": ({"cardData": {"base_model": "a/b"}}, {"base_model": "a/b"}, True),
    "parents": (
        {"cardData": {"base_model": ["a/b", "c/d"], "base_model_relation": "merge"}},
        {"base_model": "a/b"},
        True,
    ),
    "no parents": ({"cardData": {"base_model": []}}, {"base_model": None, "parents": []}, True),
    "parents by key": (
        {"cardData": {"base_model": {"name": "a/b"}}},
        {"base_model": None, "parents": []},
        True,
    ),
    "nested parents": (
        {"cardData": {"base_model": [["a/b"], 7, None]}},
        {"base_model": None, "parents": []},
        True,
    ),
    "a parent in the tags": (
        {"tags": ["base_model:a/b", "base_model:finetune:a/b"]},
        {"base_model": "a/b"},
        True,
    ),
    "data sets": ({"cardData": {"datasets": "imagenet-1k"}}, {}, True),
    "data sets by key": ({"cardData": {"datasets": [{"name": "imagenet-1k"}], "metrics": "acc"}}, {}, True),
    "results": (
        {
            "cardData": {
                "model-index": [{"name": "m", "results": [{"task": {"type": "x"}, "metrics": [{}]}]}]
            }
        },
        {},
        True,
    ),
    "results that are a text": ({"cardData": {"model-index": "none", "license": "mit"}}, {"licence": "mit"}, True),
    "library by the card": ({"cardData": {"library_name": "timm"}}, {"library": "timm"}, True),
    "a date": ({"cardData": {"date": "2024-01-02T00:00:00.000Z", "license": "mit"}}, {"licence": "mit"}, True),
    "dates without a time": (
        {"createdAt": "2024-01-02T00:00:00.000Z", "lastModified": "2024-01-02T00:00:00Z"},
        {"created_at": JANUARY, "last_modified": JANUARY},
        True,
    ),
    "counts as texts": (
        {"downloads": "12", "likes": "3"},
        {"downloads": None, "likes": None},
        True,
    ),
    "counts with a fraction": ({"downloads": 12.5, "likes": -1}, {"downloads": None, "likes": None}, True),
    "tags of every type": ({"tags": ["timm", 7, None, ["x"], {"y": 1}]}, {"tags": ["timm"]}, True),
    "a task that is a list": ({"pipeline_tag": ["image-classification"]}, {"pipeline_tag": None}, True),
    "a configuration that is a list": ({"config": [1]}, {"model_type": None, "architecture": None}, True),
    "architectures as a text": (
        {"config": {"architectures": "ViT", "model_type": 5}},
        {"model_type": None, "architecture": "ViT"},
        True,
    ),
    "types of tensors": (
        {"safetensors": {"parameters": {"F32": 10, "F8_E4M3": 5}, "total": 15, "sharded": True}},
        {"parameters": 15, "weight_bytes": 45},
        True,
    ),
    "no total of parameters": (
        {"safetensors": {"parameters": {"BF16": 10}}},
        {"parameters": 10, "weight_bytes": 20},
        False,
    ),
    "no types of parameters": ({"safetensors": {"total": 10}}, {"parameters": 10, "weight_bytes": None}, False),
    "a word of Python in the card": ({"cardData": {"self": 1, "license": "mit"}}, {"licence": "mit"}, False),
    "a time that is none": ({"lastModified": "yesterday"}, {"last_modified": None}, False),
    "files without a name": ({"siblings": [{"size": 5}]}, {"files": []}, False),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore:Invalid model-index")
def test_cards_and_fields_of_every_shape(public: PublicHub, name: str) -> None:
    """One odd row is read as far as it makes sense, whatever the library makes of it, and hides no other."""
    odd_facts, expected, readable = ODD[name]
    odd = HostedRepository("odd/model", {}, facts=odd_facts)
    public.repositories = [public.find("lab/vit-tiny"), odd, public.find("lab/sharded")]
    try:
        rows, failures = crawl(public)
        assert failures == []
        assert [row.repo for row in rows] == ["lab/vit-tiny", "odd/model", "lab/sharded"]
        assert {key: getattr(rows[1], key) for key in expected} == expected
        api = HfApi(public.endpoint, token=False)
        if readable:
            assert len(list(api.list_models(expand=list(EXPAND)))) == 3
        else:
            with pytest.raises((KeyError, TypeError, ValueError)):
                list(api.list_models(expand=list(EXPAND)))
    finally:
        public.repositories = repositories()

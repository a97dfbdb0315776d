"""Downloading from a real Hub on loopback, whole and spoiled."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.hubserver import serving
from probelog.errors import FailureReason, ItemFailure
from probelog.hub.client import HubClient, Retry
from probelog.hub.download import Downloaded, DownloadLimits, download_model, read_shards
from probelog.hub.listing import ListingFilters, iter_pages
from probelog.hub.rate_limit import Limiter
from probelog.storage.schemas import CatalogueRow, RepoFile
from tests.support.hub import faults
from tests.support.hub.faults import FaultyHub, faulty
from tests.support.hub.repositories import TIMM, Write

FAST = Retry(attempts=3, first_wait=0.01, longest_wait=0.02, longest_penalty=0.2)


class Hub:
    """The Hub over ``tmp_path/hub``, started when first asked, and downloads from it."""

    def __init__(self, tmp_path: Path) -> None:
        self.root, self.target = tmp_path / "hub", tmp_path / "downloaded"
        self._open: Any = None

    def start(self) -> tuple[str, FaultyHub]:
        if self._open is None:
            self._open = faulty(self.root)
            self.endpoint, self.faulty = self._open.__enter__()
        return self.endpoint, self.faulty

    def row(self, repo: str) -> CatalogueRow:
        endpoint, _ = self.start()
        filters = ListingFilters(libraries=(), pipeline_tag=None)
        rows = [
            row for page in iter_pages(filters, endpoint=endpoint) for row in page.rows if row.repo == repo
        ]
        return rows[0]

    def get(
        self, row: CatalogueRow, limiter: Limiter | None = None, retry: Retry = FAST, **options: Any
    ) -> Downloaded:
        with HubClient(self.start()[0], limiter=limiter, retry=retry) as client:
            return download_model(client, row, self.target, **options)

    def failure(self, row: CatalogueRow, **options: Any) -> ItemFailure:
        with pytest.raises(ItemFailure) as caught:
            self.get(row, **options)
        assert not list(self.target.glob(".*")), "a part was left behind"
        return caught.value

    def stop(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(tmp_path)
    yield hub
    hub.stop()


def same(hub: Hub, repo: str, done: Downloaded) -> bool:
    return all(
        (done.folder / name).read_bytes() == (hub.root / repo / name).read_bytes() for name in done.files
    )


def index(*shards: str) -> bytes:
    return json.dumps(
        {"metadata": {}, "weight_map": {f"w{n}": name for n, name in enumerate(shards)}}
    ).encode()


def test_default_limits() -> None:
    assert DownloadLimits() == DownloadLimits(max_bytes=8 * 2**30, max_json_bytes=20 * 2**20)


def test_only_what_is_needed_is_fetched_at_one_request_a_file(hub: Hub, write_repository: Write) -> None:
    write_repository(
        "ada/vit", files={"preprocessor_config.json": b"{}", "README.md": b"# x", "pytorch_model.bin": b"p", "a/model.safetensors": b"s"}
    )  # fmt: skip
    row = hub.row("ada/vit")
    before = len(hub.faulty.requests)
    done = hub.get(row)
    assert done.files == ("config.json", "preprocessor_config.json", "model.safetensors")
    assert sorted(path.name for path in done.folder.iterdir()) == sorted(done.files)
    assert same(hub, "ada/vit", done)
    assert done.bytes == sum((done.folder / name).stat().st_size for name in done.files)
    asked = [request.address for request in hub.faulty.requests[before:]]
    assert len(asked) == 3
    assert all(f"/ada/vit/resolve/{row.sha}/" in address for address in asked)


def test_a_client_keeps_connections_and_no_cookies(hub: Hub, write_repository: Write) -> None:
    write_repository("ada/vit")
    write_repository("ada/other", values=50)
    rows = [hub.row("ada/vit"), hub.row("ada/other")]
    hub.faulty.spoil(
        "/resolve/", lambda reply: replace(reply, headers={**reply.headers, "set-cookie": "who=me; path=/"})
    )
    with HubClient(hub.endpoint, retry=FAST) as client:
        for row in rows:
            done = download_model(client, row, hub.target / row.repo)
            assert same(hub, row.repo, done)
    asked = hub.faulty.asked("/resolve/")
    assert len(asked) == 4
    assert len({request.port for request in asked}) == 1
    assert all("cookie" not in request.headers for request in asked)


def test_files_are_asked_for_where_the_row_names_none(hub: Hub, write_repository: Write) -> None:
    write_repository("plain", TIMM)
    done = hub.get(replace(hub.row("plain"), files=[]))
    assert done.files == ("config.json", "model.safetensors")
    assert len(hub.faulty.asked("/tree/")) == 1


def test_shards(hub: Hub, write_repository: Write) -> None:
    shards = {f"model-0000{n}-of-00002.safetensors": bytes([n]) * 1000 for n in (1, 2)}
    write_repository(
        "ada/big", values=None, files={**shards, "model.safetensors.index.json": index(*shards, *shards)}
    )
    row = hub.row("ada/big")
    done = hub.get(row)
    assert done.files == ("config.json", "model.safetensors.index.json", *shards)
    assert same(hub, "ada/big", done)
    assert hub.failure(row, limits=DownloadLimits(max_bytes=1500)).reason is FailureReason.TOO_LARGE
    assert not (hub.target / "model-00002-of-00002.safetensors.part").exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (index("../../evil.safetensors"), FailureReason.UNSAFE_PATH),
        (index("/etc/passwd"), FailureReason.UNSAFE_PATH),
        (index("sub/model.safetensors"), FailureReason.UNSAFE_PATH),
        (index("..safetensors"), FailureReason.UNSAFE_PATH),
        (index("model.bin"), FailureReason.UNSAFE_PATH),
        (index("a\n.safetensors"), FailureReason.UNSAFE_PATH),
        (index("mod\u00e9l.safetensors"), FailureReason.UNSAFE_PATH),
        (b'{"weight_map": {"a": 1}}', FailureReason.UNSAFE_PATH),
        (b'{"weight_map": {"a": ["x"]}}', FailureReason.CORRUPT_WEIGHTS),
        (b'{"weight_map": {}}', FailureReason.CORRUPT_WEIGHTS),
        (b'{"weight_map": []}', FailureReason.CORRUPT_WEIGHTS),
        (b"[" * 100_000, FailureReason.CORRUPT_WEIGHTS),
        (b"\xff", FailureReason.CORRUPT_WEIGHTS),
        (index(*(f"{n}.safetensors" for n in range(1001))), FailureReason.CORRUPT_WEIGHTS),
    ],
)
def test_an_index_is_hostile(data: bytes, reason: FailureReason) -> None:
    with pytest.raises(ItemFailure) as caught:
        read_shards(data)
    assert caught.value.reason is reason


def test_a_shard_that_is_not_there(hub: Hub, write_repository: Write) -> None:
    write_repository(
        "ada/big", values=None, files={"model.safetensors.index.json": index("other.safetensors")}
    )
    failure = hub.failure(hub.row("ada/big"))
    assert (failure.reason, "other.safetensors" in failure.detail) == (FailureReason.NOT_FOUND, True)


def test_what_cannot_be_used_is_known_without_weights(hub: Hub, write_repository: Write) -> None:
    write_repository("ada/pickle", values=None, files={"pytorch_model.bin": b"pickle"})
    write_repository("ada/checkpoint", values=None, files={"best.ckpt": b"pickle"})
    write_repository("ada/adapter", values=None, files={"adapter_model.safetensors": b"x"})
    write_repository("ada/bare", config={"a": 1}, values=None)
    write_repository("ada/headless/x", config=None)
    pickle = hub.row("ada/pickle")
    before = len(hub.faulty.requests)
    failure = hub.failure(pickle)
    assert (failure.reason, "pytorch_model.bin" in failure.detail) == (FailureReason.UNSAFE_FORMAT, True)
    assert len(hub.faulty.requests) == before
    assert hub.get(pickle, allow_pickle=True).files == ("config.json", "pytorch_model.bin")
    assert hub.failure(hub.row("ada/checkpoint"), allow_pickle=True).reason is FailureReason.UNSAFE_FORMAT
    failure = hub.failure(hub.row("ada/adapter"))
    assert (failure.reason, "adapter_model.safetensors" in failure.detail) == (FailureReason.NOT_FOUND, True)
    assert hub.failure(hub.row("ada/bare")).reason is FailureReason.NOT_FOUND


def test_gated_disabled_and_missing(
    hub: Hub, write_repository: Write, write_listing: Callable[[object], Path]
) -> None:
    for name in ("ada/gated", "ada/disabled", "ada/vit"):
        write_repository(name)
    write_listing([{"id": "ada/gated", "gated": "auto"}, {"id": "ada/disabled", "disabled": True}])
    gated, disabled, vit = (hub.row(f"ada/{name}") for name in ("gated", "disabled", "vit"))
    before = len(hub.faulty.requests)
    assert hub.failure(gated).reason is FailureReason.GATED
    assert hub.failure(disabled).reason is FailureReason.DISABLED
    assert len(hub.faulty.requests) == before
    assert hub.failure(replace(gated, gated=False)).reason is FailureReason.GATED  # says the Hub itself
    assert hub.failure(replace(disabled, disabled=False)).reason is FailureReason.DISABLED
    assert hub.failure(replace(vit, sha="0" * 40)).reason is FailureReason.NOT_FOUND
    assert hub.failure(replace(vit, repo="ada/gone")).reason is FailureReason.NOT_FOUND
    assert hub.failure(replace(vit, repo="../ada")).reason is FailureReason.MALFORMED_ROW
    assert hub.failure(replace(vit, sha="main")).reason is FailureReason.MALFORMED_ROW
    hub.faulty.spoil(
        "/resolve/", faults.answer(401, {"x-error-message": "Invalid credentials in Authorization header"})
    )
    failure = hub.failure(vit)
    assert (failure.reason, "HF_TOKEN" in failure.detail) == (FailureReason.DOWNLOAD_FAILED, True)


def test_sizes_are_checked_before_and_while(hub: Hub, write_repository: Write) -> None:
    write_repository("ada/vit", values=100_000)
    row = hub.row("ada/vit")
    limits = DownloadLimits(max_bytes=200_000)
    before = len(hub.faulty.requests)
    listed = replace(row, files=[RepoFile("config.json", 90), RepoFile("model.safetensors", 400_100)])
    assert hub.failure(listed, limits=limits).reason is FailureReason.TOO_LARGE
    assert len(hub.faulty.requests) == before
    # Not listed but announced.
    failure = hub.failure(row, limits=limits)
    assert (failure.reason, "goes on" in failure.detail) == (FailureReason.TOO_LARGE, False), "before it came"
    # Neither: no Content-Length at all.
    hub.faulty.spoil("model.safetensors", faults.header("content-length", lambda _: None))
    failure = hub.failure(row, limits=limits)
    assert (failure.reason, "goes on" in failure.detail) == (FailureReason.TOO_LARGE, True)
    hub.faulty.rules.clear()
    assert hub.failure(row, limits=DownloadLimits(max_json_bytes=10)).reason is FailureReason.TOO_LARGE
    # A size that is not the listed one.
    other = replace(row, files=[RepoFile("config.json"), RepoFile("model.safetensors", 17)])
    assert hub.failure(other).reason is FailureReason.DOWNLOAD_FAILED


def test_a_cut_transfer_resumes_where_it_was(hub: Hub, write_repository: Write) -> None:
    write_repository("ada/vit", values=100_000)
    row = hub.row("ada/vit")
    hub.faulty.spoil("model.safetensors", faults.cut(100_000), times=2)
    done = hub.get(row)
    assert same(hub, "ada/vit", done)
    ranges = [request.headers.get("range") for request in hub.faulty.asked("model.safetensors")]
    assert ranges[0] is None
    assert ranges[1] is not None
    assert all("if-range" in request.headers for request in hub.faulty.asked("model.safetensors")[1:])


def test_a_check_is_made_with_every_piece_and_can_end_the_download(hub: Hub, write_repository: Write) -> None:
    class Enough(Exception):  # noqa: N818 - no error, a test's way out
        pass

    def check() -> None:
        checks.append(len(checks))
        if len(checks) == most:
            raise Enough

    write_repository("ada/vit", values=100_000)
    checks: list[int] = []
    most = -1
    done = hub.get(hub.row("ada/vit"), check=check)
    assert len(checks) >= len(done.files)
    checks, most = [], 2
    shutil.rmtree(hub.target)
    with pytest.raises(Enough):
        hub.get(hub.row("ada/vit"), check=check)
    assert "model.safetensors" not in {file.name for file in hub.target.iterdir()}
    assert not list(hub.target.glob(".*")), "a part was left behind"


def test_a_server_that_knows_no_ranges_sends_the_file_again(hub: Hub, write_repository: Write) -> None:
    write_repository("ada/vit", values=100_000)
    row = hub.row("ada/vit")
    whole = (hub.root / "ada/vit/model.safetensors").read_bytes()
    hub.faulty.spoil("model.safetensors", faults.cut(100_000), times=1)
    hub.faulty.spoil("model.safetensors", faults.answer(200, {}, whole), times=1)
    assert same(hub, "ada/vit", hub.get(row))
    ranges = [request.headers.get("range") for request in hub.faulty.asked("model.safetensors")]
    assert len(ranges) == 2, "what came before is dropped, not added to"
    assert ranges[1] is not None


@pytest.mark.parametrize(
    "fault",
    [
        faults.answer(500),
        faults.answer(429, {"retry-after": "0"}),
        faults.flipped,
        faults.body(lambda data: data[:-10]),
        faults.body(lambda data: data + b"more"),
        faults.answer(416),
        faults.answer(206, {"content-range": "bytes 7-9/100"}, b"abc"),
        faults.answer(206, {}, b"abc"),
    ],
)
def test_passing_faults_do_no_harm(hub: Hub, write_repository: Write, fault: faults.Fault) -> None:
    write_repository("ada/vit", values=50_000)
    row = hub.row("ada/vit")
    hub.faulty.spoil("model.safetensors", fault, times=1)
    assert same(hub, "ada/vit", hub.get(row))
    assert len(hub.faulty.asked("model.safetensors")) == 2


@pytest.mark.parametrize(
    "fault",
    [
        faults.slow(30.0, 100_000),
        faults.slow(0.05, 10),  # brings something all the time, but hardly anything
    ],
)
def test_what_hardly_comes_is_asked_for_again(hub: Hub, write_repository: Write, fault: faults.Fault) -> None:
    write_repository("ada/vit", values=50_000)
    row = hub.row("ada/vit")
    hub.faulty.spoil("model.safetensors", fault, times=1)
    assert same(hub, "ada/vit", hub.get(row, retry=replace(FAST, read_timeout=0.5)))
    assert len(hub.faulty.asked("model.safetensors")) >= 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (faults.flipped, FailureReason.WRONG_DIGEST),
        (faults.header("x-repo-commit", lambda _: "f" * 40), FailureReason.WRONG_DIGEST),
        (faults.answer(503), FailureReason.DOWNLOAD_FAILED),
        (faults.answer(429, {"retry-after": "0"}), FailureReason.DOWNLOAD_FAILED),
        (faults.answer(418), FailureReason.DOWNLOAD_FAILED),
        (faults.answer(404, {"x-error-code": "EntryNotFound"}), FailureReason.NOT_FOUND),
        (faults.answer(302, {"location": "file:///etc/passwd"}), FailureReason.DOWNLOAD_FAILED),
        (faults.answer(302, {"location": "http://[bad"}), FailureReason.DOWNLOAD_FAILED),
        (faults.answer(302, {"location": "?again"}), FailureReason.DOWNLOAD_FAILED),
    ],
)
def test_lasting_faults(
    hub: Hub, write_repository: Write, fault: faults.Fault, reason: FailureReason
) -> None:
    write_repository("ada/vit", values=1000)
    row = hub.row("ada/vit")
    hub.faulty.spoil("model.safetensors", fault)
    assert hub.failure(row).reason is reason
    assert not (hub.target / "model.safetensors").exists()


def test_short_bodies_for_ever(hub: Hub, write_repository: Write) -> None:
    write_repository("ada/vit", values=1000)
    row = hub.row("ada/vit")
    hub.faulty.spoil("model.safetensors", lambda reply: faults.cut(len(reply.body) - 10)(reply))
    failure = hub.failure(row)
    assert (failure.reason, failure.reason.retryable) == (FailureReason.DOWNLOAD_FAILED, True)


def test_a_body_that_is_too_long_is_fetched_once_more_from_the_beginning(
    hub: Hub, write_repository: Write
) -> None:
    write_repository("ada/vit")
    row = hub.row("ada/vit")
    size = (hub.root / "ada/vit/model.safetensors").stat().st_size
    listed = replace(row, files=[RepoFile("config.json"), RepoFile("model.safetensors", size)])

    def longer(reply: faults.Reply) -> faults.Reply:
        return faults.header("content-length", lambda _: None)(faults.body(lambda data: data + b"x")(reply))

    hub.faulty.spoil("model.safetensors", longer, times=1)
    assert hub.get(listed).bytes == sum(
        (hub.target / name).stat().st_size for name in ("config.json", "model.safetensors")
    )
    assert (hub.target / "model.safetensors").read_bytes() == (
        hub.root / "ada/vit/model.safetensors"
    ).read_bytes()
    assert len(hub.faulty.asked("model.safetensors")) == 2
    assert not any("range" in request.headers for request in hub.faulty.asked("model.safetensors"))


def test_digests_of_the_listing_count(hub: Hub, write_repository: Write) -> None:
    write_repository("ada/vit")
    row = hub.row("ada/vit")
    files = [
        RepoFile(file.path, None, "0" * 64 if file.path == "model.safetensors" else None)
        for file in row.files
    ]
    assert hub.failure(replace(row, files=files)).reason is FailureReason.WRONG_DIGEST


def test_a_redirect_to_another_host_never_sees_the_token(
    hub: Hub, write_repository: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    write_repository("ada/vit")
    weights = (hub.root / "ada/vit/model.safetensors").read_bytes()
    _, origin = hub.start()
    seen: list[dict[str, str]] = []

    async def cdn(scope: Any, receive: Any, send: Any) -> None:
        seen.append({name.decode(): value.decode() for name, value in scope["headers"]})
        headers = [(b"content-length", str(len(weights)).encode()), (b"etag", b'"' + b"1" * 64 + b'"')]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": weights})

    row = hub.row("ada/vit")
    with serving(cdn) as elsewhere:

        def away(reply: faults.Reply) -> faults.Reply:
            linked = {"x-linked-etag": reply.headers["etag"], "x-linked-size": str(len(reply.body))}
            moved = {"location": f"{elsewhere}/blob?signature=1", "content-length": "0"}
            return faults.Reply(302, {**moved, **linked, "x-repo-commit": row.sha}, b"")

        origin.spoil("model.safetensors", away)
        done = hub.get(row)
    assert same(hub, "ada/vit", done)
    assert [request.headers.get("authorization") for request in origin.asked("/resolve/")] == [
        "Bearer hf_secret"
    ] * 2
    assert len(seen) == 1
    assert "authorization" not in seen[0]


def test_a_redirect_without_encryption_is_refused() -> None:
    import httpx

    from probelog.hub.client import HubError

    asked = "https://hub.example/a/b/resolve/x/model.safetensors"
    with HubClient("https://hub.example") as client:
        with pytest.raises(HubError, match="without encryption"):
            client._redirected("file", asked, httpx.URL(asked), "http://cdn.example/blob")
        assert (
            client._redirected("file", asked, httpx.URL(asked), "https://cdn.example/blob").host
            == "cdn.example"
        )


class Counting:
    """A limiter that only counts."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.penalties: list[tuple[str, float]] = []

    def acquire(self, kind: str) -> None:
        self.kinds.append(kind)

    def penalise(self, kind: str, seconds: float) -> None:
        self.penalties.append((kind, seconds))


def test_every_request_asks_the_shared_limiter(hub: Hub, write_repository: Write) -> None:
    write_repository("ada/vit")
    row = replace(hub.row("ada/vit"), files=[])
    limiter = Counting()
    hub.faulty.spoil("config.json", faults.answer(429, {"retry-after": "55"}), times=1)
    hub.get(row, limiter=limiter, retry=replace(FAST, longest_penalty=300))
    assert limiter.kinds == ["api", "file", "file", "file"]
    assert limiter.penalties == [("file", 55.0)]


def test_a_full_disk_is_no_fault_of_the_model(hub: Hub, write_repository: Write) -> None:
    write_repository("ada/vit")
    row = hub.row("ada/vit")
    hub.target.write_text("a file where the folder should be")
    with pytest.raises(ItemFailure) as caught:
        hub.get(row)
    assert caught.value.reason is FailureReason.STORE_FAILED


def test_seconds_are_those_of_the_clock(hub: Hub, write_repository: Write) -> None:
    write_repository("ada/vit")
    row = hub.row("ada/vit")
    hub.faulty.spoil("model.safetensors", faults.slow(0.1, 300))
    started = time.monotonic()
    done = hub.get(row)
    assert 0.1 <= done.seconds <= time.monotonic() - started


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    "headers",
    [{"content-type": "text/html; charset=utf-8"}, {"content-type": "application/octet-stream"}, {}],
)
def test_a_web_page_in_place_of_a_file_is_a_failure_of_the_download(
    hub: Hub, write_repository: Write, name: str, headers: dict[str, str]
) -> None:
    """What a proxy that asks for a log-in says, with status 200."""
    write_repository("ada/vit", values=1000)
    row = hub.row("ada/vit")
    unlisted = replace(row, files=[RepoFile(file.path) for file in row.files])
    page = b"\n<!DOCTYPE html><html><body>Please log in</body></html>"
    for model in (row, unlisted):
        hub.faulty.spoil(name, faults.answer(200, headers, page), times=1)
        assert same(hub, "ada/vit", hub.get(model))
        hub.faulty.spoil(name, faults.answer(200, headers, page))
        failure = hub.failure(model)
        assert (failure.reason, failure.reason.retryable) == (FailureReason.DOWNLOAD_FAILED, True)
        hub.faulty.rules.clear()


def test_a_page_that_is_known_by_its_type_alone(hub: Hub, write_repository: Write) -> None:
    write_repository("ada/vit", values=1000)
    row = hub.row("ada/vit")
    row = replace(row, files=[RepoFile(file.path) for file in row.files])
    page = faults.answer(200, {"content-type": "text/html; charset=utf-8"}, b"Please log in")
    hub.faulty.spoil("config.json", page, times=1)
    assert same(hub, "ada/vit", hub.get(row))


def test_files_in_git_are_checked_by_its_digest(hub: Hub, write_repository: Write) -> None:
    write_repository("ada/vit", values=1000)
    row = hub.row("ada/vit")
    row = replace(row, files=[RepoFile(file.path) for file in row.files])
    other = faults.answer(200, {}, b"")

    def swapped(reply: faults.Reply) -> faults.Reply:
        """Another JSON object of the same length, under the headers of the first."""
        return replace(other(reply), headers=reply.headers, body=b"{" + b" " * (len(reply.body) - 2) + b"}")

    hub.faulty.spoil("config.json", swapped, times=1)
    assert same(hub, "ada/vit", hub.get(row))
    hub.faulty.spoil("config.json", swapped)
    failure = hub.failure(row)
    assert failure.reason is FailureReason.WRONG_DIGEST
    assert "config.json has the git digest" in failure.detail

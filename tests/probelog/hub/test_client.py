"""The client on a server that answers as the test says: what is tried again, for how long, and what never."""

from __future__ import annotations

import datetime as dt
import gzip
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from probelog.errors import UsageError
from probelog.hub.client import (
    MEBIBYTE,
    BrokenAnswerError,
    HubClient,
    HubError,
    HubRefusalError,
    HubResponse,
    HubUnavailableError,
    Retry,
    checked_endpoint,
    parse_json,
)
from probelog.hub.huggingface import is_repo_id
from probelog.hub.network import Clock
from probelog.hub.rate_limit import Kind

FAST = Retry(attempts=3, first_wait=0.01, longest_wait=0.02, throttled=3, longest_penalty=0.05)


@dataclass
class Answer:
    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None


@dataclass
class Server:
    """Answers one after the other, the last one for ever; keeps what was asked."""

    endpoint: str = ""
    answers: list[Answer] = field(default_factory=list)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)


@pytest.fixture(scope="module")
def started() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            answer = state.answers.pop(0) if len(state.answers) > 1 else state.answers[0]
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value.replace("HERE", state.endpoint))
            length = len(answer.body) if answer.length is None else answer.length
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(answer.body)
            self.close_connection = length != len(answer.body)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.handle_error = lambda *_: None  # clients hang up
    state.endpoint = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def server(started: Server) -> Server:
    started.answers, started.asked = [], []
    return started


class Counting:
    """A limiter that lets everybody through and keeps what it heard."""

    def __init__(self) -> None:
        self.acquired: list[Kind] = []
        self.penalties: list[tuple[Kind, float]] = []

    def acquire(self, kind: Kind) -> None:
        self.acquired.append(kind)

    def penalise(self, kind: Kind, seconds: float) -> None:
        self.penalties.append((kind, seconds))


def client(server: Server, limiter: Counting | None = None, retry: Retry = FAST) -> HubClient:
    return HubClient(server.endpoint, limiter=limiter or Counting(), retry=retry)


def ask(server: Server, *answers: Answer, limiter: Counting | None = None, retry: Retry = FAST) -> Any:
    server.answers = list(answers)
    with client(server, limiter, retry) as hub:
        return hub.json("/api/models")


@pytest.mark.parametrize("status", [408, 425, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529])
def test_temporary_refusals_are_retried(server: Server, status: int) -> None:
    limiter = Counting()
    assert ask(server, Answer(status), Answer(body=b"[1]"), limiter=limiter).value == [1]
    assert len(server.asked) == 2
    assert limiter.acquired == ["api", "api"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 451, 501, 505])
def test_a_permanent_refusal_is_not_retried(server: Server, status: int) -> None:
    headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such thing"}
    with pytest.raises(HubRefusalError) as caught:
        ask(server, Answer(status, headers=headers))
    error = caught.value
    assert len(server.asked) == 1
    assert (error.status, error.code, error.message) == (status, "RepoNotFound", "no such thing")
    assert f"/api/models answered {status} (RepoNotFound, no such thing)." in str(error)
    assert ("HF_TOKEN" in str(error)) == (status in (401, 403))


def test_after_so_many_failures_the_hub_is_unavailable(server: Server) -> None:
    with pytest.raises(HubUnavailableError, match=r"/api/models answered 500 \(3 tries\)"):
        ask(server, Answer(500))
    assert len(server.asked) == 3


@pytest.mark.parametrize("attempts", [1, 2])
def test_the_number_of_tries_is_the_operators(server: Server, attempts: int) -> None:
    with pytest.raises(HubUnavailableError):
        ask(server, Answer(500), retry=replace(FAST, attempts=attempts))
    assert len(server.asked) == attempts


def test_a_failure_waits_as_long_as_the_hub_says_up_to_a_limit(server: Server) -> None:
    started = time.monotonic()
    ask(
        server,
        Answer(503, headers={"Retry-After": "999"}),
        Answer(),
        retry=replace(FAST, longest_penalty=0.15),
    )
    assert 0.15 <= time.monotonic() - started < 999


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "3"}, 3.0),
        ({"Retry-After": "2.5"}, 2.5),
        ({"Retry-After": "0"}, 0.0),
        ({"Retry-After": "7777"}, 40.0),
        ({"RateLimit": '"api";r=0;t=17'}, 18.0),
        ({"RateLimit": '"api";r=0; t = 9'}, 10.0),
        ({"Retry-After": "4", "RateLimit": '"api";r=0;t=17'}, 4.0),
        ({"RateLimit": '"api";r=0;t=100'}, 40.0),
    ],
)
def test_too_many_requests_bar_everybody_for_as_long_as_the_hub_says(
    server: Server, headers: dict[str, str], seconds: float
) -> None:
    limiter = Counting()
    retry = replace(FAST, longest_penalty=40.0)
    assert (
        ask(server, Answer(429, headers=headers), Answer(body=b"1"), limiter=limiter, retry=retry).value == 1
    )
    assert limiter.penalties == [("api", seconds)]
    assert limiter.acquired == ["api", "api"]


@pytest.mark.parametrize("said", [None, "soon", "-3", "1e3", "Wed, 21 Oct 2025 07:28:00 GMT"])
def test_where_the_hub_does_not_say_the_bar_is_as_after_a_failure(server: Server, said: str | None) -> None:
    limiter = Counting()
    headers = {} if said is None else {"Retry-After": said}
    ask(server, Answer(429, headers=headers), Answer(429), Answer(), limiter=limiter)
    (_, first), (_, second) = limiter.penalties
    assert 0.005 <= first <= 0.01
    assert 0.01 <= second <= 0.02


def test_too_many_requests_are_no_failures_but_have_an_end(server: Server) -> None:
    limiter = Counting()
    many = [Answer(429, headers={"Retry-After": "0"})] * 3
    ask(server, *many, Answer(500), Answer(500), Answer(), limiter=limiter)
    server.asked.clear()
    with pytest.raises(HubUnavailableError, match="'too many requests' 4 times in a row"):
        ask(server, Answer(429, headers={"Retry-After": "0"}))
    assert len(server.asked) == 4


def test_a_body_that_breaks_off_is_asked_for_again(server: Server) -> None:
    assert ask(server, Answer(body=b"[1", length=50), Answer(body=b"[1]")).value == [1]
    with pytest.raises(HubUnavailableError, match="broken JSON"):
        ask(server, Answer(body=b"[1"))


def test_a_hub_that_is_not_there_is_named() -> None:
    with (
        HubClient("http://127.0.0.1:9", limiter=Counting(), retry=FAST) as hub,
        pytest.raises(HubUnavailableError, match=r"is not there.*HF_ENDPOINT \(http://127.0.0.1:9\)"),
    ):
        hub.json("/api/models")


def test_without_a_word_of_the_hub_a_failure_waits_no_longer_than_the_client_would(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    ask(server, Answer(500), Answer(503), Answer(), retry=replace(FAST, longest_penalty=40.0))
    assert caplog.text.count("next try in 0.0 s") == 2


def test_waits_double_up_to_the_longest_and_vary_by_half() -> None:
    retry = Retry(first_wait=1.0, longest_wait=30.0)
    for failures, longest in ((1, 1), (2, 2), (3, 4), (5, 16), (6, 30), (99, 30)):
        waits = [retry.wait(failures) for _ in range(300)]
        assert longest / 2 <= min(waits) < 0.6 * longest
        assert 0.9 * longest < max(waits) <= longest


def test_default_retry_settings() -> None:
    assert MEBIBYTE == 2**20
    assert Retry() == Retry(6, 1.0, 30.0, 20, 330.0, 10.0, 30.0, 1024.0, 300.0)


def test_headers_are_made_again_for_every_attempt(server: Server) -> None:
    server.answers = [Answer(500), Answer()]
    numbers = iter("12")
    with client(server) as hub:
        hub.call("file", server.endpoint + "/x", lambda _: 0, lambda: {"range": f"bytes={next(numbers)}-"})
    assert [headers["range"] for _, headers in server.asked] == ["bytes=1-", "bytes=2-"]


def test_an_error_of_the_reader_is_its_own_but_a_broken_answer_is_tried_again(server: Server) -> None:
    server.answers = [Answer()]
    outcomes: list[Exception | None] = [BrokenAnswerError("makes no sense"), None]

    def read(_: HubResponse) -> str:
        if (error := outcomes.pop(0)) is not None:
            raise error
        return "read"

    with client(server) as hub:
        assert hub.call("file", server.endpoint + "/x", read) == "read"
        outcomes[:] = [KeyError("mine")]
        with pytest.raises(KeyError, match="mine"):
            hub.call("file", server.endpoint + "/x", read)


def test_a_compressed_answer(server: Server) -> None:
    packed, headers = gzip.compress(b"[1, 2]"), {"Content-Encoding": "gzip"}
    assert ask(server, Answer(body=packed, headers=headers)).value == [1, 2]
    assert "gzip" in server.asked[0][1]["accept-encoding"]
    for broken, message in (
        (packed[:-3], "broke off in the middle of its compressed body"),
        (packed + b"more", "goes on after the end of its compressed body"),
        (b"[1, 2]", "broken gzip"),
    ):
        with pytest.raises(HubUnavailableError, match=message):
            ask(server, Answer(body=broken, headers=headers))
    with pytest.raises(HubUnavailableError, match="in the encoding 'br', which was not asked for"):
        ask(server, Answer(body=packed, headers={"Content-Encoding": "br"}))


# JSON


def test_the_next_page_and_the_time_of_an_answer(server: Server) -> None:
    headers = {"Link": '<https://elsewhere.example/api/models?cursor=7>; rel="next"'}
    found = ask(server, Answer(body=b"[]", headers=headers))
    assert found.next_url == f"{server.endpoint}/api/models?cursor=7"
    assert found.date is not None
    assert abs(found.date - dt.datetime.now(dt.UTC)) < dt.timedelta(seconds=60)
    assert ask(server, Answer(body=b"[]")).next_url is None


@pytest.mark.parametrize(
    "following", ["/other?x=1", "https://elsewhere.example/models", "http://[broken", "/apis/models"]
)
def test_a_next_page_outside_of_the_api_is_refused(server: Server, following: str) -> None:
    with pytest.raises(HubError, match="names a next page"):
        ask(server, Answer(body=b"[]", headers={"Link": f'<{following}>; rel="next"'}))


def test_more_json_than_allowed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probelog.hub.client._MAX_JSON", 100)
    assert ask(server, Answer(body=b'"' + b"x" * 98 + b'"')).value == "x" * 98
    with pytest.raises(HubError, match="more than"):
        ask(server, Answer(body=b'"' + b"x" * 99 + b'"'))


def test_json_of_untrusted_origin() -> None:
    assert parse_json(b'{"a": 1, "b": -999999999999999999}') == {"a": 1, "b": None}
    assert parse_json(b"999999999999999999") == 999999999999999999
    assert parse_json(b"1000000000000000000") is None
    assert parse_json(b"[NaN, Infinity, 1.5]") == [None, None, 1.5]
    assert parse_json(b'"\xff"') == "\ufffd"
    for broken in (b"", b"{", b"[" * 100_000, b"no"):
        with pytest.raises(BrokenAnswerError, match="broken JSON"):
            parse_json(broken)


def test_parameters_are_added_to_those_of_the_address(server: Server) -> None:
    with client(server) as hub:
        assert hub.url("/api/models", {}) == f"{server.endpoint}/api/models"
        assert hub.url("/api/models?a=1", {"b": ["x", "y"]}) == f"{server.endpoint}/api/models?a=1&b=x&b=y"


# Redirects and the token


def test_redirects_are_followed_so_many_times(server: Server) -> None:
    hop = Answer(302, headers={"Location": "HERE/next"})
    server.answers = [*[hop] * 5, Answer(body=b"1")]
    with client(server) as hub:
        assert hub.call("file", server.endpoint + "/x", lambda answer: answer.response.status_code) == 200
        assert len(server.asked) == 6
        server.answers = [*[hop] * 6, Answer(body=b"1")]
        with pytest.raises(HubError, match="redirects more than 5 times"):
            hub.call("file", server.endpoint + "/x", lambda _: 0)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("ftp://elsewhere.example/x", "ftp://elsewhere.example, which is not followed"),
        ("javascript:x", "redirects to what is no address"),
    ],
)
def test_redirects_that_are_not_followed(server: Server, location: str, message: str) -> None:
    server.answers = [Answer(302, headers={"Location": location})]
    with client(server) as hub, pytest.raises(HubError, match=message):
        hub.call("file", server.endpoint + "/x", lambda _: 0)


def test_the_api_is_not_followed_to_another_host(server: Server) -> None:
    with pytest.raises(HubError, match="redirects its API to http://localhost:1"):
        ask(server, Answer(302, headers={"Location": "http://localhost:1/api/models"}))
    assert ask(server, Answer(302, headers={"Location": "HERE/api/other"}), Answer(body=b"2")).value == 2


def test_what_the_first_hop_says_of_a_file_is_kept_and_nothing_else(server: Server) -> None:
    kept = {"X-Linked-Etag": '"e"', "X-Linked-Size": "5", "X-Repo-Commit": "c"}
    hop = Answer(302, headers={"Location": "HERE/next", "ETag": '"hop"', "X-Other": "1", **kept})
    server.answers = [hop, Answer(headers={"ETag": '"end"', "X-Linked-Size": "9"})]
    with client(server) as hub:
        headers = hub.call("file", server.endpoint + "/x", lambda answer: dict(answer.headers))
    assert {name: headers[name] for name in ("x-linked-etag", "x-linked-size", "x-repo-commit")} == {
        "x-linked-etag": '"e"',
        "x-linked-size": "5",
        "x-repo-commit": "c",
    }
    assert headers["etag"] == '"end"'
    assert "x-other" not in headers


@pytest.mark.parametrize("token", [None, "hf_secret"])
def test_the_token_goes_to_the_hub(
    server: Server, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", token is None)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.answers = [Answer()]
    with client(server) as hub:
        hub.json("/api/models")
        assert hub.has_token == (token is not None)
    ((_, headers),) = server.asked
    assert headers.get("authorization") == (None if token is None else "Bearer hf_secret")
    assert headers["user-agent"].startswith("probelog/")


def test_the_token_goes_to_nobody_else(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even to another name of the same machine."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    storage = server.endpoint.replace("127.0.0.1", "localhost")
    server.answers = [Answer(302, headers={"Location": f"{storage}/stored"}), Answer()]
    with client(server) as hub:
        assert hub.call("file", server.endpoint + "/x", lambda answer: answer.storage) == "localhost"
    sent = [(path, headers.get("authorization")) for path, headers in server.asked]
    assert sent == [("/x", "Bearer hf_secret"), ("/stored", None)]


def test_cookies_are_not_kept(server: Server) -> None:
    server.answers = [Answer(headers={"Set-Cookie": "visitor=7; Path=/"})]
    with client(server) as hub:
        for _ in range(2):
            hub.json("/api/models")
    assert not any("cookie" in headers for _, headers in server.asked)


def test_a_wrong_token_is_distinguished_from_a_missing_repository() -> None:
    assert HubRefusalError("a", 401, "", "Invalid credentials in header").bad_token
    assert not HubRefusalError("a", 403, "", "Invalid credentials in header").bad_token
    assert not HubRefusalError("a", 401, "", "Repository not found").bad_token
    again = pickle.loads(pickle.dumps(HubRefusalError("a", 401, "code", "message")))
    assert (again.address, again.status, again.code, again.message) == ("a", 401, "code", "message")
    assert str(HubRefusalError("a", 404, "", "")) == "a answered 404."


def test_messages_of_refusals_have_an_end(server: Server) -> None:
    with pytest.raises(HubRefusalError) as caught:
        ask(server, Answer(404, headers={"X-Error-Code": "c" * 500, "X-Error-Message": "m" * 500}))
    assert (caught.value.code, caught.value.message) == ("c" * 100, "m" * 300)


# Addresses


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("https://hub.example", "https://hub.example"),
        ("https://hub.example/", "https://hub.example"),
        ("http://hub.example:80/path/", "http://hub.example:80/path"),
    ],
)
def test_endpoints(endpoint: str, expected: str) -> None:
    assert checked_endpoint(endpoint) == expected


@pytest.mark.parametrize(
    "endpoint",
    ["", "hub.example", "ftp://hub.example", "https://", "http://hub:0", "http://hub:99999", "http://["],
)
def test_endpoints_that_are_none(endpoint: str) -> None:
    with pytest.raises(UsageError, match="no http"):
        checked_endpoint(endpoint)


def test_a_hub_below_a_path_keeps_it() -> None:
    with HubClient("https://hub.example/mirror", limiter=Counting()) as hub:
        assert hub.reroot("/api/models") == "https://hub.example/mirror/api/models"
        assert hub.reroot("https://other.example/mirror/api/x?y=1") == "https://hub.example/mirror/api/x?y=1"
        assert hub.reroot("https://other.example/api/x") == "https://hub.example/mirror/api/x"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("owner/model", True), ("model", True), ("a/b/c", False), ("a..b", False), ("", False), ("a b", False)],
)
def test_ids_of_repositories(name: str, expected: bool) -> None:
    assert is_repo_id(name) is expected


Read = Callable[[HubResponse], Any]


def test_a_body_that_drips_is_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    from probelog.hub import client as module

    now = [0.0]

    class Dripping:
        headers: ClassVar[dict[str, str]] = {}

        def __init__(self, sizes: list[int]) -> None:
            self.sizes = sizes

        def iter_raw(self) -> Iterator[bytes]:
            for size in self.sizes:
                now[0] += 1.0
                yield b"x" * size

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    retry = replace(FAST, read_timeout=3.0, slowest=10.0)

    def read(*sizes: int) -> list[bytes]:
        answer: Any = Dripping(list(sizes))
        return list(module.chunks(HubResponse("x", answer, {}, Clock(99.0, lambda: None)), retry))

    # Exactly as fast as it must be, in every span of three seconds.
    assert sum(map(len, read(*[10] * 9))) == 90
    assert len(read(*[0, 0, 30] * 3)) == 9
    with pytest.raises(BrokenAnswerError, match="stalled: 29 bytes in 3 s"):
        read(10, 10, 9)
    # What came before does not count for what comes now.
    with pytest.raises(BrokenAnswerError, match="stalled"):
        read(1000, 1000, 1000, 1, 1, 1)


def test_no_redirect_leaves_encryption_behind() -> None:
    import httpx

    with HubClient("https://hub.example") as hub:
        secure = httpx.URL("https://hub.example/a/b/resolve/main/config.json")
        assert hub._redirected("file", "x", secure, "https://storage.example/y").host == "storage.example"
        with pytest.raises(
            HubError, match=r"http://storage.example, without encryption, which is not followed"
        ):
            hub._redirected("file", "x", secure, "http://storage.example/y")


@pytest.mark.parametrize("local", [True, False])
def test_a_proxy_is_asked_for_what_is_not_on_this_machine(
    server: Server, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9" if local else server.endpoint)
    server.answers = [Answer(body=b"[1]")]
    endpoint = server.endpoint if local else "http://hub.example"
    with HubClient(endpoint, limiter=Counting(), retry=FAST) as hub:
        assert hub.json("/api/models").value == [1]
    ((path, _),) = server.asked
    assert path == ("/api/models" if local else "http://hub.example/api/models")


def test_refusals_whose_body_nobody_reads_use_up_no_connections(server: Server) -> None:
    """A client opens a hundred connections at most."""
    server.answers = [Answer(404, body=b"x" * 10)]
    with client(server) as hub:
        for _ in range(110):
            with pytest.raises(HubRefusalError):
                hub.json("/api/models/owner/none")
    assert len(server.asked) == 110


def test_a_client_that_was_left_is_closed(server: Server) -> None:
    with client(server) as hub:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        hub.json("/api/models")

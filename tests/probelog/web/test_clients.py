"""Clients that are slow, many, or hostile: they are ended or wait for their own, and the others are served."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest

import probelog
from probelog.storage.store import Store
from probelog.web.workers import BusyError, Workers
from tests.support.processes.web_server import page
from tests.support.worlds.small_index import Model, build

pytestmark = pytest.mark.xdist_group("web")  # they share an index


@pytest.fixture
def impatient(index: probelog.Index, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A page whose limits of time are tenths of a second."""
    monkeypatch.setattr("probelog.web.server._SECONDS", 0.3)
    monkeypatch.setattr("probelog.web.server._LOOK_SECONDS", 0.05)
    with page(index) as address:
        yield address


def connected(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def ended(connection: socket.socket) -> bytes:
    """What is read until the other side ends the connection."""
    content = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            content += part
    return content


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
        b"POST /api/pictures HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc",
    ],
    ids=["nothing", "half-a-head", "half-a-body"],
)
def test_a_request_that_does_not_arrive_is_ended(impatient: str, sent: bytes) -> None:
    with connected(impatient) as connection:
        connection.sendall(sent)
        ended(connection)
    assert httpx.get(f"{impatient}/healthz").status_code == 200


def test_one_byte_at_a_time_gains_no_time(impatient: str) -> None:
    def trickle(connection: socket.socket) -> None:
        for _ in range(200):
            connection.sendall(b"X")
            threading.Event().wait(0.05)

    with connected(impatient) as connection, pytest.raises((BrokenPipeError, ConnectionResetError)):
        trickle(connection)


def test_an_answer_that_nobody_takes_is_ended(impatient: str) -> None:
    (style,) = re.findall(r'"(/static/\w+/style.css)"', httpx.get(impatient).text)
    count = 1500  # 18 MB, more than the buffers of both sides hold
    with connected(impatient) as connection:

        def ask() -> None:
            with contextlib.suppress(OSError):
                connection.sendall(f"GET {style} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * count)

        asking = threading.Thread(target=ask)
        asking.start()
        threading.Event().wait(1.5)
        content = ended(connection)
        asking.join(20)
    assert 0 < content.count(b"HTTP/1.1 200") < count


def test_idle_connections_make_room_for_others(
    index: probelog.Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("probelog.web.server._MOST_CONNECTIONS", 5)
    with page(index) as address, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connected(address)) for _ in range(12)]
        for connection in idle:
            connection.sendall(b"GET / HTTP/1.1\r\n")
        for _ in range(3):
            assert httpx.get(f"{address}/search?q=dog").status_code == 200
        assert ended(idle[0]) == b""


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /" + b"a" * 20_000,
    ],
    ids=["tls", "no-request", "two-hosts", "long-address"],
)
def test_what_is_no_http_gets_an_answer_with_the_same_headers(address: str, sent: bytes) -> None:
    with connected(address) as connection:
        connection.sendall(sent)
        content = ended(connection)
    assert content.startswith(b"HTTP/1.1 400")
    assert b"content-security-policy: default-src 'none'" in content.lower()
    assert b"nosniff" in content


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::2]", "localhost.evil"])
def test_a_name_that_points_here_from_elsewhere(web: httpx.Client, host: str) -> None:
    answer = web.get("/api/search?q=dog", headers={"Host": host})
    assert answer.status_code == 421
    assert "dog" not in answer.text


def test_names_that_are_allowed(index: probelog.Index) -> None:
    with page(index, ["localhost", "models.example"]) as address, httpx.Client(base_url=address) as client:
        for host in ("models.example", "models.example:8443", "localhost:1"):
            assert client.get("/healthz", headers={"Host": host}).status_code == 200
        assert client.get("/healthz").status_code == 421
    with page(index, None) as address:
        assert httpx.get(f"{address}/healthz", headers={"Host": "anything"}).status_code == 200


def test_no_other_site_may_read_answers(web: httpx.Client) -> None:
    answer = web.get("/api/search?q=dog", headers={"Origin": "https://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_newer_generation_is_picked_up(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path_factory.mktemp("newer") / "index")
    build(store, "first", models=[Model("a/a", ("cat", "dog"))], images=False)
    monkeypatch.setattr("probelog.search.client.POLL_SECONDS", 0.0)
    with page(probelog.open_index(store.uri)) as address, httpx.Client(base_url=address) as client:
        assert client.get("/api/search?q=dog").json()["generation"] == "first"
        assert client.get("/api/facets").json()["models"] == 1
        build(store, "second", models=[Model("a/a", ("cat", "dog")), Model("b/b", ("cat",))], images=False)
        client.get("/api/search?q=dog")
        assert client.get("/api/search?q=dog").json()["generation"] == "second"
        assert client.get("/api/facets").json()["models"] == 2
        assert client.get("/models/b/b").status_code == 200


# Threads that answer


class Bench:
    """Work that ends when it is told to, and the order in which it began."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.end = threading.Event()

    def __call__(self, name: str) -> str:
        self.begun.append(name)
        assert self.end.wait(20)
        return name


def test_clients_take_turns() -> None:
    async def scene() -> list[str]:
        work, workers = Bench(), Workers(threads=1, most_waiting=10, seconds=20)
        asked = [("greedy", f"greedy {i}") for i in range(5)] + [("a", "a"), ("b", "b")]
        tasks = []
        for client, name in asked:
            tasks.append(asyncio.create_task(workers.run(client, lambda name=name: work(name))))
            await asyncio.sleep(0)
        assert (workers.running, workers.waiting) == (1, 6)
        work.end.set()
        assert await asyncio.gather(*tasks) == [name for _, name in asked]
        assert (workers.running, workers.waiting) == (0, 0)
        return work.begun

    assert asyncio.run(scene()) == ["greedy 0", "greedy 1", "a", "b", "greedy 2", "greedy 3", "greedy 4"]


def test_where_too_many_wait_those_go_who_asked_for_most() -> None:
    async def scene() -> tuple[list[object], list[str]]:
        work, workers = Bench(), Workers(threads=1, most_waiting=3, seconds=20)
        tasks = []
        for client in ("greedy", "greedy", "greedy", "greedy", "greedy", "modest"):
            tasks.append(asyncio.create_task(workers.run(client, lambda client=client: work(client))))
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        work.end.set()
        return [type(item) for item in await asyncio.gather(*tasks, return_exceptions=True)], work.begun

    kinds, begun = asyncio.run(scene())
    assert kinds == [str, str, str, BusyError, BusyError, str]
    assert begun == ["greedy", "greedy", "modest", "greedy"]


def test_what_waits_too_long_is_refused_and_takes_no_place() -> None:
    async def scene() -> None:
        work, workers = Bench(), Workers(threads=1, most_waiting=3, seconds=0.05)
        first = asyncio.create_task(workers.run("a", lambda: work("a")))
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await workers.run("b", lambda: work("b"))
        assert workers.waiting == 0
        work.end.set()
        assert await first == "a"
        assert await workers.run("b", lambda: work("b")) == "b"
        with pytest.raises(ZeroDivisionError):
            await workers.run("b", lambda: 1 // 0)
        assert await workers.run("b", lambda: work("c")) == "c"

    asyncio.run(scene())


def test_a_server_that_is_full_says_when_to_come_back(
    index: probelog.Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("probelog.web.app._MOST_WAITING", 0)
    gate, entered = threading.Event(), threading.Event()
    search = index.search

    class Slow:
        def __getattr__(self, name: str) -> object:
            return getattr(index, name)

        def search(self, *texts: object, **options: object) -> object:
            entered.set()
            assert gate.wait(20)
            return search(*texts, **options)  # type: ignore[arg-type]

    with page(Slow(), threads=1) as address, httpx.Client(base_url=address, timeout=30) as client:  # type: ignore[arg-type]
        entered.wait(20)  # the server asks something itself when it starts
        answer = client.get("/search?q=dog")
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "2"
        assert "too many ask at once" in answer.text
        assert client.get("/api/search?q=dog").json()["status"] == 503
        assert client.get("/healthz").status_code == 200  # what is not computed is answered
        gate.set()
        answers = (client.get("/search?q=dog").status_code for _ in range(1000))
        assert next(status for status in answers if status != 503) == 200

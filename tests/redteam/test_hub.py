"""What a Hub, a mirror, or whoever stands between can send, as real bytes from a real server: each costs a row at most.

Servers that trickle would go on for seconds and then end with a sound answer: without its guard a case gets that answer,
and fails.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import socket
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.trees.remote import RemoteWeights
from probelog.errors import FailureReason, ItemFailure, UsageError
from probelog.hub import client as client_module
from probelog.hub import listing, network
from probelog.hub.client import MEBIBYTE, HubClient, HubError, HubUnavailableError, Retry
from probelog.hub.download import Downloaded, download_model, read_shards
from probelog.hub.listing import ListingFilters, iter_pages
from probelog.hub.network import Reach, reach
from probelog.hub.ranges import ByteBudget, RemoteFile
from probelog.models.loading import load_classifier
from probelog.probes.sources import candidates, source_files
from probelog.storage.schemas import CATALOGUE, CatalogueRow, RepoFile, to_table
from probelog.weights.safetensors import read_header
from tests.support.hub import hostile

PATIENT = Retry(attempts=2, first_wait=0.01, longest_wait=0.01, throttled=2, longest_penalty=0.1)
#: For answers that take their time, of which a sound one takes seconds here.
HURRIED = replace(PATIENT, attempts=1, connect_timeout=0.4, read_timeout=0.4, api_timeout=1.0)
SHA = "0123456789abcdef0123456789abcdef01234567"

Pieces = Iterator[bytes | float]
Reply = Callable[[str, dict[str, str]], Pieces | bytes]


def http(status: str, *headers: str | bytes, body: bytes = b"") -> bytes:
    """An answer with a right length, unless a header tells of another framing."""
    lines = [line if isinstance(line, bytes) else line.encode() for line in headers]
    if not any(line.lower().startswith((b"content-length", b"transfer-encoding")) for line in lines):
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([b"HTTP/1.1 " + status.encode(), *lines, b"", body])


class RawServer:
    """Answers with whatever bytes it is told, pausing for the numbers among them; ``asked`` keeps the requests."""

    def __init__(self, reply: Reply | bytes, host: str = "127.0.0.1") -> None:
        self.reply: Reply = reply if callable(reply) else lambda _path, _headers: reply
        self.asked: list[tuple[str, dict[str, str]]] = []
        self._listening = socket.create_server((host, 0))
        self.port = self._listening.getsockname()[1]
        self.endpoint = f"http://{host}:{self.port}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=self._serve, args=(self._listening.accept()[0],), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:  # the client had enough
            connection.settimeout(10)
            stream = connection.makefile("rb")
            while line := stream.readline():
                path = line.split()[1].decode()
                fields = dict(
                    text.decode().strip().lower().split(": ", 1) for text in iter(stream.readline, b"\r\n")
                )
                self.asked.append((path, fields))
                answer = self.reply(path, fields)
                for piece in [answer] if isinstance(answer, bytes) else answer:
                    if isinstance(piece, bytes):
                        connection.sendall(piece)
                    else:
                        time.sleep(piece)

    def close(self) -> None:
        """Take no more connections."""
        self._listening.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., RawServer]]:
    servers: list[RawServer] = []

    def start(reply: Reply | bytes, host: str = "127.0.0.1") -> RawServer:
        servers.append(RawServer(reply, host))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


def api(server: RawServer, retry: Retry = PATIENT) -> Any:
    with HubClient(server.endpoint, retry=retry) as client:
        return client.json("/api/models").value


def file(server: RawServer, retry: Retry = PATIENT, check: Callable[[], None] = lambda: None) -> Any:
    """Any answer to the request for a file, without a look at it."""
    with HubClient(server.endpoint, retry=retry) as client:
        return client.call(
            "file", f"{server.endpoint}/x", lambda answer: answer.response.status_code, check=check
        )


def download(server: RawServer, folder: Path, size: int | None = None, retry: Retry = PATIENT) -> Downloaded:
    """A model whose every file is what the server answers."""
    files = [RepoFile("config.json", size, None), RepoFile("model.safetensors", size, None)]
    with HubClient(server.endpoint, retry=retry) as client:
        return download_model(client, CatalogueRow(repo="ada/vit", sha=SHA, files=files), folder)


def drip(data: bytes, pause: float = 0.04, size: int = 1) -> Pieces:
    """Some bytes at a time, never with a silence that a timeout of single reads would notice."""
    for begin in range(0, len(data), size):
        yield data[begin : begin + size]
        yield pause


def then(*parts: Pieces | bytes) -> Pieces:
    """One after the other."""
    for part in parts:
        yield from [part] if isinstance(part, bytes) else part


# Time


SOUND = http("200 OK", body=b"[]")
DRIPS: dict[str, Callable[[], Pieces]] = {
    "headers-trickle": lambda: drip(http("200 OK", "X-Filler: " + "x" * 100, body=b"[]")),
    "interim-answers-trickle": lambda: then(drip(http("103 Early Hints", "X: y") * 100, size=40), SOUND),
    "status-line-trickles": lambda: drip(b"HTTP/1.1 200 " + b"O" * 100 + b"\r\nContent-Length: 2\r\n\r\n[]"),
    "chunk-extensions-trickle": lambda: then(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;",
        drip(b"x" * 100),
        b"\r\n[]\r\n0\r\n\r\n",
    ),
    "trailers-trickle": lambda: then(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n0\r\n",
        drip(b"X-Filler: " + b"x" * 100),
        b"\r\n\r\n",
    ),
    "body-trickles": lambda: then(
        http("200 OK", "Content-Length: 102").strip() + b"\r\n\r\n", drip(b" " * 100), b"[]"
    ),
    # 50 kB a second, far above what counts as stalled.
    "body-goes-on": lambda: then(
        http("200 OK", "Content-Length: 400002").strip() + b"\r\n\r\n", drip(b" " * 400_000, size=2000), b"[]"
    ),
    "gzip-of-nothing": lambda: then(
        http("200 OK", "Content-Encoding: gzip", "Content-Length: 6034").strip() + b"\r\n\r\n",
        gzip.compress(b"")[:10],
        drip(b"\x00\x00\x00\xff\xff" * 1200, size=50),
        b"\x01\x02\x00\xfd\xff[]" + struct.pack("<II", zlib.crc32(b"[]"), 2) + b"\r\n\r\n",
    ),
}


@pytest.mark.parametrize("attack", DRIPS)
def test_no_answer_takes_longer_than_its_request_has(attack: str, serve: Callable[..., RawServer]) -> None:
    server = serve(lambda _path, _headers: DRIPS[attack]())
    with pytest.raises(HubUnavailableError, match=r"in time|stalled"):
        api(server, HURRIED)
    assert len(server.asked) == HURRIED.attempts


@pytest.mark.parametrize("attack", ["headers-trickle", "interim-answers-trickle", "status-line-trickles"])
def test_nor_do_the_headers_of_a_file(attack: str, serve: Callable[..., RawServer]) -> None:
    with pytest.raises(HubUnavailableError, match="in time"):
        file(serve(lambda _path, _headers: DRIPS[attack]()), HURRIED)


class StopError(Exception):
    """What a check raises."""


@pytest.mark.parametrize("attack", ["headers-trickle", "silence", "silent-body", "unavailable"])
def test_a_check_is_called_while_nothing_comes(attack: str, serve: Callable[..., RawServer]) -> None:
    silence: Pieces = iter([8.0, SOUND])
    replies: dict[str, Callable[[], Pieces | bytes]] = {
        "headers-trickle": DRIPS["headers-trickle"],
        "silence": lambda: silence,
        "silent-body": lambda: iter([SOUND[:-1], 8.0, b"]"]),
        "unavailable": lambda: http("503 Busy", "Retry-After: 8"),
    }
    calls = itertools.count(1)

    def check() -> None:
        if next(calls) > 4:
            raise StopError

    server = serve(lambda _path, _headers: replies[attack]())
    patient = replace(PATIENT, longest_penalty=20.0)
    with HubClient(server.endpoint, retry=patient) as client, pytest.raises(StopError):
        client.call("file", f"{server.endpoint}/x", lambda answer: answer.response.read(), check=check)
    assert len(server.asked) == 1


# Size


def test_interim_answers_without_end_are_cut_off(serve: Callable[..., RawServer]) -> None:
    """A flood of 103s: 100,000 of them before a sound answer."""
    server = serve(b"HTTP/1.1 103 E\r\n\r\n" * 100_000 + SOUND)
    with pytest.raises(HubUnavailableError, match="KiB of headers"):
        api(server)


@pytest.mark.parametrize(
    "headers",
    [[f"X-{number}: y" for number in range(20_000)], ["X: " + "y" * 200_000]],
    ids=["twenty-thousand", "one-of-200-kB"],
)
def test_headers_have_a_size(headers: list[str], serve: Callable[..., RawServer]) -> None:
    with pytest.raises(HubUnavailableError, match="broke off"):
        api(serve(http("200 OK", *headers, body=b"[]")))


def zipped(data: bytes, times: int = 1) -> bytes:
    for _ in range(times):
        data = gzip.compress(data, mtime=0)
    return data


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip, gzip", zipped(b"[" + b" " * (64 << 20) + b"]", 2)),
        ("gzip,gzip,gzip", zipped(b"[]", 3)),
        ("deflate", zlib.compress(b"[]")),
        ("x-gzip", zipped(b"[]")),
        ("identity, gzip", zipped(b"[]")),
        ("br", b"[]"),
        ("zstd", b"[]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_encoding_at_most(encoding: str, body: bytes, serve: Callable[..., RawServer]) -> None:
    """`gzip, gzip` made gigabytes out of five kilobytes."""
    server = serve(http("200 OK", f"Content-Encoding: {encoding}", body=body))
    with pytest.raises(HubUnavailableError, match=r"encoding .*, which was not asked for"):
        api(server)
    assert server.asked[0][1]["accept-encoding"] == "gzip"


def test_two_headers_are_two_encodings(serve: Callable[..., RawServer]) -> None:
    body = zipped(b"[]", 2)
    server = serve(http("200 OK", "Content-Encoding: gzip", "Content-Encoding: gzip", body=body))
    with pytest.raises(HubUnavailableError, match="not asked for"):
        api(server)


def test_gzip_grows_in_bounds(serve: Callable[..., RawServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred mebibytes of blanks in a tenth of one."""
    monkeypatch.setattr(client_module, "_MAX_JSON", 4 * MEBIBYTE)
    megabyte = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    bomb = b"".join(megabyte.compress(bytes(MEBIBYTE)) for _ in range(100)) + megabyte.flush()
    server = serve(http("200 OK", "Content-Encoding: gzip", body=bomb))
    api(serve(SOUND))  # what is imported at the first request counts for nobody
    tracemalloc.start()
    try:
        with pytest.raises(HubError, match="more than 4 MiB of JSON"):
            api(server)
        assert tracemalloc.get_traced_memory()[1] < 24 * MEBIBYTE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (zipped(b"[]") + b"more", "goes on after the end"),
        (zipped(b"[]") + zipped(b"[]"), "goes on after the end"),
        (zipped(b"[1, 2, 3]")[:-9], "broke off in the middle"),
        (b"[]", "broken gzip"),
        (zipped(b"[]")[:-8] + bytes(8), "broken gzip"),
    ],
    ids=["tail", "two-members", "cut", "no-gzip", "wrong-checksum"],
)
def test_gzip_that_is_not_whole(body: bytes, message: str, serve: Callable[..., RawServer]) -> None:
    with pytest.raises(HubUnavailableError, match=message):
        api(serve(http("200 OK", "Content-Encoding: gzip", body=body)))


def test_files_come_as_they_are(serve: Callable[..., RawServer], tmp_path: Path) -> None:
    server = serve(http("200 OK", "Content-Encoding: gzip", body=zipped(b"{}")))
    with pytest.raises(ItemFailure, match=r"download-failed: .*encoding 'gzip'"):
        download(server, tmp_path / "model")
    assert server.asked[0][1]["accept-encoding"] == "identity"


# Framing, ranges, headers that are put into the next request


FRAMING = {
    "length-of-5000-digits": http("200 OK", "Content-Length: " + "9" * 5000, body=b"[]"),
    "negative-length": http("200 OK", "Content-Length: -2", body=b"[]"),
    "two-lengths": http("200 OK", "Content-Length: 2", "Content-Length: 3", body=b"[] "),
    "length-too-long": http("200 OK", "Content-Length: 99", body=b"[]") + b"",
    "two-transfer-encodings": http(
        "200 OK", "Transfer-Encoding: gzip, chunked", body=b"2\r\n[]\r\n0\r\n\r\n"
    ),
    "chunk-of-2-to-120": http("200 OK", "Transfer-Encoding: chunked", body=b"F" * 30 + b"\r\n[]"),
    "negative-chunk": http("200 OK", "Transfer-Encoding: chunked", body=b"-2\r\n[]\r\n0\r\n\r\n"),
    "no-http": b"[]",
    "http-2": b"HTTP/2 200 OK\r\n\r\n[]",
    "switching-protocols": http("101 Switching Protocols", "Upgrade: x"),
    "control-characters": b"HTTP/1.1 200 OK\r\nX: \x00\x1b[31m\r\nContent-Length: 2\r\n\r\n[]",
}


@pytest.mark.parametrize("attack", FRAMING)
def test_framing_that_makes_no_sense(attack: str, serve: Callable[..., RawServer]) -> None:
    with pytest.raises(HubError):
        api(serve(FRAMING[attack]), HURRIED)


def test_an_answer_that_was_not_asked_for_answers_nothing(serve: Callable[..., RawServer]) -> None:
    """A second answer behind the first one waits for the next request on the connection."""
    server = serve(
        lambda path, _: http("200 OK", body=json.dumps(path).encode()) + http("200 OK", body=b'"smuggled"')
    )
    with HubClient(server.endpoint, retry=PATIENT) as client:
        for path in ("/api/a", "/api/b", "/api/c"):
            assert client.json(path).value == path


ETAGS = {
    "not-ascii": b'"\xe9"',
    "split": b'"a" "b"',
    "weak": b'W/"a"',
    "huge": b'"' + b"e" * 5000 + b'"',
    "tab": b'"a\tb"',
}


@pytest.mark.parametrize("attack", ETAGS)
def test_an_etag_is_sent_back_only_where_it_is_one(
    attack: str, serve: Callable[..., RawServer], tmp_path: Path
) -> None:
    def reply(_: str, headers: dict[str, str]) -> Pieces | bytes:
        if "range" in headers:
            return http("206 Partial Content", "Content-Range: bytes 2-3/4", body=b"34")
        return http("200 OK", b"ETag: " + ETAGS[attack], "Content-Length: 4", body=b"12")

    def broken(path: str, headers: dict[str, str]) -> Pieces:
        yield from [reply(path, headers)]
        if "range" not in headers:
            raise OSError("hangs up")

    server = serve(broken)
    assert download(server, tmp_path / "model", size=4).bytes == 8
    resumed = [headers for _, headers in server.asked if "range" in headers]
    assert resumed
    assert all("if-range" not in headers for headers in resumed)


RANGES = {
    "another-range": "bytes 1-3/4", "backwards": "bytes 3-1/4", "of-400-digits": f"bytes 2-3/{'9' * 400}", "another-size": "bytes 2-3/5",
    "of-unknown-size": "bytes 2-3/*", "no-range": "x",
}  # fmt: skip


@pytest.mark.parametrize("attack", RANGES)
def test_a_range_is_the_one_that_was_asked_for(
    attack: str, serve: Callable[..., RawServer], tmp_path: Path
) -> None:
    def reply(_: str, headers: dict[str, str]) -> Pieces:
        if "range" in headers:
            yield http("206 Partial Content", f"Content-Range: {RANGES[attack]}", body=b"xx")
            return
        yield http("200 OK", "Content-Length: 4", body=b"12")
        raise OSError("hangs up")

    with pytest.raises(ItemFailure, match="download-failed"):
        download(serve(reply), tmp_path / "model", size=4)
    assert not list((tmp_path / "model").iterdir())


@pytest.mark.parametrize(
    "said", ["999999999999", "-5", "1e9", "9" * 5000, "nan", "inf"], ids=lambda said: said[:12]
)
def test_a_pause_that_the_hub_asks_for_has_an_end(said: str, serve: Callable[..., RawServer]) -> None:
    with pytest.raises(HubUnavailableError):
        api(serve(http("503 Busy", f"Retry-After: {said}")))
    with pytest.raises(HubUnavailableError, match="too many requests"):
        api(serve(http("429 Slow Down", f"Retry-After: {said}", f'RateLimit: "api";r=0;t={said}')))


FILE = bytes(range(256)) * 4


def partial(headers: dict[str, str], *more: str, data: bytes = FILE) -> bytes:
    """What a Hub answers to the request for a range."""
    first, last = map(int, headers["range"].removeprefix("bytes=").split("-"))
    part = data[first : last + 1]
    content_range = f"Content-Range: bytes {first}-{first + len(part) - 1}/{len(data)}"
    return http("206 Partial Content", content_range, *more, body=part)


def part(server: RawServer, *ranges: tuple[int, int], size: int | None = None) -> list[bytes]:
    """Ranges of one file."""
    with HubClient(server.endpoint, retry=PATIENT) as client:
        remote = RemoteFile(client, "ada/vit", SHA, "model.safetensors", ByteBudget(2000), size)
        return [remote.read(*asked) for asked in ranges]


def test_ranges_of_a_file(serve: Callable[..., RawServer]) -> None:
    server = serve(lambda _, headers: partial(headers))
    assert part(server, (0, 300), (1000, 1100), (7, 8)) == [FILE[:300], FILE[1000:], FILE[7:8]]
    assert [headers["range"] for _, headers in server.asked] == [
        "bytes=0-299",
        "bytes=1000-1023",
        "bytes=7-7",
    ]
    assert part(serve(http("200 OK", body=FILE[:50])), (0, 300)) == [FILE[:50]]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (lambda _: http("200 OK", body=FILE), "whole file in place of a range"),
        (lambda _: http("200 OK", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"), "how large"),
        (lambda _: http("206 P", "Content-Range: bytes 5-14/1024", body=FILE[:10]), "in place of bytes 4-13"),
        (lambda _: http("206 P", "Content-Range: bytes 4-12/1024", body=FILE[:9]), "in place of bytes 4-13"),
        (lambda _: http("206 P", "Content-Range: bytes 4-13/*", body=FILE[:10]), r"10 bytes; 1024 are known"),
        (lambda _: http("206 P", f"Content-Range: bytes 4-13/{'9' * 400}", body=FILE[:10]), "1024 are known"),
        (lambda _: http("206 P", "Content-Range: bytes 4-13/2048", body=FILE[:10]), "2048 bytes; 1024 are known"),
        (lambda _: http("206 P", "Content-Type: multipart/byteranges; boundary=x", body=FILE), "in place of"),
        (lambda _: http("206 P", "Content-Range: bytes 4-13/1024", body=FILE[:5]), "5 bytes of 10"),
        (lambda _: http("206 P", "Content-Range: bytes 4-13/1024", body=FILE[:90]), "more than 10 bytes of 10"),
        (lambda h: partial(h, "Content-Type: text/html"), "web page"),
        (lambda h: partial(h, "Content-Encoding: gzip"), "encoding 'gzip'"),
        (lambda h: partial(h, "X-Linked-Size: 99"), "the Hub's redirect 99"),
        (lambda _: http("416 Range Not Satisfiable", "Content-Range: bytes */1024"), "no bytes from 4 on"),
        (lambda h: partial(h, f"X-Repo-Commit: {'1' * 40}"), "wrong-digest: .* from commit"),
        (lambda _: http("403 No", "X-Error-Code: GatedRepo"), "gated: "),
        (lambda _: http("404 No", "X-Error-Code: EntryNotFound"), "not-found: "),
    ],
)  # fmt: skip
def test_what_is_not_the_range_that_was_asked_for(
    reply: Callable[[dict[str, str]], bytes], message: str, serve: Callable[..., RawServer]
) -> None:
    """The file has 1,024 bytes, as listed."""
    with pytest.raises(ItemFailure, match=message):
        part(serve(lambda _, headers: reply(headers)), (4, 14), size=1024)


def test_a_file_keeps_its_size(serve: Callable[..., RawServer]) -> None:
    replies = iter([FILE, FILE * 2, FILE * 2])
    server = serve(lambda _, headers: partial(headers, data=next(replies)))
    with pytest.raises(ItemFailure, match="announces 2048 bytes; 1024 are known"):
        part(server, (0, 10), (10, 20))


def test_a_file_is_read_within_its_budget(serve: Callable[..., RawServer]) -> None:
    server = serve(lambda _, headers: partial(headers))
    with pytest.raises(ItemFailure, match=r"too-large: .* 1001 bytes, of 2000 are 1000 left"):
        part(server, (0, 1000), (0, 1001))
    assert len(server.asked) == 1


def test_the_hub_is_asked_once_for_the_address_of_a_file(serve: Callable[..., RawServer]) -> None:
    """Until the storage's address expires, which is no failure of the file."""
    signed = itertools.count(1)

    def answer(path: str, headers: dict[str, str]) -> bytes:
        return partial(headers) if path == f"/signed/{expired[0]}" else http("403 Expired")

    expired = [1]
    storage = serve(answer)
    hub = serve(
        lambda _path, _headers: http(
            "302 Found",
            f"Location: {storage.endpoint}/signed/{next(signed)}",
            f"X-Repo-Commit: {SHA}",
            f"X-Linked-Size: {len(FILE)}",
        )
    )
    with HubClient(hub.endpoint, retry=replace(PATIENT, attempts=1)) as client:
        remote = RemoteFile(client, "ada/vit", SHA, "model.safetensors", ByteBudget(2000))
        assert [remote.read(begin, begin + 5) for begin in (0, 10, 20)] == [
            FILE[b : b + 5] for b in (0, 10, 20)
        ]
        assert (len(hub.asked), len(storage.asked)) == (1, 3)
        expired[0] = 2
        assert remote.read(30, 35) == FILE[30:35]
        assert (len(hub.asked), len(storage.asked)) == (2, 5)
        expired[0] = 0
        with pytest.raises(
            ItemFailure, match=r"download-failed: .*redirected to 127\.0\.0\.1, which answered 403"
        ):
            remote.read(40, 45)
    assert not any("authorization" in headers for _, headers in storage.asked)


@pytest.mark.parametrize(
    ("shape", "message"),
    [([1 << 40, 1], "too-large: tensor 'a' has"), ([1 << 16, 1 << 16], "corrupt-weights: .* has 1048")],
    ids=["tensor-that-no-model-has", "length-of-another-file"],
)
def test_weights_without_end(shape: list[int], message: str, serve: Callable[..., RawServer]) -> None:
    """A storage that has every byte that a header names."""
    size = 4 * shape[0] * shape[1]
    described = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    header = len(described).to_bytes(8, "little") + described
    whole = len(header) + size if "too-large" in message else 1048

    def reply(_path: str, headers: dict[str, str]) -> bytes:
        first, last = map(int, headers["range"].removeprefix("bytes=").split("-"))
        body = header[first : last + 1].ljust(min(last + 1, whole) - first, b"\0")
        return http("206 P", f"Content-Range: bytes {first}-{first + len(body) - 1}/{whole}", body=body)

    row = CatalogueRow(repo="ada/vit", sha=SHA, files=[RepoFile("model.safetensors")])
    with HubClient(serve(reply).endpoint, retry=PATIENT) as client, pytest.raises(ItemFailure, match=message):
        RemoteWeights(client, row, 10**6).sample()


# Pages


def pages(rows: Callable[[int], list[Any]], link: Callable[[int], str]) -> Reply:
    """A listing that never ends."""
    numbers = itertools.count(1)

    def reply(_path: str, _headers: dict[str, str]) -> bytes:
        number = next(numbers)
        body = json.dumps(rows(number)).encode()
        return http("200 OK", f'Link: <{link(number)}>; rel="next"', body=body)

    return reply


def model(name: object, **facts: Any) -> dict[str, Any]:
    return {"id": name, "sha": SHA, **facts}


def crawl(server: RawServer, **filters: Any) -> list[listing.Page]:
    everything: dict[str, Any] = {"libraries": (), "pipeline_tag": None}
    return list(iter_pages(ListingFilters(**everything | filters), endpoint=server.endpoint, retry=PATIENT))


@pytest.mark.parametrize(
    "rows",
    [
        lambda _: [],
        lambda _: [model("ada/vit")],
        lambda number: [model(f"ada/m{number % 50}")],
        lambda n: [f"{n}", {"id": "x" * 300 + str(n)}],
    ],
    ids=["empty", "the-same", "fifty-in-turn", "malformed"],
)
def test_pages_with_new_addresses_and_nothing_new_come_to_an_end(
    rows: Callable[[int], list[Any]], serve: Callable[..., RawServer]
) -> None:
    server = serve(pages(rows, lambda number: f"/api/models?cursor={number}"))
    with pytest.raises(HubError, match=r"lists without end: .* without a new model"):
        crawl(server)
    assert len(server.asked) < 300


def test_models_made_up_for_ever_come_to_an_end(
    serve: Callable[..., RawServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert listing._MOST_PAGES * 200 >= 10 * 1_000_000, "a real crawl must not meet it"
    monkeypatch.setattr(listing, "_MOST_PAGES", 30)
    server = serve(
        pages(lambda number: [model(f"ada/m{number}")], lambda number: f"/api/models?cursor={number}")
    )
    with pytest.raises(HubError, match="lists without end: 31 pages"):
        crawl(server)


def test_a_page_has_a_number_of_rows(
    serve: Callable[..., RawServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_MOST_PER_PAGE", 50)
    with pytest.raises(HubError, match="lists 51 models on a page"):
        crawl(serve(http("200 OK", body=json.dumps([{}] * 51).encode())))


@pytest.mark.parametrize(
    "link",
    [
        "/api/models?cursor=" + "c" * 9000,
        "http://[::1",
        "/api/\x7f",
        "http://a:b:c/api/x",
        "//x@y@z:1:2/api/models",
    ],
    ids=["9-kB", "bracket", "control", "ports", "users"],
)
def test_next_pages_that_are_no_addresses(link: str, serve: Callable[..., RawServer]) -> None:
    with pytest.raises(HubError, match="names a next page"):
        api(serve(http("200 OK", f'Link: <{link}>; rel="next"', body=b"[]")))


NAMES = [
    "../../etc/passwd",
    "a/b/c",
    "/",
    "a/..",
    "ada/vit\n",
    "ada/\x00",
    "\ud800/x",
    "ada/\u202e",
    "x" * 100_000,
    "",
    None,
    7,
    ["a"],
    {"a": 1},
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_names_that_no_repository_has_are_rows_of_failures(
    name: object, serve: Callable[..., RawServer]
) -> None:
    (page,) = crawl(serve(http("200 OK", body=json.dumps([model(name), model("ada/vit")]).encode())))
    assert [row.repo for row in page.rows] == ["ada/vit"]
    assert [failure.reason for failure in page.failures] == ["malformed-row"]


HUGE: dict[str, dict[str, Any]] = {
    "parameters": {"safetensors": {"parameters": {"F64": 10**18 - 1, "I64": 10**18 - 1}}},
    "shards": {
        "siblings": [
            {"rfilename": f"model-{n:05}-of-00020.safetensors", "size": 10**18 - 1} for n in range(20)
        ]
    },
    "total": {"safetensors": {"total": 10**400}},
    "size": {"siblings": [{"rfilename": "model.safetensors", "size": 2**63}]},
    "downloads": {"downloads": 2**64, "likes": -1},
    "fraction": {"downloads": 1e400, "likes": 1e18},
}


@pytest.mark.parametrize("facts", HUGE.values(), ids=HUGE)
def test_sizes_beyond_64_bits_are_unknown(facts: dict[str, Any], serve: Callable[..., RawServer]) -> None:
    (page,) = crawl(serve(http("200 OK", body=json.dumps([model("ada/vit", **facts)]).encode())))
    table = to_table(page.rows, CATALOGUE)
    assert table["repo"].to_pylist() == ["ada/vit"]
    assert table["weight_bytes"].to_pylist() == [None]


# Redirects


def public(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    """Let some addresses of this machine pass for public ones."""
    monkeypatch.setattr(
        network, "reach", lambda address: Reach.EVERYWHERE if address in hosts else reach(address)
    )


def resolve(monkeypatch: pytest.MonkeyPatch, name: str, *answers: list[str]) -> list[str]:
    """Let a name resolve to other addresses every time; returns what was asked."""
    asked: list[str] = []
    true = socket.getaddrinfo

    def lookup(host: str, port: int, *arguments: Any, **options: Any) -> Any:
        if host != name:
            return true(host, port, *arguments, **options)
        found = answers[min(len(asked), len(answers) - 1)]
        asked.append(host)
        return [entry for address in found for entry in true(address, port, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return asked


CLOSER = [
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
    "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "0.0.0.0", "[::]",
]  # fmt: skip


@pytest.mark.parametrize("host", CLOSER)
def test_a_public_hub_leads_to_no_service_of_this_machine(
    host: str, serve: Callable[..., RawServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    public(monkeypatch, "127.0.0.2")
    inner = serve(http("200 OK", body=b"secret"))
    hub = serve(http("302 Found", f"Location: http://{host}:{inner.port}/jobs"), "127.0.0.2")
    with pytest.raises(
        HubError, match=r"closer network than the Hub's own, which is not followed|Invalid IPv4 address"
    ):
        file(hub)
    assert inner.asked == []


NEVER = [
    "169.254.169.254", "[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]", "[64:ff9b::a9fe:a9fe]", "[fe80::1]", "[fd00:ec2::254]",
    "100.100.100.200", "168.63.129.16", "2852039166", "224.0.0.1", "255.255.255.255", "0.0.0.0", "[ff02::1]",
]  # fmt: skip


@pytest.mark.parametrize("host", NEVER)
def test_no_hub_leads_to_where_clouds_give_out_credentials(
    host: str, serve: Callable[..., RawServer]
) -> None:
    """Not even one on this machine, from which a test or a mirror may lead anywhere else."""
    with pytest.raises(HubError, match="closer network than the Hub's own"):
        file(serve(http("302 Found", f"Location: http://{host}/latest/meta-data/")))


@pytest.mark.parametrize(
    "host",
    ["10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "198.18.0.1", "[fd00::1]", "[::ffff:10.0.0.1]"],
)
def test_a_public_hub_leads_to_no_private_network(
    host: str, serve: Callable[..., RawServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    public(monkeypatch, "127.0.0.2")
    with pytest.raises(HubError, match="closer network than the Hub's own"):
        file(serve(http("302 Found", f"Location: http://{host}/"), "127.0.0.2"))


def test_a_name_counts_by_where_it_leads(
    serve: Callable[..., RawServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    public(monkeypatch, "127.0.0.2")
    resolve(monkeypatch, "storage.example", ["127.0.0.1"])
    inner = serve(SOUND)
    hub = serve(http("302 Found", f"Location: http://storage.example:{inner.port}/"), "127.0.0.2")
    with pytest.raises(HubError, match=r"storage\.example \(127\.0\.0\.1\)"):
        file(hub)
    assert inner.asked == []


def test_a_name_that_leads_elsewhere_the_next_time_gains_nothing(
    serve: Callable[..., RawServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: the address that was checked is the one connected to."""
    public(monkeypatch, "127.0.0.2", "127.0.0.3")
    asked = resolve(monkeypatch, "storage.example", ["127.0.0.3"], ["127.0.0.1"])
    inner = serve(SOUND)
    hub = serve(http("302 Found", f"Location: http://storage.example:{inner.port}/"), "127.0.0.2")
    with pytest.raises(HubError):
        file(hub, replace(PATIENT, attempts=1))
    assert asked == ["storage.example"]
    with pytest.raises(HubError, match="closer network"):
        file(hub)
    assert inner.asked == []


def test_of_several_addresses_only_proper_ones_are_tried(
    serve: Callable[..., RawServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    public(monkeypatch, "127.0.0.2", "127.0.0.3")
    resolve(monkeypatch, "storage.example", ["169.254.169.254", "127.0.0.1", "127.0.0.3"])
    storage = serve(SOUND, "127.0.0.3")
    hub = serve(http("302 Found", f"Location: http://storage.example:{storage.port}/"), "127.0.0.2")
    assert file(hub) == 200
    assert len(storage.asked) == 1


def test_ones_own_public_address_is_this_machine(
    serve: Callable[..., RawServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that listens everywhere is reached by the address that the machine has on the internet too."""
    public(monkeypatch, "127.0.0.2", "127.0.0.1")
    inner = serve(SOUND)
    hub = serve(http("302 Found", f"Location: http://127.0.0.1:{inner.port}/"), "127.0.0.2")
    with pytest.raises(HubError, match="closer network"):
        file(hub)
    assert inner.asked == []


def test_another_port_of_the_hub_is_not_the_hub(
    serve: Callable[..., RawServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    public(monkeypatch, "127.0.0.2")
    hub = serve(b"", "127.0.0.2")
    resolve(monkeypatch, "hub.example", ["127.0.0.2"], ["127.0.0.1"])
    inner = serve(SOUND)
    hub.reply = lambda _path, _headers: http("302 Found", f"Location: http://hub.example:{inner.port}/")
    hub.endpoint = f"http://hub.example:{hub.port}"
    with pytest.raises(HubError, match="closer network"):
        file(hub)
    assert inner.asked == []


def test_a_hub_of_ones_own_network_leads_within_it(
    serve: Callable[..., RawServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirror: its storage may be private too, but it is not this machine."""
    monkeypatch.setattr(
        network,
        "reach",
        lambda address: Reach.NETWORK if address in ("127.0.0.2", "127.0.0.3") else reach(address),
    )
    storage, inner = serve(SOUND, "127.0.0.3"), serve(SOUND)
    assert file(serve(http("302 Found", f"Location: {storage.endpoint}/"), "127.0.0.2")) == 200
    with pytest.raises(HubError, match="closer network"):
        file(serve(http("302 Found", f"Location: {inner.endpoint}/"), "127.0.0.2"))
    assert inner.asked == []


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "169.254.169.254", "127.1", "localhost", "x.localhost", "[::1]"]
)
def test_a_proxy_is_not_sent_to_addresses_written_out(
    host: str, serve: Callable[..., RawServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a proxy names are the proxy's business; an address that stands there is refused here."""
    proxy = serve(http("302 Found", f"Location: http://{host}:8265/"))
    monkeypatch.setenv("http_proxy", proxy.endpoint)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with (
        HubClient("http://hub.example", retry=PATIENT) as client,
        pytest.raises(HubError, match="closer network"),
    ):
        client.call("file", "http://hub.example/x", lambda _: 0)
    assert [path for path, _ in proxy.asked] == ["http://hub.example/x"]


LOCATIONS = [
    "http://[::1", "http://a:b/", "http://a:99999/", "http://a..b/", "http://xn--0/", "http://xn--a-ecp.ru/", "http://" + "a" * 64 + ".b/",
    "http://" + "a" * 70_000, "http://%00/", "\x01", "///", "http:///x", "http://*/", "file:///etc/passwd", "data:,x", "ftp://127.0.0.1/",
    "unix:///run/x.sock", "javascript:x", "http://user:password@127.0.0.1:1/", "//user@127.0.0.1:1/", "http://127.0.0.1:0/", "/x\x7f",
]  # fmt: skip


@pytest.mark.parametrize("location", LOCATIONS, ids=lambda location: ascii(location)[:40])
def test_redirects_to_what_is_no_address(
    location: str, serve: Callable[..., RawServer], tmp_path: Path
) -> None:
    server = serve(http("302 Found", f"Location: {location}"))
    with pytest.raises(ItemFailure) as caught:
        download(server, tmp_path / "model")
    assert caught.value.reason is FailureReason.DOWNLOAD_FAILED
    assert len(caught.value.detail) < 1000
    for ask in (api, file):
        with pytest.raises(HubError):
            ask(serve(http("302 Found", f"Location: {location}")))


def test_redirects_in_a_circle(serve: Callable[..., RawServer]) -> None:
    with pytest.raises(HubError, match="redirects more than 5 times"):
        file(serve(http("302 Found", "Location: /x")))


def test_the_token_stays_with_the_hub(serve: Callable[..., RawServer]) -> None:
    storage = serve(http("200 OK", "Set-Cookie: a=b; Path=/", body=b"x"))
    hub = serve(http("302 Found", f"Location: {storage.endpoint}/", "Set-Cookie: a=b; Path=/"))
    assert file(hub) == 200
    assert hub.asked[0][1]["authorization"] == "bearer hf_secret"
    assert "authorization" not in storage.asked[0][1]
    assert file(hub) == 200
    assert not any("cookie" in headers for _, headers in [*hub.asked, *storage.asked])


@pytest.mark.parametrize(
    "cookie", ["a=b; expires=Mon, 01-Jan-" + "0" * 9000, "a=b", "a=b; expires=1-1-" + " " * 90_000]
)
def test_cookies_are_not_even_read(
    cookie: str, serve: Callable[..., RawServer], recwarn: pytest.WarningsRecorder
) -> None:
    """The standard library warns, with a traceback, of a year of 9,000 digits."""
    server = serve(http("200 OK", f"Set-Cookie: {cookie}", body=b"[]"))
    with HubClient(server.endpoint, retry=PATIENT) as client:
        assert [client.json("/api/models").value for _ in range(2)] == [[], []]
    assert not any("cookie" in headers for _, headers in server.asked)
    assert not [warning for warning in recwarn if "cookie" in str(warning.message)]


# Files


def test_an_index_of_shards_in_utf_16_is_none() -> None:
    text = json.dumps({"weight_map": {"w": "a.safetensors"}})
    assert read_shards(text.encode()) == ["a.safetensors"]
    for encoding in ("utf-16", "utf-16-le", "utf-32", "utf-8-sig"):
        with pytest.raises(ItemFailure, match="corrupt-weights"):
            read_shards(text.encode(encoding))


HEADERS: dict[str, bytes] = {
    **{
        encoding: json.dumps({"w": hostile.entry([1], 0, 4)}).encode(encoding)
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "utf-8-sig")
    },
    "metadata-list": json.dumps({"__metadata__": [], "w": hostile.entry([1], 0, 4)}).encode(),
    "metadata-number": json.dumps({"__metadata__": {"a": 1}, "w": hostile.entry([1], 0, 4)}).encode(),
    "surrogate-metadata": json.dumps(
        {"__metadata__": {"\ud800": "a"}, "w": hostile.entry([1], 0, 4)}
    ).encode(),
    "surrogate-name": json.dumps({"\ud800": hostile.entry([1], 0, 4)}).encode(),
    "minus-zero": b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}',
    "beyond-64-bits": json.dumps(
        {"w": hostile.entry([1], 0, 4), "v": hostile.entry([0, 2**64], 4, 4)}
    ).encode(),
    "400-digits": json.dumps({"w": hostile.entry([10**400], 0, 4)}).encode(),
}


@pytest.mark.parametrize("attack", HEADERS)
def test_headers_that_two_readers_read_differently(attack: str, tmp_path: Path) -> None:
    import safetensors

    path = tmp_path / "model.safetensors"
    hostile.write_safetensors(path, HEADERS[attack], bytes(4))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(path.read_bytes())
    with pytest.raises(ItemFailure, match="corrupt-weights"):
        read_header(path)


NUMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("preprocessor_config.json", {"image_mean": [10**400, 0.5, 0.5]}),
    "deviation": ("preprocessor_config.json", {"image_std": 10**400}),
    "rescale": ("preprocessor_config.json", {"rescale_factor": 10**400}),
    "size": ("preprocessor_config.json", {"size": 10**400}),
    "resample": ("preprocessor_config.json", {"resample": 10**400}),
    "crop": ("preprocessor_config.json", {"crop_pct": -(10**400)}),
    "harmless-key": ("preprocessor_config.json", {"nobody_reads_this": 10**400}),
    "hidden-size": ("config.json", {"hidden_size": 10**400}),
    "dropout": ("config.json", {"hidden_dropout_prob": 10**400}),
    "labels": ("config.json", {"num_labels": 10**400}),
    "label": ("config.json", {"id2label": {"0": 10**400, "1": "b", "2": "c"}}),
}


@pytest.mark.parametrize("attack", NUMBERS)
def test_numbers_of_400_digits_are_a_corrupt_configuration(attack: str, tmp_path: Path) -> None:
    name, changes = NUMBERS[attack]
    hostile.vit(tmp_path)
    sound = json.loads((tmp_path / name).read_text())
    hostile.write_json(tmp_path, name, sound | changes)
    with pytest.raises(ItemFailure, match=r"corrupt-config: .*64 bits") as caught:
        load_classifier(tmp_path)
    assert len(caught.value.detail) < 500


# Probes


def parquet(path: Path, values: Any, **options: Any) -> None:
    pq.write_table(pa.table({"image": values}), path, compression="zstd", store_schema=False, **options)


def repeated(path: Path) -> None:
    """One picture of 4 MiB, 300,000 times: more than a terabyte."""
    one = pa.array([bytes(4 << 20)], pa.binary())
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(300_000, np.int32)), one)
    parquet(path, column, dictionary_pagesize_limit=1 << 30)


def empty_rows(path: Path) -> None:
    """Two million rows of nothing."""
    parquet(path, pa.nulls(2_000_000, pa.binary()))


def blank(path: Path) -> None:
    """1.2 GB of zeros."""
    parquet(path, pa.array([bytes(60 << 20)] * 20, pa.binary()), use_dictionary=False)


@pytest.mark.parametrize(
    "attack",
    [repeated, empty_rows, pytest.param(blank, marks=pytest.mark.acceptance)],
    ids=lambda attack: attack.__name__,
)
def test_a_table_of_probes_that_is_far_larger_than_its_file(
    attack: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "x.parquet"
    attack(path)
    assert path.stat().st_size < 100_000
    images = candidates(source_files(str(path))[0])
    with pytest.raises(UsageError, match=r"rows and .* bytes out of a file of .* are no images"):
        list(itertools.islice(images, 400))


def test_a_footer_that_says_less_than_there_is(tmp_path: Path) -> None:
    """The bound counts what comes, not what the footer says."""
    path = tmp_path / "x.parquet"
    repeated(path)
    (file,) = source_files(str(path))[0]
    with pytest.raises(UsageError, match="are no images"):
        list(candidates([replace(file, size=10)]))

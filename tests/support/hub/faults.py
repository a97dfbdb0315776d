"""A Hub with faults: wraps the real one and spoils chosen answers on their way out."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.hubserver import create_app, serving

Message = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]


@dataclass
class Reply:
    """A whole answer before it is sent. ``cut`` bytes of the body are not sent although they are announced."""

    status: int
    headers: dict[str, str]
    body: bytes
    cut: int = 0
    pause: float = 0.0
    piece: int = 1 << 20


Fault = Callable[[Reply], Reply]


@dataclass
class Rule:
    """Spoil the next ``times`` answers to addresses that contain ``address``, after letting ``skip`` through."""

    address: str
    fault: Fault
    times: int = 10**9
    skip: int = 0


@dataclass
class Request:
    """``port`` is the asker's: the same for all requests of a connection."""

    method: str
    address: str
    headers: Mapping[str, str]
    port: int


@dataclass
class FaultyHub:
    """ASGI application. ``requests`` keeps what was asked, in order."""

    app: Any
    rules: list[Rule] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def spoil(self, address: str, fault: Fault, times: int = 10**9, skip: int = 0) -> None:
        self.rules.append(Rule(address, fault, times, skip))

    def asked(self, address: str) -> list[Request]:
        return [request for request in self.requests if address in request.address]

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        address = scope["raw_path"].decode() + "?" + scope["query_string"].decode()
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.requests.append(Request(scope["method"], address, headers, scope["client"][1]))
        fault = self._fault(address)
        if fault is None:
            await self.app(scope, receive, send)
            return
        reply = Reply(500, {}, b"")

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                reply.body += message.get("body", b"")

        await self.app(scope, receive, keep)
        await _send(fault(reply), send)

    def _fault(self, address: str) -> Fault | None:
        for rule in self.rules:
            if rule.address in address and rule.times > 0:
                if rule.skip > 0:
                    rule.skip -= 1
                    return None
                rule.times -= 1
                return rule.fault
        return None


async def _send(reply: Reply, send: Send) -> None:
    headers = [(name.encode(), value.encode()) for name, value in reply.headers.items()]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    body = reply.body[: len(reply.body) - reply.cut]
    for begin in range(0, len(body), reply.piece):
        await send(
            {"type": "http.response.body", "body": body[begin : begin + reply.piece], "more_body": True}
        )
        await asyncio.sleep(reply.pause)
    if reply.cut:
        raise ConnectionAbortedError("a fault that was asked for")  # uvicorn drops the connection
    await send({"type": "http.response.body", "body": b""})


@contextlib.contextmanager
def faulty(root: Path) -> Iterator[tuple[str, FaultyHub]]:
    """A Hub over a folder whose answers can be spoiled; yields its address and the wrapper."""
    hub = FaultyHub(create_app(root))
    with serving(hub) as endpoint:
        yield endpoint, hub


def answer(status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Fault:
    """Another answer altogether."""
    return lambda reply: Reply(status, {**(headers or {}), "content-length": str(len(body))}, body)


def cut(count: int) -> Fault:
    """The connection ends ``count`` bytes before the announced end."""

    def fault(reply: Reply) -> Reply:
        reply.cut = min(count, len(reply.body))
        return reply

    return fault


def slow(pause: float, piece: int) -> Fault:
    """The body comes in small pieces with a pause (seconds) after each."""

    def fault(reply: Reply) -> Reply:
        reply.pause, reply.piece = pause, piece
        return reply

    return fault


def flipped(reply: Reply) -> Reply:
    """One byte in the middle is wrong."""
    middle = len(reply.body) // 2
    reply.body = reply.body[:middle] + bytes([reply.body[middle] ^ 0xFF]) + reply.body[middle + 1 :]
    return reply


def body(change: Callable[[bytes], bytes]) -> Fault:
    """Another body of honest length."""

    def fault(reply: Reply) -> Reply:
        reply.body = change(reply.body)
        reply.headers["content-length"] = str(len(reply.body))
        return reply

    return fault


def rows(change: Callable[[Any], Any]) -> Fault:
    """Another JSON value. Lone surrogates and such survive, as they do in the Hub's own escapes."""
    return body(lambda data: json.dumps(change(json.loads(data))).encode())


def header(name: str, change: Callable[[str], str | None]) -> Fault:
    """Another value of one header; None takes it away."""

    def fault(reply: Reply) -> Reply:
        value = change(reply.headers.pop(name, ""))
        if value is not None:
            reply.headers[name] = value
        return reply

    return fault

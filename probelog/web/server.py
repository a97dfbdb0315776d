"""Serves the page by uvicorn. Clients that are slow, or that never finish, take nothing from the others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from probelog.listening import address_of, listening
from probelog.terminal import printable
from probelog.web.app import create_app
from probelog.web.middleware import LOOPBACK, SECURITY_HEADERS

# A request must have arrived, and an answer must have been taken, within so many seconds; connections that wait for
# another request are ended earlier.
_SECONDS = 60.0
_IDLE_SECONDS = 15
_LOOK_SECONDS = 2.0
# Connections that are open. One more ends the one that has waited longest for its client.
_MOST_CONNECTIONS = 1000
_LARGEST_HEAD = 16 << 10


def serve(
    uri: str,
    host: str = "127.0.0.1",
    port: int = 0,
    allowed_hosts: Sequence[str] = (),
    threads: int | None = None,
) -> None:
    """Serve an index until interrupted; prints its address.

    There is no authentication: whoever reaches the address may ask the index.

    Args:
        uri: the index.
        host: where to listen.
        port: likewise; 0 takes a free one.
        allowed_hosts: further names that the server answers by; on loopback others are refused.
        threads: answers that are computed at the same time; None: as many as cores, at most 4 (more answer nobody sooner).

    Raises:
        ProbeLogError: there is no index, or the address is taken.
    """
    from probelog.search.client import open_index

    index = open_index(uri)
    loopback = host in LOOPBACK
    app = create_app(
        index,
        [*LOOPBACK, *allowed_hosts] if loopback or allowed_hosts else None,
        threads or min(4, os.cpu_count() or 1),
    )
    with listening(host, port) as listener:
        address = address_of(host, listener)
        print(f"serving {printable(index.uri)} at {address}/ (Ctrl-C stops)", flush=True)
        if not loopback:
            print("note: whoever reaches this address may ask the index", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(configuration(app)).run(sockets=[listener])


def configuration(app: Callable[..., Any]) -> uvicorn.Config:
    """How uvicorn serves an application."""
    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=_LARGEST_HEAD,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=10,
    )


class BoundedProtocol(H11Protocol):
    """HTTP as uvicorn speaks it, with a limit of time for every step that depends on the client, and of connections.

    Uvicorn itself waits for ever for a request that has begun, and for a client that takes no answer.
    """

    _since = 0.0
    _step: tuple[int, bool, bool] | None = None
    _answered = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, and make room."""
        super().connection_made(transport)
        self._look()
        if len(self.connections) > _MOST_CONNECTIONS:
            others = [
                item for item in self.connections if isinstance(item, BoundedProtocol) and item is not self
            ]
            waiting = [item for item in others if item._waits() and not item.transport.is_closing()]
            if waiting:
                min(waiting, key=lambda item: item._since).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def on_response_complete(self) -> None:
        """Count, so that the time of the next request begins."""
        self._answered += 1
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """The answer to what is no HTTP, with the headers of every other answer."""
        headers = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
        headers += [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        with contextlib.suppress(h11.LocalProtocolError):  # the connection is not in a state to answer
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=msg.encode("ascii")),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _waits(self) -> bool:
        """Whether it is the client's turn: to send a request, the rest of it, or to take an answer."""
        receiving = self.cycle is None or self.cycle.response_complete or self.cycle.more_body
        return receiving or self.transport.get_write_buffer_size() > 0

    def _look(self) -> None:
        now = self.loop.time()
        waits = self._waits()
        step = (self._answered, waits, self.transport.get_write_buffer_size() > 0)
        if step != self._step:
            self._step, self._since = step, now
        if waits and now - self._since > _SECONDS:
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(_LOOK_SECONDS, self._look)

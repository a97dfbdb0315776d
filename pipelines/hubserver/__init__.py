"""A Hub on loopback: a folder of model repositories, served over the Hugging Face Hub's HTTP protocol.

It is what the demo and the tests crawl, and how an operator indexes models that never leave the house:

    probelog-index hub DIR
    export HF_ENDPOINT=http://127.0.0.1:PORT

``DIR/owner/name/...`` (or ``DIR/name/...`` for a name without owner) holds the files of one repository each.
``DIR/hub.json`` may list what a folder cannot know, see `folder.read_listing`; everything else is derived.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipelines.hubserver.protocol import create_app
from probelog.credentials import split_login
from probelog.errors import ProbeLogError
from probelog.hub.client import checked_endpoint
from probelog.listening import address_of, listening

__all__ = ["create_app", "running", "serve"]

log = logging.getLogger(__name__)

_REQUEST_SECONDS = 30.0


def serve(root: Path, host: str = "127.0.0.1", port: int = 0, address: str | None = None) -> None:
    """Serve a folder until interrupted; prints its address and the line that points clients at it.

    Port 0 takes a free one. There is no authentication: whoever reaches the address reads every file of the
    repositories, so think before binding to anything but loopback.

    Args:
        root: the folder.
        host: where to listen.
        port: likewise.
        address: what clients reach it by, where that is another (a proxy, a service's name); None: where it listens.

    Raises:
        UsageError: the folder is missing or empty, ``hub.json`` is malformed, or the address is taken or none.
    """
    import uvicorn

    if address is not None:
        address, _ = split_login(checked_endpoint(address))  # everybody is told it
    app = create_app(root, address, host)
    with listening(host, port) as listener:
        address = address or address_of(host, listener)
        print(f"serving {root} at {address} (Ctrl-C stops)", flush=True)
        print(f"export HF_ENDPOINT={address}", flush=True)
        # Its messages go the way of all others; those on single requests from `info` on.
        config = uvicorn.Config(
            app, log_config=None, log_level=log.getEffectiveLevel(), lifespan="off", http=impatient_protocol()
        )
        server = uvicorn.Server(config)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


@contextlib.contextmanager
def running(root: Path, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """The Hub in a thread of this process for as long as the block lasts; yields its address.

    ``HF_ENDPOINT`` is read when `huggingface_hub` is imported: hand the address on as an ``endpoint`` argument,
    or through the environment of a new process.

    Raises:
        UsageError: as `serve`.
    """
    with serving(create_app(root), host, port) as address:
        yield address


@contextlib.contextmanager
def serving(app: Callable[..., object], host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Any ASGI application in a thread of this process; yields its address."""
    import uvicorn

    # A second at most for what is still being sent: a client that stalls must not keep the block from ending.
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",
        lifespan="off",
        timeout_graceful_shutdown=1,
        http=impatient_protocol(),
    )
    server = uvicorn.Server(config)
    with listening(host, port) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="hub", daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + 30
            while not server.started:
                if not thread.is_alive() or time.monotonic() > deadline:
                    raise ProbeLogError("the Hub's server thread did not start; its log says why")
                time.sleep(0.01)
            yield address_of(host, listener)
        finally:
            server.should_exit = True
            thread.join(timeout=10)
            if thread.is_alive():
                log.warning("the Hub's server thread is still busy; it ends with the process")


def impatient_protocol() -> type[asyncio.Protocol]:
    """HTTP as uvicorn speaks it, but with a time limit for a request's arrival; uvicorn itself waits for ever."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    class Impatient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        _ending: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._wait()

        def _wait(self) -> None:
            waits = not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete)
            if not waits and self._ending is not None:
                self._ending.cancel()
                self._ending = None
            elif waits and self._ending is None:
                self._ending = self.loop.call_later(_REQUEST_SECONDS, self._end_if_it_still_waits)

        def _end_if_it_still_waits(self) -> None:
            self._ending = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

    return Impatient

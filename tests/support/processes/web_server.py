"""The page, served as `probelog web` serves it, in a thread of this process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import uvicorn

from probelog.listening import address_of, listening
from probelog.search.client import Index
from probelog.web.app import create_app
from probelog.web.middleware import LOOPBACK
from probelog.web.server import configuration


@contextlib.contextmanager
def page(index: Index, hosts: Sequence[str] | None = tuple(LOOPBACK), threads: int = 4) -> Iterator[str]:
    """Address of the page, without the slash at its end."""
    config = configuration(create_app(index, hosts, threads))
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    with listening("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield address_of("127.0.0.1", listener)
        finally:
            server.should_exit = True
            thread.join(timeout=10)
            assert not thread.is_alive()

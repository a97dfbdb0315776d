"""Where a server listens, and by which address it is reached."""

from __future__ import annotations

import socket

from probelog.errors import UsageError


def listening(host: str, port: int) -> socket.socket:
    """A TCP socket that listens; port 0 takes a free one.

    Raises:
        UsageError: the address is taken, or none.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=1024)
        # asyncio sets it for sockets that name their protocol, which these do not; else an answer's last part waits 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error}. Choose another --host or --port."
        ) from error


def address_of(host: str, listener: socket.socket) -> str:
    """The address by which this machine reaches a socket that listens: the wildcard is one to listen on only."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - the wildcards
    port = listener.getsockname()[1]
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"

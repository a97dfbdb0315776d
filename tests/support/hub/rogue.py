"""What runs in a process of `tests.probelog.sandbox.fork_server.test_client`: does what it is told, and everything a model must not."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from probelog.sandbox.guards import seccomp
from probelog.sandbox.protocol import Channel


def serve(channel: Channel, confined: dict[str, bool]) -> None:
    """Commands by name, each with its argument."""
    while True:
        message, _ = channel.receive()
        number = message["number"]
        try:
            found = (COMMANDS | {"confined": lambda _: confined})[message["command"]](message.get("with"))
        except (OSError, MemoryError) as error:
            found = type(error).__name__
        answer = found if message["command"] == "answer" else {"found": found}
        channel.send({"number": number, **answer}, [b"beside"])


def allocate(size: int) -> str:
    """Fill so many bytes."""
    return f"{len(bytearray(size))} bytes"


def start_and_hang(path: str) -> None:
    """A process that has a process, and neither ends."""
    pid = os.fork()
    if pid:
        Path(path).write_text(str(pid))
    time.sleep(600)


def send_a_datagram(address: str) -> int:
    """By one of a pair, which is connected with the other."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        return one.sendto(b"x", address)


def warm_up() -> None:
    """Of the server: what every later process has."""
    os.environ["WARM"] = "yes"


def fail_to_warm_up() -> None:
    """As where a library has changed."""
    warm_up()
    raise RuntimeError("no such class")


COMMANDS: dict[str, Any] = {
    "echo": lambda value: value,
    "answer": lambda value: value,
    "environment": lambda _: dict(os.environ),
    "read": lambda path: Path(path).read_text(),
    "write": lambda path: Path(path).write_text("x"),
    "connect": lambda port: str(socket.create_connection(("127.0.0.1", port), 5)),
    "allocate": allocate,
    "set up a device": lambda _: seccomp.without_connections(),
    "make a socket": lambda _: str(socket.socket(socket.AF_UNIX)),
    "send a datagram": send_a_datagram,
    "crash": lambda _: os.kill(os.getpid(), signal.SIGSEGV),
    "leave": lambda status: os._exit(status),
    "hang": lambda _: time.sleep(600),
    "start and hang": start_and_hang,
    "open descriptors": lambda _: [number for number in range(200) if _is_open(number)],
}


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True

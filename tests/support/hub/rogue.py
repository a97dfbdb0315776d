"""What runs in a process of `test_fork_server`: does what it is told, and everything a model must not."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from probelog.sandbox import confinement
from probelog.sandbox.fork_server import answer


def serve(connection: Connection) -> None:
    """Commands by name, each with its argument."""
    while True:
        message = json.loads(connection.recv_bytes())
        try:
            found = COMMANDS[message["command"]](message.get("with"))
        except (OSError, MemoryError) as error:
            found = type(error).__name__
        if found == "no answer":
            connection.send_bytes(b"[1, 2")
        else:
            answer(connection, [b"beside"], found=found)


def allocate(size: int) -> str:
    """Fill so many bytes."""
    return f"{len(bytearray(size))} bytes"


def start_and_hang(_: Any) -> None:
    """A process that has a process, and neither ends."""
    child = subprocess.Popen(["sleep", "600"])
    Path(os.environ["HOME"], "grandchild").write_text(str(child.pid))
    time.sleep(600)


COMMANDS: dict[str, Any] = {
    "echo": lambda value: value,
    "environment": lambda _: dict(os.environ),
    "parent's environment": lambda pid: Path(f"/proc/{pid}/environ").read_text(),
    "read": lambda path: Path(path).read_text(),
    "write": lambda path: Path(path).write_text("x"),
    "connect": lambda port: str(socket.create_connection(("127.0.0.1", port), 5)),
    "shell connects": lambda port: (
        subprocess.run(
            ["bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}"], capture_output=True, check=False
        ).returncode
    ),
    "allocate": allocate,
    "memory": confinement.limit_memory,
    "files": lambda paths: confinement.only_files(*paths),
    "crash": lambda _: os.kill(os.getpid(), signal.SIGSEGV),
    "leave": lambda status: os._exit(status),
    "hang": lambda _: time.sleep(600),
    "start and hang": start_and_hang,
    "nonsense": lambda _: "no answer",
}

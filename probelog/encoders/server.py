"""The process that an index's encoder runs in: it gives up what it does not need, then answers over its channels.

Started by `probelog.encoders.process`, which ends it when an answer takes too long. Before anything of an index is
read, it can open no file and no connection any more (no descriptor beyond its channels), write none, leave no core
dump, and its memory is bounded (`probelog.encoders.limits`; without POSIX none of this holds).
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np

# Libraries are loaded while files can be opened.
import onnxruntime
import tokenizers

from probelog.encoders.channel import ANSWER, CONNECT, DAMAGED, HEADER, KEY_BYTES, MESSAGE_BYTES, OK
from probelog.encoders.towers import THREADS, ImageTower, TextTower, TowerError

try:
    from probelog.encoders import limits
except ImportError:
    limits = None  # type: ignore[assignment]

# Beyond what the libraries take: a graph's weights are held several times while it is opened, and a batch of images
# takes gigabytes in the largest encoders.
_BASE_BYTES = 4 << 30
_GRAPH_COPIES = 6

_LIBRARIES = (onnxruntime, tokenizers)


def main(arguments: Sequence[str]) -> None:
    """Answer on every channel until the other side closes them.

    Args:
        arguments: the descriptors of the channels, or ``CONNECT``, a port of this machine and how many to open to it.
    """
    if arguments[0] == CONNECT:  # no POSIX: who started this process has said so
        channels = _connected(int(arguments[1]), int(arguments[2]))
    elif limits is None:
        raise RuntimeError("this Python lacks the module resource, without which nothing bounds the encoder")
    else:
        channels = [socket.socket(fileno=int(descriptor)) for descriptor in arguments]
    tower = _Tower(limits.mapped_bytes() if limits else 0, len(channels))
    if limits:
        limits.give_up_files()
    for channel in channels[1:]:
        threading.Thread(target=tower.serve, args=[channel], daemon=True).start()
    tower.serve(channels[0])


class _Tower:
    """The tower that the first request opens, and the answers to all others."""

    def __init__(self, mapped: int, channels: int) -> None:
        self._mapped, self._channels = mapped, channels
        self._opened: TextTower | ImageTower | None = None

    def serve(self, channel: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), channel.makefile("rb") as stream:
            while True:
                header = json.loads(_received(stream, *HEADER.unpack(_received(stream, HEADER.size))))
                if limits:
                    limits.bound_time(header["seconds"] * THREADS * self._channels)
                if limits and "open" in header:
                    # Before the graph is even received.
                    limits.bound_memory(_BASE_BYTES + _GRAPH_COPIES * sum(header["sizes"]), self._mapped)
                blobs = [_received(stream, size) for size in header["sizes"]]
                try:
                    status, answer = OK, self._answer(header, blobs)
                except TowerError as error:
                    status, answer = DAMAGED, str(error).encode("utf-8", "replace")[:MESSAGE_BYTES]
                except MemoryError:
                    status, answer = DAMAGED, b"it needs more memory than it may have"
                except Exception as error:  # reason: the libraries raise any type on crafted files
                    status, answer = (
                        DAMAGED,
                        f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:MESSAGE_BYTES],
                    )
                channel.sendall(ANSWER.pack(status, len(answer)))
                channel.sendall(answer)

    def _answer(self, header: Mapping[str, Any], blobs: Sequence[bytes]) -> bytes | memoryview:
        if header.get("open") == "text":
            self._opened = TextTower(blobs[0], blobs[1].decode(), **header["settings"])
            return b""
        if header.get("open") == "image":
            self._opened = ImageTower(blobs[0], **header["settings"])
            return b""
        if "words" not in header and "texts" not in header and "shape" not in header:
            return b""  # asked whether it has started
        tower = self._opened
        if isinstance(tower, TextTower) and "words" in header:
            return bytes(tower.unknown(header["words"]))
        if isinstance(tower, TextTower):
            return tower.embed(header["texts"]).data.cast("B")
        assert tower is not None
        pixels = np.frombuffer(blobs[0], np.float32).reshape(header["shape"])
        return tower.embed(pixels).data.cast("B")


def _received(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


def _connected(port: int, count: int) -> list[socket.socket]:
    """Connections to whoever started this process, which knows them by a key that nobody else can read."""
    key = sys.stdin.buffer.read(KEY_BYTES)
    channels = []
    for _ in range(count):
        channels.append(socket.create_connection(("127.0.0.1", port)))
        channels[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        channels[-1].sendall(key)
    return channels

"""The process that an index's encoder runs in: it gives up what it does not need, then answers over its channels.

Started by `probelog.encoders.process`, which ends it when an answer takes too long. Before anything of an index is
read, it can open no file and no connection any more (no descriptor beyond its channels), write none, leave no core
dump, and its memory is bounded.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np

# Libraries are loaded while files can be opened.
import onnxruntime
import tokenizers

from probelog.encoders.channel import ANSWER, DAMAGED, HEADER, MESSAGE_BYTES, OK
from probelog.encoders.towers import THREADS, ImageTower, TextTower, TowerError

# Beyond what the libraries take: a graph's weights are held several times while it is opened, and a batch of images
# takes gigabytes in the largest encoders.
_BASE_BYTES = 4 << 30
_GRAPH_COPIES = 6
# Of what goes to stderr.
_LOG_BYTES = 1 << 16
_WATCH_SECONDS = 0.05

_LIBRARIES = (onnxruntime, tokenizers)


def main(descriptors: Sequence[int]) -> None:
    """Answer on every channel (the descriptor of a socket each) until the other side closes them."""
    tower = _Tower(_mapped_bytes(), len(descriptors))
    _give_up_files()
    channels = [socket.socket(fileno=descriptor) for descriptor in descriptors]
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
                _bound_time(header["seconds"], self._channels)
                if "open" in header:
                    # Before the graph is even received.
                    _bound_memory(_BASE_BYTES + _GRAPH_COPIES * sum(header["sizes"]), self._mapped)
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


def _give_up_files() -> None:
    for limit, size in (
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, _LOG_BYTES),
    ):
        resource.setrlimit(limit, (size, size))


def _bound_time(seconds: float, channels: int) -> None:
    """Should the other side be gone, nobody ends a request that goes on for ever: the system does then."""
    limit = math.ceil(time.process_time() + seconds * THREADS * channels)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _bound_memory(size: int, mapped: int) -> None:
    """Allocations fail beyond so many bytes more; where the system has no such limit, the process ends."""
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (mapped + size, mapped + size))
    else:
        threading.Thread(target=_end_above, args=[_resident_bytes() + size], daemon=True).start()


def _end_above(most: int) -> None:
    while _resident_bytes() <= most:
        time.sleep(_WATCH_SECONDS)
    os.write(2, b"it needs more memory than it may have\n")
    os._exit(1)


def _resident_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _mapped_bytes() -> int:
    """Address space that the process has now; 0 where the system does not say."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as stream:
        return int(stream.read().split()[0]) * resource.getpagesize()
    return 0

"""Messages between a model's process and whoever forked it, of whom neither trusts the other's bytes.

A message is a JSON object, with byte strings beside it: two lengths and the object, then the strings. Never pickles.
Every read has one deadline, every length is compared with what the reader expects before memory is taken, and an
answer bears the number of its question, so that one too many cannot pass for the next.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from collections.abc import Sequence
from typing import Any

_HEAD = struct.Struct("<II")  # bytes of the object, number of strings
_SIZE = struct.Struct("<Q")
#: Of an object: the labels of 100,000 logits, or the names of 50,000 tensors.
LONGEST_OBJECT = 64 << 20


class ClosedError(Exception):
    """The other side has gone."""


class Channel:
    """One end of a pair of connected sockets (`socket.socketpair`), by its descriptor. One thread at a time.

    Only ``read``, ``write`` and ``poll`` are used: a confined process has no other calls for sockets.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        os.set_blocking(descriptor, False)
        self._poll = select.poll()

    def send(
        self,
        message: dict[str, Any],
        blobs: Sequence[bytes | memoryview] = (),
        until: float | None = None,
    ) -> None:
        """Send an object of plain values and byte strings, at the latest ``until`` (of `time.monotonic`).

        Raises:
            TimeoutError, ClosedError
        """
        text = json.dumps(message).encode()
        sizes = b"".join(_SIZE.pack(len(blob)) for blob in blobs)
        for part in (_HEAD.pack(len(text), len(blobs)) + sizes + text, *blobs):
            rest = memoryview(part).cast("B")
            while rest:
                self._wait(select.POLLOUT, until)
                try:
                    rest = rest[os.write(self._descriptor, rest[: 1 << 20]) :]
                except BlockingIOError:
                    continue
                except OSError:
                    raise ClosedError from None

    def receive(
        self, most: Sequence[int] = (), until: float | None = None
    ) -> tuple[dict[str, Any], list[bytearray]]:
        """The next message: an object, and byte strings beside it.

        Args:
            most: how many strings there may be, and the most bytes of each.
            until: when to give up, of `time.monotonic`.

        Raises:
            TimeoutError, ClosedError
            ValueError: the other side sent something else.
        """
        length, count = _HEAD.unpack(self._read(_HEAD.size, until))
        if length > LONGEST_OBJECT or count > len(most):
            raise ValueError(f"{length} bytes and {count} strings, of which {len(most)} were expected")
        sizes = [_SIZE.unpack(self._read(_SIZE.size, until))[0] for _ in range(count)]
        for size, bound in zip(sizes, most, strict=False):
            if size > bound:
                raise ValueError(f"{size} bytes where at most {bound} were expected")
        try:
            message = json.loads(self._read(length, until), parse_constant=_refuse)
        except RecursionError:
            raise ValueError("too deeply nested") from None
        if not isinstance(message, dict):
            raise ValueError(f"{type(message).__name__} in place of an object")
        return message, [self._read(size, until) for size in sizes]

    def __del__(self) -> None:
        # Not before nobody waits for it any more: the number would be another file's.
        os.close(self._descriptor)

    def _read(self, size: int, until: float | None) -> bytearray:
        # Grows as bytes come: a length costs its sender as much as its reader.
        data = bytearray()
        while len(data) < size:
            self._wait(select.POLLIN, until)
            try:
                piece = os.read(self._descriptor, min(size - len(data), 1 << 20))
            except BlockingIOError:
                continue
            except OSError:
                raise ClosedError from None
            if not piece:
                raise ClosedError
            data += piece
        return data

    def _wait(self, event: int, until: float | None) -> None:
        self._poll.register(self._descriptor, event)
        left = None if until is None else until - time.monotonic()
        # Bytes that trickle in are always there in time: the deadline counts, not the silence.
        if left is not None and (left <= 0 or not self._poll.poll(1000 * left)):
            raise TimeoutError
        if left is None:
            self._poll.poll()


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number")

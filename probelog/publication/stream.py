"""What one thread makes, another consumes: a library that pulls its input in threads of its own never runs ours.

LanceDB reads a stream of batches in a thread with a small stack, which a matrix product in the midst of making one can
overflow: the process dies. So batches are made in the caller's thread and only handed over in LanceDB's. The two work
at the same time, and Ctrl-C reaches the maker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Full, Queue
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Items that wait to be consumed: memory is bounded by these, the one that is made and the one that is consumed.
_WAITING = 2
_LOOK_SECONDS = 0.2
_END = object()


@dataclass(frozen=True)
class _Failed:
    """In place of an item: making it raised."""

    error: BaseException


def run_consumer_in_thread(items: Iterable[T], consume: Callable[[Iterator[T]], R]) -> R:
    """Consume items in another thread while they are made in this one; returns what ``consume`` does.

    Raises:
        Exception: whatever making an item raised (``consume`` is told by the same exception), or else ``consume``.
    """
    queue: Queue[Any] = Queue(_WAITING)
    with ThreadPoolExecutor(1, "handover") as pool:
        consumed = pool.submit(consume, _received(queue))
        last: object = _END
        try:
            for item in items:
                if not _put(queue, item, consumed):
                    break
        except BaseException as error:
            last = _Failed(error)
            raise
        finally:
            _put(queue, last, consumed)
        return consumed.result()


def _received(queue: Queue[Any]) -> Iterator[Any]:
    while (item := queue.get()) is not _END:
        if isinstance(item, _Failed):
            raise item.error
        yield item


def _put(queue: Queue[Any], item: object, consumed: Future[Any]) -> bool:
    """Queue an item; False where nobody will take it any more."""
    while not consumed.done():
        try:
            queue.put(item, timeout=_LOOK_SECONDS)
        except Full:
            continue
        return True
    return False

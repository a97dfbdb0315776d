"""A bounded queue between a producer and a consumer thread, for libraries that pull their input in their own threads.

LanceDB reads a stream of batches in a thread with a small stack, which a matrix product inside the stream can
overflow: the process dies. So batches are made in the caller's thread, and LanceDB's thread only takes them from the
queue. The two work at the same time, and Ctrl-C reaches the producer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Full, Queue
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Items in the queue: memory is bounded by these, the one being made and the one being consumed.
_WAITING = 2
_LOOK_SECONDS = 0.2
_END = object()


@dataclass(frozen=True)
class _Failed:
    """Stands in the queue for an item whose making raised an error."""

    error: BaseException


def run_consumer_in_thread(items: Iterable[T], consume: Callable[[Iterator[T]], R]) -> R:
    """Consume items in another thread while they are made in this one; returns what ``consume`` returns.

    Raises:
        Exception: whatever making an item raised (``consume`` gets the same exception from its iterator), or else
            whatever ``consume`` raised.
    """
    queue: Queue[Any] = Queue(_WAITING)
    with ThreadPoolExecutor(1, "handover") as pool:
        consumed = pool.submit(consume, _queued_items(queue))
        end_marker: object = _END
        try:
            for item in items:
                if not _put(queue, item, consumed):
                    break
        except BaseException as error:
            end_marker = _Failed(error)
            raise
        finally:
            _put(queue, end_marker, consumed)
        return consumed.result()


def _queued_items(queue: Queue[Any]) -> Iterator[Any]:
    while (item := queue.get()) is not _END:
        if isinstance(item, _Failed):
            raise item.error
        yield item


def _put(queue: Queue[Any], item: object, consumed: Future[Any]) -> bool:
    """Queue an item; False if the consumer has ended."""
    while not consumed.done():
        try:
            queue.put(item, timeout=_LOOK_SECONDS)
        except Full:
            continue
        return True
    return False

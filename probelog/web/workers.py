"""Threads that answer: as many at a time as the machine has use for, and in turn for all who ask.

A search takes a core for some ten milliseconds, so more threads than cores answer nobody sooner. What waits is bounded:
where too many wait, those go who have asked for most. Somebody who sends a thousand searches waits for their own.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class BusyError(Exception):
    """Too many ask at once; ``retry_after`` seconds later it may be better."""

    retry_after = 2


class Workers:
    """Runs work in threads, in turn for all clients. For one event loop.

    Args:
        threads: that work at the same time.
        most_waiting: pieces of work that wait; more are refused.
        seconds: that a piece of work waits; it is refused afterwards.
    """

    def __init__(self, threads: int, most_waiting: int, seconds: float) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="answer")
        self._free = threads
        self._most_waiting = most_waiting
        self._seconds = seconds
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._begun: dict[object, float] = {}

    @property
    def running(self) -> int:
        """Pieces of work in progress."""
        return len(self._begun)

    @property
    def waiting(self) -> int:
        """Pieces of work that wait for a thread."""
        return sum(map(len, self._waiting.values()))

    @property
    def longest(self) -> float:
        """Seconds since the oldest piece of work in progress began."""
        return time.monotonic() - min(self._begun.values(), default=time.monotonic())

    async def run(self, client: str, work: Callable[[], T]) -> T:
        """The result of work, done in a thread when it is this client's turn.

        Raises:
            BusyError: too much else waits, or it has waited too long.
        """
        await self._turn(client)
        key = object()
        self._begun[key] = time.monotonic()
        try:
            # Shielded: a thread cannot be interrupted, and its place is free when it has ended.
            done = asyncio.get_running_loop().run_in_executor(self._executor, work)
        except BaseException:
            self._ended(key)
            raise
        done.add_done_callback(lambda _: self._ended(key))
        return await asyncio.shield(done)

    def close(self) -> None:
        """Begin nothing more."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _turn(self, client: str) -> None:
        if self._free:
            self._free -= 1
            return
        if self.waiting >= self._most_waiting:
            largest = max(self._waiting, key=lambda name: len(self._waiting[name]), default=client)
            if len(self._waiting.get(largest, ())) <= len(self._waiting.get(client, ())) + 1:
                raise BusyError
            refused = self._waiting[largest].pop()
            self._forget_if_none(largest)
            if not refused.done():
                refused.set_exception(BusyError())
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            async with asyncio.timeout(self._seconds):
                await turn
        except BaseException as error:
            # It may have got its turn in the same moment.
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._next()
            elif client in self._waiting and turn in self._waiting[client]:
                self._waiting[client].remove(turn)
                self._forget_if_none(client)
            if isinstance(error, TimeoutError):
                raise BusyError from None
            raise

    def _ended(self, key: object) -> None:
        del self._begun[key]
        self._next()

    def _next(self) -> None:
        """Give a free place to the client whose turn it is."""
        while self._waiting:
            client, turns = next(iter(self._waiting.items()))
            turn = turns.popleft()
            self._waiting.move_to_end(client)
            self._forget_if_none(client)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _forget_if_none(self, client: str) -> None:
        if not self._waiting[client]:
            del self._waiting[client]

"""A thin scheduler over Ray actors, for items that take seconds to minutes and may kill their worker.

Not Ray Data (its checkpoints are per block, its pools hang when actors die) and not ``ActorPool`` (no failures, no
backpressure). The driver holds an iterator of items and keeps a few in flight per worker. A worker that dies is
replaced; what it was working on runs again. When two items shared a dead worker nobody knows which one killed it:
both are *suspects* then and run alone, and only an item that loses its worker while alone is blamed. Blamed twice,
it is given up with a reason, not retried for ever.

Workers are replaced here rather than by Ray's ``max_restarts``: a fresh actor has no queue of calls that may or
may not run again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError

from probelog.errors import FailureReason, ProbeLogError

Item = TypeVar("Item")


class Worker(Protocol):
    """What an actor must offer: ``ready`` returns when it can work, ``run`` does one item.

    ``run`` reports an item's own failure in its result, never as an exception.
    """

    ready: Any
    run: Any


@dataclass(frozen=True)
class Policy:
    """How items are spread and when they are given up.

    Attributes:
        in_flight: items per worker, so that the next one is fetched while this one computes.
        blames: how often an item may lose a worker that it had for itself.
        losses: how often an item may lose a worker at all (machines that go away count here only).
        item_seconds: after this long without an answer a worker is taken for hung.
        recycle_after: a worker is replaced after this many items, since GPU workers leak.
        start_attempts: workers in a row that may fail to start before the job ends.
    """

    in_flight: int = 2
    blames: int = 2
    losses: int = 6
    item_seconds: float = 1800.0
    recycle_after: int = 500
    start_attempts: int = 5


@dataclass
class Task(Generic[Item]):
    """One item and what has happened to it so far."""

    item: Item
    blames: int = 0
    losses: int = 0
    suspect: bool = False


@dataclass(frozen=True)
class Outcome(Generic[Item]):
    """An item that is through: its worker's result, or the reason why it was given up."""

    item: Item
    result: Any = None
    reason: FailureReason | None = None
    detail: str = ""
    attempts: int = 1


@dataclass
class _Slot(Generic[Item]):
    actor: Any
    starting: Any
    flying: dict[Any, tuple[Task[Item], float]] = field(default_factory=dict)
    served: int = 0

    @property
    def alone(self) -> bool:
        return any(task.suspect for task, _ in self.flying.values())


class Scheduler(Generic[Item]):
    """Runs items on a fixed number of workers and yields their outcomes as they come."""

    def __init__(self, make_worker: Callable[[], Any], workers: int, policy: Policy | None = None) -> None:
        self._make_worker = make_worker
        self._workers = workers
        self._policy = policy or Policy()
        self._slots: list[_Slot[Item]] = []
        self._queue: deque[Task[Item]] = deque()
        self._given_up: deque[Outcome[Item]] = deque()
        self._failed_starts = 0

    def run(
        self, items: Iterable[Item], tick: Callable[[int], None] | None = None
    ) -> Iterator[Outcome[Item]]:
        """Every item's outcome, in the order in which they come.

        Args:
            items: read as workers become free, never all at once.
            tick: called about once a second with the number of items in flight.

        Raises:
            ProbeLogError: workers cannot be started.
        """
        source = iter(items)
        try:
            while True:
                self._top_up(source)
                self._feed()
                while self._given_up:
                    yield self._given_up.popleft()
                flying = sum(len(slot.flying) for slot in self._slots)
                if not flying and not self._queue:
                    return
                yield from self._collect(timeout=1.0)
                self._kill_hung()
                if tick is not None:
                    tick(flying)
        finally:
            for slot in self._slots:
                ray.kill(slot.actor, no_restart=True)
            self._slots.clear()

    # Giving work

    def _top_up(self, source: Iterator[Item]) -> None:
        """Read ahead as far as the workers could take at once."""
        while len(self._queue) < self._workers * self._policy.in_flight:
            try:
                self._queue.append(Task(next(source)))
            except StopIteration:
                return

    def _feed(self) -> None:
        for slot in list(self._slots):
            if slot.served >= self._policy.recycle_after:
                if not slot.flying:
                    self._drop(slot)
                continue
            while slot.starting is None and not slot.alone and len(slot.flying) < self._policy.in_flight:
                task = self._next(empty=not slot.flying)
                if task is None:
                    break
                slot.flying[slot.actor.run.remote(task.item)] = (task, time.monotonic())
        starting = sum(slot.starting is not None for slot in self._slots)
        while len(self._slots) < self._workers and len(self._queue) > starting:
            self._start()
            starting += 1

    def _next(self, empty: bool) -> Task[Item] | None:
        """The next task for a worker; a suspect waits for one that has nothing else."""
        for task in self._queue:
            if empty or not task.suspect:
                self._queue.remove(task)
                return task
        return None

    def _start(self) -> None:
        actor = self._make_worker()
        self._slots.append(_Slot(actor, actor.ready.remote()))

    # Taking results

    def _collect(self, timeout: float) -> Iterator[Outcome[Item]]:
        owners = {ref: slot for slot in self._slots for ref in slot.flying}
        owners |= {slot.starting: slot for slot in self._slots if slot.starting is not None}
        if not owners:
            return
        ready, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0)
        if not ready:
            ready, _ = ray.wait(list(owners), num_returns=1, timeout=timeout)
        for ref in ready:
            slot = owners[ref]
            if slot not in self._slots:
                continue  # its worker died a moment ago and its items are already queued again
            if ref == slot.starting:
                self._welcome(slot)
                continue
            task, _ = slot.flying[ref]
            try:
                result = ray.get(ref, timeout=60)
            except (RayError, GetTimeoutError) as error:
                self._lose(slot, FailureReason.CRASHED_WORKER, _first_line(error))
                continue
            del slot.flying[ref]
            slot.served += 1
            yield Outcome(task.item, result, attempts=task.losses + 1)

    def _welcome(self, slot: _Slot[Item]) -> None:
        try:
            ray.get(slot.starting, timeout=60)
        except (RayError, GetTimeoutError) as error:
            self._drop(slot)
            self._failed_starts += 1
            if self._failed_starts >= self._policy.start_attempts:
                raise ProbeLogError(
                    f"{self._failed_starts} workers in a row failed to start; the last one said: {_cause(error)}"
                ) from error
            return
        slot.starting = None
        self._failed_starts = 0

    def _kill_hung(self) -> None:
        now = time.monotonic()
        for slot in list(self._slots):
            if any(now - since > self._policy.item_seconds for _, since in slot.flying.values()):
                self._lose(
                    slot, FailureReason.TIMEOUT, f"no answer within {self._policy.item_seconds:g} seconds"
                )

    def _lose(self, slot: _Slot[Item], reason: FailureReason, detail: str) -> None:
        """A worker is gone: queue what it had, and give up what has been blamed too often."""
        tasks = [task for task, _ in slot.flying.values()]
        self._drop(slot)
        for task in tasks:
            task.losses += 1
            task.blames += len(tasks) == 1
            task.suspect = True
            if task.blames >= self._policy.blames or task.losses >= self._policy.losses:
                self._given_up.append(Outcome(task.item, None, reason, detail, task.losses))
            else:
                self._queue.append(task)

    def _drop(self, slot: _Slot[Item]) -> None:
        self._slots.remove(slot)
        ray.kill(slot.actor, no_restart=True)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def _cause(error: BaseException) -> str:
    """The last line of Ray's account: the exception that ended the constructor."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__

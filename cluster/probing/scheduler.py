"""A thin scheduler over Ray actors, for items that take seconds to minutes and may kill their worker.

Not Ray Data (its checkpoints are per block, its pools hang when actors die) and not ``ActorPool`` (no failures, no
backpressure). The driver holds an iterator of items and keeps a few in flight per worker. A worker that dies is
replaced; what it was working on runs again. When two items shared a dead worker nobody knows which one killed it:
both are *suspects* then and run alone, and only an item that loses its worker while alone is blamed. Blamed twice,
it is given up with a reason, not retried for ever. Machines that go away blame nobody.

Workers are replaced here rather than by Ray's ``max_restarts``: a fresh actor has no queue of calls that may or
may not run again.

The work per item does not grow with the number of workers: answers arrive through callbacks (Ray's
``ObjectRef.future``) in one queue, and only workers that have just answered are looked at. What must look at all
of them (how many there should be, which are silent) happens every few seconds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

import ray
from ray.exceptions import ActorUnavailableError, NodeDiedError, RayActorError

from cluster.probing.results import Requeued
from probelog.errors import FailureReason, ProbeLogError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

Item = TypeVar("Item")

_LOOK_SECONDS = 5.0
# Answers taken before free workers are fed again.
_AT_ONCE = 256


class Worker(Protocol):
    """What an actor must offer: ``ready`` returns when it can work, ``run`` does one item.

    ``run`` reports an item's own failure in its result, never as an exception; ``Requeued`` says that the worker
    is going away and somebody else is to do the item.
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
        item_seconds: what a worker allows an item; it keeps this clock itself.
        silence_seconds: an item without an answer for so long means a worker that cannot keep its own clock; it is
            taken for hung. By default what its items may take one after the other, and five minutes.
        recycle_after: a worker is replaced after this many items, since GPU workers leak.
        start_attempts: workers in a row that may fail to start before the job ends.
    """

    in_flight: int = 2
    blames: int = 2
    losses: int = 6
    item_seconds: float = 1800.0
    silence_seconds: float | None = None
    recycle_after: int = 5000
    start_attempts: int = 5

    @property
    def silence(self) -> float:
        """Seconds after which a worker that has not answered is taken for hung."""
        return (
            self.in_flight * self.item_seconds + 300.0
            if self.silence_seconds is None
            else self.silence_seconds
        )


@dataclass(eq=False)
class Task(Generic[Item]):
    """One item and what has happened to it so far."""

    item: Item
    blames: int = 0
    losses: int = 0
    suspect: bool = False


@dataclass(frozen=True)
class ItemOutcome(Generic[Item]):
    """An item that is through: its worker's result, or the reason why it was given up."""

    item: Item
    result: Any = None
    reason: FailureReason | None = None
    detail: str = ""
    attempts: int = 1


@dataclass(eq=False)
class _Slot(Generic[Item]):
    """A worker: what it is working on, with the time of asking, oldest first.

    ``reserved``: gets nothing until it is empty, then suspects, one at a time. ``leaving``: gets nothing any more.
    """

    actor: Worker
    starting: bool = True
    flying: dict[Task[Item], float] = field(default_factory=dict)
    served: int = 0
    reserved: bool = False
    leaving: bool = False
    ended: bool = False


_Answer = tuple["_Slot[Item]", "Task[Item] | None", "Future[Any]"]


def kill(actor: Worker) -> None:
    """End an actor's process at once."""
    ray.kill(cast("ActorHandle[Any]", actor), no_restart=True)


class Scheduler(Generic[Item]):
    """Runs items on workers, as many as there should be at the time, and yields their outcomes as they come."""

    def __init__(
        self,
        make_worker: Callable[[], Worker],
        workers: int | Callable[[], int],
        policy: Policy | None = None,
        end_worker: Callable[[Worker], None] = kill,
    ) -> None:
        """Nothing starts yet.

        Args:
            make_worker: starts an actor; it need not have a place yet.
            workers: how many, or what says how many, which is asked again every few seconds.
            policy: how items are spread and given up.
            end_worker: ends one.
        """
        self._make_worker, self._end_worker = make_worker, end_worker
        self._count = workers if callable(workers) else lambda: workers
        self._policy = policy or Policy()
        self._target = 0
        self._slots: set[_Slot[Item]] = set()
        self._free: deque[_Slot[Item]] = deque()
        self._queue: deque[Task[Item]] = deque()
        self._suspects: deque[Task[Item]] = deque()
        self._given_up: deque[ItemOutcome[Item]] = deque()
        self._arrived: SimpleQueue[_Answer[Item]] = SimpleQueue()
        self._source: Iterator[Item] = iter(())
        self._exhausted = False
        self._starting = 0
        self._staying = 0
        self._reserved = 0
        self._failed_starts = 0
        self._looked = float("-inf")
        self.in_flight = 0

    @property
    def workers(self) -> int:
        """Workers that can work."""
        return len(self._slots) - self._starting

    def run(
        self, items: Iterable[Item], tick: Callable[[int], None] | None = None
    ) -> Generator[ItemOutcome[Item], None, None]:
        """Every item's outcome, in the order in which they come. Closing it ends the workers.

        Args:
            items: read as workers become free, never all at once.
            tick: called about once a second with the number of items in flight.

        Raises:
            ProbeLogError: workers cannot be started.
        """
        self._source, self._exhausted, self._looked = iter(items), False, float("-inf")
        ticked = float("-inf")
        try:
            while True:
                self._look()
                self._feed()
                while self._given_up:
                    yield self._given_up.popleft()
                if not self.in_flight and not self._queue and not self._suspects:
                    return
                yield from self._collect(timeout=1.0)
                if tick is not None and time.monotonic() - ticked >= 1.0:
                    ticked = time.monotonic()
                    tick(self.in_flight)
        finally:
            for slot in list(self._slots):
                self._drop(slot)

    # Giving work

    def _look(self) -> None:
        """Every few seconds: how many workers there should be, and who has been silent for too long."""
        now = time.monotonic()
        if now - self._looked < min(_LOOK_SECONDS, self._policy.silence / 4):
            return
        self._looked = now
        previous, self._target = self._target, max(1, self._count())
        most = max(previous, self._target)  # twice too many, not once: a cluster's answer may waver
        if self._staying > most:
            # Those that wait for a place first: it may never come.
            for slot in sorted(self._slots, key=lambda slot: (not slot.starting, len(slot.flying))):
                if self._staying <= most:
                    break
                if not slot.leaving:
                    self._retire(slot)
        for slot in list(self._slots):
            if slot.flying and now - next(iter(slot.flying.values())) > self._policy.silence:
                self._mark_lost(
                    slot, FailureReason.TIMEOUT, f"no answer within {self._policy.silence:g} seconds"
                )

    def _feed(self) -> None:
        """Give free workers what there is, and start workers for what remains."""
        self._read_ahead()
        while self._free and (self._queue or self._suspects):
            slot = self._free.popleft()
            if slot.ended or slot.leaving:
                continue
            self._fill(slot)
        if self._staying < self._target:
            waiting = len(self._queue) + len(self._suspects)
            while self._staying < self._target and waiting > self._starting:
                self._start()

    def _read_ahead(self) -> None:
        """As far as the free workers, and those that are not there yet, could take at once."""
        target = self._policy.in_flight * (
            len(self._free) + max(0, self._target - self._staying) + self._starting
        )
        while not self._exhausted and len(self._queue) < max(1, target):
            try:
                self._queue.append(Task(next(self._source)))
            except StopIteration:
                self._exhausted = True

    def _fill(self, slot: _Slot[Item]) -> None:
        """Give a worker as much as it may have; a suspect goes to one that has nothing else."""
        if self._suspects and not slot.flying:
            self._reserve(slot, False)
            self._send(slot, self._suspects.popleft())
            return
        if any(task.suspect for task in slot.flying):
            return
        if self._suspects and (slot.reserved or self._reserved < self._most_reserved()):
            self._reserve(slot, True)
            return
        self._reserve(slot, False)
        while len(slot.flying) < self._policy.in_flight:
            if not self._queue:
                if self._exhausted:
                    if not self._suspects:  # else it comes back with its next answer
                        self._free.append(slot)
                    return
                self._read_ahead()
                continue
            self._send(slot, self._queue.popleft())

    def _most_reserved(self) -> int:
        """Workers that may run dry for suspects' sake: no more than there are suspects, a quarter of all at most."""
        return min(len(self._suspects), max(1, len(self._slots) // 4))

    def _reserve(self, slot: _Slot[Item], reserved: bool) -> None:
        self._reserved += reserved - slot.reserved
        slot.reserved = reserved

    def _send(self, slot: _Slot[Item], task: Task[Item]) -> None:
        slot.flying[task] = time.monotonic()
        self.in_flight += 1
        self._listen(slot, task, slot.actor.run.remote(task.item))

    def _listen(self, slot: _Slot[Item], task: Task[Item] | None, ref: ray.ObjectRef[Any]) -> None:
        ref.future().add_done_callback(lambda future: self._arrived.put((slot, task, future)))

    def _start(self) -> None:
        actor = self._make_worker()
        slot = _Slot[Item](actor)
        self._slots.add(slot)
        self._starting += 1
        self._staying += 1
        self._listen(slot, None, actor.ready.remote())

    # Taking results

    def _collect(self, timeout: float) -> Iterator[ItemOutcome[Item]]:
        """Wait for an answer, then take all that are there."""
        try:
            answer = self._arrived.get(timeout=min(timeout, self._policy.silence / 4))
            for _ in range(_AT_ONCE):
                yield from self._take(*answer)
                answer = self._arrived.get_nowait()
            yield from self._take(*answer)
        except Empty:
            return

    def _take(
        self, slot: _Slot[Item], task: Task[Item] | None, future: Future[Any]
    ) -> Iterator[ItemOutcome[Item]]:
        if slot.ended:
            return  # it died a moment ago and its items are already queued again
        error = future.exception()
        if task is None:
            self._welcome(slot, error)
            return
        if error is not None:
            self._mark_lost(
                slot, FailureReason.CRASHED_WORKER, _first_line(error), blameless=_machine_is_gone(error)
            )
            return
        del slot.flying[task]
        self.in_flight -= 1
        slot.served += 1
        result = future.result()
        if isinstance(result, Requeued):
            self._again(task)
            self._retire(slot)
            return
        if slot.leaving or slot.served >= self._policy.recycle_after:
            self._retire(slot)
        else:
            self._free.append(slot)
        yield ItemOutcome(task.item, result, attempts=task.losses + 1)

    def _welcome(self, slot: _Slot[Item], error: BaseException | None) -> None:
        if error is None:
            slot.starting = False
            self._starting -= 1
            self._failed_starts = 0
            self._free.appendleft(slot)
            return
        self._drop(slot)
        if _machine_is_gone(error):
            return
        self._failed_starts += 1
        if self._failed_starts >= self._policy.start_attempts:
            raise ProbeLogError(
                f"{self._failed_starts} workers in a row failed to start; the last one said: {_cause(error)}"
            ) from error

    def _mark_lost(
        self, slot: _Slot[Item], reason: FailureReason, detail: str, blameless: bool = False
    ) -> None:
        """A worker is gone: queue what it had, and give up what has been blamed too often."""
        tasks = list(slot.flying)
        self._drop(slot)
        for task in reversed(tasks):
            task.losses += 1
            if not blameless:
                task.blames += len(tasks) == 1
                task.suspect = True
            if task.blames >= self._policy.blames or task.losses >= self._policy.losses:
                self._given_up.append(ItemOutcome(task.item, None, reason, detail, task.losses))
            else:
                self._again(task)

    def _again(self, task: Task[Item]) -> None:
        if task.suspect:
            self._suspects.append(task)
        else:
            self._queue.appendleft(task)

    def _retire(self, slot: _Slot[Item]) -> None:
        """Give a worker nothing more; it ends when what it has is through."""
        if not slot.leaving:
            slot.leaving = True
            self._staying -= 1
            self._reserve(slot, False)
        if not slot.flying:
            self._drop(slot)

    def _drop(self, slot: _Slot[Item]) -> None:
        slot.ended = True
        self._slots.discard(slot)
        self._staying -= not slot.leaving
        self._starting -= slot.starting
        self._reserve(slot, False)
        self.in_flight -= len(slot.flying)
        slot.flying.clear()
        self._end_worker(slot.actor)


def _machine_is_gone(error: BaseException) -> bool:
    """Whether a worker was lost with its machine (or the way to it), through no fault of what it was doing."""
    if isinstance(error, (NodeDiedError, ActorUnavailableError)):
        return True
    # Ray tells a drained node by an attribute, one that vanished by its words alone.
    return isinstance(error, RayActorError) and (error.preempted or "node has died" in str(error))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def _cause(error: BaseException) -> str:
    """The last line of Ray's account: the exception that ended the constructor."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__

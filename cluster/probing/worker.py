"""What every actor that runs models does, whatever kind of model it is: fetch one, have a confined process run it, and
write what came of it, on time, once, and without dying of what the model does.

Several calls of `ItemWorker.run` are under way at once (``in_flight``): their downloads overlap with everything, two
model processes take turns, so that one loads the next model while the other computes, and a lock keeps computing
to one at a time. A model that crashes, hangs or eats all memory costs its process and its own row.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import shutil
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

import ray

from cluster.probing.coordinator import Claim, CoordinatorClient, CoordinatorHandle, Original
from cluster.probing.drain import Drain
from cluster.probing.results import ItemReport, Requeued
from cluster.probing.scheduler import Worker, kill
from cluster.runtime.node import memory_share, own_nodes
from cluster.runtime.scratch import own_downloads, scratch_folder
from cluster.runtime.settings import WorkerSettings
from probelog import logs
from probelog.errors import FailureReason, ItemFailure, StoreError
from probelog.hub.client import HubClient
from probelog.hub.download import Downloaded, DownloadLimits
from probelog.hub.usage import METER, HubUsage
from probelog.kinds.kind import Kind
from probelog.sandbox.fork_server.client import ForkServer
from probelog.storage.ledger import ItemResult, Ledger
from probelog.storage.schemas import CatalogueRow, Failure, from_table
from probelog.storage.store import Store, retry_with_backoff

#: One loads while the other computes.
PROCESSES = 2
# Two live side by side, mostly not at their largest at the same moment.
PROCESS_SHARE = 0.6
NODE_SHARE = 0.9
#: A model may lose its process so often before it is given up: once may have been bad luck.
_LOSSES = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What an actor needs to know. Small, and free of anything that does not survive a restart.

    Attributes:
        store: its address.
        folder: of the ledger.
        endpoint: the Hub's address, with the user and password that it may take (left out where a spec is shown).
        max_bytes: largest download of one model.
        max_params: largest number of parameters of one.
        settings: how it works, and what it may use.
        log_level: of the command.
    """

    store: str
    folder: str
    endpoint: str = field(repr=False)
    max_bytes: int
    max_params: int
    settings: WorkerSettings
    log_level: str = logs.LogLevel.WARNING


class Item(Protocol):
    """One model to run: its key in the ledger, its catalogue row, and which attempt this is."""

    @property
    def key(self) -> str: ...
    @property
    def row(self) -> CatalogueRow: ...
    @property
    def attempt(self) -> int: ...


class Process(Protocol):
    """A process in which models run, one after the other."""

    def close(self) -> None:
        """End it. From another thread: whoever waits for it gets ProcessLostError."""


class _LeavingError(Exception):
    """The machine goes away before the item is done."""


@dataclass
class Clock:
    """Seconds of one item by part; only those of model processes count against its time limit."""

    limit: float
    seconds: dict[str, float] = field(default_factory=dict)
    used: float = 0.0

    @contextmanager
    def part(self, name: str, counts: bool = False) -> Iterator[None]:
        """Measure one part."""
        begun = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - begun
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self.used += spent if counts else 0.0

    @property
    def remaining(self) -> float:
        """Seconds that the item may still take."""
        return max(0.0, self.limit - self.used)


P = TypeVar("P", bound=Process)
Spec = TypeVar("Spec", bound=WorkerSpec)


class ItemWorker(ABC, Generic[Spec, P]):
    """Runs models. ``run`` may be called from ``in_flight`` threads at once."""

    kind: ClassVar[Kind]

    def __init__(self, spec: Spec, coordinator: CoordinatorHandle, identity: str) -> None:
        """``identity``: how the coordinator tells this worker from others."""
        logs.configure(spec.log_level)
        self._spec, settings = spec, spec.settings
        self._settings = settings
        self._drain = Drain(settings.drain_seconds, self._leave)
        self._coordinator = CoordinatorClient(coordinator, spec.endpoint, self._check)
        store = Store(spec.store)
        self._ledger = Ledger(store, spec.folder, self.kind.contents)
        scratch = scratch_folder(settings.scratch)
        self._own = own_downloads(scratch)
        memory = settings.memory_per_worker
        if memory is None:
            memory = int(memory_share(settings.cpus_per_worker, settings.gpus_per_worker) * NODE_SHARE)
        self._server, self._every = self._processes(store, scratch, int(memory * PROCESS_SHARE))
        self._idle: queue.SimpleQueue[P] = queue.SimpleQueue()
        for one in self._every:
            self._idle.put(one)
        self._hub = HubClient(spec.endpoint, limiter=self._coordinator)
        self._reporting = threading.Lock()
        self._reported = METER.total
        self._computing = threading.Lock()
        self._busy: P | None = None
        self._threads = ThreadPoolExecutor(settings.in_flight)
        self._end: Future[None] = Future()
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._id = identity

    # What differs from kind to kind

    @abstractmethod
    def _processes(self, store: Store, scratch: Path, memory: int) -> tuple[ForkServer, Sequence[P]]:
        """The server and the processes in which models run, each with so many bytes of memory."""

    @abstractmethod
    def _use(self, item: Item, downloaded: Downloaded, clock: Clock) -> Outcome:
        """Run a model that was downloaded."""

    # One item

    def ready(self) -> str:
        """Returns when the actor can work: the node it is on."""
        return str(ray.get_runtime_context().get_node_id())

    def run(self, item: Item) -> ItemReport | Requeued:
        """Run one model and spool its result; nothing that the model does makes this raise.

        When the machine goes away it returns in time, whatever the item is waiting for.
        """
        done = self._threads.submit(self._attempt, item)
        either: list[Future[Any]] = [done, self._end]
        wait(either, return_when=FIRST_COMPLETED)
        return done.result() if done.done() else Requeued()

    def _attempt(self, item: Item) -> ItemReport | Requeued:
        row = item.row
        clock = Clock(self._settings.item_seconds)
        report = ItemReport(worker=self._name)
        try:
            self._check()
            result, report = self._one(item, clock)
            report = replace(report, rows=result.rows.num_rows)
        except _LeavingError:
            return Requeued()
        except ItemFailure as failure:
            report = replace(report, reason=failure.reason.value, detail=failure.detail)
        except MemoryError as error:
            detail = str(error) or "out of memory"
            report = replace(report, reason=FailureReason.OUT_OF_MEMORY.value, detail=detail)
        except StoreError as error:
            report = replace(report, reason=FailureReason.STORE_FAILED.value, detail=str(error))
        except Exception as error:  # whatever happens to one model must cost its own row and no more
            _log.exception("%s@%s: internal error", row.repo, row.sha)
            detail = f"{type(error).__name__}: {error}"
            report = replace(report, reason=FailureReason.INTERNAL.value, detail=detail)
        if report.reason is not None:
            if self._drain.noticed:
                return Requeued()  # the end of the machine may look like a fault of the model
            reason = FailureReason(report.reason)
            failure_row = Failure.of(row.repo, row.sha, self.kind.stage, reason, report.detail, item.attempt)
            result = ItemResult.failure(failure_row, self.kind.contents)
        with clock.part("write"):
            try:
                retry_with_backoff(
                    lambda: self._ledger.spool(item.key, result), self._settings.store_retry_seconds
                )
            except StoreError as error:
                # Handed back it would be run and refused again, for ever. The driver tries to write the failure.
                reason = FailureReason.STORE_FAILED
                report = replace(report, reason=reason.value, detail=str(error), spooled=False)
        if report.identity is not None and report.copy_of is None:
            if report.reason is None:
                self._coordinator.record_original(report.identity, row.repo, row.sha, item.key)
            else:
                self._coordinator.give_up(report.identity, item.key)
        return replace(report, seconds=clock.seconds, hub=self._hub_usage())

    def _hub_usage(self) -> HubUsage:
        """What the threads of this worker asked of the Hub since it was last reported."""
        with self._reporting:
            total = METER.total
            usage, self._reported = total - self._reported, total
        return usage

    # One model

    def _one(self, item: Item, clock: Clock) -> Outcome:
        folder = self._own / item.key
        try:
            with clock.part("download"):
                downloaded = self._download(item.row, folder)
            return self._use(item, downloaded, clock)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _download(self, row: CatalogueRow, folder: Path) -> Downloaded:
        until = time.monotonic() + self._settings.item_seconds
        earlier = self._coordinator.waited  # by this thread, for other models

        def check() -> None:
            self._check()
            if time.monotonic() - (self._coordinator.waited - earlier) > until:
                raise ItemFailure(
                    FailureReason.DOWNLOAD_FAILED,
                    f"download timed out after {self._settings.item_seconds:g} s",
                )

        patient_until = time.monotonic() + self._settings.disk_retry_seconds
        while True:
            try:
                return self.kind.download(
                    self._hub,
                    row,
                    folder,
                    limits=DownloadLimits(max_bytes=self._spec.max_bytes),
                    allow_pickle=self._settings.allow_pickle,
                    check=check,
                )
            except ItemFailure as failure:
                # A full disk may empty when others are done; rushing on would fail every model after this one.
                full = failure.reason is FailureReason.STORE_FAILED
                if not full or time.monotonic() > patient_until:
                    raise
            shutil.rmtree(folder, ignore_errors=True)  # what it had so far may be what others lack
            self._wait(min(5.0, max(0.1, self._settings.disk_retry_seconds / 4)))

    def _in_process(self, use: Callable[[P], Outcome], clock: Clock) -> Outcome:
        """Use a process, once more where it ended meanwhile."""
        from probelog.sandbox.fork_server.client import ProcessLostError

        with clock.part("wait"):
            process = self._process()
        try:
            for losses in range(1, _LOSSES + 1):
                try:
                    return use(process)
                except ProcessLostError as lost:
                    self._check()
                    if losses == _LOSSES:
                        killed = lost.signal == 9
                        detail = f"{lost}, {losses} times" + (
                            "; the machine's memory may not be enough for it" if killed else ""
                        )
                        reason = FailureReason.OUT_OF_MEMORY if killed else FailureReason.CRASHED_WORKER
                        raise ItemFailure(reason, detail) from None
            raise AssertionError("unreachable")
        finally:
            self._idle.put(process)

    def _process(self) -> P:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._idle.get(timeout=1.0)
            self._check()

    @contextmanager
    def _computes(self, process: P, clock: Clock) -> Iterator[None]:
        """For as long as the block runs this process computes, and no other of this worker."""
        with clock.part("wait"):
            self._computing.acquire()
        try:
            self._busy = process
            self._check()
            yield
        finally:
            self._busy = None
            self._computing.release()

    # Copies

    @contextmanager
    def _claimed(self, identity: str, item: Item, clock: Clock) -> Iterator[Claim]:
        """Who was run with the same weights; the claim is given up where the block fails."""
        with clock.part("wait"):
            claim = self._claim(identity, item)
        try:
            yield claim
        except BaseException:
            self._coordinator.give_up(identity, item.key)
            raise

    def _claim(self, identity: str, item: Item) -> Claim:
        """Who was run with the same weights. Waits where that is under way elsewhere."""
        until = time.monotonic() + self._settings.item_seconds
        while (claim := self._coordinator.claim(identity, item.key, self._id)).wait and (
            time.monotonic() <= until
        ):
            self._wait(0.3)
        return claim

    def _copy(
        self, original: Original, row: CatalogueRow, facts: dict[str, Any], size: int
    ) -> ItemResult | None:
        """The original's rows under this repository's name; None where they cannot be found."""
        result = None
        contents = self.kind.contents
        spooled = None if original.item is None else self._ledger.spooled_result(original.item)
        if spooled is not None and spooled.models.num_rows == 1:
            result = from_table(spooled.models, contents.record)[0], spooled.rows
        elif original.receipt is not None:
            result = self._ledger.sealed_result(original.receipt, original.repo, original.sha)
        if result is None:  # between the spool and its receipt, or damaged: running it again loses nothing
            return None
        model, rows = result
        copied = replace(
            model,
            **facts,
            repo=row.repo,
            sha=row.sha,
            copy_of_repo=model.copy_of_repo or model.repo,
            copy_of_sha=model.copy_of_sha or model.sha,
            bytes=size,
            **{f"seconds_{phase}": 0.0 for phase in contents.computed},
        )
        if getattr(copied, contents.counted) != rows.num_rows:
            return None
        for name, value in (("repo", row.repo), ("sha", row.sha)):
            rows = rows.set_column(rows.schema.get_field_index(name), name, [[value] * rows.num_rows])
        return ItemResult.success(copied, rows.cast(contents.rows_schema))

    # The end of the machine

    def _check(self) -> None:
        """Raise where what has not begun to compute is to be handed back."""
        if self._drain.noticed:
            raise _LeavingError

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._check()
            time.sleep(min(0.2, seconds))

    def _leave(self, seconds: float) -> None:
        """Hand back what does not compute yet at once, and the rest shortly before the end."""
        end, last = time.monotonic() + seconds, min(5.0, seconds / 3)
        for process in self._every:
            if process is not self._busy:
                process.close()  # which may take half a second
        time.sleep(max(0.0, end - last - time.monotonic()))
        for process in self._every:
            process.close()
        # Some may still wait: for the Hub's next piece, or for a store that refuses.
        time.sleep(max(0.0, end - last / 2 - time.monotonic()))
        self._end.set_result(None)


Outcome = tuple[ItemResult, ItemReport]


@dataclass(frozen=True)
class Workers:
    """Makes actors, and ends them."""

    make: Callable[[], Worker]
    end: Callable[[Worker], None]


def workers(kind: type[ItemWorker[Any, Any]], spec: WorkerSpec, coordinator: CoordinatorHandle) -> Workers:
    """Actors of one class that share a coordinator (`cluster.probing.coordinator`)."""
    settings = spec.settings
    actor = ray.remote(kind).options(
        num_cpus=settings.cpus_per_worker,
        num_gpus=settings.gpus_per_worker,
        **own_nodes(),
        max_restarts=0,
        max_task_retries=0,
        # One more than are in flight: `ready`, and whatever Ray itself asks.
        max_concurrency=settings.in_flight + 1,
    )

    identities: dict[Worker, str] = {}

    def make() -> Worker:
        identity = secrets.token_hex(8)
        worker = cast("Worker", actor.remote(spec, coordinator, identity))
        identities[worker] = identity
        return worker

    def end(worker: Worker) -> None:
        kill(worker)
        coordinator.worker_lost.remote(identities.pop(worker))

    return Workers(make, end)

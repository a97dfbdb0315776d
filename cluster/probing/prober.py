"""The probing actor: downloads a model, has it run on its probes in a confined process, writes what was seen.

    download --> load --> prepare probes --> forward --> write
    (this process)  (a model process: no token, no network)  (this process)

Several calls of `Prober.run` are under way at once (``in_flight``): their downloads overlap with everything, two
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
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import ray

from cluster.probing.coordinator import Claim, CoordinatorClient, CoordinatorHandle, Original
from cluster.probing.drain import Drain
from cluster.probing.results import ItemReport, Requeued
from cluster.probing.scheduler import Worker, kill
from cluster.runtime.node import memory_share, own_nodes
from cluster.runtime.scratch import local_probes, own_downloads, scratch_folder
from cluster.runtime.settings import WorkerSettings
from probelog import logs
from probelog.errors import FailureReason, ItemFailure, StoreError
from probelog.hub.client import HubClient
from probelog.hub.download import Downloaded, DownloadLimits, download_model
from probelog.hub.usage import METER, HubUsage
from probelog.models.content import content_digest
from probelog.sandbox.process import ModelProcess, PlanCache, fork_server
from probelog.sandbox.spec import ProcessSpec
from probelog.storage.encoding import short_key
from probelog.storage.ledger import ItemResult, Ledger
from probelog.storage.schemas import OBSERVATIONS, CatalogueRow, Failure, ProbedModel, from_table
from probelog.storage.store import Store, retry_with_backoff

_STAGE = "probe"
#: One loads while the other computes.
_PROCESSES = 2
# Two live side by side, mostly not at their largest at the same moment.
_PROCESS_SHARE = 0.6
_NODE_SHARE = 0.9
#: A model may lose its process so often before it is given up: once may have been bad luck.
_LOSSES = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProberSpec:
    """What a probing actor needs to know. Small, and free of anything that does not survive a restart.

    Attributes:
        store: its address.
        folder: of the ledger.
        probe_set: its hash.
        probes: how many it holds.
        fraction: of them that each model sees.
        seed: of each model's own ones.
        endpoint: the Hub's address, with the user and password that it may take (left out where a spec is shown).
        max_bytes: largest download of one model.
        max_params: largest number of parameters of one.
        settings: how it works, and what it may use.
        log_level: of the command.
    """

    store: str
    folder: str
    probe_set: str
    probes: int
    fraction: float
    seed: int
    endpoint: str = field(repr=False)
    max_bytes: int
    max_params: int
    settings: WorkerSettings
    log_level: str = logs.LogLevel.WARNING


class Item(Protocol):
    """One model to probe: its key in the ledger, its catalogue row, and which attempt this is."""

    @property
    def key(self) -> str: ...
    @property
    def row(self) -> CatalogueRow: ...
    @property
    def attempt(self) -> int: ...


class _LeavingError(Exception):
    """The machine goes away before the item is done."""


@dataclass
class _Clock:
    """Seconds of one item by part; only those of model processes count against its time limit."""

    limit: float
    seconds: dict[str, float] = field(default_factory=dict)
    used: float = 0.0

    @contextmanager
    def part(self, name: str, counts: bool = False) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - begun
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self.used += spent if counts else 0.0

    @property
    def remaining(self) -> float:
        return max(0.0, self.limit - self.used)


class Prober:
    """Probes models. ``run`` may be called from ``in_flight`` threads at once."""

    def __init__(self, spec: ProberSpec, coordinator: CoordinatorHandle, identity: str) -> None:
        """``identity``: how the coordinator tells this worker from others."""
        logs.configure(spec.log_level)
        self._spec, settings = spec, spec.settings
        self._settings = settings
        self._drain = Drain(settings.drain_seconds, self._leave)
        self._coordinator = CoordinatorClient(coordinator, spec.endpoint, self._check)
        store = Store(spec.store)
        self._ledger = Ledger(store, spec.folder)
        scratch = scratch_folder(settings.scratch)
        self._own = own_downloads(scratch)
        local = local_probes(store, spec.probe_set, scratch)
        self._server = fork_server(scratch, settings.preload, settings.device)
        memory = settings.memory_per_worker
        if memory is None:
            memory = int(memory_share(settings.cpus_per_worker, settings.gpus_per_worker) * _NODE_SHARE)
        process = ProcessSpec(
            probes=local.uri,
            probe_set=spec.probe_set,
            scratch=str(scratch),
            cache_bytes=settings.cache_bytes,
            device=settings.device,
            device_share=min(1.0, settings.gpus_per_worker) * _NODE_SHARE * _PROCESS_SHARE,
            memory_bytes=int(memory * _PROCESS_SHARE),
            threads=max(1, int(settings.cpus_per_worker)),
            batch_size=settings.batch_size,
            precision=settings.precision,
            max_params=spec.max_params,
            allow_pickle=settings.allow_pickle,
        )
        self._processes: queue.SimpleQueue[ModelProcess] = queue.SimpleQueue()
        learnt = PlanCache()
        self._every = [ModelProcess(self._server, process, learnt=learnt) for _ in range(_PROCESSES)]
        for one in self._every:
            self._processes.put(one)
        self._hub = HubClient(spec.endpoint, limiter=self._coordinator)
        self._reporting = threading.Lock()
        self._reported = METER.total
        self._computing = threading.Lock()
        self._busy: ModelProcess | None = None
        self._threads = ThreadPoolExecutor(settings.in_flight)
        self._end: Future[None] = Future()
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._id = identity

    def ready(self) -> str:
        """Returns when the actor can work: the node it is on."""
        return str(ray.get_runtime_context().get_node_id())

    def run(self, item: Item) -> ItemReport | Requeued:
        """Probe one model and spool its result; nothing that the model does makes this raise.

        When the machine goes away it returns in time, whatever the item is waiting for.
        """
        done = self._threads.submit(self._attempt, item)
        either: list[Future[Any]] = [done, self._end]
        wait(either, return_when=FIRST_COMPLETED)
        return done.result() if done.done() else Requeued()

    def _attempt(self, item: Item) -> ItemReport | Requeued:
        row = item.row
        clock = _Clock(self._settings.item_seconds)
        report = ItemReport(worker=self._name)
        try:
            self._check()
            result, report = self._probe(item, clock)
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
            failure_row = Failure.of(row.repo, row.sha, _STAGE, reason, report.detail, item.attempt)
            result = ItemResult.failure(failure_row)
        with clock.part("write"):
            try:
                retry_with_backoff(
                    lambda: self._ledger.spool(item.key, result), self._settings.store_retry_seconds
                )
            except StoreError as error:
                # Handed back it would be probed and refused again, for ever. The driver tries to write the failure.
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

    def _probe(self, item: Item, clock: _Clock) -> tuple[ItemResult, ItemReport]:
        folder = self._own / item.key
        try:
            with clock.part("download"):
                downloaded = self._download(item.row, folder)
            return self._run(item, downloaded, clock)
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
                return download_model(
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

    def _run(self, item: Item, downloaded: Downloaded, clock: _Clock) -> tuple[ItemResult, ItemReport]:
        from probelog.sandbox.fork_server.client import ProcessLostError

        with clock.part("wait"):
            process = self._process()
        try:
            for losses in range(1, _LOSSES + 1):
                try:
                    return self._observe(process, item, downloaded, clock)
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
            self._processes.put(process)

    def _observe(
        self, process: ModelProcess, item: Item, downloaded: Downloaded, clock: _Clock
    ) -> tuple[ItemResult, ItemReport]:
        from probelog.probes.probe_set import subset
        from probelog.storage.observations import to_rows

        row, spec = item.row, self._spec
        with clock.part("load", counts=True):
            loaded = process.load(downloaded.folder, row.repo, row.sha, clock.remaining)
            # Its process may be the model's, and say that it is another one.
            identity = short_key(loaded.identity, content_digest(downloaded.folder, downloaded.digests))
        # As the worker sees it, like the other parts: with the start of the model's process.
        facts = loaded.facts | {"seconds_load": clock.seconds["load"], "identity": identity}
        size = downloaded.bytes
        with clock.part("wait"):
            claim = self._claim(identity, item)
        try:
            original = claim.original
            if original is not None and (copied := self._copy(original, row, facts, size)) is not None:
                process.release()
                return copied, self._report(facts, size, original.repo)
            chosen = subset(spec.probe_set, row.repo, row.sha, spec.seed, spec.fraction, spec.probes)
            with clock.part("preprocess", counts=True):
                process.prepare(chosen.tolist(), clock.remaining)
            with clock.part("wait"):
                self._computing.acquire()
            try:
                self._busy = process
                self._check()
                with clock.part("forward", counts=True):
                    seen = process.observe(chosen.tolist(), int(facts["logits"]), clock.remaining)
            finally:
                self._busy = None
                self._computing.release()
            process.release()
            model = ProbedModel(
                **facts,
                repo=row.repo,
                sha=row.sha,
                probes=chosen.tolist(),
                precision=seen.precision,
                batch_size=seen.batch_size,
                bytes=size,
                seconds_download=clock.seconds["download"],
                seconds_preprocess=clock.seconds["preprocess"],
                seconds_forward=clock.seconds["forward"],
            )
            rows = to_rows(row.repo, row.sha, seen.values)
        except BaseException:
            self._coordinator.give_up(identity, item.key)
            raise
        report = replace(self._report(facts, size, None), copies_checked=claim.answered)
        return ItemResult.success(model, rows, loaded.weights), report

    def _report(self, facts: dict[str, Any], size: int, copy_of: str | None) -> ItemReport:
        return ItemReport(
            bytes=size,
            logits=int(facts["logits"]),
            parameters=int(facts["parameters"]),
            identity=str(facts["identity"]),
            copy_of=copy_of,
            worker=self._name,
        )

    def _process(self) -> ModelProcess:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._processes.get(timeout=1.0)
            self._check()

    # Copies

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
        """The original's observations under this repository's name; None where they cannot be found."""
        result = None
        spooled = None if original.item is None else self._ledger.spooled_result(original.item)
        if spooled is not None and spooled.models.num_rows == 1:
            result = from_table(spooled.models, ProbedModel)[0], spooled.rows
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
            seconds_preprocess=0.0,
            seconds_forward=0.0,
        )
        if copied.logits != rows.num_rows:
            return None
        for name, value in (("repo", row.repo), ("sha", row.sha)):
            rows = rows.set_column(rows.schema.get_field_index(name), name, [[value] * rows.num_rows])
        return ItemResult.success(copied, rows.cast(OBSERVATIONS))

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


@dataclass(frozen=True)
class Probers:
    """Makes probing actors, and ends them."""

    make: Callable[[], Worker]
    end: Callable[[Worker], None]


def probers(spec: ProberSpec, coordinator: CoordinatorHandle) -> Probers:
    """Probing actors that share a coordinator (`cluster.probing.coordinator`)."""
    settings = spec.settings
    actor = ray.remote(Prober).options(
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
        prober = cast("Worker", actor.remote(spec, coordinator, identity))
        identities[prober] = identity
        return prober

    def end(prober: Worker) -> None:
        kill(prober)
        coordinator.worker_lost.remote(identities.pop(prober))

    return Probers(make, end)

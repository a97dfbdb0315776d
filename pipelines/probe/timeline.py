"""How the wall time of one run of the probe stage compares with the work done in it: a small object in the store.

The sidecar rows of models say how long each part of each one took, but not how far parts overlapped, how long the
workers took to start, or how long they waited for each other. A plan for more models needs both.
"""

from __future__ import annotations

import datetime as dt
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from cluster.probing.results import ItemReport
from pipelines.config.model import Config
from probelog.storage.ledger import Ledger

#: Parts of a model's time in which a worker is busy with it. Downloads happen beside them.
BUSY = ("load", "preprocess", "forward")


@dataclass(frozen=True)
class Run:
    """One run of the probe stage that came to its end.

    Attributes:
        at: when it ended (UTC, ISO 8601).
        models: that were indexed; ``failed``: that were not.
        workers: processes that did something.
        cpus_per_worker, gpus_per_worker, in_flight: as configured.
        start_seconds: from the start of the stage until the first model was begun.
        wall_seconds: from then until the last one was through.
        busy_seconds: sum of the times that the indexed models took to load, preprocess and compute.
        bytes: downloaded.
    """

    at: str
    models: int
    failed: int
    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    in_flight: int
    start_seconds: float
    wall_seconds: float
    busy_seconds: float
    bytes: int
    version: int = 1

    @property
    def overlap(self) -> float:
        """Busy seconds a second of a worker's time: over 1 where parts overlap, below where workers wait."""
        return self.busy_seconds / (self.workers * self.wall_seconds)


class Timeline:
    """Follows one run."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        """The stage starts now."""
        self._config, self._clock = config, clock
        self._created = clock()
        self._begun = self._ended = float("inf")
        self._workers: set[str] = set()
        self._count: Counter[str] = Counter()
        self._busy = 0.0

    def add(self, report: ItemReport) -> None:
        """One model is through now."""
        self._ended = self._clock()
        self._begun = min(self._begun, self._ended - sum(report.seconds.values()))
        if report.worker:
            self._workers.add(report.worker)
        self._count["bytes"] += report.bytes
        if report.reason is not None:
            self._count["failed"] += 1
            return
        self._count["models"] += 1
        self._busy += sum(report.seconds.get(part, 0.0) for part in BUSY)

    def run(self) -> Run | None:
        """What was seen; None where no model was indexed."""
        if not self._count["models"] or self._ended <= self._begun:
            return None
        begun = max(self._begun, self._created)
        return Run(
            at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            models=self._count["models"],
            failed=self._count["failed"],
            workers=max(1, len(self._workers)),
            cpus_per_worker=self._config.cpus_per_worker,
            gpus_per_worker=self._config.gpus_per_worker,
            in_flight=self._config.in_flight,
            start_seconds=begun - self._created,
            wall_seconds=max(self._ended - begun, 1e-3),
            busy_seconds=self._busy,
            bytes=self._count["bytes"],
        )

    def write(self, ledger: Ledger) -> None:
        """Keep it beside the ledger."""
        run = self.run()
        if run is not None:
            stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S%f")
            ledger.store.write_json(ledger.paths.run(stamp), asdict(run))


def read_runs(ledger: Ledger) -> Sequence[Run]:
    """The runs of a ledger that came to their end, oldest first."""
    names = ledger.store.names(ledger.paths.runs, suffix=".json")
    contents = [ledger.store.read_json(name) for name in names]
    return [Run(**content) for content in contents if content.get("version") == 1]

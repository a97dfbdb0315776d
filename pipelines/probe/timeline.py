"""Wall time of a run of a stage compared with the work done in it: a small object in the store.

The rows of models in the ledger have the time that each phase of each model took, but not how far phases overlapped,
how long the workers took to start, or how long they waited for each other. A forecast needs both.
"""

from __future__ import annotations

import datetime as dt
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from cluster.probing.results import ItemReport
from pipelines.config.model import Config
from probelog.storage.ledger import PROBED, Contents, Ledger


def busy_phases(contents: Contents) -> tuple[str, ...]:
    """Parts of a model's time in which a worker is busy with it. Downloads happen beside them."""
    return ("load", *contents.computed)


@dataclass(frozen=True)
class Run:
    """A finished run of a stage.

    Attributes:
        at: when it ended (UTC, ISO 8601).
        models: number of models that were indexed.
        failed: number of models that failed.
        workers: number of processes that ran a model.
        cpus_per_worker: as configured.
        gpus_per_worker: as configured.
        in_flight: as configured.
        start_seconds: from the start of the stage to the start of the first model.
        wall_seconds: from then to the end of the last model.
        busy_seconds: sum of the times that the indexed models took to load and compute, and what goes with that.
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
        """Busy seconds per second of a worker's time: above 1 where phases overlap, below where workers wait."""
        return self.busy_seconds / (self.workers * self.wall_seconds)


class Timeline:
    """Measures one run of a stage."""

    def __init__(
        self, config: Config, contents: Contents = PROBED, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the measurement at the start of the stage."""
        self._config, self._clock = config, clock
        self._phases = busy_phases(contents)
        self._created = clock()
        self._begun = self._ended = float("inf")
        self._workers: set[str] = set()
        self._count: Counter[str] = Counter()
        self._busy = 0.0

    def add(self, report: ItemReport) -> None:
        """Add a model that has just ended."""
        self._ended = self._clock()
        self._begun = min(self._begun, self._ended - sum(report.seconds.values()))
        if report.worker:
            self._workers.add(report.worker)
        self._count["bytes"] += report.bytes
        if report.reason is not None:
            self._count["failed"] += 1
            return
        self._count["models"] += 1
        self._busy += sum(report.seconds.get(part, 0.0) for part in self._phases)

    def run(self) -> Run | None:
        """The measured run; None where no model was indexed."""
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
        """Write the run's record into the ledger's folder."""
        run = self.run()
        if run is not None:
            stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S%f")
            ledger.store.write_json(ledger.paths.run(stamp), asdict(run))


def read_runs(ledger: Ledger) -> Sequence[Run]:
    """The finished runs of a ledger, oldest first."""
    names = ledger.store.names(ledger.paths.runs, suffix=".json")
    contents = [ledger.store.read_json(name) for name in names]
    return [Run(**content) for content in contents if content.get("version") == 1]

"""What a forecast says: numbers with the interval that the measurements leave them, as plain records."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from probelog.arrays import Floats

_INTERVAL = (0.1, 0.9)


@dataclass(frozen=True)
class Estimate:
    """A number, and the middle 80 % of what it may be; None where too little was measured to say."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, draws: Floats) -> Estimate:
        """From the point estimate and the draws behind it."""
        if len(draws) == 1 or not np.isfinite(draws).all():
            return cls(float(draws[0]))
        low, high = np.quantile(draws[1:], _INTERVAL)
        return cls(float(draws[0]), float(min(low, draws[0])), float(max(high, draws[0])))

    def __add__(self, exact: float) -> Estimate:
        return Estimate(
            self.value + exact,
            None if self.low is None else self.low + exact,
            None if self.high is None else self.high + exact,
        )

    def times(self, factor: float) -> Estimate:
        """In another unit."""
        return Estimate(
            self.value * factor,
            None if self.low is None else self.low * factor,
            None if self.high is None else self.high * factor,
        )


@dataclass(frozen=True)
class SizeClass:
    """Models left of one class: how many, how many of them of estimated size, bytes to download, worker hours."""

    name: str
    models: int
    size_estimated: int
    download_bytes: float
    worker_hours: float


@dataclass(frozen=True)
class Chosen:
    """What a cost was fitted on, and its error on measured models left out. ``architecture_factors``: never."""

    features: list[str]
    left_out_error: float | None
    architecture_factors: bool = False


@dataclass(frozen=True)
class Wall:
    """Seconds that a run takes at the least by each limit; the largest decides (``bound``)."""

    workers: int
    compute: Estimate
    requests: Estimate
    download: Estimate
    total: Estimate
    bound: str
    start_seconds: float
    overlap: float | None


@dataclass(frozen=True)
class Cost:
    """What the workers are paid for: ``hours`` of workers, or of GPUs (``unit``)."""

    unit: str
    hours: Estimate
    price: float | None
    total: Estimate | None


@dataclass(frozen=True)
class Left:
    """The forecast for the models that are left.

    Attributes:
        models: how many are left.
        indexed: of them with success.
        failures: by reason; those that the catalogue foretells are whole numbers.
        foretold: how many of the failures the catalogue foretells.
        bytes: of downloads.
        sizes: how many models' bytes follow from listed file sizes, from parameter counts by type, from the number
            of parameters, or from nothing.
        file_requests, api_requests: of the Hub.
        limit_hours: that the Hub's limits allow at the least, by kind of account.
        seconds: by part, summed over models.
        busy_hours: of workers, parts summed as if nothing overlapped.
        worker_hours: the same with the measured overlap.
        classes: by size.
        logits: of the models indexed; of generators: their samples.
        store_bytes: by kind.
        disk_bytes: on a node, by what takes it.
        chosen: by cost.
    """

    models: int
    indexed: Estimate
    failures: dict[str, float]
    foretold: int
    bytes: Estimate
    sizes: dict[str, int]
    file_requests: Estimate
    api_requests: int
    limit_hours: dict[str, float]
    seconds: dict[str, Estimate]
    busy_hours: Estimate
    worker_hours: Estimate
    classes: list[SizeClass]
    logits: Estimate
    store_bytes: dict[str, Estimate]
    disk_bytes: dict[str, float]
    wall: Wall
    cost: Cost
    chosen: dict[str, Chosen]


@dataclass(frozen=True)
class Basis:
    """What a forecast rests on: which ledger, how many of its models, on which devices, and what to mind.

    ``probes`` and ``fraction`` are those of classifiers.
    """

    source: str
    ledger: str
    models: int
    failures: int
    runs: int
    devices: dict[str, int]
    probes: int | None
    fraction: float | None
    notes: list[str]


@dataclass(frozen=True)
class Done:
    """What the ledger holds already. ``store_bytes`` are those of its own sealed parts."""

    models: int
    failed: dict[str, int]
    bytes: int
    file_requests: int
    busy_hours: float
    logits: int
    store_bytes: int


@dataclass(frozen=True)
class Forecast:
    """What a full run takes: what is done, what is left, and both together.

    ``generators`` is the same of these, where a job wants them and some are listed. Without classifiers the whole is of
    generators.
    """

    catalogue: int
    basis: Basis
    done: Done
    left: Left
    whole: dict[str, Estimate]
    generators: Forecast | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

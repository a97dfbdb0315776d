"""The sums of a ledger's receipts in one small object, so that readers need not read thousands of receipts.

It is only a cache: it names the receipts that it covers, and a reader adds the others; a cache that names a missing
receipt is ignored. It covers only receipts whose spool was deleted.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from probelog.errors import StoreError
from probelog.storage.checksummed_json import sealed_json
from probelog.storage.ledger import Counts, Ledger, Receipt

_WRITE_SECONDS = 10.0
_HOUR = 3600.0


@dataclass(frozen=True)
class Running:
    """Progress that a driver reported.

    Attributes:
        at: when (seconds since 1970).
        left: number of remaining models.
        models_an_hour: rate; None while unknown.
        eta_seconds: estimated time to the end; None while unknown.
    """

    at: float
    left: int
    models_an_hour: float | None
    eta_seconds: float | None

    @classmethod
    def now(cls, left: int, models_an_hour: float | None, eta_seconds: float | None) -> Running:
        """The progress at the present time."""
        return cls(time.time(), left, models_an_hour, eta_seconds)


@dataclass
class Summary:
    """Sums over receipts. ``sealed``: time (seconds since 1970) and number of items of each receipt, by name."""

    counts: Counts = field(default_factory=Counts)
    sealed: dict[str, tuple[float, int]] = field(default_factory=dict)
    running: Running | None = None
    _written: float = field(default=float("-inf"), repr=False)

    @classmethod
    def read(cls, ledger: Ledger) -> tuple[Summary, list[Receipt]]:
        """The sums of all present receipts, and the receipts that had to be read for them."""
        names = ledger.receipt_names()
        cached = cls.stored(ledger)
        if not cached.sealed.keys() <= set(names):
            cached = cls()
        missing = ledger.receipts(name for name in names if name not in cached.sealed)
        cached.add(missing)
        return cached, missing

    @classmethod
    def covering(cls, ledger: Ledger, receipts: Sequence[Receipt]) -> Summary:
        """The sums of all present receipts, which have been read already."""
        cached = cls.stored(ledger)
        if not cached.sealed.keys() <= {receipt.name for receipt in receipts}:
            cached = cls()
        missing = [receipt for receipt in receipts if receipt.name not in cached.sealed]
        cached.add(missing)
        return cached

    @classmethod
    def stored(cls, ledger: Ledger) -> Summary:
        """The sums as they are stored, which may be some receipts behind; empty where they are not there."""
        try:
            content = ledger.store.read_json_or_none(ledger.paths.summary) or {}
            if content.get("version") != 1:
                return cls()
            return cls(
                Counts(**content["counts"]),
                {name: (at, items) for name, (at, items) in content["sealed"].items()},
                Running(**content["running"]) if content["running"] else None,
            )
        except (StoreError, ValueError, KeyError, TypeError):
            return cls()

    def add(self, receipts: Sequence[Receipt]) -> None:
        """Add receipts."""
        for receipt in receipts:
            self.counts += receipt.counts
            self.sealed[receipt.name] = (
                dt.datetime.fromisoformat(receipt.at).timestamp(),
                len(receipt.items),
            )

    def write(self, ledger: Ledger, running: Running | None = None, now: bool = False) -> None:
        """Write the summary, at most every ten seconds. A refused write is no error: the summary only saves time."""
        if not now and time.monotonic() - self._written < _WRITE_SECONDS:
            return
        self._written = time.monotonic()
        self.running = running
        content: Mapping[str, Any] = {
            "version": 1,
            "counts": asdict(self.counts),
            "sealed": self.sealed,
            "running": asdict(running) if running else None,
        }
        with contextlib.suppress(StoreError):
            ledger.store.write(ledger.paths.summary, sealed_json(content, indent=None))

    @property
    def models_an_hour(self) -> float | None:
        """Rate over the last hour of work; None with fewer than two receipts."""
        ordered = sorted(self.sealed.values())
        if len(ordered) < 2:
            return None
        end = ordered[-1][0]
        # The receipt before the hour began, so that the hour is whole.
        start = max((number for number, (at, _) in enumerate(ordered) if at <= end - _HOUR), default=0)
        seconds = end - ordered[start][0]
        return sum(items for _, items in ordered[start + 1 :]) / seconds * _HOUR if seconds > 0 else None

"""What this process asks of the Hub, counted for the figures of runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from probelog.hub.rate_limit import Kind


@dataclass(frozen=True)
class HubUsage:
    """Requests by kind, how many of them were answered "too many requests", and seconds of waiting.

    Waits are those for the rate limit and between attempts; threads that wait at the same time add up.
    """

    api: int = 0
    file: int = 0
    throttled: int = 0
    wait_seconds: float = 0.0

    def __add__(self, other: HubUsage) -> HubUsage:
        return HubUsage(
            self.api + other.api,
            self.file + other.file,
            self.throttled + other.throttled,
            self.wait_seconds + other.wait_seconds,
        )

    def __sub__(self, other: HubUsage) -> HubUsage:
        return self + HubUsage(-other.api, -other.file, -other.throttled, -other.wait_seconds)


class UsageMeter:
    """Adds up what all threads of a process ask."""

    def __init__(self) -> None:
        self._total = HubUsage()
        self._lock = threading.Lock()

    @property
    def total(self) -> HubUsage:
        """Everything so far."""
        return self._total

    def add(self, usage: HubUsage) -> None:
        """Count something."""
        with self._lock:
            self._total += usage

    def request(self, kind: Kind) -> None:
        """Count a request."""
        self.add(HubUsage(api=1) if kind == "api" else HubUsage(file=1))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time that a block takes as waiting."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.add(HubUsage(wait_seconds=time.monotonic() - begun))


#: Of this process.
METER = UsageMeter()

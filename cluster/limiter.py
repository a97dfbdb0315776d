"""One rate limit for the Hub, shared by all workers of a job: the Hub counts per account, not per process."""

from __future__ import annotations

from typing import Any, Literal

import ray

Kind = Literal["api", "file"]


@ray.remote(num_cpus=0)
class LimiterActor:
    """Hands out reservations from one token bucket."""

    def __init__(self, bucket: Any) -> None:
        self._bucket = bucket

    def reserve(self, kind: Kind) -> float:
        """Take one request of a kind; returns how many seconds the caller must wait before it sends it."""
        return float(self._bucket.reserve(kind))

    def penalise(self, kind: Kind, seconds: float) -> None:
        """The Hub refused a request: nobody sends another of this kind for so many seconds."""
        self._bucket.penalise(kind, seconds)

"""One rate limit for the Hub, shared by all workers of a job: the Hub counts per account, not per process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import ray

from cluster.runtime.node import driver_node_affinity
from probelog.hub.rate_limit import SlidingWindowLimit

Kind = Literal["api", "file"]


class Limit:
    """An actor's state: one token bucket. Calls return at once, so that no worker blocks another."""

    def __init__(self, endpoint: str, with_token: bool) -> None:
        self._bucket = SlidingWindowLimit.for_endpoint(endpoint, with_token=with_token)

    def try_acquire(self, kind: Kind) -> float:
        """Take a token and return 0, or say in how many seconds to ask again."""
        return self._bucket.try_acquire(kind)

    def penalise(self, kind: Kind, seconds: float) -> None:
        """The Hub refused a request: nobody sends another of this kind for so many seconds."""
        self._bucket.penalise(kind, seconds)


def start_limit(endpoint: str, with_token: bool) -> Any:
    """The actor, on the driver's node."""
    return ray.remote(num_cpus=0)(Limit).options(**driver_node_affinity()).remote(endpoint, with_token)


class SharedLimiter:
    """A worker's side of the shared limit (``probelog.hub.rate_limit.Limiter``).

    ``check`` is called before every request and while waiting; what it raises ends the waiting.
    """

    def __init__(self, actor: Any, check: Callable[[], None]) -> None:
        self._actor, self._check = actor, check
        self._waited = threading.local()

    @property
    def waited(self) -> float:
        """Seconds that this thread has waited in all."""
        return float(getattr(self._waited, "seconds", 0.0))

    def acquire(self, kind: Kind) -> None:
        """Return when one more request of this kind may be sent."""
        begun = time.monotonic()
        self._check()
        while (pause := float(ray.get(self._actor.try_acquire.remote(kind)))) > 0:
            self._check()
            time.sleep(min(pause, 1.0))
        self._waited.seconds = self.waited + time.monotonic() - begun

    def penalise(self, kind: Kind, seconds: float) -> None:
        """Tell all workers that the Hub asked for a pause."""
        ray.get(self._actor.penalise.remote(kind, seconds))

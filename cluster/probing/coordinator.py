"""The coordinator: one actor with the state that all workers of a job share, rate limit of the Hub and copy detection.

The Hub counts requests per account, not per process. And a large part of a Hub are re-uploads: copies are recorded,
not run again. Of two copies in flight at the same time (they sort next to each other) only one must run: the first
worker to ask claims the identity, the others wait for its result.

A job continues without its coordinator: then every model is run, and each worker keeps the rate limit by itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import ray

from cluster.runtime.node import driver_node_affinity
from probelog.hub.rate_limit import Kind, SlidingWindowLimit

_ANSWER_SECONDS = 60.0

# A `Coordinator`'s handle. Ray's own type for handles declares their methods as `Never`.
CoordinatorHandle: TypeAlias = Any


@dataclass(frozen=True)
class Original:
    """The first model with some weights, and the place of its observations: the spool (``item``) or a receipt's parts."""

    repo: str
    sha: str
    item: str | None = None
    receipt: str | None = None


@dataclass(frozen=True)
class Claim:
    """The answer to `Originals.claim`.

    Attributes:
        original: whose observations to copy; None: run the model, unless ``wait``.
        wait: whether another worker runs the same weights now.
        answered: whether the coordinator answered.
    """

    original: Original | None = None
    wait: bool = False
    answered: bool = True


@dataclass(frozen=True)
class _Holder:
    """The holder of a claim: item, worker, and time of the claim."""

    item: str
    worker: str
    since: float


class Originals:
    """The first model with each weights. A claim ends with its worker, or after ``claim_seconds``."""

    def __init__(self, known: Mapping[str, Original], claim_seconds: float) -> None:
        """``known``: the originals of earlier runs, by identity."""
        self._known = dict(known)
        self._claim_seconds = claim_seconds
        self._claimed: dict[str, _Holder] = {}
        self._of_item: dict[str, str] = {}

    def claim(self, identity: str, item: str, worker: str) -> Claim:
        """Claim an identity for an item: returns its original, or whether to wait; otherwise the caller runs the model."""
        original = self._known.get(identity)
        if original is not None:
            return Claim(original)
        holder = self._claimed.get(identity)
        if (
            holder is not None
            and holder.item != item
            and time.monotonic() - holder.since < self._claim_seconds
        ):
            return Claim(wait=True)
        self._claimed[identity] = _Holder(item, worker, time.monotonic())
        return Claim()

    def give_up(self, identity: str, item: str) -> None:
        """End the claim of an item that failed: the next copy may run."""
        holder = self._claimed.get(identity)
        if holder is not None and holder.item == item:
            del self._claimed[identity]

    def worker_lost(self, worker: str) -> None:
        """End all claims of a lost worker: its items may be queued behind those that wait for them."""
        self._claimed = {
            identity: holder for identity, holder in self._claimed.items() if holder.worker != worker
        }

    def record_original(self, identity: str, repo: str, sha: str, item: str) -> None:
        """Record an item whose observations are in the spool as the original of its identity."""
        self._claimed.pop(identity, None)
        self._known.setdefault(identity, Original(repo, sha, item=item))
        self._of_item[item] = identity

    def sealed(self, receipt: str, items: list[str]) -> None:
        """Record that the observations of items have moved from the spool into the parts of a receipt."""
        for item in items:
            identity = self._of_item.pop(item, None)
            if identity is not None:
                old = self._known[identity]
                self._known[identity] = Original(old.repo, old.sha, receipt=receipt)


class Coordinator(Originals):
    """The actor's state. Calls return at once, so that no worker blocks another."""

    def __init__(
        self, endpoint: str, with_token: bool, known: Mapping[str, Original], claim_seconds: float
    ) -> None:
        super().__init__(known, claim_seconds)
        self._limit = SlidingWindowLimit.for_endpoint(endpoint, with_token=with_token)

    def try_acquire(self, kind: Kind) -> float:
        """Take a token of the rate limit and return 0, or return the seconds after which to ask again."""
        return self._limit.try_acquire(kind)

    def penalise(self, kind: Kind, seconds: float) -> None:
        """Stop all requests of a kind for ``seconds``, because the Hub refused one."""
        self._limit.penalise(kind, seconds)


@contextmanager
def coordinator(
    endpoint: str, known: Mapping[str, Original], claim_seconds: float
) -> Iterator[CoordinatorHandle]:
    """The actor, on the driver's node, for as long as the block runs."""
    actor: CoordinatorHandle = (
        ray.remote(num_cpus=0)(Coordinator)
        .options(**driver_node_affinity())
        .remote(endpoint, _with_token(), dict(known), claim_seconds)
    )
    try:
        yield actor
    finally:
        ray.kill(actor)


class CoordinatorClient:
    """A worker's side; also its limiter for the Hub (`probelog.hub.rate_limit.Limiter`).

    ``check`` is called before every request to the Hub and while waiting; what it raises ends the waiting.
    """

    def __init__(self, actor: CoordinatorHandle, endpoint: str, check: Callable[[], None]) -> None:
        self._actor, self._check = actor, check
        self._own_limit = SlidingWindowLimit.for_endpoint(endpoint, with_token=_with_token())
        self._waited = threading.local()

    # The rate limit

    @property
    def waited(self) -> float:
        """Seconds that this thread has waited in all."""
        return float(getattr(self._waited, "seconds", 0.0))

    def acquire(self, kind: Kind) -> None:
        """Return when one more request of this kind may be sent."""
        begun = time.monotonic()
        self._check()
        while (pause := self._pause(kind)) > 0:
            self._check()
            time.sleep(min(pause, 1.0))
        self._waited.seconds = self.waited + time.monotonic() - begun

    def penalise(self, kind: Kind, seconds: float) -> None:
        """Tell all workers that the Hub asked for a pause."""
        self._own_limit.penalise(kind, seconds)
        self._ask("penalise", kind, seconds)

    def _pause(self, kind: Kind) -> float:
        pause = self._ask("try_acquire", kind)
        return float(pause) if isinstance(pause, int | float) else self._own_limit.try_acquire(kind)

    # Copies

    def claim(self, identity: str, item: str, worker: str) -> Claim:
        """Who has these weights? See `Originals.claim`."""
        claim = self._ask("claim", identity, item, worker)
        return claim if isinstance(claim, Claim) else Claim(answered=False)

    def give_up(self, identity: str, item: str) -> None:
        """See `Originals.give_up`."""
        self._ask("give_up", identity, item)

    def record_original(self, identity: str, repo: str, sha: str, item: str) -> None:
        """See `Originals.record_original`."""
        self._ask("record_original", identity, repo, sha, item)

    def _ask(self, method: str, *arguments: object) -> object:
        """The actor's answer; None where it is lost or does not answer."""
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=_ANSWER_SECONDS)
        except ray.exceptions.RayError:
            return None


def _with_token() -> bool:
    return bool(os.environ.get("HF_TOKEN"))

"""Which weights were met before, shared by all workers of a job: copies are recorded, not run again.

A large part of a Hub are re-uploads. Two that are in flight at the same time (they sort next to each other) must
not both run: the first to ask owns an identity, the others wait for its result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from cluster.runtime.node import driver_node_affinity


@dataclass(frozen=True)
class Original:
    """Where a model's observations are: below its item in the spool, or in the parts of a receipt once sealed."""

    repo: str
    sha: str
    item: str | None = None
    receipt: str | None = None


@dataclass(frozen=True)
class Claim:
    """The answer to `Originals.claim`: the original; nothing (the asker is to run the model); or to wait."""

    original: Original | None = None
    wait: bool = False


@dataclass(frozen=True)
class _Held:
    """A claim: for which item, by which worker, since when."""

    item: str
    worker: str
    since: float


class Originals:
    """An actor's state. A claim ends with the worker that holds it, or after ``patience`` seconds."""

    def __init__(self, known: Mapping[str, Original], patience: float) -> None:
        """``known``: what earlier runs met, by identity."""
        self._known = dict(known)
        self._patience = patience
        self._claimed: dict[str, _Held] = {}
        self._of_item: dict[str, str] = {}

    def claim(self, identity: str, item: str, worker: str) -> Claim:
        """Who has these weights? Without an answer they are the asker's to run."""
        found = self._known.get(identity)
        if found is not None:
            return Claim(found)
        held = self._claimed.get(identity)
        if held is not None and held.item != item and time.monotonic() - held.since < self._patience:
            return Claim(wait=True)
        self._claimed[identity] = _Held(item, worker, time.monotonic())
        return Claim()

    def give_up(self, identity: str, item: str) -> None:
        """The asker failed: the next one may try."""
        held = self._claimed.get(identity)
        if held is not None and held.item == item:
            del self._claimed[identity]

    def worker_gone(self, worker: str) -> None:
        """What a worker had claimed is anybody's: its items may be queued behind those that wait for them."""
        self._claimed = {identity: held for identity, held in self._claimed.items() if held.worker != worker}

    def found(self, identity: str, repo: str, sha: str, item: str) -> None:
        """The asker's observations are in the spool."""
        self._claimed.pop(identity, None)
        self._known.setdefault(identity, Original(repo, sha, item=item))
        self._of_item[item] = identity

    def sealed(self, receipt: str, items: list[str]) -> None:
        """The observations of these items have moved from the spool into the parts of a receipt."""
        for item in items:
            identity = self._of_item.pop(item, None)
            if identity is not None:
                old = self._known[identity]
                self._known[identity] = Original(old.repo, old.sha, receipt=receipt)


@contextmanager
def shared_originals(known: Mapping[str, Original], patience: float) -> Iterator[Any]:
    """The actor, on the driver's node, for as long as the block runs."""
    actor: Any = (
        ray.remote(num_cpus=0)(Originals).options(**driver_node_affinity()).remote(dict(known), patience)
    )
    try:
        yield actor
    finally:
        ray.kill(actor)

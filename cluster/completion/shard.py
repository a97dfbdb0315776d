"""A shard of a completion: the standardised rows of some models, which never leave it, and the sums over them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import ray

from cluster.completion.fit import Fit
from cluster.completion.rows import RowStore, StoredModel
from cluster.runtime.node import memory_share
from cluster.runtime.scratch import scratch_folder
from cluster.runtime.settings import WorkerSettings
from probelog import logs
from probelog.completion.als import (
    Bools,
    Float32,
    HeldOutError,
    SumsOverModels,
    SweepSums,
    held_out_error,
    held_positions,
    row_step,
    standardised,
)
from probelog.storage.ledger import Receipt, observed_models
from probelog.storage.schemas import ProbedModel
from probelog.storage.store import Store

# Of a worker's share of its machine, where no bound is set: the rest is for the operating system's cache of files.
_MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class ShardSpec:
    """What a shard needs to know beside its parts.

    Attributes:
        store: its address.
        seed: of the held-out entries.
        settings: what it may use: ``completion_memory`` and ``scratch``.
        working: bytes that a sweep takes beside the rows (``completion.working_bytes``).
        log_level: of the command.
        common: the probes that all models see; entries on others are held out (``als.held_positions``).
    """

    store: str
    seed: int
    settings: WorkerSettings
    working: int = 0
    log_level: str = logs.LogLevel.WARNING
    common: tuple[int, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """What shards hold: models, logits, constant logits dropped, and bytes of rows in memory and on disk."""

    models: int = 0
    logits: int = 0
    dropped: int = 0
    in_memory: int = 0
    on_disk: int = 0

    def __add__(self, other: Loaded) -> Loaded:
        return Loaded(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


class Shard:
    """The observations of some parts: an actor's state, and testable without Ray."""

    def __init__(self, spec: ShardSpec) -> None:
        logs.configure(spec.log_level)
        self._spec = spec
        memory = spec.settings.completion_memory
        if memory is None:
            memory = int(_MEMORY_SHARE * memory_share(1.0, 0.0))
        self._memory = max(0, memory - spec.working)
        self._scratch = scratch_folder(spec.settings.scratch)
        self._rows = RowStore(self._scratch, self._memory)
        self._sample: RowStore | None = None
        self._sampled = 1.0

    @ray.method
    def ready(self) -> None:
        """An answer says that the shard has its place."""

    def pid(self) -> int:
        """Of the process that it is in."""
        return os.getpid()

    @ray.method
    def load(self, receipts: Sequence[Receipt]) -> Loaded:
        """Read parts, once, and keep their rows beside those that are there already."""
        store = Store(self._spec.store)
        models = logits = dropped = 0
        held_before = self._rows.in_memory, self._rows.on_disk
        for receipt in receipts:
            for facts, _, values in observed_models(store, receipt):
                rows = standardised(np.asarray(facts.probes, np.int32), values)
                dropped += int(np.count_nonzero(~rows.kept))
                if rows.kept.any():
                    self._rows.add(_key(facts, self._spec.seed), rows.block)
                    models += 1
                    logits += len(rows.block.values)
        self._rows.settle()
        self._sample = None
        return Loaded(
            models,
            logits,
            dropped,
            self._rows.in_memory - held_before[0],
            self._rows.on_disk - held_before[1],
        )

    @ray.method
    def sums(self, columns: Float32, fit: Fit, held_out: bool) -> SweepSums:
        """One row step over all models, or over the training entries of a sample with the error on the others.

        The error is that of ``columns``, not of those that follow from the sums.
        """
        adder, error = SumsOverModels(fit.probes, fit.rank), HeldOutError(0.0, 0, 0.0, 0)
        for model, held in self._training(fit) if held_out else self._every():
            block = self._rows.widened(model)
            training = None if held is None else ~held
            factors = row_step(block, columns, fit.regularisation, training)
            adder.add(block, factors, training)
            if held is not None:
                error += held_out_error(block, held, factors, columns, fit.top_share)
        return SweepSums(adder.total(), error)

    def _every(self) -> Iterator[tuple[StoredModel, None]]:
        return ((model, None) for model in self._rows.models())

    def _training(self, fit: Fit) -> Iterator[tuple[StoredModel, Bools]]:
        """The sampled models and which of their probes are held out, the same for every fit of one choice."""
        for model in self._sampled_rows(fit.sample).models():
            generator = np.random.default_rng(model.key)
            if generator.random() < fit.sample and len(model.probes) > 1:
                own = ~np.isin(model.probes, self._spec.common)
                yield model, held_positions(own, fit.held_share, generator)

    def _sampled_rows(self, share: float) -> RowStore:
        """The rows of a sample on their own: a choice takes many sweeps, which need not walk through all rows."""
        if share >= 1:
            return self._rows
        if self._sample is None or self._sampled != share:
            free_bytes = max(0, self._memory - self._rows.in_memory)
            self._sample, self._sampled = RowStore(self._scratch, free_bytes), share
            for model in self._rows.models():
                if np.random.default_rng(model.key).random() < share:
                    self._sample.copy(model)
        return self._sample


def _key(facts: ProbedModel, seed: int) -> int:
    """Seed of a model's held-out entries: the same ones, whichever shard holds it."""
    key = hashlib.sha256(f"{seed}\n{facts.repo}\n{facts.sha}".encode()).digest()
    return int.from_bytes(key[:8], "little")


def partition_by_rows(receipts: Sequence[Receipt], shards: int) -> list[list[Receipt]]:
    """Receipts for each shard: the same ones every time, and about equally many rows.

    The largest first, each to the shard that holds least (Graham 1969): none holds a third more than the best deal.
    """
    groups: list[list[Receipt]] = [[] for _ in range(shards)]
    rows = [0] * shards
    for receipt in sorted(receipts, key=lambda receipt: (-receipt.observations.rows, receipt.name)):
        least = rows.index(min(rows))
        groups[least].append(receipt)
        rows[least] += receipt.observations.rows
    return [sorted(group, key=lambda receipt: receipt.name) for group in groups]

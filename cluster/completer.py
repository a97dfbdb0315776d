"""Sharded completion: the rows of a shard never leave it, only sums over probes travel.

Each shard holds the standardised observations of some models. In a sweep it runs its row step, adds up
``U^T U`` and ``U^T x`` for the probes that its models saw, and hands those sums to a tree of additions; the driver
solves the column step and sends the new columns out again (masked ALS, see ``probelog.completion``).

A shard can be lost with its machine: its parts are read again by another worker, and the sweep is repeated. A driver
can be lost: the columns are kept in the store after every sweep, and the next one goes on from there.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import (
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from cluster.node import memory_share
from cluster.rows import RowStore, StoredModel
from cluster.scratch import scratch_folder
from probelog.completion import (
    Bools,
    Float32,
    HeldOutError,
    SumsOverModels,
    SweepSums,
    column_step,
    held_out_error,
    held_positions,
    initial_columns,
    row_step,
    standardised,
)
from probelog.descriptors import describe
from probelog.errors import ProbeLogError
from probelog.ledger import Part, Receipt, observed_models, part_bytes
from probelog.matching import HeadSpace
from probelog.schemas import DESCRIPTORS, ProbedModel
from probelog.storage import Store, digest, npy

# Two sums at a time keep the driver and any one node at two matrices of (n, k, k).
_FAN_IN = 2
# Of a worker's share of its machine, where no bound is set: the rest is for the operating system's cache of files.
_MEMORY_SHARE = 0.5
# A sweep that loses workers so often one after the other has another reason than bad luck.
_LOSSES = 5
# After so many seconds without a place for a lost shard, the others take its parts.
_PLACE_SECONDS = 60.0
# Parts that are described at a time, for each CPU: one is under way while the next one is handed out.
_PARTS_IN_FLIGHT = 2
_LOST = (RayActorError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)

Result = TypeVar("Result")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """How a completion is fitted.

    Attributes:
        probes: n.
        rank, regularisation: of the factorisation.
        seed: of the start and of the held-out entries.
        held_share: share of each model's probes that is held out while choosing.
        top_share: share of a row that counts as its top entries (r / n).
        sweeps: at most so many.
        sample: share of the models that the choice is made on.
        tolerance: a sweep that lowers the held-out error by less than this share is the last one.
    """

    probes: int
    rank: int
    regularisation: float
    seed: int
    top_share: float
    held_share: float = 0.1
    sample: float = 1.0
    sweeps: int = 20
    tolerance: float = 1e-3


@dataclass(frozen=True)
class Fitted:
    """The result of a fit: columns V (n, k), the sweeps it took and, where entries were held out, their error."""

    columns: Float32
    sweeps: int
    error: HeldOutError | None


@dataclass(frozen=True)
class State:
    """Where a fit is: the sweeps done, the columns after them, and the best of the columns whose error is known."""

    fit: Fit
    held_out: bool
    sweep: int
    columns: Float32
    best: Fitted | None = None

    def to_bytes(self) -> bytes:
        """One object for the store: a line of JSON, then the columns as ``.npy``, then the best ones."""
        best = self.best
        facts = {
            "fit": asdict(self.fit),
            "held_out": self.held_out,
            "sweep": self.sweep,
            "best": None if best is None or best.error is None else [best.sweeps, asdict(best.error)],
        }
        return b"".join(
            [json.dumps(facts).encode(), b"\n", npy(self.columns), b"" if best is None else npy(best.columns)]
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """Read what ``to_bytes`` wrote."""
        line, _, arrays = data.partition(b"\n")
        facts = json.loads(line)
        stream = io.BytesIO(arrays)
        columns = np.load(stream, allow_pickle=False)
        best = None
        if facts["best"] is not None:
            sweeps, error = facts["best"]
            best = Fitted(np.load(stream, allow_pickle=False), sweeps, HeldOutError(**error))
        return cls(Fit(**facts["fit"]), facts["held_out"], facts["sweep"], columns, best)


class Checkpoint:
    """Where the fit under way is kept: one object in the store, replaced after every sweep."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name

    def save(self, state: State) -> None:
        """Keep a state in place of the one before."""
        self._store.write(self._name, state.to_bytes())

    def load(self, fit: Fit, held_out: bool) -> State | None:
        """The state that was kept, if it is one of this very fit."""
        data = self._store.read_or_none(self._name)
        try:
            state = None if data is None else State.from_bytes(data)
        except (KeyError, TypeError, ValueError):  # of another version of this program
            return None
        return state if state is not None and (state.fit, state.held_out) == (fit, held_out) else None

    def clear(self) -> None:
        """Forget it."""
        self._store.delete(self._name)


@dataclass(frozen=True)
class ShardSpec:
    """What a shard needs to know beside its parts.

    Attributes:
        store: its address.
        seed: of the held-out entries.
        working: bytes that a sweep takes beside the rows (``completion.working_bytes``).
        memory: bytes that rows and sweeps may take; None for half of the worker's share of its machine.
        scratch: folder on local disk for the rows that exceed them; None for the system's.
    """

    store: str
    seed: int
    working: int = 0
    memory: int | None = None
    scratch: str | None = None


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
        self._spec = spec
        memory = spec.memory if spec.memory is not None else int(_MEMORY_SHARE * memory_share(1.0, 0.0))
        self._memory = max(0, memory - spec.working)
        self._rows = RowStore(scratch_folder(spec.scratch), self._memory)
        self._sample: RowStore | None = None
        self._sampled = 1.0

    def ready(self) -> None:
        """An answer says that the shard has its place."""

    def pid(self) -> int:
        """Of the process that it is in."""
        return os.getpid()

    def load(self, receipts: Sequence[Receipt]) -> Loaded:
        """Read parts, once, and keep their rows beside those that are there already."""
        store = Store(self._spec.store)
        models = logits = dropped = 0
        before = self._rows.in_memory, self._rows.on_disk
        for receipt in receipts:
            for facts, _, values in observed_models(store, receipt):
                own = standardised(np.asarray(facts.probes, np.int32), values)
                dropped += int(np.count_nonzero(~own.kept))
                if own.kept.any():
                    self._rows.add(_key(facts, self._spec.seed), own.block)
                    models += 1
                    logits += len(own.block.values)
        self._rows.settle()
        self._sample = None
        return Loaded(
            models, logits, dropped, self._rows.in_memory - before[0], self._rows.on_disk - before[1]
        )

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
                yield model, held_positions(len(model.probes), fit.held_share, generator)

    def _sampled_rows(self, share: float) -> RowStore:
        """The rows of a sample on their own: a choice takes many sweeps, which need not walk through all rows."""
        if share >= 1:
            return self._rows
        if self._sample is None or self._sampled != share:
            left = max(0, self._memory - self._rows.in_memory)
            self._sample, self._sampled = RowStore(scratch_folder(self._spec.scratch), left), share
            for model in self._rows.models():
                if np.random.default_rng(model.key).random() < share:
                    self._sample.copy(model)
        return self._sample


def _key(facts: ProbedModel, seed: int) -> int:
    """Seed of a model's held-out entries: the same ones, whichever shard holds it."""
    key = hashlib.sha256(f"{seed}\n{facts.repo}\n{facts.sha}".encode()).digest()
    return int.from_bytes(key[:8], "little")


def dealt(receipts: Sequence[Receipt], shards: int) -> list[list[Receipt]]:
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


ShardActor = ray.remote(num_cpus=1, max_restarts=0)(Shard)


@ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
def _add(*sums: SweepSums) -> SweepSums:
    first, *rest = sums
    for other in rest:
        first = first + other
    return first


@ray.remote(num_cpus=1, max_retries=-1)  # type: ignore[untyped-decorator]
def _describe(
    store_uri: str,
    receipt: Receipt,
    columns: Float32,
    embeddings: Float32,
    regularisation: float,
    top_r: int,
    folder: str,
) -> Part:
    """Write the descriptors of one part. Nothing is lost with the worker: Ray runs it again elsewhere."""
    store = Store(store_uri)
    # Directions of models do not depend on the background.
    space = HeadSpace(embeddings, embeddings[:0])
    tables = describe(observed_models(store, receipt), columns, space, regularisation, top_r)
    data = part_bytes(tables, DESCRIPTORS)
    path = f"{folder}/descriptors/{receipt.name}.parquet"
    store.write(path, data)
    part = Part(path, sum(table.num_rows for table in tables), len(data), digest(data))
    store.write_json(_described(folder, receipt.name), asdict(part))
    return part


def _described(folder: str, name: str) -> str:
    """What says that a part is described, until the stage's receipt says so of all."""
    return f"{folder}/described/{name}.json"


def describe_parts(
    store: Store,
    receipts: Sequence[Receipt],
    columns: Float32,
    embeddings: Float32,
    regularisation: float,
    top_r: int,
    folder: str,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Part]:
    """Write all descriptors; returns the part written for each receipt, by the receipt's name.

    What an interrupted run described is not described again.

    Args:
        store: holds the parts, and will hold the descriptors.
        receipts: of the parts.
        columns: V (n, k).
        embeddings: (n, d), the encoder's unit vectors of the probes.
        regularisation: of the factorisation.
        top_r: entries kept a logit.
        folder: where in the store.
        progress: hears how many parts are described.
    """
    prefix = f"{folder}/described"
    parts = {
        name.removeprefix(f"{prefix}/").removesuffix(".json"): Part(**store.read_json(name))
        for name in store.names(prefix, suffix=".json")
    }
    left = [receipt for receipt in receipts if receipt.name not in parts]
    shared = ray.put(columns), ray.put(embeddings)
    under_way: dict[Any, str] = {}
    at_once = max(1, int(_PARTS_IN_FLIGHT * ray.cluster_resources().get("CPU", 1)))
    while left or under_way:
        while left and len(under_way) < at_once:
            receipt = left.pop()
            ref = _describe.remote(store.uri, receipt, *shared, regularisation, top_r, folder)
            under_way[ref] = receipt.name
        (done, *_), _ = ray.wait(list(under_way), num_returns=1)
        parts[under_way.pop(done)] = ray.get(done)
        if progress is not None:
            progress(len(parts))
    return parts


def forget_described(store: Store, folder: str) -> None:
    """Remove what says that single parts are described: the stage's receipt does now."""
    store.delete_folder(f"{folder}/described")


class Completion:
    """The driver's side: shards on Ray, fits over them.

    Args:
        store: holds the parts.
        receipts: of the parts.
        shards: at most so many; all work at once, so that each needs a CPU.
        spec: of the shards.
        checkpoint: where fits are kept after every sweep; None for nowhere.
    """

    def __init__(
        self,
        store: Store,
        receipts: Sequence[Receipt],
        shards: int,
        spec: ShardSpec,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        if not receipts:
            raise ProbeLogError("there is nothing to complete: no model was probed with success")
        self._spec, self._checkpoint = spec, checkpoint
        self._groups = dealt(receipts, min(shards, len(receipts)))
        self.shards: list[Any] = [ShardActor.remote(spec) for _ in self._groups]
        self._loads: list[list[Any]] = [
            [shard.load.remote(group)] for shard, group in zip(self.shards, self._groups, strict=True)
        ]
        self.loaded = sum(self._persistently(self._answers_to_loading), Loaded())
        if not self.loaded.logits:
            self.close()
            raise ProbeLogError("there is nothing to complete: every logit is constant on its probes")

    def close(self) -> None:
        """Give the shards' memory and CPUs back."""
        for shard in self.shards:
            ray.kill(shard)
        self.shards = []

    def fit(
        self,
        fit: Fit,
        held_out: bool = True,
        progress: Callable[[int, HeldOutError | None], None] | None = None,
    ) -> Fitted:
        """Alternate row and column steps until the held-out error stops falling, or for ``fit.sweeps`` sweeps.

        The columns returned are those of the sweep with the smallest held-out error. A fit that the checkpoint knows
        goes on where it was; the caller clears the checkpoint when it has made the result durable.
        """
        state = self._checkpoint.load(fit, held_out) if self._checkpoint is not None else None
        if state is None:
            state = State(fit, held_out, 0, initial_columns(fit.probes, fit.rank, fit.seed))
        while held_out or state.sweep < fit.sweeps:
            sums = self._sums(state.columns, fit, held_out)
            best = state.best
            if held_out and state.sweep:
                # The error of the columns that the last sweep made comes with the sums of this one, for nothing.
                if progress is not None:
                    progress(state.sweep, sums.error)
                last = best.error.rmse if best is not None and best.error is not None else float("inf")
                if best is None or sums.error.rmse < last:
                    best = Fitted(state.columns, state.sweep, sums.error)
                if not sums.error.rmse < last * (1 - fit.tolerance) or state.sweep == fit.sweeps:
                    return best
            columns = column_step(sums.columns, fit.regularisation)
            state = State(fit, held_out, state.sweep + 1, columns, best)
            if self._checkpoint is not None:
                self._checkpoint.save(state)
            if not held_out and progress is not None:
                progress(state.sweep, None)
        return Fitted(state.columns, state.sweep, None)

    def choose(
        self,
        base: Fit,
        ranks: Sequence[int],
        regularisations: Sequence[float],
        tried: dict[tuple[int, float], tuple[int, HeldOutError]],
        progress: Callable[[Fit, Fitted], None],
    ) -> tuple[Fit, int, HeldOutError]:
        """Rank and regularisation with the smallest held-out error, and after how many sweeps.

        The first rank is tried with every regularisation, larger ranks with the best one so far and the next
        smaller one, until a rank gains less than one per cent.

        Args:
            base: everything else about the fits.
            ranks: what to choose from, ascending.
            regularisations: likewise.
            tried: what an earlier, interrupted run found already; every new fit is added.
            progress: hears of every new fit.
        """
        best: tuple[float, int, float] | None = None
        for rank in ranks:
            before = best
            near = len(regularisations) if best is None else regularisations.index(best[2]) + 1
            for regularisation in regularisations[0 if best is None else max(0, near - 2) : near]:
                if (rank, regularisation) not in tried:
                    fit = replace(base, rank=rank, regularisation=regularisation)
                    fitted = self.fit(fit)
                    assert fitted.error is not None
                    tried[rank, regularisation] = (fitted.sweeps, fitted.error)
                    progress(fit, fitted)
                found = (tried[rank, regularisation][1].rmse, rank, regularisation)
                best = found if best is None else min(best, found)
            if before is not None and best is not None and best[0] > 0.99 * before[0]:
                break
        assert best is not None
        _, rank, regularisation = best
        return replace(base, rank=rank, regularisation=regularisation), *tried[rank, regularisation]

    def _sums(self, columns: Float32, fit: Fit, held_out: bool) -> SweepSums:
        """One sweep's sums over all shards, by a tree of additions in the shards' order."""

        def sweep() -> SweepSums:
            shared = ray.put(columns)
            level = [shard.sums.remote(shared, fit, held_out) for shard in self.shards]
            while len(level) > 1:
                level = [_add.remote(*level[i : i + _FAN_IN]) for i in range(0, len(level), _FAN_IN)]
            total: SweepSums = ray.get(level[0])
            return total

        return self._persistently(sweep)

    def _persistently(self, call: Callable[[], Result]) -> Result:
        """The result of something that every shard takes part in; it is repeated when some were lost meanwhile.

        Raises:
            ProbeLogError: shards are lost again and again.
        """
        for loss in range(_LOSSES):
            try:
                if loss:
                    self._replace_lost()
                return call()
            except RayError as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                if not isinstance(cause, _LOST):
                    raise
                _log.warning("a worker of the completion was lost (%s); its parts are read again", cause)
        raise ProbeLogError(
            f"{_LOSSES} times one after the other a worker of the completion was lost. Where memory ran out, "
            "set a smaller `completion_memory`, or fewer `workers`"
        )

    def _answers_to_loading(self) -> list[Loaded]:
        answers: list[Loaded] = ray.get([ref for refs in self._loads for ref in refs])
        return answers

    def _replace_lost(self) -> None:
        """New shards for those that do not live; where the cluster has no place for one, the others take its parts."""
        orphans: list[Receipt] = []
        for number in reversed(range(len(self.shards))):
            if _lives(self.shards[number]):
                continue
            fresh = ShardActor.remote(self._spec)
            alone = len(self.shards) == 1
            if alone or ray.wait([fresh.ready.remote()], timeout=_PLACE_SECONDS)[0]:
                self.shards[number] = fresh
                self._loads[number] = [fresh.load.remote(self._groups[number])]
                continue
            ray.kill(fresh)
            orphans += self._groups[number]
            del self.shards[number], self._loads[number], self._groups[number]
        for number, group in enumerate(dealt(orphans, len(self.shards))):
            if group:
                self._groups[number] += group
                self._loads[number].append(self.shards[number].load.remote(group))
        self._answers_to_loading()


def _lives(shard: Any) -> bool:
    """Whether an actor answers, as soon as it is done with what it was asked before."""
    try:
        ray.get(shard.ready.remote())
    except RayActorError:
        return False
    return True

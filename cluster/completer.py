"""Sharded completion: the rows of a shard never leave it, only sums over probes travel.

Each shard holds the standardised observations of some models. In a sweep it runs its row step, adds up
``U^T U`` and ``U^T x`` for the probes that its models saw, and hands those sums to a tree of additions; the driver
solves the column step and sends the new columns out again (masked ALS, see ``probelog.completion``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from probelog import scoring
from probelog.completion import (
    Block,
    ColumnSums,
    Float32,
    Float64,
    HeldOutError,
    Moments,
    column_step,
    complete_rows,
    held_out_error,
    hold_out,
    initial_columns,
    row_moments,
    row_step,
)
from probelog.errors import ProbeLogError
from probelog.gallery import Observed
from probelog.ledger import Part, Receipt, observed_models, part_bytes
from probelog.matching import HeadSpace
from probelog.schemas import DESCRIPTORS, Head, ProbedModel
from probelog.storage import Store, digest

# Two sums at a time keep the driver and any one node at two matrices of (n, k, k).
_FAN_IN = 2


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

    columns: Float64
    sweeps: int
    error: HeldOutError | None


@dataclass(frozen=True)
class _Model:
    facts: ProbedModel
    logits: npt.NDArray[np.int32]
    moments: Moments
    block: Block


class Shard:
    """The observations of some parts, in memory: an actor's state, and testable without Ray."""

    def __init__(self, store_uri: str, receipts: Sequence[Receipt], seed: int) -> None:
        self._store = Store(store_uri)
        self._receipts = list(receipts)
        self._seed = seed
        self._parts: dict[str, list[_Model]] = {}
        self._held: list[tuple[Block, Block]] = []
        self._held_for = (0.0, 0.0)

    def load(self) -> tuple[int, int, int]:
        """Read the shard's parts; returns how many models and logits it holds, and constant logits dropped."""
        dropped = 0
        for receipt in self._receipts:
            models = []
            for facts, logits, values in observed_models(self._store, receipt):
                usable = ~scoring.is_constant(values)
                dropped += int((~usable).sum())
                if not usable.any():
                    continue
                moments = row_moments(values[usable])
                rows = (values[usable] - moments.mean[:, None]) / moments.std[:, None]
                block = Block(np.asarray(facts.probes, np.int32), rows.astype(np.float32))
                models.append(_Model(facts, logits[usable], moments, block))
            self._parts[receipt.name] = models
        every = [model for models in self._parts.values() for model in models]
        return len(every), sum(len(model.logits) for model in every), dropped

    def sums(self, columns: Float64, fit: Fit, held_out: bool) -> ColumnSums:
        """One row step over all models (or the training entries of a sample), for the column step to use."""
        every = [model.block for models in self._parts.values() for model in models]
        blocks = [training for training, _ in self._held_out(fit)] if held_out else every
        return ColumnSums.of(
            len(columns),
            fit.rank,
            ((block, row_step(block, columns, fit.regularisation)) for block in blocks),
        )

    def error(self, columns: Float64, fit: Fit) -> HeldOutError:
        """Error on the held-out entries."""
        total = HeldOutError(0.0, 0, 0.0, 0)
        for training, held in self._held_out(fit):
            total += held_out_error(training, held, columns, fit.regularisation, fit.top_share)
        return total

    def describe(
        self, columns: Float64, embeddings: Float32, regularisation: float, top_r: int, folder: str
    ) -> list[Part]:
        """Write the descriptors of every part; returns the parts written, in the order of the receipts."""
        written = []
        # Directions of models do not depend on the background.
        space = HeadSpace(embeddings, embeddings[:0])
        for name, models in self._parts.items():
            tables = [_descriptors(model, columns, space, regularisation, top_r) for model in models]
            data = part_bytes(tables, DESCRIPTORS)
            path = f"{folder}/descriptors/{name}.parquet"
            self._store.write(path, data)
            written.append(Part(path, sum(table.num_rows for table in tables), len(data), digest(data)))
        return written

    def _held_out(self, fit: Fit) -> list[tuple[Block, Block]]:
        """Training and held-out entries of the sampled models, the same for every fit of one choice."""
        if self._held_for != (fit.held_share, fit.sample):
            self._held_for = (fit.held_share, fit.sample)
            self._held = []
            for model in (model for models in self._parts.values() for model in models):
                generator = _generator(model.facts, self._seed)
                if generator.random() < fit.sample and len(model.block.probes) > 1:
                    self._held.append(hold_out(model.block, fit.held_share, generator))
        return self._held


def _generator(facts: ProbedModel, seed: int) -> np.random.Generator:
    """The same held-out entries for a model, whichever shard holds it."""
    key = hashlib.sha256(f"{seed}\n{facts.repo}\n{facts.sha}".encode()).digest()
    return np.random.default_rng(int.from_bytes(key[:8], "little"))


def _descriptors(
    model: _Model, columns: Float64, space: HeadSpace, regularisation: float, top_r: int
) -> pa.Table:
    factors = row_step(model.block, columns, regularisation)
    full = complete_rows(model.block, factors, columns).astype(np.float64)
    completed = row_moments(full)
    z = (full - completed.mean[:, None]) / completed.std[:, None]
    top = scoring.top_pairs(z, top_r)
    bottom = scoring.top_pairs(-z, top_r)
    count = len(model.logits)
    values = model.block.values * model.moments.std[:, None] + model.moments.mean[:, None]
    head = Head(model.facts.head)
    directions = space.of_model(Observed(head, model.block.probes, values)).astype(np.float32)
    opposite = None
    if head == Head.SINGLE:
        opposite = space.of_model(Observed(head, model.block.probes, -values)).astype(np.float32)
    return pa.table(
        {
            "repo": [model.facts.repo] * count,
            "sha": [model.facts.sha] * count,
            "logit": model.logits,
            "observed": np.full(count, len(model.block.probes), np.int32),
            "mean": model.moments.mean.astype(np.float32),
            "std": model.moments.std.astype(np.float32),
            "z_mean": completed.mean.astype(np.float32),
            "z_std": completed.std.astype(np.float32),
            "factor": list(factors.astype(np.float32)),
            "top_probes": list(top.probes),
            "top_values": list(top.values),
            "bottom_probes": list(bottom.probes),
            "bottom_values": list(-bottom.values),
            "direction": list(directions),
            "opposite_direction": [None] * count if opposite is None else list(opposite),
        },
        schema=DESCRIPTORS,
    )


ShardActor = ray.remote(num_cpus=1, max_restarts=0)(Shard)


@ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
def _add(*sums: ColumnSums) -> ColumnSums:
    first, *rest = sums
    for other in rest:
        first = first + other
    return first


class Completion:
    """The driver's side: shards on Ray, fits over them."""

    def __init__(self, store: Store, receipts: Sequence[Receipt], shards: int, seed: int) -> None:
        ordered = sorted(receipts, key=lambda receipt: receipt.name)
        if not ordered:
            raise ProbeLogError("there is nothing to complete: no model was probed with success")
        groups = [ordered[i::shards] for i in range(min(shards, len(ordered)))]
        self._shards = [ShardActor.remote(store.uri, group, seed) for group in groups]
        self._groups = groups
        loaded = np.asarray(ray.get([shard.load.remote() for shard in self._shards]))
        self.models, self.logits, self.dropped = (int(total) for total in loaded.sum(axis=0))
        if not self.logits:
            raise ProbeLogError("there is nothing to complete: every logit is constant on its probes")

    def close(self) -> None:
        """Give the shards' memory back."""
        for shard in self._shards:
            ray.kill(shard)

    def fit(
        self,
        fit: Fit,
        start: Float64 | None = None,
        held_out: bool = True,
        progress: Callable[[int, HeldOutError | None], None] | None = None,
    ) -> Fitted:
        """Alternate row and column steps until the held-out error stops falling, or for ``fit.sweeps`` sweeps.

        The columns returned are those of the sweep with the smallest held-out error.
        """
        columns = initial_columns(fit.probes, fit.rank, fit.seed) if start is None else start
        best: Fitted | None = None
        for sweep in range(1, fit.sweeps + 1):
            sums = ray.get(self._tree(columns, fit, held_out))
            columns = column_step(sums, fit.regularisation)
            if not held_out:
                if progress is not None:
                    progress(sweep, None)
                continue
            error = self._error(columns, fit)
            if progress is not None:
                progress(sweep, error)
            worth = best is None or best.error is None or error.rmse < best.error.rmse * (1 - fit.tolerance)
            if best is None or (best.error is not None and error.rmse < best.error.rmse):
                best = Fitted(columns, sweep, error)
            if not worth:
                break
        return best if best is not None else Fitted(columns, fit.sweeps, None)

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

    def describe(
        self, columns: Float64, embeddings: Float32, regularisation: float, top_r: int, folder: str
    ) -> dict[str, Part]:
        """Write all descriptors; returns the part written for each receipt, by the receipt's name.

        Args:
            columns: V (n, k).
            embeddings: (n, d), the encoder's unit vectors of the probes.
            regularisation: of the factorisation.
            top_r: entries kept a logit.
            folder: where in the store.
        """
        shared = ray.put(columns), ray.put(embeddings)
        parts = ray.get(
            [shard.describe.remote(*shared, regularisation, top_r, folder) for shard in self._shards]
        )
        return {
            receipt.name: part
            for group, written in zip(self._groups, parts, strict=True)
            for receipt, part in zip(group, written, strict=True)
        }

    def _tree(self, columns: Float64, fit: Fit, held_out: bool) -> Any:
        shared = ray.put(columns)
        level = [shard.sums.remote(shared, fit, held_out) for shard in self._shards]
        while len(level) > 1:
            level = [_add.remote(*level[i : i + _FAN_IN]) for i in range(0, len(level), _FAN_IN)]
        return level[0]

    def _error(self, columns: Float64, fit: Fit) -> HeldOutError:
        shared = ray.put(columns)
        errors = ray.get([shard.error.remote(shared, fit) for shard in self._shards])
        total = HeldOutError(0.0, 0, 0.0, 0)
        for error in errors:
            total += error
        return total

"""Collaborative completion of partly observed logits: masked alternating least squares.

Rows are logits, columns are probes; ``X ~ U V^T`` on the observed entries only (missing is missing, never zero).
All logits of one model were observed on the same probes, so one Cholesky factor per model serves all its rows.

Row step, model m with probes S:  ``U_m = X_m V_S (V_S^T V_S + lam |S| I)^-1``
Column step, probe p:             ``V_p = (sum_m U_m^T U_m + lam count_p I)^-1 (sum_m U_m^T x_m[:, p])``
(weighted-lambda regularisation: Zhou et al. 2008, "Large-scale parallel collaborative filtering for the Netflix
prize"; used for collaborative probing by arXiv 2502.09619.)

Precision. Rows, factors and products are float32: their rounding is far below the noise of logits that were stored as
float16. Two things are float64. The k x k systems: they are as badly conditioned as ``k / lam``, some 10^4, which
would eat four of float32's seven digits. And the sums over models: a hundred thousand small terms on one large one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.linalg import lapack

from probelog.completion.scoring import CONSTANT_FLOOR
from probelog.errors import UsageError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]

# Models whose masks and Gram matrices are multiplied at once, and probes whose systems are unpacked at once.
_MODELS_AT_ONCE = 256
_PROBES_AT_ONCE = 256


class Block(NamedTuple):
    """The observations of one model: ``probes`` (m,) ascending and ``values`` (L, m), rows standardised."""

    probes: Ints
    values: Float32


class RowMoments(NamedTuple):
    """Mean and standard deviation of each row over its observed entries, both (L,)."""

    mean: Float64
    std: Float64


@dataclass
class ColumnSums:
    """What the column step needs: ``gram`` (n, k (k + 1) / 2), ``target`` (n, k), ``count`` (n,) logits per probe.

    A Gram matrix is kept as its upper triangle.
    """

    gram: Float64
    target: Float64
    count: Float64

    @classmethod
    def of(cls, probes: int, rank: int, models: Iterable[tuple[Block, Float32]]) -> ColumnSums:
        """Sums over models, each given as its block and its factors (L, k)."""
        adder = SumsOverModels(probes, rank)
        for block, factors in models:
            adder.add(block, factors)
        return adder.total()

    def __add__(self, other: ColumnSums) -> ColumnSums:
        return ColumnSums(self.gram + other.gram, self.target + other.target, self.count + other.count)


class SumsOverModels:
    """Adds models to ``ColumnSums``, one after the other.

    Every probe that a model saw gets the model's Gram matrix. Adding it to each would move a matrix per model and
    probe through memory; a product of the mask (models, n) with the matrices does the same in cache, for some
    hundreds of models at a time. Such a product is float32, the sums that it is added to are float64.
    """

    def __init__(self, probes: int, rank: int) -> None:
        packed = rank * (rank + 1) // 2
        self._sums = ColumnSums(np.zeros((probes, packed)), np.zeros((probes, rank)), np.zeros(probes))
        self._upper = np.flatnonzero(np.triu(np.ones((rank, rank), bool)))
        self._masks = np.zeros((_MODELS_AT_ONCE, probes), np.float32)
        self._grams = np.zeros((_MODELS_AT_ONCE, packed), np.float32)
        self._waiting = 0

    def add(self, block: Block, factors: Float32, training: Bools | None = None) -> None:
        """Add one model: its block (L, m), its factors (L, k), and which of its probes count (m,), all by default."""
        probes, target = block.probes, block.values.T @ factors
        if training is not None:
            probes, target = probes[training], target[training]
        self._sums.target[probes] += target
        self._sums.count[probes] += len(factors)
        self._masks[self._waiting, probes] = 1.0
        self._grams[self._waiting] = (factors.T @ factors).take(self._upper)
        self._waiting += 1
        if self._waiting == _MODELS_AT_ONCE:
            self._flush()

    def total(self) -> ColumnSums:
        """The sums over everything that was added."""
        self._flush()
        return self._sums

    def _flush(self) -> None:
        used = slice(self._waiting)
        # In pieces of probes: the product of all would be as large as the sums themselves.
        for start in range(0, len(self._sums.gram), _PROBES_AT_ONCE):
            part = slice(start, start + _PROBES_AT_ONCE)
            self._sums.gram[part] += self._masks[used, part].T @ self._grams[used]
        self._masks[used] = 0.0
        self._waiting = 0


def working_bytes(probes: int, rank: int) -> int:
    """Memory of one sweep beside the rows: V, the sums and their copy that travels, and a mask and a Gram matrix for
    each of the models that wait.
    """
    packed = rank * (rank + 1) // 2
    sums = 8 * probes * (packed + rank + 1)
    return 2 * sums + 4 * probes * rank + 4 * _MODELS_AT_ONCE * (probes + packed)


@dataclass(frozen=True)
class HeldOutError:
    """Squared error on held-out entries, in units of a row's own variance, overall and on top entries.

    ``top_*`` counts the held-out entries that belong to their row's largest: search looks only at those, and
    imputed rows shrink towards their mean, so the overall error flatters a completion.
    """

    squared: float
    entries: int
    top_squared: float
    top_entries: int

    def __add__(self, other: HeldOutError) -> HeldOutError:
        return HeldOutError(
            self.squared + other.squared,
            self.entries + other.entries,
            self.top_squared + other.top_squared,
            self.top_entries + other.top_entries,
        )

    @property
    def rmse(self) -> float:
        """Root mean squared error over all held-out entries (1.0 is what predicting the mean gives)."""
        return float(np.sqrt(self.squared / self.entries)) if self.entries else float("nan")

    @property
    def top_rmse(self) -> float:
        """Root mean squared error over the held-out entries among their row's largest."""
        return float(np.sqrt(self.top_squared / self.top_entries)) if self.top_entries else float("nan")


@dataclass(frozen=True)
class SweepSums:
    """What one pass over some models gives: the sums for the next V, and the held-out error of the present one."""

    columns: ColumnSums
    error: HeldOutError

    def __add__(self, other: SweepSums) -> SweepSums:
        return SweepSums(self.columns + other.columns, self.error + other.error)


def row_moments(values: npt.NDArray[np.floating]) -> RowMoments:
    """Mean and standard deviation of every row of a (L, m) matrix of observed values."""
    values = np.asarray(values, np.float64)
    return RowMoments(values.mean(axis=1), values.std(axis=1))


def initial_columns(probes: int, rank: int, seed: int) -> Float32:
    """Random start for V: (n, k) normal entries of variance 1/k, so that U V^T has unit scale for unit U."""
    start = np.random.default_rng(seed).standard_normal((probes, rank))
    return np.asarray(start / np.sqrt(max(rank, 1)), np.float32)


def row_step(block: Block, columns: Float32, lam: float, training: Bools | None = None) -> Float32:
    """Factors (L, k) of one model's logits with V (n, k) fixed; of its probes only those of ``training`` (m,) count."""
    seen = columns.take(block.probes, axis=0)
    count = len(block.probes)
    if training is not None:
        # A probe of zeros adds nothing to either side: cheaper than a copy of the values without it.
        seen *= training[:, None]
        count = int(np.count_nonzero(training))
    return _solved(seen.T @ seen, block.values @ seen, lam * count)


class Standardised(NamedTuple):
    """A model's observations with its rows standardised, the moments that were taken out, and which of the rows given (L,)
    are ``kept``: constant ones have no standardised form.
    """

    block: Block
    moments: RowMoments
    kept: Bools


class FoldedIn(NamedTuple):
    """A model beside those that V was fitted on: ``standardised`` and its factors (L, k)."""

    block: Block
    moments: RowMoments
    kept: Bools
    factors: Float32


def standardised(probes: Ints, values: npt.NDArray[np.floating]) -> Standardised:
    """One model's logits (L, m) standardised over its probes (m,), without constant ones (``scoring.is_constant``)."""
    rows = np.asarray(values, np.float64)
    mean = rows.mean(axis=1)
    rows = rows - mean[:, None]
    std = np.sqrt(np.einsum("lm,lm->l", rows, rows) / rows.shape[1])
    kept = std > CONSTANT_FLOOR * np.abs(values).max(axis=1, initial=0.0)
    if not kept.all():
        rows, mean, std = rows[kept], mean[kept], std[kept]
    z = np.divide(rows, std[:, None], dtype=np.float32, casting="same_kind")
    return Standardised(Block(np.asarray(probes, np.int32), z), RowMoments(mean, std), kept)


def fold_in(probes: Ints, values: npt.NDArray[np.floating], columns: Float32, lam: float) -> FoldedIn:
    """Place a new model among those that V was fitted on, in milliseconds: one row step with V fixed.

    ``U = Z V_S (V_S^T V_S + lam |S| I)^-1`` with ``Z = (values - mean) / std``: a k x k system for the whole model.
    ``U V^T`` are its completed rows in units of ``std`` around ``mean``.

    Args:
        probes: S, the (m,) ascending numbers of the probes that the model saw.
        values: (L, m), its logits on them; constant ones are left out.
        columns: V (n, k) of a finished completion.
        lam: that completion's regularisation.
    """
    rows = standardised(probes, values)
    return FoldedIn(*rows, row_step(rows.block, columns, lam))


def column_step(sums: ColumnSums, lam: float) -> Float32:
    """New V (n, k). A probe that no model saw gets zeros: its completed values are the rows' means."""
    probes, rank = sums.target.shape
    rows, columns = np.triu_indices(rank)
    solved = np.zeros((probes, rank), np.float32)
    seen = np.flatnonzero(sums.count)
    # In pieces: the unpacked matrices of all probes would be the largest thing in memory.
    for start in range(0, len(seen), _PROBES_AT_ONCE):
        part = seen[start : start + _PROBES_AT_ONCE]
        gram = np.empty((len(part), rank, rank))
        gram[:, rows, columns] = gram[:, columns, rows] = sums.gram[part]
        for number, probe in enumerate(part):
            solved[probe] = _solved(gram[number], sums.target[probe, None], lam * sums.count[probe])[0]
    return solved


def _solved(gram: npt.NDArray[np.floating], targets: npt.NDArray[np.floating], weight: float) -> Float32:
    """``targets (gram + weight I)^-1``: (L, k) from a (k, k) matrix and (L, k), by one Cholesky factor in float64.

    Raises:
        UsageError: the matrix is not positive definite.
    """
    system = gram.astype(np.float64)
    system.flat[:: len(system) + 1] += weight
    # LAPACK counts columns first: the transposed matrices are what it wants, and nothing is copied.
    _, solution, info = lapack.dposv(
        system.T, targets.astype(np.float64).T, overwrite_a=True, overwrite_b=True
    )
    if info:
        raise UsageError(
            "the completion's equations have no stable solution: set a larger `regularisation` (0.01 is usual)"
        )
    return np.asarray(solution.T, np.float32)


def complete_rows(
    block: Block, factors: npt.NDArray[np.floating], columns: npt.NDArray[np.floating]
) -> Float32:
    """The whole rows (L, n): observed values where there are some, ``U V^T`` where there are none."""
    full = factors @ columns.T
    full[:, block.probes] = block.values
    return np.asarray(full, np.float32)


def held_positions(own: Bools, share: float, rng: np.random.Generator) -> Bools:
    """Which of a model's probes are held out: (m,), at least one, never all (all its logits share the mask).

    Args:
        own: (m,) which of them not every model sees. What completion fills in lies on such probes, so that errors on
            the others, which are well known, would say nothing of it. Without any, all count.
        share: of these.
        rng: says which.
    """
    total = len(own)
    places = np.flatnonzero(own) if own.any() else np.arange(total)
    held = min(max(1, round(share * len(places))), max(total - 1, 0))
    chosen = np.zeros(total, bool)
    chosen[rng.choice(places, size=held, replace=False)] = True
    return chosen


def held_out_error(
    block: Block, held: Bools, factors: Float32, columns: Float32, top_share: float
) -> HeldOutError:
    """Error of one model's predictions on its held-out entries.

    Args:
        block: all of its entries (L, m).
        held: which of its probes were held out (m,).
        factors: (L, k), fitted on the others.
        columns: V (n, k).
        top_share: the share of a row that counts as its top entries (r / n of the search).
    """
    values = block.values[:, held]
    squared = np.square(factors @ columns[block.probes[held]].T - values)
    place = block.values.shape[1] - max(1, round(top_share * block.values.shape[1]))
    top = values >= np.partition(block.values, place, axis=1)[:, place, None]
    return HeldOutError(
        float(squared.sum(dtype=np.float64)),
        squared.size,
        float(squared[top].sum(dtype=np.float64)),
        int(np.count_nonzero(top)),
    )

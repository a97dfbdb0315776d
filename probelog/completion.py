"""Collaborative completion of partly observed logits: masked alternating least squares.

Rows are logits, columns are probes; ``X ~ U V^T`` on the observed entries only (missing is missing, never zero).
All logits of one model were observed on the same probes, so one Cholesky factor per model serves all its rows.

Row step, model m with probes S:  ``U_m = X_m V_S (V_S^T V_S + lam |S| I)^-1``
Column step, probe p:             ``V_p = (sum_m U_m^T U_m + lam count_p I)^-1 (sum_m U_m^T x_m[:, p])``
(weighted-lambda regularisation: Zhou et al. 2008, "Large-scale parallel collaborative filtering for the Netflix
prize"; used for collaborative probing by arXiv 2502.09619.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

# Models whose masks and Gram matrices are multiplied at once, and probes whose systems are solved at once.
_MODELS_AT_ONCE = 128
_PROBES_AT_ONCE = 512


class Block(NamedTuple):
    """The observations of one model: ``probes`` (m,) ascending and ``values`` (L, m), rows standardised."""

    probes: Ints
    values: Float32


class Moments(NamedTuple):
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
    def of(cls, probes: int, rank: int, models: Iterable[tuple[Block, Float64]]) -> ColumnSums:
        """Sums over models, each given as its block and its factors (L, k).

        Every probe that a model saw gets the model's Gram matrix. Adding it to each would move a matrix per model
        and probe through memory; a product of the mask (models, n) with the matrices does the same in cache.
        """
        sums = cls(np.zeros((probes, rank * (rank + 1) // 2)), np.zeros((probes, rank)), np.zeros(probes))
        upper = np.triu_indices(rank)
        masks: list[Float64] = []
        grams: list[Float64] = []

        def flush() -> None:
            if masks:
                sums.gram += np.stack(masks).T @ np.stack(grams)
                masks.clear()
                grams.clear()

        for block, factors in models:
            sums.target[block.probes] += block.values.T.astype(np.float64) @ factors
            sums.count[block.probes] += len(factors)
            mask = np.zeros(probes)
            mask[block.probes] = 1.0
            masks.append(mask)
            grams.append((factors.T @ factors)[upper])
            if len(masks) == _MODELS_AT_ONCE:
                flush()
        flush()
        return sums

    def __add__(self, other: ColumnSums) -> ColumnSums:
        return ColumnSums(self.gram + other.gram, self.target + other.target, self.count + other.count)


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


def row_moments(values: npt.NDArray[np.floating]) -> Moments:
    """Mean and standard deviation of every row of a (L, m) matrix of observed values."""
    values = np.asarray(values, np.float64)
    return Moments(values.mean(axis=1), values.std(axis=1))


def initial_columns(probes: int, rank: int, seed: int) -> Float64:
    """Random start for V: (n, k) normal entries of variance 1/k, so that U V^T has unit scale for unit U."""
    start = np.random.default_rng(seed).standard_normal((probes, rank))
    return np.asarray(start / np.sqrt(max(rank, 1)))


def row_step(block: Block, columns: Float64, lam: float) -> Float64:
    """Factors (L, k) of one model's logits with V (n, k) fixed. Also the fold-in of a new model."""
    seen = columns[block.probes]
    gram = seen.T @ seen + lam * len(block.probes) * np.eye(columns.shape[1])
    return np.asarray(np.linalg.solve(gram, seen.T @ block.values.T.astype(np.float64)).T)


def column_step(sums: ColumnSums, lam: float) -> Float64:
    """New V (n, k). A probe that no model saw gets zeros: its completed values are the rows' means."""
    probes, rank = sums.target.shape
    weight = np.where(sums.count > 0, lam * sums.count, 1.0)
    rows, columns = np.triu_indices(rank)
    solved = np.empty((probes, rank))
    # In pieces: the unpacked matrices of all probes would be the largest thing in memory.
    for start in range(0, probes, _PROBES_AT_ONCE):
        part = slice(start, start + _PROBES_AT_ONCE)
        packed = sums.gram[part]
        gram = np.empty((len(packed), rank, rank))
        gram[:, rows, columns] = packed
        gram[:, columns, rows] = packed
        gram += weight[part, None, None] * np.eye(rank)
        solved[part] = np.linalg.solve(gram, sums.target[part, :, None])[:, :, 0]
    return solved


def complete_rows(block: Block, factors: Float64, columns: Float64) -> Float32:
    """The whole rows (L, n): observed values where there are some, ``U V^T`` where there are none."""
    full = (factors @ columns.T).astype(np.float32)
    full[:, block.probes] = block.values
    return full


def hold_out(block: Block, share: float, rng: np.random.Generator) -> tuple[Block, Block]:
    """Split a model's probes into a training block and a held-out block (all its logits share the mask)."""
    total = len(block.probes)
    held = min(max(1, round(share * total)), max(total - 1, 0))
    chosen = np.zeros(total, bool)
    chosen[rng.choice(total, size=held, replace=False)] = True
    return (
        Block(block.probes[~chosen], block.values[:, ~chosen]),
        Block(block.probes[chosen], block.values[:, chosen]),
    )


def held_out_error(
    training: Block, held: Block, columns: Float64, lam: float, top_share: float
) -> HeldOutError:
    """Error of one model's predictions on its held-out entries, its factors fitted on the training ones.

    ``top_share`` is the share of a row that counts as its top entries (r / n of the search).
    """
    predicted = row_step(training, columns, lam) @ columns[held.probes].T
    squared = np.square(predicted - held.values)
    both = np.concatenate([training.values, held.values], axis=1)
    threshold = np.quantile(both, 1.0 - top_share, axis=1, keepdims=True)
    top = held.values >= threshold
    return HeldOutError(float(squared.sum()), squared.size, float(squared[top].sum()), int(top.sum()))

"""Collaborative completion of partly observed logits: masked alternating least squares.

Rows are logits, columns are probes; ``X ~ U V^T`` on the observed entries only (missing is missing, never zero).
All logits of one model were observed on the same probes, so one Cholesky factor per model serves all its rows.

Row step, model m with probes S:  ``U_m = X_m V_S (V_S^T V_S + lam |S| I)^-1``
Column step, probe p:             ``V_p = (sum_m U_m^T U_m + lam count_p I)^-1 (sum_m U_m^T x_m[:, p])``
(weighted-lambda regularisation: Zhou et al. 2008, "Large-scale parallel collaborative filtering for the Netflix
prize"; used for collaborative probing by arXiv 2502.09619.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]


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
    """What the column step needs: ``gram`` (n, k, k), ``target`` (n, k), ``count`` (n,) logits per probe."""

    gram: Float64
    target: Float64
    count: Float64

    @classmethod
    def zeros(cls, probes: int, rank: int) -> ColumnSums:
        """Sums over no model at all."""
        return cls(np.zeros((probes, rank, rank)), np.zeros((probes, rank)), np.zeros(probes))

    def add(self, block: Block, factors: Float64) -> None:
        """Add one model: its Gram matrix to every probe that it saw, its projected values likewise."""
        self.gram[block.probes] += factors.T @ factors
        self.target[block.probes] += block.values.T.astype(np.float64) @ factors
        self.count[block.probes] += len(factors)

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
    rank = sums.target.shape[1]
    weight = np.where(sums.count > 0, lam * sums.count, 1.0)
    gram = sums.gram + weight[:, None, None] * np.eye(rank)
    return np.asarray(np.linalg.solve(gram, sums.target[:, :, None])[:, :, 0])


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

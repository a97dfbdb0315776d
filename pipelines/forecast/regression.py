"""Costs as sums of non-negative parts: Poisson regression with the identity link, and a factor for each group.

A cost (seconds, bytes) is modelled as

    mu_i = f_g(i) * sum_j beta_j x_ij,    beta >= 0, x >= 0,

with features x (1, bytes, parameters times probes, ...), and f the factor of the model's group (its architecture).
beta maximises the Poisson likelihood: the variance grows with the mean, so that large models do not drown small
ones as in least squares, and the fitted costs add up to the measured ones exactly, which least squares keep only with
a free constant. The multiplicative updates of expectation-maximisation (Richardson, J. Opt. Soc. Am. 62, 1972; Lee
and Seung, NIPS 2000) never leave the non-negative numbers, and fit many weightings of the same data at once.

Factors are means shrunk towards 1 as with a gamma prior worth ``shrink`` average items:

    f_g = (sum_g y + shrink * m) / (sum_g mu + shrink * m),    m the mean of mu.

Which features, and how much to shrink, is chosen by the error on items left out (``choose``): the sum of absolute
errors over the sum of costs, since sums are what is predicted. No candidate is best everywhere: on a CPU small
models pay by the image, large ones by parameters times images, and a few measured architectures are no factors yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_STEPS = 3000
_STEP_CHECK = 50
_TOLERANCE = 1e-6
_TINY = 1e-300
_MOST_FOLDS = 40
#: No factors at all.
NEVER = float("inf")


@dataclass(frozen=True)
class Shape:
    """A candidate: columns of the features that are used, and how much factors are shrunk."""

    columns: tuple[int, ...]
    shrink: float = NEVER


@dataclass(frozen=True)
class Fitted:
    """Chosen and fitted on B weightings of n items.

    Attributes:
        shape: the candidate.
        beta: (B, J) coefficients, 0 in columns that are not used.
        factors: (B, G) of the groups.
        error: sum of absolute errors over sum of costs on items left out; None where fewer than three were measured.
        noise: standard deviation of an item's cost over its prediction, from the same; 0 where nothing is known.
    """

    shape: Shape
    beta: Floats
    factors: Floats
    error: float | None
    noise: float

    def totals(self, sums: Floats, groups: npt.NDArray[np.int64]) -> Floats:
        """Predicted sums of costs, (B,), from sums of features over sets of items.

        Args:
            sums: (S, J) of each set.
            groups: (S,) each set's group, -1 for one that was not measured.
        """
        known = np.append(self.factors, np.ones((len(self.factors), 1)), axis=1)
        total: Floats = ((self.beta @ sums.T) * known[:, groups]).sum(axis=1)
        return total

    def each(self, features: Floats, groups: npt.NDArray[np.int64]) -> Floats:
        """Predicted cost of single items, (N,), by the first weighting."""
        known = np.append(self.factors[0], 1.0)
        mean: Floats = (features @ self.beta[0]) * known[groups]
        return mean


def choose(
    features: Floats,
    costs: Floats,
    groups: npt.NDArray[np.int64],
    count: int,
    shapes: Sequence[Shape],
    weights: Floats,
) -> Fitted:
    """The candidate with the least error on items left out, fitted on all of them with each weighting.

    Args:
        features: (n, J), none negative.
        costs: (n,), none negative.
        groups: (n,) from 0.
        count: how many groups there are.
        shapes: candidates, the simplest first: a later one must be better.
        weights: (B, n) how often each item counts.
    """
    best: tuple[float, Shape, Floats] | None = None
    if len(costs) >= 3 and costs.sum() > 0:
        for shape in shapes:
            left_out = _left_out(features, costs, groups, count, shape)
            error = float(np.abs(costs - left_out).sum() / costs.sum())
            if best is None or error < best[0]:
                best = error, shape, left_out
    shape = shapes[0] if best is None else best[1]
    beta, factors = _fit(features, costs, groups, count, shape, weights)
    noise = 0.0
    if best is not None:
        noise = float(np.sqrt(((costs - best[2]) ** 2).sum() / max((best[2] ** 2).sum(), _TINY)))
    return Fitted(shape, beta, factors, None if best is None else best[0], noise)


def _left_out(
    features: Floats, costs: Floats, groups: npt.NDArray[np.int64], count: int, shape: Shape
) -> Floats:
    """Each item's cost as predicted from the others: one left out at a time, or every fortieth of many."""
    folds = np.arange(len(costs)) % _MOST_FOLDS
    weights = (folds[None, :] != np.arange(folds.max() + 1)[:, None]).astype(np.float64)
    beta, factors = _fit(features, costs, groups, count, shape, weights)
    predicted: Floats = np.einsum("nj,nj->n", features, beta[folds]) * factors[folds, groups]
    return predicted


def _fit(
    features: Floats,
    costs: Floats,
    groups: npt.NDArray[np.int64],
    count: int,
    shape: Shape,
    weights: Floats,
) -> tuple[Floats, Floats]:
    """Coefficients (B, J) and factors (B, G) for each weighting."""
    columns = list(shape.columns)
    beta = np.zeros((len(weights), features.shape[1]))
    beta[:, columns] = non_negative(features[:, columns], costs, weights)
    if shape.shrink == NEVER:
        return beta, np.ones((len(weights), count))
    fitted = beta @ features.T
    member = np.eye(count)[groups]
    prior = shape.shrink * (weights * fitted).sum(axis=1, keepdims=True) / weights.sum(axis=1, keepdims=True)
    above, below = (weights * costs) @ member + prior, (weights * fitted) @ member + prior
    factors = np.where(below > 0, above / np.maximum(below, _TINY), 1.0)
    # Shrunk factors do not add up any more: what is measured is to be met all the same.
    again = (weights * fitted * factors[:, groups]).sum(axis=1)
    scale = np.where(again > 0, (weights @ costs) / np.maximum(again, _TINY), 1.0)
    return beta * scale[:, None], factors


def non_negative(features: Floats, costs: Floats, weights: Floats) -> Floats:
    """Coefficients (B, J) >= 0 of the Poisson regression with the identity link, for each of B weightings.

    Args:
        features: (n, J), none negative.
        costs: (n,), none negative.
        weights: (B, n), none negative.
    """
    scale = features.mean(axis=0)
    used = scale > 0
    x = features[:, used] / scale[used]
    found = np.zeros((len(weights), features.shape[1]))
    if not used.any():
        return found
    exposure = np.maximum(weights @ x, _TINY)
    # The means match from the first step on; only the shares of the columns move.
    share = np.maximum((weights @ costs) / exposure.sum(axis=1), _TINY)
    beta = np.repeat(share[:, None], x.shape[1], axis=1)
    for step in range(_STEPS):
        before = beta
        ratio = weights * costs / np.maximum(beta @ x.T, _TINY)
        beta = beta * (ratio @ x) / exposure
        if step % _STEP_CHECK == 0 and np.abs(beta - before).max() <= _TOLERANCE * beta.max():
            break
    found[:, used] = beta / scale[used]
    return found


def resampled(rng: np.random.Generator, n: int, draws: int) -> Floats:
    """Weightings for the bootstrap, (1 + draws, n): the items as they are, then drawn with replacement."""
    if not n:
        return np.ones((1 + draws, 0))
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    return np.concatenate([np.ones((1, n)), drawn])

"""Methods that rank generators for queries, with one interface: ``Descriptions``, queries (q, d) -> scores (q, N).

Queries and features are embeddings of length 1 by the same encoder; higher scores are better. The formulas are those of
Modelverse (Lu et al. 2023, "Content-Based Search for Deep Generative Models"); h is a feature, q a query, mu and Sigma
mean and covariance of a model's features, 1/tau = ``SHARPNESS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from probelog.arrays import Floats
from probelog.ranking.samples.description import Descriptions, Float64, unit

Method: TypeAlias = Callable[[Descriptions, Floats], Float64]

SHARPNESS = 100.0
# Added to every variance of a density: of few samples, most directions have none.
FLOOR = 0.001
# Nearest samples that "best-k" looks at.
NEAREST = 10
# Bounds the working copies: 2^22 float64 values are 32 MB.
_AT_ONCE = 1 << 22


def first_moment(models: Descriptions, queries: Floats) -> Float64:
    """``cos(q, mu)``: (q, N)."""
    means = unit(np.asarray(models.means, np.float64))
    return np.asarray(unit(np.asarray(queries, np.float64)) @ means.T)


def gaussian(models: Descriptions, queries: Floats) -> Float64:
    """``log N(q; mu, Sigma + FLOOR I)``: (q, N), up to a constant.

    With ``D`` the diagonal and ``U`` the axes times the roots of their variances, Woodbury's identity and the lemma of
    determinants leave one k x k system a model: ``(D + U^T U)^-1 = D^-1 - D^-1 U^T (I + U D^-1 U^T)^-1 U D^-1``.
    """
    rows = np.asarray(queries, np.float64)
    out = np.empty((len(rows), len(models)))
    rank, width = models.axes.shape[1:]
    step = max(1, _AT_ONCE // max(1, (rank + len(rows)) * width))
    for start in range(0, len(models), step):
        piece = slice(start, start + step)
        inverse = 1.0 / (np.asarray(models.diagonal[piece], np.float64) + FLOOR)  # (n, d)
        low = np.asarray(models.axes[piece], np.float64) * np.sqrt(models.variances[piece])[..., None]
        weighted = low * inverse[:, None]  # U D^-1
        inner = np.eye(rank) + weighted @ low.transpose(0, 2, 1)  # (n, k, k)
        away = rows[None] - np.asarray(models.means[piece], np.float64)[:, None]  # (n, q, d)
        plain = (np.square(away) * inverse[:, None]).sum(axis=2)
        projected = np.einsum("nqd,nkd->nkq", away, weighted)
        explained = (projected * np.linalg.solve(inner, projected)).sum(axis=1)
        volume = np.linalg.slogdet(inner)[1] - np.log(inverse).sum(axis=1)
        out[:, piece] = -0.5 * (plain - explained + volume[:, None]).T
    return out


def monte_carlo(models: Descriptions, queries: Floats) -> Float64:
    """Logarithm of the mean over samples of ``exp(q . h / tau)``: (q, N)."""
    similarities = _similarities(models, queries, SHARPNESS)
    starts = models.starts
    top = np.maximum.reduceat(similarities, starts, axis=1)
    terms = np.exp(similarities - np.repeat(top, models.counts, axis=1))
    return np.asarray(top + np.log(np.add.reduceat(terms, starts, axis=1) / models.counts))


def best_k(models: Descriptions, queries: Floats) -> Float64:
    """Less the mean distance to the ``NEAREST`` samples: (q, N)."""
    distances = np.sqrt(np.maximum(2 - 2 * _similarities(models, queries, 1.0), 0.0))
    out = np.empty((len(distances), len(models)))
    for place, (start, count) in enumerate(zip(models.starts, models.counts, strict=True)):
        nearest = np.sort(distances[:, start : start + count], axis=1)[:, :NEAREST]
        out[:, place] = -nearest.mean(axis=1)
    return out


def first_second_moment(models: Descriptions, queries: Floats) -> Float64:
    """``q . mu / tau + q^T Sigma q / (2 tau^2)``: (q, N), the cumulants of Monte Carlo to the second order."""
    rows = np.asarray(queries, np.float64)
    first = rows @ np.asarray(models.means, np.float64).T
    along = np.einsum("qd,nkd->qnk", rows, np.asarray(models.axes, np.float64))
    second = (np.square(along) * models.variances).sum(axis=2) + np.square(rows) @ models.diagonal.T
    return np.asarray(SHARPNESS * first + 0.5 * SHARPNESS**2 * second)


METHODS: Mapping[str, Method] = {
    "first-moment": first_moment,
    "gaussian": gaussian,
    "monte-carlo": monte_carlo,
    "best-k": best_k,
    "first-second-moment": first_second_moment,
}


def product_of_experts(scores: Sequence[Float64]) -> Float64:
    """One ranking for several queries, from the scores (N,) for each, which are log-likelihoods: their sum."""
    return np.asarray(np.sum(scores, axis=0))


def _similarities(models: Descriptions, queries: Floats, factor: float) -> Float64:
    return factor * np.asarray(queries, np.float64) @ np.asarray(models.features, np.float64).T

"""How good answers are, from scores and relevance: accuracy, chance, hubness, intervals. Pure NumPy.

Queries are rows, logits are columns, higher scores are better, and equal scores keep the lower column. Shares
and probabilities lie between 0 and 1.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from probelog.ranking.names import normal_name

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating[Any]]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

DEVELOPMENT = "development"
TEST = "test"


def half_of(name: str) -> str:
    """Which half a concept is in: ``development``, on which methods are tuned, or ``test``, which stays untouched.

    The parity of the first byte of the normalised name's SHA-256, so that it depends on nothing else.
    """
    return TEST if hashlib.sha256(normal_name(name).encode()).digest()[0] % 2 else DEVELOPMENT


# What every query got


class PerQuery(NamedTuple):
    """The answers to C queries.

    Attributes:
        rank: (C,) rank of the first relevant logit, from 1.
        average_precision: (C,).
        first_relevant: (C,) number of that logit.
        first: (C, k) the first k logits in order.
    """

    rank: Int64
    average_precision: Float64
    first_relevant: Int64
    first: Int64

    @property
    def measures(self) -> Float64:
        """(C, 3): top-1, top-5 (0 or 1 each) and average precision."""
        return np.stack([self.rank <= 1, self.rank <= 5, self.average_precision], axis=1).astype(np.float64)


def ranking(scores: Floats) -> Int64:
    """Logits by falling score for every query: (C, N) from (C, N); equal scores keep the lower number."""
    return np.asarray(np.argsort(-scores, axis=1, kind="stable"), np.int64)


def per_query(scores: Floats, relevant: Bools, keep: int = 10) -> PerQuery:
    """The answers to queries (C, N) whose relevant logits are known; the first ``keep`` are remembered.

    Raises:
        ValueError: a query has no relevant logit, so that its rank has no meaning.
    """
    if not relevant.any(axis=1).all():
        raise ValueError("a query has no relevant logit")
    order = ranking(scores)
    hits = np.take_along_axis(relevant, order, axis=1)
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    place = hits.argmax(axis=1)
    return PerQuery(
        rank=np.asarray(place + 1, np.int64),
        average_precision=np.where(hits, precision, 0).sum(axis=1) / hits.sum(axis=1),
        first_relevant=order[np.arange(len(order)), place],
        first=order[:, :keep],
    )


# Accuracy of many queries


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a set of queries.

    Attributes:
        queries: how many had at least one relevant logit.
        top1, top5: share of queries with a relevant logit first, or among the first five.
        average_precision: mean over queries.
        median_rank: of the first relevant logit.
        chance: expected top-1 of a random order.
    """

    queries: int
    top1: float
    top5: float
    average_precision: float
    median_rank: float
    chance: float


def accuracy(scores: Floats, relevant: Bools) -> Accuracy:
    """Accuracy of queries (C, N); those without any relevant logit are left out.

    Raises:
        ValueError: no query has a relevant logit.
    """
    answerable = relevant.any(axis=1)
    if not answerable.any():
        raise ValueError("no query has a relevant logit in this index")
    measures = per_query(scores[answerable], relevant[answerable])
    top1, top5, average_precision = measures.measures.mean(axis=0)
    return Accuracy(
        queries=len(measures.rank),
        top1=float(top1),
        top5=float(top5),
        average_precision=float(average_precision),
        median_rank=float(np.median(measures.rank)),
        chance=float(relevant[answerable].mean()),
    )


def chance(relevant: npt.NDArray[np.integer[Any]], logits: int) -> Float64:
    """What a random order is expected to get, exactly: (C, 3) top-1, top-5 and average precision.

    A relevant logit is among the first five with probability ``1 - C(N - R, 5) / C(N, 5)`` (hypergeometric). The
    logit at rank i is relevant with probability R/N, and then the expected precision there is
    ``(1 + (i - 1)(R - 1)/(N - 1)) / i``; summed over ranks and divided by R that gives the average precision
    ``(H_N + (N - H_N)(R - 1)/(N - 1)) / N`` with the harmonic number H_N.

    Args:
        relevant: (C,) number of relevant logits of each query, R.
        logits: how many logits there are, N.
    """
    R = np.asarray(relevant, np.float64)
    missed = np.ones_like(R)
    for drawn in range(min(5, logits)):
        missed *= np.maximum(logits - R - drawn, 0) / (logits - drawn)
    harmonic = float((1 / np.arange(1, logits + 1)).sum())
    others = (R - 1) / max(1, logits - 1)
    average_precision = np.where(R > 0, (harmonic + (logits - harmonic) * others) / logits, 0.0)
    return np.stack([R / logits, 1 - missed, average_precision], axis=1)


# Intervals


class Interval(NamedTuple):
    """A mean with the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: Floats,
    seed: int = 0,
    resamples: int = 2000,
    groups: npt.NDArray[np.integer[Any]] | None = None,
) -> list[Interval]:
    """Percentile bootstrap of the means of (C, K) values over their C queries: K intervals of 95 %.

    For a comparison of two methods give the differences on the same queries (the paired bootstrap): an interval
    without 0 is then a difference that other queries of the kind would show too.

    Args:
        values: (C, K).
        seed: of the draws.
        resamples: how many draws.
        groups: (C,) queries of the same number are drawn together, such as several pictures of one concept, which are
            more alike than pictures of two; the interval is then that of other concepts.

    Raises:
        ValueError: there is no query.
    """
    rows: Float64 = np.asarray(values, np.float64)
    if not len(rows):
        raise ValueError("a mean of no queries has no interval")
    sums, sizes = (rows, np.ones(len(rows))) if groups is None else group_sums(rows, groups)
    counts = draws(len(sums), seed, resamples)
    means = counts @ sums / (counts @ sizes)[:, None]
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return [Interval(*map(float, bounds)) for bounds in zip(rows.mean(axis=0), low, high, strict=True)]


def draws(groups: int, seed: int, resamples: int) -> Int64:
    """How often each group is drawn in every resample: (resamples, groups)."""
    return np.asarray(
        np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=resamples), np.int64
    )


def group_sums(values: Float64, groups: npt.NDArray[np.integer[Any]]) -> tuple[Float64, Float64]:
    """Sums (G, K) of the values (C, K) of each group, and the groups' sizes (G,)."""
    _, numbers = np.unique(groups, return_inverse=True)
    sums = np.zeros((numbers.max() + 1, values.shape[1]))
    np.add.at(sums, numbers, values)
    return sums, np.bincount(numbers).astype(np.float64)


# Hubs


@dataclass(frozen=True)
class Hubness:
    """How concentrated the answers are on few logits.

    Attributes:
        half: how few logits give half of all first places (more is better).
        skew: skewness of the number of times that a logit is among the first ten (0 is even).
    """

    half: int
    skew: float


def hub_curve(first: npt.NDArray[np.integer[Any]], logits: int) -> Float64:
    """Share of the first places (C,) that the m most returned of N logits take, for m = 1..N: (N,)."""
    places = np.sort(np.bincount(first, minlength=logits))[::-1]
    return np.asarray(np.cumsum(places) / max(1, len(first)))


def hubness_of(first: npt.NDArray[np.integer[Any]], logits: int) -> Hubness:
    """Concentration of first answers (C, k) on few of N logits (Radovanovic et al. 2010: k-occurrence)."""
    half = int(np.searchsorted(hub_curve(first[:, 0], logits), 0.5) + 1)
    occurrences = np.bincount(first.ravel(), minlength=logits).astype(np.float64)
    spread = occurrences.std()
    skew = float((((occurrences - occurrences.mean()) / spread) ** 3).mean()) if spread else 0.0
    return Hubness(half, skew)


def hubness(scores: Floats, neighbours: int = 10) -> Hubness:
    """Concentration of the answers of queries (C, N) on few logits."""
    return hubness_of(ranking(scores)[:, :neighbours], scores.shape[1])


# Classifiers


def precision_recall_area(scores: Floats, positive: Bools) -> float:
    """Area under the precision-recall curve of a binary classifier's scores (M,), as average precision.

    ``sum over thresholds of (recall_i - recall_(i-1)) precision_i``, without interpolation; images of equal score
    pass a threshold together. A random order gives the share of positives.

    Raises:
        ValueError: nothing is positive, so that recall has no meaning.
    """
    total = int(positive.sum())
    if not total:
        raise ValueError("recall of no positives has no meaning")
    order = np.argsort(-scores, kind="stable")
    true_positives = np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    recall = true_positives[last] / total
    return float((np.diff(recall, prepend=0.0) * true_positives[last] / (last + 1)).sum())


def roc_area(positive: Floats, negative: Floats) -> float:
    """Area under the ROC curve: how probably a positive's score is above a negative's, ties counted half.

    Raises:
        ValueError: one side is empty.
    """
    if not len(positive) or not len(negative):
        raise ValueError("an area needs scores of both sides")
    order = np.sort(negative)
    below = np.searchsorted(order, positive, "left") + np.searchsorted(order, positive, "right")
    return float(below.mean() / (2 * len(negative)))

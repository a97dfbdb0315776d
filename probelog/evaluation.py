"""How good answers are: accuracy, average precision, hubness and chance, from scores and relevance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a set of queries; shares between 0 and 1.

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


@dataclass(frozen=True)
class Hubness:
    """How concentrated the answers are on few logits.

    Attributes:
        half: how few logits give half of all first places (more is better).
        skew: skewness of the number of times that a logit is among the first ten (0 is even).
    """

    half: int
    skew: float


def ranking(scores: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int64]:
    """Logits by falling score for every query: (C, N) from (C, N); equal scores keep the lower number."""
    return np.asarray(np.argsort(-scores, axis=1, kind="stable"), np.int64)


def accuracy(scores: npt.NDArray[np.floating[Any]], relevant: Bools) -> Accuracy:
    """Accuracy of queries (C, N); those without any relevant logit are left out.

    Raises:
        ValueError: no query has a relevant logit.
    """
    answerable = relevant.any(axis=1)
    if not answerable.any():
        raise ValueError("no query has a relevant logit in this index")
    relevant = relevant[answerable]
    hits = np.take_along_axis(relevant, ranking(scores[answerable]), axis=1)
    places = np.arange(1, hits.shape[1] + 1)
    precision = np.cumsum(hits, axis=1) / places
    return Accuracy(
        queries=len(hits),
        top1=float(hits[:, 0].mean()),
        top5=float(hits[:, :5].any(axis=1).mean()),
        average_precision=float((np.where(hits, precision, 0).sum(axis=1) / hits.sum(axis=1)).mean()),
        median_rank=float(np.median(hits.argmax(axis=1) + 1)),
        chance=float(relevant.mean()),
    )


def hubness(scores: npt.NDArray[np.floating[Any]], neighbours: int = 10) -> Hubness:
    """Concentration of the answers of queries (C, N) on few logits (Radovanovic et al. 2010: k-occurrence)."""
    order = ranking(scores)
    first = np.sort(np.bincount(order[:, 0], minlength=scores.shape[1]))[::-1]
    half = int(np.searchsorted(np.cumsum(first), len(order) / 2) + 1)
    occurrences = np.bincount(order[:, :neighbours].ravel(), minlength=scores.shape[1]).astype(np.float64)
    spread = occurrences.std()
    skew = float((((occurrences - occurrences.mean()) / spread) ** 3).mean()) if spread else 0.0
    return Hubness(half, skew)

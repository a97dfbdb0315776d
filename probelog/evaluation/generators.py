"""How well generators are found by what they make, and what bounds that: the encoder's eyes. Pure NumPy.

Queries are rows, models are columns, higher scores are better, and equal scores keep the lower column. Several queries ask
for one concept (pictures of it); they are drawn together where an interval is computed, so that it speaks of other concepts
and not of other pictures of the same.
"""

from __future__ import annotations

import numpy as np

from probelog.arrays import Ints
from probelog.evaluation.accuracy import (
    Bools,
    Float64,
    Floats,
    Interval,
    draws,
    group_sums,
    per_query,
    roc_area,
)

MEASURES = ("top1", "top5", "top10", "map")


def measures(scores: Floats, relevant: Bools) -> Float64:
    """(Q, 4) of queries (Q, M) that each have a right model: top-1, top-5, top-10 (0 or 1 each), average precision."""
    answers = per_query(scores, relevant)
    return np.stack([*(answers.rank <= k for k in (1, 5, 10)), answers.average_precision], axis=1).astype(
        np.float64
    )


# "Nothing here"


def presence_area(
    present: Floats,
    absent: Floats,
    present_groups: Ints,
    absent_groups: Ints,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """Area under the ROC curve of the first answers' scores: how probably that of a concept which some model makes is
    above that of one which none makes. The interval is over concepts of both sides.

    Args:
        present: (P,) the highest score of every query for a concept that some model makes.
        absent: (A,) likewise of concepts that none makes.
        present_groups: (P,) the concepts' numbers.
        absent_groups: (A,) likewise.
        seed: of the draws.
        resamples: how many draws.

    Raises:
        ValueError: one side is empty.
    """
    area = roc_area(present, absent)
    above = (present[:, None] > absent) + 0.5 * (present[:, None] == absent)
    rows, row_sizes = group_sums(above, present_groups)
    sums, column_sizes = group_sums(rows.T, absent_groups)  # (absent concepts, present concepts)
    first, second = draws(len(rows), seed, resamples), draws(len(sums), seed + 1, resamples)
    pairs = (first @ row_sizes) * (second @ column_sizes)
    areas = np.einsum("ra,ap,rp->r", second, sums, first, optimize=True) / pairs
    low, high = np.percentile(areas, [2.5, 97.5])
    return Interval(area, float(low), float(high))


# What bounds everything: whether the encoder can tell the concepts apart


def class_means(vectors: Floats, classes: Ints, count: int) -> Float64:
    """Unit means (C, d) of the vectors (N, d) of each class; those of a class without any are zero."""
    means = np.zeros((count, vectors.shape[1]))
    np.add.at(means, classes, np.asarray(vectors, np.float64))
    return unit_rows(means)


def nearest_is_right(vectors: Floats, concepts: Floats, right: Bools) -> Float64:
    """(N,) 1 where the concept (C, d) of the highest cosine to a vector (N, d) is one of its right ones (N, C)."""
    nearest = (unit_rows(vectors) @ unit_rows(concepts).T).argmax(axis=1)
    return np.asarray(right[np.arange(len(right)), nearest], np.float64)


def nearest_of_others(vectors: Floats, classes: Ints, count: int) -> Float64:
    """(N,) 1 where a vector (N, d) is nearest to the mean of its own class, without itself.

    A vector alone in its class has none to be near to: 0.
    """
    vectors = np.asarray(vectors, np.float64)
    sums = np.zeros((count, vectors.shape[1]))
    np.add.at(sums, classes, vectors)
    cosines = vectors @ unit_rows(sums).T
    cosines[:, ~sums.any(axis=1)] = -np.inf  # nobody's mean
    others = sums[classes] - vectors
    alone = np.bincount(classes, minlength=count)[classes] < 2
    own = np.where(alone, -np.inf, (vectors * unit_rows(others)).sum(axis=1))
    cosines[np.arange(len(vectors)), classes] = -np.inf
    return np.asarray(own > cosines.max(axis=1), np.float64)


def unit_rows(vectors: Floats) -> Float64:
    """Rows of unit length; zero stays zero."""
    vectors = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0))

"""Parents that were never uploaded or were deleted: their children look like each other's parents.

What two children add to a parent p has nothing to do with each other: the cosine between c - p and any other
neighbour's difference from p is about 0. Where p is a sibling of c under an unseen parent u, both differences hold
-(p - u), and the cosine is |p - u|^2 / (|c - p| |o - p|) for a neighbour o.
"""

from __future__ import annotations

import numpy as np

from probelog.arrays import Floats

# Two fine-tunings of one model have this cosine, because they have data and a loss in common.
_TRAINING_COSINE = 0.07


def unseen_share(parent: Floats, child: Floats, others: Floats) -> tuple[float, float] | None:
    """The part of the squared edge that lies between ``parent`` and an unseen parent, and its standard error.

    ``others`` (k, d) are models that do not come from ``child``; without any the answer is None. Each estimates
    <c - p, o - p> / |c - p|^2; the mean is weighted by the inverse of their variances, which grow with |o - p|^2.
    The error is that of the best one: they have much of their way to ``parent`` in common.
    """
    edge, differences = child - parent, others - parent
    squares = (differences**2).sum(axis=1)
    differences, squares = differences[squares > 0], squares[squares > 0]
    length = float(edge @ edge)
    if not len(squares) or length == 0:
        return None
    share = float(((differences @ edge) / squares).sum() / (1 / squares).sum() / length)
    return share, _error(float(squares.min()) / length, len(edge))


def step_share(grandparent: Floats, parent: Floats, child: Floats) -> tuple[float, float]:
    """The share of the step from ``grandparent`` to ``parent`` that ``child`` shows, and its standard error.

    1 for a child of the parent, 0 for one of the grandparent: <c - g, p - g> / |p - g|^2. Two independent vectors
    have a cosine of about d^(-1/2) in d numbers.
    """
    step, whole = parent - grandparent, child - grandparent
    square = float(step @ step)
    if square == 0:
        return 0.0, np.inf
    return float(whole @ step) / square, _error(float(whole @ whole) / square, len(step))


def _error(square_ratio: float, numbers: int) -> float:
    return float(np.sqrt(square_ratio * (1 / numbers + _TRAINING_COSINE**2)))

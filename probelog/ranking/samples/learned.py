"""Learned matching: a matrix on features under which queries are nearest to the models that answer them.

Trained by InfoNCE (van den Oord et al. 2018; in Modelverse's section 3.3): for pairs of a query and its model,
``-log softmax over models of cos(W q, W mu) / TEMPERATURE``, which Adam (Kingma and Ba 2015) minimises from ``W = I``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from probelog.arrays import Floats, Ints
from probelog.ranking.samples.description import Descriptions, Float64, unit
from probelog.ranking.samples.methods import Method

TEMPERATURE = 0.05
_STEPS = 200
_RATE = 0.01
# Pull towards the identity, which knows nothing of the training pairs.
_PENALTY = 0.001
_DECAYS = (0.9, 0.999)


class Shape(StrEnum):
    """Which entries of the matrix are learned."""

    DIAGONAL = "diagonal"
    TRIANGULAR = "triangular"
    FULL = "full"


@dataclass(frozen=True, eq=False)
class Learned:
    """A learned matrix (d, d) on features: ``x -> x W^T``."""

    matrix: Float64

    @classmethod
    def train(
        cls, queries: Floats, answers: Ints, means: Floats, shape: Shape = Shape.DIAGONAL, steps: int = _STEPS
    ) -> Learned:
        """Learn from queries (q, d) and the number (q,) of the model that answers each, with the models' means (N, d)."""
        rows, centres = (unit(np.asarray(item, np.float64)) for item in (queries, means))
        width = rows.shape[1]
        mask = {
            Shape.DIAGONAL: np.eye(width),
            Shape.TRIANGULAR: np.tril(np.ones((width, width))),
            Shape.FULL: np.ones((width, width)),
        }[shape]
        matrix = np.eye(width)
        first, second = np.zeros_like(matrix), np.zeros_like(matrix)
        for step in range(1, steps + 1):
            slope = mask * (
                loss_and_slope(matrix, rows, answers, centres)[1] + _PENALTY * (matrix - np.eye(width))
            )
            first = _DECAYS[0] * first + (1 - _DECAYS[0]) * slope
            second = _DECAYS[1] * second + (1 - _DECAYS[1]) * np.square(slope)
            away = np.sqrt(second / (1 - _DECAYS[1] ** step)) + 1e-8
            matrix = matrix - _RATE * first / (1 - _DECAYS[0] ** step) / away
        return cls(matrix)

    def of(self, method: Method) -> Method:
        """A method after the matrix: on queries and on features that it has moved."""

        def score(models: Descriptions, queries: Floats) -> Float64:
            moved = unit(np.asarray(queries, np.float64) @ self.matrix.T)
            return method(models.transformed(self.matrix.T), moved)

        return score


def loss_and_slope(matrix: Float64, queries: Floats, answers: Ints, means: Floats) -> tuple[float, Float64]:
    """InfoNCE of a matrix (d, d), and its derivative (d, d)."""
    q, m = queries @ matrix.T, means @ matrix.T
    q_length, m_length = (np.linalg.norm(item, axis=1, keepdims=True) for item in (q, m))
    q_unit, m_unit = q / q_length, m / m_length
    cosines = q_unit @ m_unit.T
    logits = cosines / TEMPERATURE
    logits -= logits.max(axis=1, keepdims=True)
    shares = np.exp(logits)
    shares /= shares.sum(axis=1, keepdims=True)
    places = np.arange(len(q))
    loss = float(-np.log(np.maximum(shares[places, answers], 1e-300)).mean())
    shares[places, answers] -= 1.0
    pull = shares / (TEMPERATURE * len(q))
    # Through the scaling to length 1: only what is across the vector counts.
    q_slope = (pull @ m_unit - (pull * cosines).sum(axis=1)[:, None] * q_unit) / q_length
    m_slope = (pull.T @ q_unit - (pull * cosines).sum(axis=0)[:, None] * m_unit) / m_length
    return loss, q_slope.T @ queries + m_slope.T @ means


def held_out_scores(
    models: Descriptions,
    queries: Floats,
    answers: Ints,
    method: Method,
    shape: Shape = Shape.DIAGONAL,
    folds: int = 5,
    seed: int = 0,
) -> Float64:
    """Scores (q, N) by learned matching where no query's model was in the training of its matrix."""
    fold = np.random.default_rng(seed).permutation(len(models)) % folds
    out = np.empty((len(queries), len(models)))
    for number in range(folds):
        asked = fold[answers] == number
        kept = np.flatnonzero(fold != number)
        renumbered = np.searchsorted(kept, answers[~asked])
        learned = Learned.train(queries[~asked], renumbered, models.means[kept], shape)
        out[asked] = learned.of(method)(models, queries[asked])
    return out

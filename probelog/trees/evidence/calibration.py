"""The probability of an edge, a logistic function of a few features of its evidence.

Every feature lies between -1 and 1, so that a coefficient is the log odds that it can add. They were fitted on two
forests of trained models and two of untrained ones (`tests.benchmarks.trees --fit`); docs/method.md has what they are
worth on others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from probelog.trees.edges import Relation

_COEFFICIENTS: Mapping[str, float] = {
    "constant": 1.23,
    "by itself": 0.50,
    "by itself, no time": -0.61,
    "low-rank": 0.64,
    "head-only": 2.12,
    "time agrees": 0.63,
    "time contradicts": -1.81,
    "direction and time": 0.58,
    "unseen parent": -0.80,
    "above its error": -0.98,
    "below its error": -1.83,
    "others around": -0.98,
    "another head of one size": -1.25,
    "far and not grown": -2.52,
    "parent of a coarser type": -3.93,
    # Set by hand: no forest has declared parents that were not its truth.
    "declared": 1.0,
}

_LATENT: Mapping[str, float] = {"constant": -1.0, "certain": 1.8, "siblings": 2.1}

# Relations that identify the parent, given that the direction is right.
_BY_ITSELF = frozenset(
    {Relation.RECAST, Relation.QUANTISED, Relation.PRUNED, Relation.MERGE, Relation.COPY, Relation.PERMUTED}
)
_PRIOR = 0.5


def features(relation: Relation, evidence: Mapping[str, float]) -> dict[str, float]:
    """The features of an edge."""
    time, head = evidence["time"], evidence.get("head")
    by_itself = relation in _BY_ITSELF
    share, error = evidence.get("unseen", 0.0), max(evidence.get("unseen_error", math.inf), 1e-3)
    errors = share / error
    growth, trained = evidence.get("growth", 1.0), relation in (Relation.FINE_TUNED, Relation.LOW_RANK)
    return {
        "constant": 1.0,
        "by itself": float(by_itself),
        "by itself, no time": float(by_itself and time == 0),
        "low-rank": float(relation is Relation.LOW_RANK),
        "head-only": float(relation is Relation.HEAD_ONLY),
        "time agrees": float(time > 0),
        "time contradicts": float(time < 0),
        "direction and time": 0.0 if by_itself else math.tanh((evidence["direction"] + time) / 4),
        "unseen parent": 0.0 if by_itself else _part(share / 0.25),
        "above its error": 0.0 if by_itself else _part(errors / 4),
        # A true parent's share is about 0: far below is as wrong as above.
        "below its error": 0.0 if by_itself else _part((-errors - 1) / 4),
        "others around": 0.0 if by_itself else _part(1 - error / 0.1),
        "another head of one size": float(not by_itself and head is not None and head > 0.25),
        # A child is its parent and something orthogonal; two trainings from one random start are of one size.
        "far and not grown": _part((0.5 - growth) / 0.5) * _part(evidence["distance"] / 0.05) * trained,
        "parent of a coarser type": evidence.get("coarser", 0.0),
        "declared": evidence.get("declared", 0.0),
    }


def _part(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def probability(relation: Relation, evidence: Mapping[str, float]) -> float:
    """The probability that an edge is a true one."""
    values = features(relation, evidence)
    odds = sum(_COEFFICIENTS.get(name, 0) * value for name, value in values.items())
    return 1 / (1 + math.exp(-odds))


def latent_probability(evidence: Mapping[str, float]) -> float:
    """The probability that nobody has seen a model's parent; fitted on the same forests and two more."""
    certain = math.tanh(max(evidence["unseen"] - 2 * evidence["unseen_error"], 0.0) / 0.25)
    siblings = min(math.log2(1 + evidence["siblings"]) / 3, 1.0)
    odds = _LATENT["constant"] + _LATENT["certain"] * certain + _LATENT["siblings"] * siblings
    return 1 / (1 + math.exp(-odds))


def fit(rows: Sequence[Mapping[str, float]], right: Sequence[bool]) -> dict[str, float]:
    """Coefficients by logistic regression with a normal prior on each, by Newton's method."""
    names = list(rows[0])
    x = np.array([[row[name] for name in names] for row in rows])
    y = np.array(right, np.float64)
    coefficients = np.zeros(len(names))
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ coefficients))
        gradient = x.T @ (y - p) - _PRIOR * coefficients
        hessian = (x * (p * (1 - p))[:, None]).T @ x + _PRIOR * np.eye(len(names))
        coefficients = coefficients + np.linalg.solve(hessian, gradient)
    return {name: float(value) for name, value in zip(names, coefficients, strict=True)}

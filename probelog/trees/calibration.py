"""The probability of an edge, a logistic function of a few features of its evidence.

Every feature lies between 0 and 1, so that a coefficient is the log odds that it can add. They were fitted on one
forest of trained models and two of untrained ones (`tests.benchmarks.trees --fit`); docs/method.md has what they are
worth on others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from probelog.trees.edges import Relation

_COEFFICIENTS: Mapping[str, float] = {
    "constant": -0.08,
    "by itself": 1.01,
    "time agrees": 0.73,
    "time contradicts": -2.00,
    "direction": 0.58,
    "unseen parent": -0.44,
    "siblings": 1.10,
    "far": -2.04,
    "another head of one size": -0.68,
    # Set by hand: no forest has declared parents that were not its truth.
    "declared": 1.0,
}

# Relations that identify the parent, given that the direction is right.
_BY_ITSELF = frozenset(
    {Relation.RECAST, Relation.QUANTISED, Relation.PRUNED, Relation.MERGE, Relation.COPY, Relation.PERMUTED}
)
_PRIOR = 0.5


def features(relation: Relation, evidence: Mapping[str, float]) -> dict[str, float]:
    """The features of an edge."""
    time, head = evidence["time"], evidence.get("head")
    by_itself = relation in _BY_ITSELF
    return {
        "constant": 1.0,
        "by itself": float(by_itself),
        "time agrees": float(time > 0),
        "time contradicts": float(time < 0),
        "direction": 0.0 if by_itself else math.tanh(evidence["direction"] / 3),
        "unseen parent": 0.0 if by_itself else min(max(evidence.get("unseen", 0.0) / 0.25, 0.0), 1.0),
        "siblings": 0.0 if by_itself else min(math.log2(1 + evidence.get("siblings", 0.0)) / 3, 1.0),
        "far": 0.0 if by_itself else min(evidence["distance"] / 0.1, 1.0),
        "declared": evidence.get("declared", 0.0),
        "another head of one size": float(not by_itself and head is not None and head > 0.25),
    }


def probability(relation: Relation, evidence: Mapping[str, float]) -> float:
    """The probability that an edge is a true one."""
    values = features(relation, evidence)
    odds = sum(_COEFFICIENTS.get(name, 0) * value for name, value in values.items())
    return 1 / (1 + math.exp(-odds))


def latent_probability(evidence: Mapping[str, float]) -> float:
    """The probability that a model's parent is one that nobody has seen."""
    share, error = evidence["unseen"], evidence["unseen_error"]
    certain = math.tanh(max(share - 2 * error, 0.0) / 0.25)
    odds = -0.5 + 1.5 * certain + 0.5 * min(math.log2(1 + evidence["siblings"]) / 3, 1.0)
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

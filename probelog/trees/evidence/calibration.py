"""The probability of an edge, a logistic function of a few features of its evidence.

Every feature lies between -1 and 1, so that a coefficient is the log odds that it can add. They were fitted on trained
models and on two forests of untrained ones (`tests.benchmarks.trees --fit`); docs/results.md has what they are worth on
others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from probelog.trees.edges import Relation
from probelog.trees.evidence.relations import SAME_HEAD

_COEFFICIENTS: Mapping[str, float] = {
    "constant": 1.22,
    "by itself": 0.56,
    "copy or permuted, no time": -1.64,
    "residual of a merge": -1.39,
    "head-only": 1.13,
    "time agrees": 0.52,
    "time contradicts": -1.65,
    "direction": 0.53,
    "equal parents": -1.06,
    "above its error": -1.39,
    "below its error": -1.60,
    "below its error, going on": 1.05,
    "others around": -0.80,
    "another head of one size": -1.37,
    "far and not grown": -3.23,
    "parent of a coarser type": -3.44,
    # Set by hand: no forest has declared parents that were not its truth.
    "declared": 1.0,
}

_LATENT: Mapping[str, float] = {"constant": -1.0, "certain": 1.8, "siblings": 2.1}

# Relations that identify the parent, given that the direction is right.
_BY_ITSELF = frozenset(
    {Relation.RECAST, Relation.QUANTISED, Relation.PRUNED, Relation.MERGE, Relation.COPY, Relation.PERMUTED}
)
# Of these nothing in the weights tells the child from the parent.
_UNDIRECTED = frozenset({Relation.COPY, Relation.PERMUTED})
_PRIOR = 0.5


def features(relation: Relation, evidence: Mapping[str, float]) -> dict[str, float]:
    """The features of an edge."""
    time, direction, head = evidence["time"], evidence["direction"], evidence.get("head")
    by_itself = relation in _BY_ITSELF
    undirected = relation in _UNDIRECTED
    share, error = evidence.get("unseen", 0.0), max(evidence.get("unseen_error", math.inf), 1e-3)
    errors = share / error
    growth, trained = evidence.get("growth", 1.0), relation in (Relation.FINE_TUNED, Relation.LOW_RANK)
    own_head = head is not None and head < SAME_HEAD
    below = 0.0 if by_itself else _part((-errors - 1) / 4)
    return {
        "constant": 1.0,
        "by itself": float(by_itself),
        "copy or permuted, no time": float(undirected and time == 0),
        "residual of a merge": _part(evidence.get("residual", 0.0) / 0.06),
        "head-only": float(relation is Relation.HEAD_ONLY),
        "time agrees": float(time > 0),
        "time contradicts": float(time < 0),
        "direction": 0.0 if by_itself else math.tanh(direction / 4),
        "equal parents": 0.0 if undirected else _part(math.log2(1 + evidence.get("equals", 0.0)) / 2),
        "above its error": 0.0 if by_itself else _part(errors / 4),
        # A true parent's share is about 0: far below is as wrong as above, unless training went on as it had begun.
        "below its error": below,
        "below its error, going on": below * own_head * _part(growth - 1),
        "others around": 0.0 if by_itself else _part(1 - error / 0.1),
        "another head of one size": float(not by_itself and head is not None and not own_head),
        # A child is its parent and something orthogonal; two trainings from one random start are of one size, and no
        # layer of them has shrunk by much more than it moved, as weight decay has it.
        "far and not grown": _part((0.75 - growth) / 0.3)
        * _part(evidence["distance"] / 0.05)
        * _part((evidence.get("least_growth", 0.0) + 5) / 1.5)
        * trained,
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

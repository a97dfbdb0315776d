"""Which of two related models came first, from what training changes in one direction only.

Every signal is a number between -1 and 1, positive where the first model looks like the parent, and changes its sign
when the two are exchanged. The log odds are a weighted sum of them (a logistic regression without an intercept);
absent signals are zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from probelog.arrays import Floats
from probelog.trees.families import Family

#: Log odds that one unit of each signal adds: set by hand, between what logistic regressions on two sets of trained
#: models gave (1.8, 0.5, 1.6, 1.7 and 1.3, 2.3, 1.3, 0.6).
WEIGHTS: Mapping[str, float] = {"classes": 1.5, "growth": 1.5, "norms": 1.5, "biases": 1.0}

#: Share of edges whose times contradict them that the time's log odds reckon with.
WRONG_TIMES = 0.05


@dataclass(frozen=True, slots=True)
class DirectionSignals:
    """What gives the direction of a family's pairs, one row a model.

    ``norms`` (n,) is the sum of squares by which scales of normalisation are away from 1, ``biases`` that of biases
    from 0, ``squares`` of all matrices, ``classes`` the size of the head.
    """

    norms: Floats
    biases: Floats
    squares: Floats
    classes: Floats


def signals_of(family: Family) -> DirectionSignals:
    """The statistics of every model of a family."""
    scales, biases = [], []
    for t in family.vectors:
        name = family.tensors[t]
        if name.endswith(".weight") and abs(float(np.median(family.mean[:, t])) - 1) < 0.5:
            scales.append(t)
        elif name.endswith(".bias"):
            biases.append(t)
    return DirectionSignals(
        norms=(family.sizes[scales] * ((family.mean[:, scales] - 1) ** 2 + family.std[:, scales] ** 2)).sum(
            1
        ),
        biases=family.squares[:, biases].sum(axis=1),
        squares=family.squares[:, family.layers].sum(axis=1),
        classes=family.classes.astype(np.float64),
    )


def direction_signals(signals: DirectionSignals, parent: int, child: int, moved: float) -> dict[str, float]:
    """Each signal for a parent and a child whose matrices differ by ``moved``, a squared distance."""
    growth = (signals.squares[child] - signals.squares[parent]) / moved if moved > 0 else 0.0
    return {
        "classes": float(np.sign(signals.classes[parent] - signals.classes[child])),
        "growth": math.tanh(float(growth)),
        "norms": _change(signals.norms[parent], signals.norms[child]),
        "biases": _change(signals.biases[parent], signals.biases[child]),
    }


def log_odds(values: Mapping[str, float]) -> float:
    """Log odds that the parent is the parent."""
    return sum(WEIGHTS[name] * value for name, value in values.items())


def time_log_odds(parent: float | None, child: float | None) -> float:
    """The same from the times of upload; 0 where one is unknown or both are equal."""
    if parent is None or child is None or parent == child:
        return 0.0
    odds = math.log((1 - WRONG_TIMES) / WRONG_TIMES)
    return odds if parent < child else -odds


def _change(parent: float, child: float) -> float:
    larger = max(parent, child)
    # A relative change of a tenth is as good as any larger one.
    return math.tanh(10 * float(child - parent) / larger) if larger > 0 else 0.0

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

from probelog.arrays import Floats, Ints
from probelog.trees.families.family import Family

#: Log odds that one unit of each signal adds: set by hand, between what logistic regressions on two sets of trained
#: models gave (1.8, 0.5, 1.6, 1.7 and 1.3, 2.3, 1.3, 0.6).
#: Counters of batches are never turned back: of 65 pairs whose counters differ the parent had the smaller one in all.
WEIGHTS: Mapping[str, float] = {"classes": 1.5, "growth": 1.5, "norms": 1.5, "biases": 1.0, "counters": 5.0}

#: Share of edges whose times contradict them that the time's log odds reckon with.
WRONG_TIMES = 0.05

# Models whose squares are summed at once.
_BLOCK = 4096
# A family's usual value is the median of so many of its models, evenly spaced.
_SAMPLE = 1001
_COUNTER = "num_batches_tracked"
# Grids that scales of normalisation may lie on: multiples of 2^-6 to 2^-14. Scales between 1/2 and 2 lie on 2^-8 in
# bfloat16, on 2^-11 in float16.
_GRIDS = range(14, 5, -1)
_NO_GRID = 24
# A grid counts where so many scales' sums can tell it from chance, and this share of them lies on it.
_FEWEST_SCALES = 3
_ON_GRID = 0.9
_LARGEST_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class DirectionSignals:
    """What gives the direction of a family's pairs, one row a model.

    ``norms`` (n,) is the sum of squares by which scales of normalisation are away from 1, ``biases`` that of biases
    from 0, ``classes`` the size of the head, ``counters`` the batches that were counted, 0 where nobody did.
    ``grids`` (n,): k where the numbers lie on multiples of 2^-k, whatever type they are stored in.
    """

    norms: Floats
    biases: Floats
    classes: Floats
    counters: Floats
    grids: Ints


def signals_of(family: Family) -> DirectionSignals:
    """The statistics of every model of a family."""
    n = len(family)
    usual = np.median(family.mean[:: max(n // _SAMPLE, 1)], axis=0)
    vectors = family.vectors
    scale = [family.tensors[t].endswith(".weight") and abs(float(usual[t]) - 1) < 0.5 for t in vectors]
    scales = vectors[np.array(scale, bool)]
    biases = np.array([t for t in vectors if family.tensors[t].endswith(".bias")], np.int64)
    counting = np.array([t for t, name in enumerate(family.tensors) if name.endswith(_COUNTER)], np.int64)
    norms, bias_squares, counters = np.zeros(n), np.zeros(n), np.zeros(n)
    grids = np.full(n, _NO_GRID)
    for begin in range(0, n, _BLOCK):
        rows = slice(begin, begin + _BLOCK)
        mean, std = (
            family.mean[rows][:, scales].astype(np.float64),
            family.std[rows][:, scales].astype(np.float64),
        )
        norms[rows] = (family.sizes[scales] * ((mean - 1) ** 2 + std**2)).sum(axis=1)
        bias_squares[rows] = family.squares(rows, biases).sum(axis=1)
        grids[rows] = _grids(mean, std, family.sizes[scales])
        counters[rows] = family.mean[rows][:, counting].astype(np.float64).sum(axis=1)
    return DirectionSignals(norms, bias_squares, family.classes.astype(np.float64), counters, grids)


def _grids(mean: Floats, std: Floats, sizes: Floats) -> Ints:
    """(n,) the coarsest grid on which the scales (n, s) of each model lie, from their means alone.

    The sum of numbers on a grid lies on it. It is known as exactly as a mean is in float32.
    """
    result = np.full(len(mean), _NO_GRID)
    sums, errors = mean * sizes, sizes * np.maximum(mean, 1) * 2.0**-24
    for grid in _GRIDS:
        places, tolerance = sums * 2.0**grid, errors * 2.0**grid
        telling = (std > 1e-4) & (tolerance <= _LARGEST_TOLERANCE)
        on = telling & (np.abs(places - np.round(places)) <= tolerance)
        count = telling.sum(axis=1)
        result[(count >= _FEWEST_SCALES) & (on.sum(axis=1) >= _ON_GRID * count)] = grid
    return result


def direction_signals(
    signals: DirectionSignals, parents: Ints, children: Ints, growth: Floats
) -> dict[str, Floats]:
    """Each signal (m,) for pairs of parent and child; ``growth`` (m,) as in `probelog.trees.evidence.relations.Comparison`."""
    return {
        "classes": np.sign(signals.classes[parents] - signals.classes[children]),
        "growth": np.tanh(growth),
        "norms": _change(signals.norms[parents], signals.norms[children]),
        "biases": _change(signals.biases[parents], signals.biases[children]),
        "counters": np.where(
            (signals.counters[parents] > 0) & (signals.counters[children] > 0),
            np.sign(signals.counters[children] - signals.counters[parents]),
            0.0,
        ),
    }


def log_odds(values: Mapping[str, Floats]) -> Floats:
    """(m,) log odds that the parents are the parents."""
    return np.asarray(sum(WEIGHTS[name] * value for name, value in values.items()))


def time_log_odds(parents: Floats, children: Floats) -> Floats:
    """The same from the times of upload; 0 where one is unknown (NaN) or both are equal."""
    odds = math.log((1 - WRONG_TIMES) / WRONG_TIMES)
    return odds * (parents < children) - odds * (parents > children)


def _change(parents: Floats, children: Floats) -> Floats:
    larger = np.maximum(parents, children)
    # A relative change of a tenth is as good as any larger one.
    change = np.divide(children - parents, larger, out=np.zeros(len(larger)), where=larger > 0)
    return np.asarray(np.tanh(10 * change))

"""What was done to a parent to make a child of it, from the statistics of the two.

The comparison of a pair is made once (`compare`); `relation_of` names it. Only copies, recast, quantised, pruned and
permuted models tell by themselves which of the two was made from the other; `probelog.trees.direction` says more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probelog.trees.distance import layer_ratios
from probelog.trees.edges import Relation
from probelog.trees.families import Family

# Mean ratios of squared distances. Rounding to float16 leaves 2e-8, to bfloat16 1.4e-6, to 8 bits 1e-5 to 4e-5.
_ROUNDED_TO_16_BITS = 1e-7
_RECAST = 6e-6
_QUANTISED = 5e-4
_SAME_HEAD = 0.25
# Without its smallest 30 % a normal distribution's kurtosis is 5 % larger, without the smallest half 14 %.
_LEAST_PRUNED_KURTOSIS = 0.02
# Moments are stored as float32.
_EQUAL_MOMENTS = 1e-5
# Between models whose moments agree, this far apart means another order of the same numbers.
_REORDERED = 0.02
# Norms and biases that were not trained differ by rounding alone.
_UNTRAINED_VECTORS = 1e-3


@dataclass(frozen=True, slots=True)
class Comparison:
    """One child beside one possible parent.

    ``distance`` is the mean ratio over the layers, ``evenness`` the ratio of its 90th to its 10th percentile there,
    ``head`` the ratio of the heads (None: other sizes), ``growth`` (|c|^2 - |p|^2) / |c - p|^2 over all layers (-1
    where some of the parent's numbers became zero, +1 where something orthogonal was added) and ``growths`` its
    median over the layers, ``kurtosis`` the median relative growth of a layer's, ``vectors`` the mean relative change of norms and biases, ``moments`` the largest change
    of any moment.
    """

    distance: float
    evenness: float
    head: float | None
    growth: float
    growths: float
    kurtosis: float
    vectors: float
    moments: float


def compare(family: Family, parent: int, child: int) -> Comparison:
    """The comparison of two models of a family, by position."""
    ratios = layer_ratios(family.sketches[parent], family.sketches[child])
    ratios = ratios[~np.isnan(ratios)]
    differences = ((family.sketches[parent] - family.sketches[child]) ** 2).sum(axis=1)
    grown = (family.squares[child] - family.squares[parent])[family.layers]
    moved = differences > 0
    low, high = np.quantile(ratios, [0.1, 0.9]) if len(ratios) else (0.0, 0.0)
    return Comparison(
        distance=float(ratios.mean()) if len(ratios) else 1.0,
        evenness=float(high / low) if low > 0 else np.inf,
        head=_head_ratio(family, parent, child),
        growth=float(grown.sum() / differences.sum()) if moved.any() else 0.0,
        growths=float(np.median(grown[moved] / differences[moved])) if moved.any() else 0.0,
        kurtosis=_kurtosis_growth(family, parent, child),
        vectors=_vector_change(family, parent, child),
        moments=_moment_change(family, parent, child),
    )


def relation_of(pair: Comparison, *, same_type: bool = True) -> Relation:
    """The name of what a comparison shows."""
    same_head = pair.head is not None and pair.head < _SAME_HEAD
    if pair.moments < _EQUAL_MOMENTS and pair.head is not None:
        if pair.distance > _REORDERED:
            return Relation.PERMUTED
        if pair.distance < _ROUNDED_TO_16_BITS and pair.head < _ROUNDED_TO_16_BITS:
            return Relation.COPY if same_type else Relation.RECAST
    if pair.distance < _ROUNDED_TO_16_BITS:
        if same_head and pair.head is not None and pair.head < _ROUNDED_TO_16_BITS:
            return Relation.RECAST if pair.distance > 0 or not same_type else Relation.COPY
        return Relation.HEAD_ONLY
    rounded = same_head and pair.head is not None and pair.head < 3 * pair.distance and pair.evenness < 5
    if rounded and pair.distance < _RECAST:
        return Relation.RECAST
    if rounded and pair.distance < _QUANTISED and pair.vectors < _UNTRAINED_VECTORS:
        return Relation.QUANTISED
    # Training that adds something orthogonal, looked at backwards, shrinks a model as pruning does: not its kurtosis.
    shrunk = -1.45 < pair.growth < -0.75 and -1.5 < pair.growths < -0.6
    if (
        shrunk
        and pair.kurtosis > _LEAST_PRUNED_KURTOSIS
        and pair.head is not None
        and pair.head < 0.1 * pair.distance
    ):
        return Relation.PRUNED
    if pair.vectors < _UNTRAINED_VECTORS:
        return Relation.LOW_RANK
    return Relation.FINE_TUNED


def _head_ratio(family: Family, parent: int, child: int) -> float | None:
    a, b = family.heads[parent], family.heads[child]
    if family.classes[parent] != family.classes[child] or a.shape != b.shape or not len(a):
        return None
    squares = float((a**2).sum() + (b**2).sum())
    return float(((a - b) ** 2).sum()) / squares if squares else 0.0


def _kurtosis_growth(family: Family, parent: int, child: int) -> float:
    layers = family.layers
    before, after = family.kurtosis[parent, layers], family.kurtosis[child, layers]
    usable = before > 0
    return float(np.median(after[usable] / before[usable] - 1)) if usable.any() else 0.0


def _trained_vectors(family: Family) -> list[int]:
    # Running statistics follow the data, whether anything is trained or not.
    return [t for t in family.vectors if ".running_" not in family.tensors[t]]


def _vector_change(family: Family, parent: int, child: int) -> float:
    columns = _trained_vectors(family)
    if not columns:
        return np.inf
    change = np.hypot(
        family.mean[child, columns] - family.mean[parent, columns],
        family.std[child, columns] - family.std[parent, columns],
    )
    scale = np.hypot(family.mean[parent, columns], family.std[parent, columns])
    return float(np.mean(change / np.maximum(scale, 1e-6)))


def _moment_change(family: Family, parent: int, child: int) -> float:
    scale = np.hypot(family.mean[parent], family.std[parent]) + 1e-12
    change = np.hypot(family.mean[child] - family.mean[parent], family.std[child] - family.std[parent])
    return float((change / scale).max())

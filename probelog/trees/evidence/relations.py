"""What was done to a parent to make a child of it, from the statistics of the two.

Many pairs are compared at once (`compare`); `relations_of` names what was found. Only copies, recast, quantised, pruned and
permuted models tell by themselves which of the two was made from the other; `probelog.trees.evidence.direction` says more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats, Ints
from probelog.trees.edges import Relation
from probelog.trees.families.distance import layer_ratios
from probelog.trees.families.family import Family

# Mean ratios of squared distances. Rounding to float16 leaves 2e-8, to bfloat16 1.4e-6, to 8 bits 1e-5 to 4e-5.
_ROUNDED_TO_16_BITS = 1e-7
_RECAST = 6e-6
_QUANTISED = 5e-4
# To 8 bits of the largest of N normal numbers it leaves 2 ln N / (24 * 127^2) a layer (of a row: some half of that).
_EIGHT_BITS = 24 * 127**2
_EIGHT_BITS_RANGE = (0.2, 3.0)
#: From this ratio on two heads are not one, trained on.
SAME_HEAD = 0.25
# Without its smallest 30 % a normal distribution's kurtosis is 5 % larger, without the smallest half 14 %.
_LEAST_PRUNED_KURTOSIS = 0.02
# The growth of what was pruned is about -1, and nearer to 0 after training.
_SHRUNK = -0.4
# What loses the part f of its squares, and hardly any of its fourth powers, has a kurtosis 1/(1 - f)^2 times as large,
# and D is f/(2 - f): the kurtosis grows by four times D or more. Half of it remains after some training.
_PRUNED_KURTOSIS = 2.0
# Moments are stored as float32.
_EQUAL_MOMENTS = 1e-5
# Rounding leaves about as much in all layers: the ratio of the 90th to the 10th percentile.
_EVEN = 5.0
# Between models whose moments agree, this far apart means another order of the same numbers.
_REORDERED = 0.02
# Norms and biases that were not trained are equal, or differ by rounding to another type: by 5e-5 in float16, 5e-4 in
# bfloat16. A few steps of training move them by 1e-3.
_EQUAL_VECTORS = 1e-5
_ROUNDED_VECTORS = 6e-4


# Numbers of sketches that are held at once.
_BLOCK = 2**18


@dataclass(frozen=True, slots=True)
class Comparison:
    """Children beside possible parents: m pairs, an array (m,) for each statistic.

    ``distance`` is the mean ratio over the layers, ``evenness`` the ratio of its 90th to its 10th percentile there,
    ``head`` the ratio of the heads (NaN: other sizes), ``growth`` (|c|^2 - |p|^2) / |c - p|^2 over all layers (-1
    where some of the parent's numbers became zero, +1 where something orthogonal was added) and ``growths`` its
    median over the layers, ``kurtosis`` the median relative growth of a layer's, ``vectors`` the mean relative change
    of norms and biases, ``moments`` the largest change of any moment.
    """

    distance: Floats
    evenness: Floats
    head: Floats
    growth: Floats
    growths: Floats
    least_growth: Floats
    kurtosis: Floats
    vectors: Floats
    moments: Floats


def compare(family: Family, parents: Ints, children: Ints) -> Comparison:
    """The comparison of pairs of models of a family, by position."""
    step = _pairs_at_once(family)
    blocks = [
        _compared(family, parents[begin : begin + step], children[begin : begin + step])
        for begin in range(0, len(parents), step)
    ]
    names = Comparison.__slots__
    return Comparison(
        **{name: np.concatenate([np.empty(0), *(block[name] for block in blocks)]) for name in names}
    )


def distance_and_growth(family: Family, parents: Ints, children: Ints) -> tuple[Floats, Floats]:
    """Those two statistics of a comparison alone, of many pairs."""
    step = _pairs_at_once(family)
    distance, growth = np.ones(len(parents)), np.zeros(len(parents))
    for begin in range(0, len(parents), step):
        block = slice(begin, begin + step)
        layers = _Layers.of(family, parents[block], children[block])
        distance[block], growth[block] = layers.distance(), layers.growth()
    return distance, growth


@dataclass(frozen=True, slots=True)
class _Layers:
    """(m, L) ratios, squared distances and growth of the squares, and whether a layer counts."""

    ratios: Floats
    differences: Floats
    grown: Floats
    counted: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, family: Family, parents: Ints, children: Ints) -> _Layers:
        sketches, layers = family.sketches, family.layers
        ratios, differences = layer_ratios(sketches[parents], sketches[children])
        grown = family.squares(children, layers) - family.squares(parents, layers)
        return cls(ratios, differences, grown, ~np.isnan(ratios))

    def distance(self) -> Floats:
        there = self.counted.sum(axis=1)
        return _quotient(np.nansum(self.ratios, axis=1), there, 1.0)

    def growth(self) -> Floats:
        total = self.differences.sum(axis=1)
        grown = np.where(self.counted, self.grown, 0).sum(axis=1)
        return _quotient(grown, total, 0.0)


def _compared(family: Family, parents: Ints, children: Ints) -> dict[str, Floats]:
    layers = _Layers.of(family, parents, children)
    ratios, differences, grown, counted = layers.ratios, layers.differences, layers.grown, layers.counted
    low, high = _quantile(ratios, counted, 0.1), _quantile(ratios, counted, 0.9)
    moved = differences > 0
    growths = np.divide(grown, differences, out=np.full(grown.shape, np.nan), where=moved)
    return {
        "distance": layers.distance(),
        "evenness": _quotient(high, low, np.inf),
        "head": head_ratios(family, parents, children),
        "growth": layers.growth(),
        "growths": _quantile(growths, moved, 0.5),
        "least_growth": _quantile(growths, moved, 0.1),
        "kurtosis": _kurtosis_growth(family, parents, children),
        "vectors": _vector_change(family, parents, children),
        "moments": _moment_change(family, parents, children),
    }


def _pairs_at_once(family: Family) -> int:
    return max(_BLOCK // max(int(family.statistics.shape[1]), 1), 1)


def relations_of(pairs: Comparison, same_type: npt.NDArray[np.bool_]) -> list[Relation]:
    """The names of what comparisons show; ``same_type`` (m,): both are stored in types of the same precision."""
    head_known = ~np.isnan(pairs.head)
    head = np.where(head_known, pairs.head, np.inf)
    same_moments = (pairs.moments < _EQUAL_MOMENTS) & head_known
    equal = pairs.distance < _ROUNDED_TO_16_BITS
    equal_head = head < _ROUNDED_TO_16_BITS
    rounded = (head < SAME_HEAD) & (head < 3 * pairs.distance) & (pairs.evenness < _EVEN)
    is_untrained = untrained(pairs.vectors, same_type)
    copied = np.where(same_type, Relation.COPY, Relation.RECAST)
    # The first that holds.
    cases: list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.str_] | Relation]] = [
        (same_moments & (pairs.distance > _REORDERED), Relation.PERMUTED),
        (same_moments & equal & equal_head, copied),
        (equal & equal_head, np.where(pairs.distance > 0, Relation.RECAST, copied)),
        (equal, Relation.HEAD_ONLY),
        (rounded & (pairs.distance < _RECAST), Relation.RECAST),
        (rounded & (pairs.distance < _QUANTISED) & is_untrained, Relation.QUANTISED),
        (_pruned(pairs) & (head < 0.1 * pairs.distance), Relation.PRUNED),
        (is_untrained, Relation.LOW_RANK),
    ]
    names = np.select([case for case, _ in cases], [name for _, name in cases], Relation.FINE_TUNED)
    return [Relation(str(name)) for name in names]


def _pruned(pairs: Comparison) -> npt.NDArray[np.bool_]:
    # Training that adds something orthogonal, looked at backwards, shrinks a model as pruning does: not its kurtosis.
    shrunk = (pairs.growth < _SHRUNK) & (pairs.growths < _SHRUNK)
    heavier = np.maximum(_LEAST_PRUNED_KURTOSIS, _PRUNED_KURTOSIS * pairs.distance)
    return np.asarray(shrunk & (pairs.kurtosis > heavier))


def pruned_trunks(pairs: Comparison, same_type: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(m,) whether pairs differ by pruning without any training, whatever their heads are."""
    return _pruned(pairs) & untrained(pairs.vectors, same_type)


def rounded_trunks(
    family: Family, pairs: Comparison, same_type: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(m,) whether pairs differ by rounding to 8 bits, or to bfloat16, whatever their heads are.

    By what rounding leaves, alike in all layers, and by norms and biases that nobody has trained.
    """
    sizes = family.sizes[family.layers]
    eight = float((2 * np.log(np.maximum(sizes, 2)) / _EIGHT_BITS).mean()) if len(sizes) else 0.0
    even = pairs.evenness < _EVEN
    low, high = _EIGHT_BITS_RANGE
    quantised = even & (low * eight < pairs.distance) & (pairs.distance < high * eight)
    recast = even & (pairs.distance > _ROUNDED_TO_16_BITS) & (pairs.distance < _RECAST)
    return quantised & untrained(pairs.vectors, same_type), recast & (pairs.vectors < _ROUNDED_VECTORS)


def _quotient(a: Floats, b: Floats | Ints, otherwise: float) -> Floats:
    """(m,) a / b where b is positive."""
    return np.asarray(np.divide(a, b, out=np.full(len(a), otherwise), where=b > 0))


def equal_vectors(family: Family, parents: Ints, children: Ints) -> npt.NDArray[np.bool_]:
    """(m,) whether pairs have norms and biases in common, as training leaves none of them."""
    step = _pairs_at_once(family)
    blocks = [
        _vector_change(family, parents[begin : begin + step], children[begin : begin + step])
        for begin in range(0, len(parents), step)
    ]
    same_type = family.precision[parents] == family.precision[children]
    return untrained(np.concatenate([np.empty(0), *blocks]), same_type)


def untrained(vectors: Floats, same_type: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(m,) whether pairs whose norms and biases changed by so much have them in common, as training leaves none of them."""
    return np.asarray(vectors < np.where(same_type, _EQUAL_VECTORS, _ROUNDED_VECTORS))


def _quantile(values: Floats, counted: npt.NDArray[np.bool_], share: float) -> Floats:
    """(m,) a quantile of each row's counted values (m, L), linear between two; 0 without any."""
    if not values.shape[1]:
        return np.zeros(len(values))
    ordered = np.sort(np.where(counted, values, np.inf), axis=1)
    count = counted.sum(axis=1)
    place = share * np.maximum(count - 1, 0)
    below = place.astype(np.int64)
    above = np.minimum(below + 1, np.maximum(count - 1, 0))
    rows = np.arange(len(values))
    low = np.where(count > 0, ordered[rows, below], 0)
    high = np.where(count > 0, ordered[rows, above], 0)
    return np.asarray(low + (high - low) * (place - below))


def head_ratios(family: Family, parents: Ints, children: Ints) -> Floats:
    """(m,) ratios of the heads of pairs; NaN where their sizes differ or there is none."""
    sizes = family.head_sizes[parents]
    same = (
        (family.classes[parents] == family.classes[children])
        & (sizes == family.head_sizes[children])
        & (sizes > 0)
    )
    ratios = np.full(len(parents), np.nan)
    for size in np.unique(sizes[same]).tolist():
        rows = np.flatnonzero(same & (sizes == size))
        place = np.arange(size)
        a = family.head_values[family.head_starts[parents[rows]][:, None] + place].astype(np.float64)
        b = family.head_values[family.head_starts[children[rows]][:, None] + place].astype(np.float64)
        squares = (a**2 + b**2).sum(axis=1)
        ratios[rows] = np.divide(
            ((a - b) ** 2).sum(axis=1), squares, out=np.zeros(len(rows)), where=squares > 0
        )
    return ratios


def _kurtosis_growth(family: Family, parents: Ints, children: Ints) -> Floats:
    before = family.kurtosis[parents][:, family.layers].astype(np.float64)
    after = family.kurtosis[children][:, family.layers].astype(np.float64)
    usable = before > 0
    return _quantile(np.divide(after, before, out=np.ones(before.shape), where=usable) - 1, usable, 0.5)


def trained_vectors(family: Family) -> Ints:
    """The vectors that training moves."""
    # Running statistics follow the data, whether anything is trained or not.
    return np.array([t for t in family.vectors if ".running_" not in family.tensors[t]], np.int64)


def _vector_change(family: Family, parents: Ints, children: Ints) -> Floats:
    columns = trained_vectors(family)
    if not len(columns):
        return np.full(len(parents), np.inf)
    change, scale = _changes(family, parents, children, columns)
    return np.asarray((change / np.maximum(scale, 1e-6)).mean(axis=1))


def _moment_change(family: Family, parents: Ints, children: Ints) -> Floats:
    change, scale = _changes(family, parents, children, np.arange(len(family.tensors)))
    return np.asarray((change / (scale + 1e-12)).max(axis=1))


def _changes(family: Family, parents: Ints, children: Ints, columns: Ints) -> tuple[Floats, Floats]:
    """(m, t): by how much mean and standard deviation moved, and the parent's own size."""
    mean, std = (array[parents][:, columns].astype(np.float64) for array in (family.mean, family.std))
    later_mean, later_std = (
        array[children][:, columns].astype(np.float64) for array in (family.mean, family.std)
    )
    return np.hypot(later_mean - mean, later_std - std), np.hypot(mean, std)

"""The nearest models of each model of a family, and the groups that hang together, without comparing all with all.

Where d is small, a ratio of two layers is 1 - cos of their sketches, so that the mean over layers of the products of
normalised sketches ranks models by distance: matrix products of blocks. Their best are compared exactly. In a large family
the normalised sketches are projected to fewer numbers first (Johnson and Lindenstrauss), and more of the best are
compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from probelog.arrays import Floats, Ints
from probelog.trees.evidence.relations import distance_and_growth
from probelog.trees.families.distance import RELATED
from probelog.trees.families.family import Family
from probelog.weights.sketch import WIDTH

#: Components of up to so many models are compared all with all.
COMPLETE = 128
#: Neighbours of each model in a larger one.
NEIGHBOURS = 32

# Times as many are compared exactly: products rank a little less well.
_SPARE = 2
# Models from which on sketches are projected, and to how many numbers.
_MANY = 20_000
_PROJECTED = 256
# Numbers of sketches that are normalised at once.
_BLOCK = 2**20
# Standard deviations of a sketch's distance within which two models are equally near, and how many of a model's
# neighbours are looked at.
_DEVIATIONS = 3
_LOOKED_AT = 4
# Numbers of a product that are held at once.
_CLOSENESS = 2**24
# Maxima of so many columns are ranked in place of the columns.
_CHUNK = 32


Look = Callable[[Sequence[tuple[str, str]]], Mapping[tuple[str, str], float]]
"""Distances of pairs of models by their own numbers, of those pairs where these can be had."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The nearest models of each of n models: those of model i lie from ``starts[i]`` to ``starts[i + 1]``.

    By distance and then by number: ``others`` (m,), ``distances`` (m,) and ``growths`` (m,), the growth from the other
    model to this one (`probelog.trees.evidence.relations.Comparison`). Related ones only.
    """

    starts: Ints
    others: Ints
    distances: Floats
    growths: Floats

    def of(self, model: int) -> Ints:
        """The neighbours of one model, the nearest first."""
        return self.others[self.starts[model] : self.starts[model + 1]]

    def distances_of(self, model: int) -> Floats:
        """The distances of those neighbours."""
        return self.distances[self.starts[model] : self.starts[model + 1]]

    def related(self) -> Ints:
        """(n,) how many related models each has."""
        return np.bincount(self.models[self.distances < RELATED], minlength=len(self.starts) - 1)

    @property
    def models(self) -> Ints:
        """(m,) the model whose neighbour each is."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    @property
    def places(self) -> Ints:
        """(m,) how many neighbours of the model are nearer."""
        return np.arange(len(self.others)) - np.repeat(self.starts[:-1], np.diff(self.starts))

    def exchanged(self, new: Mapping[int, int]) -> Neighbours:
        """The same with some models in place of others that have neighbours."""
        name = np.arange(len(self.starts) - 1)
        name[list(new)] = list(new.values())
        return _listed(len(name), name[self.models], name[self.others], self.distances, self.growths)

    def among(self, kept: npt.NDArray[np.bool_]) -> Neighbours:
        """The neighbours where both models are in a set, given as a mask (n,)."""
        return self.where(kept[self.models] & kept[self.others])

    def looked_at(self, family: Family, look: Look) -> Neighbours:
        """The same with distances by a look at the models' numbers, where sketches leave open who is nearest."""
        n = len(self.starts) - 1
        error = _DEVIATIONS * math.sqrt(2 / (WIDTH * max(len(family.layers), 1)))
        nearest = np.full(n, np.nan)
        some = np.diff(self.starts) > 0
        nearest[some] = self.distances[self.starts[:-1][some]]
        near = (self.distances < RELATED) & (self.places < _LOOKED_AT)
        near &= self.distances * (1 - error) <= nearest[self.models] * (1 + error)
        open_ = near & (np.bincount(self.models[near], minlength=n) > 1)[self.models]
        keys = np.minimum(self.models, self.others) * n + np.maximum(self.models, self.others)
        asked = np.unique(keys[open_])
        pairs = [(family.repos[key // n], family.repos[key % n]) for key in asked.tolist()]
        found = look(pairs)
        known = np.array([key for key, pair in zip(asked.tolist(), pairs, strict=True) if pair in found], int)
        exact = np.array([found[pair] for pair in pairs if pair in found])
        distances = self.distances.copy()
        where = np.isin(keys, known)
        distances[where] = exact[np.searchsorted(known, keys[where])]
        return _listed(n, self.models, self.others, distances, self.growths)

    def where(self, chosen: npt.NDArray[np.bool_]) -> Neighbours:
        """Those of the neighbours that a mask (m,) chooses."""
        starts = np.concatenate([[0], np.cumsum(chosen)])[self.starts]
        return Neighbours(starts, self.others[chosen], self.distances[chosen], self.growths[chosen])


def find_neighbours(family: Family, models: Ints, *, memory_mb: int = 1024) -> Neighbours:
    """The neighbours of some models of a family among themselves; the others have none.

    All that are in one component with a model where that has up to ``COMPLETE``, else its nearest ``NEIGHBOURS``.
    """
    n = len(family)
    if len(models) <= COMPLETE:
        every = _all_with_all(family, [models])
        near = every.distances < RELATED
        component = components(n, every.models[near], every.others[near])
        return every.where(component[every.models] == component[every.others])
    found = _nearest(family, models, Screen.of(family, models, memory_mb=memory_mb), memory_mb)
    near = found.distances < RELATED
    component = components(n, found.models[near], found.others[near])
    sizes = np.bincount(component[models], minlength=n)
    large = sizes[component] > COMPLETE
    kept = large[found.models] & near
    rows = (found.models, found.others, found.distances, found.growths)
    small = models[~large[models]]
    small = small[np.argsort(component[small], kind="stable")]
    groups = np.split(small, np.flatnonzero(np.diff(component[small])) + 1) if len(small) else []
    complete = _all_with_all(family, [group for group in groups if len(group) > 1])
    return _listed(
        n,
        *(
            np.concatenate([row[kept], other_row])
            for row, other_row in zip(
                rows,
                (complete.models, complete.others, complete.distances, complete.growths),
                strict=True,
            )
        ),
    )


def _nearest(family: Family, models: Ints, screen: Screen, memory_mb: int) -> Neighbours:
    """The nearest of some models, found by the screen and compared exactly, block by block."""
    n = len(models)
    rows = max(memory_mb * 2**14 // n, 1)  # a sixteenth of the memory, of four bytes a number
    blocks = []
    for begin in range(0, n, rows):
        one, other = screen.nearest(np.arange(begin, min(begin + rows, n)), _SPARE * NEIGHBOURS)
        one, other = models[one], models[other]
        found = _listed(len(family), one, other, *distance_and_growth(family, other, one))
        best = found.where(found.places < NEIGHBOURS)
        blocks.append((best.models, best.others, best.distances, best.growths))
    return _listed(len(family), *(np.concatenate(column) for column in zip(*blocks, strict=True)))


def components(n: int, one: Ints, other: Ints) -> Ints:
    """(n,) the smallest number of each model's component, where pairs of models hang together."""
    graph = coo_array((np.ones(len(one), np.int8), (one, other)), (n, n))
    _, label = connected_components(graph, directed=False)
    first = np.full(n, n)
    np.minimum.at(first, label, np.arange(n))
    return np.asarray(first[label])


@dataclass(frozen=True, slots=True)
class Screen:
    """Points (m, d) of m models, float32, whose squared distances are about twice those of the models.

    ``halves`` (m,) are half of each point's square; ``margin`` is how much further away than it is a model can look.
    """

    points: npt.NDArray[np.float32]
    halves: npt.NDArray[np.float32]
    margin: float
    projection: npt.NDArray[np.float32] | None

    @classmethod
    def of(cls, family: Family, models: Ints, *, memory_mb: int = 1024) -> Screen:
        """The points of some models, projected where there are many."""
        projection = None
        numbers = len(family.layers) * WIDTH
        many = len(models) > _MANY or 4 * len(models) * numbers > memory_mb * 2**18
        if many and numbers > _PROJECTED:
            signs = np.random.default_rng(numbers).integers(0, 2, (numbers, _PROJECTED), dtype=np.int8)
            projection = (2 * signs - 1).astype(np.float32) / np.float32(np.sqrt(_PROJECTED))
        points = _points(family, models, projection)
        return cls(points, _halves(points), 1.1 if projection is None else 1.6, projection)

    def points_of(self, family: Family) -> npt.NDArray[np.float32]:
        """The points of other models of the family."""
        return _points(family, np.arange(len(family)), self.projection)

    def with_points(self, points: npt.NDArray[np.float32]) -> Screen:
        """A screen of those other points."""
        return replace(self, points=points, halves=_halves(points))

    def nearest(self, models: Ints, wanted: int) -> tuple[Ints, Ints]:
        """Some of the models beside up to ``wanted`` related ones each."""
        one, other, _ = self.near_points(self.points[models], wanted, itself=models)
        return models[one], other

    def near_points(
        self, points: npt.NDArray[np.float32], wanted: int, *, itself: Ints | None = None
    ) -> tuple[Ints, Ints, Floats]:
        """Points (r, d) beside up to ``wanted`` related models each: row, model and distance.

        ``itself`` (r,): a model that is left out of each row.
        """
        step = max(_CLOSENESS // max(len(self.points), 1), 1)
        blocks = []
        for begin in range(0, len(points), step):
            block = slice(begin, begin + step)
            left_out = None if itself is None else itself[block]
            row, column, distance = self._near_block(points[block], wanted, left_out)
            blocks.append((row + begin, column, distance))
        rows, columns, distances = (np.concatenate(side) for side in zip(*blocks, strict=True))
        return rows, columns, distances

    def _near_block(
        self, points: npt.NDArray[np.float32], wanted: int, itself: Ints | None
    ) -> tuple[Ints, Ints, Floats]:
        r, n = len(points), len(self.points)
        chunks = -(-n // _CHUNK)
        closeness = np.full((r, chunks * _CHUNK), -np.inf, np.float32)
        np.matmul(points, self.points.T, out=closeness[:, :n])
        closeness[:, :n] -= self.halves
        if itself is not None:
            closeness[np.arange(r), itself] = -np.inf
        # The best of all are among the chunks with the best maxima.
        chunked = closeness.reshape(r, _CHUNK, chunks)
        best = _largest(chunked.max(axis=1), wanted)
        columns = (best[:, :, None] + chunks * np.arange(_CHUNK)).reshape(r, -1)
        values = np.take_along_axis(closeness, columns, axis=1)
        chosen = _largest(values, wanted)
        columns = np.take_along_axis(columns, chosen, axis=1)
        distances = _halves(points)[:, None] - np.take_along_axis(values, chosen, axis=1)
        row, column = np.nonzero(distances < RELATED * self.margin)
        return row, columns[row, column], distances[row, column]


def _largest(values: npt.NDArray[np.float32], count: int) -> Ints:
    """(r, count) the columns of the largest values of each row, in no order."""
    if values.shape[1] <= count:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return np.argpartition(values, -count, axis=1)[:, -count:]


def _points(
    family: Family, models: Ints, projection: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.float32]:
    numbers = len(family.layers) * WIDTH
    points = np.empty((len(models), numbers if projection is None else projection.shape[1]), np.float32)
    step = max(_BLOCK // max(numbers, 1), 1)
    for begin in range(0, len(models), step):
        block = _normalised(family.sketches[models[begin : begin + step]])
        points[begin : begin + step] = block if projection is None else block @ projection
    return points


def _halves(points: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(np.einsum("nk,nk->n", points, points) / 2)


def _normalised(sketches: Floats) -> npt.NDArray[np.float32]:
    """(m, L * 32): every layer of length one, all of a model together too; zero layers stay zero."""
    exact = sketches.astype(np.float64)
    lengths = np.sqrt(np.einsum("mlk,mlk->ml", exact, exact))
    layers = np.sqrt(np.maximum((lengths > 0).sum(axis=1), 1))
    scale = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0) / layers[:, None]
    return np.asarray((exact * scale[:, :, None]).astype(np.float32).reshape(len(sketches), -1))


def _all_with_all(family: Family, groups: Sequence[Ints]) -> Neighbours:
    pairs = [np.triu_indices(len(group), 1) for group in groups]
    one = np.concatenate([np.empty(0, np.int64), *(g[i] for g, (i, _) in zip(groups, pairs, strict=True))])
    other = np.concatenate([np.empty(0, np.int64), *(g[j] for g, (_, j) in zip(groups, pairs, strict=True))])
    distances, growths = distance_and_growth(family, other, one)
    return _listed(
        len(family),
        np.concatenate([one, other]),
        np.concatenate([other, one]),
        np.concatenate([distances, distances]),
        np.concatenate([growths, -growths]),
    )


def _listed(n: int, one: Ints, other: Ints, distances: Floats, growths: Floats) -> Neighbours:
    order = np.lexsort((other, distances, one))
    starts = np.searchsorted(one[order], np.arange(n + 1))
    return Neighbours(starts, other[order], distances[order], growths[order])

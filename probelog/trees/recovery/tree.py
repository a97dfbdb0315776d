"""The tree of a family: an arborescence over the neighbours, then what it cannot see.

A model may be *fixed*: what was done to its parent is known, and so the parent is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats, Ints
from probelog.trees.edges import Relation
from probelog.trees.evidence.latent import step_shares, unseen_shares
from probelog.trees.evidence.odds import Odds
from probelog.trees.evidence.relations import distance_and_growth, equal_vectors
from probelog.trees.families.distance import RELATED
from probelog.trees.families.family import Family
from probelog.trees.recovery.arborescence import arborescence
from probelog.trees.recovery.neighbours import Neighbours
from probelog.trees.recovery.points import Points

#: The parent of a model that has none.
NONE = -1

# Nats that a factor e between two squared distances is worth beside the log odds of the direction.
_DISTANCE_WEIGHT = 4.0
# A parent further away than this costs as much as having none.
_ROOT_DISTANCE = 0.35
# Parents that the arborescence may choose from, the nearest ones: edges grow with the models, not with their square.
_PARENT_CANDIDATES = 24
# What it costs, in nats, to be the child of a recast, quantised, pruned, merged or head-only model.
_FIXED_PARENT = 3.0
# What it is worth, in nats, to have all norms and biases in common: adapters and new heads leave them as they are.
_EQUAL_VECTORS = 6.0
# What it is worth, in nats, that the child declares the parent.
_DECLARED_PARENT = 2.0
_NO_ROOT = 1000.0
# Log odds that it takes to be the parent's child and not the grandparent's.
_CLIMB = 1.5
_LEAST_ERROR = 0.1
# Part of the distance to other models below which two are close: the others tell which of them is the centre.
_CLOSE = 0.2
# From this share of an edge on, what looks like the parent is a sibling.
_SIBLING_SHARE = 0.25
_LARGEST_SHARE = 1.2
# Numbers of points that are held at once.
_BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class Around:
    """The models around those of a family: who is near, what the facts say, where the points are.

    ``distinct`` (n,): models that have neighbours, one of each set of equal ones.
    """

    family: Family
    neighbours: Neighbours
    odds: Odds
    points: Points
    distinct: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Siblings:
    """A model that is no child of what looked like its parent, but of an unseen one: ``share`` and its error."""

    model: int
    sibling: int
    share: float
    error: float


def grow(around: Around, fixed: Ints, excluded: Ints) -> Ints:
    """(n,) the parent of each model, or NONE.

    ``fixed`` (n,) are the parents that are known, NONE elsewhere; ``excluded`` (e, 2) pairs of parent and child that
    cannot be.
    """
    family, neighbours, odds = around.family, around.neighbours, around.odds
    n = len(family)
    free = fixed == NONE
    near = neighbours.places < _PARENT_CANDIDATES
    parents, children = neighbours.others[near], neighbours.models[near]
    distances, growths = neighbours.distances[near], neighbours.growths[near]
    # What is declared may be chosen, too, where it is related.
    keys = np.setdiff1d(odds.pairs @ np.array([n, 1]), parents * n + children)
    added, growth = distance_and_growth(family, keys // n, keys % n)
    keys, added, growth = (array[added < RELATED] for array in (keys, added, growth))
    parents, children = np.concatenate([parents, keys // n]), np.concatenate([children, keys % n])
    distances, growths = np.concatenate([distances, added]), np.concatenate([growths, growth])
    possible = free[children] & ~np.isin(parents * n + children, excluded @ np.array([n, 1]))
    parents, children, distances, growths = (
        array[possible] for array in (parents, children, distances, growths)
    )
    direction = odds.made(Relation.FINE_TUNED, parents, children, growths)
    direction = direction + centre(around, parents, children, distances)
    costs = (
        _DISTANCE_WEIGHT * np.log(distances + 1e-12)
        + np.logaddexp(0, -direction)
        + _FIXED_PARENT * ~free[parents]
        - _EQUAL_VECTORS * equal_vectors(family, parents, children)
        - _DECLARED_PARENT * odds.declares(parents, children)
    )
    known = np.flatnonzero(~free)
    roots = np.where(free, _DISTANCE_WEIGHT * math.log(_ROOT_DISTANCE), _NO_ROOT)
    return arborescence(
        n,
        np.concatenate([parents, fixed[known]]),
        np.concatenate([children, known]),
        np.concatenate([costs, np.zeros(len(known))]),
        roots,
    )


def centre(
    around: Around,
    parents: Ints,
    children: Ints,
    distances: Floats,
    *,
    limit: float = 2.0,
    timed: bool = False,
) -> Floats:
    """(m,) log odds, from the models around two that are close, that the child was made from the parent.

    At most ``limit``. Known times say more of trained models: 0 there, but for ``timed``.
    """
    neighbours = around.neighbours
    result = np.zeros(len(parents))
    counts = np.minimum(np.diff(neighbours.starts)[parents], _PARENT_CANDIDATES)
    middle = neighbours.starts[parents] + np.minimum((counts + 1) // 2, np.maximum(counts - 1, 0))
    usual = np.zeros(len(parents))
    usual[counts > 1] = neighbours.distances[middle[counts > 1]]
    asked = timed | (around.odds.time(parents, children) == 0)
    open_ = np.flatnonzero(asked & (distances <= _CLOSE * usual))
    for parent, pairs in _grouped(parents[open_], open_):
        others = neighbours.of(parent)[:_PARENT_CANDIDATES]
        shares, errors = _shares(around, parent, children[pairs], others, children[pairs][:, None] == others)
        known = ~np.isnan(shares)
        result[pairs[known]] = np.clip((0.5 - shares[known]) / errors[known] ** 2, -limit, limit)
    return result


def climb(around: Around, parents: Ints, free: npt.NDArray[np.bool_]) -> Ints:
    """Children that do not show the step from their grandparent to their parent belong to the grandparent."""
    result = parents.copy()
    climbing = np.flatnonzero(free)
    points = around.points
    step = max(_BLOCK // max(around.family.statistics.shape[1], 1), 1)
    while len(climbing):
        climbing = climbing[result[climbing] != NONE]
        climbing = climbing[result[result[climbing]] != NONE]
        moved = []
        for begin in range(0, len(climbing), step):
            block = climbing[begin : begin + step]
            upper = result[result[block]]
            shares, errors = step_shares(points.of(upper), points.of(result[block]), points.of(block))
            shown = (shares - 0.5) / np.maximum(errors, _LEAST_ERROR) ** 2 > _CLIMB
            # An adapter on top of a step too small to be seen has the norms and biases that the step made.
            shown |= equal_vectors(around.family, result[block], block) & ~equal_vectors(
                around.family, upper, block
            )
            moved.append(block[~shown])
        climbing = np.concatenate([np.empty(0, np.int64), *moved])
        result[climbing] = result[result[climbing]]
    return result


def cut(around: Around, parents: Ints, free: npt.NDArray[np.bool_]) -> tuple[Ints, list[Siblings]]:
    """Siblings under an unseen parent are children of their nearest known ancestor, or of none."""
    result = parents.copy()
    siblings: dict[int, Siblings] = {}
    asked = np.flatnonzero(free)
    while len(asked):
        asked = asked[result[asked] != NONE]
        shares, errors = unseen(around, result, free, asked)
        least = np.maximum(_SIBLING_SHARE, 2 * errors)
        gone = (least < shares) & (shares < _LARGEST_SHARE)
        for model, share, error in zip(asked[gone], shares[gone], errors[gone], strict=True):
            siblings[int(model)] = Siblings(int(model), int(result[model]), float(share), float(error))
        left = result[asked[gone]]
        result[asked[gone]] = result[left]
        # What has lost a descendant has another model to be compared with.
        asked = np.unique(np.concatenate([asked[gone], left[free[left]]]))
    return result, list(siblings.values())


def unseen(around: Around, parents: Ints, free: npt.NDArray[np.bool_], models: Ints) -> tuple[Floats, Floats]:
    """(m,) shares of the models' edges to their parents that lie between the parent and an unseen one; errors.

    From the neighbours of the parent that are not fixed and do not come from the model. NaN without any.
    """
    first, last = _descent(parents)
    shares, errors = np.full(len(models), np.nan), np.full(len(models), np.nan)
    for parent, places in _grouped(parents[models], np.arange(len(models))):
        others = around.neighbours.of(parent)
        others = others[free[others]]
        children = models[places][:, None]
        excluded = (first[children] <= first[others]) & (first[others] < last[children])
        shares[places], errors[places] = _shares(around, parent, models[places], others, excluded)
    return shares, errors


def _shares(
    around: Around, parent: int, children: Ints, others: Ints, excluded: npt.NDArray[np.bool_]
) -> tuple[Floats, Floats]:
    points = around.points
    step = max(_BLOCK // max(around.family.statistics.shape[1], 1), 1)
    origin, spread = points.of(np.array([parent]))[0], points.of(others)
    blocks = [
        unseen_shares(origin, points.of(children[at : at + step]), spread, excluded[at : at + step])
        for at in range(0, len(children), step)
    ]
    shares, errors = (np.concatenate(side) for side in zip(*blocks, strict=True))
    return shares, errors


def _grouped(names: Ints, items: Ints) -> Iterator[tuple[int, Ints]]:
    """The items of each name."""
    order = np.argsort(names, kind="stable")
    bounds = np.flatnonzero(np.diff(names[order], prepend=-1, append=-1))
    for begin, end in pairwise(bounds.tolist()):
        yield int(names[order[begin]]), items[order[begin:end]]


def _descent(parents: Ints) -> tuple[Ints, Ints]:
    """(n,) numbers in an order of descent: those that come from a model are ``first`` to ``last`` - 1, it included."""
    n = len(parents)
    order = np.argsort(parents, kind="stable")
    starts = np.searchsorted(parents[order], np.arange(n + 1)).tolist()
    children = order.tolist()
    first, last = [0] * n, [0] * n
    waiting = children[: starts[0]][::-1]
    count = 0
    path: list[int] = []
    while waiting:
        model = waiting.pop()
        if model < 0:
            last[path.pop()] = count
            continue
        first[model] = count
        count += 1
        path.append(model)
        waiting.append(-1)
        waiting.extend(children[starts[model] : starts[model + 1]])
    return np.array(first), np.array(last)

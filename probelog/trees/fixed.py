"""Models whose parents are known before the tree is, from a pair or a few models alone.

Copies and permuted copies; recast, quantised and pruned models; models of equal tensors but the head's; merges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from probelog.arrays import Floats, Ints
from probelog.trees.distance import RELATED
from probelog.trees.edges import Relation
from probelog.trees.family import Family
from probelog.trees.merges import find_merge, may_be_merges
from probelog.trees.neighbours import Neighbours, components
from probelog.trees.odds import Odds
from probelog.trees.relations import compare, relations_of
from probelog.trees.tree import Around, centre

# The nearest models that a model may be a twin of, or a merge of.
_CANDIDATES = 8
# Leaves, nearly always (Atlas, arXiv 2503.10633: 99.4 % of quantised models).
_TWINS = (Relation.RECAST, Relation.QUANTISED, Relation.PRUNED)
# Below this distance all tensors but the head's are equal.
_EQUAL = 1e-7
# Models of a group that each is compared with; in a larger group some of them stand for all.
_JUDGES = 256
# Numbers of points that are held at once.
_BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class Fixed:
    """What was done, and to which parents: the heaviest first."""

    relation: Relation
    parents: tuple[int, ...]
    weights: tuple[float, ...] = (1.0,)
    evidence: Mapping[str, float] = field(default_factory=dict)


def equal_models(family: Family, odds: Odds) -> dict[int, Fixed]:
    """The copies among the usable models: all but one of each set with equal statistics."""
    sets: dict[bytes, list[int]] = {}
    tensors = len(family.tensors)
    for model in np.flatnonzero(family.usable).tolist():
        digest = hashlib.blake2b(
            np.delete(family.statistics[model], np.s_[2 * tensors : 3 * tensors]).tobytes()
        )
        digest.update(family.head(model).tobytes())
        sets.setdefault(digest.digest(), []).append(model)
    copies = {}
    for models in sets.values():
        if len(models) == 1:
            continue
        # Equal numbers in a type that could hold finer ones came from the coarser one.
        original = min(models, key=lambda model: (family.precision[model], odds.age(model)))
        for copy in models:
            if copy != original:
                same = family.precision[copy] == family.precision[original]
                copies[copy] = Fixed(Relation.COPY if same else Relation.RECAST, (original,))
    return copies


def equal_backbones(family: Family, models: Ints, odds: Odds) -> dict[int, Fixed]:
    """Of models with equal sketches all but one, which the others are head-only children of."""
    sets: dict[bytes, list[int]] = {}
    for model in models.tolist():
        sets.setdefault(hashlib.blake2b(family.sketches[model].tobytes()).digest(), []).append(model)
    groups = [np.array(group) for group in sets.values() if len(group) > 1]
    return _head_only(family, groups, odds)


def permuted(family: Family, models: Ints, neighbours: Neighbours, odds: Odds) -> dict[int, Fixed]:
    """Models with the same numbers in another order: all moments agree, the sketches do not."""
    step = max(_BLOCK // max(family.statistics.shape[1], 1), 1)
    blocks = [models[begin : begin + step] for begin in range(0, len(models), step)]
    every = np.arange(len(family.tensors))
    totals = np.concatenate([np.empty(0), *(family.squares(block, every).sum(axis=1) for block in blocks)])
    order = models[np.lexsort((models, totals))]
    pairs = compare(family, order[:-1], order[1:])
    same_type = family.precision[order[:-1]] == family.precision[order[1:]]
    names = relations_of(pairs, same_type)
    related = neighbours.related()
    found: dict[int, Fixed] = {}
    for (a, b), name, distance in zip(pairwise(order.tolist()), names, pairs.distance, strict=True):
        if name is not Relation.PERMUTED or distance < RELATED or a in found:
            continue
        # What has relatives was there first; else what is older.
        original, child = sorted((a, b), key=lambda model: (-related[model], odds.age(model)))
        later = odds.time(np.array([original]), np.array([child]))[0] < 0
        if later and related[original] == 0:
            original, child = child, original
        found[child] = Fixed(Relation.PERMUTED, (original,))
    return found


def twins(around: Around, models: Ints) -> dict[int, Fixed]:
    """Recast, quantised and pruned models, each with the nearest model that it can be made from."""
    family, neighbours, odds = around.family, around.neighbours, around.odds
    among = np.zeros(len(family), bool)
    among[models] = True
    near = (neighbours.places < _CANDIDATES) & among[neighbours.models]
    parents, children = neighbours.others[near], neighbours.models[near]
    pairs = compare(family, parents, children)
    names = np.array(
        relations_of(pairs, family.precision[parents] == family.precision[children]), dtype=object
    )
    found: dict[int, Fixed] = {}
    chosen = np.flatnonzero(np.isin(names, _TWINS))
    parents, children, names = parents[chosen], children[chosen], names[chosen]
    distances, growths = pairs.distance[chosen], pairs.growth[chosen]
    around_two = np.zeros(len(chosen))
    rounded = names != Relation.PRUNED
    around_two[rounded] = centre(around, parents[rounded], children[rounded], distances[rounded])
    score = np.zeros(len(chosen))
    for name in _TWINS:
        of = names == name
        score[of] = odds.made(name, parents[of], children[of], growths[of], around_two[of])
    for parent, child, name, value in zip(parents.tolist(), children.tolist(), names, score, strict=True):
        if child in found:
            continue
        if value > 0 or (value == 0 and odds.age(parent) < odds.age(child)):
            found[child] = Fixed(name, (parent,))
    return found


def head_only(family: Family, models: Ints, neighbours: Neighbours, odds: Odds) -> dict[int, Fixed]:
    """Models that differ by rounding and their heads: one of each group is what the others were made from."""
    among = np.zeros(len(family), bool)
    among[models] = True
    equal = (neighbours.distances < _EQUAL) & among[neighbours.models] & among[neighbours.others]
    label = components(len(family), neighbours.models[equal], neighbours.others[equal])[models]
    order = np.argsort(label, kind="stable")
    groups = np.split(models[order], np.flatnonzero(np.diff(label[order])) + 1) if len(models) else []
    return _head_only(family, [group for group in groups if len(group) > 1], odds)


def _head_only(family: Family, groups: Sequence[Ints], odds: Odds) -> dict[int, Fixed]:
    children: dict[int, Fixed] = {}
    for group in groups:
        judges = group[:: -(-len(group) // _JUDGES)]
        score = _summed_odds(group, judges, odds)
        if len(judges) < len(group):
            # The best by a sample, and then by all.
            best = group[np.argsort(-score, kind="stable")[:_JUDGES]]
            group_score = dict(zip(best.tolist(), _summed_odds(best, group, odds), strict=True))
        else:
            group_score = dict(zip(group.tolist(), score, strict=True))
        original = min(group_score, key=lambda model: (-group_score[model], odds.age(model)))
        only = Fixed(Relation.HEAD_ONLY, (original,))
        children.update({model: only for model in group.tolist() if model != original})
    return children


def _summed_odds(models: Ints, others: Ints, odds: Odds) -> Floats:
    """(m,) log odds of each model having been the parent of the others, growth left out: nothing moved."""
    total = np.zeros(len(models))
    for place, model in enumerate(models):
        children = others[others != model]
        parents = np.full(len(children), model)
        total[place] = odds.made(Relation.HEAD_ONLY, parents, children, np.zeros(len(children))).sum()
    return total


def merges(around: Around, models: Ints) -> dict[int, Fixed]:
    """Merges of two or more of the models, by least squares."""
    family = around.family
    among = np.zeros(len(family), bool)
    among[models] = True
    inner = around.neighbours.among(among)
    found: dict[int, Fixed] = {}
    several = models[np.diff(inner.starts)[models] >= 2]
    step = max(_BLOCK // (_CANDIDATES * max(family.statistics.shape[1], 1)), 1)
    for begin in range(0, len(several), step):
        block = several[begin : begin + step]
        places = inner.starts[block][:, None] + np.arange(_CANDIDATES)
        there = places < inner.starts[block + 1][:, None]
        candidates = inner.others[np.where(there, places, inner.starts[block][:, None])]
        points = around.points.of(candidates.reshape(-1)).reshape(*candidates.shape, -1)
        own = around.points.of(block)
        for row in np.flatnonzero(may_be_merges(own, points, there)):
            merge = find_merge(own[row], points[row, there[row]])
            if merge is None:
                continue
            order = sorted(range(len(merge.parents)), key=lambda place: -merge.weights[place])
            found[int(block[row])] = Fixed(
                Relation.MERGE,
                tuple(int(candidates[row, merge.parents[place]]) for place in order),
                tuple(merge.weights[place] for place in order),
                {"residual": merge.residual},
            )
    return found

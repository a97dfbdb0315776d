"""Models whose parents are known before the tree is, from a pair or a few models alone.

Copies and permuted copies; recast, quantised and pruned models; models of equal tensors but the head's; merges.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats, Ints
from probelog.trees.edges import Relation
from probelog.trees.evidence.merges import find_merge, may_be_merges
from probelog.trees.evidence.odds import Odds
from probelog.trees.evidence.relations import (
    SAME_HEAD,
    compare,
    head_ratios,
    relations_of,
    trained_vectors,
    untrained,
)
from probelog.trees.families.distance import RELATED
from probelog.trees.families.family import Family
from probelog.trees.recovery.neighbours import Neighbours, components
from probelog.trees.recovery.tree import Around, centre

# The nearest models that a model may be a twin of, or a merge of.
_CANDIDATES = 8
# Leaves, nearly always (Atlas, arXiv 2503.10633: 99.4 % of quantised models).
_TWINS = (Relation.RECAST, Relation.QUANTISED, Relation.PRUNED)
# Below this distance all tensors but the head's are equal.
_EQUAL = 1e-7
# Models of a group that each is compared with; in a larger group some of them stand for all.
_JUDGES = 256
# Log odds that a model has from each other one, of two at the most, with the same norms and biases.
_SHARING = 1.5
# So many of the next models in order of their squares are compared with each.
_GAPS = 3
# A twin of the original is as near as the original, within a sketch's error.
_AS_NEAR = 1.1
# The models nearest to a group of equal ones, and the log odds from which on they come from it if none is nearer to them.
_AROUND = 24
_COMES_FROM = 2.0
# Log odds, twice.
_HEAD_GOES_ON = 6.0
# Log odds, at most, from the models around two that differ by rounding alone: what rounding adds has nothing in common with others.
_ROUNDED_CENTRE = 6.0
_NOBODY = np.empty(0, np.int64)
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


def permuted(
    family: Family, models: Ints, neighbours: Neighbours, odds: Odds, known: Mapping[int, Fixed]
) -> dict[int, Fixed]:
    """Models with the same numbers in another order: all moments agree, the sketches do not.

    ``known`` are head-only children among the ``models``, which have no neighbours of their own.
    """
    step = max(_BLOCK // max(family.statistics.shape[1], 1), 1)
    blocks = [models[begin : begin + step] for begin in range(0, len(models), step)]
    every = np.arange(len(family.tensors))
    totals = np.concatenate([np.empty(0), *(family.squares(block, every).sum(axis=1) for block in blocks)])
    order = models[np.lexsort((models, totals))]
    # Models of equal tensors but the head's may lie between two.
    first = np.concatenate([order[:-gap] for gap in range(1, _GAPS + 1)])
    second = np.concatenate([order[gap:] for gap in range(1, _GAPS + 1)])
    pairs = compare(family, first, second)
    names = relations_of(pairs, family.precision[first] == family.precision[second])
    related = neighbours.related()
    for model, made in known.items():
        related[model] = max(related[model], related[made.parents[0]], 1)
    found: dict[int, Fixed] = {}
    for a, b, name, distance in zip(first.tolist(), second.tolist(), names, pairs.distance, strict=True):
        if name is not Relation.PERMUTED or distance < RELATED or a in found or b in found:
            continue
        # What has relatives was there first; else what is older.
        original, child = sorted((a, b), key=lambda model: (-related[model], odds.age(model)))
        later = odds.time(np.array([original]), np.array([child]))[0] < 0
        if later and related[original] == 0:
            original, child = child, original
        if child not in known:
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
    same_type = family.precision[parents] == family.precision[children]
    names = np.array(relations_of(pairs, same_type), dtype=object)
    found: dict[int, Fixed] = {}
    # What was pruned and has a larger model's norms and biases was not made from one with others.
    has_same = untrained(pairs.vectors, same_type)
    has_others = np.isin(children, children[has_same & (pairs.growth < 0)]) & ~has_same
    chosen = np.flatnonzero(np.isin(names, _TWINS) & ~((names == Relation.PRUNED) & has_others))
    parents, children, names = parents[chosen], children[chosen], names[chosen]
    distances, growths = pairs.distance[chosen], pairs.growth[chosen]
    around_two = np.zeros(len(chosen))
    rounded = names != Relation.PRUNED
    around_two[rounded] = centre(
        around, parents[rounded], children[rounded], distances[rounded], limit=_ROUNDED_CENTRE, timed=True
    )
    score = np.zeros(len(chosen))
    for name in _TWINS:
        of = names == name
        score[of] = odds.made(name, parents[of], children[of], growths[of], around_two[of])
    recast = names == Relation.RECAST
    score[recast] += _sharing(family, models, parents[recast], children[recast])
    possible: dict[int, list[int]] = {}
    for place, (parent, child) in enumerate(zip(parents.tolist(), children.tolist(), strict=True)):
        if score[place] > 0 or (score[place] == 0 and odds.age(parent) < odds.age(child)):
            possible.setdefault(child, []).append(place)
    # The nearest first, so that what was only rounded is known before what was pruned.
    for child, places in sorted(possible.items(), key=lambda item: float(distances[item[1]].min())):
        as_near = [place for place in places if distances[place] <= _AS_NEAR * distances[places].min()]
        originals = [place for place in as_near if int(parents[place]) not in found] or as_near
        best = max(originals, key=lambda place: (score[place], -distances[place]))
        found[child] = Fixed(names[best], (int(parents[best]),))
    return found


def copies_of_leaves(known: Mapping[int, Fixed]) -> dict[int, Fixed]:
    """Copies of rounded models, as what they are more likely to be: the same rounding of the same model, once more."""
    return {
        child: known[made.parents[0]]
        for child, made in known.items()
        if made.relation in (Relation.COPY, Relation.RECAST)
        and made.parents[0] in known
        and known[made.parents[0]].relation in (Relation.RECAST, Relation.QUANTISED)
    }


def _sharing(family: Family, models: Ints, parents: Ints, children: Ints) -> Floats:
    """(m,) log odds from how many other models share norms and biases with either of two that differ by rounding."""
    columns = trained_vectors(family)
    statistics = np.concatenate([family.mean[models][:, columns], family.std[models][:, columns]], axis=1)
    sets: dict[bytes, int] = {}
    for row in statistics:
        sets[row.tobytes()] = sets.get(row.tobytes(), 0) + 1
    count = np.zeros(len(family))
    count[models] = [sets[row.tobytes()] for row in statistics]
    return _SHARING * np.clip(count[parents] - count[children], -2, 2)


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
        original = _original(group, odds)
        only = Fixed(Relation.HEAD_ONLY, (original,))
        children.update({model: only for model in group.tolist() if model != original})
    return children


def _original(group: Ints, odds: Odds, around: Ints = _NOBODY, favour: Floats | float = 0.0) -> int:
    """The model of a group with equal backbones that the others, and those ``around`` it, were made from.

    Models that are older than it count once: the time of one model may be wrong, and then all of them are older.
    ``favour`` (g,) are more log odds.
    """
    judges = group[:: -(-len(group) // _JUDGES)]
    best, score = group, _summed_odds(group, judges, odds) + favour
    if len(judges) < len(group):
        # The best by a sample, and then by all.
        kept = np.argsort(-score, kind="stable")[:_JUDGES]
        best = group[kept]
        score = _summed_odds(best, group, odds) + np.broadcast_to(favour, len(group))[kept]
    # Twice: the other log odds of a pair are in the score of one as they are in the other's with the other sign.
    score = score - 2 * odds.older(best, np.concatenate([group, around]))
    ranked: dict[int, float] = dict(zip(best.tolist(), score.tolist(), strict=True))
    return min(ranked, key=lambda model: (-ranked[model], odds.age(model)))


def _summed_odds(models: Ints, others: Ints, odds: Odds) -> Floats:
    """(m,) log odds of each model having been the parent of the others, but for times and growth: nothing moved."""
    step = max(_BLOCK // (4 * len(others)), 1)
    sums = []
    for begin in range(0, len(models), step):
        block = models[begin : begin + step]
        parents, children = np.repeat(block, len(others)), np.tile(others, len(block))
        pairs = odds.untimed(parents, children, np.zeros(len(parents)))  # of a model and itself: 0
        sums.append(pairs.reshape(len(block), len(others)).sum(axis=1))
    return np.concatenate(sums)


def reconsidered(
    family: Family, known: Mapping[int, Fixed], neighbours: Neighbours, odds: Odds
) -> dict[int, int]:
    """Models that are a better original of their equals than the one chosen, by that one: their neighbours say so."""
    groups: dict[tuple[int, Relation], list[int]] = {}
    for child, made in known.items():
        if made.relation in (Relation.COPY, Relation.HEAD_ONLY):
            groups.setdefault((made.parents[0], made.relation), []).append(child)
    better: dict[int, int] = {}
    for (chosen, _), children in sorted(groups.items()):
        around = neighbours.of(chosen)[:_AROUND]
        group = np.array([chosen, *children])
        # A model whose head goes on in others was there before those that replaced it.
        favour = _HEAD_GOES_ON * _shares_head(family, group, around)
        growths = -neighbours.growths[neighbours.starts[chosen] :][: len(around)]
        later = odds.untimed(np.full(len(around), chosen), around, growths) > _COMES_FROM
        nearest = neighbours.others[neighbours.starts[around]] == chosen
        around = around[later & nearest]
        original = _original(group, odds, around, favour)
        if original != chosen and chosen not in better:
            better[chosen] = original
    return better


def _shares_head(family: Family, models: Ints, others: Ints) -> npt.NDArray[np.bool_]:
    """(m,) whether some other model has about the same head."""
    pairs = np.repeat(models, len(others)), np.tile(others, len(models))
    same = head_ratios(family, *pairs) < SAME_HEAD
    return np.asarray(same.reshape(len(models), len(others)).any(axis=1))


def with_kept_heads(
    family: Family, known: Mapping[int, Fixed], parents: Ints, children: Ints, odds: Odds
) -> dict[int, int]:
    """Another parent of some children: of models with equal trunks the one whose head a child has kept.

    ``parents`` (n,) are all models' parents.
    """
    heads: dict[int, list[int]] = {}
    for model, made in known.items():
        if made.relation is Relation.HEAD_ONLY:
            heads.setdefault(made.parents[0], []).append(model)
    kept: dict[int, int] = {}
    for child in children[np.isin(parents[children], list(heads))].tolist():
        trunk = int(parents[child])
        others = np.array([model for model in heads[trunk] if family.classes[model] == family.classes[child]])
        equal = np.append(others, trunk).astype(np.int64)
        ratios = head_ratios(family, equal, np.full(len(equal), child))
        if len(others) and not ratios[-1] < SAME_HEAD:
            ratios[-1] = math.inf
            ratios[odds.time(equal, np.full(len(equal), child)) < 0] = math.inf
            best = int(np.argmin(np.nan_to_num(ratios, nan=math.inf)))
            if ratios[best] < SAME_HEAD:
                kept[child] = int(equal[best])
    return kept


def exchanged(known: Mapping[int, Fixed], better: Mapping[int, int]) -> dict[int, Fixed]:
    """What is known when originals and the better ones have changed places."""
    was = {new: old for old, new in better.items()}
    result: dict[int, Fixed] = {}
    for child, made in known.items():
        parents = tuple(better.get(parent, parent) for parent in made.parents)
        result[was.get(child, child)] = replace(made, parents=parents)
    return result


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
            made = _merged(own[row], points[row, there[row]], candidates[row, there[row]])
            if made is not None:
                found[int(block[row])] = made
    # Merges are leaves. Of two merges of the same parents each may look like one of the other.
    for model, made in list(found.items()):
        if found.keys().isdisjoint(made.parents):
            continue
        others = inner.of(model)[:_CANDIDATES]
        plain = others[[int(other) not in found for other in others]]
        again = _merged(around.points.of(np.array([model]))[0], around.points.of(plain), plain)
        if again is not None:
            found[model] = again
        elif any(model in found[parent].parents for parent in made.parents if parent in found):
            del found[model]
    return found


def _merged(model: Floats, points: Floats, candidates: Ints) -> Fixed | None:
    """What a model (d,) is a merge of, of ``candidates`` (k,) with ``points`` (k, d)."""
    merge = find_merge(model, points)
    if merge is None:
        return None
    order = sorted(range(len(merge.parents)), key=lambda place: -merge.weights[place])
    return Fixed(
        Relation.MERGE,
        tuple(int(candidates[merge.parents[place]]) for place in order),
        tuple(merge.weights[place] for place in order),
        {"residual": merge.residual},
    )

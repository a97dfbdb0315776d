"""From the stored statistics of many models to edges between them, each with a probability and its evidence.

The order of steps, and the formulas: docs/method.md, section 11. Copies of equal statistics are set aside first; what
remains of a family is compared pair by pair, so memory grows with the square of the distinct models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.arrays import Floats
from probelog.trees.arborescence import arborescence
from probelog.trees.calibration import probability
from probelog.trees.direction import (
    DirectionSignals,
    direction_signals,
    log_odds,
    signals_of,
    time_log_odds,
)
from probelog.trees.distance import RELATED, squared_distances
from probelog.trees.edges import Edge, Relation
from probelog.trees.families import Family, ModelFacts, families
from probelog.trees.latent import step_share, unseen_share
from probelog.trees.merges import find_merge
from probelog.trees.relations import Comparison, compare, relation_of

#: An edge below this probability is not given.
LEAST_PROBABILITY = 0.5

# Nats that a factor e between two squared distances is worth beside the log odds of the direction.
_DISTANCE_WEIGHT = 4.0
# A parent further away than this costs as much as having none.
_ROOT_DISTANCE = 0.25
_MERGE_CANDIDATES = 8
# Parents that the arborescence may choose from, the nearest ones: edges grow with the models, not with their square.
_PARENT_CANDIDATES = 24
# What it costs, in nats, to be the child of a recast, quantised, pruned, merged or head-only model.
_SPECIAL_PARENT = 3.0
# Log odds that of two types the finer one was first, where numbers were rounded.
_FINER = 4.0
_NO_ROOT = 1000.0
# Leaves, nearly always (Atlas, arXiv 2503.10633: 99.4 % of quantised models).
_TWINS = frozenset({Relation.RECAST, Relation.QUANTISED, Relation.PRUNED})
# Log odds that it takes to be the parent's child and not the grandparent's.
_CLIMB = 1.5
_LEAST_ERROR = 0.1
# Part of the distance to other models below which two are close: the others tell which of them is the centre.
_CLOSE = 0.2
# From this share of an edge on, what looks like the parent is a sibling.
_SIBLING_SHARE = 0.25
_LARGEST_SHARE = 1.2


def recover(
    weights: pa.Table,
    facts: Mapping[str, ModelFacts] | None = None,
    *,
    least_probability: float = LEAST_PROBABILITY,
) -> list[Edge]:
    """The edges between the models of a ``weights`` table, by child and parent.

    ``facts`` are optional for every model; what is left out is not used.
    """
    known = facts or {}
    edges = [edge for family in families(weights) for edge in _Recovery(family, known).edges()]
    kept = [edge for edge in edges if edge.probability >= least_probability]
    return sorted(kept, key=lambda edge: (edge.child, edge.parent))


@dataclass(frozen=True, slots=True)
class _Special:
    """A model whose parents are known before the tree is: the heaviest first."""

    relation: Relation
    parents: tuple[int, ...]
    weights: tuple[float, ...]
    evidence: Mapping[str, float] = field(default_factory=dict)


class _Recovery:
    """One family: special relations first, then an arborescence over the remaining models."""

    def __init__(self, family: Family, facts: Mapping[str, ModelFacts]) -> None:
        self._family = family
        self._facts = [facts.get(repo, ModelFacts()) for repo in family.repos]
        self._signals: DirectionSignals = signals_of(family)
        self._edges: list[Edge] = []

    def edges(self) -> list[Edge]:
        distinct = self._without_copies()
        self._distances = squared_distances(self._family.sketches[distinct])
        self._place = {model: place for place, model in enumerate(distinct)}
        core = self._without_permuted(distinct)
        for component in self._components(core):
            self._component(component)
        return self._edges

    def _component(self, models: list[int]) -> None:
        lengths = np.sqrt((self._family.sketches[models] ** 2).sum(axis=2)).mean(axis=0)
        self._models = models
        self._scales = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
        special = self._twins(models)
        special.update(self._head_only([model for model in models if model not in special]))
        core = [model for model in models if model not in special]
        for model in core:
            merge = self._merge(model, core)
            if merge is not None:
                special[model] = merge
        parents = self._tree(models, special)
        self._add_tree(self._cut(self._climb(parents, special), special), special)

    def _distance(self, a: int, b: int) -> float:
        return float(self._distances[self._place[a], self._place[b]])

    # Special relations

    def _without_copies(self) -> list[int]:
        """One of each set of models with equal statistics; the others are its copies."""
        family = self._family
        equal: dict[bytes, list[int]] = {}
        for model in range(len(family.repos)):
            arrays = (family.sketches[model], family.mean[model], family.std[model], family.heads[model])
            equal.setdefault(b"".join(array.tobytes() for array in arrays), []).append(model)
        distinct = []
        for models in equal.values():
            # Equal numbers in a type that could hold finer ones came from the coarser one.
            original = min(models, key=lambda model: (family.precision[model], self._age(model)))
            distinct.append(original)
            for copy in models:
                if copy != original:
                    same = family.precision[copy] == family.precision[original]
                    self._add(copy, original, Relation.COPY if same else Relation.RECAST)
        return sorted(distinct)

    def _age(self, model: int) -> tuple[float, int, str]:
        uploaded = self._facts[model].uploaded
        return (
            math.inf if uploaded is None else uploaded,
            len(self._facts[model].declared),
            self._family.repos[model],
        )

    def _without_permuted(self, models: list[int]) -> list[int]:
        family = self._family
        totals = family.squares.sum(axis=1)
        related = (self._distances < RELATED).sum(axis=1) - 1
        order = sorted(models, key=lambda model: (totals[model], family.repos[model]))
        permuted: dict[int, int] = {}
        for a, b in pairwise(order):
            if self._distance(a, b) < RELATED or a in permuted:
                continue
            pair = compare(family, a, b)
            if relation_of(pair) is not Relation.PERMUTED:
                continue
            # What has relatives was there first; else what is older.
            original, child = sorted(
                (a, b), key=lambda model: (-related[self._place[model]], self._age(model))
            )
            if self._time(original, child) < 0 and related[self._place[original]] == 0:
                original, child = child, original
            permuted[child] = original
            self._add(child, original, Relation.PERMUTED)
        return [model for model in models if model not in permuted]

    def _twins(self, models: list[int]) -> dict[int, _Special]:
        """Recast, quantised and pruned models, each with the nearest model that it can be made from."""
        twins: dict[int, _Special] = {}
        for child in models:
            for parent in self._nearest(child, models)[:_MERGE_CANDIDATES]:
                pair = compare(self._family, parent, child)
                relation = self._relation(pair, parent, child)
                odds = self._odds(parent, child, relation)
                later = odds > 0 or (odds == 0 and self._age(parent) < self._age(child))
                if relation in _TWINS and later:
                    twins[child] = _Special(relation, (parent,), (1.0,))
                    break
        return twins

    def _head_only(self, models: list[int]) -> dict[int, _Special]:
        children: dict[int, _Special] = {}
        for group in self._groups(models, self._distances < 1e-7):
            score = {
                model: sum(self._odds(model, other, Relation.HEAD_ONLY) for other in group if other != model)
                for model in group
            }
            original = min(group, key=lambda model: (-score[model], self._age(model)))
            only = _Special(Relation.HEAD_ONLY, (original,), (1.0,))
            children.update({model: only for model in group if model != original})
        return children

    def _merge(self, model: int, core: list[int]) -> _Special | None:
        candidates = self._nearest(model, core)[:_MERGE_CANDIDATES]
        merge = find_merge(self._point(model), np.array([self._point(other) for other in candidates]))
        if merge is None:
            return None
        order = sorted(range(len(merge.parents)), key=lambda place: -merge.weights[place])
        parents = tuple(candidates[merge.parents[place]] for place in order)
        return _Special(
            Relation.MERGE,
            parents,
            tuple(merge.weights[place] for place in order),
            {"residual": merge.residual},
        )

    def _nearest(self, model: int, models: Sequence[int]) -> list[int]:
        return sorted((m for m in models if m != model), key=lambda m: (self._distance(m, model), m))

    # The tree

    def _tree(self, models: list[int], special: Mapping[int, _Special]) -> dict[int, int | None]:
        number = {model: place for place, model in enumerate(models)}
        costs: dict[tuple[int, int], float] = {}
        for child in models:
            options = self._nearest(child, models)[:_PARENT_CANDIDATES]
            if child in special:
                options = [special[child].parents[0]]
            for parent in options:
                if parent in special and child in special[parent].parents:
                    continue
                cost = _DISTANCE_WEIGHT * math.log(self._distance(parent, child) + 1e-12)
                odds = self._odds(parent, child, Relation.FINE_TUNED) + self._centre(parent, child)
                costs[number[parent], number[child]] = (
                    cost + float(np.logaddexp(0, -odds)) + (_SPECIAL_PARENT if parent in special else 0)
                )
        root = _DISTANCE_WEIGHT * math.log(_ROOT_DISTANCE)
        roots = {place: _NO_ROOT if model in special else root for model, place in number.items()}
        chosen = arborescence(len(models), costs, roots)
        return {models[child]: None if parent is None else models[parent] for child, parent in chosen.items()}

    def _climb(
        self, parents: Mapping[int, int | None], special: Mapping[int, _Special]
    ) -> dict[int, int | None]:
        """Children that do not show the step from their grandparent to their parent belong to the grandparent."""
        result = dict(parents)
        for child in parents:
            while child not in special and (parent := result[child]) is not None:
                grandparent = result[parent]
                if grandparent is None:
                    break
                share, error = step_share(self._point(grandparent), self._point(parent), self._point(child))
                if (share - 0.5) / max(error, _LEAST_ERROR) ** 2 > _CLIMB:
                    break
                result[child] = grandparent
        return result

    def _add_tree(self, parents: Mapping[int, int | None], special: Mapping[int, _Special]) -> None:
        for child, parent in parents.items():
            if parent is None:
                continue
            if child in special:
                known = special[child]
                for one, weight in zip(known.parents, known.weights, strict=True):
                    self._add(child, one, known.relation, weight, **known.evidence)
                continue
            share = self._unseen(child, parent, parents, special)
            relation = self._relation(compare(self._family, parent, child), parent, child)
            siblings = sum(other == parent for other in parents.values()) - 1
            evidence = {"siblings": float(siblings)}
            if share is not None:
                evidence.update(unseen=share[0], unseen_error=share[1])
            self._add(child, parent, relation, **evidence)

    def _unseen(
        self, child: int, parent: int, parents: Mapping[int, int | None], special: Mapping[int, _Special]
    ) -> tuple[float, float] | None:
        descendants = _descendants(child, parents)
        others = [m for m in parents if m not in descendants and m != parent and m not in special]
        if not others:
            return None
        return unseen_share(
            self._point(parent), self._point(child), np.array([self._point(m) for m in others])
        )

    def _cut(
        self, parents: Mapping[int, int | None], special: Mapping[int, _Special]
    ) -> dict[int, int | None]:
        """Siblings under an unseen parent are children of their nearest known ancestor, or of none."""
        result = dict(parents)
        changed = True
        while changed:
            changed = False
            for child, parent in result.items():
                if child in special or parent is None:
                    continue
                share = self._unseen(child, parent, result, special)
                if share is not None and max(_SIBLING_SHARE, 2 * share[1]) < share[0] < _LARGEST_SHARE:
                    result[child] = result[parent]
                    changed = True
        return result

    # What an edge is made of

    def _relation(self, pair: Comparison, parent: int, child: int) -> Relation:
        return relation_of(
            pair, same_type=bool(self._family.precision[parent] == self._family.precision[child])
        )

    def _time(self, parent: int, child: int) -> float:
        return time_log_odds(self._facts[parent].uploaded, self._facts[child].uploaded)

    def _odds(self, parent: int, child: int, relation: Relation) -> float:
        """Log odds that the parent came first."""
        if relation in (Relation.COPY, Relation.PERMUTED):
            return self._time(parent, child)
        if relation is Relation.RECAST:
            finer = np.sign(self._family.precision[parent] - self._family.precision[child])
            return float(_FINER * finer) + self._centre(parent, child) + self._time(parent, child)
        if relation is Relation.QUANTISED:
            odds = log_odds(self._direction(parent, child))
            return odds + self._centre(parent, child) + self._time(parent, child)
        if relation is Relation.PRUNED:
            return 4.0 + self._time(parent, child)
        return log_odds(self._direction(parent, child)) + self._time(parent, child)

    def _centre(self, parent: int, child: int) -> float:
        """Log odds, from the models around two that are close, that these were made from the parent."""
        if self._time(parent, child):
            return 0.0  # known times say more
        others = [m for m in self._nearest(parent, self._models)[:_PARENT_CANDIDATES] if m != child]
        if not others or self._distance(parent, child) > _CLOSE * self._distance(
            parent, others[len(others) // 2]
        ):
            return 0.0
        points = np.array([self._point(model) for model in others])
        share = unseen_share(self._point(parent), self._point(child), points)
        return 0.0 if share is None else float(np.clip((0.5 - share[0]) / share[1] ** 2, -2, 2))

    def _direction(self, parent: int, child: int) -> dict[str, float]:
        moved = ((self._family.sketches[parent] - self._family.sketches[child]) ** 2).sum()
        return direction_signals(self._signals, parent, child, float(moved))

    def _point(self, model: int) -> Floats:
        """The model's sketches in one row, each layer in units of its mean length in the component."""
        return np.asarray(self._family.sketches[model] * self._scales[:, None]).reshape(-1)

    def _components(self, models: list[int]) -> list[list[int]]:
        return self._groups(models, self._distances < RELATED)

    def _groups(self, models: Sequence[int], joined: npt.NDArray[np.bool_]) -> list[list[int]]:
        remaining, groups = set(models), []
        for start in models:
            if start not in remaining:
                continue
            remaining.discard(start)
            group, front = [start], [start]
            while front:
                row = joined[self._place[front.pop()]]
                reached = [model for model in sorted(remaining) if row[self._place[model]]]
                remaining.difference_update(reached)
                group += reached
                front += reached
            groups.append(sorted(group))
        return groups

    def _add(
        self, child: int, parent: int, relation: Relation, weight: float = 1.0, **evidence: float
    ) -> None:
        pair = compare(self._family, parent, child)
        declared = self._facts[child].declared
        facts = {
            "distance": pair.distance,
            "direction": log_odds(self._direction(parent, child)),
            "time": self._time(parent, child),
            **({} if pair.head is None else {"head": pair.head}),
            **evidence,
        }
        self._edges.append(
            Edge(
                child=self._family.repos[child],
                parent=self._family.repos[parent],
                relation=relation,
                probability=probability(relation, facts),
                weight=weight,
                declared=self._family.repos[parent] in declared if declared else None,
                evidence=facts,
            )
        )


def _descendants(model: int, parents: Mapping[int, int | None]) -> set[int]:
    """A model and all that come from it."""
    result = {model}
    while True:
        added = {m for m, parent in parents.items() if parent in result} - result
        if not added:
            return result
        result |= added

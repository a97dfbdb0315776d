"""From the stored statistics of many models to edges between them, each with a probability and its evidence.

The order of steps, and the formulas: docs/method.md, section 11. No step compares all models of a large family with
each other: each is compared with its neighbours (`probelog.trees.recovery.neighbours`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from probelog.arrays import Ints
from probelog.trees.edges import Edge, Relation
from probelog.trees.evidence.calibration import latent_probability, probability
from probelog.trees.evidence.latent import latent_name
from probelog.trees.evidence.odds import Odds
from probelog.trees.evidence.relations import compare, relations_of
from probelog.trees.families.family import Family, ModelFacts
from probelog.trees.families.tables import families
from probelog.trees.recovery import fixed, stand_ins
from probelog.trees.recovery.fixed import Fixed
from probelog.trees.recovery.neighbours import Look, components, find_neighbours
from probelog.trees.recovery.points import Points
from probelog.trees.recovery.tree import NONE, Around, Siblings, climb, cut, grow, unseen

__all__ = ["LEAST_PROBABILITY", "Edge", "recover", "recover_family"]

#: An edge below this probability is not given.
LEAST_PROBABILITY = 0.5


def recover(
    weights: pa.Table,
    facts: Mapping[str, ModelFacts] | None = None,
    *,
    least_probability: float = LEAST_PROBABILITY,
    times: bool = True,
    declared: bool = True,
) -> list[Edge]:
    """The edges between the models of a ``weights`` table that fits the memory, by child and parent.

    As `recover_family`, for all families.
    """
    edges = [
        edge
        for family in families(weights)
        for edge in recover_family(
            family, facts or {}, least_probability=least_probability, times=times, declared=declared
        )
    ]
    return sorted(edges, key=lambda edge: (edge.child, edge.parent))


def recover_family(
    family: Family,
    facts: Mapping[str, ModelFacts],
    *,
    least_probability: float = LEAST_PROBABILITY,
    times: bool = True,
    declared: bool = True,
    memory_mb: int = 1024,
    look: Look | None = None,
) -> list[Edge]:
    """The edges between the models of one family, by child and parent; some of them to parents that nobody has seen.

    ``facts`` are optional for every model; what is left out is not used. ``times`` and ``declared``: whether times of
    upload and declared parents are evidence; what a child declares is told in either case. ``look`` is asked where
    sketches leave open which model is nearest.
    """
    if len(family) < 2:
        return []
    recovery = _Recovery(family, facts, times=times, declared=declared, memory_mb=memory_mb, look=look)
    edges = recovery.edges()
    kept = [edge for edge in edges if edge.probability >= least_probability]
    return sorted(kept, key=lambda edge: (edge.child, edge.parent))


class _Recovery:
    """One family: what is known before the tree is, the tree, and the edges of both."""

    def __init__(
        self,
        family: Family,
        facts: Mapping[str, ModelFacts],
        *,
        times: bool,
        declared: bool,
        memory_mb: int,
        look: Look | None,
    ) -> None:
        self._family = family
        self._odds = Odds(family, facts, times=times, declared=declared)
        self._memory_mb = memory_mb
        self._look = look
        self._fixed: dict[int, Fixed] = {}
        self._stand_ins: set[int] = set()

    def edges(self) -> list[Edge]:
        family, odds = self._family, self._odds
        self._fixed = fixed.equal_models(family, odds)
        different = self._free()
        equal = fixed.equal_backbones(family, different, odds)
        self._fixed.update(equal)
        neighbours = find_neighbours(family, self._free(), memory_mb=self._memory_mb)
        if self._look is not None:
            neighbours = neighbours.looked_at(family, self._look)
        better = fixed.reconsidered(family, self._fixed, neighbours, odds)
        if better:
            self._fixed = fixed.exchanged(self._fixed, better)
            neighbours = neighbours.exchanged(better)
            compared = set(different.tolist())
            equal = {child: made for child, made in self._fixed.items() if child in compared}
        self._fixed.update(fixed.permuted(family, different, neighbours, odds, equal))
        distinct = np.zeros(len(family), bool)
        distinct[self._free()] = True
        neighbours = neighbours.among(distinct)
        component = components(len(family), neighbours.models, neighbours.others)
        for child, made in self._fixed.items():
            component[child] = component[made.parents[0]]
        around = Around(family, neighbours, odds, Points(family, component, distinct), distinct)
        self._fixed.update(fixed.twins(around, self._free()))
        self._fixed.update(fixed.copies_of_leaves(self._fixed))
        self._fixed.update(fixed.head_only(family, self._free(), neighbours, odds))
        from_unseen = stand_ins.made_from_unseen(family, self._free(), neighbours, odds)
        self._stand_ins = {made.parents[0] for made in from_unseen.values()}
        self._fixed.update(from_unseen)
        self._fixed.update(fixed.merges(around, self._free()))
        return self._tree(around)

    def _free(self) -> Ints:
        free = self._family.usable.copy()
        free[list(self._fixed)] = False
        return np.flatnonzero(free)

    def _tree(self, around: Around) -> list[Edge]:
        n = len(self._family)
        known = np.full(n, NONE)
        for child, made in self._fixed.items():
            known[child] = made.parents[0]
        free = known == NONE
        excluded = [(child, parent) for child, made in self._fixed.items() for parent in made.parents]
        parents = grow(around, known, np.array(excluded, np.int64).reshape(-1, 2))
        parents, siblings = cut(around, climb(around, parents, free), free)
        rows: list[_Row] = [
            _Row(child, parent, made.relation, weight, made.evidence)
            for child, made in self._fixed.items()
            if parents[child] != NONE
            for parent, weight in zip(made.parents, made.weights, strict=True)
        ]
        children = np.flatnonzero(free & (parents != NONE))
        shares, errors = unseen(around, parents, free, children)
        counted = (parents != NONE) & around.distinct
        counts = np.bincount(parents[counted], minlength=n)
        kept = fixed.with_kept_heads(self._family, self._fixed, parents, children, self._odds)
        for child, share, error in zip(children.tolist(), shares.tolist(), errors.tolist(), strict=True):
            evidence = {"siblings": float(counts[parents[child]] - 1)}
            if not math.isnan(share):
                evidence.update(unseen=share, unseen_error=error)
            rows.append(_Row(child, kept.get(child, int(parents[child])), None, 1.0, evidence))
        rows, more = self._without_stand_ins(rows, parents)
        return [*self._edges(rows), *self._latent([*siblings, *more])]

    def _without_stand_ins(self, rows: Sequence[_Row], parents: Ints) -> tuple[list[_Row], list[Siblings]]:
        """The rows with what stands for an unseen parent replaced by the parent of that, and who are its siblings."""
        places = [
            place for place, row in enumerate(rows) if row.parent in self._stand_ins and row.weight == 1
        ]
        asked = np.array([(rows[place].parent, rows[place].child) for place in places], np.int64).reshape(
            -1, 2
        )
        own = stand_ins.keep_heads(self._family, asked[:, 0], asked[:, 1])
        moved = {place for place, kept in zip(places, own.tolist(), strict=True) if not kept}
        result = []
        for place, row in enumerate(rows):
            if place not in moved:
                result.append(row)
            elif parents[row.parent] != NONE:
                result.append(_Row(row.child, int(parents[row.parent]), None, 1.0, {}))
        return result, [Siblings(rows[place].child, rows[place].parent, 1.0, 0.0) for place in moved]

    def _edges(self, rows: Sequence[_Row]) -> Iterator[Edge]:
        family, odds = self._family, self._odds
        parents = np.array([row.parent for row in rows], np.int64)
        children = np.array([row.child for row in rows], np.int64)
        pairs = compare(family, parents, children)
        names = relations_of(pairs, family.precision[parents] == family.precision[children])
        direction = odds.direction(parents, children, pairs.growth)
        coarser = odds.coarser(parents, children)
        equals = self._equals()
        time, declared = odds.time(parents, children), odds.declares(parents, children)
        for place, row in enumerate(rows):
            evidence = {
                "distance": float(pairs.distance[place]),
                "growth": float(pairs.growth[place]),
                "least_growth": float(pairs.least_growth[place]),
                "direction": float(direction[place]),
                "time": float(time[place]),
                **({} if math.isnan(pairs.head[place]) else {"head": float(pairs.head[place])}),
                **({"coarser": 1.0} if coarser[place] else {}),
                **({"equals": float(equals[row.parent])} if equals[row.parent] else {}),
                **({"declared": 1.0 if declared[place] else -1.0} if odds.declaring[row.child] else {}),
                **row.evidence,
            }
            relation = row.relation or names[place]
            if relation is Relation.HEAD_ONLY and names[place] in (Relation.COPY, Relation.RECAST):
                relation = names[place]  # equal but for what only one of the two rows has, such as counters
            yield self._edge(row.child, family.repos[row.parent], relation, row.weight, evidence)

    def _equals(self) -> Ints:
        """(n,) how many models are equal to each of the originals, so that nothing but a time tells them apart."""
        copies = [(made.parents[0], m) for m, made in self._fixed.items() if made.relation is Relation.COPY]
        pairs = np.array(copies, np.int64).reshape(-1, 2)
        untold = pairs[self._odds.time(pairs[:, 0], pairs[:, 1]) == 0]
        return np.bincount(untold[:, 0], minlength=len(self._family))

    def _edge(
        self, child: int, parent: str, relation: Relation, weight: float, evidence: Mapping[str, float]
    ) -> Edge:
        declared = self._odds.declared[child]
        return Edge(
            child=self._family.repos[child],
            parent=parent,
            relation=relation,
            probability=probability(relation, evidence),
            weight=weight,
            declared=parent in declared if declared else None,
            evidence=evidence,
        )

    def _latent(self, siblings: Sequence[Siblings]) -> Iterator[Edge]:
        """Edges from the siblings of each group to the parent that nobody has seen."""
        family = self._family
        pairs = np.array([(one.model, one.sibling) for one in siblings], np.int64).reshape(-1, 2)
        label = components(len(family), pairs[:, 0], pairs[:, 1])
        groups: dict[int, list[int]] = {}
        for model in np.unique(pairs).tolist():
            groups.setdefault(int(label[model]), []).append(model)
        seen = {one.model: one for one in siblings}
        for models in groups.values():
            oldest = min(models, key=self._odds.age)
            name = latent_name(family.key, family.statistics[oldest].tobytes())
            # A model that the others were compared with is as sure a sibling as the surest of them.
            surest = max((seen[m] for m in models if m in seen), key=lambda one: one.share - 2 * one.error)
            for model in models:
                one = seen.get(model, surest)
                evidence = {
                    "unseen": one.share,
                    "unseen_error": one.error,
                    "siblings": float(len(models) - 1),
                }
                declared = self._odds.declared[model]
                yield Edge(
                    child=family.repos[model],
                    parent=name,
                    relation=Relation.FINE_TUNED,
                    probability=latent_probability(evidence),
                    declared=False if declared else None,
                    latent=True,
                    evidence=evidence,
                )


@dataclass(frozen=True, slots=True)
class _Row:
    """An edge before it is compared; without a relation, that is what the comparison shows."""

    child: int
    parent: int
    relation: Relation | None
    weight: float
    evidence: Mapping[str, float]

"""What speaks for one model of a pair having been the parent, beside their distance: log odds of many pairs at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats, Ints
from probelog.trees.edges import Relation
from probelog.trees.evidence.direction import direction_signals, log_odds, signals_of, time_log_odds
from probelog.trees.families.family import Family, ModelFacts

# Log odds that of two types the finer one was first, where numbers were rounded.
_FINER = 4.0
# Bits of a type in which models are handed on rather than trained (bfloat16 has 8).
_COARSE = 8
# Log odds that what has lost numbers is the child.
_PRUNED = 4.0
# Log odds that a declared parent is one.
_DECLARED = 2.0


class Odds:
    """The facts of a family's models, and what they say of pairs.

    ``times`` and ``declared``: whether times of upload and declared parents count.
    """

    def __init__(
        self, family: Family, facts: Mapping[str, ModelFacts], *, times: bool = True, declared: bool = True
    ) -> None:
        self._family = family
        self._signals = signals_of(family)
        self._count_declared = declared
        known = [facts.get(repo) or ModelFacts() for repo in family.repos]
        place = {repo: number for number, repo in enumerate(family.repos)}
        self.declared: list[tuple[str, ...]] = [fact.declared for fact in known]
        self.uploaded = np.array([math.nan if f.uploaded is None else f.uploaded for f in known])
        if not times:
            self.uploaded[:] = math.nan
        pairs = [
            (place[parent], child)
            for child, fact in enumerate(known)
            if declared
            for parent in fact.declared
            if place.get(parent, child) != child
        ]
        #: (m, 2) parent and child of what is declared within the family.
        self.pairs = np.array(sorted(set(pairs)), np.int64).reshape(-1, 2)
        #: (n,) whether a model declares a parent within the family.
        self.declaring = np.isin(np.arange(len(known)), self.pairs[:, 1])
        self._keys = np.sort(self.pairs @ np.array([len(known), 1]))

    def oldest(self, models: Sequence[int]) -> int:
        """Of equal models the one to take for the original."""
        return min(models, key=self.age)

    def age(self, model: int) -> tuple[float, int, str]:
        """Sorts models by time of upload, those that declare no parent first."""
        uploaded = float(self.uploaded[model])
        return (
            math.inf if math.isnan(uploaded) else uploaded,
            len(self.declared[model]) if self._count_declared else 0,
            self._family.repos[model],
        )

    def time(self, parents: Ints, children: Ints) -> Floats:
        """(m,) from the times of upload."""
        return time_log_odds(self.uploaded[parents], self.uploaded[children])

    def direction(self, parents: Ints, children: Ints, growth: Floats) -> Floats:
        """(m,) from the weights."""
        return log_odds(direction_signals(self._signals, parents, children, growth))

    def declarations(self, parents: Ints, children: Ints) -> Floats:
        """(m,) from declared parents: 0 where neither or each of the two declares the other."""
        return np.asarray(_DECLARED * (self.declares(parents, children) - self.declares(children, parents)))

    def finer(self, parents: Ints, children: Ints) -> Floats:
        """(m,) that the parent has the finer type, where the child's numbers are rounded."""
        precision, grids = self._family.precision, self._signals.grids
        by_type = np.sign(precision[parents] - precision[children])
        by_grid = np.sign(grids[parents] - grids[children])
        return np.asarray(_FINER * np.where(by_type == 0, by_grid, by_type))

    def coarser(self, parents: Ints, children: Ints) -> npt.NDArray[np.bool_]:
        """(m,) whether the parents' numbers are those of bfloat16 or less, and the children's are not."""
        bits = np.minimum(self._family.precision, self._signals.grids)
        return np.asarray((bits[parents] < bits[children]) & (bits[parents] <= _COARSE))

    def made(
        self, relation: Relation, parents: Ints, children: Ints, growth: Floats, centre: Floats | float = 0.0
    ) -> Floats:
        """(m,) log odds that the children were made from the parents by a relation.

        ``centre``: what the models around the two say (`probelog.trees.evidence.latent.centre`).
        """
        known = self.time(parents, children) + self.declarations(parents, children)
        if relation in (Relation.COPY, Relation.PERMUTED):
            return known
        if relation is Relation.RECAST:
            return np.asarray(self.finer(parents, children) + centre + known)
        if relation is Relation.PRUNED:
            # What was pruned has shrunk, whatever its size says otherwise.
            return np.asarray(_PRUNED + self.direction(parents, children, np.zeros(len(parents))) + known)
        around = centre if relation is Relation.QUANTISED else 0.0
        return np.asarray(self.direction(parents, children, growth) + around + known)

    def untimed(self, parents: Ints, children: Ints, growth: Floats) -> Floats:
        """(m,) from the weights and declared parents."""
        return self.direction(parents, children, growth) + self.declarations(parents, children)

    def older(self, models: Ints, others: Ints) -> Floats:
        """(m,) log odds against each model that any of the others is older."""
        known = self.uploaded[others]
        first = np.nanmin(known) if not np.isnan(known).all() else math.nan
        return np.abs(time_log_odds(np.full(len(models), first), self.uploaded[models]))

    def declares(self, parents: Ints, children: Ints) -> Floats:
        """(m,) 1 where the child declares the parent, else 0."""
        keys = np.asarray(parents) * len(self._family) + children
        if not len(self._keys):
            return np.zeros(len(keys))
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.asarray(self._keys[at] == keys, np.float64)

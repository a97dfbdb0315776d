"""Parents for newcomers of a family whose edges are known, without looking at the whole again.

A newcomer's parent is among its neighbours. So the recovery is made of them alone: the newcomer, its nearest models,
and the parents that those are known to have. Of what comes out the newcomer's edges count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np

from probelog.trees.edges import Edge
from probelog.trees.families.family import Family, ModelFacts
from probelog.trees.recovery.neighbours import Screen
from probelog.trees.recovery.recover import LEAST_PROBABILITY, recover_family

# The nearest models that a newcomer is recovered with, and how many steps up their parents come along.
_NEAREST = 48
_GENERATIONS = 2
_LARGEST = 112


class Attachment:
    """A family with its edges, kept ready for newcomers. ``facts``: also the newcomers'."""

    def __init__(
        self,
        family: Family,
        edges: Iterable[Edge],
        facts: Mapping[str, ModelFacts],
        *,
        least_probability: float = LEAST_PROBABILITY,
        times: bool = True,
        declared: bool = True,
        memory_mb: int = 1024,
    ) -> None:
        self._family = family
        self._least_probability = least_probability
        self._recovered = partial(
            recover_family, facts=facts, least_probability=0.0, times=times, declared=declared
        )
        place = {repo: number for number, repo in enumerate(family.repos)}
        self._parents: dict[int, list[int]] = {}
        for edge in edges:
            if edge.child in place and edge.parent in place:
                self._parents.setdefault(place[edge.child], []).append(place[edge.parent])
        self._models = np.flatnonzero(family.usable)
        self._screen = Screen.of(family, self._models, memory_mb=memory_mb)

    def attach(self, newcomers: Family) -> list[Edge]:
        """The edges of newcomers, a part of the same family, by child and parent.

        They may come from each other. A newcomer replaces the family's model of the same name.

        Raises:
            ValueError: the newcomers are another family's.
        """
        if newcomers.key != self._family.key:
            raise ValueError(f"models of family {newcomers.key} cannot join family {self._family.key}")
        if not len(newcomers):
            return []
        newcomers = newcomers.like(self._family)
        points = self._screen.points_of(newcomers)
        row, near, distances = self._screen.near_points(points, 2 * _NEAREST)
        among = self._screen.with_points(points)
        one, other = among.nearest(np.arange(len(newcomers)), _NEAREST)
        edges: list[Edge] = []
        for place in np.flatnonzero(newcomers.usable).tolist():
            together = [place, *other[one == place].tolist()]
            names = {newcomers.repos[each] for each in together}
            nearest = near[row == place][np.argsort(distances[row == place], kind="stable")]
            other_names = [m for m in self._models[nearest].tolist() if self._family.repos[m] not in names]
            known = [
                m for m in self._with_parents(other_names[:_NEAREST]) if self._family.repos[m] not in names
            ]
            small = self._family.take(np.array(known, np.int64)).joined(newcomers.take(np.array(together)))
            found = self._recovered(small)
            edges += [edge for edge in found if edge.child == newcomers.repos[place]]
        kept = [edge for edge in edges if edge.probability >= self._least_probability]
        return sorted(kept, key=lambda edge: (edge.child, edge.parent))

    def _with_parents(self, models: Sequence[int]) -> list[int]:
        found = dict.fromkeys(models)
        front = list(found)
        for _ in range(_GENERATIONS):
            front = [
                parent for model in front for parent in self._parents.get(model, ()) if parent not in found
            ]
            found.update(dict.fromkeys(front))
        return list(found)[:_LARGEST]

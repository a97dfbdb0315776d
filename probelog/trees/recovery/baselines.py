"""Other methods on the same statistics, for comparison: one parent or none a model, no probability.

MoTHer (Horwitz et al., arXiv 2405.18432), the nearest model that was uploaded earlier, and the rules of the Model
Atlas (arXiv 2503.10633, appendix C).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats, Ints
from probelog.trees.families.distance import RELATED, squared_distances
from probelog.trees.families.family import Family, ModelFacts
from probelog.trees.recovery.arborescence import arborescence

#: The parent of each model that has one, by repository.
Parents = dict[str, str]

_DIRECTION_WEIGHT = 0.3
_NEIGHBOURS = 5


def nearest(family: Family) -> Parents:
    """The nearest related model, whichever came first."""
    return _choose(family, lambda child, others, distances: int(others[distances[child, others].argmin()]))


def nearest_earlier(family: Family, facts: Mapping[str, ModelFacts]) -> Parents:
    """The nearest related model among those that were uploaded earlier."""
    times = _times(family, facts)

    def rule(child: int, others: Ints, distances: Floats) -> int | None:
        earlier = others[times[others] < times[child]]
        return int(earlier[distances[child, earlier].argmin()]) if len(earlier) else None

    return _choose(family, rule)


def atlas(family: Family, facts: Mapping[str, ModelFacts]) -> Parents:
    """Atlas: copies are leaves; in a fan the eldest of the nearest five, in a snake the nearest of those before.

    A snake is where the distance of a model's earlier neighbours grows with the time between them.
    """
    times = _times(family, facts)

    def rule(child: int, others: Ints, distances: Floats) -> int | None:
        earlier = others[times[others] < times[child]]
        order = earlier[np.argsort(distances[child, earlier], kind="stable")][:_NEIGHBOURS]
        if not len(order):
            return None
        closest = int(order[0])
        if distances[child, closest] < 1e-12 or len(order) < 3:
            return closest
        gaps, lengths = times[child] - times[order], distances[child, order]
        snake = np.std(gaps) > 0 and np.std(lengths) > 0 and np.corrcoef(gaps, lengths)[0, 1] > 0.5
        return closest if snake else int(order[times[order].argmin()])

    return _choose(family, rule)


def mother(family: Family, trees: int | None = None) -> Parents:
    """MoTHer: M = D + 0.3 mean(D) K, K[i, j] = 1 where j's summed kurtosis is above i's; a minimum arborescence.

    D are distances; without the number of ``trees`` related models are one tree, with it Ward's clusters are.
    """
    distances = np.sqrt(squared_distances(family.sketches))
    kurtosis = family.kurtosis[:, family.layers].astype(np.float64).sum(axis=1)
    n = len(family.repos)
    groups = _components(distances**2 < RELATED) if trees is None else _ward(distances, trees)
    parents: Parents = {}
    for group in groups:
        mean = float(distances[np.ix_(group, group)].mean())
        size = len(group)
        a, b = np.divmod(np.arange(size * size), size)
        places = np.array(group)
        costs = distances[places[a], places[b]] + _DIRECTION_WEIGHT * mean * (
            kurtosis[places[b]] > kurtosis[places[a]]
        )
        # Each cluster is one tree: a second root costs more than any tree.
        chosen = arborescence(size, a, b, costs, np.full(size, 10.0 * n))
        parents.update(
            {family.repos[group[c]]: family.repos[group[p]] for c, p in enumerate(chosen) if p >= 0}
        )
    return parents


def _choose(family: Family, rule: Callable[[int, Ints, Floats], int | None]) -> Parents:
    distances = squared_distances(family.sketches)
    parents: Parents = {}
    for child, repo in enumerate(family.repos):
        others = np.flatnonzero(distances[child] < RELATED)
        others = others[others != child]
        parent = rule(child, others, distances) if len(others) else None
        if parent is not None:
            parents[repo] = family.repos[parent]
    return parents


def _times(family: Family, facts: Mapping[str, ModelFacts]) -> Floats:
    uploaded = [facts[repo].uploaded if repo in facts else None for repo in family.repos]
    return np.array([np.inf if time is None else time for time in uploaded])


def _components(joined: npt.NDArray[np.bool_]) -> list[list[int]]:
    label = np.arange(len(joined))
    while True:
        lowest = np.array([label[row].min() for row in joined])
        if (lowest == label).all():
            return [list(np.flatnonzero(label == value)) for value in np.unique(label)]
        label = lowest


def _ward(distances: Floats, clusters: int) -> list[list[int]]:
    """Ward's agglomeration by the formula of Lance and Williams, on squared distances."""
    groups = {i: [i] for i in range(len(distances))}
    gaps = distances.astype(np.float64) ** 2
    np.fill_diagonal(gaps, np.inf)
    while len(groups) > max(clusters, 1):
        a, b = divmod(int(gaps.argmin()), len(gaps))
        na, nb, gap = len(groups[a]), len(groups[b]), gaps[a, b]
        for other in groups:
            if other not in (a, b):
                n = len(groups[other])
                merged = ((na + n) * gaps[a, other] + (nb + n) * gaps[b, other] - n * gap) / (na + nb + n)
                gaps[a, other] = gaps[other, a] = merged
        gaps[b, :] = gaps[:, b] = np.inf
        groups[a] += groups.pop(b)
    return [sorted(group) for group in groups.values()]

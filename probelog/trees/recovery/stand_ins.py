"""Models that stand for an unseen parent, because they have its numbers but not its head.

Rounding and pruning keep the head. Where two models differ by one of these alone and their heads are two, one was made so
from an unseen model, and the other, whose numbers are that model's, is its child with a new head. What comes from those
numbers comes from the unseen model, unless it has kept the other's head.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from probelog.arrays import Ints
from probelog.trees.edges import Relation
from probelog.trees.evidence.odds import Odds
from probelog.trees.evidence.relations import SAME_HEAD, compare, head_ratios, pruned_trunks, rounded_trunks
from probelog.trees.families.family import Family
from probelog.trees.recovery.fixed import Fixed
from probelog.trees.recovery.neighbours import Neighbours

# The nearest models that a model may be a rounded or pruned twin of.
_CANDIDATES = 8


def made_from_unseen(family: Family, models: Ints, neighbours: Neighbours, odds: Odds) -> dict[int, Fixed]:
    """Of the models those that are rounded or pruned from an unseen one; their parents stand for it.

    A model with more classes than the rounded or pruned one is left out: it may be what the unseen one was made from.
    """
    among = np.zeros(len(family), bool)
    among[models] = True
    near = (neighbours.places < _CANDIDATES) & among[neighbours.models] & among[neighbours.others]
    plain, rounded = neighbours.others[near], neighbours.models[near]
    pairs = compare(family, plain, rounded)
    same_type = family.precision[plain] == family.precision[rounded]
    quantised, recast = rounded_trunks(family, pairs, same_type)
    # Rounding adds something orthogonal, and a coarser grid.
    finer = odds.finer(plain, rounded)
    chosen = (recast & (finer > 0)) | (quantised & (finer >= 0) & (pairs.growth > 0))
    pruned = pruned_trunks(pairs, same_type)
    chosen |= pruned
    chosen &= ~(pairs.head < SAME_HEAD) & (family.classes[rounded] >= family.classes[plain])
    found: dict[int, Fixed] = {}
    for place in np.flatnonzero(chosen)[np.argsort(pairs.distance[chosen], kind="stable")].tolist():
        parent, child = int(plain[place]), int(rounded[place])
        if child not in found and parent not in found:
            relation = (
                Relation.PRUNED if pruned[place] else Relation.RECAST if recast[place] else Relation.QUANTISED
            )
            found[child] = Fixed(relation, (parent,))
    return found


def keep_heads(family: Family, parents: Ints, children: Ints) -> npt.NDArray[np.bool_]:
    """(m,) whether children have their parent's head, trained on or not."""
    return np.asarray(head_ratios(family, parents, children) < SAME_HEAD)

"""The place of each model in its tree, and what makes a forest of any set of edges: no model is its own ancestor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pyarrow as pa

from probelog.storage.schemas import TreeFacts
from probelog.trees.edges import Edge, parent_rank


def without_cycles(edges: Iterable[Edge], known: Mapping[str, Iterable[str]] | None = None) -> list[Edge]:
    """Edges without the least probable ones that would make a model its own ancestor, each pair of models once.

    ``known``: parents of models, by child, that these edges are added to.
    """
    parents: dict[str, set[str]] = {child: set(names) for child, names in (known or {}).items()}
    kept = []
    for edge in sorted(edges, key=lambda edge: (-edge.probability, edge.child, edge.parent)):
        if edge.parent in parents.get(edge.child, ()) or edge.child in _with_ancestors(edge.parent, parents):
            continue
        parents.setdefault(edge.child, set()).add(edge.parent)
        kept.append(edge)
    return sorted(kept, key=lambda edge: (edge.child, edge.parent))


def find_cycle(parents: Mapping[str, Iterable[str]]) -> str | None:
    """A model that is its own ancestor, if there is one."""
    done: set[str] = set()
    for start in parents:
        way, open_parents = [start], [iter(parents[start])]
        passed = {start}
        while way:
            parent = next(open_parents[-1], None)
            if parent is None:
                passed.discard(way[-1])
                done.add(way.pop())
                open_parents.pop()
            elif parent in passed:
                return parent
            elif parent not in done and parent in parents:
                way.append(parent)
                passed.add(parent)
                open_parents.append(iter(parents[parent]))
    return None


def main_parents(edges: pa.Table) -> dict[str, str]:
    """The parent of each child of a table (``EDGES``), of several the first by `parent_rank`."""
    best: dict[str, tuple[bool, float, float, str]] = {}
    names = ("child", "parent", "weight", "probability")
    for child, parent, weight, probability in zip(*(edges[name].to_pylist() for name in names), strict=True):
        rank = parent_rank(parent, weight, probability)
        if child not in best or rank < best[child]:
            best[child] = rank
    return {child: rank[-1] for child, rank in best.items()}


def places(
    models: Iterable[str], parents: Mapping[str, str], above: Mapping[str, TreeFacts] | None = None
) -> dict[str, TreeFacts]:
    """Root, parent and depth of models, from the parent of each child. There must be no cycle.

    ``above``: places of models that are not among these.
    """
    known = {model: (place.root or model, place.depth or 0) for model, place in (above or {}).items()}
    models = list(models)
    for model in models:
        way = [model]
        while way[-1] not in known and way[-1] in parents:
            way.append(parents[way[-1]])
        root, depth = known.get(way[-1], (way[-1], 0))
        for steps, passed in enumerate(reversed(way)):
            known[passed] = (root, depth + steps)
    return {
        model: TreeFacts(root=known[model][0], parent=parents.get(model), depth=known[model][1])
        for model in models
    }


def _with_ancestors(model: str, parents: Mapping[str, Iterable[str]]) -> set[str]:
    reached, front = {model}, [model]
    while front:
        for parent in parents.get(front.pop(), ()):
            if parent not in reached:
                reached.add(parent)
                front.append(parent)
    return reached

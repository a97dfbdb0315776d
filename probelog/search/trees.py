"""Model trees of a published index: the edges around one model, or those that meet a condition.

Anybody may have published them, and a family may be of any size: every row is checked, and what is read is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import pyarrow as pa

from probelog.index.conditions import prepared
from probelog.index.generation import Generation
from probelog.index.tables import is_valid_sql_text, sql_in
from probelog.trees.edges import Edge, edge_table, edges_of, parent_rank
from probelog.trees.places import find_cycle

# Levels above and below a model that are read, and edges above it: chains of real models are far shorter.
_MOST_LEVELS = 100
_MOST_ANCESTORS = 1000
# Names in a note.
_NAMED = 5
# Values of one SQL condition.
_NAMES_AT_ONCE = 500
# More edges than there can be.
_ALL = 1 << 62


class Edges(Sequence[Edge]):
    """Edges by child and parent, and ``notes``: lines to show beside them."""

    def __init__(self, edges: Iterable[Edge], notes: Sequence[str] = ()) -> None:
        self._edges = sorted(edges, key=lambda edge: (edge.child, edge.parent))
        self.notes = list(notes)

    @overload
    def __getitem__(self, item: int) -> Edge: ...
    @overload
    def __getitem__(self, item: slice) -> list[Edge]: ...
    def __getitem__(self, item: int | slice) -> Edge | list[Edge]:
        return self._edges[item]

    def __len__(self) -> int:
        return len(self._edges)

    def __repr__(self) -> str:
        return f"Edges({self._edges!r})"

    def to_arrow(self) -> pa.Table:
        """The same edges as an Arrow table (``probelog.storage.schemas.EDGES``)."""
        return edge_table(self._edges)


@dataclass(frozen=True)
class Tree:
    """The edges around one model.

    Attributes:
        repo: the model.
        root: its eldest ancestor (a repository, or the name of a latent ancestor); None where it is not known.
        depth: number of edges from the root; None likewise.
        ancestors: edges to its parents, to theirs, and so on.
        siblings: edges from its parents to their other children.
        descendants: edges from it to its children, to theirs, and so on.
        notes: lines to show beside them, such as what was left out.
    """

    repo: str
    root: str | None
    depth: int | None
    ancestors: Edges
    siblings: Edges
    descendants: Edges
    notes: Sequence[str] = ()

    @property
    def edges(self) -> Edges:
        """All of them."""
        return Edges([*self.ancestors, *self.siblings, *self.descendants])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "repo": self.repo,
            "root": self.root,
            "depth": self.depth,
            **{
                name: [edge.to_dict() for edge in edges]
                for name, edges in (
                    ("ancestors", self.ancestors),
                    ("siblings", self.siblings),
                    ("descendants", self.descendants),
                )
            },
            "notes": list(self.notes),
        }


def main_parents(edges: Iterable[Edge]) -> dict[str, Edge]:
    """The edge to each child's main parent, of several the first by `parent_rank`."""
    best: dict[str, Edge] = {}
    for edge in edges:
        other = best.get(edge.child)
        if other is None or _rank(edge) < _rank(other):
            best[edge.child] = edge
    return best


def _rank(edge: Edge) -> tuple[bool, float, float, str]:
    return parent_rank(edge.parent, edge.weight, edge.probability)


def some_edges(generation: Generation, where: str | None, limit: int) -> Edges:
    """Up to ``limit`` edges that meet an SQL condition."""
    condition = None if where is None else prepared(where, "edges")
    edges = _read(generation, condition, limit + 1)
    notes = (
        [f"there are more edges than the limit of {limit:,}: raise limit, or narrow where"]
        if len(edges) > limit
        else []
    )
    return Edges(edges[:limit], notes)


def tree_of(generation: Generation, repo: str, limit: int) -> Tree:
    """The edges around one model; up to ``limit`` below it, and as many to its siblings."""
    if not is_valid_sql_text(repo):
        generation.model(repo)  # says that the index does not hold it
    notes: list[str] = []
    ancestors, cut = _climb(generation, repo)
    if cut:
        notes.append("its eldest ancestors are not shown: there are too many")
    descendants = _descend(generation, repo, limit, notes)
    parents = sorted({edge.parent for edge in ancestors if edge.child == repo})
    siblings: list[Edge] = []
    if parents:
        condition = f"{sql_in('parent', parents[:_NAMES_AT_ONCE])} AND NOT {sql_in('child', [repo])}"
        siblings = _read(generation, condition, limit + 1)
        if len(siblings) > limit:
            notes.append(f"only {limit:,} of its siblings are shown")
        above = {edge.child for edge in ancestors}
        siblings = [edge for edge in siblings[:limit] if edge.child not in above]
    _check_order(generation, [*ancestors, *siblings, *descendants])
    nowhere = _not_indexed(generation, {edge.parent for edge in ancestors if not edge.latent})
    if nowhere:
        notes.append(f"not models of this index, known as parents alone: {', '.join(nowhere[:_NAMED])}")
    root: str | None = repo
    depth: int | None = 0
    if not ancestors and not descendants:
        model = row_called(generation, repo, ["root", "depth"])
        root, depth = model["root"], model["depth"]
        notes.append(
            f"no relative of {repo} is known: "
            + ("its weights were not compared" if root is None else "none is probable enough")
        )
    elif cut:
        root = depth = None
    else:
        main = main_parents(ancestors)
        while root in main:  # ends: no model descends from itself
            root, depth = main[root].parent, (depth or 0) + 1
    return Tree(repo, root, depth, Edges(ancestors), Edges(siblings), Edges(descendants), notes)


def called(generation: Generation, names: Iterable[str], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the models of some names, of whatever kind; of a name of both kinds, that of the classifier."""
    names = set(names)
    rows = generation.models_named("repo", names, ["repo", *columns])
    if generation.settings.generators is not None:
        names -= {row["repo"] for row in rows}
        rows += generation.generators.called(names, ["repo", *columns])
    return rows


def row_called(generation: Generation, repo: str, columns: Sequence[str]) -> dict[str, Any]:
    """The row of one model of whatever kind.

    Raises:
        QueryError: the index does not hold it.
    """
    rows = called(generation, [repo], columns) if is_valid_sql_text(repo) else []
    return rows[0] if rows else generation.model(repo)


def _not_indexed(generation: Generation, names: set[str]) -> list[str]:
    """Those of some names that are no models of the index: parents that were not run, or that somebody made up."""
    return sorted(names - {row["repo"] for row in called(generation, names, [])})


def _climb(generation: Generation, repo: str) -> tuple[list[Edge], bool]:
    """Edges to all ancestors, and whether there are more than may be read."""
    edges, more = follow(generation, "child", [repo], _MOST_ANCESTORS)
    return edges[:_MOST_ANCESTORS], more


def _descend(generation: Generation, repo: str, limit: int, notes: list[str]) -> list[Edge]:
    """Edges to all descendants, those nearest first."""
    edges, more = follow(generation, "parent", [repo], limit)
    if more:
        notes.append(f"only {min(len(edges), limit):,} of its descendants are shown")
    return edges[:limit]


def edges_above(generation: Generation, names: Iterable[str], most: int) -> dict[str, list[Edge]] | None:
    """The edges to the parents of some models, of these, and so on, by child; None where there are more than ``most``."""
    edges, more = follow(generation, "child", names, most)
    if more or len(edges) > most:
        return None
    above: dict[str, list[Edge]] = {}
    for edge in edges:
        above.setdefault(edge.child, []).append(edge)
    return above


def follow(
    generation: Generation, column: Literal["child", "parent"], names: Iterable[str], most: int = _ALL
) -> tuple[list[Edge], bool]:
    """Edges whose ``column`` is one of some models, of those at their other ends, and so on, the nearest first.

    Also whether the last level leads on. It ends with more than ``most`` edges, or after ``_MOST_LEVELS``.
    """
    edges: list[Edge] = []
    met = set(names)
    front = sorted(met)
    for _ in range(_MOST_LEVELS):
        level = edges_with(generation, column, front, most - len(edges) + 1)
        edges += level
        front = sorted({edge.parent if column == "child" else edge.child for edge in level} - met)
        met.update(front)
        if not front or len(edges) > most:
            break
    return edges, bool(front)


def edges_with(
    generation: Generation,
    column: Literal["child", "parent"],
    names: Sequence[str],
    most: int = _ALL,
) -> list[Edge]:
    """Up to ``most`` edges whose ``column`` is one of some models."""
    edges: list[Edge] = []
    for start in range(0, len(names), _NAMES_AT_ONCE):
        if len(edges) >= most:
            break
        condition = sql_in(column, names[start : start + _NAMES_AT_ONCE])
        edges += _read(generation, condition, most - len(edges))
    return edges


def _read(generation: Generation, condition: str | None, most: int) -> list[Edge]:
    """Up to ``most`` edges that meet a condition, by child and parent.

    Raises:
        QueryError: the condition is not understood.
        StoreError: a row is no edge.
    """
    edges: list[Edge] = []
    for block in generation.edges(condition):
        edges += checked_edges(generation, block.slice(0, most - len(edges)))
        if len(edges) >= most:
            break
    return sorted(edges, key=lambda edge: (edge.child, edge.parent))


def checked_edges(generation: Generation, block: pa.Table) -> list[Edge]:
    """The rows of a block of edges.

    Raises:
        StoreError: a row is no edge.
    """
    try:
        return edges_of(block)
    except ValueError as error:
        raise generation.damaged("edges", str(error)) from None


def _check_order(generation: Generation, edges: Sequence[Edge]) -> None:
    """Refuse edges by which a model descends from itself.

    Raises:
        StoreError: there is such a model.
    """
    parents: dict[str, list[str]] = {}
    for edge in edges:
        parents.setdefault(edge.child, []).append(edge.parent)
    cycle = find_cycle(parents)
    if cycle is not None:
        raise generation.damaged("edges", f"{cycle} is its own ancestor")

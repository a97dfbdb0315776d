"""Where what models declare does not fit what their weights show: licences along the edges of trees, and parents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from probelog.errors import QueryError
from probelog.index.generation import Generation
from probelog.search.trees import called, checked_edges, edges_above, edges_with, main_parents, row_called
from probelog.terminal import printable
from probelog.trees.edges import Edge, Relation, is_latent_name
from probelog.trees.licences import ConflictKind, judge, known

# Ancestors that are read to judge the declared parents of one block of models.
_MOST_ANCESTORS = 100_000
# Relations that change no number, or its type alone.
_UNCHANGED = frozenset({Relation.COPY, Relation.RECAST})
_NAMED_LICENCES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LicenceConflict:
    """One model whose declarations do not fit its weights.

    Attributes:
        kind: ``forbidden``: its licence allows what its parent's forbids; ``conditions``: it drops conditions that the
            parent's licence puts on what is made from it; ``notice``: the parent's licence allows other terms if
            notices are kept, and its own does not ask for that; ``contradicted``: the weights contradict a declared
            parent; ``undeclared``: they show a parent that it does not declare.
        child: the model.
        parent: the other model that this is about: of its tree, or the declared one.
        child_licence: what the child declares, several separated by a comma; None without any.
        parent_licence: likewise of the parent.
        reason: why, as a sentence.
        edge: what the weights show of the child, with probability and evidence; None where they show no parent.
    """

    kind: ConflictKind
    child: str
    parent: str
    child_licence: str | None
    parent_licence: str | None
    reason: str
    edge: Edge | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "kind": self.kind.value,
            "child": self.child,
            "parent": self.parent,
            "child_licence": self.child_licence,
            "parent_licence": self.parent_licence,
            "reason": self.reason,
            "probability": None if self.edge is None else self.edge.probability,
            "evidence": None if self.edge is None else dict(self.edge.evidence),
            "edge": None if self.edge is None else self.edge.to_dict(),
        }


class LicenceConflicts(Sequence[LicenceConflict]):
    """Conflicts, the gravest kinds first, and ``notes``: how many edges could not be judged, and what is left out."""

    def __init__(self, conflicts: Sequence[LicenceConflict], notes: Sequence[str] = ()) -> None:
        order = {kind: place for place, kind in enumerate(ConflictKind)}
        self._conflicts = sorted(conflicts, key=lambda item: (order[item.kind], item.child, item.parent))
        self.notes = list(notes)

    @overload
    def __getitem__(self, item: int) -> LicenceConflict: ...
    @overload
    def __getitem__(self, item: slice) -> list[LicenceConflict]: ...
    def __getitem__(self, item: int | slice) -> LicenceConflict | list[LicenceConflict]:
        return self._conflicts[item]

    def __len__(self) -> int:
        return len(self._conflicts)

    def __repr__(self) -> str:
        return f"LicenceConflicts({self._conflicts!r})"


def conflicts_of(
    generation: Generation, kinds: Sequence[str], limit: int, repo: str | None = None
) -> LicenceConflicts:
    """The conflicts of some kinds, up to ``limit`` of each; of one model alone, or of all.

    Raises:
        QueryError: there is no such kind, or the index has no model trees.
    """
    unknown = [kind for kind in kinds if kind not in {*ConflictKind}]
    if unknown or not kinds:
        raise QueryError(
            f"there is no conflict of the kind {', '.join(map(repr, unknown)) or 'that was asked for'}; "
            f"there are {', '.join(ConflictKind)}"
        )
    search = _Search(generation, {ConflictKind(kind) for kind in kinds}, limit)
    if repo is None:
        search.judge_all()
    else:
        search.judge_one(repo)
    return search.result()


class _Search:
    def __init__(self, generation: Generation, kinds: set[ConflictKind], limit: int) -> None:
        self._generation = generation
        self._kinds = kinds
        self._limit = limit
        self._conflicts: list[LicenceConflict] = []
        self._counts: Counter[ConflictKind] = Counter()
        self._not_judged = 0
        self._unknown: Counter[str] = Counter()

    def judge_all(self) -> None:
        for block in self._generation.edges():
            self._judge_edges(checked_edges(self._generation, block))
        if ConflictKind.CONTRADICTED in self._kinds:
            columns, generation = ["repo", "root", "parents"], self._generation
            for models in generation.model_blocks(columns):
                self._contradicted(models.to_pylist())
            if generation.settings.generators is not None:
                for generators in generation.generators.blocks(columns):
                    self._contradicted(generators.to_pylist())

    def judge_one(self, repo: str) -> None:
        model = row_called(self._generation, repo, ["root", "parents"])
        self._judge_edges(edges_with(self._generation, "child", [repo]))
        if ConflictKind.CONTRADICTED in self._kinds:
            self._contradicted([model])

    def result(self) -> LicenceConflicts:
        notes = [
            f"there are {self._counts[kind]:,} of the kind {kind.value}, of which {self._limit:,} are given: raise the limit"
            for kind in ConflictKind
            if self._counts[kind] > self._limit
        ]
        if self._not_judged:
            common = ", ".join(
                f"{printable(name, 40)} ({count:,})"
                for name, count in self._unknown.most_common(_NAMED_LICENCES)
            )
            notes.append(
                f"the licences of {self._not_judged:,} edges could not be judged, because one is missing or not in the "
                f"table of known licences: {common}"
            )
        return LicenceConflicts(self._conflicts, notes)

    def _add(
        self, kind: ConflictKind, child: str, parent: str, reason: str, edge: Edge | None, facts: _Facts
    ) -> None:
        if kind not in self._kinds:
            return
        self._counts[kind] += 1
        if self._counts[kind] <= self._limit:
            self._conflicts.append(
                LicenceConflict(
                    kind=kind,
                    child=child,
                    parent=parent,
                    child_licence=", ".join(_licences(facts, child)) or None,
                    parent_licence=", ".join(_licences(facts, parent)) or None,
                    reason=reason,
                    edge=edge,
                )
            )

    def _facts(self, names: set[str]) -> _Facts:
        """Facts of those of some models that the index holds."""
        columns = ["licence", "licences", "root"]
        return {row["repo"]: row for row in called(self._generation, names, columns)}

    def _judge_edges(self, edges: Sequence[Edge]) -> None:
        facts = self._facts({name for edge in edges for name in (edge.child, edge.parent)})
        for edge in edges:
            self._judge(edge, facts)

    def _judge(self, edge: Edge, facts: _Facts) -> None:
        if edge.declared is not True and not is_latent_name(edge.parent):
            named = "names other parents" if edge.declared is False else "names no parent"
            reason = f"the weights show that it was made from {edge.parent}, and it {named}"
            self._add(ConflictKind.UNDECLARED, edge.child, edge.parent, reason, edge, facts)
        if edge.parent not in facts:
            return
        parent, child = _licences(facts, edge.parent), _licences(facts, edge.child)
        if not known(parent) or not known(child):
            self._not_judged += 1
            missing = [name for name in (*(parent or ["none"]), *(child or ["none"])) if not known([name])]
            self._unknown.update(set(missing))
            return
        judgement = judge(parent, child, unchanged=edge.relation in _UNCHANGED)
        if judgement is not None:
            self._add(judgement.kind, edge.child, edge.parent, judgement.reason, edge, facts)

    def _contradicted(self, models: Sequence[Mapping[str, Any]]) -> None:
        """Declared parents that were compared with their children, and are none of their ancestors."""
        declared = {
            model["repo"]: sorted({parent["repo"] for parent in model["parents"] or []} - {model["repo"]})
            for model in models
            if model["root"] is not None and model["parents"]
        }
        facts = self._facts({name for names in declared.values() for name in names} | declared.keys())
        pairs = [
            (child, parent)
            for child, names in declared.items()
            for parent in names
            if parent in facts and facts[parent]["root"] is not None
        ]
        if not pairs:
            return
        edges = edges_above(self._generation, {name for pair in pairs for name in pair}, _MOST_ANCESTORS)
        if edges is None:  # more than can be read: nothing is claimed
            return
        for child, parent in pairs:
            if parent in _above(child, edges):
                continue
            edge = main_parents(edges.get(child, ())).get(child)
            if edge is None:
                shown = "the weights show no probable parent of it"
            else:
                shown = f"the weights show that it was made from {edge.parent}"
            if child in _above(parent, edges):
                why = "which was made from it"
            elif facts[child]["root"] == facts[parent]["root"]:
                why = "which is related to it in another way"
            else:
                why = "which is of another family"
            reason = f"{shown}, and it declares {parent}, {why}"
            self._add(ConflictKind.CONTRADICTED, child, parent, reason, edge, facts)


_Facts = Mapping[str, Mapping[str, Any]]


def _licences(facts: _Facts, repo: str) -> list[str]:
    """The licences that a model declares, as identifiers."""
    model = facts.get(repo, {})
    declared = [*(model.get("licences") or []), *([model["licence"]] if model.get("licence") else [])]
    return list(dict.fromkeys(licence.strip().lower() for licence in declared))


def _above(name: str, edges: Mapping[str, Sequence[Edge]]) -> set[str]:
    """All ancestors of a model."""
    result: set[str] = set()
    front = [name]
    while front:
        added = {edge.parent for edge in edges.get(front.pop(), ())} - result
        result |= added
        front += added
    return result

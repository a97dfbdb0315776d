"""How well model trees are recovered, against known parents: edges, relations, calibration, and other methods beside.

top-1        children whose parent is uploaded and that got it (a merge: its heaviest edge leads to a parent)
twins        the same, where an edge to or from an equal model counts: nothing in the weights tells them apart
directed, undirected   precision, recall and F1 of edges between uploaded models
parentless   models without an uploaded parent that got no edge, or one to a true ancestor
false        edges between independent models (of another tree), of all such pairs of one architecture

An edge to a latent ancestor is right where a parent of the child was not uploaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from probelog.errors import UsageError
from probelog.trees.edges import Edge, Relation
from probelog.trees.families.tables import Family, ModelFacts
from probelog.trees.recovery import baselines

_BINS = 10


@dataclass(frozen=True)
class ModelTruth:
    """What is known of one uploaded model.

    Attributes:
        parents: the uploaded ones with their weights.
        ancestors: all, uploaded or not.
        relation: to its parents; a value of `Relation`, or ``root``.
        tree: a name that just the models of one tree share; None where its root is not known.
        unseen: whether some parent was not uploaded.
    """

    parents: Mapping[str, float]
    ancestors: frozenset[str]
    relation: str
    tree: str | None
    unseen: bool = False


Truth = Mapping[str, ModelTruth]


def truth_of(content: object, where: object) -> dict[str, ModelTruth]:
    """What a truth file says of its uploaded models.

    Its ``models`` has for each repository ``parents`` (a list of ``repo``, ``weight`` and ``withheld``: without
    ``repo`` the parent was never uploaded, and ``withheld`` is its name), ``relation`` and ``tree``; ``withheld`` has
    the same of what was not uploaded. Or it has of each the one ``parent`` (null for a root; not uploaded where it is
    not among the models) and the ``kind``: a ``copy``, a ``child`` of another child, or else of a root.

    Raises:
        UsageError: it is no such file.
    """
    try:
        models, withheld = content["models"], content.get("withheld", {})  # type: ignore[index,attr-defined]
        if models and not any("parents" in model for model in models.values()):
            return _of_parents({repo: (model["parent"], model["kind"]) for repo, model in models.items()})
        everything = {**withheld, **models}
        parents = {
            repo: [
                str(p["repo"] or p.get("withheld") or f"unseen parent of {repo}") for p in model["parents"]
            ]
            for repo, model in everything.items()
        }
        return {
            repo: ModelTruth(
                parents={p["repo"]: float(p["weight"]) for p in model["parents"] if p["repo"]},
                ancestors=_ancestors(repo, parents),
                relation=str(model["relation"]),
                tree=str(model["tree"]),
                unseen=any(not p["repo"] for p in model["parents"]),
            )
            for repo, model in models.items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{where} is no truth file of model trees ({type(error).__name__}: {error}): it must have `models`, each "
            "with `parents` (a list of objects with `repo` and `weight`), `relation` and `tree`, or each with `parent` "
            "and `kind`"
        ) from None


def _of_parents(models: Mapping[str, tuple[str | None, str]]) -> dict[str, ModelTruth]:
    """From the parent and the kind of each model."""
    parents = {repo: [] if parent is None else [str(parent)] for repo, (parent, _) in models.items()}
    truth = {}
    for repo, (parent, kind) in models.items():
        ancestors = _ancestors(repo, parents)
        root = next((name for name in (repo, *sorted(ancestors)) if not parents.get(name)), None)
        # A child's parent that is not there may have one itself.
        unknown = any(
            models[name][1] == "child" and not models.keys() >= set(parents[name])
            for name in {repo, *ancestors} & models.keys()
        )
        truth[repo] = ModelTruth(
            parents={str(parent): 1.0} if parent in models else {},
            ancestors=ancestors,
            relation="root" if parent is None else "copy" if kind == "copy" else "fine-tune",
            tree=None if unknown else root,
            unseen=parent is not None and parent not in models,
        )
    return truth


def _ancestors(repo: str, parents: Mapping[str, Sequence[str]]) -> frozenset[str]:
    result: set[str] = set()
    front = [repo]
    while front:
        added = set(parents.get(front.pop(), ())) - result
        result |= added
        front += added
    return frozenset(result)


def among(truth: Truth, repos: Iterable[str]) -> dict[str, ModelTruth]:
    """What is known of some of the models, if the others had never been uploaded."""
    there = set(repos) & truth.keys()
    return {
        repo: replace(
            truth[repo],
            parents={parent: weight for parent, weight in truth[repo].parents.items() if parent in there},
            unseen=truth[repo].unseen or not there.issuperset(truth[repo].parents),
        )
        for repo in sorted(there)
    }


@dataclass(frozen=True)
class Scores:
    """Of how many true edges how many were given, among how many."""

    true: int
    given: int
    both: int

    @property
    def precision(self) -> float:
        """Share of the given edges that are true; 0 without any."""
        return self.both / max(self.given, 1)

    @property
    def recall(self) -> float:
        """Share of the true edges that were given; 0 without any."""
        return self.both / max(self.true, 1)

    @property
    def f1(self) -> float:
        """Their harmonic mean."""
        return 2 * self.precision * self.recall / max(self.precision + self.recall, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Counts and shares, for JSON."""
        return {**asdict(self), "precision": self.precision, "recall": self.recall, "f1": self.f1}


@dataclass(frozen=True)
class Share:
    """How many of how many."""

    right: int
    of: int

    def __str__(self) -> str:
        return f"{self.right}/{self.of}"


@dataclass(frozen=True)
class Figures:
    """What one method's edges are worth (the names: above).

    ``relations`` counts, by true relation, the right ones among edges to a true parent. ``merge_error`` is the largest
    error of a merge's weights; None without a merge that was found.
    """

    top1: Share
    twins: Share
    directed: Scores
    undirected: Scores
    parentless: Share
    relations: Mapping[str, Share]
    merge_error: float | None
    false: int
    independent: int | None

    @property
    def relation(self) -> Share:
        """Right relations among edges to a true parent."""
        return Share(
            sum(share.right for share in self.relations.values()),
            sum(share.of for share in self.relations.values()),
        )

    def cells(self) -> dict[str, str]:
        """One row of a table for a person."""
        return {
            "top-1": str(self.top1),
            "twins": str(self.twins),
            "directed": _shares(self.directed),
            "undirected": _shares(self.undirected),
            "parentless": str(self.parentless),
            "relation": str(self.relation) if self.relations else "-",
            "merge weights": "-" if self.merge_error is None else f"{self.merge_error:.3f}",
            "false": f"{self.false}/{'?' if self.independent is None else self.independent}",
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **asdict(self),
            "directed": self.directed.to_dict(),
            "undirected": self.undirected.to_dict(),
            "relation": asdict(self.relation),
        }


def _shares(scores: Scores) -> str:
    return f"{scores.precision:.2f} {scores.recall:.2f} {scores.f1:.2f}"


def figures(truth: Truth, edges: Iterable[Edge], independent: int | None) -> Figures:
    """What edges are worth; those whose child the truth does not know are left out.

    ``independent`` is the number of pairs of independent models of one architecture (`independent_pairs`), if it is known.
    """
    edges = [edge for edge in edges if edge.child in truth]
    by_child: dict[str, list[Edge]] = {}
    for edge in edges:
        by_child.setdefault(edge.child, []).append(edge)
    heaviest = {
        child: max(several, key=lambda e: (e.weight, not e.latent, e.probability, e.parent))
        for child, several in by_child.items()
    }
    children = [repo for repo, model in truth.items() if model.parents]
    right = [repo for repo in children if repo in heaviest and heaviest[repo].parent in truth[repo].parents]
    relations: dict[str, Share] = {}
    for repo in right:
        relation = truth[repo].relation
        share = relations.get(relation, Share(0, 0))
        relations[relation] = Share(share.right + (heaviest[repo].relation == relation), share.of + 1)
    parentless = [repo for repo, model in truth.items() if not model.parents]
    fine = sum(all(_is_ancestor(truth[repo], e) for e in by_child.get(repo, ())) for repo in parentless)
    seen = [edge for edge in edges if not edge.latent]
    true = {(child, parent) for child, model in truth.items() for parent in model.parents}
    got = {(edge.child, edge.parent) for edge in seen}
    errors = [
        abs(edge.weight - truth[edge.child].parents[edge.parent])
        for edge in seen
        if edge.relation is Relation.MERGE and edge.parent in truth[edge.child].parents
    ]
    return Figures(
        top1=Share(len(right), len(children)),
        twins=Share(_with_twins(truth, children, heaviest, seen), len(children)),
        directed=_scores(true, got),
        undirected=_scores({frozenset(e) for e in true}, {frozenset(e) for e in got}),
        parentless=Share(fine, len(parentless)),
        relations=dict(sorted(relations.items())),
        merge_error=max(errors, default=None),
        false=sum(e.parent not in truth or _independent(truth[e.child], truth[e.parent]) for e in seen),
        independent=independent,
    )


def _independent(one: ModelTruth, other: ModelTruth) -> bool:
    return one.tree != other.tree and None not in (one.tree, other.tree)


def _is_ancestor(model: ModelTruth, edge: Edge) -> bool:
    return model.unseen if edge.latent else edge.parent in model.ancestors


def _with_twins(
    truth: Truth, children: Sequence[str], heaviest: Mapping[str, Edge], edges: Sequence[Edge]
) -> int:
    """An edge counts where its ends, or twins of theirs, are a true edge's; so does a twin's edge the other way."""
    equal = {frozenset((e.child, e.parent)) for e in edges if e.relation in (Relation.COPY, Relation.RECAST)}
    twins: dict[str, set[str]] = {}
    for a, b in equal:
        for x, y in ((a, b), (b, a)):
            twins.setdefault(x, {x}).add(y)
    count = 0
    for child in children:
        options = {p for parent in truth[child].parents for p in twins.get(parent, {parent})}
        given = [heaviest[one] for one in twins.get(child, {child}) if one in heaviest]
        count += any(
            e.parent in options
            or (frozenset((e.child, e.parent)) in equal and e.child in truth[child].parents)
            for e in given
        )
    return count


def _scores(true: set[Any], given: set[Any]) -> Scores:
    return Scores(len(true), len(given), len(true & given))


def independent_pairs(truth: Truth, groups: Iterable[Iterable[str]]) -> int:
    """Number of pairs of models of different trees within groups of models of one architecture."""
    count = 0
    for group in groups:
        trees: dict[str, int] = {}
        for repo in group:
            if repo in truth and (tree := truth[repo].tree) is not None:
                count += sum(trees.values()) - trees.get(tree, 0)
                trees[tree] = trees.get(tree, 0) + 1
    return count


# Calibration


@dataclass(frozen=True)
class Bin:
    """Edges with a probability from ``low`` to ``high``: their number, mean probability, and the share that is true."""

    low: float
    high: float
    edges: int
    probability: float
    frequency: float


def judged(truth: Truth, edges: Iterable[Edge]) -> list[tuple[float, bool]]:
    """Each edge's probability, and whether it is true."""
    return [
        (
            edge.probability,
            truth[edge.child].unseen if edge.latent else edge.parent in truth[edge.child].parents,
        )
        for edge in edges
        if edge.child in truth
    ]


def reliability(edges: Sequence[tuple[float, bool]], bins: int = _BINS) -> list[Bin]:
    """The reliability table over equal intervals of the probability; empty ones are left out."""
    probabilities, right = np.array([p for p, _ in edges]), np.array([r for _, r in edges])
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    return [
        Bin(
            low=b / bins,
            high=(b + 1) / bins,
            edges=int((place == b).sum()),
            probability=float(probabilities[place == b].mean()),
            frequency=float(right[place == b].mean()),
        )
        for b in range(bins)
        if (place == b).any()
    ]


def calibration_error(table: Sequence[Bin]) -> float:
    """Expected calibration error: the mean gap between probability and frequency; 0 without edges."""
    total = sum(row.edges for row in table)
    return sum(abs(row.probability - row.frequency) * row.edges for row in table) / max(total, 1)


# Other methods


def baseline_edges(
    groups: Sequence[Family], truth: Truth, facts: Mapping[str, ModelFacts]
) -> dict[str, list[Edge]]:
    """The edges of other methods, which have no probability and no relation; those by time only where times are known.

    "MoTHer, trees given" is told how many trees a family has.
    """

    def edges(parents: Iterable[Mapping[str, str]]) -> list[Edge]:
        return [
            Edge(child, parent, Relation.FINE_TUNED, 1.0)
            for some in parents
            for child, parent in sorted(some.items())
        ]

    def trees(family: Family) -> int:
        return len({truth[repo].tree if repo in truth else repo for repo in family.repos})

    results = {
        "nearest": edges(baselines.nearest(family) for family in groups),
        "MoTHer, trees given": edges(baselines.mother(family, trees(family)) for family in groups),
        "MoTHer, not given": edges(baselines.mother(family) for family in groups),
    }
    if any(model.uploaded is not None for model in facts.values()):
        results["nearest + time"] = edges(baselines.nearest_earlier(family, facts) for family in groups)
        results["Atlas rules"] = edges(baselines.atlas(family, facts) for family in groups)
    return results

"""What the pages and the API say, read from the index: the same values for people and for programs."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from probelog.errors import ProbeLogError, QueryError
from probelog.ranking.names import canonical_name, is_placeholder, normal_name, without_prefix
from probelog.search.trees import main_parents
from probelog.web.pictures import embedding_of
from probelog.web.question import GENERATOR, ORDERS

if TYPE_CHECKING:
    from probelog.search.client import Index
    from probelog.search.generators.results import GeneratorResults
    from probelog.search.licences import LicenceConflicts
    from probelog.search.results import LogitSummary, ModelHit, ModelSummary, Results
    from probelog.search.trees import Tree
    from probelog.trees.edges import Edge
    from probelog.web.question import Question

# Logits on one page of a model, and concepts of each.
LOGITS = 100
CONCEPTS = 5
# Models on a model's page that do what it does, and descendants and siblings on a page with a tree.
SIMILAR = 5
RELATIVES = 200
# Parents beside the main one that a node names.
_OTHER_PARENTS = 10
_MEASURES = 50


def search(index: Index, question: Question) -> Results | GeneratorResults:
    """The answers to a search: logits, or generators.

    Raises:
        QueryError: it is not understood.
    """
    further: dict[str, Any] = {}
    for name, tokens in (("embeddings", question.pictures), ("sketch_embeddings", question.sketches)):
        if tokens:
            settings = index.settings
            dimension = int((settings.get("image_encoder") or {}).get("dimension", 0))
            digest = settings["encoder_digest"]
            further[name] = np.stack([embedding_of(token, dimension, digest) for token in tokens])
    if question.kind == GENERATOR:
        further["kind"] = GENERATOR
    if question.min_confidence is not None:
        further["min_confidence"] = question.min_confidence
    if question.sort != ORDERS[0]:
        further["sort"] = question.sort
    found: Results | GeneratorResults = index.search(
        question.texts,
        like=question.like,
        negative=question.negative,
        k=question.k,
        where=question.where,
        by=question.by,
        **further,
    )
    return found


@dataclass(frozen=True)
class Model:
    """One model: a part of its logits, and what is known around it.

    ``more`` says whether other logits follow. Of ``conflicts`` None: the index has no trees; of
    ``similar``: they were not asked for.
    """

    summary: ModelSummary
    start: int
    more: bool
    similar: Sequence[ModelHit] | None
    conflicts: LicenceConflicts | None


def model(index: Index, repo: str, start: int = 0, around: bool = True, similar: bool = True) -> Model:
    """One model; ``around``: with licence conflicts; ``similar``: with models that do the same.

    Raises:
        QueryError: the index does not hold it.
    """
    summary = index.show(repo, CONCEPTS, start=start, limit=LOGITS + 1)
    more = len(summary.logits) > LOGITS
    del summary.logits[LOGITS:]
    others = index.models_like(repo, k=SIMILAR) if around and similar else None
    conflicts = index.licence_conflicts(repo=repo, limit=RELATIVES) if around and has_trees(index) else None
    return Model(summary, start, more, others, conflicts)


def has_trees(index: Index) -> bool:
    """Whether the index knows which models were made from which."""
    return index.settings.get("edges") is not None


def differs(logit: LogitSummary) -> bool:
    """Whether a logit declares a name that has no word in common with any concept that it recognises."""
    if is_placeholder(logit.label) or not logit.concepts or logit.negated:
        return False
    declared = _words(logit.label)
    return bool(declared) and not any(declared & _words(concept) for concept in logit.concepts)


def _words(name: str) -> set[str]:
    name = without_prefix(name)
    return {word for spelling in (normal_name(name), canonical_name(name) or "") for word in spelling.split()}


@dataclass(frozen=True)
class Node:
    """A model in a tree that is drawn, with the edge to its main parent.

    ``role``: what it is to the model that was asked for. ``closes``: how many levels end after it, so that a tree of
    any depth is drawn without recursion.
    """

    name: str
    edge: Edge | None
    others: Sequence[Edge]
    asked: bool
    latent: bool
    children: int
    role: str
    closes: int


def outline(tree: Tree) -> list[Node]:
    """A tree as one line a model, each below its main parent, from the eldest down."""
    edges = tree.edges
    main = main_parents(edges)
    children: dict[str, list[str]] = {}
    for edge in main.values():
        children.setdefault(edge.parent, []).append(edge.child)
    parents: dict[str, list[Edge]] = {}
    for edge in edges:
        parents.setdefault(edge.child, []).append(edge)
    latent = {edge.parent for edge in edges if edge.latent}
    roles = {
        **{edge.child: "sibling" for edge in tree.siblings},
        **{edge.child: "child" if edge.parent == tree.repo else "descendant" for edge in tree.descendants},
        **{edge.parent: "ancestor" for edge in tree.ancestors},
        **{edge.parent: "parent" for edge in tree.ancestors if edge.child == tree.repo},
        tree.repo: "",
    }
    names = {tree.repo, *(edge.parent for edge in edges)}
    waiting = [(name, 0) for name in sorted(names - main.keys(), reverse=True)]
    lines: list[tuple[str, int]] = []
    while waiting:
        name, level = waiting.pop()
        lines.append((name, level))
        waiting += [(child, level + 1) for child in sorted(children.get(name, ()), reverse=True)]
    nodes = []
    for (name, level), (_, following) in zip(lines, [*lines[1:], ("", 0)], strict=True):
        others = [edge for edge in parents.get(name, ()) if edge is not main.get(name)]
        nodes.append(
            Node(
                name=name,
                edge=main.get(name),
                others=others[:_OTHER_PARENTS],
                asked=name == tree.repo,
                latent=name in latent,
                children=len(children.get(name, ())),
                role=roles.get(name, ""),
                closes=max(0, level - following) if name not in children else 0,
            )
        )
    return nodes


@dataclass(frozen=True)
class Facts:
    """What an index says about itself.

    ``measures``: of the quality gate's report, if there is one; ``accuracy``: those of them that compare answers with
    declared labels. ``problem``: why there is none, where that is an error.
    """

    settings: Mapping[str, Any]
    generation: str
    published: str
    measures: Sequence[Mapping[str, Any]]
    accuracy: Sequence[Mapping[str, Any]]
    passed: bool | None
    at: str
    problem: str


def facts(index: Index) -> Facts:
    """The index's page."""
    problem = ""
    try:
        report = index.quality_report() or {}
    except ProbeLogError as error:
        report, problem = {}, str(error)
    measures = [*_measures(report)]
    passed = report.get("passed")
    return Facts(
        settings=index.settings,
        generation=index.generation,
        published=index.published,
        measures=measures,
        accuracy=[item for item in measures if item["name"] in _ACCURACY and item["value"] is not None],
        passed=passed if isinstance(passed, bool) else None,
        at=str(report.get("at", "")),
        problem=problem,
    )


# Names of the gate's measures (`pipelines.quality.agreement`) and what they mean to somebody who asks.
_ACCURACY = {
    "declared, first answer": "first answer declares the name that was asked",
    "declared, first ten answers": "one of the first ten answers does",
    "models named as declared": "logits that have their declared name among the ten likeliest",
}


def accuracy_title(name: str) -> str:
    """What a measure of accuracy means."""
    return _ACCURACY[name]


def _measures(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The measures of a report that anybody may have written."""
    listed = report.get("measures")
    for item in listed[:_MEASURES] if isinstance(listed, list) else ():
        if isinstance(item, dict) and isinstance(item.get("name"), str):
            numbers = {name: _number(item.get(name)) for name in ("value", "before", "limit", "counted")}
            texts = {name: str(item.get(name) or "") for name in ("name", "verdict", "meaning", "note")}
            yield {**texts, **numbers}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e15 else None


def address(page: str, repo: str) -> str:
    """The address of a page about a model, on this server."""
    return f"{page}/{quote(repo, safe='/')}"


def record(value: object) -> dict[str, Any]:
    """A record as plain values for JSON."""
    plain = as_json(value)
    assert isinstance(plain, dict)
    return plain


def as_json(value: object) -> object:
    """Plain values for JSON; times are ISO 8601."""
    if is_dataclass(value) and not isinstance(value, type):
        return as_json(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value.isoformat() if isinstance(value, dt.datetime) else value


def unknown_model(error: QueryError) -> bool:
    """Whether an error says that the index does not hold a model."""
    return "does not hold" in str(error)

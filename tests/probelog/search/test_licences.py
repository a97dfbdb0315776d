"""Conflicts along the edges of an index: licences, and declared parents."""

from __future__ import annotations

import json
from typing import Any

import pytest

from probelog.errors import QueryError
from probelog.search.client import Index, open_index
from probelog.search.licences import LicenceConflict
from probelog.storage.schemas import Parent
from probelog.storage.store import Store
from probelog.trees.edges import Edge, Relation, edge_table
from tests.support.worlds.small_index import Model, build

LATENT = "latent:0123456789ab"


def model(repo: str, licence: str | None, *parents: str) -> Model:
    declared = tuple(Parent(parent, "finetune", "card") for parent in parents)
    return Model(repo, ("cat",), licence=licence, parents=declared)


# m is made from nc, g from gpl; c is a copy of m; own declares something else than the weights show.
MODELS = [
    model("o/nc", "cc-by-nc-4.0"),
    model("o/m", "mit", "o/nc"),
    model("o/c", "apache-2.0", "o/nc"),  # its grandparent
    model("o/gpl", "GPL-3.0"),
    model("o/g", "mit"),
    model("o/own", "other", "o/gpl", "o/nobody", "o/m"),
    model("o/upside-down", None, "o/down"),
    model("o/down", None, "o/upside-down"),
    model("o/alone", "mit", "o/nc"),
]
EVIDENCE = {"distance": 0.25}
EDGES = [
    Edge("o/m", "o/nc", Relation.FINE_TUNED, 0.75, declared=True, evidence=EVIDENCE),
    Edge("o/c", "o/m", Relation.COPY, 0.875, declared=False),
    Edge("o/g", "o/gpl", Relation.QUANTISED, 0.5),
    Edge("o/own", "o/c", Relation.FINE_TUNED, 0.75, declared=False),
    Edge("o/down", "o/upside-down", Relation.FINE_TUNED, 0.75, declared=True),
    Edge("o/gpl", LATENT, Relation.FINE_TUNED, 0.75, latent=True),
]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    store = Store(tmp_path_factory.mktemp("licences") / "index")
    return open_index(build(store, models=MODELS, images=False, edges=edge_table(EDGES)).store.uri)


def told(conflicts: Any) -> list[tuple[str, str, str]]:
    return [(item.kind.value, item.child, item.parent) for item in conflicts]


def test_all_conflicts_with_their_reasons(index: Index) -> None:
    conflicts = index.licence_conflicts()

    assert told(conflicts) == [
        ("forbidden", "o/m", "o/nc"),
        ("conditions", "o/g", "o/gpl"),
        ("contradicted", "o/alone", "o/nc"),
        ("contradicted", "o/own", "o/gpl"),
        ("contradicted", "o/upside-down", "o/down"),
        ("undeclared", "o/c", "o/m"),
        ("undeclared", "o/g", "o/gpl"),
        ("undeclared", "o/own", "o/c"),
    ]
    assert [item.reason for item in conflicts] == [
        "cc-by-nc-4.0 forbids commercial use, which mit allows",
        "gpl-3.0 asks that what is made from it is under gpl-3.0",
        "the weights show no probable parent of it, and it declares o/nc, which is of another family",
        "the weights show that it was made from o/c, and it declares o/gpl, which is of another family",
        "the weights show no probable parent of it, and it declares o/down, which was made from it",
        "the weights show that it was made from o/m, and it names other parents",
        "the weights show that it was made from o/gpl, and it names no parent",
        "the weights show that it was made from o/c, and it names other parents",
    ]
    assert conflicts.notes == [
        "the licences of 2 edges could not be judged, because one is missing or not in the table of known licences: "
        "none (1), other (1)"
    ]


@pytest.mark.parametrize("repo", [item.repo for item in MODELS])
def test_the_conflicts_of_one_model_are_those_that_it_has_among_all(index: Index, repo: str) -> None:
    everywhere = [item for item in index.licence_conflicts() if item.child == repo]
    assert [*index.licence_conflicts(repo=repo)] == everywhere


def test_conflicts_of_a_model_that_is_not_there(index: Index) -> None:
    with pytest.raises(QueryError, match="does not hold 'o/nobody'"):
        index.licence_conflicts(repo="o/nobody")


def test_a_row_has_probability_and_evidence(index: Index) -> None:
    first, *_ = index.licence_conflicts(["forbidden"])

    assert isinstance(first, LicenceConflict)
    assert json.loads(json.dumps(first.to_dict())) == {
        "kind": "forbidden",
        "child": "o/m",
        "parent": "o/nc",
        "child_licence": "mit",
        "parent_licence": "cc-by-nc-4.0",
        "reason": "cc-by-nc-4.0 forbids commercial use, which mit allows",
        "probability": 0.75,
        "evidence": EVIDENCE,
        "edge": EDGES[0].to_dict(),
    }
    alone = index.licence_conflicts(["contradicted"])[0]
    assert (alone.to_dict()["probability"], alone.to_dict()["edge"]) == (None, None)


def test_kinds_and_limits(index: Index) -> None:
    some = index.licence_conflicts(["undeclared", "conditions"], limit=2)

    assert told(some) == [
        ("conditions", "o/g", "o/gpl"), ("undeclared", "o/c", "o/m"), ("undeclared", "o/g", "o/gpl"),
    ]  # fmt: skip
    assert some.notes[0] == "there are 3 of the kind undeclared, of which 2 are given: raise the limit"
    assert len(some[:2]) == 2
    assert repr(some).startswith("LicenceConflicts([LicenceConflict(kind=")
    with pytest.raises(QueryError, match="no conflict of the kind 'odd'; there are forbidden, conditions, "):
        index.licence_conflicts(["odd"])
    with pytest.raises(QueryError, match="limit must be"):
        index.licence_conflicts(limit=0)


def test_an_index_without_trees(tmp_path: Any) -> None:
    index = open_index(build(Store(tmp_path), models=MODELS[:2], images=False).store.uri)

    with pytest.raises(QueryError, match="has no model trees"):
        index.licence_conflicts()

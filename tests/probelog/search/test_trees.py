"""Model trees of an index: whole, updated, large, and as somebody else may have published them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from probelog.errors import QueryError, StoreError
from probelog.index.generation import Generation
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.lifecycle import go_live
from probelog.publication.rows import LogitBatch
from probelog.publication.update import Changes, write_update
from probelog.search.client import Index, open_index
from probelog.storage.schemas import EDGES
from probelog.storage.store import Store
from probelog.trees.edges import Edge, Relation, edge_table
from tests.compatibility.make import KEPT
from tests.support.worlds.small_index import Model, SmallIndex, build, model_facts

LATENT = "latent:0123456789ab"
SIGNALS = {"distance": 0.25, "time": 2.5}


def edge(child: str, parent: str, relation: Relation = Relation.FINE_TUNED, **facts: Any) -> Edge:
    return Edge(child, parent, relation, **{"probability": 0.75, "evidence": SIGNALS} | facts)


# org/base <- org/a <- org/b, and org/m merged from a and c; org/c and org/d come from what nobody has seen.
FOREST = [
    edge("org/a", "org/base", declared=True),
    edge("org/b", "org/a", Relation.HEAD_ONLY, declared=False),
    edge("org/c", LATENT, latent=True),
    edge("org/d", LATENT, latent=True, probability=0.5),
    edge("org/m", "org/a", Relation.MERGE, weight=0.25),
    edge("org/m", "org/c", Relation.MERGE, weight=0.75),
    edge("org/o", "org/base", Relation.QUANTISED),
]
REPOS = ["org/base", "org/a", "org/b", "org/c", "org/d", "org/m", "org/o", "org/alone"]
MODELS = [Model(repo, ("cat", "dog"), licence="mit" if repo < "org/c" else "other") for repo in REPOS]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    store = Store(tmp_path_factory.mktemp("forest") / "index")
    return build(store, models=MODELS, images=False, edges=edge_table(FOREST))


@pytest.fixture(scope="module")
def index(built: SmallIndex) -> Index:
    return open_index(built.store.uri)


def pairs(edges: Sequence[Edge]) -> list[tuple[str, str]]:
    return [(item.child, item.parent) for item in edges]


def hostile(tmp_path: Any, rows: pa.Table, repos: Sequence[str] = ("a", "b")) -> Index:
    """An index whose edges are what somebody wrote."""
    models = [Model(repo, ("cat",)) for repo in repos]
    return open_index(build(Store(tmp_path), models=models, images=False, edges=rows).store.uri)


# A tree


def test_the_edges_around_a_model(index: Index) -> None:
    tree = index.tree("org/a")

    assert (tree.root, tree.depth) == ("org/base", 1)
    assert pairs(tree.ancestors) == [("org/a", "org/base")]
    assert pairs(tree.siblings) == [("org/o", "org/base")]
    assert pairs(tree.descendants) == [("org/b", "org/a"), ("org/m", "org/a")]
    assert tree.notes == []
    assert tree.ancestors[0] == FOREST[0]
    assert len(tree.edges) == 4
    assert json.loads(json.dumps(tree.to_dict()))["ancestors"] == [
        {
            "child": "org/a",
            "parent": "org/base",
            "relation": "fine-tune",
            "probability": 0.75,
            "weight": 1.0,
            "declared": True,
            "latent": False,
            "evidence": SIGNALS,
        }
    ]


def test_a_merge_has_all_its_parents_ancestors(index: Index) -> None:
    tree = index.tree("org/m")

    assert (tree.root, tree.depth) == (LATENT, 2)
    assert pairs(tree.ancestors) == [
        ("org/a", "org/base"), ("org/c", LATENT), ("org/m", "org/a"), ("org/m", "org/c"),
    ]  # fmt: skip
    assert pairs(tree.siblings) == [("org/b", "org/a")]


def test_a_latent_ancestor_has_children(index: Index) -> None:
    tree = index.tree(LATENT)

    assert (tree.root, tree.depth) == (LATENT, 0)
    assert pairs(tree.descendants) == [("org/c", LATENT), ("org/d", LATENT), ("org/m", "org/c")]
    assert pairs(index.tree("org/d").siblings) == [("org/c", LATENT)]


def test_a_model_without_relatives(index: Index) -> None:
    tree = index.tree("org/alone")

    assert (tree.root, tree.depth, len(tree.edges)) == ("org/alone", 0, 0)
    assert tree.notes == ["no relative of org/alone is known: none is probable enough"]


@pytest.mark.parametrize("repo", ["org/nobody", "org/\x00", "\ud800"])
def test_a_model_that_the_index_does_not_hold(index: Index, repo: str) -> None:
    with pytest.raises(QueryError, match="the index does not hold"):
        index.tree(repo)


def test_what_is_left_out_is_said(index: Index) -> None:
    tree = index.tree("org/a", limit=1)

    assert (len(tree.descendants), len(tree.siblings)) == (1, 1)
    assert tree.notes == ["only 1 of its descendants are shown"]
    assert index.tree(LATENT, limit=2).notes == ["only 2 of its descendants are shown"]
    with pytest.raises(QueryError, match="limit must be at least 1, not 0"):
        index.tree("org/a", limit=0)


def test_an_index_without_trees_says_what_to_do(tmp_path: Any) -> None:
    without = open_index(build(Store(tmp_path), models=MODELS[:2], images=False).store.uri)

    for ask in (lambda: without.tree("org/a"), without.edges):
        with pytest.raises(QueryError, match=r"has no model trees.*probelog-index"):
            ask()
    assert without.search("cat")[0].root is None
    assert {hit.relatives for hit in without.search("cat", by="family")} == {0}


def test_an_index_of_an_older_version() -> None:
    older = open_index(KEPT / "0.1.0" / "store" / "index")
    (hit, *_) = older.search(like="bob/one-logit#0")

    assert (hit.root, hit.parent, hit.depth) == (None, None, None)
    with pytest.raises(QueryError, match="has no model trees"):
        older.tree("ada/resnet")
    with pytest.raises(
        QueryError, match=r"not understood.*\n.*created_at, base_model, parents, licences\. For"
    ):
        older.search(like="bob/one-logit#0", where="root = 'ada/resnet'")
    assert {item.relatives for item in older.models_like("ada/resnet", by="family")} == {0}


# Edges by condition


def test_edges_that_meet_a_condition(index: Index) -> None:
    assert list(index.edges()) == FOREST
    assert pairs(index.edges("relation = 'merge' AND weight > 0.5")) == [("org/m", "org/c")]
    assert pairs(index.edges("declared = true OR latent")) == [
        ("org/a", "org/base"), ("org/c", LATENT), ("org/d", LATENT),
    ]  # fmt: skip
    assert len(index.edges("parent = 'nobody'")) == 0
    some = index.edges(limit=2)
    assert len(some) == 2
    assert some.notes == ["there are more edges than the limit of 2: raise limit, or narrow where"]
    assert some.to_arrow().schema == EDGES
    assert repr(some).startswith("Edges([Edge(child='org/a', parent='org/base'")
    assert index.edges(limit=7).notes == []


@pytest.mark.parametrize("where", ["colour = 'red'", "relation = ", "child = 'a' OR"])
def test_a_condition_that_is_not_understood(index: Index, where: str) -> None:
    with pytest.raises(QueryError) as refused:
        index.edges(where)

    assert "is not understood" in str(refused.value)
    assert "child, parent, relation, probability, weight, declared, latent, evidence" in str(refused.value)


def test_an_empty_condition_and_limit(index: Index) -> None:
    with pytest.raises(QueryError, match="the filter is empty"):
        index.edges("  ")
    with pytest.raises(QueryError, match="limit must be at least 1"):
        index.edges(limit=0)


# Hits


def test_hits_and_filters_know_the_tree(index: Index) -> None:
    hit = next(hit for hit in index.search("cat", k=100) if hit.repo == "org/b")

    assert (hit.root, hit.parent, hit.depth) == ("org/base", "org/a", 2)
    of_base = index.search("cat", k=100, where="root = 'org/base' AND depth >= 1")
    assert {hit.repo for hit in of_base} == {"org/a", "org/b", "org/o"}
    assert {hit.repo for hit in index.search("cat", k=100, where=f"parent = '{LATENT}'")} == {
        "org/c",
        "org/d",
    }
    assert index.show("org/b").parent == "org/a"


def test_answers_folded_by_family(index: Index) -> None:
    plain, folded = index.search("cat", k=100), index.search("cat", k=100, by="family")

    best: dict[str | None, str] = {}
    for hit in plain:
        best.setdefault(hit.root, hit.repo)
    assert [(hit.root, hit.repo) for hit in folded] == list(best.items())
    assert {hit.root: hit.relatives for hit in folded} == {"org/base": 3, LATENT: 2, "org/alone": 0}
    assert [hit.rank for hit in folded] == [1, 2, 3]
    assert {hit.relatives for hit in plain} == {None}
    assert [hit.repo for hit in index.search("cat", k=2, by="family")] == [hit.repo for hit in folded[:2]]


def test_folding_counts_what_passes_the_filter(index: Index) -> None:
    folded = index.search("cat", by="family", where="licence = 'other'")

    assert {hit.root: hit.relatives for hit in folded} == {LATENT: 2, "org/base": 0}


def test_models_like_and_logits_like_folded_by_family(index: Index) -> None:
    models = index.models_like("org/alone", by="family")
    logits = index.search(like="org/alone#0", by="family", k=100)

    assert {hit.root: hit.relatives for hit in models} == {"org/base": 3, LATENT: 2}
    assert [hit.rank for hit in models] == [1, 2]
    assert {hit.root for hit in logits} == {"org/base", LATENT, "org/alone"}
    with pytest.raises(QueryError, match="by family, not by 'colour'"):
        index.search("cat", by="colour")
    with pytest.raises(QueryError, match="by family"):
        index.models_like("org/a", by="")


# Updates


def test_an_update_replaces_its_children_s_edges_and_removed_ones_vanish(tmp_path: Any) -> None:
    store = Store(tmp_path / "index")
    made = build(store, models=MODELS, images=False, edges=edge_table(FOREST))
    base = Generation(store, made.pointer)
    # b is at another commit; o is removed; base is removed, so that its child a has a latent parent; new comes from c.
    # c is removed and comes back with the same commit, as a model whose number changes does: its edges stay.
    added = [
        Model("org/new", ("cat",)),
        Model("org/b", ("cat",), weights="other"),
        MODELS[REPOS.index("org/c")],
    ]
    edges = edge_table(
        [edge("org/a", "org/base", latent=True), edge("org/new", "org/c", Relation.COPY)]
    )  # fmt: skip
    facts = model_facts(added, edges)
    facts = facts.set_column(
        facts.column_names.index("sha"), "sha", pa.array(["1" * 40, "2" * 40, added[2].sha])
    )
    removed = [REPOS.index(repo) for repo in ("org/b", "org/o", "org/base", "org/c")]
    random = np.random.default_rng(0).normal(size=(4, made.encoder.dimension))
    batch = LogitBatch(
        np.array([0, 1, 2, 2]), np.array([0, 0, 0, 1]), np.zeros(4, bool),
        random / np.linalg.norm(random, axis=1, keepdims=True), np.tile(np.arange(12), (4, 1)),
    )  # fmt: skip
    writer = GenerationWriter(store, "update")
    changes = Changes(facts, ["new", "other", "c"], np.array(removed, np.int64))
    written = write_update(writer, base, changes, [batch])
    writer.write("edges", EDGES, [edges])
    settings = replace(base.settings, **written.settings, logits=written.logits, trees="e" * 16, edges=2)
    writer.write_meta({"settings": settings.to_bytes(), **written.meta})
    writer.finish()
    go_live(store, "update", "source of the update", base="first")
    index = open_index(store.uri)

    assert pairs(index.edges()) == [
        ("org/a", "org/base"), ("org/c", LATENT), ("org/d", LATENT),
        ("org/m", "org/a"), ("org/m", "org/c"), ("org/new", "org/c"),
    ]  # fmt: skip
    assert index.edges("child = 'org/a'")[0].latent
    assert pairs(index.edges("parent = 'org/c'")) == [("org/m", "org/c"), ("org/new", "org/c")]
    assert pairs(index.tree("org/c").descendants) == [("org/m", "org/c"), ("org/new", "org/c")]
    assert pairs(index.tree("org/c").ancestors) == [("org/c", LATENT)]
    assert {hit.repo for hit in index.search("cat", k=100)} == {
        "org/a",
        "org/alone",
        "org/b",
        "org/c",
        "org/d",
        "org/m",
        "org/new",
    }
    assert len(index.licence_conflicts(["contradicted", "undeclared"])) == 4
    assert index.tree("org/b").root == "org/b", "at its new commit it has no known relative"
    assert pairs(index.tree("org/base").descendants) == [
        ("org/a", "org/base"), ("org/m", "org/a"),
    ]  # fmt: skip
    with pytest.raises(QueryError, match="does not hold 'org/o'"):
        index.tree("org/o")


# What anybody may have published


@pytest.mark.parametrize(
    ("edges", "name"),
    [
        ([edge("a", "b"), edge("b", "a")], "a"),
        ([edge("a", "b"), edge("b", "c"), edge("c", "d"), edge("d", "b")], "a"),
        ([edge("b", "a"), edge("c", "b"), edge("d", "c"), edge("b", "d", weight=0.5)], "a"),
        ([edge("a", "p"), edge("b", "p"), edge("p", "b", weight=0.1)], "a"),
    ],
)
def test_a_model_that_is_its_own_ancestor(edges: list[Edge], name: str, tmp_path: Any) -> None:
    index = hostile(tmp_path, edge_table(edges))

    with pytest.raises(StoreError, match=r"is damaged \(edges\): \w is its own ancestor"):
        index.tree(name)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"probability": float("nan")}, "a probability is nan"),
        ({"relation": "cousin"}, "a relation is 'cousin'"),
        ({"parent": "x\x1b[2J"}, "which no model is called"),
        ({"parent": None}, "a row has no parent"),
        ({"parent": "a"}, "a is its own parent"),
    ],
)
def test_rows_that_are_no_edges(changes: dict[str, Any], reason: str, tmp_path: Any) -> None:
    row = edge_table([edge("a", "b")]).to_pylist()[0] | changes
    index = hostile(tmp_path, pa.Table.from_pylist([row], EDGES))

    for ask in (lambda: index.tree("a"), index.edges):
        with pytest.raises(StoreError) as refused:
            ask()
        assert reason in str(refused.value)
        assert "\x1b" not in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_chain_without_end_and_a_family_without_end_are_bounded(tmp_path: Any) -> None:
    count = 3_000
    chain = [f"m{number:05}" for number in range(150)]
    children = [*chain[:-1], *(f"child{number:05}" for number in range(count))]
    parents = [*chain[1:], *["a"] * count]
    template = edge_table([edge("x", "y")]).to_pylist()[0]
    rows = [{**template, "child": c, "parent": p} for c, p in zip(children, parents, strict=True)]
    index = hostile(tmp_path, pa.Table.from_pylist(rows, EDGES))

    deep = index.tree(chain[0])
    wide = index.tree("a")
    assert (len(deep.ancestors), deep.root, deep.depth) == (100, None, None)
    assert deep.notes == [
        "its eldest ancestors are not shown: there are too many",
        "not models of this index, known as parents alone: m00001, m00002, m00003, m00004, m00005",
    ]
    assert index.tree(chain[-1]).notes == ["only 100 of its descendants are shown"]
    assert len(wide.descendants) == 1000
    assert wide.notes == ["only 1,000 of its descendants are shown"]
    assert len(index.tree("child00007").siblings) == 1000


def test_settings_that_speak_of_edges_that_are_not_there(tmp_path: Any) -> None:
    few = build(Store(tmp_path / "few"), models=MODELS[:2], images=False, edges=edge_table(FOREST), settings={"edges": 8})  # fmt: skip
    none = build(Store(tmp_path / "none"), models=MODELS[:2], images=False, settings={"edges": 8, "trees": "x"})  # fmt: skip

    with pytest.raises(StoreError, match="7 rows, and the settings say otherwise"):
        open_index(few.store.uri).edges()
    with pytest.raises(StoreError, match=r"cannot be read \(edges\)"):
        open_index(none.store.uri).edges()

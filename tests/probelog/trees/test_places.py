"""Places in trees, and what makes trees of edges."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from probelog.storage.schemas import TreeFacts
from probelog.trees.edges import Edge, Relation, edge_table
from probelog.trees.places import find_cycle, main_parents, places, without_cycles

LATENT = "latent:0123456789ab"


def edge(child: str, parent: str, probability: float = 0.5, weight: float = 1.0) -> Edge:
    return Edge(child, parent, Relation.MERGE, probability, weight, latent=parent.startswith("latent:"))


def pairs(edges: list[Edge]) -> list[tuple[str, str]]:
    return [(one.child, one.parent) for one in edges]


def test_the_parent_of_several() -> None:
    edges = [
        *(edge("heavy", parent, weight=weight) for parent, weight in (("a", 0.3), ("b", 0.7))),
        *(edge("likely", parent, probability) for parent, probability in (("a", 0.6), ("b", 0.5))),
        *(edge("known", parent, probability) for parent, probability in ((LATENT, 0.9), ("b", 0.1))),
        edge("latent", LATENT),
    ]
    assert main_parents(edge_table(edges)) == {"heavy": "b", "likely": "a", "known": "b", "latent": LATENT}


def test_roots_and_depths() -> None:
    parents = {"c": "b", "b": "a", "d": LATENT, "e": "known"}
    above = {"known": TreeFacts(root="far", parent="farther", depth=3), "odd": TreeFacts()}
    assert places(["a", "b", "c", "d", "e", "f", "odd"], parents, above) == {
        "a": TreeFacts(root="a", depth=0),
        "b": TreeFacts(root="a", parent="a", depth=1),
        "c": TreeFacts(root="a", parent="b", depth=2),
        "d": TreeFacts(root=LATENT, parent=LATENT, depth=1),
        "e": TreeFacts(root="far", parent="known", depth=4),
        "f": TreeFacts(root="f", depth=0),
        "odd": TreeFacts(root="odd", depth=0),
    }


def test_a_circle_loses_its_least_probable_edge() -> None:
    edges = [edge("b", "a", 0.9), edge("c", "b", 0.8), edge("a", "c", 0.6), edge("a", "d", 0.1)]
    assert pairs(without_cycles(edges)) == [("a", "d"), ("b", "a"), ("c", "b")]
    assert pairs(without_cycles([edge("a", "a"), edge("b", "a"), edge("b", "a", 0.9)])) == [("b", "a")]


def test_edges_that_are_there_already_stay() -> None:
    assert pairs(without_cycles([edge("a", "b", 1.0), edge("d", "b")], {"b": ["a"]})) == [("d", "b")]


NAMES = st.sampled_from("abcdefg")


@given(st.lists(st.tuples(NAMES, NAMES, st.floats(0, 1))))
def test_what_is_left_has_no_circle(given_edges: list[tuple[str, str, float]]) -> None:
    kept = without_cycles([edge(*one) for one in given_edges])
    parents: dict[str, list[str]] = {}
    for one in kept:
        parents.setdefault(one.child, []).append(one.parent)
    assert find_cycle(parents) is None
    placed = places(sorted({*"abcdefg"}), main_parents(edge_table(kept)))
    assert all((place.depth == 0) == (place.parent is None) for place in placed.values())
    for child, parent, _ in given_edges:  # what is not kept would close a circle
        if child != parent and parent not in parents.get(child, []):
            assert find_cycle({**parents, child: [*parents.get(child, []), parent]}) is not None


def test_a_circle_is_found() -> None:
    assert find_cycle({"a": ["b", "c"], "b": ["c"], "c": []}) is None
    assert find_cycle({"a": ["b"], "b": ["c", "d"], "d": ["b"]}) == "b"
    assert find_cycle({str(n): [str(n + 1)] for n in range(50_000)}) is None, "however deep"

"""Edges as a table, and what is refused of a table that anybody may have written."""

from __future__ import annotations

import math

import pytest

from probelog.trees.edges import Edge, Relation, edge_of, edge_table, edges_of, is_latent_name

PLAIN = Edge("a/child", "a/parent", Relation.LOW_RANK, 0.5, 1.0, True, {"distance": 0.25, "time": -2.0})
MERGED = Edge("a/merge", "latent:0123456789ab", Relation.MERGE, 0.75, 0.5, None, {}, latent=True)


def row(**changes):
    return edge_table([PLAIN]).to_pylist()[0] | changes


def test_a_table_holds_edges_by_child_and_parent():
    assert edges_of(edge_table([MERGED, PLAIN])) == [PLAIN, MERGED]


def test_signals_that_are_not_finite_are_not_stored():
    edge = Edge("a", "b", Relation.COPY, 1.0, evidence={"x": math.inf, "y": math.nan, "z": 1.0})

    assert edge_of(edge_table([edge]).to_pylist()[0]).evidence == {"z": 1.0}


def test_an_edge_as_plain_values():
    assert PLAIN.to_dict() == {
        "child": "a/child",
        "parent": "a/parent",
        "relation": "low-rank",
        "probability": 0.5,
        "weight": 1.0,
        "declared": True,
        "latent": False,
        "evidence": {"distance": 0.25, "time": -2.0},
    }


def test_names_of_latent_ancestors():
    assert is_latent_name("latent:0123456789ab")
    assert not any(map(is_latent_name, ["latent:0123456789AB", "latent:0123", "a/b", "latent:0123456789abc"]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"child": None}, "a child is None, which no model is called"),
        ({"child": ""}, "a child is '', which no model is called"),
        ({"parent": "x" * 257}, "which no model is called"),
        ({"parent": "a/\x1b[2Jb"}, r"a parent is 'a/\\x1b\[2Jb', which no model is called"),
        ({"parent": "latent:nobody"}, "which no latent ancestor is called"),
        ({"parent": "a/child"}, "a/child is its own parent"),
        ({"parent": "latent:0123456789ab"}, "is not marked as latent"),
        ({"latent": None}, "is not marked as latent"),
        ({"relation": "cousin"}, "a relation is 'cousin'"),
        ({"relation": None}, "a relation is None"),
        ({"probability": math.nan}, "a probability is nan and not between 0 and 1"),
        ({"probability": 1.5}, "a probability is 1.5 and not between 0 and 1"),
        ({"probability": None}, "a probability is None"),
        ({"weight": -1.0}, "a weight is -1.0"),
        ({"evidence": None}, "evidence is None and not a list"),
        ({"evidence": [{"signal": "x", "value": 1.0}] * 65}, "evidence is a list of 65 and not a list of"),
        ({"evidence": [{"signal": "\x1b", "value": 1.0}]}, r"a signal is called '\\x1b'"),
        ({"evidence": [{"signal": "x", "value": math.inf}]}, "the signal x is inf"),
    ],
)
def test_what_is_no_edge_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        edge_of(row(**changes))

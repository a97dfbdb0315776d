"""What recovered edges are worth, on cases small enough to be counted by hand."""

from __future__ import annotations

import json

import pytest

from probelog.errors import UsageError
from probelog.evaluation.trees import (
    Bin,
    ModelTruth,
    Scores,
    Share,
    among,
    calibration_error,
    figures,
    independent_pairs,
    judged,
    reliability,
    truth_of,
)
from probelog.trees.edges import Edge, Relation

LATENT = "latent:0123456789ab"
# r <- a <- b, a copy c of b; m is merged from a and b; u is a child of what was not uploaded; s is another tree.
TRUTH = {
    "r": ModelTruth({}, frozenset(), "root", "one"),
    "a": ModelTruth({"r": 1.0}, frozenset({"r"}), "fine-tune", "one"),
    "b": ModelTruth({"a": 1.0}, frozenset({"a", "r"}), "pruned", "one"),
    "c": ModelTruth({"b": 1.0}, frozenset({"a", "b", "r"}), "copy", "one"),
    "m": ModelTruth({"a": 0.6, "b": 0.4}, frozenset({"a", "b", "r"}), "merge", "one"),
    "u": ModelTruth({}, frozenset({"gone", "r"}), "fine-tune", "one", unseen=True),
    "s": ModelTruth({}, frozenset(), "root", "two"),
}
EDGES = [
    Edge("a", "r", Relation.FINE_TUNED, 0.9),
    Edge("b", "c", Relation.COPY, 0.95),  # the right pair the other way round
    Edge("c", "a", Relation.FINE_TUNED, 0.6),
    Edge("m", "a", Relation.MERGE, 0.9, 0.55),
    Edge("m", "b", Relation.MERGE, 0.9, 0.45),
    Edge("u", LATENT, Relation.FINE_TUNED, 0.7, latent=True),
    Edge("s", "r", Relation.FINE_TUNED, 0.55),  # of another tree
    Edge("somebody/else", "r", Relation.FINE_TUNED, 0.9),
]


def test_figures_are_counted():
    result = figures(TRUTH, EDGES, independent=6)

    assert result.top1 == Share(2, 4)
    assert result.twins == Share(4, 4)
    assert result.directed == Scores(true=5, given=6, both=3)
    assert result.undirected == Scores(true=5, given=6, both=4)
    assert result.parentless == Share(2, 3)
    assert result.relations == {"fine-tune": Share(1, 1), "merge": Share(1, 1)}
    assert result.relation == Share(2, 2)
    assert result.merge_error == pytest.approx(0.05)
    assert (result.false, result.independent) == (1, 6)
    assert result.cells()["directed"] == "0.50 0.60 0.55"
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["directed"]["precision"] == 0.5
    assert plain["relations"]["merge"] == {"right": 1, "of": 1}


def test_without_edges_nothing_is_right_and_nothing_divided_by_zero():
    result = figures(TRUTH, [], independent=0)

    assert result.top1 == Share(0, 4)
    assert result.parentless == Share(3, 3)
    assert (result.directed.precision, result.directed.recall, result.directed.f1) == (0, 0, 0)
    assert result.merge_error is None
    assert calibration_error(reliability([])) == 0


def test_a_latent_parent_is_right_where_a_parent_was_not_uploaded():
    latent = [Edge(child, LATENT, Relation.FINE_TUNED, 0.8, latent=True) for child in ("u", "a", "s")]

    assert judged(TRUTH, latent) == [(0.8, True), (0.8, False), (0.8, False)]
    assert figures(TRUTH, latent, 0).parentless == Share(2, 3)
    assert figures(TRUTH, latent, 0).directed.given == 0


def test_models_that_are_not_there_are_unseen_parents():
    some = among(TRUTH, ["b", "m", "somebody/else"])

    assert some.keys() == {"b", "m"}
    assert (some["b"].parents, some["b"].unseen) == ({}, True)
    assert (some["m"].parents, some["m"].unseen) == ({"b": 0.4}, True)
    assert some["m"].ancestors == {"a", "b", "r"}


def test_an_edge_to_a_model_that_the_truth_does_not_know_is_wrong():
    result = figures(TRUTH, [Edge("a", "somebody/else", Relation.FINE_TUNED, 0.9)], None)

    assert (result.directed.given, result.directed.both, result.false) == (1, 0, 1)
    assert result.cells()["false"] == "1/?"


def test_independent_pairs_are_of_other_trees_and_one_architecture():
    assert independent_pairs(TRUTH, [["r", "a", "s", "unknown"], ["b", "c"]]) == 2


def test_reliability_and_its_error():
    table = reliability([(0.95, True), (0.95, True), (1.0, False), (0.55, False), (0.55, True)])

    assert table == [
        Bin(0.5, 0.6, 2, pytest.approx(0.55), 0.5),
        Bin(0.9, 1.0, 3, pytest.approx(2.9 / 3), pytest.approx(2 / 3)),
    ]
    assert calibration_error(table) == pytest.approx((0.05 * 2 + 0.3 * 3) / 5)


def test_a_truth_file():
    content = {
        "models": {
            "a": {"parents": [], "relation": "root", "tree": "t"},
            "b": {"parents": [{"repo": None, "withheld": "w", "weight": 1.0}], "relation": "copy", "tree": "t"},
            "c": {"parents": [{"repo": "b", "weight": 1.0}], "relation": "copy", "tree": "t"},
        },
        "withheld": {"w": {"parents": [{"repo": "a", "weight": 1}], "relation": "pruned", "tree": "t"}},
    }  # fmt: skip

    truth = truth_of(content, "truth.json")

    assert truth["c"] == ModelTruth({"b": 1.0}, frozenset({"a", "b", "w"}), "copy", "t")
    assert (truth["b"].parents, truth["b"].unseen, truth["b"].ancestors) == ({}, True, frozenset({"a", "w"}))


def test_a_truth_file_with_one_parent_of_each_model():
    content = {
        "models": {
            "root": {"parent": None, "kind": "foundation"},
            "one": {"parent": "root", "kind": "inet"},
            "twin": {"parent": "one", "kind": "copy"},
            "other": {"parent": "gone", "kind": "inet"},
            "child": {"parent": "somebody/gone", "kind": "child"},
        }
    }

    truth = truth_of(content, "truth.json")

    assert truth["root"] == ModelTruth({}, frozenset(), "root", "root")
    assert truth["twin"] == ModelTruth({"one": 1.0}, frozenset({"one", "root"}), "copy", "root")
    assert truth["other"] == ModelTruth({}, frozenset({"gone"}), "fine-tune", "gone", unseen=True)
    # Whether the root is an ancestor of a child's parent that is not there, nobody knows.
    assert truth["child"] == ModelTruth({}, frozenset({"somebody/gone"}), "fine-tune", None, unseen=True)
    assert figures(truth, [Edge("child", "root", Relation.FINE_TUNED, 0.9)], None).false == 0
    assert figures(truth, [Edge("other", "root", Relation.FINE_TUNED, 0.9)], None).false == 1
    assert independent_pairs(truth, [["root", "other", "child"]]) == 1


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"models": []},
        {"models": {"a": {}}},
        {"models": {"a": {"parents": [1]}}},
        None,
        {"models": {"a": {"parent": None}}},
        {"models": {"a": {"parent": None, "kind": "inet"}, "b": 1}},
    ],
)
def test_another_file_is_refused(content):
    with pytest.raises(UsageError, match=r"some\.json is no truth file of model trees"):
        truth_of(content, "some.json")


def test_a_truth_whose_models_descend_from_each_other_ends():
    one = {"relation": "copy", "tree": "t"}
    content = {
        "models": {
            "a": {**one, "parents": [{"repo": "b", "weight": 1}]},
            "b": {**one, "parents": [{"repo": "a", "weight": 1}]},
        }
    }

    assert truth_of(content, "")["a"].ancestors == {"a", "b"}
    content = {"models": {"a": {"parent": "b", "kind": "inet"}, "b": {"parent": "a", "kind": "inet"}}}
    assert truth_of(content, "")["a"].tree is None

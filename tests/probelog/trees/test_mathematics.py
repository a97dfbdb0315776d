"""The parts of the recovery against answers known by hand, and by trying all."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probelog.trees.evidence.calibration import fit
from probelog.trees.evidence.direction import log_odds, time_log_odds
from probelog.trees.evidence.latent import step_shares, unseen_shares
from probelog.trees.evidence.merges import find_merge
from probelog.trees.families.distance import layer_ratios, squared_distances
from probelog.trees.recovery.arborescence import arborescence


def cost_of(parents, edges, roots):
    return sum(roots[c] if p is None else edges[p, c] for c, p in parents.items())


def cheapest(nodes, edges, roots):
    pairs = np.array(sorted(edges), np.int64).reshape(-1, 2)
    costs = np.array([edges[pair] for pair in sorted(edges)], np.float64)
    parents = arborescence(nodes, pairs[:, 0], pairs[:, 1], costs, np.array([roots[n] for n in range(nodes)]))
    return {child: None if parent < 0 else parent for child, parent in enumerate(parents.tolist())}


def is_forest(parents):
    for node in parents:
        seen = set()
        at = node
        while at is not None:
            if at in seen:
                return False
            seen.add(at)
            at = parents[at]
    return True


def cheapest_by_trying_all(nodes, edges, roots):
    options = [[None, *(p for p in range(nodes) if (p, c) in edges)] for c in range(nodes)]
    choices = (dict(enumerate(choice)) for choice in itertools.product(*options))
    return min(cost_of(parents, edges, roots) for parents in choices if is_forest(parents))


@settings(deadline=None)
@given(st.integers(1, 5).flatmap(lambda n: st.tuples(st.just(n), st.randoms(use_true_random=False))))
def test_the_arborescence_is_the_cheapest_of_all(drawn):
    nodes, random = drawn
    pairs = [(p, c) for p in range(nodes) for c in range(nodes) if p != c and random.random() < 0.8]
    edges = {pair: float(random.randint(-5, 20)) for pair in pairs}
    roots = {node: float(random.randint(0, 20)) for node in range(nodes)}

    parents = cheapest(nodes, edges, roots)

    assert is_forest(parents)
    assert cost_of(parents, edges, roots) == cheapest_by_trying_all(nodes, edges, roots)


def test_a_long_chain_of_pairs_that_prefer_each_other_is_resolved():
    nodes = 300
    edges = {
        (a, b): 1.0 + abs(a - b)
        for a in range(nodes)
        for b in range(max(a - 3, 0), min(a + 4, nodes))
        if a != b
    }

    parents = cheapest(nodes, edges, dict.fromkeys(range(nodes), 1000.0))

    assert is_forest(parents)
    assert list(parents.values()).count(None) == 1


def test_distances_are_0_of_equal_layers_1_of_orthogonal_ones_and_2_of_opposite_ones():
    a, b = np.zeros((2, 32)), np.zeros((2, 32))
    a[:, 0], b[0, 0], b[1, 1] = 1, 1, 1

    assert squared_distances(np.stack([a, b, -a]))[0].tolist() == pytest.approx([0, 0.5, 2])


def test_a_layer_that_is_zero_in_one_model_counts_for_nothing():
    a, b = np.ones((2, 32)), np.ones((2, 32))
    a[0] = 0
    b[1] = -1

    ratios, differences = layer_ratios(a[None], b[None])
    assert np.isnan(ratios[0, 0])
    assert (ratios[0, 1], differences[0].tolist()) == (2, [0, 128])
    assert squared_distances(np.stack([a, b]))[0, 1] == pytest.approx(2)
    assert squared_distances(np.zeros((2, 3, 32)))[0, 1] == 1


@settings(deadline=None)
@given(st.floats(0.01, 100), st.integers(0, 10))
def test_distances_do_not_depend_on_a_common_scale(scale, seed):
    sketches = np.random.default_rng(seed).standard_normal((4, 3, 32))

    assert squared_distances(scale * sketches) == pytest.approx(squared_distances(sketches))


@settings(deadline=None)
@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=4), st.integers(0, 1000))
def test_the_weights_of_a_merge_come_out_as_they_went_in(weights, seed):
    shares = np.array(weights) / sum(weights)
    if shares.min() < 0.05:
        return
    candidates = np.random.default_rng(seed).standard_normal((5, 320))

    merge = find_merge(shares @ candidates[: len(shares)], candidates)

    assert merge is not None
    assert sorted(merge.parents) == list(range(len(shares)))
    got = dict(zip(merge.parents, merge.weights, strict=True))
    assert [got[parent] for parent in range(len(shares))] == pytest.approx(shares, abs=1e-6)
    assert sum(merge.weights) == pytest.approx(1)


@settings(deadline=None)
@given(st.floats(0.2, 0.8), st.integers(0, 1000))
def test_a_merge_along_an_arc_has_no_third_parent(share, seed):
    random = np.random.default_rng(seed)
    base = random.standard_normal(640)
    one, other = base + 0.4 * random.standard_normal((2, 640))
    others = base + 0.4 * random.standard_normal((4, 640))
    angle = math.acos(one @ other / math.sqrt((one @ one) * (other @ other)))
    merged = (math.sin((1 - share) * angle) * one + math.sin(share * angle) * other) / math.sin(angle)

    merge = find_merge(merged, np.stack([one, other, *others]))

    assert merge is not None
    assert sorted(merge.parents) == [0, 1]
    assert dict(zip(merge.parents, merge.weights, strict=True))[1] == pytest.approx(share, abs=0.03)


def test_what_is_no_merge_is_none():
    random = np.random.default_rng(0)
    base = random.standard_normal(320)
    siblings = base + 0.1 * random.standard_normal((6, 320))

    assert find_merge(base + 0.1 * random.standard_normal(320), siblings) is None
    assert find_merge(base, siblings[:1]) is None
    assert find_merge(siblings[0], siblings) is None
    # A parent is the merge minus the other parent, with a weight below zero.
    assert find_merge(siblings[0], np.stack([(siblings[0] + siblings[1]) / 2, siblings[1]])) is None


def test_a_child_of_the_parent_shows_the_whole_step_and_one_of_the_grandparent_nothing():
    random = np.random.default_rng(1)
    grandparent, step, training = random.standard_normal((3, 640))
    parent = grandparent + step

    shares, errors = step_shares(
        np.stack([grandparent, grandparent, parent]),
        np.stack([parent] * 3),
        np.stack([parent + training, grandparent + training, grandparent]),
    )

    assert abs(shares[0] - 1) < 4 * errors[0]
    assert abs(shares[1]) < 4 * errors[1]
    assert errors[2] == np.inf


def test_the_unseen_share_is_0_at_a_parent_and_1_at_its_other_child():
    random = np.random.default_rng(2)
    parent = random.standard_normal(3200)
    near, child, *others = parent + random.standard_normal((5, 3200)) * np.array([[0.3], [1], [1], [1], [1]])
    others = np.array(others)
    none = np.zeros((1, 4), bool)

    at_parent, _ = unseen_shares(parent, child[None], np.array([near, *others]), none)
    at_sibling, _ = unseen_shares(child, near[None], others, none[:, 1:])

    assert abs(at_parent[0]) < 0.1
    assert at_sibling[0] == pytest.approx(1 / 1.09, abs=0.1)


def test_what_comes_from_a_child_says_nothing_of_its_parent_and_a_parent_itself_has_no_share():
    random = np.random.default_rng(4)
    parent, child, other = random.standard_normal((3, 320))
    grandchild = child + 0.1 * random.standard_normal(320)
    others = np.stack([other, grandchild])

    whole, _ = unseen_shares(parent, np.stack([child, parent]), others, np.array([[False, True]] * 2))
    alone, _ = unseen_shares(parent, child[None], other[None], np.zeros((1, 1), bool))
    nobody, _ = unseen_shares(parent, child[None], others, np.ones((1, 2), bool))

    assert whole[0] == pytest.approx(alone[0])
    assert np.isnan([whole[1], nobody[0]]).all()


@settings(deadline=None)
@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(-1, 1))
def test_direction_changes_its_sign_with_the_signals(classes, growth, norms):
    values = {"classes": classes, "growth": growth, "norms": norms, "biases": 0.0}

    assert log_odds(values) == pytest.approx(-log_odds({name: -value for name, value in values.items()}))


def test_times_count_where_both_are_known_and_differ():
    nan = np.nan

    odds = time_log_odds(np.array([1.0, 2.0, nan, 1.0, 1.0]), np.array([2.0, 1.0, 2.0, nan, 1.0]))

    assert odds[0] == -odds[1] > 0
    assert odds[2:].tolist() == [0, 0, 0]


def test_the_fit_finds_the_coefficients_that_made_the_data():
    random = np.random.default_rng(3)
    rows = [{"constant": 1.0, "x": float(x)} for x in random.uniform(0, 1, 20000)]
    right = [random.random() < 1 / (1 + np.exp(1 - 3 * row["x"])) for row in rows]

    assert fit(rows, right) == pytest.approx({"constant": -1, "x": 3}, abs=0.15)

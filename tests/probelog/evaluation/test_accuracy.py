"""Evaluation measures on rankings whose answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probelog.evaluation.accuracy import (
    DEVELOPMENT,
    TEST,
    accuracy,
    bootstrap,
    chance,
    half_of,
    hub_curve,
    hubness,
    hubness_of,
    per_query,
    precision_recall_area,
    roc_area,
)


def test_known_ranking() -> None:
    scores = np.array([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 0.0, 0.0]])
    relevant = np.array([[1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    found = accuracy(scores, relevant)
    assert found.queries == 2
    assert found.top1 == 0.5
    assert found.top5 == 1.0
    assert found.average_precision == pytest.approx(((1 + 2 / 3) / 2 + 1 / 4) / 2)
    assert found.median_rank == 2.5
    assert found.chance == pytest.approx(3 / 8)


def test_perfect_and_worst() -> None:
    relevant = np.eye(20, dtype=bool)
    assert accuracy(relevant * 1.0, relevant).average_precision == 1.0
    worst = accuracy(-1.0 * relevant, relevant)
    assert worst.top5 == 0.0
    assert worst.median_rank == 20


def test_nothing_relevant_is_an_error() -> None:
    with pytest.raises(ValueError, match="no query"):
        accuracy(np.zeros((2, 3)), np.zeros((2, 3), bool))


def test_hubness_counts_hubs() -> None:
    even = hubness(np.eye(10) * 10 + np.random.default_rng(0).random((10, 10)), neighbours=1)
    assert even.half == 5
    assert even.skew == 0.0
    one = np.zeros((10, 50))
    one[:, 7] = 1
    assert hubness(one, neighbours=1).half == 1
    assert hubness(one, neighbours=1).skew > 5


# The halves


def test_halves_depend_on_the_normalised_name_alone() -> None:
    assert half_of("German_Shepherd") == half_of("german shepherd") == half_of("german-shepherd")
    names = [f"concept {i}" for i in range(400)]
    share = np.mean([half_of(name) == DEVELOPMENT for name in names])
    assert 0.4 < share < 0.6
    assert {half_of(name) for name in names} == {DEVELOPMENT, TEST}


# Against slow references

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 30), st.integers(0, 2**32 - 1))


@given(SHAPES)
def test_average_precision_is_its_definition(shape: tuple[int, int, int]) -> None:
    queries, logits, seed = shape
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 8, (queries, logits)).astype(float)  # with ties
    relevant = rng.random((queries, logits)) < 0.3
    relevant[np.arange(queries), rng.integers(0, logits, queries)] = True
    found = per_query(scores, relevant, keep=3)
    for query in range(queries):
        order = sorted(range(logits), key=lambda logit: (-scores[query, logit], logit))
        seen, precisions = 0, []
        for place, logit in enumerate(order, start=1):
            if relevant[query, logit]:
                seen += 1
                precisions.append(seen / place)
        assert found.average_precision[query] == pytest.approx(np.mean(precisions))
        first = next(place for place, logit in enumerate(order) if relevant[query, logit])
        assert found.rank[query] == first + 1
        assert found.first_relevant[query] == order[first]
        assert found.first[query].tolist() == order[:3]
        assert found.measures[query].tolist()[:2] == [first < 1, first < 5]


def test_a_query_without_an_answer_has_no_rank() -> None:
    with pytest.raises(ValueError, match="no relevant"):
        per_query(np.zeros((1, 3)), np.zeros((1, 3), bool))


@given(st.integers(1, 6), st.data())
def test_chance_is_the_mean_over_all_orders(logits: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, logits))
    relevant = np.zeros(logits, bool)
    relevant[:count] = True
    orders = np.array(list(itertools.permutations(range(logits))), float)
    expected = per_query(orders, np.tile(relevant, (len(orders), 1))).measures.mean(axis=0)
    np.testing.assert_allclose(chance(np.array([count]), logits)[0], expected, atol=1e-12)


def test_chance_of_a_large_hub_against_simulation() -> None:
    rng = np.random.default_rng(0)
    relevant = np.zeros((4000, 90), bool)
    relevant[:, :7] = True
    simulated = per_query(rng.random(relevant.shape), relevant).measures
    error = simulated.std(axis=0) / np.sqrt(len(simulated))
    difference = simulated.mean(axis=0) - chance(np.array([7]), 90)[0]
    assert (np.abs(difference) < 4 * error).all()


def test_nothing_relevant_has_no_chance() -> None:
    assert chance(np.array([0]), 10).tolist() == [[0.0, 0.0, 0.0]]


@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_precision_recall_area_is_its_definition(count: int, seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, count).astype(float)
    positive = rng.random(count) < 0.4
    positive[rng.integers(count)] = True
    area = last = 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        recall = positive[chosen].sum() / positive.sum()
        area += (recall - last) * positive[chosen].mean()
        last = recall
    assert precision_recall_area(scores, positive) == pytest.approx(area)


def test_precision_recall_area_at_its_ends() -> None:
    positive = np.array([1, 1, 0, 0, 0], bool)
    assert precision_recall_area(np.array([5.0, 4, 3, 2, 1]), positive) == 1.0
    assert precision_recall_area(np.zeros(5), positive) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="no positives"):
        precision_recall_area(np.zeros(5), np.zeros(5, bool))


# Intervals


@given(st.floats(-1, 1), st.integers(1, 50))
def test_the_interval_of_a_constant_difference_is_a_point(value: float, queries: int) -> None:
    (found,) = bootstrap(np.full((queries, 1), value), resamples=50)
    assert found == pytest.approx((value, value, value))


def test_intervals_are_repeatable_and_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, (400, 2))
    found = bootstrap(values, seed=3)
    assert found == bootstrap(values, seed=3)
    assert found != bootstrap(values, seed=4)
    for column, interval in zip(values.T, found, strict=True):
        assert interval.mean == pytest.approx(column.mean())
        theory = 1.96 * column.std() / np.sqrt(len(column))
        assert interval.high - interval.mean == pytest.approx(theory, rel=0.1)
        assert interval.mean - interval.low == pytest.approx(theory, rel=0.1)
    with pytest.raises(ValueError, match="no queries"):
        bootstrap(np.empty((0, 1)))


def test_pairing_sees_a_difference_that_two_intervals_hide() -> None:
    rng = np.random.default_rng(2)
    easy = rng.random((200, 1))
    better = easy + rng.normal(0.03, 0.02, (200, 1))
    (one,), (other,) = bootstrap(easy), bootstrap(better)
    assert one.high > other.low
    assert bootstrap(better - easy)[0].low > 0


# Hubs


def test_the_hub_curve_counts_from_the_most_returned() -> None:
    first = np.array([3, 3, 3, 1, 1, 0])
    np.testing.assert_allclose(hub_curve(first, 5), [3 / 6, 5 / 6, 1, 1, 1])
    assert hubness_of(first[:, None], 5).half == 1
    assert hubness_of(np.array([[0], [1], [2], [3]]), 4).half == 2


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=12), st.lists(st.integers(0, 5), min_size=1, max_size=12)
)
def test_roc_area_counts_pairs(positive: list[int], negative: list[int]) -> None:
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert roc_area(np.array(positive), np.array(negative)) == pytest.approx(np.mean(pairs))


def test_roc_area_needs_both_sides() -> None:
    with pytest.raises(ValueError, match="both sides"):
        roc_area(np.ones(3), np.ones(0))

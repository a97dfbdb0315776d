"""Measures of generators against slow references, and the properties that they have by definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probelog.evaluation.accuracy import bootstrap, group_sums, roc_area
from probelog.evaluation.generators import (
    MEASURES,
    class_means,
    measures,
    nearest_is_right,
    nearest_of_others,
    presence_area,
    unit_rows,
)

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.integers(1, 6), st.integers(1, 20))
def test_measures_are_their_definitions(seed: int, queries: int, models: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.permuted(np.tile(np.arange(models), (queries, 1)), axis=1).astype(float)
    relevant = random.random((queries, models)) < 0.3
    relevant[:, 0] = True
    got = measures(scores, relevant)
    assert got.shape == (queries, len(MEASURES))
    for row, own_scores, right in zip(got, scores, relevant, strict=True):
        order = [bool(right[i]) for i in np.argsort(-own_scores)]
        precisions = [sum(order[: i + 1]) / (i + 1) for i, hit in enumerate(order) if hit]
        assert row == pytest.approx(
            [*(float(any(order[:k])) for k in (1, 5, 10)), sum(precisions) / len(precisions)]
        )


@given(SEEDS, st.integers(1, 12), st.integers(1, 12), st.integers(1, 4))
def test_the_area_is_that_of_all_pairs_and_inside_its_interval(
    seed: int, present: int, absent: int, concepts: int
) -> None:
    random = np.random.default_rng(seed)
    first, second = random.integers(0, 6, present) * 1.0, random.integers(0, 6, absent) * 1.0
    groups, others = random.integers(0, concepts, present), random.integers(0, concepts, absent)
    area = presence_area(first, second, groups, others, resamples=200)
    assert area.mean == roc_area(first, second)
    assert 0 <= area.low <= area.high <= 1
    # Told apart the other way round, and whatever the scores' scale.
    assert presence_area(-first, -second, groups, others, resamples=50).mean == pytest.approx(1 - area.mean)
    assert presence_area(np.exp(first), np.exp(second), groups, others, resamples=50).mean == area.mean


def test_an_area_that_is_certain_has_no_width() -> None:
    area = presence_area(np.array([3.0, 4.0]), np.array([1.0, 2.0, 0.0]), np.arange(2), np.array([0, 0, 1]))
    assert area == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="both sides"):
        presence_area(np.empty(0), np.ones(1), np.empty(0, int), np.zeros(1, int))


@given(SEEDS, st.integers(1, 30), st.integers(1, 5))
def test_sums_of_groups_are_those_of_their_members(seed: int, rows: int, groups: int) -> None:
    random = np.random.default_rng(seed)
    values, numbers = random.normal(size=(rows, 2)), random.integers(0, groups, rows)
    sums, sizes = group_sums(values, numbers)
    for place, number in enumerate(sorted(set(numbers))):
        np.testing.assert_allclose(sums[place], values[numbers == number].sum(axis=0), atol=1e-12)
        assert sizes[place] == (numbers == number).sum()


def test_pictures_of_one_concept_are_drawn_together() -> None:
    """Ten copies of every query add nothing: the interval stays that of the concepts."""
    values = np.random.default_rng(1).random((20, 1))
    alone = bootstrap(values)[0]
    assert bootstrap(values, groups=np.arange(20)) == [alone]
    copies, groups = np.repeat(values, 10, axis=0), np.repeat(np.arange(20), 10)
    together = bootstrap(copies, groups=groups)[0]
    assert together == pytest.approx(alone)
    naive = bootstrap(copies)[0]
    assert naive.high - naive.low < 0.5 * (together.high - together.low)


# Reading pictures


@given(SEEDS, st.integers(2, 5), st.integers(2, 6))
def test_what_lies_near_its_class_is_read(seed: int, classes: int, each: int) -> None:
    random = np.random.default_rng(seed)
    numbers = np.repeat(np.arange(classes), each)
    vectors = np.eye(classes + 3)[numbers] + random.normal(size=(len(numbers), classes + 3)) * 0.01
    assert nearest_of_others(vectors, numbers, classes).all()
    concepts = class_means(vectors, numbers, classes)
    right = numbers[:, None] == np.arange(classes)
    assert nearest_is_right(vectors, concepts, right).all()
    assert not nearest_is_right(vectors, concepts, ~right).any()
    # Lengths do not matter.
    assert nearest_is_right(vectors * random.uniform(1, 9, (len(vectors), 1)), concepts * 2, right).all()


@given(SEEDS)
def test_a_picture_is_not_compared_with_itself(seed: int) -> None:
    """Left out means left out: it is as if the mean had been computed without it."""
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 3, 12)
    vectors = unit_rows(random.normal(size=(12, 4)))
    got = nearest_of_others(vectors, numbers, 4)
    for i in range(12):
        others = np.arange(12) != i
        means = class_means(vectors[others], numbers[others], 4)
        cosines = np.where(means.any(axis=1), means @ vectors[i], -np.inf)
        expected = (
            np.isfinite(cosines[numbers[i]]) and cosines[numbers[i]] > np.delete(cosines, numbers[i]).max()
        )
        assert got[i] == expected


def test_rows_of_nothing_stay_nothing() -> None:
    assert unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[0.6, 0.8], [0.0, 0.0]]

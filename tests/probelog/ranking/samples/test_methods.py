"""Methods against naive formulas, and the properties that each must have."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal  # type: ignore[import-untyped, unused-ignore]

from probelog.ranking.samples import learned
from probelog.ranking.samples.description import Descriptions, Difference, Moments, unit
from probelog.ranking.samples.learned import Learned, Shape, held_out_scores
from probelog.ranking.samples.methods import FLOOR, METHODS, gaussian, monte_carlo, product_of_experts

Floats = npt.NDArray[np.float64]


def features(seed: int, models: int = 4, width: int = 6, most: int = 12) -> list[Floats]:
    """Unit features of some models, in different numbers, around a direction of each."""
    random = np.random.default_rng(seed)
    return [
        unit(random.normal(size=width) + 0.5 * random.normal(size=(int(random.integers(1, most)), width)))
        for _ in range(models)
    ]


def queries(seed: int, count: int = 3, width: int = 6) -> Floats:
    return unit(np.random.default_rng([seed, 1]).normal(size=(count, width)))


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=30)
def test_the_gaussian_by_woodbury_is_the_dense_one(seed: int, rank: int) -> None:
    models, asked = Descriptions.of(features(seed), rank), queries(seed)
    scores = gaussian(models, asked)
    for n in range(len(models)):
        covariance = (models.axes[n].T * models.variances[n]) @ models.axes[n] + np.diag(models.diagonal[n])
        dense = multivariate_normal(models.means[n], covariance + FLOOR * np.eye(6))
        expected = dense.logpdf(asked) + 3 * np.log(2 * np.pi)
        assert scores[:, n] == pytest.approx(expected, rel=1e-4, abs=1e-3)


@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_moments_are_those_of_the_features(seed: int) -> None:
    for rows in features(seed):
        full = Moments.of(rows, 6)
        covariance = (full.axes.T * full.variances) @ full.axes + np.diag(full.diagonal)
        expected = np.cov(rows.T, bias=True).reshape(6, 6)
        assert covariance == pytest.approx(expected, abs=1e-6)
        low = Moments.of(rows, 2)
        trace = low.variances.sum() + low.diagonal.sum()
        assert trace == pytest.approx(np.trace(expected), abs=1e-6)
        assert np.diag((low.axes.T * low.variances) @ low.axes) + low.diagonal == pytest.approx(
            np.diag(expected), abs=1e-6
        )


@pytest.mark.parametrize("name", METHODS)
def test_methods_do_not_depend_on_order_or_on_copies_of_samples(name: str) -> None:
    random = np.random.default_rng(0)
    rows, asked, method = features(3), queries(3), METHODS[name]
    scores = method(Descriptions.of(rows), asked)
    assert scores.shape == (3, 4)
    shuffled = [item[random.permutation(len(item))] for item in rows]
    assert method(Descriptions.of(shuffled), asked) == pytest.approx(scores, rel=1e-4)
    models = Descriptions.of(rows)
    places = np.array([2, 0, 3])
    assert method(models.at(places), asked) == pytest.approx(scores[:, places], rel=1e-6)
    if name != "best-k":  # the nearest of many copies is one of them
        twice = [np.concatenate([item, item]) for item in rows]
        assert method(Descriptions.of(twice), asked) == pytest.approx(scores, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_that_makes_just_the_query_is_first(name: str) -> None:
    asked = queries(5, count=1)
    random = np.random.default_rng(5)
    # All equally tight: of wide distributions the second-order cumulants are worth nothing.
    centres = unit(random.normal(size=(4, 6)))
    rows = [unit(centre + 0.01 * random.normal(size=(12, 6))) for centre in [*centres, asked[0]]]
    assert METHODS[name](Descriptions.of(rows), asked).argmax() == 4


@pytest.mark.parametrize("name", ["first-moment", "monte-carlo", "best-k"])
def test_a_rotation_of_the_space_changes_nothing(name: str) -> None:
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))
    rows, asked, method = features(7), queries(7), METHODS[name]
    turned = method(Descriptions.of([item @ turn for item in rows]), asked @ turn)
    assert turned == pytest.approx(method(Descriptions.of(rows), asked), rel=1e-3, abs=1e-4)


def test_monte_carlo_is_the_mean_over_the_samples() -> None:
    rows, asked = features(11), queries(11)
    scores = monte_carlo(Descriptions.of(rows), asked)
    expected = [[np.log(np.mean(np.exp(100 * item @ query))) for item in rows] for query in asked]
    assert scores == pytest.approx(np.array(expected), rel=1e-4)
    copies = Descriptions.of([np.repeat(item[:1], 9, axis=0) for item in rows])
    assert monte_carlo(copies, asked) == pytest.approx(
        monte_carlo(Descriptions.of([item[:1] for item in rows]), asked), rel=1e-4
    )


def test_a_product_of_experts_needs_both_of_them() -> None:
    first, second = np.log([0.5, 0.4, 0.1]), np.log([0.1, 0.4, 0.5])
    assert product_of_experts([first, second]).argmax() == 1


def test_the_slope_of_learning_is_that_of_its_loss() -> None:
    random = np.random.default_rng(0)
    matrix, asked, means = random.normal(size=(5, 5)), queries(0, 7, 5), unit(random.normal(size=(4, 5)))
    answers = random.integers(0, 4, 7)
    slope = learned.loss_and_slope(matrix, asked, answers, means)[1]
    for _ in range(5):
        step = 1e-6 * random.normal(size=(5, 5))
        rise = (
            learned.loss_and_slope(matrix + step, asked, answers, means)[0]
            - learned.loss_and_slope(matrix - step, asked, answers, means)[0]
        )
        assert rise == pytest.approx(2 * float((slope * step).sum()), rel=1e-3)


@pytest.mark.parametrize("shape", Shape)
def test_learned_matching_learns_which_coordinates_say_something(shape: Shape) -> None:
    random = np.random.default_rng(4)
    centres = np.zeros((20, 8))
    centres[:, :4] = random.normal(size=(20, 4))
    rows = [unit(centre + 0.1 * random.normal(size=(10, 8))) for centre in centres]
    answers = np.repeat(np.arange(20), 5)
    noise = random.normal(size=(100, 8)) * (
        [0.3] * 4 + [6.0] * 4
    )  # of queries, half of the coordinates are noise
    asked = unit(centres[answers] + noise)
    models = Descriptions.of(rows)
    plain = METHODS["first-moment"](models, asked)
    moved = held_out_scores(models, asked, answers, METHODS["first-moment"], shape)
    right = [(scores.argmax(axis=1) == answers).mean() for scores in (plain, moved)]
    assert right[1] > right[0] + 0.03
    matrix = Learned.train(asked, answers, models.means, shape).matrix
    assert (matrix[np.triu_indices(8, 1)] == 0).all() or shape == Shape.FULL


def test_the_difference_of_an_adapter_is_its_direction() -> None:
    base = unit(np.random.default_rng(0).normal(size=(9, 6)))
    moved = Difference.of(base + np.array([0.3, 0, 0, 0, 0, 0]), base)
    assert moved.direction == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-6)
    assert (moved.strength, moved.consistency) == pytest.approx((0.3, 1.0))
    nothing = Difference.of(base, base)
    assert (nothing.strength, nothing.consistency) == (0.0, 0.0)
    assert not nothing.direction.any()

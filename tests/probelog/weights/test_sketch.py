"""Moments against NumPy in float64; sketches against the distances they stand for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probelog.weights.sketch import BLOCK, WIDTH, Summary, WeightMoments, exact_moments

# The beginning of one sketch, computed once with version 1.
PINNED = [-890.0, -3162.0, 4862.0, 4876.0, 8915.0, 12839.0]
# Of a squared distance, relative: the first term of the variance in the module's docstring.
STATED_ERROR = math.sqrt(2 / WIDTH)


def summary(values: np.ndarray, sketched: bool = True) -> tuple[WeightMoments, np.ndarray | None]:
    found = Summary()
    found.begin(sketched=sketched)
    for piece in torch.split(torch.from_numpy(values.astype(np.float32).reshape(-1)), BLOCK):
        found.add(piece)
    return found.finish()


def sketch(values: np.ndarray) -> np.ndarray:
    made = summary(values)[1]
    assert made is not None
    return made


def squared(values: np.ndarray) -> float:
    return float((values.astype(np.float64) ** 2).sum())


@settings(deadline=None, max_examples=60)
@given(
    size=st.sampled_from([1, 2, 100, 8191, 8192, 50_000, BLOCK, BLOCK + 1, 3 * BLOCK + 77]),
    mean=st.sampled_from([0.0, 1e-3, -1.0, 1e4, -3e6]),
    std=st.sampled_from([0.0, 1e-30, 1e-12, 1e-6, 1e-2, 1.0, 1e12, 1e30]),
    shape=st.sampled_from(["normal", "heavy", "skewed", "steps"]),
    seed=st.integers(0, 99),
)
def test_moments_of_anything_equal_those_in_float64(
    size: int, mean: float, std: float, shape: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    draw = {
        "normal": rng.normal(size=size),
        "heavy": rng.standard_t(3, size=size),
        "skewed": rng.exponential(size=size),
        "steps": np.sort(rng.normal(size=size)),  # every block has another mean
    }[shape]
    values = (mean + std * draw).astype(np.float32)
    moments, _ = summary(values, sketched=False)
    exact = values.astype(np.float64)
    deviations = exact - exact.mean()
    wanted = deviations.std()
    assert moments.count == size
    assert moments.mean == pytest.approx(exact.mean(), rel=1e-6, abs=1e-5 * wanted)
    assert moments.std == pytest.approx(wanted, rel=1e-5, abs=1e-13 * abs(mean))
    if wanted > 1e-12 * abs(mean):
        kurtosis = ((deviations / wanted) ** 4).mean()
        assert moments.kurtosis == pytest.approx(kurtosis, rel=1e-4)


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), max_size=5), max_size=5))
def test_merging_is_concatenation(parts: list[list[float]]) -> None:
    merged = WeightMoments()
    for part in parts:
        merged = merged.merged(exact_moments(np.array(part, np.float32)))
    whole = exact_moments(np.array([value for part in parts for value in part], np.float32))
    assert merged.count == whole.count
    for found, wanted, power in [
        (merged.mean, whole.mean, 1), (merged.second, whole.second, 2),
        (merged.third, whole.third, 3), (merged.fourth, whole.fourth, 4),
    ]:  # fmt: skip
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12 * 1e3**power)


def test_kurtosis_of_known_distributions() -> None:
    rng = np.random.default_rng(0)
    assert summary(rng.normal(size=500_000))[0].kurtosis == pytest.approx(3, abs=0.05)
    assert summary(rng.uniform(size=500_000))[0].kurtosis == pytest.approx(1.8, abs=0.02)
    assert summary(np.ones(500_000))[0].kurtosis is None
    # Sums of 131,071 float32 numbers: their order, and so the last digits, depend on the processor.
    assert summary(np.tile([-1.0, 1.0], 300_000))[0].kurtosis == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("size", "at"), [(5, 0), (9000, 8999), (2 * BLOCK + 5, BLOCK), (2 * BLOCK + 5, -1)])
def test_one_number_that_is_not_finite_is_never_lost(value: float, size: int, at: int) -> None:
    values = np.ones(size)
    assert summary(values)[0].finite
    values[at] = value
    assert not summary(values)[0].finite


def test_a_sketch_is_linear_and_never_changes() -> None:
    rng = np.random.default_rng(0)
    for shape in [(3, 4), (64, 3, 7, 7), (700, 600)]:
        a, b = rng.normal(size=shape), rng.normal(size=shape)
        together = sketch(2 * a - 3 * b)
        np.testing.assert_allclose(together, 2 * sketch(a) - 3 * sketch(b), atol=1e-3)
    # What an index holds is compared with what later versions compute.
    ramp = np.arange(2 * BLOCK + 11) % 97
    assert sketch(ramp)[:6].tolist() == PINNED


@pytest.mark.parametrize("shape", [(10, 10), (256, 64, 3, 3), (768, 768)])
@pytest.mark.parametrize("kind", ["unrelated", "noise", "low-rank", "one-column", "sparse"])
def test_estimated_distances_have_the_stated_error(shape: tuple[int, ...], kind: str) -> None:
    """Over many pairs of one shape: no bias, and the spread that the formula says."""
    trials = 60 if math.prod(shape) > 100_000 else 200
    ratios = []
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        parent = rng.normal(size=shape) * 0.05
        other = changed(parent, kind, rng)
        ratios.append(squared(sketch(other) - sketch(parent)) / squared(other - parent))
    # Where a difference spans several rows of the sketch, their likeness adds to the variance.
    allowed = STATED_ERROR * (1.0 if math.prod(shape) <= BLOCK else 1.5)
    assert abs(np.mean(ratios) - 1) < 4 * allowed / math.sqrt(trials)
    assert np.std(ratios) < allowed * (1 + 3 / math.sqrt(2 * trials))


def changed(parent: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Another layer of the same shape: an unrelated one, or a fine-tuned one."""
    shape = parent.shape
    matrix = np.zeros((shape[0], math.prod(shape[1:])))
    if kind == "unrelated":
        return rng.normal(size=shape) * 0.05
    if kind == "noise":
        matrix = rng.normal(size=matrix.shape) * 0.005
    elif kind == "low-rank":
        matrix = rng.normal(size=(len(matrix), 2)) @ rng.normal(size=(2, matrix.shape[1])) * 0.003
    elif kind == "one-column":
        matrix[:, rng.integers(matrix.shape[1])] = rng.normal(size=len(matrix)) * 0.05
    else:
        matrix.flat[rng.integers(matrix.size, size=max(matrix.size // 50, 5))] = 0.1
    return parent + matrix.reshape(shape)


def test_a_parent_is_nearer_than_any_unrelated_model() -> None:
    shape = (128, 64, 3, 3)
    rng = np.random.default_rng(0)
    parents = [rng.normal(size=shape) * 0.05 for _ in range(30)]
    known = np.stack([sketch(parent) for parent in parents])
    for index, parent in enumerate(parents):
        for kind in ("noise", "low-rank", "one-column", "sparse"):
            child = sketch(changed(parent, kind, rng))
            assert ((known - child) ** 2).sum(axis=1).argmin() == index

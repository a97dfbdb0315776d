"""Distances and calibration against the papers' formulas, computed naively, and their properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from probelog.completion import scoring
from probelog.completion.scoring import NearestBackground


def rows(count: int, probes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, probes))


matrices = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 6), st.integers(3, 40)),
    elements=st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-3),
).filter(lambda m: not scoring.is_constant(m).any())


@given(matrices)
def test_standardised_rows_have_mean_zero_and_deviation_one(matrix: np.ndarray) -> None:
    z = scoring.standardise(matrix)
    np.testing.assert_allclose(z.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(z.std(axis=1), 1, atol=1e-6)


@given(matrices, st.floats(0.01, 100), st.floats(-100, 100))
def test_descriptors_ignore_scale_and_shift(matrix: np.ndarray, scale: float, shift: float) -> None:
    moved = scale * matrix + shift
    assume(not scoring.is_constant(moved).any())  # a shift may drown what little there is
    np.testing.assert_allclose(scoring.standardise(matrix), scoring.standardise(moved), atol=1e-4)


def test_constant_rows_are_refused_and_found() -> None:
    matrix = np.stack([np.full(10, 3.0), np.arange(10.0), np.full(10, 1e6) + rows(1, 10)[0] * 1e-4])
    assert scoring.is_constant(matrix).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="constant"):
        scoring.standardise(matrix)


@given(matrices, st.integers(1, 50))
def test_top_pairs_are_the_largest_in_falling_order(matrix: np.ndarray, r: int) -> None:
    pairs = scoring.top_pairs(matrix, r)
    kept = min(r, matrix.shape[1])
    assert pairs.probes.shape == pairs.values.shape == (len(matrix), kept)
    np.testing.assert_array_equal(pairs.values, np.sort(matrix.astype(np.float32), axis=1)[:, ::-1][:, :kept])
    np.testing.assert_array_equal(
        np.take_along_axis(matrix, pairs.probes, axis=1).astype(np.float32), pairs.values
    )


def naive_version_2(z_logits, z_concepts, z_background, r: int, k: int) -> np.ndarray:
    """docs/method.md, section 3, word by word."""
    out = np.empty((len(z_concepts), len(z_logits)))
    for i, logit in enumerate(z_logits):
        support = np.argsort(-logit, kind="stable")[:r]
        background = [np.linalg.norm((logit - b)[support]) for b in z_background]
        offset = np.mean(sorted(background)[:k])
        for j, concept in enumerate(z_concepts):
            out[j, i] = np.linalg.norm((logit - concept)[support]) - offset
    return out


@pytest.mark.parametrize("r", [1, 7, 50, 200])
def test_calibrated_truncated_distance_is_the_papers(r: int) -> None:
    logits, concepts, background = (scoring.standardise(rows(n, 200, n)) for n in (30, 5, 40))
    pairs = scoring.top_pairs(logits, r)
    nearest = scoring.nearest_background(scoring.truncated_distances(pairs, background), 12)
    offsets = scoring.calibration_offsets(nearest, 8)
    found = scoring.truncated_distances(pairs, concepts).T - offsets
    np.testing.assert_allclose(found, naive_version_2(logits, concepts, background, r, 8), atol=1e-5)


def test_a_scan_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = scoring.top_pairs(scoring.standardise(rows(50, 100)), 10)
    queries = scoring.standardise(rows(3, 100, 1))
    whole = scoring.truncated_distances(pairs, queries)
    monkeypatch.setattr(scoring, "_SCAN_ELEMENTS", 100)
    np.testing.assert_array_equal(scoring.truncated_distances(pairs, queries), whole)


def test_query_side_distance_is_version_1() -> None:
    z = scoring.standardise(rows(20, 100))
    query = z[3]
    support = np.argsort(-query, kind="stable")[:9]
    expected = [np.linalg.norm((query - row)[support]) for row in z]
    found = scoring.query_side_distances(z[:, support].T, query[support])
    np.testing.assert_allclose(found, expected)
    assert found.argmin() == 3


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.sets(st.integers(0, 29), max_size=5), st.integers(1, 10))
def test_excluded_background_counts_as_absent(seed: int, excluded: set[int], k: int) -> None:
    distances = np.abs(rows(7, 30, seed))
    nearest = scoring.nearest_background(distances, k + 5)
    found = scoring.calibration_offsets(nearest, k, np.array(sorted(excluded), np.int64))
    kept = np.delete(distances, sorted(excluded), axis=1)
    np.testing.assert_allclose(found, np.sort(kept, axis=1)[:, :k].mean(axis=1), rtol=1e-5)


def test_no_background_means_no_calibration() -> None:
    empty = NearestBackground(np.empty((4, 0), np.int32), np.empty((4, 0), np.float32))
    assert scoring.calibration_offsets(empty, 5).tolist() == [0, 0, 0, 0]

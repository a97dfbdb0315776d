"""Masked ALS against known answers: exact low-rank data, the dense normal equations, properties."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probelog.completion import als
from probelog.completion.als import Block, ColumnSums, HeldOutError
from probelog.errors import UsageError


def low_rank_blocks(
    models: int = 20, logits: int = 10, probes: int = 120, rank: int = 3, share: float = 0.4, seed: int = 0
):
    rng = np.random.default_rng(seed)
    columns = rng.standard_normal((probes, rank))
    blocks, full = [], []
    for _ in range(models):
        row = rng.standard_normal((logits, rank)) @ columns.T
        seen = np.sort(rng.choice(probes, round(share * probes), replace=False)).astype(np.int32)
        blocks.append(Block(seen, row[:, seen].astype(np.float32)))
        full.append(row)
    return blocks, full


def sweep(blocks, columns, lam):
    return als.column_step(sums_of(blocks, columns, lam), lam)


def sums_of(blocks, columns, lam):
    models = ((block, als.row_step(block, columns, lam)) for block in blocks)
    return ColumnSums.of(*columns.shape, models)


def test_exact_low_rank_data_is_recovered() -> None:
    blocks, full = low_rank_blocks()
    columns = als.initial_columns(120, 3, seed=0)
    for _ in range(40):
        columns = sweep(blocks, columns, 1e-5)
    for block, row in zip(blocks, full, strict=True):
        completed = als.complete_rows(block, als.row_step(block, columns, 1e-5), columns)
        np.testing.assert_allclose(completed, row, atol=2e-2)


def test_row_and_column_steps_solve_the_normal_equations() -> None:
    blocks, _ = low_rank_blocks(models=4, logits=3, probes=15)
    columns = als.initial_columns(15, 2, seed=1)
    lam = 0.05
    rows = []
    for block in blocks:
        seen = columns[block.probes]
        expected = block.values @ seen @ np.linalg.inv(seen.T @ seen + lam * len(block.probes) * np.eye(2))
        rows.append(als.row_step(block, columns, lam))
        np.testing.assert_allclose(rows[-1], expected, atol=1e-5)
    sums = ColumnSums.of(15, 2, zip(blocks, rows, strict=True))
    found = als.column_step(sums, lam)
    for probe in range(15):
        gram, target, count = np.zeros((2, 2)), np.zeros(2), 0
        for block, factors in zip(blocks, rows, strict=True):
            if probe in block.probes:
                values = block.values[:, list(block.probes).index(probe)]
                gram += factors.T @ factors
                target += factors.T @ values
                count += len(factors)
        if count == 0:
            assert (found[probe] == 0).all()
        else:
            np.testing.assert_allclose(
                found[probe], np.linalg.solve(gram + lam * count * np.eye(2), target), rtol=1e-5
            )


def test_a_sweep_never_raises_the_regularised_loss() -> None:
    blocks, _ = low_rank_blocks(rank=6)
    lam = 0.1

    def loss(columns):
        total = 0.0
        counts = np.zeros(len(columns))
        for block in blocks:
            factors = als.row_step(block, columns, lam)
            total += np.square(block.values - factors @ columns[block.probes].T).sum()
            total += lam * len(block.probes) * np.square(factors).sum()
            counts[block.probes] += len(factors)
        return total + lam * (counts * np.square(columns).sum(axis=1)).sum()

    columns = als.initial_columns(120, 4, seed=0)
    losses = []
    for _ in range(8):
        losses.append(loss(columns))
        columns = sweep(blocks, columns, lam)
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(losses))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 5))
def test_sums_do_not_depend_on_how_models_are_sharded(seed: int, shards: int) -> None:
    blocks, _ = low_rank_blocks(models=9, seed=seed)
    columns = als.initial_columns(120, 3, seed)
    models = [(block, als.row_step(block, columns, 0.1)) for block in blocks]
    whole = ColumnSums.of(120, 3, models)
    parts = [ColumnSums.of(120, 3, models[i::shards]) for i in range(shards)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    np.testing.assert_allclose(als.column_step(total, 0.1), als.column_step(whole, 0.1), atol=1e-5)


def test_observed_values_are_never_changed() -> None:
    blocks, _ = low_rank_blocks(share=1.0)
    columns = als.initial_columns(120, 2, seed=0)
    factors = als.row_step(blocks[0], columns, 0.5)
    np.testing.assert_array_equal(als.complete_rows(blocks[0], factors, columns), blocks[0].values)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 5), st.sampled_from([0.01, 0.1]))
def test_sweeps_do_not_depend_on_how_models_are_sharded(seed: int, shards: int, lam: float) -> None:
    blocks = [als.standardised(*block).block for block in low_rank_blocks(models=9, seed=seed)[0]]
    whole = parted = als.initial_columns(120, 4, seed)
    for _ in range(10):
        whole = sweep(blocks, whole, lam)
        total, *rest = (sums_of(blocks[i::shards], parted, lam) for i in range(shards))
        for other in rest:
            total = total + other
        parted = als.column_step(total, lam)
    for block in blocks:
        completed = [
            als.complete_rows(block, als.row_step(block, columns, lam), columns)
            for columns in (whole, parted)
        ]
        np.testing.assert_allclose(*completed, atol=1e-4)


def test_single_precision_is_enough() -> None:
    """The same sweeps in float64 throughout give the same completed rows, to the digits that matter."""
    blocks, _ = low_rank_blocks(models=40, rank=6)
    lam = 0.01
    columns = als.initial_columns(120, 8, seed=0)
    exact = columns.astype(np.float64)

    def factors(block, columns):
        seen = columns[block.probes]
        gram = seen.T @ seen + lam * len(seen) * np.eye(8)
        return np.linalg.solve(gram, seen.T @ block.values.T.astype(np.float64)).T

    for _ in range(10):
        columns = sweep(blocks, columns, lam)
        gram, target, count = np.zeros((120, 8, 8)), np.zeros((120, 8, 1)), np.zeros(120)
        for block in blocks:
            own = factors(block, exact)
            gram[block.probes] += own.T @ own
            target[block.probes, :, 0] += block.values.T @ own
            count[block.probes] += len(own)
        exact = np.linalg.solve(gram + lam * count[:, None, None] * np.eye(8), target)[:, :, 0]
    for block in blocks:
        found = als.row_step(block, columns, lam) @ columns.T
        np.testing.assert_allclose(found, factors(block, exact) @ exact.T, atol=2e-4)


def test_entries_that_do_not_count_are_as_if_they_were_not_there() -> None:
    blocks, _ = low_rank_blocks(models=5)
    columns = als.initial_columns(120, 3, seed=0)
    masked, without = als.SumsOverModels(120, 3), als.SumsOverModels(120, 3)
    for number, block in enumerate(blocks):
        training = ~als.held_positions(np.ones(len(block.probes), bool), 0.25, np.random.default_rng(number))
        less = Block(block.probes[training], block.values[:, training])
        rows = als.row_step(block, columns, 0.1, training)
        np.testing.assert_allclose(rows, als.row_step(less, columns, 0.1), atol=1e-5)
        masked.add(block, rows, training)
        without.add(less, rows)
    for found, expected in zip(vars(masked.total()).values(), vars(without.total()).values(), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_new_model_is_folded_in_where_it_would_have_been() -> None:
    blocks, full = low_rank_blocks(models=60)
    columns = als.initial_columns(120, 4, seed=0)  # one more than the rows had: their means were taken out
    known = [als.standardised(*block).block for block in blocks[1:]]
    for _ in range(40):
        columns = sweep(known, columns, 1e-4)
    raw = 5 * full[0] + 3
    folded = als.fold_in(blocks[0].probes, raw[:, blocks[0].probes], columns, 1e-4)
    predicted = (folded.factors @ columns.T) * folded.moments.std[:, None] + folded.moments.mean[:, None]
    assert np.abs(predicted - raw).max() < 0.05 * raw.std()


def test_equations_without_a_stable_solution_are_refused() -> None:
    block = Block(np.arange(4, dtype=np.int32), np.ones((2, 4), np.float32))
    with pytest.raises(UsageError, match="larger `regularisation`"):
        als.row_step(block, np.zeros((4, 2), np.float32), 0.0)


@given(st.lists(st.booleans(), min_size=2, max_size=60), st.floats(0.01, 0.99), st.integers(0, 99))
def test_some_probes_are_held_out_and_some_are_not(own: list[bool], share: float, seed: int) -> None:
    held = als.held_positions(np.array(own), share, np.random.default_rng(seed))
    assert held.shape == (len(own),)
    assert 1 <= held.sum() <= len(own) - 1
    assert not any(own) or np.array(own)[held].all(), (
        "what every model sees says nothing of what is filled in"
    )


def test_held_out_error_counts_what_it_says() -> None:
    blocks, _ = low_rank_blocks(models=1)
    block = blocks[0]
    held = als.held_positions(np.ones(len(block.probes), bool), 0.25, np.random.default_rng(0))
    columns = np.zeros((120, 2), np.float32)
    factors = als.row_step(block, columns, 0.1, ~held)
    error = als.held_out_error(block, held, factors, columns, top_share=0.1)
    values = block.values[:, held]
    assert error.entries == values.size
    assert error.rmse == pytest.approx(np.sqrt(np.square(values).mean()), rel=1e-5)
    top = [row[held] >= np.sort(row)[-5] for row in block.values]  # a tenth of 48
    assert error.top_entries == np.sum(top)
    assert error.top_rmse == pytest.approx(np.sqrt(np.square(values[np.stack(top)]).mean()), rel=1e-5)
    assert error.top_rmse > error.rmse
    assert (error + error).rmse == pytest.approx(error.rmse)
    one = als.held_out_error(block, held, factors, columns, top_share=0.001)
    assert one.top_entries == sum(row[held].max() == row.max() for row in block.values), (
        "one a row at the least"
    )
    assert np.isnan(HeldOutError(0.0, 0, 0.0, 0).rmse)


def test_sums_of_many_models_and_probes_are_added_up_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, _ = low_rank_blocks(models=11)
    columns = als.initial_columns(120, 3, seed=0)
    whole = sums_of(blocks, columns, 0.1)
    monkeypatch.setattr(als, "_MODELS_AT_ONCE", 4)
    monkeypatch.setattr(als, "_PROBES_AT_ONCE", 50)
    pieces = sums_of(blocks, columns, 0.1)
    for found, expected in zip(vars(pieces).values(), vars(whole).values(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(als.column_step(pieces, 0.1), als.column_step(whole, 0.1), atol=1e-5)


def test_sums_may_be_asked_for_while_models_are_added() -> None:
    blocks, _ = low_rank_blocks(models=6)
    columns = als.initial_columns(120, 3, seed=0)
    rows = [als.row_step(block, columns, 0.1) for block in blocks]
    asked = als.SumsOverModels(120, 3)
    for block, factors in zip(blocks, rows, strict=True):
        asked.add(block, factors)
        asked.total()
    whole = ColumnSums.of(120, 3, zip(blocks, rows, strict=True))
    for found, expected in zip(vars(asked.total()).values(), vars(whole).values(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_probes_that_no_model_saw_have_columns_of_zeros() -> None:
    block = Block(np.array([0, 2], np.int32), np.ones((2, 2), np.float32))
    columns = als.initial_columns(4, 2, seed=0)
    found = als.column_step(ColumnSums.of(4, 2, [(block, als.row_step(block, columns, 0.1))]), 0.1)
    assert (found[[1, 3]] == 0).all()
    assert (found[[0, 2]] != 0).any(axis=1).all()


def test_memory_of_a_sweep() -> None:
    # V and the sums in float64 twice (10 probes, rank 3: 6 + 3 + 1 numbers each); masks and Gram matrices of 256 models.
    assert als.working_bytes(10, 3) == 2 * 8 * 10 * 10 + 4 * 10 * 3 + 4 * 256 * (10 + 6)


def test_the_start_has_the_scale_of_one_over_the_rank() -> None:
    start = als.initial_columns(5000, 4, seed=1)
    assert start.std() == pytest.approx(0.5, rel=0.02)
    assert als.initial_columns(3, 0, seed=1).shape == (3, 0)
    assert not np.array_equal(start, als.initial_columns(5000, 4, seed=2))


def test_the_rows_that_are_standardised_are_those_that_are_not_constant() -> None:
    rows = np.array(
        [[1.0, 2.0, 4.0], [7.0, 7.0, 7.0], [0.0, 0.0, 0.0], [1e6, 1e6 + 1, 1e6 + 2], [-3.0, 5.0, 0.0]]
    )
    found = als.standardised(np.array([1, 5, 6]), rows)
    assert found.kept.tolist() == [True, False, False, False, True]
    np.testing.assert_allclose(found.moments.mean, rows[found.kept].mean(axis=1))
    np.testing.assert_allclose(found.moments.std, rows[found.kept].std(axis=1))
    expected = (rows[found.kept] - found.moments.mean[:, None]) / found.moments.std[:, None]
    np.testing.assert_allclose(found.block.values, expected, rtol=1e-6)
    assert found.block.probes.tolist() == [1, 5, 6]


def test_moments_of_rows() -> None:
    rows = np.array([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    found = als.row_moments(rows)
    np.testing.assert_allclose(found.mean, [3, 4])
    np.testing.assert_allclose(found.std, [np.sqrt(14 / 3), 0])


@pytest.mark.parametrize(
    ("total", "share", "expected"),
    [(10, 0.24, 2), (10, 0.01, 1), (10, 0.99, 9), (2, 0.9, 1), (1, 0.5, 0), (0, 0.5, 0)],
)
def test_how_many_probes_are_held_out(total: int, share: float, expected: int) -> None:
    held = als.held_positions(np.ones(total, bool), share, np.random.default_rng(0))
    assert (len(held), held.sum()) == (total, expected)


def test_errors_add_up() -> None:
    total = HeldOutError(4.0, 2, 9.0, 3) + HeldOutError(5.0, 7, 7.0, 1)
    assert total == HeldOutError(9.0, 9, 16.0, 4)
    assert (total.rmse, total.top_rmse) == (1.0, 2.0)
    assert np.isnan(HeldOutError(1.0, 1, 0.0, 0).top_rmse)
    sums = ColumnSums(np.ones((2, 1)), np.full((2, 1), 2.0), np.full(2, 3.0))
    both = als.SweepSums(sums, HeldOutError(4.0, 2, 9.0, 3)) + als.SweepSums(
        sums, HeldOutError(5.0, 7, 7.0, 1)
    )
    assert both.error == total
    assert (both.columns.gram == 2).all()
    assert (both.columns.target == 4).all()
    assert (both.columns.count == 6).all()


def test_at_least_one_entry_of_a_row_is_a_top_one() -> None:
    block = Block(np.arange(4, dtype=np.int32), np.array([[1.0, 4.0, 2.0, 3.0]], np.float32))
    columns, factors = np.zeros((4, 1), np.float32), np.zeros((1, 1), np.float32)
    held = np.array([True, True, False, False])
    assert als.held_out_error(block, held, factors, columns, top_share=0.01) == HeldOutError(17.0, 2, 16.0, 1)
    assert als.held_out_error(block, held, factors, columns, top_share=1.0) == HeldOutError(17.0, 2, 17.0, 2)

"""Masked ALS against known answers: exact low-rank data, the dense normal equations, properties."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probelog import completion
from probelog.completion import Block, ColumnSums, HeldOutError


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
    models = ((block, completion.row_step(block, columns, lam)) for block in blocks)
    return completion.column_step(ColumnSums.of(*columns.shape, models), lam)


def test_exact_low_rank_data_is_recovered() -> None:
    blocks, full = low_rank_blocks()
    columns = completion.initial_columns(120, 3, seed=0)
    for _ in range(40):
        columns = sweep(blocks, columns, 1e-6)
    for block, row in zip(blocks, full, strict=True):
        completed = completion.complete_rows(block, completion.row_step(block, columns, 1e-6), columns)
        np.testing.assert_allclose(completed, row, atol=2e-2)


def test_row_and_column_steps_solve_the_normal_equations() -> None:
    blocks, _ = low_rank_blocks(models=4, logits=3, probes=15)
    columns = completion.initial_columns(15, 2, seed=1)
    lam = 0.05
    rows = []
    for block in blocks:
        seen = columns[block.probes]
        expected = block.values @ seen @ np.linalg.inv(seen.T @ seen + lam * len(block.probes) * np.eye(2))
        rows.append(completion.row_step(block, columns, lam))
        np.testing.assert_allclose(rows[-1], expected, atol=1e-6)
    sums = ColumnSums.of(15, 2, zip(blocks, rows, strict=True))
    found = completion.column_step(sums, lam)
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
            np.testing.assert_allclose(found[probe], np.linalg.solve(gram + lam * count * np.eye(2), target))


def test_a_sweep_never_raises_the_regularised_loss() -> None:
    blocks, _ = low_rank_blocks(rank=6)
    lam = 0.1

    def loss(columns):
        total = 0.0
        counts = np.zeros(len(columns))
        for block in blocks:
            factors = completion.row_step(block, columns, lam)
            total += np.square(block.values - factors @ columns[block.probes].T).sum()
            total += lam * len(block.probes) * np.square(factors).sum()
            counts[block.probes] += len(factors)
        return total + lam * (counts * np.square(columns).sum(axis=1)).sum()

    columns = completion.initial_columns(120, 4, seed=0)
    losses = []
    for _ in range(8):
        losses.append(loss(columns))
        columns = sweep(blocks, columns, lam)
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(losses))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 5))
def test_sums_do_not_depend_on_how_models_are_sharded(seed: int, shards: int) -> None:
    blocks, _ = low_rank_blocks(models=9, seed=seed)
    columns = completion.initial_columns(120, 3, seed)
    models = [(block, completion.row_step(block, columns, 0.1)) for block in blocks]
    whole = ColumnSums.of(120, 3, models)
    parts = [ColumnSums.of(120, 3, models[i::shards]) for i in range(shards)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    np.testing.assert_allclose(
        completion.column_step(total, 0.1), completion.column_step(whole, 0.1), atol=1e-8
    )


def test_observed_values_are_never_changed() -> None:
    blocks, _ = low_rank_blocks(share=1.0)
    columns = completion.initial_columns(120, 2, seed=0)
    factors = completion.row_step(blocks[0], columns, 0.5)
    np.testing.assert_array_equal(completion.complete_rows(blocks[0], factors, columns), blocks[0].values)


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 99))
def test_held_out_entries_partition_the_observed_ones(probes: int, share: float, seed: int) -> None:
    block = Block(
        np.arange(probes, dtype=np.int32) * 2, np.random.default_rng(0).random((3, probes), np.float32)
    )
    training, held = completion.hold_out(block, share, np.random.default_rng(seed))
    assert sorted([*training.probes, *held.probes]) == list(block.probes)
    assert len(training.probes) >= 1
    assert len(held.probes) >= 1
    assert training.values.shape == (3, len(training.probes))


def test_held_out_error_counts_what_it_says() -> None:
    blocks, _ = low_rank_blocks(models=1)
    training, held = completion.hold_out(blocks[0], 0.25, np.random.default_rng(0))
    zero = np.zeros((120, 2))
    error = completion.held_out_error(training, held, zero, 0.1, top_share=0.1)
    assert error.entries == held.values.size
    assert error.rmse == pytest.approx(np.sqrt(np.square(held.values).mean()), rel=1e-5)
    assert 0 < error.top_entries < error.entries
    assert error.top_rmse > error.rmse
    assert (error + error).rmse == pytest.approx(error.rmse)
    assert np.isnan(HeldOutError(0.0, 0, 0.0, 0).rmse)

"""A shard without Ray: what it reads, its sums over models, and which entries it holds out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.completion import shard as module
from cluster.completion.fit import Fit
from cluster.completion.shard import Loaded, Shard, ShardSpec, partition_by_rows
from cluster.runtime.settings import WorkerSettings
from probelog.completion.als import (
    ColumnSums,
    Float32,
    HeldOutError,
    held_out_error,
    held_positions,
    initial_columns,
    row_step,
    standardised,
)
from probelog.storage.ledger import Receipt, observed_models
from probelog.storage.store import Store
from tests.cluster.completion.test_driver import LOGITS, PROBES, ledger_of

FIT = Fit(probes=PROBES, rank=3, regularisation=0.05, seed=0, top_share=0.1)
COLUMNS = initial_columns(PROBES, 3, 1)


def shard(
    store: Store, receipts: Sequence[Receipt], memory: int = 10**9, seed: int = 0, working: int = 0
) -> Shard:
    settings = WorkerSettings(completion_memory=memory, scratch=str(store.root))
    made = Shard(ShardSpec(store.uri, seed, settings, working))
    made.load(receipts)
    return made


def naive_sums(store: Store, receipts: Sequence[Receipt], columns: Float32, fit: Fit) -> ColumnSums:
    """Model by model, over all that was observed."""
    models = []
    for receipt in receipts:
        for facts, _, values in observed_models(store, receipt):
            block = standardised(np.array(facts.probes, np.int32), values).block
            models.append((block, row_step(block, columns, fit.regularisation)))
    return ColumnSums.of(fit.probes, fit.rank, models)


def assert_alike(result: ColumnSums, expected: ColumnSums) -> None:
    np.testing.assert_array_equal(result.count, expected.count)
    np.testing.assert_allclose(result.gram, expected.gram, rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(result.target, expected.target, rtol=1e-3, atol=2e-3)


def test_what_was_read_is_counted(tmp_path: Path) -> None:
    store, receipts = ledger_of(tmp_path, share=0.5, constant=[1])
    made = Shard(ShardSpec(store.uri, 0, WorkerSettings(completion_memory=10**9, scratch=str(tmp_path))))
    first, second = made.load(receipts[:1]), made.load(receipts[1:])
    assert (first.models, first.logits, first.dropped) == (4, 4 * (LOGITS - 1), 4)
    assert (second.models, second.logits, second.dropped) == (8, 8 * (LOGITS - 1), 8)
    assert second.in_memory > first.in_memory > 4 * (LOGITS - 1) * (PROBES // 2) * 2
    assert (first.on_disk, second.on_disk) == (0, 0)
    assert made.load([]) == Loaded()
    every = made.sums(COLUMNS, FIT, held_out=False)
    assert_alike(every.columns, naive_sums(store, receipts, COLUMNS, FIT))
    assert every.error == HeldOutError(0.0, 0, 0.0, 0)


def test_models_whose_logits_are_all_constant_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, receipts = ledger_of(tmp_path, share=0.5)
    real = module.observed_models

    def constant(store: Store, receipt: Receipt):  # type: ignore[no-untyped-def]
        for number, (facts, logits, values) in enumerate(real(store, receipt)):
            yield facts, logits, np.zeros_like(values) if number == 1 else values

    monkeypatch.setattr(module, "observed_models", constant)
    made = Shard(ShardSpec(store.uri, 0, WorkerSettings(completion_memory=10**9, scratch=str(tmp_path))))
    loaded = made.load(receipts[:1])
    assert (loaded.models, loaded.logits, loaded.dropped) == (3, 3 * LOGITS, LOGITS)


def test_rows_that_exceed_the_memory_go_to_disk(tmp_path: Path) -> None:
    store, receipts = ledger_of(tmp_path, share=0.5)
    settings = WorkerSettings(completion_memory=10_000, scratch=str(tmp_path))
    inside = Shard(ShardSpec(store.uri, 0, settings)).load(receipts)
    assert (inside.in_memory > 0, inside.on_disk) == (True, 0)
    for working in (10_000 - inside.in_memory, 10_000 - inside.in_memory + 1, 50_000):
        made = Shard(ShardSpec(store.uri, 0, settings, working))
        loaded = made.load(receipts)
        fits = working == 10_000 - inside.in_memory
        assert (loaded.in_memory, loaded.on_disk) == (
            (inside.in_memory, 0) if fits else (0, inside.in_memory)
        )
        assert_alike(made.sums(COLUMNS, FIT, False).columns, naive_sums(store, receipts, COLUMNS, FIT))
        made.sums(COLUMNS, replace(FIT, sample=0.5), True)


def test_the_sums_of_shards_add_up_to_those_of_one(tmp_path: Path) -> None:
    store, receipts = ledger_of(tmp_path, share=0.6)
    for fit in (FIT, replace(FIT, sample=0.5)):
        for held_out in (False, True):
            whole = shard(store, receipts).sums(COLUMNS, fit, held_out)
            first, *others = (
                shard(store, [receipt], memory=1).sums(COLUMNS, fit, held_out) for receipt in receipts
            )
            total = first
            for other in others:
                total = total + other
            np.testing.assert_allclose(total.columns.gram, whole.columns.gram, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(total.columns.target, whole.columns.target, rtol=1e-4, atol=1e-5)
            assert total.error.entries == whole.error.entries
            assert total.error.squared == pytest.approx(whole.error.squared, rel=1e-5)


def test_held_out_entries_do_not_train_and_are_predicted(tmp_path: Path) -> None:
    store, receipts = ledger_of(tmp_path, share=0.6)
    made = shard(store, receipts)
    sums = made.sums(COLUMNS, FIT, held_out=True)
    width = round(0.6 * PROBES)
    held = int(held_positions(np.ones(width, bool), FIT.held_share, np.random.default_rng(0)).sum())
    assert held == round(0.1 * width)
    assert sums.error.entries == 12 * LOGITS * held
    assert sums.columns.count.sum() == 12 * LOGITS * (width - held)
    again = made.sums(COLUMNS, FIT, held_out=True)
    assert again.error == sums.error
    np.testing.assert_array_equal(again.columns.count, sums.columns.count)
    more = made.sums(COLUMNS, replace(FIT, held_share=0.5), held_out=True)
    assert more.error.entries == 12 * LOGITS * width // 2
    other = shard(store, receipts, seed=1).sums(COLUMNS, FIT, held_out=True)
    assert not np.array_equal(other.columns.count, sums.columns.count), "another seed holds out others"
    assert sums.error.top_entries > 0
    few = made.sums(COLUMNS, replace(FIT, top_share=0.5), held_out=True).error
    assert few.top_entries > sums.error.top_entries


def test_entries_on_probes_that_all_models_see_are_not_held_out(tmp_path: Path) -> None:
    store, receipts = ledger_of(tmp_path, share=0.6)
    common = tuple(range(PROBES // 2))
    made = Shard(ShardSpec(store.uri, 0, WorkerSettings(scratch=str(tmp_path)), common=common))
    made.load(receipts)
    counts = made.sums(COLUMNS, FIT, held_out=False).columns.count
    training = made.sums(COLUMNS, replace(FIT, held_share=0.5), held_out=True).columns.count
    np.testing.assert_array_equal(training[: PROBES // 2], counts[: PROBES // 2])
    assert training[PROBES // 2 :].sum() == pytest.approx(counts[PROBES // 2 :].sum() / 2, rel=0.1)


def test_the_error_is_that_of_the_given_columns(tmp_path: Path) -> None:
    store, receipts = ledger_of(tmp_path, share=0.6, models=1)
    made = shard(store, receipts)
    fit = FIT
    result = made.sums(COLUMNS, fit, held_out=True)
    ((facts, _, values),) = observed_models(store, receipts[0])
    block = standardised(np.array(facts.probes, np.int32), values).block
    trained = result.columns.count[block.probes] > 0
    factors = row_step(block, COLUMNS, fit.regularisation, trained)
    expected = held_out_error(block, ~trained, factors, COLUMNS, fit.top_share)
    assert result.error.entries == expected.entries
    assert result.error.squared == pytest.approx(expected.squared, rel=1e-3)


def test_a_sample_is_a_part_of_the_models_and_always_the_same(tmp_path: Path) -> None:
    store, receipts = ledger_of(tmp_path, share=0.6, models=40)
    made = shard(store, receipts)
    entries = {}
    for share in (0.25, 0.75, 0.25, 1.0, 0.75):
        sums = made.sums(COLUMNS, replace(FIT, sample=share), held_out=True)
        counted = sums.error.entries
        assert entries.setdefault(share, counted) == counted
    assert 0 < entries[0.25] < entries[0.75] < entries[1.0]
    assert entries[1.0] == 40 * LOGITS * round(0.06 * PROBES)
    assert 4 <= entries[0.25] / entries[1.0] * 40 <= 16
    # Without held-out entries a sample does not matter.
    assert made.sums(COLUMNS, replace(FIT, sample=0.25), held_out=False).columns.count.sum() == (
        40 * LOGITS * round(0.6 * PROBES)
    )


def test_what_is_read_later_is_sampled_too(tmp_path: Path) -> None:
    store, receipts = ledger_of(tmp_path, share=0.6, models=40)
    fit = replace(FIT, sample=0.5)
    made = shard(store, receipts[:5])
    before = made.sums(COLUMNS, fit, held_out=True).error.entries
    made.load(receipts[5:])
    after = made.sums(COLUMNS, fit, held_out=True).error.entries
    assert before < after == shard(store, receipts).sums(COLUMNS, fit, held_out=True).error.entries


def test_models_that_saw_one_probe_hold_nothing_out(tmp_path: Path) -> None:
    store, receipts = ledger_of(tmp_path, share=1 / PROBES)
    made = Shard(ShardSpec(store.uri, 0, WorkerSettings(completion_memory=1, scratch=str(tmp_path))))
    assert made.load(receipts).models == 0, "what one probe saw is constant"
    store, receipts = ledger_of(tmp_path / "two", share=2 / PROBES)
    sums = shard(store, receipts).sums(COLUMNS, FIT, held_out=True)
    assert sums.error.entries == 12 * LOGITS


def test_equally_large_receipts_are_dealt_by_name(tmp_path: Path) -> None:
    _, (receipt, *_) = ledger_of(tmp_path, share=0.5)
    receipts = [replace(receipt, name=name) for name in "dbca"]
    assert [[item.name for item in group] for group in partition_by_rows(receipts, 2)] == [
        ["a", "c"],
        ["b", "d"],
    ]
    assert partition_by_rows([], 2) == [[], []]
    sizes = {"a": 5, "b": 4, "c": 3, "d": 3}
    unequal = [
        replace(receipt, name=name, rows=replace(receipt.rows, rows=rows)) for name, rows in sizes.items()
    ]
    assert [[item.name for item in group] for group in partition_by_rows(unequal, 2)] == [
        ["a", "d"],
        ["b", "c"],
    ]

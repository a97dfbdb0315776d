"""Receipts: what they count, whom they name as originals, and what a crash between any two writes leaves behind."""

from __future__ import annotations

import os
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from probelog.errors import FailureReason, StoreError
from probelog.storage.encoding import digest
from probelog.storage.ledger import (
    TIMED_PHASES,
    Counts,
    ItemResult,
    Ledger,
    item_key,
    key_numbers,
    observed_models,
    open_failures,
)
from probelog.storage.observations import from_rows, to_rows
from probelog.storage.parquet_parts import Part, count_rows, part_bytes, read_part, row_groups
from probelog.storage.schemas import FAILURES, OBSERVATIONS, PROBED_MODELS, WEIGHTS, Failure, ProbedModel
from probelog.storage.store import Store
from tests.support.worlds.probed_models import probed_model

SHA = "5" * 40


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Store(tmp_path), "observations/key")


def model(repo: str, sha: str = SHA, logits: int = 2, probes: int = 3, **facts: Any) -> ProbedModel:
    given: dict[str, Any] = {
        "sha": sha,
        "logits": logits,
        "labels": [f"label {i}" for i in range(logits)],
        "probes": list(range(probes)),
    }
    return probed_model(repo, **(given | facts))


def values(repo: str, logits: int = 2, probes: int = 3) -> np.ndarray:
    return np.random.default_rng([*repo.encode()]).integers(-9, 9, (logits, probes)).astype(np.float32)


def success(ledger: Ledger, repo: str, sha: str = SHA, attempt: int = 1, **facts: object) -> str:
    key = item_key(repo, sha, attempt)
    made = model(repo, sha, **facts)
    rows = to_rows(repo, sha, values(repo, made.logits, len(made.probes)))
    ledger.spool(key, ItemResult.success(made, rows))
    return key


def failure(
    ledger: Ledger, repo: str, attempt: int = 1, reason: FailureReason = FailureReason.TIMEOUT
) -> str:
    key = item_key(repo, SHA, attempt)
    ledger.spool(key, ItemResult.failure(Failure.of(repo, SHA, "probe", reason, "so", attempt)))
    return key


# Crashes


@pytest.mark.parametrize("written", range(5))
def test_a_crash_before_the_receipt_is_written_loses_no_spooled_result(
    ledger: Ledger, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [success(ledger, "a/1"), failure(ledger, "a/2")]
    real, calls = os.replace, 0

    def fail_later(source: Path, target: Path) -> None:
        nonlocal calls
        if calls == written:
            raise OSError("the machine went down")
        calls += 1
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_later)
        with pytest.raises(StoreError, match="went down"):
            ledger.seal(items)
    assert ledger.receipts() == []
    assert ledger.spooled() == set(items)
    receipt = ledger.seal(items)
    assert [found.repo for found, _, _ in observed_models(ledger.store, receipt)] == ["a/1"]
    assert ledger.spooled() == set()


def test_the_receipt_is_the_last_that_is_written(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    items, targets, real = [success(ledger, "a/1")], [], os.replace

    def record(source: Path, target: Path) -> None:
        targets.append(Path(target).parent.name)
        real(source, target)

    monkeypatch.setattr(os, "replace", record)
    ledger.seal(items)
    assert sorted(targets[:-1]) == ["failures", "models", "observations", "weights"]
    assert targets[-1] == "receipts"


def test_what_a_crash_left_of_a_sealed_spool_is_dropped_and_nothing_else(ledger: Ledger) -> None:
    sealed = [success(ledger, "a/1"), success(ledger, "a/2")]
    receipt = ledger.seal(sealed)
    success(ledger, "a/1")
    waiting = success(ledger, "a/3")
    ledger.drop_sealed_spool([receipt])
    assert ledger.spooled() == {waiting}


# What a receipt says


def test_a_receipt_counts_what_its_parts_hold(ledger: Ledger) -> None:
    seconds = {f"seconds_{phase}": 2.0**place for place, phase in enumerate(TIMED_PHASES)}
    items = [
        success(ledger, "a/1", bytes=100, identity="one", **seconds),
        success(ledger, "a/2", logits=5, identity="one", copy_of_repo="a/1", copy_of_sha=SHA, bytes=7),
        success(ledger, "a/3", logits=1, bytes=None, seconds_load=0.5),
        failure(ledger, "b/1"),
        failure(ledger, "b/2", reason=FailureReason.GATED),
        failure(ledger, "b/3"),
    ]
    receipt = ledger.seal(items, {"timeout": 2})
    assert receipt.counts == Counts(
        indexed=3,
        copies=1,
        logits=8,
        bytes=107,
        failed={"gated": 1, "timeout": 2},
        replaced={"timeout": 2},
        seconds={phase: 2.0**place + 0.5 * (phase == "load") for place, phase in enumerate(TIMED_PHASES)},
    )
    assert ledger.receipt(receipt.name) == receipt == ledger.receipts([receipt.name])[0]
    parts = [receipt.observations, receipt.models, receipt.failures]
    assert [part.rows for part in parts] == [8, 3, 3]
    assert count_rows(map(asdict, parts)) == 14
    for part in (*parts, receipt.weights):
        data = ledger.store.read(part.path)
        assert (part.size, part.sha256) == (len(data), digest(data))


def test_only_what_was_run_is_an_original_and_of_two_the_first(ledger: Ledger) -> None:
    items = [
        success(ledger, "a/copy", identity="one", copy_of_repo="z/run", copy_of_sha=SHA),
        success(ledger, "z/run", identity="one"),
        success(ledger, "b/first", identity="two"),
        success(ledger, "c/second", identity="two"),
        success(ledger, "d/unknown"),
        success(ledger, "e/copy", identity="three", copy_of_repo="elsewhere/x", copy_of_sha=SHA),
    ]
    assert ledger.seal(items).originals == {"one": ["z/run", SHA], "two": ["b/first", SHA]}


def test_models_are_sorted_whatever_the_order_of_items(ledger: Ledger) -> None:
    items = [success(ledger, repo, sha) for repo, sha in (("b", "1"), ("a", "2"), ("a", "1"), ("c", "0"))]
    receipt = ledger.seal(items)
    order = [(found.repo, found.sha) for found, _, _ in observed_models(ledger.store, receipt)]
    assert order == [("a", "1"), ("a", "2"), ("b", "1"), ("c", "0")]
    assert [(m.repo, m.sha) for m in ledger.models([receipt])] == order


def test_the_layers_of_a_model_are_kept(ledger: Ledger) -> None:
    weights = WEIGHTS.empty_table()
    columns = {
        field.name: pa.array(["a/1"] if pa.types.is_string(field.type) else [None], field.type)
        for field in WEIGHTS
    }
    weights = pa.table(columns, WEIGHTS)
    made = ItemResult.success(model("a/1"), to_rows("a/1", SHA, values("a/1")), weights)
    ledger.spool("k", made)
    back = ledger.spooled_result("k")
    assert back is not None
    assert back.weights == weights
    assert read_part(ledger.store, ledger.seal(["k"]).weights, WEIGHTS) == weights


def test_receipts_by_name_and_what_is_not_there(ledger: Ledger) -> None:
    receipts = [ledger.seal([success(ledger, f"a/{number}")]) for number in range(3)]
    names = sorted(receipt.name for receipt in receipts)
    assert ledger.receipt_names() == names
    assert [receipt.name for receipt in ledger.receipts(names[::-1][:2])] == names[1:]
    with pytest.raises(FileNotFoundError):
        ledger.receipt("none")
    assert ledger.spooled_result("none") is None


@pytest.mark.parametrize(
    "lost",
    ["observations", "models", "failures", "weights", "counts", "originals", "items", "name", "version"],
)
def test_a_receipt_without_one_of_its_entries_is_damaged(ledger: Ledger, lost: str) -> None:
    receipt = ledger.seal([success(ledger, "a/1")])
    content = receipt.to_json()
    del content[lost]
    ledger.store.write_json(f"observations/key/receipts/{receipt.name}.json", content)
    with pytest.raises(StoreError, match=rf"{receipt.name}.json is damaged"):
        ledger.receipt(receipt.name)


# Looking up one model


def test_one_model_out_of_a_receipt(ledger: Ledger) -> None:
    receipt = ledger.seal(
        [success(ledger, "a/1"), success(ledger, "a/1", "6" * 40), success(ledger, "a/2", logits=4)]
    )
    found = ledger.sealed_result(receipt.name, "a/2", SHA)
    assert found is not None
    assert found[0] == model("a/2", logits=4)
    np.testing.assert_array_equal(from_rows(found[1]), values("a/2", 4))
    other = ledger.sealed_result(receipt.name, "a/1", "6" * 40)
    assert other is not None
    assert set(other[1]["sha"].to_pylist()) == {"6" * 40}
    assert ledger.sealed_result(receipt.name, "a/2", "6" * 40) is None
    assert ledger.sealed_result("none", "a/2", SHA) is None


def test_a_model_whose_rows_are_not_all_there_is_none(ledger: Ledger) -> None:
    made = model("a/1", logits=3)
    ledger.spool("k", ItemResult.success(made, to_rows("a/1", SHA, values("a/1", 2))))
    receipt = ledger.seal(["k"])
    assert ledger.sealed_result(receipt.name, "a/1", SHA) is None
    with pytest.raises(StoreError, match="does not hold a/1 as recorded"):
        list(observed_models(ledger.store, receipt))


@pytest.mark.parametrize("repo", ["a/other", "a/1"])
def test_observations_of_another_model_or_of_other_probes(ledger: Ledger, repo: str) -> None:
    probes = 3 if repo == "a/other" else 2
    ledger.spool("k", ItemResult.success(model("a/1"), to_rows(repo, SHA, values(repo, 2, probes))))
    with pytest.raises(StoreError, match="does not hold a/1 as recorded"):
        list(observed_models(ledger.store, ledger.seal(["k"])))


def test_models_of_any_size_are_read_group_by_group(ledger: Ledger) -> None:
    sizes = {f"a/{number}": logits for number, logits in enumerate([399, 1, 1, 900, 3, 400, 2])}
    receipt = ledger.seal([success(ledger, repo, logits=logits) for repo, logits in sizes.items()])
    for found, logits, matrix in observed_models(ledger.store, receipt):
        assert logits.tolist() == list(range(sizes[found.repo]))
        np.testing.assert_array_equal(matrix, values(found.repo, sizes[found.repo]))
    tables = [pa.table({"x": range(rows)}) for rows in sizes.values()]
    grouped = [[table.num_rows for table in group] for group in row_groups(tables)]
    assert grouped == [[399, 1], [1, 900], [3, 400], [2]]
    tables = [pa.table({"x": range(rows)}) for rows in (400, 399, 1, 1)]
    grouped = [[table.num_rows for table in group] for group in row_groups(tables)]
    assert grouped == [[400], [399, 1], [1]]


# Spooled results


def test_a_spooled_result_that_is_damaged(ledger: Ledger) -> None:
    data = ItemResult.success(model("a/1"), to_rows("a/1", SHA, values("a/1"))).to_bytes()
    at = data.index(b"label 0")
    for damaged in (
        data[:-1],
        data[:-32],
        data[:-1] + bytes([data[-1] ^ 1]),
        data[:at] + b"L" + data[at + 1 :],
        data[: len(data) // 2],
        b"",
    ):
        with pytest.raises(StoreError, match="a spooled result is damaged"):
            ItemResult.from_bytes(damaged)


def test_keys_of_items() -> None:
    assert item_key("a/1", SHA) == item_key("a/1", SHA, 1)
    assert len({item_key("a/1", SHA, attempt) for attempt in (1, 2)} | {item_key("a/2", SHA)}) == 3
    assert key_numbers(["00000000000000ff", "ffffffffffffffff"]).tolist() == [255, 2**64 - 1]


# Counting over receipts


def test_counts_add_up() -> None:
    one = Counts(3, 1, 8, 100, {"timeout": 3, "gated": 1}, {"timeout": 1}, {"load": 1.5})
    other = Counts(1, 2, 2, 50, {"gated": 4, "too-large": 1}, {"too-large": 1}, {"load": 1.0, "forward": 2.0})
    both = one + other
    assert both == Counts(
        4, 3, 10, 150,
        {"gated": 5, "timeout": 3, "too-large": 1},
        {"timeout": 1, "too-large": 1},
        {"forward": 2.0, "load": 2.5},
    )  # fmt: skip
    assert list(both.failures.items()) == [("gated", 5), ("timeout", 2)]
    assert Counts() + Counts() == Counts()


def test_the_last_failure_of_each_model_counts(ledger: Ledger) -> None:
    gated = FailureReason.GATED
    rounds = [
        [failure(ledger, "b/1"), failure(ledger, "a/1"), failure(ledger, "a/2"), success(ledger, "c/1")],
        [failure(ledger, "b/1", 2, gated), success(ledger, "a/1", attempt=2)],
        [failure(ledger, "b/1", 3)],
    ]
    receipts = [ledger.seal(items) for items in rounds]
    sealed = key_numbers(item for items in rounds for item in items)
    for order in (receipts, receipts[::-1]):
        found = ledger.failures(order, ledger.models(order))
        assert [(f.repo, f.attempts) for f in found] == [("a/2", 1), ("b/1", 3)]
        rows = ledger.failure_rows(order)
        assert rows.num_rows == 5
        last = open_failures(rows, sealed)
        assert list(zip(last["repo"].to_pylist(), last["attempts"].to_pylist(), strict=True)) == [
            ("a/2", 1), ("b/1", 3),
        ]  # fmt: skip
    assert ledger.failure_rows([]).schema == FAILURES
    assert open_failures(FAILURES.empty_table(), sealed).num_rows == 0


def test_failures_of_one_repository_at_two_commits_are_two(ledger: Ledger) -> None:
    rows = []
    for sha in ("1", "2"):
        key = item_key("a/1", sha)
        failed = Failure.of("a/1", sha, "probe", FailureReason.TIMEOUT, "so")
        ledger.spool(key, ItemResult.failure(failed))
        rows.append(key)
    receipt = ledger.seal(rows)
    found = open_failures(ledger.failure_rows([receipt]), key_numbers(rows))
    assert found["sha"].to_pylist() == ["1", "2"]
    assert [failed.sha for failed in ledger.failures([receipt], [])] == ["1", "2"]


# Parts


def test_a_part_is_read_only_if_size_and_digest_are_those_of_its_receipt(tmp_path: Path) -> None:
    store, data = Store(tmp_path), part_bytes([to_rows("a/1", SHA, values("a/1"))], OBSERVATIONS)
    store.write("part", data)
    part = Part("part", 2, len(data), digest(data))
    assert read_part(store, part, OBSERVATIONS).num_rows == 2
    columns = read_part(store, part, OBSERVATIONS, ["logit", "unheard-of", "repo"]).column_names
    assert sorted(columns) == ["logit", "repo"]
    for wrong in (replace(part, size=part.size + 1), replace(part, sha256="0" * 64)):
        with pytest.raises(StoreError, match="its digest is not the one in its receipt"):
            read_part(store, wrong, OBSERVATIONS)


def test_numbers_are_stored_as_the_schema_needs_them() -> None:
    rng = random.Random(0)
    table = to_rows("a/1", SHA, [[rng.gauss(0, 3) for _ in range(50)] for _ in range(40)])
    import pyarrow.parquet as pq

    file = pq.ParquetFile(pa.BufferReader(part_bytes([table], OBSERVATIONS)))
    columns = [file.metadata.row_group(0).column(i) for i in range(len(file.metadata.schema))]
    by_name = {column.path_in_schema: column for column in columns}
    assert {column.compression for column in columns} == {"ZSTD"}
    assert "BYTE_STREAM_SPLIT" in by_name["values.list.element"].encodings
    assert not by_name["values.list.element"].has_dictionary_page
    assert by_name["repo"].has_dictionary_page
    assert not any(column.is_stats_set for column in columns), "they would take space and help nobody"
    assert file.read() == table
    assert pq.read_table(pa.BufferReader(part_bytes([], PROBED_MODELS))).num_rows == 0


# Rows of observations


@pytest.mark.parametrize(
    ("low", "high"),
    [(-3.0, 3.0), (0.0, 29_000.0), (-1e6, 2e6), (1e-6, 2e-6), (1e9, 1e9 + 500), (-1e30, 1e30), (0.0, 0.0)],
)
def test_logits_of_any_size_keep_their_digits(low: float, high: float) -> None:
    given = np.linspace(low, high, 64).reshape(1, -1).astype(np.float32)
    table = to_rows("a/1", SHA, np.concatenate([given, given[:, ::-1]]))
    found = from_rows(table)
    span = np.abs(given - given.mean()).max() if low > 1e8 else np.abs(given).max()
    np.testing.assert_allclose(found[0], given[0], rtol=0, atol=float(span) / 1024)
    np.testing.assert_array_equal(found[1], found[0][::-1])
    scale, offset = table["scale"][0].as_py(), table["offset"][0].as_py()
    assert np.log2(scale) == int(np.log2(scale))
    assert (offset == 0.0) == (low <= 1e8)
    assert (scale == 1.0) == (2.0**-10 <= np.abs(given[0] - offset).max() <= 30_000.0 or high == low)


@pytest.mark.parametrize(
    ("given", "offset", "scale"),
    [
        ([0.0, 0.5], 0.0, 1.0),
        ([0.0, 2.0**-10], 0.0, 1.0),
        ([0.0, 2.0**-11], 0.0, 2.0**-23),
        ([0.0, 30_000.0], 0.0, 1.0),
        ([0.0, 32_768.0], 0.0, 8.0),
        ([15.0, 16.0], 0.0, 1.0),  # a spread of just a sixteenth
        ([15.03125, 16.0], 15.515625, 1.0),
        ([-16.0, -15.03125], -15.515625, 1.0),
        ([0.0, 2.0**-120], 0.0, 2.0**-126),
        ([1.0, 1.0 + 2.0**-11], 1.0 + 2.0**-12, 2.0**-24),  # both: far from 0, and nearly alike
        ([2.0**20, 2.0**20 + 2.0**16], 2.0**20 + 2.0**15, 8.0),
    ],
)
def test_offset_and_scale_of_a_row(given: list[float], offset: float, scale: float) -> None:
    table = to_rows("a", SHA, [given])
    assert (table["offset"][0].as_py(), table["scale"][0].as_py()) == (offset, scale)
    assert from_rows(table)[0].tolist() == given


def test_what_is_no_matrix_of_numbers_is_refused() -> None:
    for wrong in ([1.0, 2.0], [[np.nan]], [[np.inf]], [[[1.0]]]):
        with pytest.raises(ValueError, match="must be a matrix of finite numbers"):
            to_rows("a/1", SHA, wrong)
    with pytest.raises(ValueError, match="not of one model"):
        from_rows(pa.concat_tables([to_rows("a", SHA, [[1.0]]), to_rows("b", SHA, [[1.0, 2.0]])]))
    assert from_rows(to_rows("a", SHA, np.empty((0, 4)))).shape == (0, 0)
    assert from_rows(to_rows("a", SHA, np.empty((3, 0)))).shape == (3, 0)
    largest = float(np.finfo(np.float32).max)
    assert np.isfinite(from_rows(to_rows("a", SHA, [[largest, -largest]]))).all()

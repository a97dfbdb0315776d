"""A shard's rows: the same wherever they are kept, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.completion import rows
from cluster.completion.rows import RowStore
from probelog.completion.als import Block, standardised
from probelog.errors import UsageError
from tests.support.paths import CHECKOUT


def blocks(count: int = 30) -> list[Block]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        height, width = int(rng.integers(1, 40)), int(rng.integers(2, 60))
        probes = np.sort(rng.choice(100, width, replace=False)).astype(np.int32)
        found.append(standardised(probes, rng.standard_normal((height, width))).block)
    return found


def filled(folder: Path, memory: int) -> RowStore:
    store = RowStore(folder, memory)
    for number, block in enumerate(blocks()):
        store.add(2**63 + number, block)
    store.settle()
    return store


@pytest.mark.parametrize("memory", [0, 20_000, 10**9])
def test_rows_come_back_in_order_wherever_they_are(
    tmp_path: Path, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_CHUNK_BYTES", 10_000)
    store = filled(tmp_path, memory)
    assert store.in_memory <= memory
    assert (store.on_disk > 0) == (memory < 10**9)
    assert not list(tmp_path.iterdir()), "the file has no name"
    for _ in range(2):
        found = 0
        for number, model in enumerate(store.models()):
            expected = blocks()[number]
            block = store.widened(model)
            assert model.key == 2**63 + number
            np.testing.assert_array_equal(block.probes, expected.probes)
            # Half a step of 16 bits, and a little for the scale's own rounding.
            step = np.abs(expected.values).max(axis=1, keepdims=True) / 32767
            assert (np.abs(block.values - expected.values) <= 0.51 * step).all()
            found += 1
        assert found == 30
    store.close()


def test_a_sample_is_a_store_of_its_own(tmp_path: Path) -> None:
    store, sample = filled(tmp_path, 0), RowStore(tmp_path, 10**9)
    for model in store.models():
        if model.key % 2:
            sample.copy(model)
    copied = list(sample.models())
    odd = [model.key for model in store.models() if model.key % 2]
    assert [model.key for model in copied] == odd
    np.testing.assert_array_equal(
        sample.widened(copied[3]).values, store.widened(list(store.models())[7]).values
    )


def test_a_sample_keeps_its_rows_while_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read from disk is good until the next piece is read into the same memory."""
    monkeypatch.setattr(rows, "_CHUNK_BYTES", 10_000)
    store = filled(tmp_path, 0)
    monkeypatch.setattr(rows, "_CHUNK_BYTES", 10**9)
    sample = RowStore(tmp_path, 10**9)
    for model in store.models():
        sample.copy(model)
    expected = [store.widened(model).values.copy() for model in store.models()]
    for copied, values in zip(sample.models(), expected, strict=True):
        np.testing.assert_array_equal(sample.widened(copied).values, values)


def test_a_disk_that_takes_little_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [model.entries.copy() for model in filled(tmp_path, 10**9).models()]
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: write(file, data[:5000], place))
    monkeypatch.setattr(os, "preadv", lambda file, views, place: read(file, [views[0][:3000]], place))
    store = filled(tmp_path, 0)
    for model, entries in zip(store.models(), expected, strict=True):
        np.testing.assert_array_equal(model.entries, entries)


def test_nothing_is_left_after_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.cluster.completion.test_rows import filled\n"
        "store = filled(Path(sys.argv[1]), 0); assert store.on_disk\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=CHECKOUT)
    assert done.returncode == -9
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UsageError, match="set `scratch` to a larger disk"):
        filled(tmp_path, 0)

"""A writer says again and again that it is at work, and counts what it writes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from probelog.errors import StoreError
from probelog.index.schema import META
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.lifecycle import read_files
from probelog.storage.encoding import digest
from probelog.storage.layout import FILES, HOLD
from probelog.storage.store import Store


def one(key: str) -> pa.Table:
    return pa.table({"key": [key], "value": [b"x"]}, META)


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    return tmp_path / "generations/a" / HOLD


def test_a_hold_is_renewed_once_a_minute_while_a_table_is_written(
    tmp_path: Path, hold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    writer = GenerationWriter(Store(tmp_path), "a")
    renewed: list[bool] = []

    def batches() -> Iterator[pa.Table]:
        for passed in (0.0, 60.0, 0.5, 30.0, 31.0):
            os.utime(hold, (0, 0))
            now[0] += passed
            yield one("k")
            # The next batch is asked for after this one was counted.
            renewed.append(hold.stat().st_mtime > 0)

    assert writer.write("meta", META, batches()) == 5
    assert renewed == [False, False, True, False, True]


def test_a_hold_is_renewed_before_every_table_and_at_the_end(tmp_path: Path, hold: Path) -> None:
    writer = GenerationWriter(Store(tmp_path), "a")
    os.utime(hold, (0, 0))
    writer.write_meta({"x": b"1"})
    assert hold.stat().st_mtime > 0
    os.utime(hold, (0, 0))
    found = writer.finish()
    assert hold.stat().st_mtime > 0
    assert found == digest((hold.parent / FILES).read_bytes())
    assert all(name.startswith("meta.lance/") for name in read_files(Store(tmp_path), "a")[0])


def test_a_writer_whose_hold_was_taken_stops(tmp_path: Path, hold: Path) -> None:
    writer = GenerationWriter(Store(tmp_path), "a")
    hold.unlink()
    for step in (lambda: writer.write_meta({"x": b"1"}), writer.finish):
        with pytest.raises(StoreError, match="was retired by a sweep"):
            step()
    assert not (hold.parent / FILES).exists()


def test_a_table_of_no_rows(tmp_path: Path) -> None:
    writer = GenerationWriter(Store(tmp_path), "a")
    assert writer.write("meta", META, []) == 0
    assert writer.open("meta").count_rows() == 0


def test_a_store_that_refuses_a_table(tmp_path: Path, hold: Path) -> None:
    writer = GenerationWriter(Store(tmp_path), "a")
    (hold.parent / "meta.lance").write_text("in the way")
    with pytest.raises(StoreError, match=r"generation a cannot be written \(meta\): "):
        writer.write_meta({"x": b"1"})

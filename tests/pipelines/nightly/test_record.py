"""What nightly runs keep between them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.nightly.record import NightlyFiles, NightlyRecord
from probelog.errors import SchemaVersionError, StoreError
from probelog.storage.ledger import Ledger, item_key
from probelog.storage.schemas import CatalogueRow
from probelog.storage.store import Store
from tests.probelog.storage.test_ledger import fail, spool

EMPTY = NightlyRecord("base", "2025-01-01T00:00:00+00:00", "2025-01-02T00:00:00+00:00")
ROWS = [CatalogueRow("b/2", "2", downloads=7), CatalogueRow("a/1", "1")]


@pytest.fixture
def files(tmp_path: Path) -> NightlyFiles:
    return NightlyFiles(Store(tmp_path), "key", "base")


def catalogues(files: NightlyFiles) -> list[str]:
    return files.store.names(files.ledger.folder, suffix=".parquet")


def test_a_record_is_read_as_it_was_written(files: NightlyFiles) -> None:
    assert files.read() is None
    assert (files.key, files.ledger.folder) == ("key-base", "observations/key-base")
    removed = {"c/3": {"sha": "3", "reason": "removed", "detail": "gone"}}
    written = files.write(replace(EMPTY, removed=removed), ROWS)
    assert files.read() == written
    assert (written.removed, written.watermark, written.base) == (removed, EMPTY.watermark, "base")
    assert written.rows is not None
    assert written.rows.rows == 2
    assert files.rows(written) == sorted(ROWS, key=lambda row: row.repo)
    assert files.rows(EMPTY) == []


def test_an_older_catalogue_is_deleted_once_the_record_names_the_newer(
    files: NightlyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = files.write(EMPTY, ROWS)
    real, listed = Store.delete, []

    def delete(self: Store, name: str) -> None:
        listed.append((name, files.read()))
        real(self, name)

    monkeypatch.setattr(Store, "delete", delete)
    assert files.write(first, ROWS[::-1]) == first
    assert listed == []
    second = files.write(first, ROWS[:1])
    assert first.rows is not None
    assert second.rows is not None
    assert listed == [(first.rows.path, second)]
    assert catalogues(files) == [second.rows.path]
    assert files.write(second, []).rows is None
    assert catalogues(files) == []


def test_a_record_names_no_catalogue_that_is_not_there_yet(
    files: NightlyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, read = Store.write_json, list[int]()

    def write(self: Store, name: str, value: Any) -> None:
        real(self, name, value)
        record = files.read()
        assert record is not None
        read.append(len(files.rows(record)))

    monkeypatch.setattr(Store, "write_json", write)
    files.write(files.write(EMPTY, ROWS), ROWS[:1])
    assert read == [2, 1]


def test_a_record_that_is_damaged_or_newer(files: NightlyFiles) -> None:
    name = files.ledger.paths.nightly_record
    content = asdict(EMPTY)
    assert content["version"] == 1
    files.store.write_json(name, content)
    assert files.read() == EMPTY
    for change in ({"rows": {"path": "x"}}, {"unheard-of": 1}):
        files.store.write_json(name, content | change)
        with pytest.raises(StoreError, match=r"night.json is damaged"):
            files.read()
    for lost in ("rows", "base", "reconciled"):
        files.store.write_json(name, {key: value for key, value in content.items() if key != lost})
        with pytest.raises(StoreError, match=r"night.json is damaged"):
            files.read()
    files.store.write_json(name, content | {"version": 99})
    with pytest.raises(SchemaVersionError):
        files.read()


def test_receipts_are_entered_in_the_main_ledger_once(files: NightlyFiles) -> None:
    receipt = files.ledger.seal([spool(files.ledger, "a/1"), fail(files.ledger, "a/2")])
    other = files.ledger.seal([spool(files.ledger, "a/3")])
    main = Ledger(files.store, "observations/key")
    files.enter_in_main([receipt.name])
    assert main.receipts() == [receipt]
    assert [model.repo for model in main.models(main.receipts())] == ["a/1"]
    path = f"observations/key/receipts/{receipt.name}.json"
    before = (Path(files.store.uri) / path).stat().st_mtime_ns
    files.enter_in_main([receipt.name, other.name])
    assert (Path(files.store.uri) / path).stat().st_mtime_ns == before
    assert main.receipt_names() == sorted([receipt.name, other.name])
    assert item_key("a/1", "s" * 40) in receipt.items

"""Bundles save requests and nothing else: whatever becomes of them, a ledger reads as without."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from pipelines.inspect.verify import verify
from pipelines.job.progress import Report
from probelog.errors import StoreError
from probelog.storage import ledger as ledger_module
from probelog.storage.bundles import Bundles
from probelog.storage.ledger import LEDGER_VERSION, Ledger, Receipt
from probelog.storage.store import Store
from tests.probelog.storage.test_ledger import fail, spool

FOLDER = "observations/key"


class Recorded(Store):
    """A store that notes what is read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seen: list[str] = []

    def read(self, name: str, most: int | None = None) -> bytes:
        self.seen.append(name)
        return super().read(name, most)


@pytest.fixture(autouse=True)
def _bundles_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "BUNDLED", 2)


@pytest.fixture
def sealed(tmp_path: Path) -> list[Receipt]:
    """Five batches, the last without a failure; four of them bundled, two and two."""
    ledger = Ledger(Store(tmp_path), FOLDER)
    ledger.store.write_json(ledger.paths.manifest, {"probe_set": "p", "version": LEDGER_VERSION})
    for number in range(5):
        items = [spool(ledger, f"a/{number}"), spool(ledger, f"b/{number}")]
        ledger.seal(items + [fail(ledger, f"c/{number}-{i}") for i in range(4 - number)])
    receipts = ledger.receipts()
    ledger.bundle(receipts)
    return receipts


def opened(folder: Path) -> tuple[Ledger, Recorded]:
    store = Recorded(folder)
    return Ledger(store, FOLDER), store


def bundles(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER / "bundles").iterdir())


def test_a_bundled_ledger_reads_as_before_with_fewer_requests(sealed: list[Receipt], tmp_path: Path) -> None:
    ledger, store = opened(tmp_path)
    assert ledger.receipts() == sealed
    assert [name.split("/")[2] for name in sorted(store.seen)] == ["bundles", "bundles", "receipts"]
    store.seen.clear()
    rows = ledger.failure_rows(sealed)
    assert rows.num_rows == 4 + 3 + 2 + 1
    assert [name.split("/")[2] for name in store.seen].count("failures") <= 1
    alone = [Ledger(Store(tmp_path), FOLDER).failure_rows([receipt]) for receipt in sealed]
    assert sorted(rows.to_pylist(), key=str) == sorted((row for t in alone for row in t.to_pylist()), key=str)


def test_only_what_is_not_bundled_is_bundled_next(sealed: list[Receipt], tmp_path: Path) -> None:
    first = bundles(tmp_path)
    ledger, _ = opened(tmp_path)
    ledger.seal([spool(ledger, "d/1"), fail(ledger, "d/2")])
    ledger.bundle(ledger.receipts())
    assert len(bundles(tmp_path)) == len(first) + 1
    assert set(first) < set(bundles(tmp_path))
    ledger.bundle(ledger.receipts())
    assert len(bundles(tmp_path)) == len(first) + 1


def test_a_receipt_that_was_removed_is_not_read_from_a_bundle(sealed: list[Receipt], tmp_path: Path) -> None:
    (tmp_path / FOLDER / "receipts" / f"{sealed[0].name}.json").unlink()
    assert opened(tmp_path)[0].receipts() == sealed[1:]


def test_a_damaged_bundle_is_passed_over_and_named(sealed: list[Receipt], tmp_path: Path) -> None:
    before = verify(str(tmp_path), Report(io.StringIO()))
    assert before.clean
    assert not before.unexpected
    broken, other = bundles(tmp_path)
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 1
    broken.write_bytes(content)
    ledger, _ = opened(tmp_path)
    assert ledger.receipts() == sealed
    assert ledger.failure_rows(sealed).num_rows == 10
    with pytest.raises(StoreError, match="it is a copy of receipts, delete it"):
        Bundles(ledger.store, ledger.paths).read(broken.relative_to(tmp_path).as_posix())
    assert [item["path"] for item in verify(str(tmp_path), Report(io.StringIO())).damaged] == [
        broken.relative_to(tmp_path).as_posix()
    ]
    assert other.exists()


def test_a_store_that_refuses_is_no_error(sealed: list[Receipt], tmp_path: Path) -> None:
    class Refusing(Store):
        def write(self, name: str, data: bytes) -> None:
            raise StoreError("full")

    ledger = Ledger(Refusing(tmp_path), FOLDER)
    ledger.bundle(sealed)
    assert ledger.receipts() == sealed

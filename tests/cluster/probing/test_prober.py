"""What a worker makes of errors, without a Ray around it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cluster.probing.drain import Drain
from cluster.probing.prober import Prober
from cluster.probing.results import ItemReport
from cluster.runtime.settings import WorkerSettings
from pipelines.probe.plan import Item
from probelog.hub.usage import METER
from probelog.storage.ledger import Ledger
from probelog.storage.schemas import CatalogueRow, Failure, from_table
from probelog.storage.store import Store

ITEM = Item("0123456789abcdef", CatalogueRow("ada/resnet", "1" * 40), 1, 0, 100.0)


@pytest.fixture
def prober(tmp_path: Path) -> Prober:
    """One that can write results, and nothing more: its folder for downloads is nowhere."""
    made: Prober = Prober.__new__(Prober)
    made._ledger = Ledger(Store(tmp_path), "observations/key")
    made._settings = WorkerSettings(store_retry_seconds=0.0)
    made._name = "host:1"
    made._drain = Drain.__new__(Drain)
    made._drain._noticed = threading.Event()
    made._reporting, made._reported = threading.Lock(), METER.total
    return made


def failed(prober: Prober) -> tuple[str, str]:
    """The row of a failure, which is also what is reported."""
    report = prober._attempt(ITEM)
    assert isinstance(report, ItemReport)
    result = prober._ledger.spooled_result(ITEM.key)
    assert result is not None
    (row,) = from_table(result.failures, Failure)
    assert (row.reason, row.detail) == (report.reason, report.detail)
    return row.reason, row.detail


def test_an_error_of_ours_leaves_its_traceback_in_the_log(
    prober: Prober, caplog: pytest.LogCaptureFixture
) -> None:
    assert failed(prober) == ("internal", "AttributeError: 'Prober' object has no attribute '_own'")
    (record,) = caplog.records
    assert record.getMessage() == f"ada/resnet@{'1' * 40}: internal error"
    assert record.exc_info is not None
    assert "in _one" in caplog.text


def test_a_store_that_refuses_to_be_read_leaves_none(
    prober: Prober, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "observations").mkdir()
    monkeypatch.setattr(prober, "_one", lambda *_: Store(tmp_path).read("observations"), raising=False)
    reason, detail = failed(prober)
    assert reason == "store-failed"
    assert detail.startswith(f"{tmp_path}/observations cannot be read: ")
    assert not caplog.records

"""``probelog-index verify`` compares what a receipt counts with what its parts hold."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.inspect.verify import verify
from pipelines.job.progress import Report
from probelog.errors import FailureReason
from probelog.storage.ledger import ItemResult, Ledger, Receipt, item_key
from probelog.storage.observations import to_rows
from probelog.storage.schemas import Failure, ProbedModel
from probelog.storage.store import Store

MODEL = ProbedModel(
    repo="a/1", sha="1", logits=2, head="softmax", labels=["x", "y"], probes=[0, 1, 2], library="timm",
    architecture="test", parameters=10, recipe="{}", dtype="float32", device="cpu", weight_digest="d",
    weight_mean=0.0, weight_std=1.0,
)  # fmt: skip


@pytest.fixture
def sealed(tmp_path: Path) -> tuple[Ledger, Receipt]:
    ledger = Ledger(Store(tmp_path), "observations/0123456789abcdef")
    ledger.store.write_json(f"{ledger.folder}/manifest.json", {"version": 1})
    items = [item_key("a/1", "1"), item_key("a/2", "1")]
    ledger.spool(items[0], ItemResult.success(MODEL, to_rows("a/1", "1", [[1, 2, 3], [4, 5, 6]])))
    failed = Failure.of("a/2", "1", "probe", FailureReason.TIMEOUT, "so")
    ledger.spool(items[1], ItemResult.failure(failed))
    return ledger, ledger.seal(items)


def problems(ledger: Ledger) -> list[str]:
    found = verify(ledger.store.uri, Report(io.StringIO()))
    return [item["problem"] if "problem" in item else str(item) for item in found.damaged]


def test_a_receipt_that_counts_what_its_parts_hold(sealed: tuple[Ledger, Receipt]) -> None:
    assert problems(sealed[0]) == []


@pytest.mark.parametrize(
    "wrong", [{"indexed": 2}, {"logits": 3}, {"failed": {"timeout": 2}}, {"failed": {}}], ids=str
)
def test_a_receipt_that_counts_something_else(
    sealed: tuple[Ledger, Receipt], wrong: dict[str, object]
) -> None:
    ledger, receipt = sealed
    changed = replace(receipt, counts=replace(receipt.counts, **wrong))
    ledger.store.write_json(f"{ledger.folder}/receipts/{receipt.name}.json", changed.to_json())
    assert any("it counts other rows than its parts have" in problem for problem in problems(ledger))


def test_a_part_with_other_rows_than_its_receipt_says(sealed: tuple[Ledger, Receipt]) -> None:
    ledger, receipt = sealed
    part = replace(receipt.models, rows=2)
    ledger.store.write_json(
        f"{ledger.folder}/receipts/{receipt.name}.json", replace(receipt, models=part).to_json()
    )
    assert any("it has 1 rows" in problem and "says 2" in problem for problem in problems(ledger))

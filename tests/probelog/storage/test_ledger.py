"""The ledger: nothing is lost between spool and receipt, and the same plan gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from probelog.errors import FailureReason, StoreError
from probelog.storage.ledger import SAMPLED, ItemResult, Ledger, item_key, observed_models
from probelog.storage.observations import to_rows
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import FAILURES, OBSERVATIONS, SAMPLES, Failure, ProbedModel, SampledModel
from probelog.storage.store import Store
from tests.support.worlds.probed_models import probed_model


def model(repo: str, logits: int = 3, probes: int = 7, **facts) -> ProbedModel:
    given = {
        "sha": "s" * 40,
        "logits": logits,
        "labels": [f"label {i}" for i in range(logits)],
        "probes": list(range(0, 2 * probes, 2)),
    }
    return probed_model(repo, **(given | facts))


def values(repo: str, logits: int = 3, probes: int = 7) -> np.ndarray:
    rng = np.random.default_rng(abs(hash(repo)) % 1000)
    return rng.standard_normal((logits, probes)).astype(np.float16).astype(np.float32)


def spool(ledger: Ledger, repo: str) -> str:
    key = item_key(repo, "s" * 40)
    ledger.spool(key, ItemResult.success(model(repo), to_rows(repo, "s" * 40, values(repo))))
    return key


def fail(ledger: Ledger, repo: str, attempt: int = 1) -> str:
    key = item_key(repo, "s" * 40, attempt)
    failure = Failure.of(repo, "s" * 40, "probe", FailureReason.TIMEOUT, "too slow", attempt)
    ledger.spool(key, ItemResult.failure(failure))
    return key


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Store(tmp_path), "observations/x")


def test_a_sealed_batch_holds_what_was_spooled(ledger: Ledger) -> None:
    items = [spool(ledger, "b/2"), fail(ledger, "a/3"), spool(ledger, "a/1")]
    assert ledger.spooled() == set(items)
    receipt = ledger.seal(items)
    assert ledger.spooled() == set()
    assert ledger.receipts() == [receipt]
    assert receipt.items == sorted(items)
    assert (receipt.observations.rows, receipt.models.rows, receipt.failures.rows) == (6, 2, 1)
    found = list(observed_models(ledger.store, receipt))
    assert [facts.repo for facts, _, _ in found] == ["a/1", "b/2"]
    for facts, logits, matrix in found:
        np.testing.assert_array_equal(matrix, values(facts.repo))
        assert logits.tolist() == [0, 1, 2]
    assert ledger.models([receipt]) == [model("a/1"), model("b/2")]
    assert [f.repo for f in ledger.failures([receipt], [])] == ["a/3"]


def test_a_ledger_of_generators(tmp_path: Path) -> None:
    ledger = Ledger(Store(tmp_path), "samples/x", SAMPLED)
    sha, items = "5" * 40, []
    for repo, samples in (("a/1", 3), ("b/2", 2)):
        made = SampledModel(
            repo, sha, "DDIMPipeline", "UNet2DModel", "none", 8, 10, samples, 2, "e" * 64, "F32", "cpu", "d" * 64,
            identity=repo, bytes=7, seconds_sample=1.5, thumbnails=[b"webp"],
        )  # fmt: skip
        columns: dict[str, list[object]] = {
            "repo": [repo] * samples,
            "sha": [sha] * samples,
            "number": [*range(samples)],
            "prompt": [None] * samples,
            "class": [None] * samples,
            "feature": [np.array([1, number], np.float16) for number in range(samples)],
            "base_feature": [None] * samples,
        }
        items.append(item_key(repo, sha))
        ledger.spool(items[-1], ItemResult.success(made, pa.table(columns, schema=SAMPLES)))
    items.append(item_key("c/3", sha))
    failure = Failure.of("c/3", sha, "sample", FailureReason.TIMEOUT, "too slow")
    ledger.spool(items[-1], ItemResult.failure(failure, SAMPLED))
    receipt = ledger.seal(items)
    assert ledger.receipts() == [receipt]
    counts = receipt.counts
    assert (counts.indexed, counts.logits, counts.bytes, counts.failed) == (2, 5, 14, {"timeout": 1})
    assert counts.seconds == {"download": 0.0, "load": 0.0, "sample": 3.0, "embed": 0.0}
    assert receipt.originals == {"a/1": ["a/1", sha], "b/2": ["b/2", sha]}
    assert ledger.store.exists(f"samples/x/samples/{receipt.name}.parquet")
    assert [(model.repo, model.thumbnails) for model in ledger.models([receipt])] == [
        ("a/1", [b"webp"]),
        ("b/2", [b"webp"]),
    ]
    model, rows = ledger.sealed_result(receipt.name, "b/2", sha) or (None, None)
    assert (model.samples, rows["number"].to_pylist(), rows["feature"][1].as_py()) == (2, [0, 1], [1, 1])
    with pytest.raises(StoreError, match="damaged"):
        Ledger(ledger.store, "samples/x").receipts()


def test_parts_are_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    receipts = []
    for order in ((0, 1, 2), (2, 0, 1)):
        ledger = Ledger(Store(tmp_path / str(order[0])), "l")
        keys = [spool(ledger, f"a/{i}") for i in order]
        receipts.append(ledger.seal(keys))
    assert receipts[0].observations == receipts[1].observations
    assert receipts[0].models == receipts[1].models


def test_sealing_twice_is_sealing_once(ledger: Ledger) -> None:
    items = [spool(ledger, "a/1"), spool(ledger, "a/2")]
    first = ledger.seal(items)
    spool(ledger, "a/1")  # a kill came between the receipt and the end of the clean-up
    assert ledger.seal(items) == first
    assert ledger.spooled() == set()


def test_a_batch_with_a_missing_item_is_not_sealed(ledger: Ledger) -> None:
    items = [spool(ledger, "a/1"), item_key("a/2", "s" * 40)]
    with pytest.raises(FileNotFoundError):
        ledger.seal(items)
    assert ledger.receipts() == []
    assert len(ledger.spooled()) == 1


def test_a_later_success_replaces_a_failure(ledger: Ledger) -> None:
    ledger.seal([fail(ledger, "a/1"), fail(ledger, "a/2")])
    ledger.seal([fail(ledger, "a/1", attempt=2)])
    ledger.seal([spool(ledger, "a/2")])
    receipts = ledger.receipts()
    models = ledger.models(receipts)
    failures = ledger.failures(receipts, models)
    assert [m.repo for m in models] == ["a/2"]
    assert [(f.repo, f.attempts) for f in failures] == [("a/1", 2)]


def test_a_flipped_byte_is_found(ledger: Ledger, tmp_path: Path) -> None:
    receipt = ledger.seal([spool(ledger, "a/1")])
    file = tmp_path / receipt.observations.path
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(StoreError, match="damaged"):
        read_part(ledger.store, receipt.observations, OBSERVATIONS)


def test_a_part_of_another_kind_is_refused(ledger: Ledger) -> None:
    receipt = ledger.seal([spool(ledger, "a/1")])
    with pytest.raises(StoreError, match="expected failures"):
        read_part(ledger.store, receipt.models, FAILURES)


def test_strange_text_survives(ledger: Ledger) -> None:
    failure = Failure.of("a/\ud800", "x", "probe", FailureReason.INTERNAL, "\x1b[2J" + "y" * 5000)
    ledger.spool("k", ItemResult.failure(failure))
    receipt = ledger.seal(["k"])
    (found,) = ledger.failures([receipt], [])
    assert found.repo == "a/?"
    assert len(found.detail) == 1000

"""A copy has its original's observations, and names the model that was run, however many copies lie between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.probing.coordinator import Claim, Original, Originals
from cluster.probing.prober import Prober
from probelog.storage.ledger import ItemResult, Ledger
from probelog.storage.observations import from_rows, to_rows
from probelog.storage.schemas import CatalogueRow, ProbedModel, from_table
from probelog.storage.store import Store
from tests.support.worlds.probed_models import probed_model

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def model(repo: str, **facts: Any) -> ProbedModel:
    given: dict[str, Any] = {
        "sha": f"sha of {repo}",
        "logits": 2,
        "labels": ["cat", "dog"],
        "probes": [1, 5, 6],
        "seconds_preprocess": 3.0,
        "seconds_forward": 4.0,
        "bytes": 1000,
    }
    return probed_model(repo, **(given | facts))


@pytest.fixture
def prober(tmp_path: Path) -> Prober:
    """One that knows its ledger, and needs nothing else to make a copy."""
    made: Prober = Prober.__new__(Prober)
    made._ledger = Ledger(Store(tmp_path), "observations/key")
    return made


def spooled(prober: Prober, made: ProbedModel) -> Original:
    prober._ledger.spool("item", ItemResult.success(made, to_rows(made.repo, made.sha, VALUES)))
    return Original(made.repo, made.sha, item="item")


def copied(prober: Prober, original: Original, **facts: Any) -> tuple[ProbedModel, Any] | None:
    row = CatalogueRow("bob/copy", "sha of copy")
    result = prober._copy(original, row, facts, 7)
    return None if result is None else (from_table(result.models, ProbedModel)[0], result.rows)


def test_a_copy_of_what_was_run(prober: Prober) -> None:
    result = copied(prober, spooled(prober, model("ada/run")), labels=["x", "y"])
    assert result is not None
    own, rows = result
    assert (own.repo, own.sha, own.copy_of_repo, own.copy_of_sha) == (
        "bob/copy", "sha of copy", "ada/run", "sha of ada/run",
    )  # fmt: skip
    assert (own.labels, own.probes, own.bytes) == (["x", "y"], [1, 5, 6], 7)
    assert own.seconds_preprocess == own.seconds_forward == 0.0
    assert set(rows["repo"].to_pylist()) == {"bob/copy"}
    assert set(rows["sha"].to_pylist()) == {"sha of copy"}
    np.testing.assert_array_equal(from_rows(rows), VALUES)


@pytest.mark.parametrize("sealed", [False, True])
def test_a_copy_of_a_copy_names_what_was_run(prober: Prober, sealed: bool) -> None:
    original = spooled(prober, model("ada/copy", copy_of_repo="zoe/run", copy_of_sha="sha of zoe/run"))
    if sealed:
        original = Original(original.repo, original.sha, receipt=prober._ledger.seal(["item"]).name)
    result = copied(prober, original)
    assert result is not None
    assert (result[0].copy_of_repo, result[0].copy_of_sha) == ("zoe/run", "sha of zoe/run")


def test_what_cannot_be_found_is_run_again(prober: Prober) -> None:
    original = spooled(prober, model("ada/run"))
    receipt = prober._ledger.seal(["item"]).name
    assert copied(prober, original) is None, "sealed meanwhile, and nobody has said where"
    assert copied(prober, Original("ada/run", "another", receipt=receipt)) is None
    assert copied(prober, Original("ada/run", "sha of ada/run", receipt=receipt)) is not None
    assert copied(prober, Original("ada/run", "sha of ada/run", receipt=receipt), logits=3) is None


def test_the_first_that_was_run_stays_the_original() -> None:
    known = Original("zoe/run", "1", receipt="old")
    originals = Originals({"weights": known}, claim_seconds=60)
    originals.record_original("weights", "ada/copy", "2", "item")
    originals.sealed("new", ["item", "of nobody"])
    claim = originals.claim("weights", "other", "worker")
    assert claim.original is not None
    assert (claim.original.repo, claim.original.sha) == ("zoe/run", "1")
    assert Originals({"weights": known}, claim_seconds=60).claim("weights", "x", "y") == Claim(known)


def test_one_that_ran_is_known_at_once_by_its_item() -> None:
    originals = Originals({}, claim_seconds=60)
    assert originals.claim("weights", "item", "one") == Claim()
    originals.give_up("weights", "another")
    assert originals.claim("weights", "other", "two") == Claim(wait=True)
    originals.record_original("weights", "ada/run", "1", "item")
    originals.worker_lost("one")
    expected = Claim(Original("ada/run", "1", item="item"))
    assert originals.claim("weights", "other", "two") == expected
    originals.give_up("weights", "item")
    assert originals.claim("weights", "other", "two") == expected

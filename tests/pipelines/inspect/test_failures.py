"""Which models failed, and the story of one: out of a store's receipts, unsealed results and nightly runs."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from pipelines.inspect.explain import explain
from pipelines.inspect.failures import FIELDS, list_failures
from pipelines.inspect.remedies import REMEDIES, remedy
from pipelines.inspect.status import status
from probelog.errors import FailureReason, UsageError
from probelog.storage.encoding import digest, parquet_bytes
from probelog.storage.ledger import LEDGER_VERSION, ItemResult, Ledger, item_key
from probelog.storage.observations import to_rows
from probelog.storage.parquet_parts import Part
from probelog.storage.schemas import FAILURES, Failure, to_table
from probelog.storage.store import Store
from tests.probelog.storage.test_ledger import model
from tests.support.paths import CHECKOUT
from tests.support.processes.operator_command import operator
from tests.support.worlds.tiny_world import Indexed

KEPT = CHECKOUT / "tests/compatibility/kept/0.1.0/store"
SHA = "s" * 40
HOSTILE = '=HYPERLINK("http://x")\x1b[2J\n,"'


def failed(repo: str, reason: str, attempt: int = 1, detail: str = "", stage: str = "probe") -> ItemResult:
    return ItemResult.failure(Failure.of(repo, SHA, stage, FailureReason(reason), detail, attempt))


def succeeded(repo: str, logits: int = 2) -> ItemResult:
    return ItemResult.success(
        model(repo, logits=logits), to_rows(repo, SHA, np.zeros((logits, 7), np.float32))
    )


def ledger(store: Store, folder: str) -> Ledger:
    manifest = {"probe_set": "p", "fraction": 1.0, "seed": 0, "planned": 9, "version": LEDGER_VERSION}
    store.write_json(f"{folder}/manifest.json", manifest)
    return Ledger(store, folder)


def seal(into: Ledger, results: dict[tuple[str, int], ItemResult]) -> None:
    keys = [item_key(repo, SHA, attempt) for repo, attempt in results]
    for key, result in zip(keys, results.values(), strict=True):
        into.spool(key, result)
    into.seal(keys)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Failures of a crawl, sealed and unsealed ones of a ledger, its nightly runs, and of weights that were read for trees."""
    store = Store(tmp_path / "a store")
    data = parquet_bytes(
        to_table([Failure.of("a/gated", "", "crawl", FailureReason.GATED, HOSTILE)], FAILURES)
    )
    part = Part("catalogue/c/first/failures-00000.parquet", 1, len(data), digest(data))
    store.write(part.path, data)
    content = {"rows": [], "failures": [asdict(part)], "finished": "2026-01-01", "started": "2026-01-01"}
    store.write_json("catalogue/c/receipt.json", content)
    main = ledger(store, "observations/k")
    seal(main, {("a/healed", 1): failed("a/healed", "timeout"), ("a/broken", 1): failed("a/broken", "corrupt-weights", detail="cut off")})  # fmt: skip
    seal(main, {("a/slow", 1): failed("a/slow", "timeout"), ("a/good", 1): succeeded("a/good")})
    seal(main, {("a/slow", 2): failed("a/slow", "timeout", 2, "again")})
    main.spool(item_key("a/waits", SHA), failed("a/waits", "timeout", detail="not yet sealed"))
    nightly = ledger(store, "observations/k-20260101T000000-00000000")
    seal(nightly, {("a/healed", 2): succeeded("a/healed"), ("b/new", 1): failed("b/new", "unsafe-format")})
    (receipt,) = nightly.receipt_names()
    store.write(main.paths.receipt(receipt), store.read(nightly.paths.receipt(receipt)))
    seal(ledger(store, "trees/weights/w"), {("c/language", 1): failed("c/language", "unsupported", stage="trees")})  # fmt: skip
    return store


def test_the_last_failure_of_every_model_that_did_not_succeed_since(store: Store) -> None:
    records = {record["repo"]: record for record in list_failures(store.uri).records()}
    assert {repo: (item["stage"], item["reason"], item["key"]) for repo, item in records.items()} == {
        "a/gated": ("crawl", "gated", "c"),
        "a/broken": ("probe", "corrupt-weights", "k"),
        "a/slow": ("probe", "timeout", "k"),
        "a/waits": ("probe", "timeout", "k"),
        "b/new": ("probe", "unsafe-format", "k"),
        "c/language": ("trees", "unsupported", "w"),
    }
    slow = records["a/slow"]
    assert (slow["attempts"], slow["detail"], slow["retryable"], slow["sha"]) == (2, "again", True, SHA)
    assert slow["to_do"] == remedy("timeout")
    assert tuple(slow) == (*FAILURES.names, "key", "to_do")


def test_some_of_them(store: Store) -> None:
    def repos(*options: str) -> list[str]:
        return [json.loads(line)["repo"] for line in operator("failures", "--store", store.uri, "--json", *options).out.splitlines()]  # fmt: skip

    assert repos("--reason", "timeout") == ["a/slow", "a/waits"]
    assert repos("--retryable") == ["a/slow", "a/waits"]
    assert repos("--stage", "trees") == ["c/language"]
    assert repos("--stage", "crawl", "--reason", "timeout") == []
    assert operator("failures", "--store", store.uri, "--reason", "boredom").status == 2
    assert operator("failures", "--store", store.uri, "--json", "--csv").status == 2
    assert operator("failures", "--store", f"{store.uri}/none").status == 2


def test_a_table_that_no_spreadsheet_runs(store: Store) -> None:
    out = operator("failures", "--store", store.uri, "--csv").out
    rows = list(csv.DictReader(io.StringIO(out)))
    assert tuple(rows[0]) == FIELDS
    (gated,) = (row for row in rows if row["reason"] == "gated")
    assert gated["detail"].startswith("'=HYPERLINK")
    assert "\x1b" not in out
    assert len(out.splitlines()) == 7


def test_for_a_person(store: Store) -> None:
    out = operator("failures", "--store", store.uri).out
    assert out.splitlines()[:2] == ["timeout: 2 models", f"  what to do: {remedy('timeout')}"]
    assert "\x1b" not in out
    seal(
        Ledger(store, "observations/k"), {(f"m/{i:02}", 1): failed(f"m/{i:02}", "timeout") for i in range(25)}
    )
    out = operator("failures", "--store", store.uri).out
    assert "  and 7 more: --reason timeout (or --json, --csv)" in out
    assert "m/24" not in out
    assert "m/24" in operator("failures", "--store", store.uri, "--reason", "timeout").out


def test_status_names_examples_and_the_command(store: Store) -> None:
    found = status(store.uri)
    (main,) = (item for item in found.ledgers if item.key == "k")
    assert main.examples == {
        "timeout": {"repo": "a/slow", "sha": SHA, "detail": "again"},
        "corrupt-weights": {"repo": "a/broken", "sha": SHA, "detail": "cut off"},
        "unsafe-format": {"repo": "b/new", "sha": SHA, "detail": ""},
    }
    lines = "\n".join(found.lines())
    assert "corrupt-weights, for example a/broken: cut off" in lines
    assert f"probelog-index failures --store '{store.uri}'" in lines


def test_what_to_do_is_plain_on_a_terminal() -> None:
    for reason, item in REMEDIES.items():
        assert not set(item.plain) & set("`[]"), reason
    assert "add an architecture" in remedy("unsupported")
    assert "update ProbeLog" in remedy("of-a-later-version")


def test_the_story_of_a_failed_model(store: Store) -> None:
    story = explain(store.uri, f"a/slow@{SHA}")
    assert [(item["attempt"], item["reason"]) for item in story.attempts] == [(1, "timeout"), (2, "timeout")]
    lines = "\n".join(story.lines())
    assert f"attempt 2, {story.attempts[1]['at']}: probe: timeout: again" in lines
    assert "index      in no generation that is kept" in lines
    assert explain(store.uri, f"a/waits@{SHA}").attempts[0]["receipt"] is None
    assert [item["reason"] for item in explain(store.uri, f"a/healed@{SHA}").attempts] == ["timeout", None]
    assert explain(store.uri, "a/gated").refused[0]["reason"] == "gated"
    with pytest.raises(UsageError, match="knows nothing of 'a/nobody'"):
        explain(store.uri, "a/nobody")


def test_the_story_of_a_published_model() -> None:
    story = json.loads(operator("explain", "ada/resnet", "--store", KEPT, "--json").out)
    (listed,), (attempt,), (completion,) = story["listed"], story["attempts"], story["completions"]
    assert (listed["licence"], listed["key"]) == ("mit", "799cbf59e7f974ad")
    assert (attempt["logits"], attempt["probes"], attempt["reason"]) == (3, 18, None)
    assert attempt["seconds"]["download"] > 0
    assert json.loads(attempt["recipe"])["library"] == "transformers"
    assert (completion["described"], completion["logits"]) == (3, 3)
    assert [item["state"] for item in story["generations"]] == ["live", "previous"]
    assert {item["sha"] for item in story["generations"]} == {listed["sha"]}
    with pytest.raises(UsageError, match="did you mean ada/resnet"):
        explain(str(KEPT), "ada/resnett")


def test_the_story_of_a_model_of_a_nightly_run() -> None:
    story = explain(str(KEPT), "cleo/new")
    assert [item["key"] for item in story.listed] == ["c9c5a751b894f1a7-20261129T105724-fee671b7"]
    assert [item["key"] for item in story.attempts] == ["c9c5a751b894f1a7"]
    assert [item["state"] for item in story.generations] == ["live"]


def test_the_story_of_a_model_in_a_tree(indexed: Indexed) -> None:
    story = explain(str(indexed.store), "ada/resnet-again")
    (tree,) = story.trees
    (generation,) = story.generations
    assert (tree["root"], tree["parent"]) == (generation["root"], generation["parent"])
    assert tree["parents"] or tree["children"], "the same weights twice"
    assert any(line.startswith(f"tree       {tree['key']}: family") for line in story.lines())

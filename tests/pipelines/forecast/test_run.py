"""``probelog-index plan`` on the tiny world: what it foretells is what then happens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from probelog.storage.ledger import Ledger
from probelog.storage.store import Store
from tests.support.hub.faults import FaultyHub, faulty
from tests.support.processes.operator_command import operator
from tests.support.worlds.tiny_world import MODELS, Indexed, TinyWorld


@pytest.fixture
def hub(tiny_world: TinyWorld, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyHub]:
    with faulty(tiny_world.hub) as (endpoint, counted):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        yield counted


def told(*arguments: object) -> dict[str, Any]:
    ended = operator("plan", "--json", *arguments)
    assert ended.status == 0, ended.err
    return dict(json.loads(ended.out))


def refused(*arguments: object) -> str:
    ended = operator("plan", *arguments)
    assert ended.status == 2, ended.err
    assert "Traceback" not in ended.err
    return re.sub(r"[│╭╰─╮╯\s]+", " ", ended.err)


@pytest.mark.acceptance
def test_foretold_and_happened(tiny_world: TinyWorld, hub: FaultyHub, tmp_path: Path) -> None:
    file = tiny_world.config_file(tmp_path / "job.toml", tmp_path / "store", batch_models=4)
    assert "run `probelog-index crawl` first" in refused("--config", file)
    assert operator("crawl", "--config", file).status == 0
    assert "--measure" in refused("--config", file)
    assert "no measured models" in refused("--config", file, "--like", tmp_path / "nowhere")
    for price in ("-1", "nan"):
        assert "at least 0" in refused("--config", file, "--price", price)

    plan = told("--config", file, "--measure", 3, "--price", 2.5)
    left, basis = plan["left"], plan["basis"]
    (folder,) = (f"observations/{path.name}" for path in (tmp_path / "store/observations").iterdir())
    ledger = Ledger(Store(tmp_path / "store"), folder)
    (before,) = (receipt.counts for receipt in ledger.receipts())
    receipt_bytes = sum(ledger.store.sizes(f"{folder}/receipts").values())
    assert (basis["source"], basis["models"], basis["runs"]) == ("this configuration", 3, 1)
    assert (plan["catalogue"], plan["done"]["models"], left["models"]) == (len(MODELS), 3, len(MODELS) - 3)
    assert plan["done"]["bytes"] == before.bytes
    hours = left["cost"]["hours"]["value"]
    assert left["cost"]["total"]["value"] == pytest.approx(2.5 * hours)
    assert left["wall"]["total"]["value"] * left["wall"]["workers"] == pytest.approx(hours * 3600)
    assert sum(item["models"] for item in left["classes"]) == left["models"]

    again = told("--config", file, "--measure", 3)
    assert again["done"] == plan["done"], "the same models are measured: nothing is left of them"

    asked = len(hub.requests)
    assert operator("probe", "--config", file).status == 0
    addresses = [request.address for request in hub.requests[asked:]]
    after = sum((receipt.counts for receipt in ledger.receipts()), type(before)())
    assert left["indexed"]["value"] == after.indexed - before.indexed
    assert left["file_requests"]["value"] == sum("/resolve/" in address for address in addresses)
    assert left["api_requests"] == sum("/api/" in address for address in addresses) == 0
    assert left["bytes"]["value"] == pytest.approx(after.bytes - before.bytes, rel=0.1)
    busy = sum(after.seconds[part] - before.seconds[part] for part in ("load", "preprocess", "forward"))
    assert busy / 20 < left["busy_hours"]["value"] * 3600 < busy * 20

    receipt_bytes = sum(ledger.store.sizes(f"{folder}/receipts").values()) - receipt_bytes
    assert left["store_bytes"]["receipts"]["value"] == pytest.approx(receipt_bytes, rel=0.05)

    done = told("--config", file)
    grown = done["done"]["store_bytes"] - plan["done"]["store_bytes"]
    assert sum(kind["value"] for kind in left["store_bytes"].values()) == pytest.approx(grown, rel=0.1)
    assert (done["left"]["models"], done["left"]["bytes"]["value"]) == (0, 0)
    # The world's other tests leave arrays beside those that this one's models used.
    arrays = [path.stat() for path in (tiny_world.root / "scratch").rglob("*.pixels")]
    prepared = sum(array.st_size for array in arrays if array.st_mtime >= file.stat().st_mtime)
    assert done["left"]["disk_bytes"]["prepared probes"] == pytest.approx(prepared, rel=0.1)
    assert done["whole"]["models indexed"]["value"] == len(MODELS)


def test_exact_where_sizes_are_listed(tiny_world: TinyWorld, hub: FaultyHub, tmp_path: Path) -> None:
    names = tmp_path / "repos.txt"
    names.write_text("\n".join([*MODELS][:4]) + "\n")
    file = tiny_world.config_file(tmp_path / "job.toml", tmp_path / "store", filters={"list": str(names)})
    assert operator("crawl", "--config", file).status == 0
    plan = told("--config", file, "--measure", 3)
    assert plan["left"]["sizes"]["file sizes"] == 1
    assert operator("probe", "--config", file).status == 0
    found = told("--config", file)["done"]["bytes"]
    assert plan["left"]["bytes"] == dict.fromkeys(("value", "low", "high"), found - plan["done"]["bytes"])


def test_learns_from_another_store(indexed: Indexed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", indexed.endpoint)
    file = indexed.world.config_file(tmp_path / "job.toml", tmp_path / "store")
    assert operator("crawl", "--config", file).status == 0
    plan = told("--config", file, "--like", indexed.store, "--workers", 5)
    assert (plan["basis"]["source"], plan["left"]["models"]) == (str(indexed.store), len(MODELS))
    assert plan["left"]["wall"]["workers"] == 5
    assert {"descriptors", "index"} <= {*plan["left"]["store_bytes"]}
    logits = sum(count for count, _ in MODELS.values())
    assert plan["left"]["logits"]["value"] == pytest.approx(logits, rel=0.3)
    ended = operator("plan", "--config", file, "--like", indexed.store, "--price", 2)
    assert ended.status == 0
    for word in [
        "fitted on",
        "download",
        "requests",
        "disk",
        "work",
        "wall time",
        "store",
        "cost",
        "2 workers",
    ]:
        assert word in ended.out, ended.out
    own = operator("plan", "--config", file, "--set", "seed=3", "--store", indexed.store)
    assert own.status == 0
    assert "another ledger of this store" in own.out

"""Killed with SIGKILL in the middle of each stage, and started again."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipelines.full import run_crawl, run_full
from pipelines.inspect.status import status
from probelog.publication.lifecycle import sweep
from probelog.search.client import open_index
from probelog.storage.ledger import ItemResult, Ledger
from probelog.storage.schemas import PROBED_MODELS, ProbedModel, from_table
from probelog.storage.store import Store
from tests.support.hub import faults
from tests.support.hub.faults import faulty
from tests.support.processes.operator_command import kill_tree, operator, operator_process, wait_until
from tests.support.worlds.tiny_world import MODELS, Indexed

QUERIES = ["dog", "zebra", "clock"]
STALLS = "cleo/timm-bfloat"


def files(folder: Path) -> dict[str, str]:
    """Digest of every file that a reader would see."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def gcs_address() -> str:
    """The Ray of this test run, for a process of its own."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


@pytest.mark.acceptance
def test_killed_while_probing(indexed: Indexed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model's download stalls; when the seven others are through, everything is killed, Ray included."""
    store = indexed.copy_store(tmp_path / "store", "catalogue", "observations", "completion", "index")
    settings = {"workers": 1, "scratch": str(tmp_path / "scratch")}
    file = indexed.world.config_file(tmp_path / "job.toml", store, **settings)
    folder = f"observations/{indexed.run.probed.key}"
    ledger = Ledger(Store(store), folder)

    def through() -> int:
        return sum(len(receipt.items) for receipt in ledger.receipts()) + len(ledger.spooled())

    with faulty(indexed.world.hub) as (endpoint, hub):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        hub.spoil(f"/{STALLS}/resolve", faults.slow(0.5, 64))
        with operator_process("full", "--config", file) as process:
            wait_until(process, lambda: through() == len(MODELS) - 1)
            wait_until(process, lambda: len(ledger.receipts()) == 2 and len(ledger.spooled()) == 2)
            kill_tree(process)
        hub.rules.clear()

        assert any(path.is_file() for path in tmp_path.glob("scratch/**/downloads/**/*")), "half a download"
        found = status(str(store)).ledgers[0]
        assert (found.indexed, found.unsealed, found.left) == (5, 2, 1)
        before = files(store / folder)
        spooled = [ItemResult.from_bytes(path.read_bytes()) for path in store.glob(f"{folder}/spool/*.arrow")]
        asked = len(hub.requests)
        run = run_full(indexed.job(store, **settings))
        fetched = [request.address for request in hub.requests[asked:]]

    assert fetched
    assert all(f"/{STALLS}/" in address for address in fetched), "nothing else is listed or downloaded again"
    after = files(store / folder)
    sums = "summary.json"  # what is sealed, added up
    kept = {name: digest for name, digest in before.items() if "/spool/" not in f"/{name}" and name != sums}
    assert len(kept) > 6
    assert kept.items() <= after.items(), "what was sealed is not written again"
    assert not ledger.spooled()

    receipts = ledger.receipts()
    rows = [
        model
        for receipt in receipts
        for model in from_table(Store(store).read_table(receipt.models.path), ProbedModel)
    ]
    assert Counter(model.repo for model in rows) == dict.fromkeys(MODELS, 1)
    for result in spooled:
        assert from_table(result.models.cast(PROBED_MODELS), ProbedModel)[0] in rows, "with its first timings"
    assert (run.probed.models, run.probed.failures) == (len(MODELS), [])

    undisturbed = {receipt.name: receipt for receipt in indexed.run.probed.receipts}
    assert {receipt.name for receipt in receipts} == set(undisturbed)
    for receipt in receipts:
        assert receipt.observations == undisturbed[receipt.name].observations, "the same bytes"
        assert receipt.items == undisturbed[receipt.name].items
    assert not [path for path in tmp_path.glob("scratch/**/downloads/**/*") if path.is_file()]
    np.testing.assert_array_equal(
        open_index(store).scores(QUERIES), open_index(indexed.store).scores(QUERIES)
    )


def test_killed_between_a_receipt_and_the_end_of_its_spool(indexed: Indexed, tmp_path: Path) -> None:
    store = indexed.copy_store(tmp_path / "store")
    folder = store / f"observations/{indexed.run.probed.key}"
    sealed = indexed.run.probed.receipts[0]
    ledger = Ledger(Store(store), f"observations/{folder.name}")
    (folder / "summary.json").unlink()  # a driver counts a batch when its spool is gone
    ledger.spool(sealed.items[0], ItemResult.from_bytes(_any_result(indexed)))
    before = files(folder)
    found = status(str(store)).ledgers[0]
    assert (found.unsealed, found.left, found.indexed) == (0, 0, len(MODELS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", indexed.endpoint)
        assert not run_full(indexed.job(store)).published.is_new
    after = files(folder)
    assert after.pop("summary.json")
    assert after == {name: value for name, value in before.items() if not name.startswith("spool/")}


def _any_result(indexed: Indexed) -> bytes:
    store, receipt = Store(indexed.store), indexed.run.probed.receipts[0]
    tables = [
        store.read_table(part.path)
        for part in (receipt.observations, receipt.models, receipt.failures, receipt.weights)
        if part is not None
    ]
    return ItemResult(*tables).to_bytes()


def test_killed_while_crawling(indexed: Indexed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalogue is read from a list, twenty repositories a page; the second page stalls."""
    ghosts = [f"ghosts/{number:02}" for number in range(40)]
    names = tmp_path / "repos.txt"
    names.write_text("\n".join([*list(MODELS)[:5], *ghosts, *list(MODELS)[5:]]))
    store = tmp_path / "store"
    file = indexed.world.config_file(tmp_path / "job.toml", store, filters={"list": str(names)})
    at_every_page = "import pipelines.crawl.stage as crawl; crawl._PART_SECONDS = 0; import pipelines.cli as cli; cli.main()"
    with faulty(indexed.world.hub) as (endpoint, hub):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        hub.spoil(f"/{ghosts[25]}", faults.slow(60, 1))

        def stalled() -> bool:
            progress = list(store.glob("catalogue/*/progress.json"))
            return bool(progress and json.loads(progress[0].read_text())["next_url"]) and bool(
                hub.asked(f"/{ghosts[25]}")
            )

        with operator_process("crawl", "--config", file, module=("-c", at_every_page)) as process:
            wait_until(process, stalled)
            kill_tree(process)
        hub.rules.clear()
        assert "unfinished" in "\n".join(status(str(store)).lines())
        ended = operator("probe", "--config", file)
        assert ended.status == 2
        assert "crawl" in ended.err
        before = {name: value for name, value in files(store).items() if name.endswith(".parquet")}
        asked = len(hub.requests)
        catalogue = run_crawl(indexed.job(store, filters={"list": str(names)}))
        again = " ".join(request.address for request in hub.requests[asked:])
    assert before
    assert before.items() <= files(store).items()
    assert next(iter(MODELS)) not in again
    assert ghosts[3] not in again
    assert ghosts[39] in again
    assert [row.repo for row in catalogue.rows()] == sorted(MODELS)
    assert sorted(failure.repo for failure in catalogue.failures()) == ghosts
    assert {failure.reason for failure in catalogue.failures()} == {"not-found"}


@pytest.mark.acceptance
def test_killed_while_completing(indexed: Indexed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", indexed.endpoint)
    store = indexed.copy_store(tmp_path / "store", "completion", "index")
    undisturbed = indexed.copy_store(tmp_path / "undisturbed", "completion", "index")
    settings = {"rank": None, "regularisation": None}
    file = indexed.world.config_file(tmp_path / "job.toml", store, ray_address=gcs_address(), **settings)
    with operator_process("complete", "--config", file) as process:
        wait_until(process, lambda: any(store.glob("completion/*/choice.json")))
        kill_tree(process)
    (choice,) = store.glob("completion/*/choice.json")
    assert not (choice.parent / "receipt.json").exists()
    tried = json.loads(choice.read_text())
    assert not status(str(store)).completions
    run = run_full(indexed.job(store, **settings))
    finished = json.loads(choice.read_text())["tried"]
    assert finished[: len(tried["tried"])] == tried["tried"], "what was tried is not tried again"
    whole = run_full(indexed.job(undisturbed, **settings))
    assert files(choice.parent) == files(undisturbed / choice.parent.relative_to(store))
    assert run.completed.key == whole.completed.key
    assert (run.completed.rank, run.completed.rmse) == (whole.completed.rank, whole.completed.rmse)
    np.testing.assert_array_equal(open_index(store).scores(QUERIES), open_index(undisturbed).scores(QUERIES))


@pytest.mark.acceptance  # at every step of publishing, without Ray: test_publishers
def test_killed_while_publishing(indexed: Indexed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", indexed.endpoint)
    store = indexed.copy_store(tmp_path / "store")
    first = indexed.run.published.pointer
    generations = store / "index/generations"
    file = indexed.world.config_file(tmp_path / "job.toml", store, prompt="{}", ray_address=gcs_address())
    with operator_process("publish", "--config", file) as process:
        # Folders alone are nothing to a store, and no sweep would see them.
        written = "*/logits.lance/data/*"
        wait_until(process, lambda: len({path.parent for path in generations.glob(written)}) == 2)
        kill_tree(process)
    (unfinished,) = (path for path in generations.iterdir() if path.name != first.generation)
    index = open_index(store)
    assert index.generation == first.generation
    np.testing.assert_array_equal(index.scores(QUERIES), open_index(indexed.store).scores(QUERIES))
    published = run_full(indexed.job(store, prompt="{}")).published
    assert published.is_new
    assert published.pointer.generation != first.generation
    kept = {published.pointer.generation, *(item["generation"] for item in published.pointer.previous)}
    assert unfinished.name not in kept
    # It might still be somebody's: it stays on hold for a while, then the next sweep takes it.
    assert {path.name for path in generations.iterdir()} == {*kept, unfinished.name}
    (unfinished / "hold.json").unlink()
    index_store = Store(store / "index")
    assert sweep(index_store) == []
    assert sweep(index_store, dt.timedelta(0)) == [unfinished.name]
    assert open_index(store).settings["prompts"] == ["{}"]

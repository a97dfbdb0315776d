"""Models that crash, hang, eat all memory or look for secrets while they run: each costs its own row."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.full import run_crawl, run_probe
from probelog.storage.ledger import Ledger, observed_models
from probelog.storage.store import Store
from tests.support.hub.faults import faulty
from tests.support.hub.hostile import write_json
from tests.support.hub.rogue_models import write_rogue
from tests.support.worlds.tiny_world import Indexed

pytestmark = pytest.mark.acceptance  # they start a server of their own

ROGUES = {
    "crash": "crashed-worker",
    "devour": "out-of-memory",
    "steal": None,
    "sleep": None,
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests: the process that forks models' processes is started once."""
    return tmp_path_factory.mktemp("scratch")


def test_rogues_cost_their_own_rows(
    indexed: Indexed, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "hub"
    for kind in ROGUES:
        write_rogue(root / "rogue" / kind, kind, seconds=0.01)
    for name in ("resnet", "resnet-again"):
        shutil.copytree(indexed.world.hub / "ada" / name, root / "ada" / name)
    repos = [f"rogue/{kind}" for kind in ROGUES] + ["ada/resnet", "ada/resnet-again"]
    for seed in (1, 2):
        write_rogue(root / f"rogue/liar-{seed}", "lie", seed)
        repos.append(f"rogue/liar-{seed}")
    write_json(root, "hub.json", [{"id": repo, "library": "timm"} for repo in repos])
    store = tmp_path / "store"
    settings = {
        "preload": ["tests.support.hub.rogue_models"],
        "memory_per_worker": 1_500_000_000,
        "scratch": str(scratch),
        "fraction": 0.5,
    }
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with faulty(root) as (endpoint, _):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        job = indexed.job(store, **settings)
        run_crawl(job)
        probed = run_probe(job)
    found = {failure.repo.split("/")[1]: failure for failure in probed.failures}
    assert {kind: failure.reason for kind, failure in found.items()} == {
        kind: reason for kind, reason in ROGUES.items() if reason is not None
    }
    assert "SIGSEGV" in found["crash"].detail
    assert not found["crash"].retryable
    assert found["devour"].retryable
    ledger = Ledger(Store(store), f"observations/{probed.key}")
    values = {
        model.repo: (model, values)
        for receipt in ledger.receipts()
        for model, _, values in observed_models(ledger.store, receipt)
    }
    liars = ("rogue/liar-1", "rogue/liar-2")
    assert set(values) == {"rogue/steal", "rogue/sleep", *liars, "ada/resnet", "ada/resnet-again"}
    # They pretend to be one model. What they are is not theirs alone to say, so none has the other's observations.
    assert all(values[liar][0].copy_of_repo is None for liar in liars)
    assert values[liars[0]][0].identity != values[liars[1]][0].identity
    assert (values[liars[0]][1] != values[liars[1]][1]).any()
    # Its own home is the one place that it may write to.
    assert abs(values["rogue/steal"][1][1]).max() < 500, "a thief found something"
    copies = {values[f"ada/{name}"][0].copy_of_repo for name in ("resnet", "resnet-again")}
    assert len(copies - {None}) == 1, "the same weights are run once"
    assert (values["ada/resnet"][1] == values["ada/resnet-again"][1]).all()
    assert not [path for path in scratch.glob("**/downloads/**/*") if path.is_file()]


def test_a_model_that_hangs_runs_out_of_time(
    indexed: Indexed, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "hub"
    write_rogue(root / "rogue/hang", "hang")
    write_json(root, "hub.json", [{"id": "rogue/hang", "library": "timm"}])
    settings = {
        "preload": ["tests.support.hub.rogue_models"],
        "item_seconds": 3.0,
        "workers": 1,
        "scratch": str(scratch),
    }
    with faulty(root) as (endpoint, _):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        job = indexed.job(tmp_path / "store", **settings)
        run_crawl(job)
        (failure,) = run_probe(job).failures
    assert failure.reason == "timeout"
    assert "within" in failure.detail
    assert failure.retryable

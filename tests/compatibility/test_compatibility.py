"""What released versions wrote is read: the promise of ``docs/release-policy.md``."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import probelog
from pipelines.config.model import load_config
from pipelines.crawl.stage import Catalogue
from pipelines.full import run_full
from pipelines.inspect.status import status
from pipelines.inspect.verify import verify
from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.nightly.run import run_nightly
from probelog.index.pointer import read_pointer
from probelog.storage.ledger import Ledger
from probelog.storage.store import Store
from tests.compatibility.make import ENDPOINT, KEPT, answers, date_probes
from tests.support.hub.faults import FaultyHub, faulty
from tests.support.worlds.tiny_world import TinyWorld, timm_model

VERSIONS = sorted(path.name for path in KEPT.iterdir())


@pytest.fixture(params=VERSIONS)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of what one version wrote, to be changed."""
    shutil.copytree(KEPT / request.param, tmp_path / "kept")
    date_probes(tmp_path / "kept")
    return tmp_path / "kept"


def test_this_version_is_kept() -> None:
    assert probelog.__version__ in VERSIONS, "make it: python -m tests.compatibility.make"
    size = sum(file.stat().st_size for file in KEPT.rglob("*") if file.is_file())
    assert size / len(VERSIONS) < 1_500_000, "every clone has it"


def test_the_index_answers_as_it_did(kept: Path) -> None:
    same(answers(kept / "store"), json.loads((kept / "expected.json").read_text()))


def test_the_store_is_understood(kept: Path) -> None:
    told = status(str(kept / "store"))
    main, nightly = sorted(told.ledgers, key=lambda ledger: len(ledger.key))
    assert (main.planned, main.indexed, main.copies, main.failed) == (4, 4, 1, {"corrupt-weights": 1})
    assert (nightly.planned, nightly.indexed) == (1, 1)
    assert told.index is not None
    assert len(told.index["previous"]) == 1
    checked = verify(str(kept / "store"), Report(io.StringIO()))
    assert (checked.damaged, checked.missing, checked.unexpected) == ([], [], [])
    catalogue = Catalogue.open(job(kept), ENDPOINT)
    assert [row.repo for row in catalogue.rows()] == [
        "ada/resnet", "ada/resnet-again", "bob/broken", "bob/one-logit",
    ]  # fmt: skip


@pytest.mark.acceptance
def test_its_runs_go_on(
    kept: Path, tiny_world: TinyWorld, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A nightly run adds a model to what was published; a full one makes it anew. What was probed is not touched."""
    monkeypatch.chdir(kept)
    hub = kept / "hub"
    timm_model(hub / "zoe/newer", "test_resnet", 2, 9)
    listed = json.loads((kept / "hub.json").read_text())
    newer = {"id": "zoe/newer", "license": "mit", "lastModified": "2025-09-01T00:00:00.000Z"}
    (hub / "hub.json").write_text(json.dumps([*listed, newer]))
    store = Store("store")
    before = read_pointer(store.child("index"))[0]
    with faulty(hub) as (endpoint, faults):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        result = run_nightly(job(kept, tiny_world.scratch))
        assert (result.added, result.removed, result.failures) == (1, 0, [])
        assert result.published.pointer.base == before.base
        assert models(kept) == ["ada/resnet", "ada/resnet-again", "bob/one-logit", "cleo/new", "zoe/newer"]
        again = run_full(job(kept, tiny_world.scratch))
        assert (again.probed.models, [failure.reason for failure in again.probed.failures]) == (
            5,
            ["corrupt-weights"],
        )
        assert again.published.pointer.base is None
        assert models(kept) == ["ada/resnet", "ada/resnet-again", "bob/one-logit", "cleo/new", "zoe/newer"]
        assert downloaded(faults) == {"zoe/newer"}
    ledger = Ledger(store, f"observations/{again.probed.key}")
    assert len(ledger.models(ledger.receipts())) == 5


def job(kept: Path, scratch: Path | None = None) -> Job:
    # Workers start in another folder than this process is in; with the scratch folder of other tests they share the
    # process that forks models' processes, which takes seconds to start.
    more = [f"scratch={json.dumps(str(scratch or kept / 'scratch'))}"]
    config = load_config(kept / "job.toml", more, store=str(kept / "store"))
    return Job.of(config, Report(io.StringIO()))


def models(kept: Path) -> list[str]:
    index = probelog.open_index(kept / "store")
    return sorted(index._generation.models_table(["repo"])["repo"].to_pylist())


def downloaded(faults: FaultyHub) -> set[str]:
    """Repositories whose weights were asked for."""
    return {request.address.split("/resolve/")[0].strip("/") for request in faults.asked(".safetensors")}


def same(found: Any, expected: Any) -> None:
    """Equal but for the last digits of numbers, which other libraries may round otherwise, and for further facts."""
    if isinstance(expected, dict):
        assert found.keys() >= expected.keys()
        for name, value in expected.items():
            same(found[name], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert found == (pytest.approx(expected, abs=1e-4) if isinstance(expected, float) else expected)

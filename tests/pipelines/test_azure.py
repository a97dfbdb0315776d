"""The whole way on Azure's blobs: a full run by a process with a Ray of its own, what operators ask, a client."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.hubserver import running
from probelog.search.client import open_index
from tests.support.processes.azurite import azure_server
from tests.support.processes.operator_command import operator, operator_process
from tests.support.worlds.tiny_world import TinyWorld


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_a_full_run_into_az(tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tmp_path / "repos.txt"
    names.write_text("ada/resnet\nbob/one-logit\n")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with azure_server() as container, running(tiny_world.hub) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        store = f"{container}/some/where"
        settings = {"workers": 1, "filters": {"list": str(names)}, "scratch": str(tmp_path / "scratch")}
        file = tiny_world.config_file(tmp_path / "job.toml", store, **settings)
        with operator_process("full", "--config", file) as process:
            said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
        assert f"--index {store}" in said
        index = open_index(store)
        assert (index.models, index.logits) == (2, 5)
        assert {hit.repo for hit in index.search(text="dog", k=9)} == {"ada/resnet", "bob/one-logit"}
        assert index.show("ada/resnet").logits
        (ledger,) = json.loads(operator("status", "--store", store, "--json").out)["ledgers"]
        assert ledger["indexed"] == 2
        assert operator("verify", "--store", store).status == 0

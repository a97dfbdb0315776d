"""The probe stage on a cluster that is taken apart while it works: every model is indexed once, none is blamed.

Real nodes, workers, model processes and drivers; the signals are real too.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pipelines.full import run_crawl
from pipelines.job.job import Job
from pipelines.job.progress import Report
from probelog.storage.ledger import Ledger, item_key, observed_models
from probelog.storage.store import Store
from tests.support.hub import faults
from tests.support.hub.faults import FaultyHub, faulty
from tests.support.hub.hostile import write_json
from tests.support.hub.rogue_models import write_rogue
from tests.support.processes.operator_command import kill_tree, operator_process, wait_until
from tests.support.processes.processes import command_of, eventually, parent_of, probers
from tests.support.processes.ray_cluster import RayCluster, ray_cluster
from tests.support.worlds.tiny_world import TinyWorld

MODELS, COPIES = 80, 2
IN_FLIGHT, DRAIN_SECONDS = 2, 5.0
STALLS = "rogue/00"


@dataclass
class Stage:
    """The probe stage over a hub of slow models, into one store."""

    world: TinyWorld
    root: Path
    endpoint: str
    address: str

    @property
    def config(self) -> Path:
        return self.world.config_file(self.root / "job.toml", self.store, **self.settings)

    @property
    def settings(self) -> dict[str, object]:
        return {
            "preload": ["tests.support.hub.rogue_models"],
            "probe_count": 20,
            "workers": None,
            "in_flight": IN_FLIGHT,
            "batch_models": 5,
            "drain_seconds": DRAIN_SECONDS,
            "scratch": str(self.root / "scratch"),
            "item_log": str(self.log),
            "ray_address": self.address,
        }

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def log(self) -> Path:
        return self.root / "items.jsonl"

    def crawl(self) -> dict[str, str]:
        """List the hub; gives each model's key in the ledger."""
        self.root.mkdir()
        found = run_crawl(Job.of(self.world.config(self.store, **self.settings), Report(io.StringIO())))
        return {row.repo: item_key(row.repo, row.sha) for row in found.rows()}

    def driver(self) -> contextlib.AbstractContextManager:
        return operator_process("probe", "--config", self.config, environment={"HF_ENDPOINT": self.endpoint})

    def finish(self) -> str:
        with self.driver() as process:
            said = process.communicate(timeout=200)[0]
        assert process.returncode == 0, said
        return said

    @property
    def ledger(self) -> Ledger:
        (folder,) = (path.name for path in (self.store / "observations").iterdir())
        return Ledger(Store(self.store), f"observations/{folder}")

    def values(self) -> dict[str, npt.NDArray[np.float32]]:
        """Each model's values; every one of them is there once."""
        ledger = self.ledger
        found = [
            (model.repo, values)
            for receipt in ledger.receipts()
            for model, _, values in observed_models(ledger.store, receipt)
        ]
        assert max(Counter(repo for repo, _ in found).values()) == 1
        return dict(found)

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    # Processes

    @property
    def scratch(self) -> Path:
        return self.root / "scratch/probelog"

    def workers(self) -> list[int]:
        """Probing actors that are alive: each has a folder of its own."""
        return probers(self.scratch)

    def worker_of(self, key: str) -> int:
        """Who has an item's files just now."""
        (folder,) = (self.scratch / "downloads").glob(f"*/{key}")
        return int(folder.parent.name)

    def servers(self) -> list[int]:
        """Fork servers of this scratch folder."""
        return [pid for pid in self._forked() if parent_of(pid) not in self._forked()]

    def model_processes(self) -> list[int]:
        return [pid for pid in self._forked() if parent_of(pid) in self._forked()]

    def _forked(self) -> set[int]:
        pids = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
        return {
            pid
            for pid in pids
            if "fork_server/bootstrap.py" in (told := command_of(pid)) and str(self.scratch) in told
        }


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, FaultyHub]]:
    root = tmp_path / "hub"
    repos = [f"rogue/{number:02}" for number in range(MODELS)]
    for number, repo in enumerate(repos):
        write_rogue(root / repo, "sleep", seed=number, seconds=0.4)
    for number in range(COPIES):
        repos.append(f"rogue/copy-{number}")
        shutil.copytree(root / repos[number + 4], root / repos[-1])
    write_json(root, "hub.json", [{"id": repo, "library": "timm"} for repo in repos])
    with faulty(root) as (endpoint, wrapper):
        yield endpoint, wrapper


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(cpus=0) as made:
        yield made


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_a_cluster_that_is_taken_apart(
    tiny_world: TinyWorld,
    hub: tuple[str, FaultyHub],
    cluster: RayCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint, wrapper = hub
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    first, second = cluster.add(cpus=1), cluster.add(cpus=1)
    calm = Stage(tiny_world, tmp_path / "calm", endpoint, cluster.address)
    stage = Stage(tiny_world, tmp_path / "disturbed", endpoint, cluster.address)
    calm.crawl()
    keys = stage.crawl()
    calm.finish()
    expected = calm.values()
    assert len(expected) == MODELS + COPIES
    assert not [line for line in calm.lines() if line["result"] not in ("indexed", "copy")]

    before = len(wrapper.requests)
    # Its worker is stuck in a read that outlasts the drain time.
    wrapper.spoil(f"/{STALLS}/resolve", faults.slow(60, 1), times=1)
    with stage.driver() as driver:

        def more(count: int) -> None:
            seen = len(stage.lines())
            wait_until(driver, lambda: len(stage.lines()) >= seen + count)

        # SIGTERM: finished or handed back in time.
        more(2)
        stuck = stage.worker_of(keys[STALLS])
        terminated = time.monotonic()
        os.kill(stuck, signal.SIGTERM)
        wait_until(driver, lambda: stuck not in stage.workers(), seconds=60)
        assert time.monotonic() - terminated < DRAIN_SECONDS + 30  # its read ends much later

        more(2)
        os.kill(stage.workers()[0], signal.SIGKILL)
        more(2)
        os.kill(stage.model_processes()[0], signal.SIGKILL)
        more(6)  # a model that loses its process once more is given up
        (server,) = stage.servers()
        os.kill(server, signal.SIGKILL)
        more(3)
        cluster.add(cpus=1)
        cluster.drain(first, DRAIN_SECONDS + 5)
        more(2)
        cluster.remove(second)
        more(2)
        cluster.remove(first)
        done = len(stage.lines())
        assert done < MODELS + COPIES, "something is left for the second driver"
        os.kill(driver.pid, signal.SIGKILL)
        kill_tree(driver)
    stage.finish()

    found = stage.values()
    assert found.keys() == expected.keys()
    for repo, values in expected.items():
        np.testing.assert_array_equal(found[repo], values, err_msg=repo)
    ledger = stage.ledger
    assert not sum(receipt.failures.rows for receipt in ledger.receipts())
    assert not ledger.spooled()
    lines = stage.lines()
    assert {line["attempt"] for line in lines} == {1}
    assert {line["result"] for line in lines} == {"indexed", "copy"}

    fetched = Counter(
        request.address.split("/resolve/")[0].lstrip("/")
        for request in wrapper.requests[before:]
        if "/model.safetensors" in request.address
    )
    # Two workers at a time; the disturbances that cost a download: SIGTERM, SIGKILL, two nodes, the driver.
    again = sum(fetched.values()) - len(fetched)
    assert len(fetched) == MODELS + COPIES
    assert again <= IN_FLIGHT * (1 + 1 + 2 + 3)
    assert max(fetched.values()) <= 6

    assert eventually(lambda: not stage.workers(), 30)
    assert eventually(lambda: not stage.model_processes(), 10)
    assert not [path for path in (stage.scratch / "downloads").rglob("*") if path.is_file()]
    assert eventually(lambda: not stage.servers() and not calm.servers(), 60), "nobody needs them any more"

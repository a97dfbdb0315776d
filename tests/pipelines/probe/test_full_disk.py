"""Disks that are really full, below the scratch folder and below the store, and have room again later."""

from __future__ import annotations

import io
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.full import run_crawl, run_probe
from pipelines.job.job import Job
from pipelines.job.progress import Report
from probelog.errors import StoreError
from probelog.storage.ledger import Ledger
from probelog.storage.store import Store
from tests.support.hub.faults import FaultyHub, faulty
from tests.support.hub.hostile import write_json
from tests.support.hub.rogue_models import write_rogue
from tests.support.worlds.tiny_world import TinyWorld

MODELS = 6
KILOBYTE = 1024


class SmallDisk:
    """A file system in memory of a few megabytes."""

    def __init__(self, folder: Path, kilobytes: int) -> None:
        folder.mkdir()
        options = f"size={kilobytes}k,mode=700"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip("no right to mount a small disk here: what a full one does was NOT tested")
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, leave: int = 0) -> None:
        """Take all room but so many bytes."""
        free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize
        with open(self._filler, "ab") as stream:
            stream.write(bytes(max(0, free - leave)))

    def empty(self) -> None:
        self._filler.unlink()

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=False)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    made = SmallDisk(tmp_path / "disk", 4096)
    yield made
    made.unmount()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyHub]:
    root = tmp_path / "hub"
    repos = [f"small/{number}" for number in range(MODELS)]
    for number, repo in enumerate(repos):
        write_rogue(root / repo, "sleep", seed=number)
    write_json(root, "hub.json", [{"id": repo, "library": "timm"} for repo in repos])
    with faulty(root) as (endpoint, wrapper):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        yield wrapper


def job(world: TinyWorld, store: Path, **settings: Any) -> Job:
    settings = {"preload": ["tests.support.hub.rogue_models"], "workers": 1, **settings}
    return Job.of(world.config(store, **settings), Report(io.StringIO()))


@pytest.mark.acceptance
def test_scratch_is_full(
    tiny_world: TinyWorld, local_ray: None, hub: FaultyHub, disk: SmallDisk, tmp_path: Path
) -> None:
    """Downloads wait for room and are rows then; the log of items and the pixel cache cost nobody anything."""
    made = job(tiny_world, tmp_path / "store", scratch=str(disk.folder), disk_retry_seconds=1.0)
    run_crawl(made)
    disk.fill()
    full = run_probe(made)
    assert full.models == 0
    assert {failure.reason for failure in full.failures} == {"store-failed"}
    assert len(full.failures) == MODELS
    assert all(failure.retryable and "No space left" in failure.detail for failure in full.failures)

    # Room for downloads (12 KB on disk each, three under way), none for an array of pixels (90 x 3 x 32 x 32 bytes).
    disk.empty()
    disk.fill(leave=200 * KILOBYTE)
    tight = run_probe(made)
    assert (tight.models, tight.failures) == (MODELS, [])
    assert not list(disk.folder.glob("probelog/pixels/*.pixels")), "it did not fit"
    assert not [path for path in disk.folder.glob("probelog/downloads/**/*") if path.is_file()]


@pytest.mark.acceptance
def test_the_store_is_full(
    tiny_world: TinyWorld, local_ray: None, hub: FaultyHub, disk: SmallDisk, tmp_path: Path
) -> None:
    """A run waits for room as long as `store_retry_seconds`, then it ends; the next one, once there is some, goes on."""
    store = disk.folder / "store"
    settings = {"scratch": str(tmp_path / "scratch")}
    impatient = job(tiny_world, store, store_retry_seconds=1.0, **settings)
    run_crawl(impatient)

    def at_the_first_download(asked: int) -> None:
        while len(hub.requests) == asked:
            time.sleep(0.01)
        disk.fill()

    filling = threading.Thread(target=at_the_first_download, args=(len(hub.requests),))
    filling.start()
    with pytest.raises(StoreError, match="No space left"):
        run_probe(impatient)
    filling.join()
    (folder,) = (path.name for path in (store / "observations").iterdir())
    ledger = Ledger(Store(store), f"observations/{folder}")
    assert not ledger.receipts()
    patient_job = job(tiny_world, store, store_retry_seconds=120.0, **settings)
    with pytest.raises(StoreError, match="Make room there"):
        run_probe(patient_job)  # it does not even begin
    disk.empty()

    def full_for_a_while(asked: int) -> None:
        at_the_first_download(asked)
        time.sleep(4.0)
        disk.empty()

    emptying = threading.Thread(target=full_for_a_while, args=(len(hub.requests),))
    emptying.start()
    patient = run_probe(patient_job)
    emptying.join()
    assert (patient.models, patient.failures) == (MODELS, [])
    assert not ledger.spooled()

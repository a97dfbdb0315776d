"""Model libraries that are imported before the first worker needs them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster.runtime.warm_up import preloaded_libraries
from probelog.sandbox.spec import home_folder


def servers(scratch: Path) -> list[Path]:
    return sorted(home_folder(scratch / "probelog").glob("*.sock"))


@pytest.mark.usefixtures("local_ray")
def test_workers_find_the_server_that_was_started_ahead(tmp_path: Path) -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Worker:
        """Asks for the server of model processes as a probing actor does."""

        def __init__(self, scratch: Path) -> None:
            from probelog.sandbox.process import fork_server

            self.server = fork_server(scratch, ())

        def fork(self) -> int:
            from probelog.sandbox.fork_server.client import Grant

            child = self.server.fork("pixels", Grant())
            child.kill()
            return child.pid

    with preloaded_libraries(None, tmp_path):
        worker = Worker.remote(tmp_path / "probelog")
        assert ray.get(worker.fork.remote(), timeout=120) > 0
        assert len(servers(tmp_path)) == 1, "each had one of its own"
    assert ray.get(worker.fork.remote(), timeout=120) > 0, "it goes on for whoever still needs it"
    ray.kill(worker)


@pytest.mark.usefixtures("local_ray")
def test_a_folder_that_cannot_be_used_is_ignored(tmp_path: Path) -> None:
    """Whoever needs it is told why."""
    (tmp_path / "probelog").write_text("no folder")
    with preloaded_libraries(None, tmp_path):
        time.sleep(0.5)


def test_a_cluster_warms_up_with_its_first_worker(tmp_path: Path) -> None:
    with preloaded_libraries("auto", tmp_path):
        time.sleep(0.5)
    assert not servers(tmp_path)

"""A job submitted as an operator submits it: a cluster of separate processes, `ray job submit`, a Hub, a bucket."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from cluster.runtime.node import NODE_RESOURCE_VARIABLE
from pipelines.hubserver import running
from probelog.storage.store import Store
from tests.support.processes.operator_command import CHECKOUT, kill_tree
from tests.support.processes.s3 import s3_server
from tests.support.worlds.tiny_world import MODELS, TinyWorld

# A node that vanished is known to be gone after two seconds.
HEALTH = {
    "health_check_initial_delay_ms": 1000, "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000, "health_check_failure_threshold": 4,
}  # fmt: skip
RAY = Path(sys.executable).parent / "ray"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def node(
    environment: dict[str, str], log: Path, *arguments: str
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """`ray start --block`, a process that ends with all that it started, and its directory, which it has for itself.

    A node whose first worker for a job starts removes the job's unpacked code and unpacks it again: nodes that
    share the session's directory would take it from under a process of the job that runs already.
    The directory's name is short, because sockets in it may have 107 characters.
    """
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        # A port of its apart for every node's agent, which takes the jobs: several nodes are one machine here.
        apart = (f"--temp-dir={directory}", f"--dashboard-agent-listen-port={free_port()}")
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [RAY, "start", "--block", *apart, *arguments],
                env=environment,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        try:
            # One after the other: nodes of one machine that start at the same moment take each other's ports.
            wait_until(
                lambda: b"Ray runtime started" in log.read_bytes(), 120, f"{log}: the node does not start"
            )
            yield process, Path(directory)
        finally:
            kill_tree(process)


def submit(port: int, log: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[bytes]:
    """`ray job submit`, again while the cluster's agents are still on their way."""
    words = [RAY, "job", "submit", "--address", f"http://127.0.0.1:{port}", "--working-dir", ".", "--"]
    for _ in range(20):
        with log.open("wb") as stream:
            job = subprocess.Popen(
                [*words, "python", "-m", "pipelines", *arguments],
                cwd=CHECKOUT,
                env=environment,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        wait_until(lambda job=job: job.poll() is not None or b"submitted" in log.read_bytes(), 120, "silent")
        if b"No available agent" not in log.read_bytes():
            return job
        time.sleep(2.0)
    raise AssertionError(log.read_text())


def wait_until(happened: object, seconds: float, what: str) -> None:
    assert callable(happened)
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_a_submitted_job_survives_a_lost_node(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """On a cluster that others use: of its nodes the job has two, and leaves the third alone."""
    with ExitStack() as stack:
        bucket = stack.enter_context(s3_server())
        endpoint = stack.enter_context(running(tiny_world.hub))
        store = f"{bucket}/store"
        config = tiny_world.config_file(tmp_path / "job.toml", store, batch_models=2, workers=2)
        port, dashboard = free_port(), free_port()
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "HF_")) and name != "PYTEST_CURRENT_TEST"
        }
        environment = kept | {
            "PATH": f"{RAY.parent}:{kept['PATH']}",
            "HF_ENDPOINT": endpoint,
            "RAY_AUTH_MODE": "token",  # as deploy/kuberay sets it
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            NODE_RESOURCE_VARIABLE: "probelog",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        start = (
            "--head", "--num-cpus=0", f"--port={port}", "--dashboard-host=127.0.0.1", "--include-dashboard=true",
            f"--dashboard-port={dashboard}", f"--system-config={json.dumps(HEALTH)}",
        )  # fmt: skip
        stack.enter_context(node(environment, tmp_path / "head.log", *start))
        wait_until(lambda: _answers(dashboard), 120, (tmp_path / "head.log").read_text())
        (lost, _), (_, own), (_, others) = (
            stack.enter_context(
                node(
                    environment,
                    tmp_path / f"node-{number}.log",
                    f"--address=127.0.0.1:{port}",
                    "--num-cpus=1",
                    f'--resources={{"{resource}": 1}}',
                )
            )
            for number, resource in enumerate(("probelog", "probelog", "theirs"))
        )

        log = tmp_path / "refused.log"
        refused = submit(dashboard, log, environment | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}, "--help")
        assert refused.wait(timeout=120) != 0
        assert re.search("401|403|nauthenticated|nvalid auth", log.read_text()), log.read_text()
        with pytest.raises(urllib.error.HTTPError, match=r"40[13]"):
            urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/api/jobs/", timeout=30)

        log = tmp_path / "job.log"
        job = submit(dashboard, log, environment, "full", "--config", str(config))
        try:
            observed = Store(store)
            wait_until(
                lambda: (
                    job.poll() is not None
                    or re.search("/(spool|receipts)/", " ".join(observed.names("observations")))
                ),
                400,
                log.read_text(),
            )
            assert job.poll() is None, log.read_text()[-5000:]
            os.killpg(lost.pid, signal.SIGKILL)
            assert job.wait(timeout=400) == 0, log.read_text()[-5000:]
        finally:
            kill_tree(job)

        # Ray names the logs of a worker after the job that it worked for.
        work = "session_*/logs/worker-*-0?000000-*"
        assert list(own.glob(work))
        assert not list(others.glob(work)), "on a node of somebody else"
        told = log.read_text()
        assert "is live" in told
        assert "succeeded" in told

        def ask(*words: str) -> str:
            done = subprocess.run(
                words,
                cwd=CHECKOUT,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        (ledger,) = json.loads(ask("probelog-index", "status", "--store", store, "--json"))["ledgers"]
        assert ledger["indexed"] == len(MODELS)
        hits = [
            json.loads(line)
            for line in ask("probelog", "search", "red", "--index", store, "--json").splitlines()
        ]
        assert len(hits) == 10
        assert {hit["repo"] for hit in hits} <= MODELS.keys()


@pytest.fixture(autouse=True)
def _quiet_server(caplog: pytest.LogCaptureFixture) -> None:
    """The bucket's server would fill a failure's report with its log of requests."""
    caplog.set_level(logging.WARNING, "werkzeug")


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0

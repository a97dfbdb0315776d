"""SIGTERM and Ctrl-C in every stage: one line, the status that shells expect, nothing left behind, and the rerun goes on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipelines.job.stop import SECONDS
from tests.support.hub import faults
from tests.support.paths import CHECKOUT
from tests.support.processes.operator_command import operator, operator_process, told_to_end, wait_until
from tests.support.processes.processes import command_of, eventually
from tests.support.worlds.tiny_world import Indexed

STALLS = "/cleo/timm-bfloat/resolve"
# Stage; what of the indexed store it lacks; what stalls at the Hub; what in the store shows that it is in the middle, or
# nothing: that it waits for the Hub.
STAGES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "crawl": (("catalogue",), "/api/models", ""),
    "probe": (("observations", "completion", "index"), STALLS, "observations/*/spool/*"),
    "complete": (("completion", "index"), "", "completion/*/choice.json"),
    "trees": (("trees", "index"), "text-generation", ""),
    "publish": ((), "", "index/generations/*/probes.lance"),
    "nightly": ((), "/api/models", ""),
    "full": (("observations", "completion", "index"), STALLS, "observations/*/spool/*"),
}


def gcs_address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that name a folder: models', and the server that forks them."""
    commands = (command_of(int(path.name)) for path in Path("/proc").glob("[0-9]*"))
    return [command for command in commands if str(folder) in command]


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("crawl", signal.SIGTERM),
        ("probe", signal.SIGINT),
        ("complete", signal.SIGINT),
        ("trees", signal.SIGTERM),
        ("publish", signal.SIGTERM),
        ("nightly", signal.SIGINT),
        ("full", signal.SIGTERM),
    ],
)
def test_a_stage_that_is_told_to_end(
    stage: str, number: signal.Signals, indexed: Indexed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacks, stalled, moment = STAGES[stage]
    store = indexed.copy_store(tmp_path / "store", *lacks)
    settings: dict[str, object] = {"scratch": str(tmp_path / "scratch"), "workers": 1}
    if stage == "complete":
        settings |= {"rank": None, "regularisation": None}
    if stage == "trees":
        settings["trees"] = {"tasks": [stalled]}
    if stage == "publish":
        settings["prompt"] = "{}"
    if stage != "full":  # which starts a Ray of its own
        settings["ray_address"] = gcs_address()
    file = indexed.world.config_file(tmp_path / "job.toml", store, **settings)
    monkeypatch.setenv("HF_ENDPOINT", indexed.endpoint)
    hub = indexed.hub

    def progress() -> int:
        return len(list(store.glob(moment)) if moment else hub.asked(stalled))

    before = progress()
    if stalled:
        hub.spoil(stalled, faults.slow(0.5, 64))
    try:
        with operator_process(stage, "--config", file) as process:
            wait_until(process, lambda: progress() > before)
            seconds = told_to_end(process, number, stage, "--config", file)
    finally:
        hub.rules.clear()
    # The node's server that forks ends by itself 30 seconds after those who needed it; what it forked, with them.
    assert eventually(lambda: len(processes_of(tmp_path)) <= 1, 5), processes_of(tmp_path)
    ended = operator(stage, "--config", file)
    assert ended.status == 0, ended.err
    # A row of the table in docs/faults.md.
    said = next(line for line in reversed(ended.err.splitlines()) if line.strip())
    print(f"| `{stage}` | {number.name} | {process.returncode} | {seconds:.1f} | {said} |")


# A command of its own, in which a stage is stood in for by a block that hangs or cleans up


_CODE = """
import atexit, hashlib, sys, time
from pipelines.job.stop import stoppable
class Library:
    def __del__(self):
        time.sleep(60)
with stoppable(lambda stopped: f"stopped by {stopped.number.name}", seconds=float(sys.argv[2])):
    try:
        if sys.argv[1] == "large":  # which the interpreter takes apart for long, at the very end
            library = Library()
            atexit.register(print, "closed")
        print("begun", flush=True)
        if sys.argv[1] == "deaf":  # in a library that lets go of the interpreter's lock and does not come back
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**30)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep(float(sys.argv[3]))
        print("clean", flush=True)
"""


def run_block(*arguments: str, signals: list[signal.Signals], pause: float = 0.0) -> tuple[int, str]:
    with subprocess.Popen(
        [sys.executable, "-c", _CODE, *arguments],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.5 if "deaf" in arguments else 0)  # until it is in the library
        for number in signals:
            process.send_signal(number)
            time.sleep(pause)
        out = process.stdout.read()
    return process.returncode, out


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_it_cleans_up_and_says_one_line(number: signal.Signals, status: int) -> None:
    ended = run_block("polite", "20", "0.1", signals=[number, number])
    assert ended == (status, f"cleaning\nclean\nstopped by {number.name}\n")


def test_libraries_are_closed_and_not_taken_apart() -> None:
    ended = run_block("large", "20", "0", signals=[signal.SIGTERM])
    assert ended == (143, "cleaning\nclean\nstopped by SIGTERM\nclosed\n")


def test_what_does_not_end_in_time_is_ended() -> None:
    assert run_block("slow", "2", "60", signals=[signal.SIGTERM]) == (143, "cleaning\nstopped by SIGTERM\n")
    assert run_block("slow", "60", "60", signals=[signal.SIGINT, signal.SIGINT], pause=1.2)[0] == 130


def test_a_library_that_computes_for_hours_is_ended() -> None:
    """The main thread is in C: its handler never runs."""
    assert run_block("deaf", "0.2", "0", signals=[signal.SIGTERM]) == (143, "stopped by SIGTERM\n")


def test_pods_grant_more_time_than_a_stage_takes() -> None:
    for file in sorted((CHECKOUT / "deploy/kuberay").glob("*.yaml")):
        text = json.dumps(list(yaml.safe_load_all(file.read_text())), default=str)
        for seconds in re.findall(r'"terminationGracePeriodSeconds": (\d+)', text):
            assert int(seconds) > SECONDS + 5
    assert SECONDS + 5 < 30, "of pods that name none"

"""The operator's command, in this process for speed or as a process of its own to be killed."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.job.stop import SECONDS
from tests.support.paths import CHECKOUT
from tests.support.processes.processes import command_of, eventually


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it wrote."""

    status: int
    out: str
    err: str


def operator(*arguments: object) -> Ended:
    """Run ``probelog-index`` in this process, on the Ray that is already there."""
    from pipelines.cli import main

    out, err = io.StringIO(), io.StringIO()
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["probelog-index", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(bool(end.code))
    return Ended(status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def operator_process(
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    module: tuple[str, ...] = ("-m", "pipelines"),
) -> Iterator[subprocess.Popen[str]]:
    """``python -m pipelines`` as a process of its own; it and all it started are killed at the end."""
    process = subprocess.Popen(
        [sys.executable, *module, *map(str, arguments)],
        cwd=CHECKOUT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_tree(process)


def kill_tree(process: subprocess.Popen[str]) -> str:
    """SIGKILL to a process and everything it started, Ray included; gives what it had written."""
    for pid in _tree(process.pid) if process.poll() is None else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return process.communicate()[0] or "" if process.stdout and not process.stdout.closed else ""


def told_to_end(process: subprocess.Popen[str], number: signal.Signals, *command: object) -> float:
    """Tell a stage to end, as Kubernetes (SIGTERM) or a terminal (SIGINT) does; returns the seconds until it has.

    It must end within the time that pods grant, with the status that shells expect and one line that says how to go on, without
    a trace of any language, and leave no process behind.

    Args:
        process: of `operator_process`.
        number: the signal.
        command: the arguments that it was started with.
    """
    started, sent = _tree(process.pid), time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    try:
        out, _ = process.communicate(timeout=SECONDS + 5)
    except subprocess.TimeoutExpired:
        raise AssertionError(kill_tree(process)) from None
    seconds = time.monotonic() - sent
    assert process.returncode == 128 + number, out
    assert not re.search(r"\*\*\*|Traceback|Exception ignored", out), out
    assert out.splitlines()[-1] == (
        f"probelog-index: stopped by {number.name}; what was done is kept. To go on: "
        f"probelog-index {' '.join(map(str, command))}"
    )
    assert eventually(lambda: not any(map(command_of, started)), 5), [*map(command_of, started)]
    return seconds


def wait_until(process: subprocess.Popen[str], happened: Callable[[], bool], seconds: float = 200.0) -> None:
    """Return when something has happened while a process is still running."""
    deadline = time.monotonic() + seconds
    while not happened():
        if process.poll() is not None:
            raise AssertionError(
                f"it ended too early, with {process.returncode}:\n{process.communicate()[0]}"
            )
        if time.monotonic() > deadline:
            raise AssertionError(f"it did not happen in {seconds} seconds:\n{kill_tree(process)}")
        time.sleep(0.005)


def _tree(pid: int) -> list[int]:
    """A process and its descendants, itself first."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                found += _tree(int(child))
    return found

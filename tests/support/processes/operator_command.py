"""The operator's command, in this process for speed or as a process of its own to be killed."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.paths import CHECKOUT


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

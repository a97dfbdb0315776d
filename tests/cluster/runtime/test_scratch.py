"""Whose downloads a worker removes when it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cluster.runtime.scratch import own_downloads
from probelog.sandbox.spec import downloads_folder


def test_what_ended_workers_left_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        unwaited = subprocess.Popen([sys.executable, "-c", ""])
        os.waitid(
            os.P_PID, unwaited.pid, os.WEXITED | os.WNOWAIT
        )  # ended, and still in the table of processes
        folders = {
            name: downloads_folder(tmp_path) / name
            for name in (str(running.pid), str(unwaited.pid), "9999999")
        }
        for folder in [*folders.values(), downloads_folder(tmp_path) / "no-number"]:
            (folder / "model").mkdir(parents=True)
        own = own_downloads(tmp_path)
        left = {path.name for path in downloads_folder(tmp_path).iterdir()}
        assert left == {str(running.pid), "no-number", str(os.getpid())}
        assert own == downloads_folder(tmp_path) / str(os.getpid())
        unwaited.wait()
        running.communicate(b"\n")

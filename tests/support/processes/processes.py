"""Processes as the kernel tells of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def command_of(pid: int) -> str:
    """A living process's command line; empty for others."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[1])
    except OSError:
        return 0


def descends_from(pid: int, ancestor: int) -> bool:
    """Whether a process was started by another one, or by one of its descendants."""
    while pid > 1 and pid != ancestor:
        pid = parent_of(pid)
    return pid == ancestor


def megabytes_of(process: int | str, size: str) -> float:
    """A size that the kernel states of a process (``VmHWM``, ``VmRSS``, ``RssAnon``); 0 of one that has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{size}:")) / 1024


def eventually(happened: Callable[[], object], seconds: float = 10) -> bool:
    until = time.monotonic() + seconds
    while not happened() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(happened())


def probers(scratch: Path) -> list[int]:
    """Probing actors that are alive: each has a folder of its own below the node's scratch folder."""
    folders = (scratch / "downloads").glob("*")
    return sorted(int(path.name) for path in folders if "Prober" in command_of(int(path.name)))

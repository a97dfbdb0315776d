"""How much a process may take: memory, files, cores; and that it does not outlive whoever forked it."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

from probelog.sandbox.guards.system_calls import prctl

_PR_SET_PDEATHSIG = 1
#: Open files: shards of a model, libraries' modules, and pipes, whose contents no other limit counts.
_OPEN_FILES = 1024
#: Threads beyond all that the machine has at the moment, whose user may be the same.
_MORE_THREADS = 1024


def limit_memory(size: int) -> bool:
    """Let allocations fail that go ``size`` bytes beyond what the process holds now (``RLIMIT_DATA``).

    Counts what is private and writable. Files mapped for reading and memory of devices do not count, so that it
    can be used with CUDA, which reserves address space without end; memory shared with others does not either, which
    `seccomp.only_computing` refuses. Returns whether the platform allows it: Linux.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return False
    held = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))
    _lower(resource.RLIMIT_DATA, held * 1024 + size)
    return True


def limit_the_rest(largest_file: int) -> None:
    """No core dumps, no file longer than ``largest_file`` bytes, a bounded number of open files and of threads."""
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, largest_file)
    _lower(resource.RLIMIT_NOFILE, _OPEN_FILES)
    if sys.platform == "linux":
        _lower(resource.RLIMIT_MSGQUEUE, 0)
        threads = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
        _lower(resource.RLIMIT_NPROC, threads + _MORE_THREADS)


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when the thread that forked it ends (Linux; elsewhere nothing happens).

    Args:
        parent: the number of the process that forked this one; where it has ended already, so does this one.
    """
    if sys.platform == "linux":
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _lower(what: int, bound: int) -> None:
    _, hard = resource.getrlimit(what)
    bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
    resource.setrlimit(what, (bound, bound))

"""How much a process may take: memory, files, cores; and that it does not outlive whoever forked it."""

from __future__ import annotations

import contextlib
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
#: Address space that is no memory: what allocators reserve, libraries that are imported late.
_RESERVED = 1 << 30
#: Of the main thread, which may grow to what its hard limit says, and counts as no allocation.
_STACK = 8 << 20


def limit_memory(size: int, *, device: bool = False) -> bool:
    """Let allocations fail that go ``size`` bytes beyond what the process holds now (``RLIMIT_DATA``).

    Counts what is private and writable, at this moment: memory that is made read-only once it is filled does not count,
    nor do stacks and the tables of pages. So the address space has a limit as well (``RLIMIT_AS``), which whoever evades
    the first meets at about twice ``size``: a file may be mapped as well as read. Memory shared with others counts for
    neither; `seccomp.only_computing` refuses it. Returns whether the platform allows it: Linux.

    Args:
        size: in bytes.
        device: without the second limit: CUDA reserves address space without end.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return False
    lines = (line.split() for line in status.splitlines() if line.startswith("Vm"))
    held = {name: int(value) << 10 for name, value, _ in lines}
    _lower(resource.RLIMIT_DATA, held["VmData:"] + size)
    if not device:
        _lower(resource.RLIMIT_AS, held["VmSize:"] + 2 * size + _RESERVED)
    return True


def limit_the_rest(largest_file: int) -> None:
    """No core dumps, no file longer than ``largest_file`` bytes, a bounded stack, number of open files and of threads.

    Where the machine runs out of memory all the same, this process is the first to be ended.
    """
    # One byte is no file either, and what Linux gives no program that takes core dumps (`man 5 core`), who would not
    # ask for a limit of 0. A process that lowers it has no memory in its dump all the same.
    _lower(resource.RLIMIT_CORE, 1)
    _lower(resource.RLIMIT_FSIZE, largest_file)
    _lower(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _lower(resource.RLIMIT_STACK, _STACK)
    if sys.platform == "linux":
        _lower(resource.RLIMIT_MSGQUEUE, 0)
        _lower(resource.RLIMIT_NPROC, threads_of_machine() + _MORE_THREADS)
        for name, value in (("oom_score_adj", "1000"), ("coredump_filter", "0")):
            with contextlib.suppress(OSError):
                Path("/proc/self", name).write_text(value)


def threads_of_machine() -> int:
    """How many there are now, of all processes (Linux)."""
    return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])


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

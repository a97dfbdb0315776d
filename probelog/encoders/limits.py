"""What the process of an index's encoder gives up, and its bounds. POSIX only: elsewhere this cannot be imported."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sys
import threading
import time

# Of what goes to stderr.
_LOG_BYTES = 1 << 16
_WATCH_SECONDS = 0.05


def give_up_files() -> None:
    """Open no file and no connection any more, write none, and leave no core dump."""
    # One byte is no file either, and Linux gives no program a dump then, which with a limit of 0 it does (`man 5 core`).
    for limit, size in (
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_CORE, 1),
        (resource.RLIMIT_FSIZE, _LOG_BYTES),
    ):
        most = resource.getrlimit(limit)[1]
        size = size if most == resource.RLIM_INFINITY else min(size, most)
        resource.setrlimit(limit, (size, size))


def bound_time(seconds: float) -> None:
    """Should the other side be gone, nobody ends a request that goes on for ever: the system does then."""
    limit = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def bound_memory(size: int, mapped: int) -> None:
    """Allocations fail beyond so many bytes more; where the system has no such limit, the process ends."""
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (mapped + size, mapped + size))
    else:
        threading.Thread(target=_end_above, args=[_resident_bytes() + size], daemon=True).start()


def _end_above(most: int) -> None:
    while _resident_bytes() <= most:
        time.sleep(_WATCH_SECONDS)
    os.write(2, b"it needs more memory than it may have\n")
    os._exit(1)


def _resident_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mapped_bytes() -> int:
    """Address space that the process has now; 0 where the system does not say."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as stream:
        return int(stream.read().split()[0]) * resource.getpagesize()
    return 0

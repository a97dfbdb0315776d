"""Model libraries imported before anybody needs them: some seconds on one core, while a job prepares, lists and starts Ray."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.runtime.scratch import scratch_folder
from cluster.runtime.session import is_local
from probelog.errors import ProbeLogError
from probelog.sandbox.process import fork_server

# Ray's own default: its workers, and what they start, give way to other programs.
_NICENESS, _RAYS_NICENESS = 15, "RAY_worker_niceness"


@contextlib.contextmanager
def preloaded_libraries(
    address: str | None, scratch: Path | None, preload: Sequence[str] = (), device: str = "cpu"
) -> Iterator[None]:
    """Have this machine's fork server start now, and stay for as long as the block runs. Returns at once.

    Only where the job's Ray is this machine: those of a cluster start theirs with their first worker.

    Args:
        address: as `cluster.runtime.session.session` is given it.
        scratch: the configuration's, as the probing actors are given it.
        preload: likewise.
        device: what they will compute on, ``cpu`` or ``cuda``.
    """
    if not is_local(address):
        yield
        return
    ended = threading.Event()

    def keep() -> None:
        _give_way()
        # What keeps it from starting is for the probing actors to tell.
        with contextlib.suppress(ProbeLogError, OSError, subprocess.SubprocessError):
            server = fork_server(scratch_folder(scratch), preload, device)
            ended.wait()
            server.close()

    # A daemon: whoever fails early need not wait for imports.
    threading.Thread(target=keep, name="libraries at hand", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _give_way() -> None:
    """The calling thread, and the processes that it starts (on Linux; elsewhere a priority is a process's)."""
    if sys.platform == "linux":
        niceness = int(os.environ.get(_RAYS_NICENESS, _NICENESS))
        with contextlib.suppress(OSError):  # no way back from a higher one
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)

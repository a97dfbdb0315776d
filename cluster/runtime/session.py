"""The Ray that a job runs on: a cluster where there is one, this machine otherwise."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.runtime.scratch import scratch_folder
from probelog.errors import ProbeLogError, UsageError

# A socket's path may have 107 characters, and Ray adds 68.
_LONGEST_FOLDER = 38


# Of a `shared_session`: what ends a Ray that was started in it.
_shared: contextlib.ExitStack | None = None


@contextmanager
def shared_session() -> Iterator[None]:
    """The first `session` within the block stays to its end, for those that follow; without one no Ray is started."""
    global _shared
    if _shared is not None:
        yield
        return
    with contextlib.ExitStack() as _shared:
        try:
            yield
        finally:
            _shared = None


@contextmanager
def session(address: str | None = None, cpus: int | None = None) -> Iterator[None]:
    """Connect to a cluster, or start Ray on this machine, for as long as the block runs or the `shared_session` around it.

    Args:
        address: a cluster's address; by default ``RAY_ADDRESS`` (set inside a Ray job), else this machine.
        cpus: how many CPUs a local Ray offers; by default all.

    Raises:
        ProbeLogError: the cluster cannot be reached.
    """
    import ray

    with contextlib.ExitStack() as own:
        if not ray.is_initialized():
            (own if _shared is None else _shared).enter_context(_started(_resolved_address(address), cpus))
        yield


@contextmanager
def _started(address_of_ray: str, cpus: int | None) -> Iterator[None]:
    try:
        with _own_signal_handlers():
            _start(address_of_ray, cpus)
        yield
    finally:
        import ray

        ray.shutdown()


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Handlers of signals that are there stay: those of Ray's libraries write a trace of C++ to the terminal."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # one that Python knows of
                    signal.signal(number, handler)


def _start(address_of_ray: str, cpus: int | None) -> None:
    import ray

    # Starting Ray forks into other programs, of which no thread or lock of LanceDB's can be in the way.
    warnings.filterwarnings("ignore", "lancedb fork support is experimental", RuntimeWarning)
    try:
        if address_of_ray == "local":
            _have_private_token()
            with _private_folder():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        else:
            ray.init(address=address_of_ray, log_to_driver=False, logging_level=logging.WARNING)
    except UsageError:
        raise
    except Exception as error:  # reason: a node that does not come up in time raises Exception itself
        raise ProbeLogError(f"Ray at {address_of_ray!r} cannot be reached or started: {error}") from error


def _have_private_token() -> None:
    """The token that a Ray of this machine asks for: whoever has it runs code as this user.

    Ray would make the file itself, for everybody to read. Where the home folder cannot be written (a read-only container)
    there is a token for this process and what it starts.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or any(
        os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    ):
        return
    file = Path.home() / ".ray" / "auth_token"
    token = secrets.token_hex(32)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(descriptor, token.encode())
            os.close(descriptor)
        file.chmod(0o600)
    except OSError:
        os.environ["RAY_AUTH_TOKEN"] = token


@contextmanager
def _private_folder() -> Iterator[None]:
    """Where Ray keeps its sockets, code and logs, unless ``RAY_TMPDIR`` says it: below a folder of this user alone.

    Ray lets everybody write there: on a shared machine any user could put other code in the place of a worker's.

    Raises:
        UsageError: somebody else has made that folder.
    """
    if "RAY_TMPDIR" in os.environ:
        yield
        return
    try:
        folder = str(scratch_folder(None))
    except UsageError as error:
        raise UsageError(f"{error}, and RAY_TMPDIR, for the files of Ray, to a short one") from None
    if len(folder) > _LONGEST_FOLDER:
        yield
        return
    os.environ["RAY_TMPDIR"] = folder
    try:
        yield
    finally:
        del os.environ["RAY_TMPDIR"]


def is_local(address: str | None = None) -> bool:
    """Whether a session's Ray is started on this machine, for this job alone."""
    return _resolved_address(address) == "local"


def _resolved_address(address: str | None) -> str:
    return address or os.environ.get("RAY_ADDRESS") or "local"


def worker_count(cpus_per_worker: float, gpus_per_worker: float) -> int:
    """How many workers the cluster's present resources hold, at least one."""
    from cluster.runtime.node import own_resources

    resources = own_resources()
    counts = []
    if cpus_per_worker > 0:
        counts.append(int(resources.get("CPU", 0) / cpus_per_worker + 1e-6))
    if gpus_per_worker > 0:
        counts.append(int(resources.get("GPU", 0) / gpus_per_worker + 1e-6))
    return max(1, min(counts, default=1))

"""Processes for strangers' models, made in milliseconds: a server that has imported the libraries and only forks.

    actor (token, network) --pipe--> server (libraries, no network) --fork--> process (one model at a time)

The server is started with an environment of its own, so that neither it nor what it forks ever held a secret, and
takes the network away from itself before anything else is imported. It has one thread and runs no model, which is
what makes forking it sound. When the process that started it ends, however that happens, it ends all it forked.

Messages between the two sides are JSON and plain bytes, never pickles: what a model's process answers is a
stranger's word.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from probelog.errors import ProbeLogError

_FORK, _REAP = b"F", b"R"
_ANSWER = struct.Struct("<qq")  # pid, status
_RUNNING = -(1 << 40)
# The longest answer: 10,000 logits on 10,000 probes take 400 MB.
_LONGEST = 1 << 32
_START_SECONDS = 300.0

# What the libraries need to find themselves, their devices and their threads; everything else stays behind.
_KEPT = (
    "PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME", "CUDA_PATH", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "PYTHONHASHSEED",
)  # fmt: skip
_KEPT_PREFIXES = ("NVIDIA_", "CUBLAS_", "CUDNN_", "OMP_", "MKL_", "KMP_", "PYTORCH_", "MALLOC_")


class ProcessLostError(ProbeLogError):
    """A process ended without an answer; ``signal`` is what ended it, 0 where it left by itself."""

    def __init__(self, status: int) -> None:
        self.signal = -status if status < 0 else 0
        name = signal.Signals(self.signal).name if self.signal in set(signal.Signals) else str(self.signal)
        super().__init__(
            f"its process was ended by {name}" if self.signal else f"its process ended with status {status}"
        )


class ForkServer:
    """The side of whoever needs processes. Any number of threads may use it.

    Raises:
        ProbeLogError: the server cannot be started.
    """

    def __init__(self, entry: str, preload: Sequence[str], home: Path) -> None:
        """``entry`` (``module:function``) runs in each process and gets its end of the pipe; ``preload`` names
        modules to import first; ``home`` is a folder for what libraries insist on writing.
        """
        mine, theirs = socket.socketpair()
        self._control = mine
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - this very interpreter
                [sys.executable, "-m", __name__, str(theirs.fileno()), entry, *preload],
                env=bare_environment(home),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        mine.settimeout(_START_SECONDS)
        try:
            ready = mine.recv(1)
        except OSError:
            ready = b""
        if not ready:
            self.close()
            raise ProbeLogError(
                f"the process that is to run models did not start (status {self._process.poll()}); "
                "its messages are in this worker's log"
            )

    def fork(self) -> Child:
        """A fresh process."""
        mine, theirs = socket.socketpair()
        with self._lock, theirs:
            socket.send_fds(self._control, [_FORK], [theirs.fileno()])
            pid, _ = self._answer()
        return Child(self, pid, Connection(mine.detach()))

    def reap(self, pid: int) -> int | None:
        """The exit status of a process that has ended (a signal's number, negative), None while it runs."""
        with self._lock:
            self._control.send(_REAP + _ANSWER.pack(pid, 0))
            _, status = self._answer()
        return None if status == _RUNNING else status

    def close(self) -> None:
        """End the server and everything it forked."""
        self._control.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> tuple[int, int]:
        data = b""
        while len(data) < _ANSWER.size:
            try:
                piece = self._control.recv(_ANSWER.size - len(data))
            except OSError:
                piece = b""
            if not piece:
                raise ProbeLogError("the process that forks model processes has ended")
            data += piece
        pid, status = _ANSWER.unpack(data)
        return pid, status


class Child:
    """One forked process and the pipe to it. One thread at a time asks; any may `kill`."""

    def __init__(self, server: ForkServer, pid: int, connection: Connection) -> None:
        self.pid = pid
        self._server = server
        self._connection = connection
        self._status: int | None = None
        self._lock = threading.Lock()

    def ask(self, timeout: float | None, **message: Any) -> tuple[dict[str, Any], list[bytes]]:
        """Send an object of plain values and wait for the answer: an object, and byte strings beside it.

        Raises:
            TimeoutError: no answer after ``timeout`` seconds. The process is gone then.
            ProcessLostError: it ended instead of answering.
            ValueError: the answer is none.
        """
        try:
            self._connection.send_bytes(json.dumps(message).encode())
            if not self._connection.poll(None if timeout is None else max(timeout, 0.0)):
                self.kill()
                raise TimeoutError
            answer = json.loads(self._connection.recv_bytes(_LONGEST))
            blobs = [self._connection.recv_bytes(_LONGEST) for _ in range(int(answer["blobs"]))]
        except (EOFError, ConnectionError):
            raise ProcessLostError(self.kill()) from None
        except (KeyError, TypeError) as error:
            raise ValueError(f"no answer: {error!r}") from None
        return answer, blobs

    def kill(self) -> int:
        """End the process and all that it started, unless it has ended; returns its exit status."""
        with self._lock:
            if self._status is None:
                # Until it is reaped its number is taken, so that no stranger can be hit. One that has just closed
                # its pipe is about to leave by itself, and what ended it is worth knowing.
                self._status = self._wait(0.5)
                if self._status is None:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(self.pid, signal.SIGKILL)
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(self.pid, signal.SIGKILL)
                    self._status = self._wait(30.0)
                if self._status is None:
                    self._status = -signal.SIGKILL  # stuck in a driver; the kernel ends it when it comes back
        return self._status

    def close(self) -> None:
        """End the process and the pipe."""
        self.kill()
        self._connection.close()

    def _wait(self, seconds: float) -> int | None:
        until = time.monotonic() + seconds
        pause = 0.001
        while (status := self._reaped()) is None and time.monotonic() < until:
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return status

    def _reaped(self) -> int | None:
        try:
            return self._server.reap(self.pid)
        except ProbeLogError:  # the server is gone, and its processes with it
            return -signal.SIGKILL


def answer(connection: Connection, blobs: Sequence[bytes | memoryview] = (), **message: Any) -> None:
    """The other side of `Child.ask`."""
    connection.send_bytes(json.dumps({**message, "blobs": len(blobs)}).encode())
    for blob in blobs:
        connection.send_bytes(blob)


def bare_environment(home: Path, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for models: what finds libraries and devices, and no token or credential."""
    source = os.environ if given is None else given
    kept = {name: value for name, value in source.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    return kept | {
        "HOME": str(home),
        "TMPDIR": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # A pool of threads made by an import would not survive the fork.
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in sys.path if path)),
    }


def _serve(control: socket.socket, entry: str, preload: Sequence[str]) -> None:
    from probelog import confinement

    confinement.without_network()
    for name in preload:
        importlib.import_module(name)
    module, _, function = entry.partition(":")
    run = getattr(importlib.import_module(module), function)
    control.send(b"+")
    children: set[int] = set()
    try:
        while True:
            message, descriptors, _, _ = socket.recv_fds(control, 1 + _ANSWER.size, 1)
            if not message:
                return
            if message[:1] == _FORK:
                pid = os.fork()
                if pid == 0:
                    _child(control, descriptors[0], run)
                os.close(descriptors[0])
                children.add(pid)
                control.send(_ANSWER.pack(pid, 0))
            else:
                pid, _ = _ANSWER.unpack(message[1:])
                control.send(_ANSWER.pack(pid, _status(pid, children)))
    finally:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _status(pid: int, children: set[int]) -> int:
    if pid not in children:
        return _RUNNING
    found, status = os.waitpid(pid, os.WNOHANG)
    if not found:
        return _RUNNING
    children.discard(pid)
    return os.waitstatus_to_exitcode(status)


def _child(control: socket.socket, descriptor: int, run: Any) -> None:
    """Never returns: the server's own loop must not go on twice."""
    status = 1
    try:
        from probelog import confinement

        confinement.die_with_parent()
        control.close()
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        run(Connection(descriptor))
        status = 0
    except (EOFError, ConnectionError):
        status = 0  # the other side is gone
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with its owner, who may have a drain to finish
    with socket.socket(fileno=int(sys.argv[1])) as _control:
        _serve(_control, sys.argv[2], sys.argv[3:])

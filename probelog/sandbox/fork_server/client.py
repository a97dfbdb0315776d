"""Processes for untrusted models, forked in milliseconds: the side of whoever needs them.

One process a node (`probelog.sandbox.fork_server.forking`) has imported the libraries and forks. It is started by the first who
needs it, isolated (`probelog.sandbox.fork_server.bootstrap`) and with an environment of its own, so that neither it nor what it forks
ever held a secret. It ends all that it forked for somebody when that process ends, however that happens, and itself
when nobody has needed it for a while.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from probelog.errors import ProbeLogError
from probelog.sandbox.fork_server import bootstrap
from probelog.sandbox.fork_server.confinement import Confinement
from probelog.sandbox.fork_server.forking import KEY_BYTES, LENGTH, LONGEST, WELCOME, Request, short
from probelog.sandbox.protocol import Channel, ClosedError
from probelog.storage.encoding import short_key

_ANSWER_SECONDS = 300.0

# What the libraries need to find themselves, their devices and their threads; everything else stays behind.
_KEPT = (
    "PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "LD_PRELOAD", "CUDA_HOME", "CUDA_PATH",
)  # fmt: skip
_KEPT_PREFIXES = ("NVIDIA_", "CUBLAS_", "CUDNN_", "OMP_", "MKL_", "KMP_", "PYTORCH_", "MALLOC_")
# Whose folders are the libraries' where the interpreter itself does not know them.
_LIBRARIES = ("numpy", "pyarrow", "torch", "timm", "transformers", "huggingface_hub", "PIL", "safetensors")


class ProcessLostError(ProbeLogError):
    """A process ended without an answer; ``signal`` is what ended it, 0 where it left by itself."""

    def __init__(self, status: int) -> None:
        self.signal = -status if status < 0 else 0
        name = signal.Signals(self.signal).name if self.signal in set(signal.Signals) else str(self.signal)
        super().__init__(
            f"its process was ended by {name}" if self.signal else f"its process ended with status {status}"
        )


@dataclass(frozen=True)
class Role:
    """A kind of process: ``entry`` (``module:function``) is what runs in it, ``rights`` what it may do."""

    entry: str
    rights: Confinement


@dataclass(frozen=True)
class Grant:
    """What one process is given beside the rights of its role.

    Attributes:
        readable: folders and files: the one model that it is for.
        memory_bytes: that it may allocate beyond what the libraries hold; None for no limit.
        devices: variables that say which of the node's devices are its own.
    """

    readable: tuple[str, ...] = ()
    memory_bytes: int | None = None
    devices: Mapping[str, str] = field(default_factory=dict)


class ForkServer:
    """The side of whoever needs processes. Any number of threads may use it.

    Raises:
        ProbeLogError: the server cannot be started.
    """

    def __init__(
        self,
        roles: Mapping[str, Role],
        preload: Sequence[str],
        home: Path,
        idle_seconds: float = 30.0,
        warm_up: str | None = None,
    ) -> None:
        """Connect to the node's server, or start it.

        Args:
            roles: the kinds of processes, by name.
            preload: modules to import first.
            home: a folder of this user alone for the server's socket and key.
            idle_seconds: without anybody who needs it the server ends after so long.
            warm_up: ``module:function``, see `probelog.sandbox.fork_server.forking.main`.
        """
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = threading.Lock()
        described = {
            name: {"entry": role.entry, "rights": role.rights.to_json()}
            for name, role in sorted(roles.items())
        }
        places = packages([*(role.entry.partition(":")[0] for role in roles.values()), *preload])
        setup = {
            "roles": described,
            "preload": list(preload),
            "warm_up": warm_up,
            "places": places,
            "libraries": library_folders(),
        }
        address = (
            home / f"{short_key(sys.executable, json.dumps(setup, sort_keys=True), _newest_code())}.sock"
        )
        self._open = partial(_connected_or_started, address, setup, idle_seconds)
        try:
            self._control = self._open()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # The disk may empty until a process is needed: as if the server were lost.
            self._control = socket.socket(socket.AF_UNIX)

    def fork(self, role: str, grant: Grant) -> Child:
        """A fresh process, confined from its first moment; where the server was killed, one of a new server.

        Raises:
            OSError: a new server cannot write its key.
        """
        mine, theirs = socket.socketpair()
        request = Request(
            "fork", role=role, readable=grant.readable, memory_bytes=grant.memory_bytes, devices=grant.devices
        )
        with self._lock, theirs:
            try:
                answer = self._ask(request, [theirs.fileno()])
            except _ServerLostError:
                self._control.close()
                self._control = self._open()
                answer = self._ask(request, [theirs.fileno()])
            return Child(self, self._control, int(answer["pid"]), Channel(mine.detach()))

    def status(self, control: socket.socket, pid: int, command: str = "status") -> int | None:
        """The exit status of a process that has ended (a signal's number, negative), None while it runs.

        Args:
            control: the connection to the server that forked it.
            pid: its number, as the server counts.
            command: ``end`` or ``forget`` to end it first, with all that it started; after the latter nobody asks again.

        Raises:
            ProbeLogError: that server has ended, and its processes with it.
        """
        with self._lock:
            if control is not self._control:
                raise _ServerLostError
            answer = self._ask(Request(command, pid=pid))
        return None if answer["status"] is None else int(answer["status"])

    @property
    def pid(self) -> int:
        """The number of the server's process, as this one counts (Linux)."""
        option = self._control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(option[:4], sys.byteorder)

    def close(self) -> None:
        """End everything that was forked from here."""
        self._control.close()

    def _ask(self, request: Request, descriptors: Sequence[int] = ()) -> dict[str, Any]:
        text = json.dumps(asdict(request)).encode()
        if len(text) > LONGEST:
            raise ProbeLogError("the paths that a model's process may read are too long")
        try:
            socket.send_fds(self._control, [LENGTH.pack(len(text)) + text], descriptors)
            (length,) = LENGTH.unpack(self._read(LENGTH.size))
            answer: dict[str, Any] = json.loads(self._read(length))
        except OSError:
            raise _ServerLostError from None
        return answer

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._control.recv(size - len(data))
            if not piece:
                raise _ServerLostError
            data += piece
        return data


class _ServerLostError(ProbeLogError):
    def __init__(self) -> None:
        super().__init__("the process that forks model processes has ended")


def packages(modules: Sequence[str]) -> dict[str, str]:
    """Where the top-level packages of some modules lie (a folder, or a module's file), this project's own included."""
    places = {}
    for name in sorted({module.partition(".")[0] for module in (__name__, *modules)}):
        spec = importlib.util.find_spec(name)
        if spec is not None:
            folders = list(spec.submodule_search_locations or [])
            places[name] = str(folders[0] if folders else spec.origin)
    return places


def library_folders() -> list[str]:
    """The folders that the libraries are installed in; a file that only bears the name of one is none."""
    specs = [importlib.util.find_spec(name) for name in _LIBRARIES]
    origins = [Path(spec.origin) for spec in specs if spec is not None and spec.origin is not None]
    folders = {origin.parent.parent for origin in origins}
    return sorted(str(folder) for folder in folders if folder.name in ("site-packages", "dist-packages"))


def _newest_code() -> int:
    """Changes with the code that the server would run: an old one must not answer for it."""
    return max(path.stat().st_mtime_ns for path in Path(__file__).parents[1].rglob("*.py"))


def _connected(address: Path) -> socket.socket | None:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(_ANSWER_SECONDS)
    try:
        key = _key_file(address).read_bytes()
        with short(address) as path:
            made.connect(path)
        made.sendall(key)
        # A server that was about to leave has closed the connection by now.
        if made.recv(1) == WELCOME:
            return made
    except OSError:
        pass
    made.close()
    return None


def _connected_or_started(address: Path, setup: Mapping[str, Any], idle_seconds: float) -> socket.socket:
    return _connected(address) or _started(address, setup, idle_seconds)


def _started(address: Path, setup: Mapping[str, Any], idle_seconds: float) -> socket.socket:
    with open(address.with_suffix(".lock"), "w") as lock, open(address.with_suffix(".log"), "ab") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = _connected(address)  # by whoever had the lock before
        if connection is not None:
            return connection
        log.truncate(0)
        # Nothing of an earlier server's is read again.
        shutil.rmtree(own_home(address), ignore_errors=True)
        own_home(address).mkdir(mode=0o700)
        arguments = {
            **setup,
            "address": str(address),
            "key_digest": _new_key(_key_file(address)),
            "idle_seconds": idle_seconds,
        }
        starter = subprocess.run(  # noqa: S603 - this very interpreter
            [sys.executable, "-I", *_options(), bootstrap.__file__, json.dumps(arguments)],
            env=bare_environment(own_home(address)),
            cwd=own_home(address),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
            timeout=_ANSWER_SECONDS,
            check=False,
        )
        connection = _connected(address)
        if connection is None:
            raise ProbeLogError(
                f"the process that is to fork model processes did not start (status {starter.returncode}); "
                f"its messages are in {log.name}"
            )
        return connection


def _key_file(address: Path) -> Path:
    return address.with_suffix(".key")


def _new_key(path: Path) -> str:
    """Write a key for whoever may read it, which is this user outside of any model's process; returns its digest."""
    key = secrets.token_bytes(KEY_BYTES)
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, key)
    finally:
        os.close(descriptor)
    return hashlib.sha256(key).hexdigest()


def _options() -> list[str]:
    return ["-B"] if sys.dont_write_bytecode else []


class Child:
    """One forked process and the channel to it. One thread at a time asks; any may `kill`."""

    def __init__(self, server: ForkServer, control: socket.socket, pid: int, channel: Channel) -> None:
        self.pid = pid  # as its server counts, which may live in a namespace of its own
        self._server, self._control, self._channel = server, control, channel
        self._asked = 0
        self._status: int | None = None
        self._lock = threading.Lock()

    def ask(
        self, timeout: float | None, *, most: Sequence[int] = (), **message: object
    ) -> tuple[dict[str, Any], list[bytearray]]:
        """Send an object of plain values and wait for the answer: an object, and byte strings beside it.

        Args:
            timeout: seconds for all of it; None to wait for ever.
            most: how many strings may come, and the most bytes of each.
            **message: the object.

        Raises:
            TimeoutError: no answer after ``timeout`` seconds. The process is gone then.
            ProcessLostError: it ended instead of answering.
            ValueError: the answer is none.
        """
        until = None if timeout is None else time.monotonic() + timeout
        self._asked += 1
        try:
            self._channel.send({**message, "number": self._asked}, until=until)
            answer, blobs = self._channel.receive(most, until)
        except TimeoutError:
            self.kill()
            raise
        except ClosedError:
            raise ProcessLostError(self.kill()) from None
        if answer.pop("number", None) != self._asked:
            raise ValueError("an answer to another question")
        return answer, blobs

    def kill(self) -> int:
        """End the process and all that it started, unless it has ended; returns its exit status."""
        with self._lock:
            if self._status is None:
                # One that has just closed its end is about to leave by itself, and what ended it is worth knowing.
                self._status = self._wait(0.5)
                if self._status is None:
                    self._status = self._wait(30.0, "end")
                if self._status is None:
                    self._status = -signal.SIGKILL  # stuck in a driver; the kernel ends it when it comes back
        return self._status

    def forget(self) -> None:
        """Have the process ended, without waiting until it has."""
        with self._lock:
            if self._status is None:
                self._status = -signal.SIGKILL
                with contextlib.suppress(ProbeLogError):  # the server is gone, and its processes with it
                    self._server.status(self._control, self.pid, command="forget")

    def _wait(self, seconds: float, command: str = "status") -> int | None:
        until = time.monotonic() + seconds
        pause = 0.001
        while (status := self._ended(command)) is None and time.monotonic() < until:
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return status

    def _ended(self, command: str) -> int | None:
        try:
            return self._server.status(self._control, self.pid, command)
        except ProbeLogError:  # the server is gone, and its processes with it
            return -signal.SIGKILL


def own_home(address: Path) -> Path:
    """Where a server's libraries think that their user lives. No model's process may write to it."""
    return address.with_suffix(".home")


def bare_environment(home: Path, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for models: what finds libraries and devices, and no token or credential."""
    source = os.environ if given is None else given
    kept = {name: value for name, value in source.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    return (
        {"OMP_NUM_THREADS": "1"}
        | kept
        | {
            "HOME": str(home),
            "TMPDIR": str(home),
            "HF_HOME": str(home / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Its user has no entry in /etc/passwd.
            "LOGNAME": "model",
            # A pool of threads made by an import would not survive the fork.
            "OPENBLAS_NUM_THREADS": "1",
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        }
    )

"""Processes for untrusted models, forked in milliseconds: one server a node that has imported the libraries and forks.

    actors (token, network) --socket--> server (libraries, no network) --fork--> process (one model at a time)

The server is started by the first who needs it, with an environment of its own, so that neither it nor what it forks
ever held a secret, and takes the network away from itself before anything else is imported. It has one thread and
runs no model, which is what makes forking it sound. It ends all that it forked for somebody when that process ends,
however that happens, and itself when nobody has needed it for a while.

Messages between the two sides are JSON and plain bytes, never pickles: what a model's process answers is
untrusted.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import importlib.util
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from probelog.errors import ProbeLogError
from probelog.storage.encoding import short_key

_FORK, _REAP = 0, 1
_REQUEST = struct.Struct("<Bq")  # what, and of which process
_ANSWER = struct.Struct("<q")  # a process or its status
_RUNNING = -(1 << 40)
# The longest answer: 10,000 logits on 10,000 probes take 400 MB.
_LONGEST = 1 << 32
_ANSWER_SECONDS = 300.0

# What the libraries need to find themselves, their devices and their threads; everything else stays behind.
_KEPT = (
    "PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "LD_PRELOAD", "CUDA_HOME",
    "CUDA_PATH", "PYTHONHASHSEED",
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

    def __init__(self, entry: str, preload: Sequence[str], home: Path, idle_seconds: float = 30.0) -> None:
        """Connect to the node's server, or start it.

        Args:
            entry: ``module:function`` that runs in each process and gets its end of the pipe.
            preload: modules to import first.
            home: a folder of this user alone for the server's socket; libraries may write to `writable_home` in it.
            idle_seconds: without anybody who needs it the server ends after so long.
        """
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable_home(home).mkdir(exist_ok=True)
        self._lock = threading.Lock()
        arguments = [entry, *preload]
        address = home / f"{short_key(sys.executable, *_places(arguments), *arguments, _newest_code())}.sock"
        self._open = partial(_connected_or_started, address, arguments, home, idle_seconds)
        self._control = self._open()

    def fork(self) -> Child:
        """A fresh process; where the server was killed, one of a new server."""
        mine, theirs = socket.socketpair()
        with self._lock, theirs:
            try:
                pid = self._forked(theirs)
            except _ServerLostError:
                self._control.close()
                self._control = self._open()
                pid = self._forked(theirs)
            return Child(self, self._control, pid, Connection(mine.detach()))

    def reap(self, control: socket.socket, pid: int) -> int | None:
        """The exit status of a process that has ended (a signal's number, negative), None while it runs.

        Args:
            control: the connection to the server that forked it.
            pid: its number.

        Raises:
            ProbeLogError: that server has ended, and its processes with it.
        """
        with self._lock:
            if control is not self._control:
                raise _ServerLostError
            status = self._answer([_REQUEST.pack(_REAP, pid)])
        return None if status == _RUNNING else status

    def close(self) -> None:
        """End everything that was forked from here."""
        self._control.close()

    def _forked(self, theirs: socket.socket) -> int:
        return self._answer([_REQUEST.pack(_FORK, 0)], [theirs.fileno()])

    def _answer(self, request: Sequence[bytes], descriptors: Sequence[int] = ()) -> int:
        data = b""
        try:
            socket.send_fds(self._control, request, descriptors)
            while len(data) < _ANSWER.size:
                piece = self._control.recv(_ANSWER.size - len(data))
                if not piece:
                    raise _ServerLostError
                data += piece
        except OSError:
            raise _ServerLostError from None
        (value,) = _ANSWER.unpack(data)
        return int(value)


class _ServerLostError(ProbeLogError):
    def __init__(self) -> None:
        super().__init__("the process that forks model processes has ended")


def _places(modules: Sequence[str]) -> list[str]:
    """Where the packages of some modules lie: processes that agree on that can share a server.

    Their import paths may differ all the same: Ray's workers have folders of Ray's more than the driver has.
    """
    packages = sorted({name.partition(":")[0].partition(".")[0] for name in modules})
    specs = [importlib.util.find_spec(name) for name in packages]
    return [str(None if spec is None else spec.origin) for spec in specs]


def _newest_code() -> int:
    """Changes with the code that the server would run: an old one must not answer for it."""
    return max(path.stat().st_mtime_ns for path in Path(__file__).parent.glob("*.py"))


def _connected(address: Path) -> socket.socket | None:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(_ANSWER_SECONDS)
    try:
        with _short(address) as path:
            made.connect(path)
        # A server that was about to leave has closed the connection by now.
        if made.recv(1):
            return made
    except OSError:
        pass
    made.close()
    return None


def _connected_or_started(
    address: Path, arguments: Sequence[str], home: Path, idle_seconds: float
) -> socket.socket:
    return _connected(address) or _started(address, arguments, home, idle_seconds)


def _started(address: Path, arguments: Sequence[str], home: Path, idle_seconds: float) -> socket.socket:
    with open(address.with_suffix(".lock"), "w") as lock, open(address.with_suffix(".log"), "ab") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = _connected(address)  # by whoever had the lock before
        if connection is not None:
            return connection
        log.truncate(0)
        # It makes itself a grandchild: Ray ends the children of an actor with the actor.
        starter = subprocess.run(  # noqa: S603 - this very interpreter
            [sys.executable, "-m", __name__, str(address), str(idle_seconds), *arguments],
            env=bare_environment(home),
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


@contextlib.contextmanager
def _short(address: Path) -> Iterator[str]:
    """An address that fits: those of sockets end at 107 bytes, so it goes through an open folder."""
    folder = os.open(address.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{address.name}"
    finally:
        os.close(folder)


class Child:
    """One forked process and the pipe to it. One thread at a time asks; any may `kill`."""

    def __init__(self, server: ForkServer, control: socket.socket, pid: int, connection: Connection) -> None:
        self.pid = pid
        self._server, self._control = server, control
        self._connection = connection
        self._status: int | None = None
        self._lock = threading.Lock()

    def ask(self, timeout: float | None, **message: object) -> tuple[dict[str, Any], list[bytes]]:
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
                # Until it is reaped its number is taken, so that no other process can be hit. One that has just closed
                # its pipe is about to leave by itself, and what ended it is worth knowing.
                self._status = self._wait(0.5)
                if self._status is None:
                    _end(self.pid)
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
            return self._server.reap(self._control, self.pid)
        except ProbeLogError:  # the server is gone, and its processes with it
            return -signal.SIGKILL


def answer(connection: Connection, blobs: Sequence[bytes | memoryview] = (), **message: object) -> None:
    """The other side of `Child.ask`."""
    connection.send_bytes(json.dumps({**message, "blobs": len(blobs)}).encode())
    for blob in blobs:
        connection.send_bytes(blob)


def writable_home(home: Path) -> Path:
    """Where libraries think that their user lives."""
    return home / "user"


def bare_environment(home: Path, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for models: what finds libraries and devices, and no token or credential."""
    source = os.environ if given is None else given
    kept = {name: value for name, value in source.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    return (
        {"OMP_NUM_THREADS": "1"}
        | kept
        | {
            "HOME": str(writable_home(home)),
            "TMPDIR": str(writable_home(home)),
            "HF_HOME": str(writable_home(home) / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # A pool of threads made by an import would not survive the fork.
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in sys.path if path)),
        }
    )


class _Server:
    """The server itself: clients by connection, and what was forked for each."""

    def __init__(
        self, address: Path, listening: socket.socket, run: Callable[[Connection], None], idle_seconds: float
    ) -> None:
        self._address, self._listening = address, listening
        self._run, self._idle_seconds = run, idle_seconds
        self._selector = selectors.DefaultSelector()
        self._selector.register(listening, selectors.EVENT_READ)
        self._children: dict[socket.socket, set[int]] = {}
        self._orphans: set[int] = set()

    def serve(self) -> None:
        """Until nobody has been here for a while."""
        while True:
            events = self._selector.select(self._idle_seconds if not self._children else 60.0)
            self._orphans -= {pid for pid in self._orphans if _status(pid) != _RUNNING}
            if not events and not self._children and self._left():
                return
            for key, _ in events:
                if key.fileobj is self._listening:
                    self._welcome()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._answer(key.fileobj)

    def _left(self) -> bool:
        """Give the address up, unless somebody is about to use it: they hold the lock then."""
        with open(self._address.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            self._address.unlink(missing_ok=True)
            self._listening.close()
            return True

    def _welcome(self) -> None:
        client, _ = self._listening.accept()
        with contextlib.suppress(OSError):
            client.sendall(b"+")
        self._children[client] = set()
        self._selector.register(client, selectors.EVENT_READ)

    def _answer(self, client: socket.socket) -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(client, _REQUEST.size, 1)
            if len(message) != _REQUEST.size:
                raise EOFError
            command, pid = _REQUEST.unpack(message)
            if command == _FORK:
                answer = self._forked(client, descriptors[0])
            elif pid in self._children[client]:
                answer = _status(pid)
                if answer != _RUNNING:
                    self._children[client].discard(pid)
            else:
                answer = _RUNNING
            client.sendall(_ANSWER.pack(answer))
        except (OSError, EOFError):
            self._leave(client)

    def _forked(self, client: socket.socket, descriptor: int) -> int:
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            _child(parent, [self._listening, *self._children], descriptor, self._run)
        os.close(descriptor)
        self._children[client].add(pid)
        return pid

    def _leave(self, client: socket.socket) -> None:
        """Somebody is gone: end what was forked for them."""
        self._selector.unregister(client)
        client.close()
        for pid in self._children.pop(client):
            _end(pid)
            self._orphans.add(pid)


def _end(pid: int) -> None:
    """End a process and its group: it may not have made the group yet, or have been left by it."""
    for end in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(pid, signal.SIGKILL)


def _status(pid: int) -> int:
    reaped, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if reaped else _RUNNING


def _child(
    parent: int, inherited: Sequence[socket.socket], descriptor: int, run: Callable[[Connection], None]
) -> None:
    """Never returns: the server's own loop must not go on twice."""
    status = 1
    try:
        from probelog.sandbox import confinement

        confinement.die_with_parent(parent)
        for one in inherited:
            one.close()
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


def _main(address: Path, idle_seconds: float, entry: str, preload: Sequence[str]) -> int:
    """Get ready, then go on as a grandchild; returns in the process that was started, when that is so."""
    from probelog.sandbox import confinement

    confinement.without_network()
    for name in preload:
        importlib.import_module(name)
    module, _, function = entry.partition(":")
    run = getattr(importlib.import_module(module), function)
    address.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        with _short(address) as path:
            listening.bind(path)
        listening.listen(64)
        if os.fork():
            os._exit(0)
        # The libraries' million objects are left alone by every later collection: they would be walked through for
        # each model, and every page that they lie on copied.
        gc.collect()
        gc.freeze()
        _Server(address, listening, run, idle_seconds).serve()
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # it ends with those who need it, who may have a drain to finish
    sys.exit(_main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4:]))

"""The process that has imported the libraries and forks: one a node, with one thread, and it runs no model.

    workers (token, network) --socket and key--> this process (libraries, no network) --fork--> process (one model)

It is asked by workers that show its key, through a socket that models' processes cannot reach. What a process may do is
part of the worker's request, and in force before the process reads its first message. A request that makes no sense
ends the connection that it came by, and what was forked for it; nothing that a process does reaches this one.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from probelog.sandbox.fork_server import confinement
from probelog.sandbox.fork_server.confinement import Confinement, confine
from probelog.sandbox.fork_server.pages import use_large_pages
from probelog.sandbox.guards import namespaces, seccomp
from probelog.sandbox.protocol import Channel, ClosedError

LENGTH = struct.Struct("<I")
KEY_BYTES = 32
WELCOME = b"+"
#: Of a request or an answer.
LONGEST = 1 << 16
# A server that forked so often will fork more.
_WARM_AFTER = 16
# Which of a node's devices a worker was given.
DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Entry:
    """What a forked process does, and what it may do: ``run`` gets its end of the channel and the guards in force."""

    run: Callable[[Channel, dict[str, bool]], None]
    rights: Confinement


@dataclass(frozen=True)
class Request:
    """What a worker asks for: ``fork`` a process, or the ``status`` of one; to ``end`` one, or to ``forget`` it as well.

    Attributes:
        command: as above.
        pid: of which process, as this one counts.
        role: of the process to fork.
        readable: folders and files that it may read beside those of its role.
        memory_bytes: that it may allocate; None for no limit.
        devices: variables that say which devices are its own.
    """

    command: str
    pid: int = 0
    role: str = ""
    readable: Sequence[str] = ()
    memory_bytes: int | None = None
    devices: Mapping[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class _Client:
    """One connection: what came by it so far, and what was forked for it."""

    connection: socket.socket
    welcome: bool = False
    received: bytearray = field(default_factory=bytearray)
    descriptors: list[int] = field(default_factory=list)
    children: set[int] = field(default_factory=set)

    def close(self) -> None:
        """Close the connection and the descriptors that were sent by it."""
        self.connection.close()
        for descriptor in self.descriptors:
            os.close(descriptor)


class _Server:
    def __init__(
        self,
        address: Path,
        listening: socket.socket,
        roles: Mapping[str, Entry],
        key_digest: str,
        warm_up: str | None,
        idle_seconds: float,
    ) -> None:
        self._address, self._listening = address, listening
        self._roles, self._key_digest, self._idle_seconds = roles, key_digest, idle_seconds
        self._warm_up, self._forks = warm_up, 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(listening, selectors.EVENT_READ)
        self._clients: set[_Client] = set()
        self._statuses: dict[int, int] = {}

    def serve(self) -> None:
        """Until nobody has been here for a while."""
        while True:
            events = self._selector.select(self._idle_seconds if not self._clients else 60.0)
            self._reap()
            if not events and not self._clients and self._left():
                return
            for key, _ in events:
                if key.data is None:
                    self._accept()
                else:
                    self._hear(key.data)

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

    def _accept(self) -> None:
        connection, _ = self._listening.accept()
        connection.setblocking(False)
        client = _Client(connection)
        self._clients.add(client)
        self._selector.register(connection, selectors.EVENT_READ, client)

    def _hear(self, client: _Client) -> None:
        """What a client sent. Whatever is wrong with it ends that client alone."""
        try:
            if client.welcome:
                data, descriptors, _, _ = socket.recv_fds(client.connection, LONGEST, 4)
                client.descriptors += descriptors
                if not data:
                    raise EOFError
                client.received += data
                self._answer_all(client)
            else:
                self._welcome(client)
        except Exception:  # reason: a request may be anything, and others need this process
            self._leave(client)

    def _welcome(self, client: _Client) -> None:
        # Read into a place that is wiped: what is left in memory is every later process's to read.
        key = bytearray(KEY_BYTES)
        size = client.connection.recv_into(key, KEY_BYTES)
        known = size == KEY_BYTES and hashlib.sha256(key).hexdigest() == self._key_digest
        key[:] = bytes(KEY_BYTES)
        if not known:
            raise PermissionError
        client.welcome = True
        client.connection.send(WELCOME)

    def _answer_all(self, client: _Client) -> None:
        while len(client.received) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(client.received)
            if length > LONGEST:
                raise ValueError
            if len(client.received) < LENGTH.size + length:
                return
            request = json.loads(client.received[LENGTH.size : LENGTH.size + length])
            del client.received[: LENGTH.size + length]
            answer = json.dumps(self._answer(client, Request(**request))).encode()
            client.connection.send(LENGTH.pack(len(answer)) + answer)  # raises where nobody reads

    def _answer(self, client: _Client, request: Request) -> dict[str, int | None]:
        if request.command == "fork":
            return {"pid": self._fork(client, client.descriptors.pop(0), request)}
        pid = request.pid
        if pid not in client.children:
            return {"status": None}
        self._reap()
        if request.command != "status" and pid not in self._statuses:  # else its number may be another's
            _end(pid)
            self._reap()
        status = self._statuses.pop(pid, None)
        if request.command == "forget":
            client.children.discard(pid)
            return {"status": None}
        if status is not None:
            client.children.discard(pid)
        return {"status": status}

    def _fork(self, client: _Client, descriptor: int, request: Request) -> int:
        role = self._roles[request.role]
        if any(self._address.is_relative_to(Path(path).resolve()) for path in request.readable):
            raise PermissionError  # the key lies beside the address
        self._forks += 1
        if self._forks == _WARM_AFTER:
            self._settle()
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            _child(parent, descriptor, role, request)
        os.close(descriptor)
        client.children.add(pid)
        return pid

    def _settle(self) -> None:
        """Make later forks cheaper. It takes a second or two, so not for whoever needs few."""
        if self._warm_up is not None:
            try:
                _function(self._warm_up)()
            except Exception:  # reason: then each model's process does it, and says what is wrong
                traceback.print_exc()
        _freeze()
        use_large_pages()

    def _reap(self) -> None:
        """Take the status of whoever has ended; of those whose client has gone nobody will ask."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                _end(ended[0], alone=False)  # now: later its number may be another's
                if any(ended[0] in client.children for client in self._clients):
                    self._statuses[ended[0]] = os.waitstatus_to_exitcode(ended[1])

    def _leave(self, client: _Client) -> None:
        """Somebody is gone: end what was forked for them."""
        self._selector.unregister(client.connection)
        self._clients.discard(client)
        client.close()
        for pid in client.children:
            if self._statuses.pop(pid, None) is None:
                _end(pid)


def _end(pid: int, *, alone: bool = True) -> None:
    """End a process's group, and the process: it may not have made the group yet, or have been left by it."""
    for end in (os.killpg, os.kill) if alone else (os.killpg,):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(pid, signal.SIGKILL)


def _child(parent: int, descriptor: int, role: Entry, request: Request) -> None:
    """Never returns: the server's own loop must not go on twice."""
    status = 1
    try:
        confinement.close_all_but(descriptor)
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update(
            {name: value for name, value in request.devices.items() if name in DEVICE_VARIABLES}
        )
        nowhere = os.open(os.devnull, os.O_RDWR)
        held = confine(
            role.rights, parent=parent, more_readable=request.readable, memory_bytes=request.memory_bytes
        )
        confinement.speak_to_nobody(nowhere)
        role.run(Channel(descriptor), held)
        status = 0
    except ClosedError:
        status = 0  # the other side is gone
    except BaseException:
        traceback.print_exc()  # to the server's log, before streams lead nowhere
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(status)


def main(
    address: str,
    roles: Mapping[str, Mapping[str, Any]],
    preload: Sequence[str],
    warm_up: str | None,
    key_digest: str,
    idle_seconds: float,
) -> int:
    """Start the server as a grandchild, and return when it listens: Ray ends the children of a worker with the worker.

    Args:
        address: of its socket; messages go to a file beside it.
        roles: by name, ``entry`` (``module:function``, that runs in each process of that role) and ``rights``.
        preload: modules to import first.
        warm_up: ``module:function`` that does, when there were some forks, what every process would do again.
        key_digest: of the key that clients show, SHA-256 in hexadecimal.
        idle_seconds: without a client it ends after so long.

    Returns:
        The exit status: 0 when it listens.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # It ends with those who need it, who may have a drain to finish.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    namespaces.enter_namespaces()
    ready, done = os.pipe()
    pid = os.fork()
    if pid:
        os.close(done)
        listens = os.read(ready, 1)
        return 0 if listens else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) or 1
    os.close(ready)
    seccomp.only_local_sockets()
    for name in preload:
        importlib.import_module(name)
    known = {
        name: Entry(_function(role["entry"]), Confinement.from_json(role["rights"]))
        for name, role in roles.items()
    }
    place = Path(address)
    place.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        with short(place) as path:
            listening.bind(path)
        listening.listen(64)
        os.write(done, b"+")
        os.close(done)
        _freeze()
        _Server(place, listening, known, key_digest, warm_up, idle_seconds).serve()
    return 0


def _function(name: str) -> Callable[..., None]:
    module, _, function = name.partition(":")
    found: Callable[..., None] = getattr(importlib.import_module(module), function)
    return found


def _freeze() -> None:
    """Have the libraries' million objects left alone by every later collection.

    They would be walked through for each model, and every page that they lie on copied.
    """
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def short(address: Path) -> Iterator[str]:
    """An address that fits: those of sockets end at 107 bytes, so it goes through an open folder."""
    folder = os.open(address.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{address.name}"
    finally:
        os.close(folder)

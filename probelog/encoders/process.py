"""An index's encoder in a process of its own, which is reused between queries.

Its files come from whoever published the index. A graph that loops for ever, a tokenizer that turns a word into
gigabytes and a regular expression that never ends cannot be told from sound ones by looking at them, and native
libraries neither stop nor survive when memory ends. So they run beside the client, without open files, without the
environment's credentials, with bounded memory (`probelog.encoders.server`), and are ended when an answer takes too long.

Where there is no POSIX (Windows), no descriptor can be handed on and nothing bounds a process: it connects to a port of
this machine, and a warning says what is missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from probelog.encoders.channel import ANSWER, CONNECT, DAMAGED, HEADER, KEY_BYTES, MESSAGE_BYTES, OK
from probelog.errors import StoreError
from probelog.terminal import printable

# Queries that are answered at the same time.
_CHANNELS = 4
# Python, numpy and the libraries, on a machine that is busy with other things.
_START_SECONDS = 120.0
# A request takes milliseconds; a batch of 64 texts takes the largest encoders a minute.
_SECONDS = 30.0
_BYTES_PER_SECOND = 10_000_000
_PACKAGES = ("numpy", "onnxruntime", "tokenizers", "probelog")
_LOG_BYTES = 4096
# Between two looks whether a process that is to connect has ended, and what its key may take to come.
_WAIT_SECONDS = 0.5
_KEY_SECONDS = 5.0
_BUFFER_BYTES = 1 << 20
# A thread for each core in each library would take more address space than a graph, and time to start.
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "2",
    "ORT_DISABLE_TELEMETRY": "1",  # it would keep a data base open in the home folder
    "HOME": os.devnull,
}
# Where dynamic libraries are looked for, should Python itself need them. Nothing else is passed on: no credentials.
_PASSED_ON = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "SYSTEMROOT")
_POSIX = os.name == "posix"
UNGUARDED = (
    "on this platform nothing bounds the process of the index's encoder: it can read and write your files, reach the network "
    "and take all memory. An encoder is code of whoever published the index: open only indexes that you trust"
)
_MAIN = (
    "import sys; sys.path += sys.argv[1].split('\\n'); from probelog.encoders.server import main; "
    "main(sys.argv[2:])"
)


class EncoderProcess:
    """Asks a tower that runs in another process; starts it for the first request, and again should it have ended.

    Safe to share between threads, and with processes that are forked from this one (each has its own).

    Args:
        what: the encoder's name in messages.
        opening: header of the request that opens the tower.
        files: reads what that request carries, while the process starts. Nothing of it is kept.
    """

    def __init__(self, what: str, opening: Mapping[str, Any], files: Callable[[], Sequence[bytes]]) -> None:
        self._what = what
        self._opening = opening
        self._files = files
        self._seconds = _SECONDS
        self._lock = threading.Lock()
        self._process: _Process | None = None

    def ask(self, header: Mapping[str, Any], expected: int, blobs: Sequence[memoryview] = ()) -> bytes:
        """The answer to one request, which must have ``expected`` bytes.

        Raises:
            StoreError: the files are damaged, or take more time or memory than they may.
        """
        while True:
            answer = self._request(self._running(), header, blobs, expected, self._seconds)
            if answer is not None:
                return answer

    def close(self) -> None:
        """End the process, if it runs; the next request starts it again."""
        with self._lock:
            if self._process is not None and self._process.owner == os.getpid():
                self._process.end()
            self._process = None

    def _running(self) -> _Process:
        with self._lock:
            process = self._process
            if process is None or process.ended or process.owner != os.getpid():
                process = _Process.start()
                try:
                    files = [memoryview(file) for file in self._files()]
                    self._seconds = _SECONDS + sum(map(len, files)) / _BYTES_PER_SECOND
                    self._request(process, {}, (), 0, _START_SECONDS)
                    self._request(process, self._opening, files, 0, self._seconds)
                except BaseException:
                    process.end()
                    raise
                self._process = process
            return process

    def _request(
        self,
        process: _Process,
        header: Mapping[str, Any],
        blobs: Sequence[memoryview],
        expected: int,
        seconds: float,
    ) -> bytes | None:
        """The answer; None where a request of another thread has ended the process, so that this one must be repeated."""
        channel = process.channels.get()
        try:
            content = {**header, "seconds": seconds, "sizes": [blob.nbytes for blob in blobs]}
            status, answer = _exchange(channel, content, blobs, expected, seconds)
        except BaseException as error:  # reason: after an interrupt, too, no answer may stay unread
            if isinstance(error, OSError | EOFError) and process.ended:
                return None
            gone = isinstance(error, EOFError | BrokenPipeError | ConnectionResetError)
            reason = process.end(at_once=not gone)
            if isinstance(error, TimeoutError):
                raise self.damaged(f"it has not answered within {seconds:.0f} seconds") from None
            if isinstance(error, OSError | EOFError):
                raise self.damaged(f"its process ended ({reason})") from None
            raise
        finally:
            process.channels.put(channel)
        if status == DAMAGED:
            raise self.damaged(answer.decode("utf-8", "replace"))
        return answer

    def damaged(self, reason: str) -> StoreError:
        """The error that says what is wrong with the encoder."""
        return StoreError(
            f"the index's {self._what} is damaged: {printable(reason, 500)}. Publish the index again."
        )


@dataclass(frozen=True, eq=False)
class _Process:
    """A started process: the channels that are free, and who may end it."""

    popen: subprocess.Popen[bytes]
    channels: queue.SimpleQueue[socket.socket]
    log: IO[bytes]
    owner: int
    lock: threading.Lock
    reason: list[str]

    @classmethod
    def start(cls) -> _Process:
        # Programs that hold an interpreter of their own say there which one starts processes.
        from multiprocessing.spawn import get_executable

        log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        command = [get_executable(), "-I", "-S", "-X", "utf8", "-c", _MAIN, "\n".join(_folders())]
        options = {
            "stdout": subprocess.DEVNULL,
            "stderr": log,
            "env": _ENVIRONMENT | {name: os.environ[name] for name in _PASSED_ON if name in os.environ},
            "cwd": os.sep,
        }
        popen, sockets = (_start_with_sockets if _POSIX else _start_to_connect)(command, options)
        channels: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        for channel in sockets:
            channels.put(channel)
        process = cls(popen, channels, log, os.getpid(), threading.Lock(), [])
        weakref.finalize(process, _end, popen, sockets, log, os.getpid())
        return process

    @property
    def ended(self) -> bool:
        return bool(self.reason)

    def end(self, at_once: bool = True) -> str:
        """End it, and say why it ended."""
        with self.lock:
            if not self.reason:
                if not at_once:
                    # Its channels are closed: it is on its way out.
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self.popen.wait(5)
                self.popen.kill()
                status = self.popen.wait()
                self.log.seek(0)
                lines = self.log.read(_LOG_BYTES).decode("utf-8", "replace").strip().splitlines()
                ending = signal.Signals(-status).name if status < 0 else f"status {status}"
                self.reason.append(f"{ending}: {lines[-1]}" if lines else ending)
            return self.reason[0]


_Started = tuple["subprocess.Popen[bytes]", "list[socket.socket]"]


def _start_with_sockets(command: list[str], options: Mapping[str, Any]) -> _Started:
    """A process that has the other ends of the channels from the start."""
    pairs = [socket.socketpair() for _ in range(_CHANNELS)]
    for here, _ in pairs:
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    descriptors = [there.fileno() for _, there in pairs]
    popen = subprocess.Popen(  # noqa: S603 - this interpreter, and descriptors
        [*command, *map(str, descriptors)],
        stdin=subprocess.DEVNULL,
        pass_fds=descriptors,
        # An interrupt from the keyboard is for the client. Of a session of its own, Linux would share out the
        # processor by sessions, and make queries wait beside other programs.
        process_group=0,
        **options,
    )
    for _, there in pairs:
        there.close()
    return popen, [here for here, _ in pairs]


def _start_to_connect(command: list[str], options: Mapping[str, Any]) -> _Started:
    """A process that connects to this one, which it is known to by a key: other users can connect, too.

    Raises:
        OSError: it has ended, or did not connect in time.
    """
    warnings.warn(UNGUARDED, RuntimeWarning, stacklevel=2)
    key = secrets.token_bytes(KEY_BYTES)
    with socket.create_server(("127.0.0.1", 0)) as server:
        popen = subprocess.Popen(  # noqa: S603 - this interpreter, and a port
            [*command, CONNECT, str(server.getsockname()[1]), str(_CHANNELS)],
            stdin=subprocess.PIPE,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # as above, of interrupts
            **options,
        )
        channels: list[socket.socket] = []
        try:
            assert popen.stdin is not None
            with popen.stdin as stdin:
                stdin.write(key)
            server.settimeout(_WAIT_SECONDS)
            deadline = time.monotonic() + _START_SECONDS
            while len(channels) < _CHANNELS:
                if popen.poll() is not None:
                    raise ConnectionError("the process of the encoder ended before it connected")
                _remaining(deadline)
                with contextlib.suppress(TimeoutError):
                    channel = server.accept()[0]
                    if _begins_with(channel, key):
                        channels.append(channel)
                    else:
                        channel.close()
        except BaseException:
            popen.kill()
            popen.wait()
            raise
    return popen, channels


def _begins_with(channel: socket.socket, key: bytes) -> bool:
    """Whether a connection is one of whoever has a key."""
    try:
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return secrets.compare_digest(_received(channel, len(key), time.monotonic() + _KEY_SECONDS), key)
    except (OSError, EOFError):
        return False


def _end(
    popen: subprocess.Popen[bytes], channels: Sequence[socket.socket], log: IO[bytes], owner: int
) -> None:
    for channel in channels:
        channel.close()
    log.close()
    if os.getpid() == owner:  # and not a process forked from the owner, which has a copy of all this
        popen.kill()
        popen.wait()


def _exchange(
    channel: socket.socket,
    header: Mapping[str, Any],
    blobs: Sequence[memoryview],
    expected: int,
    seconds: float,
) -> tuple[int, bytes]:
    """Status and content of the answer to one request. What answers is not to be trusted either."""
    deadline = time.monotonic() + seconds
    content = json.dumps(header).encode()
    parts: list[bytes | memoryview] = [HEADER.pack(len(content)), content, *blobs]
    for part in parts:
        channel.settimeout(_remaining(deadline))
        channel.sendall(part)
    status, size = ANSWER.unpack(_received(channel, ANSWER.size, deadline))
    if size != expected if status == OK else size > MESSAGE_BYTES:
        raise ConnectionError
    return status, _received(channel, size, deadline)


def _received(channel: socket.socket, size: int, deadline: float) -> bytes:
    content = bytearray(size)
    view = memoryview(content)
    while len(view):
        channel.settimeout(_remaining(deadline))
        count = channel.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return bytes(content)


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining


def _folders() -> list[str]:
    """Where the packages lie that the process needs: it gets these folders and no other to import from."""
    folders = []
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.submodule_search_locations
        folders.append(str(Path(spec.submodule_search_locations[0]).parent.absolute()))
    return list(dict.fromkeys(folders))

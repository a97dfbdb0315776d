"""What a process of a model's rights tries, one thing in each, for `probelog.sandbox.doctor.examine` to see which guards hold.

Every attempt is harmless where it succeeds. It returns what it achieved, and raises where a guard refuses.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import stat
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from probelog.sandbox.guards import seccomp
from probelog.sandbox.protocol import Channel

#: What attempts are told of the parent: paths, numbers and names.
Places = Mapping[str, Any]


def serve(channel: Channel, held: dict[str, bool]) -> None:
    """Answer with what an attempt achieved, or with the refusal."""
    while True:
        message, _ = channel.receive()
        command, at = message["command"], message["at"]
        if command == "set-up" and at["device"] and held["calls"]:
            # As a model's process does when its device is ready, before anything of the model is looked at.
            held["connections"] = seccomp.without_connections()
        try:
            answer = {"done": ({"set-up": lambda _: _facts(held)} | ATTEMPTS)[command](at)}
        except (OSError, MemoryError) as error:
            answer = {"refused": getattr(error, "strerror", None) or str(error) or type(error).__name__}
        channel.send({**answer, "number": message["number"]})


def _facts(held: dict[str, bool]) -> dict[str, Any]:
    capabilities = None
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        capabilities = next(line.split()[1] for line in lines if line.startswith("CapEff:"))
    return {"held": held, "user": os.geteuid(), "capabilities": capabilities}


def _any(attempts: Mapping[str, Callable[[], object]]) -> str:
    """Which of some attempts succeed; raises where none does."""
    done, refusal = [], OSError("nothing to try")
    for name, attempt in attempts.items():
        try:
            attempt()
            done.append(name)
        except OSError as error:
            refusal = error
    if not done:
        raise refusal
    return ", ".join(done)


def _make_sockets(at: Places) -> str:
    kinds = {
        "TCP": (socket.AF_INET, socket.SOCK_STREAM),
        "UDP": (socket.AF_INET, socket.SOCK_DGRAM),
        "TCP over IPv6": (socket.AF_INET6, socket.SOCK_STREAM),
        "local": (socket.AF_UNIX, socket.SOCK_STREAM),
        "local datagrams": (socket.AF_UNIX, socket.SOCK_DGRAM),
    }
    if sys.platform == "linux":
        kinds |= {
            "netlink": (socket.AF_NETLINK, socket.SOCK_RAW),
            "raw": (socket.AF_PACKET, socket.SOCK_RAW),
            "virtual machine": (socket.AF_VSOCK, socket.SOCK_STREAM),
        }
    return _any({name: partial(socket.socket, *kind) for name, kind in kinds.items()})


def _connect_to_a_port(at: Places) -> str:
    socket.create_connection(("127.0.0.1", at["port"]), 2).close()
    return "connected"


def _connect(address: str) -> str:
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(address)
    return "connected"


def _send_a_datagram(at: Places) -> str:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        one.sendto(b"x", at["datagrams"])
    return "sent"


def _read(path: str) -> str:
    return f"{len(Path(path).read_bytes()[:1000])} bytes"


def _list(path: str) -> str:
    return f"{len(os.listdir(path))} names"


def _read_of_the_parent(at: Places) -> str:
    process = Path(f"/proc/{at['parent']}")
    return _any(
        {
            "environment": (process / "environ").read_bytes,
            "command": (process / "cmdline").read_bytes,
            "memory": (process / "mem").open,
            "files": partial(os.listdir, process / "fd"),
        }
    )


def _write(at: Places) -> str:
    """Empty files, which whoever asked removes."""
    return _any({path: partial(Path(path).touch, exist_ok=False) for path in at["writable"]})


def _change_a_file(at: Places) -> str:
    path = at["victim"]
    return _any(
        {
            "its mode": lambda: os.chmod(path, 0o600),
            "its times": lambda: os.utime(path),
            "its owner": lambda: os.chown(path, os.stat(path).st_uid, os.stat(path).st_gid),
            "its length": lambda: os.truncate(path, 1),
        }
    )


def _signal(at: Places) -> str:
    os.kill(os.getppid(), 0)
    return "signalled"


def _fork(at: Places) -> str:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "forked"


def _execute(at: Places) -> str:
    os.execv(sys.executable, [sys.executable, "-c", ""])  # noqa: S606 - to see whether it can


def _share_memory(at: Places) -> str:
    attempts: dict[str, Callable[[], object]] = {"shared mapping": lambda: mmap.mmap(-1, 1 << 20).close()}
    if hasattr(os, "memfd_create"):
        attempts["memfd"] = lambda: os.close(os.memfd_create("probelog-doctor"))
    return _any(attempts)


def _allocate(at: Places) -> str:
    return f"{len(bytearray(2 * at['memory_bytes'])) >> 20} MB allocated"


def _allocate_unseen(at: Places) -> str:
    """Memory that is made read-only is not counted as allocated any more. None of it is touched."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    piece, total = at["memory_bytes"] // 2, 0
    while total < 20 * at["memory_bytes"] + (8 << 30):
        place = library.mmap(
            None, piece, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )
        if place == ctypes.c_void_p(-1).value or library.mprotect(place, piece, mmap.PROT_READ):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        total += piece
    return f"{total >> 20} MB allocated"


def _start_threads(at: Places) -> str:
    """Up to a number; they stay, so that another process can see what is left for it.

    The C library's, with the smallest stack: Python's would meet the limit of memory first.
    """
    library = ctypes.CDLL(None)
    attributes, thread = ctypes.create_string_buffer(64), ctypes.c_ulong()
    library.pthread_attr_init(attributes)
    library.pthread_attr_setstacksize(attributes, ctypes.c_size_t(32 << 10))
    for _ in range(at["threads"]):
        error = library.pthread_create(ctypes.byref(thread), attributes, library.sleep, ctypes.c_void_p(600))
        if error:
            raise OSError(error, os.strerror(error))
    return f"{at['threads']} threads started"


def _start_some_threads(at: Places) -> str:
    return _start_threads({"threads": 4})


def _use_descriptors(at: Places) -> str:
    """Beside the channel, and standard streams that lead nowhere."""
    nowhere, found, sockets = os.stat(os.devnull).st_rdev, [], 0
    for number in range(os.sysconf("SC_OPEN_MAX")):
        try:
            status = os.fstat(number)
        except OSError:
            continue
        if stat.S_ISSOCK(status.st_mode):
            sockets += 1
        elif status.st_rdev != nowhere:
            found.append(str(number))
    if not found and sockets == 1:
        raise OSError("none but its channel")
    return f"{sockets} sockets, and {', '.join(found) or 'nothing else'}"


def _hang(at: Places) -> str:
    time.sleep(at["seconds"])
    return "answered in the end"


#: By the name of the guard that refuses it (`probelog.sandbox.doctor.examine.GUARDS`).
ATTEMPTS: dict[str, Callable[[Places], str]] = {
    "sockets": _make_sockets,
    "network": _connect_to_a_port,
    "path-sockets": lambda at: _connect(at["listening"]),
    "abstract-sockets": lambda at: _connect("\0" + at["abstract"]),
    "datagrams": _send_a_datagram,
    "fork-server": lambda at: _connect(at["server"]),
    "fork-server-key": lambda at: _read(at["key"]),
    "current-folder": lambda at: _list(at["here"]),
    "home-folder": lambda at: _list(at["home"]),
    "other-files": lambda at: _read(at["victim"]),
    "other-processes": _read_of_the_parent,
    "writing": _write,
    "file-attributes": _change_a_file,
    "signals": _signal,
    "fork": _fork,
    "exec": _execute,
    "shared-memory": _share_memory,
    "allocations": _allocate,
    "address-space": _allocate_unseen,
    "threads": _start_threads,
    "threads-of-others": _start_some_threads,
    "descriptors": _use_descriptors,
    "deadline": _hang,
}

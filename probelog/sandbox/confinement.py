"""Taking rights away from a process, for good: the network, other people's files, memory beyond a limit.

Everything here needs no privilege and no namespace (containers usually forbid the latter), holds for every thread
and child made afterwards, and cannot be taken back. Each step says whether the platform allowed it.

The network goes by a seccomp filter (classic BPF, ``man 2 seccomp``), files by Landlock (``man 7 landlock``). Name
``/proc/self`` and not ``/proc`` among the readable paths: the environment of other processes holds their tokens.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 38, 22
_SECCOMP_MODE_FILTER = 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_AF_UNIX = 1
# Offsets in struct seccomp_data: system call, architecture, low half of the first argument.
_NUMBER, _ARCHITECTURE, _FIRST = 0, 4, 16
_X32 = 0x40000000
# machine: (AUDIT_ARCH, number of socket). io_uring could make sockets behind the filter's back.
_CALLS = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
_IO_URING_SETUP = 425

# Landlock's system calls have the same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_FIRST_VERSION = (1 << 13) - 1  # every right that Landlock's first version knows
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def without_network() -> bool:
    """Refuse (EPERM) every further socket but those between processes of this machine (AF_UNIX; CUDA uses them).

    Returns whether the platform allows it: Linux on x86-64 or 64-bit ARM with seccomp. Call it while the process
    has one thread: others that run already keep the network.
    """
    known = _CALLS.get(platform.machine())
    if sys.platform != "linux" or known is None:
        return False
    architecture, socket = known
    refuse = _ERRNO | errno.EPERM
    # (code, to skip if true, to skip if false, operand)
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, refuse),  # calls of another architecture have other numbers
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 4, 0, _X32),
        (_EQUAL, 3, 0, _IO_URING_SETUP),
        (_EQUAL, 0, 3, socket),
        (_LOAD, 0, 0, _FIRST),
        (_EQUAL, 1, 0, _AF_UNIX),
        (_RETURN, 0, 0, refuse),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    program_header = _Program(len(program), ctypes.cast(buffer, ctypes.c_void_p).value)
    return _no_new_privileges() and _prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program_header)
    )


def only_files(
    readable: Iterable[str | os.PathLike[str]], writable: Iterable[str | os.PathLike[str]]
) -> bool:
    """Refuse (EACCES) to open anything that does not lie below one of these paths; those absent are left out.

    What is open already stays open. Returns whether the platform allows it: Linux 5.13 and later with Landlock.
    """
    if sys.platform != "linux":
        return False
    version = _syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)
    if version < 1:
        return False
    # Truncation was not controlled before version 3; device ioctls (version 5) are left alone for the GPU's sake.
    handled = _FIRST_VERSION | (_TRUNCATE if version >= 3 else 0)
    ruleset = _syscall(_CREATE_RULESET, struct.pack("Q", handled), 8, 0)
    if ruleset < 0:
        return False
    try:
        for paths, rights in ((readable, _READ), (writable, handled)):
            for path in paths:
                _allow(ruleset, Path(path), rights & handled)
        return _no_new_privileges() and _syscall(_RESTRICT_SELF, ruleset, 0, 0) == 0
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not path.is_dir():
                rights &= _OF_FILES
            _syscall(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, descriptor), 0)
        finally:
            os.close(descriptor)


def limit_memory(size: int) -> bool:
    """Let allocations fail that go ``size`` bytes beyond what the process holds now (``RLIMIT_DATA``).

    Counts what is private and writable. Files mapped for reading and memory of devices do not count, so that it
    can be used with CUDA, which reserves address space without end. Returns whether the platform allows it: Linux.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return False
    held = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = held * 1024 + size
    bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    return True


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when the thread that forked it ends (Linux; elsewhere nothing happens).

    Args:
        parent: the number of the process that forked this one; where it has ended already, so does this one.
    """
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _no_new_privileges() -> bool:
    return _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _prctl(option: int, *arguments: int) -> bool:
    padded = [*arguments, *[0] * (4 - len(arguments))]
    return bool(ctypes.CDLL(None).prctl(option, *(ctypes.c_ulong(value) for value in padded)) == 0)


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    made = [ctypes.c_long(item) if isinstance(item, int) else ctypes.c_char_p(item) for item in arguments]
    return int(call(ctypes.c_long(number), *made))

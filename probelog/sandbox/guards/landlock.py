"""Files that a process may open (``man 7 landlock``), and whom it may signal or connect to.

Name single files of ``/proc`` and not all of it: the environment of other processes holds their tokens.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import sys
from collections.abc import Iterable

from probelog.sandbox.guards.system_calls import system_call, without_new_privileges

# These system calls have the same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_FIRST_VERSION = (1 << 13) - 1  # every right that Landlock's first version knows
_READ = _READ_FILE | _READ_DIR
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_TCP = 0b11  # bind, connect
_SCOPES = 0b11  # abstract sockets and signals stay inside


def version() -> int:
    """Of the kernel's Landlock; 0 where there is none."""
    if sys.platform != "linux":
        return 0
    return max(0, system_call(_CREATE_RULESET, None, 0, _VERSION_FLAG))


def only_files(
    readable: Iterable[str | os.PathLike[str]],
    writable: Iterable[str | os.PathLike[str]],
    devices: Iterable[str | os.PathLike[str]] = (),
) -> bool:
    """Refuse (EACCES) to open anything that does not lie below one of these paths; those absent are left out.

    What is open already stays open. Where the kernel can, TCP, signals and abstract sockets to processes outside are
    refused with it. ``devices`` may be controlled (ioctl) as well. Returns whether the platform allows it: Linux 5.13
    and later with Landlock.
    """
    known = version()
    if known < 1:
        return False
    handled = _FIRST_VERSION
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        handled |= right if known >= since else 0
    network, scopes = (_TCP if known >= 4 else 0), (_SCOPES if known >= 6 else 0)
    attributes = struct.pack("QQQ", handled, network, scopes)
    size = 24 if known >= 6 else 16 if known >= 4 else 8
    ruleset = system_call(_CREATE_RULESET, attributes[:size], size, 0)
    if ruleset < 0:
        return False
    try:
        for paths, rights in (
            (readable, _READ),
            (writable, handled & ~(_EXECUTE | _IOCTL_DEV)),
            (devices, _READ | _WRITE_FILE | _IOCTL_DEV),
        ):
            for path in paths:
                _allow(ruleset, os.fspath(path), rights & handled)
        return without_new_privileges() and system_call(_RESTRICT_SELF, ruleset, 0, 0) == 0
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                rights &= _OF_FILES
            system_call(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, descriptor), 0)
        finally:
            os.close(descriptor)

"""The user that a process runs as, and the rights of root that it keeps: none, but to read what Landlock lets it."""

from __future__ import annotations

import contextlib
import os
import struct
import sys
from pathlib import Path

from probelog.sandbox.guards import landlock
from probelog.sandbox.guards.system_calls import MACHINE, NEW_USER, prctl, system_call, unshare

_PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 47, 4
_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 4, 8
_CAPSET = {"x86_64": 126, "aarch64": 91}
_VERSION_3 = 0x20080522
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2
_LAST_CAPABILITY = 63
#: The user that has no files, by convention.
NOBODY = 65534
#: Users that nobody has, above those that systemd hands out: one a process, because the kernel counts threads, pipes
#: and more by user, and a process that uses them up must not leave none to another's.
_FIRST_USER = 0x70000000


def without_privileges(*, read_all: bool) -> dict[str, bool]:
    """Give up every capability; as root, become a user that owns nothing as well. What was done: ``capabilities``,
    ``user``.

    Root that stays root owns the operator's files, whatever capabilities it lacks. Whoever is not root stays that user,
    in a namespace of users of its own where the platform lets it be made: its threads are counted there.

    Args:
        read_all: change the user, and keep the right to read files whoever owns them, because models and probes lie in
            folders of the operator's alone. Which files is for `landlock.only_files` to say; without it, all can be
            read, which is less than what root may do to its own. Where root lacks that right it stays root, whose own
            files need none.
    """
    if sys.platform != "linux" or MACHINE not in _CAPSET:
        return {"capabilities": False, "user": os.geteuid() != 0}
    kept = 0
    root = os.geteuid() == 0
    if not root:
        unshare(NEW_USER)
    for capability in range(_LAST_CAPABILITY + 1):
        prctl(_PR_CAPBSET_DROP, capability)  # refused to all but root, whose programs alone could gain them
    prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    right = _right_to_read() if root and read_all else None
    if right is not None and _leave_root():
        kept = 1 << right
        # A change of user makes /proc/self root's, where the process measures its own memory.
        prctl(_PR_SET_DUMPABLE, 1)
    return {"capabilities": _keep(kept), "user": os.geteuid() != 0}


def _right_to_read() -> int | None:
    """The least that lets another user read root's files, or None. Containers have the one to read and write alone,
    which is too much where Landlock does not close files for writing.
    """
    status = Path("/proc/self/status").read_text()
    permitted = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapPrm:")), 16)
    enough = [_CAP_DAC_READ_SEARCH, *([_CAP_DAC_OVERRIDE] if landlock.version() else [])]
    return next((right for right in enough if permitted >> right & 1), None)


def _leave_root() -> bool:
    """Whether this process is another user's from here on: its own, or nobody's where a container has few users."""
    prctl(_PR_SET_KEEPCAPS, 1)
    for user in (_FIRST_USER + os.getpid(), NOBODY):
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            return True
    return False  # a container without the right to


def _keep(capabilities: int) -> bool:
    header = struct.pack("Ii", _VERSION_3, 0)
    data = struct.pack("IIIIII", capabilities, capabilities, 0, 0, 0, 0)
    return system_call(_CAPSET[MACHINE], header, data) == 0

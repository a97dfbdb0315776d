"""A view of the machine without its network, its other processes and their shared memory (``man 7 namespaces``).

The process that forks models' processes makes them once, so that a model costs nothing more. Containers often forbid
them; what they would hide is then only refused, by the other guards.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from probelog.sandbox.guards.system_calls import NEW_USER, unshare

_PROCESSES, _NETWORK, _IPC, _HOST_NAME = 0x20000000, 0x40000000, 0x08000000, 0x04000000
_ALL = _PROCESSES | _NETWORK | _IPC | _HOST_NAME


def enter_namespaces() -> bool:
    """Network, IPC and host name from now on, processes with the next fork; whether the platform lets them be made.

    Call it while the process has one thread. Whoever is not root needs a namespace of users, in which every user but
    its own is nobody.
    """
    user, group = os.geteuid(), os.getegid()
    if unshare(_ALL):
        return True
    if user == 0 or not unshare(NEW_USER | _ALL):
        return False
    with contextlib.suppress(OSError):
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return True

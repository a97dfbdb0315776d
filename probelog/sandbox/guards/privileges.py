"""The user that a process runs as, and the rights of root that it keeps: none, but to read what Landlock lets it."""

from __future__ import annotations

import os
import struct
import sys

from probelog.sandbox.guards.system_calls import MACHINE, prctl, system_call

_PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 47, 4
_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 4, 8
_CAPSET = {"x86_64": 126, "aarch64": 91}
_VERSION_3 = 0x20080522
_CAP_DAC_READ_SEARCH = 2
_LAST_CAPABILITY = 63
#: The user that has no files, by convention.
NOBODY = 65534


def without_privileges(*, read_all: bool) -> dict[str, bool]:
    """Give up every capability; as root, become nobody as well. What was done: ``capabilities``, ``user``.

    Root that stays root owns the operator's files, whatever capabilities it lacks.

    Args:
        read_all: keep the right to read files whoever owns them, where the user changes: models and probes lie in
            folders of the operator's alone. Only with rules on files (`landlock.only_files`) in force.
    """
    if sys.platform != "linux" or MACHINE not in _CAPSET:
        return {"capabilities": False, "user": os.geteuid() != 0}
    kept = 0
    for capability in range(_LAST_CAPABILITY + 1):
        prctl(_PR_CAPBSET_DROP, capability)  # refused to all but root, whose programs alone could gain them
    prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    if os.geteuid() == 0 and read_all:
        kept = 1 << _CAP_DAC_READ_SEARCH
        try:
            prctl(_PR_SET_KEEPCAPS, 1)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            # A change of user makes /proc/self root's, where the process measures its own memory.
            prctl(_PR_SET_DUMPABLE, 1)
        except OSError:  # a container without the right to
            kept = 0
    return {"capabilities": _keep(kept), "user": os.geteuid() != 0}


def _keep(capabilities: int) -> bool:
    header = struct.pack("Ii", _VERSION_3, 0)
    data = struct.pack("IIIIII", capabilities, capabilities, 0, 0, 0, 0)
    return system_call(_CAPSET[MACHINE], header, data) == 0

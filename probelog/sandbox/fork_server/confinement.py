"""What a process may still do, decided by whoever starts it and applied before it reads a single message.

Each guard holds for every thread made afterwards and cannot be taken back. Each says whether the platform has it: what
is missing is reported and never silently assumed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from probelog.sandbox.guards import landlock, limits, privileges, seccomp


@dataclass(frozen=True)
class Confinement:
    """The rights of a process.

    Attributes:
        readable: files and folders, with what lies below.
        writable: likewise; a process that has none may not write at all, not even to a temporary file.
        devices: files of devices that may be read, written and controlled.
        largest_file: that it may write, in bytes.
    """

    readable: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    largest_file: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Confinement:
        """What ``to_json`` gave."""
        lists = {name: tuple(facts[name]) for name in ("readable", "writable", "devices")}
        return cls(**lists, largest_file=int(facts["largest_file"]))


#: A process's own facts, by name: a rule for all of /proc/self, or of its threads' folders, would show every socket of
#: the machine.
_OWN_FACTS = tuple(
    f"/proc/self/{name}" for name in ("auxv", "cgroup", "comm", "maps", "smaps", "stat", "statm", "status")
)
#: Its high-water mark of memory, which is reset to measure what a batch takes.
_HIGH_WATER = "/proc/self/clear_refs"


def confine(
    rights: Confinement, *, parent: int, more_readable: Sequence[str] = (), memory_bytes: int | None = None
) -> dict[str, bool]:
    """Give up everything else; what the platform allowed, by guard.

    ``files`` (Landlock), ``calls`` (seccomp), ``capabilities``, ``user`` (not root), ``memory`` (a limit is set).

    Args:
        rights: what stays.
        parent: the process that forked this one, which ends with it.
        more_readable: beside what ``rights`` names: the one model that it is for.
        memory_bytes: as `limits.limit_memory` takes it; None for no limit.
    """
    held: dict[str, bool] = {}
    # Whoever fills a folder stays its owner. It runs no model.
    held |= privileges.without_privileges(read_all=not rights.writable)
    # After the change of user, which takes the one back and counts threads anew for the other.
    limits.die_with_parent(parent)
    limits.limit_the_rest(rights.largest_file)
    readable = [*rights.readable, *more_readable, *_OWN_FACTS]
    held["files"] = landlock.only_files(readable, [*rights.writable, _HIGH_WATER], rights.devices)
    held["memory"] = memory_bytes is not None and limits.limit_memory(
        memory_bytes, device=bool(rights.devices)
    )
    held["calls"] = seccomp.only_computing(writes=bool(rights.writable), device=bool(rights.devices))
    return held


def close_all_but(keep: int) -> None:
    """Close what was open before a fork, but for the standard streams and one descriptor."""
    os.closerange(3, keep)
    os.closerange(keep + 1, os.sysconf("SC_OPEN_MAX"))


def speak_to_nobody(nowhere: int) -> None:
    """Standard streams lead to ``nowhere``, a descriptor of the null device, which is closed."""
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)

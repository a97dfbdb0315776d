"""System calls that Python's library has no function for."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache

#: Machines whose calls are known by number (``man 2 syscall``): x86-64 and 64-bit ARM.
MACHINE = platform.machine() if sys.platform == "linux" else ""

_PR_SET_NO_NEW_PRIVS = 38
#: A namespace of users.
NEW_USER = 0x10000000


@cache
def _library() -> ctypes.CDLL:
    """C's: a process makes some hundred calls while it is confined, and a handle costs more than a call."""
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library


def system_call(number: int, *arguments: int | bytes | None) -> int:
    """The result of a call, or minus its error number."""
    made = [ctypes.c_long(item) if isinstance(item, int) else ctypes.c_char_p(item) for item in arguments]
    result = int(_library().syscall(ctypes.c_long(number), *made))
    return -ctypes.get_errno() if result == -1 else result


def prctl(option: int, *arguments: int) -> bool:
    """Whether an operation on this process (``man 2 prctl``) was done."""
    if sys.platform != "linux":
        return False
    padded = [*arguments, *[0] * (4 - len(arguments))]
    return bool(_library().prctl(option, *(ctypes.c_ulong(value) for value in padded)) == 0)


def without_new_privileges() -> bool:
    """No program started from here on has more rights than this process. Filters and rules need it."""
    return prctl(_PR_SET_NO_NEW_PRIVS, 1)


def unshare(flags: int) -> bool:
    """Whether namespaces of one's own were made (``man 2 unshare``)."""
    if sys.platform != "linux":
        return False
    library = _library()
    return hasattr(library, "unshare") and library.unshare(ctypes.c_int(flags)) == 0

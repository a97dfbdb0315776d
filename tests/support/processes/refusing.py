"""Run a program on a kernel that lacks some system calls, as containers and old kernels do: a seccomp filter refuses them.

python -m tests.support.processes.refusing landlock,namespaces PROGRAM ARGUMENT ...
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

from probelog.sandbox.guards.system_calls import prctl, without_new_privileges

# What is refused: (number on x86-64, number on 64-bit ARM), whether the first argument is a value (_EQUAL) or has one of
# some bits (_ANY_OF), and the error. Namespaces as Docker's profile and Kubernetes' RuntimeDefault refuse them to whoever
# has no CAP_SYS_ADMIN.
_EQUAL, _ANY_OF = 0x15, 0x45
_NEW_NAMESPACES = 0x7E020000
CALLS = {
    "landlock": [((444, 444), None, errno.ENOSYS)],  # landlock_create_ruleset
    "namespaces": [
        ((272, 97), None, errno.EPERM),  # unshare
        ((56, 220), (_ANY_OF, _NEW_NAMESPACES), errno.EPERM),  # clone
        ((435, 435), None, errno.ENOSYS),  # clone3
    ],
    "seccomp": [((157, 167), (_EQUAL, 22), errno.EINVAL)],  # prctl(PR_SET_SECCOMP)
}
_LOAD, _RETURN, _ALLOW, _ERRNO = 0x20, 0x06, 0x7FFF0000, 0x00050000


def refuse(names: list[str]) -> None:
    """From here on, for this process and all that come of it."""
    column = ("x86_64", "aarch64").index(platform.machine())
    program = []
    for numbers, argument, error in (call for name in names for call in CALLS[name]):
        refusal = [(_RETURN, 0, 0, _ERRNO | error)]
        if argument is not None:
            comparison, value = argument
            refusal = [(_LOAD, 0, 0, 16), (comparison, 0, 1, value), *refusal, (_RETURN, 0, 0, _ALLOW)]
        program += [(_LOAD, 0, 0, 0), (_EQUAL, 0, len(refusal), numbers[column]), *refusal]
    program.append((_RETURN, 0, 0, _ALLOW))
    code = b"".join(struct.pack("HBBI", *one) for one in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(buffer)))
    if not (without_new_privileges() and prctl(22, 2, ctypes.addressof(header))):
        raise OSError("no filter can be set")


if __name__ == "__main__":
    refuse([name for name in sys.argv[1].split(",") if name])
    os.execvp(sys.argv[2], sys.argv[2:])

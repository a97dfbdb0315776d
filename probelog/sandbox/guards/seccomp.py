"""System calls that a process keeps (``man 2 seccomp``): a short list, everything else fails with EPERM.

Computing needs memory, threads, time and reading files. It needs no socket, no other process, no signal but to itself,
no change of a file's owner, mode or times, no lock (which could stop those that fill the pixels), no memory shared with
others (which no limit of a process counts), no table of open files beside the one that is limited: so these are not on the
list, whoever else would forbid them.

The numbers are those of the kernel's headers (asm/unistd_64.h, asm-generic/unistd.h). On other machines there is no filter.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from probelog.sandbox.guards.system_calls import MACHINE, prctl, without_new_privileges

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
# Offsets in struct seccomp_data: system call, architecture, low half of the first argument.
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_X32 = 0x40000000
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_AF_UNIX = 1
# CLONE_THREAD, CLONE_FILES: one with a table of files of its own could open as many again, pipes with what lies in them.
_THREAD = 0x00010400
# MAP_SHARED with MAP_ANONYMOUS; MAP_HUGETLB, whose pages are of a pool that the machine keeps for some program.
_SHARED_AND_ANONYMOUS, _RESERVED_PAGES = 0x21, 0x40000

# name: number on x86-64, number on 64-bit ARM (None: there is no such call).
_Numbers = Mapping[str, tuple[int | None, int | None]]
_COMPUTING: _Numbers = {
    # files, for reading (which ones: Landlock) and what is open already
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "preadv": (295, 69), "preadv2": (327, 286),
    "close": (3, 57), "fstat": (5, 80), "stat": (4, None), "lstat": (6, None),
    "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "open": (2, None), "openat": (257, 56), "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17),
    "getdents64": (217, 61), "getdents": (78, None), "lseek": (8, 62), "dup": (32, 23), "dup2": (33, None),
    "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "readahead": (187, 213),
    "statfs": (137, 43), "fstatfs": (138, 44), "umask": (95, 166),
    # waiting
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "futex": (202, 98),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "restart_syscall": (219, 128),
    # memory
    "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "brk": (12, 214),
    "mincore": (27, 232), "membarrier": (324, 283), "get_mempolicy": (239, 236),
    # threads of this process, and facts about it
    "exit": (60, 93), "exit_group": (231, 94), "set_robust_list": (273, 99), "rseq": (334, 293),
    "set_tid_address": (218, 96), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126), "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120), "getpriority": (140, 141), "getcpu": (309, 168), "gettid": (186, 178),
    "getpid": (39, 172), "getppid": (110, 173), "getpgid": (121, 155), "getpgrp": (111, None), "getsid": (124, 156),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158),
    "capget": (125, 90), "arch_prctl": (158, None), "getrusage": (98, 165), "getrlimit": (97, 163), "times": (100, 153),
    # signals to itself
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigtimedwait": (128, 137),
    "sigaltstack": (131, 132),
    # the time, the machine
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None),
    "uname": (63, 160), "sysinfo": (99, 179), "getrandom": (318, 278),
}  # fmt: skip
#: What filling a folder takes beside it.
_WRITING: _Numbers = {
    "pwrite64": (18, 68), "pwritev": (296, 70), "pwritev2": (328, 287), "ftruncate": (77, 46), "fallocate": (285, 47), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "unlink": (87, None), "unlinkat": (263, 35), "mkdir": (83, None),
    "mkdirat": (258, 34), "flock": (73, 32), "utimensat": (280, 88), "fsync": (74, 82), "fdatasync": (75, 83),
}  # fmt: skip
#: What drivers of devices need beside it; `connect` goes when the device is set up.
_DEVICE: _Numbers = {
    "ioctl": (16, 29), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242),
    "connect": (42, 203), "sendmsg": (46, 211), "recvmsg": (47, 212), "sendto": (44, 206), "recvfrom": (45, 207),
    "getsockname": (51, 204), "getpeername": (52, 205), "setsockopt": (54, 208), "getsockopt": (55, 209),
    "shutdown": (48, 210), "memfd_create": (319, 279), "ftruncate": (77, 46), "mlock": (149, 228), "munlock": (150, 229),
    "mbind": (237, 235), "set_mempolicy": (238, 237), "mmap": (9, 222), "seccomp": (317, 277), "eventfd2": (290, 19),
    "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
}  # fmt: skip
# Calls that depend on an argument.
_CONDITIONAL: _Numbers = {
    "fcntl": (72, 25), "ioctl": (16, 29), "mmap": (9, 222), "clone": (56, 220), "clone3": (435, 435), "kill": (62, 129),
    "tgkill": (234, 131), "prlimit64": (302, 261), "sched_setaffinity": (203, 122), "prctl": (157, 167),
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "io_uring_setup": (425, 425), "madvise": (28, 233),
    "fadvise64": (221, 223), "close_range": (436, 436),
}  # fmt: skip
_NUMBERS: _Numbers = {**_COMPUTING, **_WRITING, **_DEVICE, **_CONDITIONAL}
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: no locks, and no signals to the owner of a file.
_FCNTL = (0, 1, 2, 3, 4, 1030)
# F_SETLK, F_SETLKW and those of open files: for whoever fills a folder together with others.
_FCNTL_LOCKS = (6, 7, 37, 38)
# TCGETS (is it a terminal?), FIONREAD, FIONBIO, FIOCLEX, FIONCLEX
_IOCTL = (0x5401, 0x541B, 0x5421, 0x5451, 0x5450)
# Names of threads (15, 16) and of memory (PR_SET_VMA), a further filter (22, and 38, which each sets first), dumpable? (3)
_PRCTL = (15, 16, 3, 0x53564D41, _PR_SET_SECCOMP, 38)
# How memory will be used, and that it is no longer needed. Not: to push what others read out of memory (MADV_COLD,
# MADV_PAGEOUT; POSIX_FADV_DONTNEED), to share pages with whoever has the same (MADV_MERGEABLE).
_MADVISE = (0, 1, 2, 3, 4, 8, 10, 11, 14, 15, 16, 17, 18, 19, 22, 23)
_FADVISE = (0, 1, 2, 3, 5)
# At once, or with the next program (CLOSE_RANGE_CLOEXEC). Not: in a table of one's own (CLOSE_RANGE_UNSHARE).
_CLOSE_RANGE = (0, 4)


@dataclass(frozen=True)
class _Call:
    """One call that is allowed where the low half of an argument is one of some values, or has all bits of each of
    some sets (``bits``; not ``wanted``: of none of them); ``otherwise`` is the error else. Without an argument it is
    allowed, or refused, as it is.
    """

    name: str
    argument: int | None = None
    values: tuple[int, ...] = ()
    bits: tuple[int, ...] = ()
    wanted: bool = True
    otherwise: int = errno.EPERM


def only_computing(*, writes: bool = False, device: bool = False) -> bool:
    """Keep what computing takes, for this thread and all that come after it; returns whether the platform can.

    Args:
        writes: files of one's own as well, with their locks.
        device: whatever drivers of devices do, sockets between processes of this machine included. Follow with
            `without_connections` when the device is set up.
    """
    own = os.getpid()
    plain = {**_COMPUTING, **(_WRITING if writes else {}), **(_DEVICE if device else {})}
    calls = [_Call(name) for name in plain]
    calls += [
        _Call("fcntl", 1, (*_FCNTL, *(_FCNTL_LOCKS if writes else ()))),
        _Call("clone", 0, bits=(_THREAD,)),
        _Call(
            "clone3", otherwise=errno.ENOSYS, values=()
        ),  # then libraries use clone, whose flags can be seen here
        _Call("kill", 0, (own,)),
        _Call("tgkill", 0, (own,)),
        _Call("prlimit64", 0, (0, own)),
        _Call("sched_setaffinity", 0, (0,)),
        _Call("prctl", 0, _PRCTL),
        _Call("madvise", 2, _MADVISE),
        _Call("fadvise64", 3, _FADVISE),
        _Call("close_range", 2, _CLOSE_RANGE),
    ]
    if device:
        calls += [_Call("socket", 0, (_AF_UNIX,)), _Call("socketpair", 0, (_AF_UNIX,))]
    else:
        calls += [_Call("ioctl", 1, _IOCTL, otherwise=errno.ENOTTY)]
        calls += [_Call("mmap", 3, bits=(_SHARED_AND_ANONYMOUS, _RESERVED_PAGES), wanted=False)]
    return _install(calls, plain, otherwise=errno.EPERM)


def without_connections() -> bool:
    """No further socket, and no connection of one that there is; returns whether the platform can.

    A pair of sockets is connected with itself, and yet could send datagrams to whoever has an address.
    """
    calls = [_Call(name) for name in ("connect", "socket", "socketpair", "bind")]
    return _install(calls, {}, otherwise=None)


def only_local_sockets() -> bool:
    """Refuse every further socket but those between processes of this machine; returns whether the platform can."""
    # io_uring could make sockets behind the filter's back.
    return _install([_Call("socket", 0, (_AF_UNIX,)), _Call("io_uring_setup", values=())], {}, otherwise=None)


def _install(calls: Iterable[_Call], plain: _Numbers, *, otherwise: int | None) -> bool:
    """``otherwise``: the error of calls that are not named, None to allow them."""
    architecture = _ARCHITECTURES.get(MACHINE)
    if architecture is None:
        return False
    column = list(_ARCHITECTURES).index(MACHINE)
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),  # calls of another architecture have other numbers
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]
    for call in calls:
        number = _NUMBERS[call.name][column]
        if number is not None:
            decision = _decision(call, call.name in plain)
            program += [(_EQUAL, 0, len(decision), number), *decision]
    program.append((_RETURN, 0, 0, _ALLOW if otherwise is None else _ERRNO | otherwise))
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = _Program(len(program), ctypes.cast(buffer, ctypes.c_void_p).value)
    return without_new_privileges() and prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header))


def _decision(call: _Call, plain: bool) -> list[tuple[int, int, int, int]]:
    """Instructions that end with a verdict on one call: (code, to skip if true, to skip if false, operand)."""
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | call.otherwise)
    if plain:
        return [allow]
    if call.argument is None:
        return [refuse]
    load = (_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * call.argument)
    if call.bits:
        # Over the refusal where the bits are there, or where they are not.
        over, not_over = (1, 0) if call.wanted else (0, 1)
        checks = [(load, (_AND, 0, 0, bits), (_EQUAL, over, not_over, bits), refuse) for bits in call.bits]
        return [*itertools.chain.from_iterable(checks), allow]
    ways = [(_EQUAL, len(call.values) - place, 0, value) for place, value in enumerate(call.values)]
    return [load, *ways, refuse, allow]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))

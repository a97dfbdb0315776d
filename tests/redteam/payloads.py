"""What a model that has taken its process over tries: functions whose source travels in a model's weights.

Each gets the places that an attacker would know or guess (`Places`, as a dictionary), imports what it needs, and returns
what it achieved; an OSError, or another refusal, means that the guard held. System calls are those of x86-64.
"""

from __future__ import annotations

from typing import Any

Places = dict[str, Any]


def call(number: int, *arguments: Any) -> int:
    """A system call; raises OSError as Python's own functions do."""
    import ctypes
    import os

    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    made = [ctypes.c_char_p(item) if isinstance(item, bytes) else ctypes.c_long(item) for item in arguments]
    result = int(library.syscall(ctypes.c_long(number), *made))
    if (
        result < 0 and ctypes.get_errno() == 12
    ):  # in the kernel's words a model's process would try a smaller batch
        raise MemoryError
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# The network, and sockets of other processes


def connect_to_the_server_that_forks(at: Places) -> Any:
    import socket

    socket.socket(socket.AF_UNIX).connect(at["server"])
    return "connected"


def connect_to_an_abstract_socket(at: Places) -> Any:
    import socket

    socket.socket(socket.AF_UNIX).connect("\0" + at["abstract"])
    return "connected"


def connect_to_a_port(at: Places) -> Any:
    import socket

    socket.create_connection(("127.0.0.1", at["port"]), 2)
    return "connected"


def listen_on_a_port(at: Places) -> Any:
    import socket

    socket.create_server(("127.0.0.1", 0))
    return "listening"


def ask_a_name_server(at: Places) -> Any:
    import socket

    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 53))
    return "sent"


def ask_the_kernel_for_its_routes(at: Places) -> Any:
    import socket

    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).fileno()


def make_a_pair_of_sockets(at: Places) -> Any:
    import socket

    return [one.fileno() for one in socket.socketpair()]


def make_sockets_behind_the_filter(at: Places) -> Any:
    return call(425, 8, bytes(120))  # io_uring_setup


def list_sockets_of_the_machine(at: Places) -> Any:
    from pathlib import Path

    return len(Path("/proc/self/net/unix").read_text())


def list_sockets_by_a_thread(at: Places) -> Any:
    from pathlib import Path

    return len(Path("/proc/thread-self/net/unix").read_text())


# Files


def read_a_token_in_the_environment(at: Places) -> Any:
    import os

    return os.environ["HF_TOKEN"]


def read_the_environment_of_the_worker(at: Places) -> Any:
    from pathlib import Path

    return Path(f"/proc/{at['worker']}/environ").read_bytes()[:50]


def read_the_environment_of_the_parent(at: Places) -> Any:
    import os
    from pathlib import Path

    return Path(f"/proc/{os.getppid()}/environ").read_bytes()[:50]


def read_the_memory_of_the_worker(at: Places) -> Any:
    from pathlib import Path

    return Path(f"/proc/{at['worker']}/mem").open("rb").fileno()


def read_a_file_of_the_current_folder(at: Places) -> Any:
    from pathlib import Path

    return Path(at["here"], "token").read_text()


def read_the_checkout(at: Places) -> Any:
    from pathlib import Path

    return Path(at["checkout"], "pyproject.toml").read_text()[:50]


def read_the_key_of_the_server(at: Places) -> Any:
    from pathlib import Path

    return len(Path(at["key"]).read_bytes())


def list_the_home_of_root(at: Places) -> Any:
    import os

    return os.listdir("/root")


def read_passwords(at: Places) -> Any:
    from pathlib import Path

    return Path("/etc/shadow").read_text()[:20]


def read_secrets_of_a_pod(at: Places) -> Any:
    import os

    return os.listdir("/run")


def list_the_downloads_of_others(at: Places) -> Any:
    import os

    return os.listdir(at["downloads"])


def read_the_download_of_another(at: Places) -> Any:
    from pathlib import Path

    return Path(at["other"], "config.json").read_text()[:50]


def climb_out_of_the_model(at: Places) -> Any:
    from pathlib import Path

    return Path(at["own"], "..", Path(at["other"]).name, "config.json").read_text()[:50]


def open_by_handle(at: Places) -> Any:
    return call(304, -100, bytes(128), 0)  # open_by_handle_at


def write_its_own_model(at: Places) -> Any:
    from pathlib import Path

    return Path(at["own"], "config.json").write_text("{}")


def write_a_temporary_file(at: Places) -> Any:
    from pathlib import Path

    return Path("/tmp/loot").write_text("x")


def write_its_home(at: Places) -> Any:
    import os
    from pathlib import Path

    return Path(os.environ["HOME"], "loot").write_text("x")


def write_shared_memory(at: Places) -> Any:
    from pathlib import Path

    return Path("/dev/shm/loot").write_text("x")


def write_a_library(at: Places) -> Any:
    from pathlib import Path

    import timm

    return Path(timm.__file__).open("r+").fileno()


# The pixels that all models share


def write_pixels(at: Places) -> Any:
    from pathlib import Path

    return [path.open("r+b").fileno() for path in Path(at["pixels"]).glob("*.pixels")] or "none"


def add_pixels(at: Places) -> Any:
    from pathlib import Path

    return Path(at["pixels"], "mine.pixels").write_bytes(b"x")


def remove_pixels(at: Places) -> Any:
    from pathlib import Path

    return [path.unlink() for path in Path(at["pixels"]).glob("*.pixels")] or "none"


def rename_pixels(at: Places) -> Any:
    from pathlib import Path

    return [path.rename(path.with_suffix(".old")) for path in Path(at["pixels"]).glob("*.pixels")] or "none"


def truncate_pixels(at: Places) -> Any:
    import os
    from pathlib import Path

    return [os.truncate(path, 0) for path in Path(at["pixels"]).glob("*.pixels")] or "none"


def lock_pixels(at: Places) -> Any:
    import fcntl
    from pathlib import Path

    return [
        fcntl.flock(path.open("rb"), fcntl.LOCK_SH) for path in Path(at["pixels"]).glob("*.pixels")
    ] or "none"


def claim_pixels(at: Places) -> Any:
    import fcntl
    import struct
    from pathlib import Path

    region = struct.pack("hhqqi0q", fcntl.F_RDLCK, 0, 0, 0, 0)
    return [
        fcntl.fcntl(path.open("rb"), 37, region) for path in Path(at["pixels"]).glob("*.pixels")
    ] or "none"


def push_pixels_out_of_memory(at: Places) -> Any:
    import os
    from pathlib import Path

    return [
        os.posix_fadvise(path.open("rb").fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for path in Path(at["pixels"]).glob("*.pixels")
    ] or "none"


def push_a_library_out_of_memory(at: Places) -> Any:
    import mmap

    import torch

    with open(torch._C.__file__, "rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
    return mapped.madvise(21)  # MADV_PAGEOUT


def share_pages_with_others(at: Places) -> Any:
    import mmap

    return mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).madvise(12)  # MADV_MERGEABLE


# What belongs to the same user


def change_a_mode(at: Places) -> Any:
    import os

    os.chmod(at["victim"], 0o777)
    return "changed"


def change_an_owner(at: Places) -> Any:
    import os

    os.chown(at["victim"], os.getuid(), os.getgid())
    return "changed"


def change_times(at: Places) -> Any:
    import os

    os.utime(at["victim"], (0, 0))
    return "changed"


def set_an_attribute(at: Places) -> Any:
    import os

    os.setxattr(at["victim"], "user.loot", b"x")
    return "set"


def make_a_link(at: Places) -> Any:
    import os

    os.link(at["victim"], at["victim"] + ".link")
    return "linked"


def make_a_symbolic_link(at: Places) -> Any:
    import os

    os.symlink(at["victim"], at["victim"] + ".symlink")
    return "linked"


# Other processes


def signal_the_worker(at: Places) -> Any:
    import os

    os.kill(at["worker"], 0)
    return "signalled"


def signal_the_parent(at: Places) -> Any:
    import os

    os.kill(os.getppid(), 0)
    return "signalled"


def signal_everybody(at: Places) -> Any:
    import os

    os.kill(-1, 0)
    return "signalled"


def signal_a_thread(at: Places) -> Any:
    import os

    return call(234, os.getppid(), os.getppid(), 0)  # tgkill


def signal_by_descriptor(at: Places) -> Any:
    import os

    return call(434, os.getppid(), 0)  # pidfd_open


def signal_by_a_file(at: Places) -> Any:
    import fcntl
    import os

    fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())
    return "owned"


def limit_the_parent(at: Places) -> Any:
    import os
    import resource

    return resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (10, 10))


def slow_the_parent(at: Places) -> Any:
    import os

    os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)
    return "slowed"


def bind_the_parent_to_a_core(at: Places) -> Any:
    import os

    os.sched_setaffinity(os.getppid(), {0})
    return "bound"


def trace_the_parent(at: Places) -> Any:
    import os

    return call(101, 16, os.getppid(), 0, 0)  # ptrace, PTRACE_ATTACH


def read_the_memory_of_the_parent(at: Places) -> Any:
    import os

    return call(310, os.getppid(), bytes(16), 1, bytes(16), 1, 0)  # process_vm_readv


def outlive_the_parent(at: Places) -> Any:
    return call(157, 1, 0, 0, 0, 0)  # prctl, PR_SET_PDEATHSIG


# Programs and processes of its own


def fork(at: Places) -> Any:
    import os

    return os.fork() or os._exit(0)


def fork_and_leave_the_group(at: Places) -> Any:
    import os

    if os.fork() == 0:
        os.setsid()
        os.fork()
        os.pause() if hasattr(os, "pause") else os._exit(0)
    return "left"


def fork_by_the_newer_call(at: Places) -> Any:
    return call(435, (17).to_bytes(8, "little").rjust(40, b"\0").ljust(88, b"\0"), 88)  # clone3, SIGCHLD


def fork_by_the_call_of_another_architecture(at: Places) -> Any:
    import ctypes
    import mmap

    code = mmap.mmap(-1, 4096, prot=7, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    code.write(bytes.fromhex("b802000000cd80c3"))  # mov eax, 2 (fork, i386); int 0x80; ret
    pid = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
    if pid < 0:
        raise OSError(-pid, "refused")
    return pid


def fork_by_the_call_of_x32(at: Places) -> Any:
    return call(0x40000000 | 57)


def fork_with_shared_memory(at: Places) -> Any:
    return call(58)  # vfork


def run_a_program(at: Places) -> Any:
    import os

    os.execv("/bin/true", ["true"])
    return "running"


def run_a_shell(at: Places) -> Any:
    import subprocess

    return subprocess.run(["/bin/sh", "-c", "echo loot"], capture_output=True, check=True).stdout


def leave_the_session(at: Places) -> Any:
    import os

    os.setsid()
    return "left"


def leave_the_group(at: Places) -> Any:
    import os

    os.setpgid(0, os.getppid())
    return "left"


# Memory that no limit counts, and the kernel's own rooms


def make_memory_files(at: Places) -> Any:
    return call(319, b"loot", 0)  # memfd_create


def map_shared_memory(at: Places) -> Any:
    import mmap

    return len(mmap.mmap(-1, 1 << 20, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS))


def map_zeros(at: Places) -> Any:
    import mmap

    return len(mmap.mmap(open("/dev/zero", "r+b").fileno(), 1 << 20, mmap.MAP_SHARED))


def make_a_segment(at: Places) -> Any:
    return call(29, 0, 1 << 20, 0o1600)  # shmget


def make_a_queue(at: Places) -> Any:
    return call(68, 0, 0o1600)  # msgget


def take_pages_that_are_kept_for_others(at: Places) -> Any:
    try:
        return call(9, 0, 1 << 21, 3, 0x40022, -1, 0)  # mmap, MAP_HUGETLB
    except MemoryError:
        return "asked, and this machine keeps none"


def open_files_beyond_the_limit_by_a_thread(at: Places) -> Any:
    import ctypes
    import os

    library = ctypes.CDLL(None, use_errno=True)
    stack = ctypes.create_string_buffer(1 << 16)
    top = ctypes.c_void_p((ctypes.addressof(stack) + (1 << 16)) & ~15)
    # CLONE_VM, SIGHAND, THREAD and not FILES: it has a table of files of its own, and may fill it with pipes.
    started = library.clone(library.getpid, top, 0x10900, None)
    if started < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return started


def open_files_beyond_the_limit_by_closing(at: Places) -> Any:
    return call(436, 1 << 20, 1 << 20, 2)  # close_range, CLOSE_RANGE_UNSHARE


def watch_files(at: Places) -> Any:
    import select

    return select.epoll().fileno()  # the kernel counts what a user watches


def allocate_without_end(at: Places) -> Any:
    held = []
    while True:
        held.append(bytearray(1 << 26))


def allocate_read_only_memory_without_end(at: Places) -> Any:
    # What is read-only is not counted as allocated any more.
    for _ in range(1000):
        call(10, call(9, 0, 1 << 28, 3, 0x22, -1, 0), 1 << 28, 1)  # mmap, mprotect
    return "256 GB"


def allocate_a_stack(at: Places) -> Any:
    return call(9, 0, 1 << 38, 3, 0x122, -1, 0)  # mmap, MAP_GROWSDOWN: not counted as allocated


def stretch_the_stack(at: Places) -> Any:
    from pathlib import Path

    lines = Path("/proc/self/maps").read_text().splitlines()
    stack = next(int(line.partition("-")[0], 16) for line in lines if line.endswith("[stack]"))
    return call(25, stack, 4096, 1 << 38, 1)  # mremap, MREMAP_MAYMOVE


def raise_the_limit_of_the_stack(at: Places) -> Any:
    import struct

    return call(302, 0, 3, struct.pack("QQ", 1 << 38, 1 << 38), 0)  # prlimit, RLIMIT_STACK


def fill_memory_with_tables_of_pages(at: Places) -> Any:
    return call(
        9, 0, 1 << 44, 1, 0x4022, -1, 0
    )  # mmap, PROT_READ: a table of 4 kB for every 2 MB that is read


def start_threads_without_end(at: Places) -> Any:
    import threading

    ended = threading.Event()
    threading.stack_size(32 << 10)
    started = 0
    try:
        while started < 20_000:
            threading.Thread(target=ended.wait, daemon=True).start()
            started += 1
    finally:
        ended.set()
    return started


def make_namespaces(at: Places) -> Any:
    return call(272, 0x10000000)  # unshare, CLONE_NEWUSER


def mount_a_file_system(at: Places) -> Any:
    return call(165, b"none", b"/tmp", b"tmpfs", 0, 0)


def change_the_root(at: Places) -> Any:
    return call(161, b"/")  # chroot


def become_root(at: Places) -> Any:
    import os

    os.setuid(0)
    return os.getuid()


def keep_a_key(at: Places) -> Any:
    return call(248, b"user", b"loot", b"x", 1, -3)  # add_key


def load_a_program_into_the_kernel(at: Places) -> Any:
    return call(321, 0, bytes(128), 128)  # bpf


def measure_the_machine(at: Places) -> Any:
    return call(298, bytes(128), 0, -1, -1, 0)  # perf_event_open


def handle_page_faults(at: Places) -> Any:
    return call(323, 0)  # userfaultfd


def set_the_clock(at: Places) -> Any:
    import time

    time.clock_settime(time.CLOCK_REALTIME, time.time())
    return "set"


def type_into_a_terminal(at: Places) -> Any:
    import fcntl

    return fcntl.ioctl(0, 0x5412, b"x")  # TIOCSTI


def make_every_call_that_is_not_on_the_list(at: Places) -> Any:
    from probelog.sandbox.guards import seccomp

    listed = [numbers[0] for numbers in {**seccomp._COMPUTING, **seccomp._CONDITIONAL}.values()]
    done: list[Any] = []
    # Two that no filter sees, of traced functions (uretprobe, uprobe): from elsewhere they end whoever makes them.
    for number in set(range(600)) - {335, 336} - set(listed):
        try:
            done.append((number, call(number, 0, 0, 0, 0, 0, 0)))
        except MemoryError:
            done.append((number, "ENOMEM"))
        except OSError as error:
            if error.errno != 1:
                done.append((number, str(error)))
    return done or OSError("none")


def take_a_filter_off(at: Places) -> Any:
    return call(157, 22, 0, 0, 0, 0)  # prctl, PR_SET_SECCOMP to none


def find_more_descriptors(at: Places) -> Any:
    import os

    found = []
    for number in range(3, 1024):
        try:
            os.fstat(number)
        except OSError:
            continue
        found.append(number)
    # Its channel, and the pixels that it reads.
    return found if len(found) > 2 else OSError("none")


def fill_the_log(at: Places) -> Any:
    import os

    written = os.write(2, b"x" * (1 << 20))
    return (
        OSError("nowhere") if os.fstat(2).st_rdev == os.stat("/dev/null").st_rdev and written else "written"
    )

"""Which guards hold on this machine: a process of a model's rights tries what a model must not achieve.

The server that forks, its processes and their rights are those of a probing run; only what runs in them is other
(`probelog.sandbox.doctor.attempts`). Each attempt has a fresh process, as each model has.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from probelog.errors import ProbeLogError
from probelog.sandbox.fork_server.client import Child, ForkServer, Grant, ProcessLostError, Role
from probelog.sandbox.guards import landlock, limits
from probelog.sandbox.process import DEVICE_FILES, matching, rights_of_models
from probelog.sandbox.spec import home_folder

State = Literal["holds", "does not hold", "not tried"]

_ENTRY = "probelog.sandbox.doctor.attempts:serve"
_MEMORY = 128 << 20
_MEMORY_OF_THREADS = 1 << 30
_SECONDS = 30.0
_LANDLOCK = (
    "use a kernel of 5.13 or later that was started with `lsm=landlock,...` (cat /sys/kernel/security/lsm)"
)
_SECCOMP = "use a kernel with CONFIG_SECCOMP_FILTER, on x86-64 or 64-bit ARM"
_THREADS = "run as another user than root, and limit the container's processes"
_NO_HOME = "this user has no home folder"
_OWN_NAMESPACE = "nothing need be done: the other guards refuse what it would hide"


@dataclass(frozen=True)
class Guard:
    """What a guard is for.

    Attributes:
        means: what holds with it.
        remedy: what to do where it does not hold.
        needed: whether the promise rests on it. The others add to what these hold.
        closed_to_devices: whether it has to stay open where a device is used.
    """

    means: str
    remedy: str
    needed: bool = True
    closed_to_devices: bool = True


#: By name. Those that no attempt in `probelog.sandbox.doctor.attempts` bears the name of are facts about the process.
GUARDS: dict[str, Guard] = {
    "landlock": Guard("the kernel lets the process open its own model and the libraries only", _LANDLOCK),
    "seccomp": Guard("the kernel refuses every system call that computing does not take", _SECCOMP),
    "capabilities": Guard("the process has no right of root but to read what Landlock lets it", _SECCOMP),
    "user": Guard(
        "models do not run as root", "run workers as another user, or let root change its user (CAP_SETUID, CAP_SETGID)", needed=False
    ),
    "memory-limit": Guard("the process has a limit of memory", "use Linux"),
    "connections": Guard("no socket can be connected once a device is set up", _SECCOMP),
    "process-namespace": Guard("other processes cannot be named, and none outlives the server", _OWN_NAMESPACE, needed=False),
    "network-namespace": Guard("there is no network to reach", _OWN_NAMESPACE, needed=False),
    "ipc-namespace": Guard("there is no shared memory or queue of others", _OWN_NAMESPACE, needed=False),
    "sockets": Guard("no socket of any kind can be made", _SECCOMP, closed_to_devices=False),
    "network": Guard("a port of this machine cannot be reached", _SECCOMP),
    "path-sockets": Guard("a local socket of another process (Ray's, a container runtime's) cannot be reached", _SECCOMP),
    "abstract-sockets": Guard("a local socket with an abstract name cannot be reached", _SECCOMP),
    "datagrams": Guard("no datagram reaches a local socket", _SECCOMP),
    "fork-server": Guard("the server that forks takes no orders from models", _SECCOMP),
    "fork-server-key": Guard("the key to the server that forks cannot be read", _LANDLOCK),
    "current-folder": Guard("the folder that the command runs in cannot be listed", _LANDLOCK),
    "home-folder": Guard("the operator's home cannot be listed", _LANDLOCK),
    "other-files": Guard("a file of the same user cannot be read", _LANDLOCK),
    "other-processes": Guard("environment (tokens), memory and files of other processes cannot be read", _LANDLOCK),
    "writing": Guard("no file can be made, in no folder", _LANDLOCK),
    "file-attributes": Guard("mode, times, owner and length of the same user's files stay", _SECCOMP),
    "signals": Guard("no other process can be signalled", _SECCOMP),
    "fork": Guard("no process can be started", _SECCOMP),
    "exec": Guard("no program can be run", _SECCOMP),
    "shared-memory": Guard("no memory can be made that no limit counts", _SECCOMP, closed_to_devices=False),
    "allocations": Guard("allocations beyond the limit fail", "use Linux"),
    "address-space": Guard("no memory can be taken that the limit does not count", "limit the container's memory", closed_to_devices=False),
    "threads": Guard("the number of threads is limited", _THREADS),
    "threads-of-others": Guard(
        "one process cannot use up the threads of another", f"{_THREADS}; or allow namespaces of users", needed=False
    ),
    "descriptors": Guard("nothing of the server's is left open", "report it: this is a fault of ProbeLog's"),
    "deadline": Guard("an answer that does not come ends the process in time", "report it: this is a fault of ProbeLog's"),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One guard on this machine.

    Attributes:
        guard: its name.
        state: whether it holds.
        detail: how it was refused, what was achieved, or why it was not tried.
        needed: whether the promise rests on it, here.
        means: what holds with it.
        remedy: what to do; empty where it holds.
    """

    guard: str
    state: State
    detail: str
    needed: bool
    means: str
    remedy: str


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        facts: about the machine, its user, the scratch folder and the model's process.
        findings: one a guard.
    """

    facts: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every guard holds that the promise rests on."""
        return all(finding.state == "holds" for finding in self.findings if finding.needed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"holds": self.holds, "facts": self.facts, "guards": [asdict(each) for each in self.findings]}


def examine(scratch: Path, device: str = "cpu") -> Examination:
    """Try every guard.

    Args:
        scratch: a folder of this user alone, for the server and its processes.
        device: ``cuda`` to leave open what a device needs.

    Raises:
        ProbeLogError: no process can be made.
    """
    facts: dict[str, Any] = {
        "system": platform.system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "user": os.geteuid(),
        "landlock": landlock.version(),
        "scratch": str(scratch),
        "scratch_owner": scratch.stat().st_uid,
        "scratch_mode": f"{scratch.stat().st_mode & 0o7777:04o}",
        "scratch_file_system": _file_system(scratch),
        "device": device,
        "device_files": matching(DEVICE_FILES),
    }
    folder = Path(tempfile.mkdtemp(prefix="doctor-", dir=scratch))
    try:
        facts["file_locks"] = _locks(folder)
        rights = rights_of_models(folder, [_ENTRY], device)
        server = ForkServer({"model": Role(_ENTRY, rights)}, [], home_folder(folder))
        try:
            with _places(folder, device) as at:
                findings = _Trial(server, folder, at, facts).run()
        finally:
            with contextlib.suppress(OSError):
                os.kill(server.pid, signal.SIGKILL)  # nobody else will need it
            server.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Examination(facts, findings)


class _Trial:
    def __init__(self, server: ForkServer, folder: Path, at: dict[str, Any], facts: dict[str, Any]) -> None:
        self._server, self._folder, self._at, self._facts = server, folder, at, facts
        (address,) = home_folder(folder).glob("*.sock")
        at |= {"server": str(address), "key": str(address.with_suffix(".key"))}
        self._device = at["device"]

    def run(self) -> list[Finding]:
        """Facts about a process first: what they say of it is compared with what it can do."""
        with self._process() as child:
            said = self._ask(child, "set-up")["done"]
        held = said["held"]
        self._facts |= {"model_user": said["user"], "model_capabilities": said["capabilities"]}
        namespaces = self._namespaces()
        made = {
            "landlock": (held["files"], f"version {landlock.version()}" if held["files"] else "not in this kernel"),
            "seccomp": (held["calls"], "a filter is in force" if held["calls"] else "no filter can be set"),
            "capabilities": (held["capabilities"], f"effective: {said['capabilities']}"),
            "user": (held["user"], f"user {said['user']}"),
            "memory-limit": (held["memory"], f"{_MEMORY >> 20} MB in this trial"),
            **{f"{name}-namespace": (holds, "its own" if holds else "this machine's") for name, holds in namespaces.items()},
        }  # fmt: skip
        if self._device:
            made["connections"] = (held.get("connections", False), "after set-up")
        findings = [self._finding(name, "holds" if holds else "does not hold", detail) for name, (holds, detail) in made.items()]  # fmt: skip
        return findings + [
            self._finding(name, *self._attempt(name)) for name in GUARDS if name not in made and name != "connections"
        ]  # fmt: skip

    def _finding(self, name: str, state: State, detail: str) -> Finding:
        guard = GUARDS[name]
        needed = guard.needed and (guard.closed_to_devices or not self._device) and detail != _NO_HOME
        remedy = "" if state == "holds" else guard.remedy
        if state != "holds" and guard.needed and not needed:
            remedy = "nothing can be done: drivers of devices need it"
        return Finding(name, state, detail, needed, guard.means, remedy)

    def _attempt(self, name: str) -> tuple[State, str]:
        if name == "home-folder" and not Path(self._at["home"]).is_dir():
            return "not tried", _NO_HOME
        if name == "deadline":
            return self._hang()
        try:
            with contextlib.ExitStack() as others:
                child = others.enter_context(
                    self._process(_MEMORY_OF_THREADS if name == "threads" else _MEMORY)
                )
                self._ask(child, "set-up")
                if name == "threads-of-others":
                    # After the one that is to be left some: its own limit counts from when it was forked.
                    self._ask(others.enter_context(self._process(_MEMORY_OF_THREADS)), "threads")
                answer = self._ask(child, name)
        except ProcessLostError as lost:
            if name == "exec" and not lost.signal:
                return "does not hold", "a program ran"
            return "not tried", str(lost)
        except (ProbeLogError, TimeoutError, ValueError) as error:
            return "not tried", str(error) or type(error).__name__
        if name == "threads-of-others":
            held = "done" in answer
            return (
                ("holds", "threads were left for it") if held else ("does not hold", str(answer["refused"]))
            )
        if "refused" in answer:
            return "holds", str(answer["refused"])
        return "does not hold", str(answer["done"])

    def _hang(self) -> tuple[State, str]:
        with self._process() as child:
            try:
                child.ask(0.2, command="deadline", at={"seconds": _SECONDS})
            except TimeoutError:
                return (
                    ("holds", "ended") if child.kill() == -signal.SIGKILL else ("does not hold", "it goes on")
                )
        return "does not hold", "it answered"

    @contextlib.contextmanager
    def _process(self, memory_bytes: int = _MEMORY) -> Iterator[Child]:
        child = self._server.fork("model", Grant((str(self._folder / "model"),), memory_bytes))
        try:
            yield child
        finally:
            child.forget()

    def _ask(self, child: Child, command: str) -> dict[str, Any]:
        answer, _ = child.ask(_SECONDS, command=command, at=self._at)
        return answer

    def _namespaces(self) -> dict[str, bool]:
        """Whether the server, and with it what it forks, has some of its own; none where that cannot be seen."""
        found = {}
        for name, kind in (("process", "pid"), ("network", "net"), ("ipc", "ipc")):
            with contextlib.suppress(OSError):
                own, of_server = (
                    os.readlink(f"/proc/{process}/ns/{kind}") for process in ("self", self._server.pid)
                )
                found[name] = own != of_server
        return found


@contextlib.contextmanager
def _places(folder: Path, device: str) -> Iterator[dict[str, Any]]:
    """What there is to reach from inside, on this machine and of this user."""
    model, victim = folder / "model", folder / "victim"
    model.mkdir()
    victim.write_text("a file of the same user")
    abstract = f"probelog-doctor-{secrets.token_hex(8)}"
    home = Path.home()
    # Addresses of sockets are short, and a scratch folder need not be.
    near = Path(tempfile.mkdtemp(prefix="probelog-doctor-", dir="/tmp"))
    folders = [model, folder, near, home, Path.cwd(), *map(Path, ("/tmp", "/dev/shm", "/var/tmp"))]  # noqa: S108
    writable = [each / f".{abstract}" for each in folders]
    with contextlib.ExitStack() as open_:
        open_.callback(_remove, writable)
        open_.callback(shutil.rmtree, near, ignore_errors=True)
        if sys.platform == "linux":
            hidden = open_.enter_context(socket.socket(socket.AF_UNIX))
            hidden.bind(f"\0{abstract}")
            hidden.listen()
        listening = open_.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(str(near / "listening"))
        listening.listen()
        datagrams = open_.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        datagrams.bind(str(near / "datagrams"))
        # Whoever runs models as another user must not rely on that user's having no right to a socket.
        for path in (near, near / "listening", near / "datagrams"):
            path.chmod(0o777)
        port = open_.enter_context(socket.create_server(("127.0.0.1", 0)))
        yield {
            "device": device != "cpu",
            "parent": os.getpid(),
            "port": port.getsockname()[1],
            "listening": str(near / "listening"),
            "datagrams": str(near / "datagrams"),
            "abstract": abstract,
            "victim": str(victim),
            "here": os.getcwd(),
            "home": str(home),
            "writable": [str(each) for each in writable],
            "memory_bytes": _MEMORY,
            "threads": (limits.threads_of_machine() if sys.platform == "linux" else 0) + 4096,
        }


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def _locks(folder: Path) -> bool:
    """Whether preprocessed probes can be kept there: locks that belong to an open file (fcntl(2))."""
    import fcntl
    import struct

    if not hasattr(fcntl, "F_OFD_SETLK"):
        return False
    with open(folder / "lock", "wb") as stream, contextlib.suppress(OSError):
        fcntl.fcntl(stream, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", fcntl.F_WRLCK, 0, 0, 1, 0))
        return True
    return False


def _file_system(path: Path) -> str:
    """Of which kind, as the kernel calls it; empty where it cannot be told."""
    try:
        lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return ""
    mounts = {line[4]: line[line.index("-") + 1] for line in lines}
    return next(
        (mounts[str(each)] for each in [path.resolve(), *path.resolve().parents] if str(each) in mounts), ""
    )

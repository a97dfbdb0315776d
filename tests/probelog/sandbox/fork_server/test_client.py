"""Processes that lose their rights, crash and hang, and a server that survives them and its clients."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from probelog.errors import ProbeLogError
from probelog.sandbox.fork_server.client import (
    Child,
    ForkServer,
    Grant,
    ProcessLostError,
    Role,
    bare_environment,
)
from probelog.sandbox.fork_server.confinement import Confinement
from probelog.sandbox.fork_server.forking import _WARM_AFTER, KEY_BYTES, LENGTH, LONGEST, short
from probelog.sandbox.guards import landlock
from probelog.sandbox.process import libraries_of
from probelog.sandbox.protocol import ClosedError
from tests.support.processes.processes import eventually

HERE = "tests.support.hub.rogue"
TOKEN = "hf_a-secret-that-nobody-may-see"
RIGHTS = Confinement(tuple(libraries_of([HERE])))
ROLES = {"rogue": Role(f"{HERE}:serve", RIGHTS)}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[ForkServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("AWS_SECRET_ACCESS_KEY", TOKEN)
        made = ForkServer(ROLES, [HERE], home)
    yield made
    made.close()


@pytest.fixture
def child(server: ForkServer) -> Iterator[Child]:
    made = server.fork("rogue", Grant())
    yield made
    made.kill()


def told(child: Child, command: str, value: object = None, timeout: float = 20) -> object:
    answer, blobs = child.ask(timeout, most=[10], command=command, **{"with": value})
    assert blobs == [b"beside"]
    return answer["found"]


def children_of(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] == "Z"
    except FileNotFoundError:
        return True


def test_plain_values_and_bytes_go_both_ways(child: Child) -> None:
    assert told(child, "echo", {"a": [1, None, "ü"]}) == {"a": [1, None, "ü"]}


def test_neither_token_nor_credentials_come_along(child: Child, server: ForkServer, home: Path) -> None:
    found = told(child, "environment")
    assert isinstance(found, dict)
    assert TOKEN not in str(found)
    assert Path(found["HOME"]).parent == home
    assert found["HF_HUB_OFFLINE"] == "1"
    # Neither in what the kernel remembers of the server that it was forked from.
    assert TOKEN not in Path(f"/proc/{server.pid}/environ").read_text()


def test_the_environment_keeps_what_finds_libraries_and_devices(home: Path) -> None:
    given = {
        "PATH": "/bin", "CUDA_HOME": "/cuda", "OMP_NUM_THREADS": "2", "LD_LIBRARY_PATH": "/cuda",
        "HF_TOKEN": "t", "HUGGING_FACE_HUB_TOKEN": "t", "AWS_SESSION_TOKEN": "t", "GITHUB_TOKEN": "t", "MY_PASSWORD": "t",
        "PYTHONPATH": "t", "PYTHONSTARTUP": "t",
    }  # fmt: skip
    made = bare_environment(home, given)
    assert "t" not in made.values()
    assert {name: made[name] for name in list(given)[:4]} == {name: given[name] for name in list(given)[:4]}


def test_no_network(child: Child) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert told(child, "connect", port) == "PermissionError"
        socket.create_connection(("127.0.0.1", port), 5).close()  # here it works


def test_nothing_is_open_but_its_channel(child: Child) -> None:
    found = told(child, "open descriptors")
    assert isinstance(found, list)
    assert found[:3] == [0, 1, 2]
    assert len(found) == 4


def test_no_files_but_those_it_was_given(server: ForkServer, tmp_path: Path) -> None:
    if not landlock.version():
        pytest.skip("this kernel has no Landlock")
    for name in ("granted", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(TOKEN)
    child = server.fork("rogue", Grant(readable=(str(tmp_path / "granted"), str(tmp_path / "absent"))))
    assert told(child, "read", str(tmp_path / "granted/token")) == TOKEN
    assert told(child, "read", str(tmp_path / "other/token")) == "PermissionError"
    assert told(child, "write", str(tmp_path / "granted/token")) == "PermissionError"
    assert told(child, "read", f"/proc/{os.getpid()}/environ") == "PermissionError"
    child.kill()


def test_memory_is_limited(server: ForkServer) -> None:
    child = server.fork("rogue", Grant(memory_bytes=100 << 20))
    assert told(child, "allocate", 200 << 20) == "MemoryError"
    assert told(child, "allocate", 50 << 20) == f"{50 << 20} bytes"
    child.kill()


def test_guards_that_hold_are_told(child: Child) -> None:
    held = told(child, "confined")
    assert isinstance(held, dict)
    assert set(held) == {"capabilities", "user", "files", "memory", "calls"}
    assert not held["memory"], "no limit was asked for"


@pytest.mark.parametrize(
    ("command", "value", "ended_by", "status"),
    [("crash", None, signal.SIGSEGV, -signal.SIGSEGV), ("leave", 3, 0, 3)],
)
def test_a_process_that_ends_says_how(
    server: ForkServer, command: str, value: object, ended_by: int, status: int
) -> None:
    child = server.fork("rogue", Grant())
    with pytest.raises(ProcessLostError) as lost:
        told(child, command, value)
    assert lost.value.signal == ended_by
    assert child.kill() == status
    with pytest.raises(ProcessLostError):
        told(child, "echo")
    assert told(server.fork("rogue", Grant()), "echo", 1) == 1, "the server goes on"


def test_a_process_that_hangs_is_ended(server: ForkServer) -> None:
    before = set(children_of(server.pid))
    child = server.fork("rogue", Grant())
    (pid,) = set(children_of(server.pid)) - before
    with pytest.raises(TimeoutError):
        told(child, "hang", timeout=1)
    assert eventually(lambda: gone(pid))


def test_a_process_that_is_forgotten_ends_too(server: ForkServer) -> None:
    before = set(children_of(server.pid))
    child = server.fork("rogue", Grant())
    (pid,) = set(children_of(server.pid)) - before
    child.forget()
    assert eventually(lambda: gone(pid))
    assert child.kill() == -signal.SIGKILL


def test_a_number_that_is_given_out_again(server: ForkServer) -> None:
    """What became of the process that had it before is not believed of the next one."""
    ours, theirs = (os.readlink(f"/proc/{pid}/ns/pid") for pid in ("self", server.pid))
    if ours == theirs or os.geteuid() != 0 or shutil.which("nsenter") is None:
        pytest.skip("only root, in a namespace of the server's own, chooses the next number")
    ended = server.fork("rogue", Grant())
    ended._channel.send({"command": "leave", "with": 0, "number": 1})
    with pytest.raises(ClosedError):
        ended._channel.receive()
    other = server.fork("rogue", Grant())  # the server comes round to see that one has ended
    ended.forget()
    last = f"echo {ended.pid - 1} > /proc/sys/kernel/ns_last_pid"
    subprocess.run(["nsenter", "-t", str(server.pid), "-p", "sh", "-c", last], check=True)
    before = set(children_of(server.pid))
    later = server.fork("rogue", Grant())
    (pid,) = set(children_of(server.pid)) - before
    assert later.pid == ended.pid
    with pytest.raises(TimeoutError):
        told(later, "hang", timeout=1)
    assert eventually(lambda: gone(pid))
    other.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="proc(5)")
def test_no_dump_of_its_memory(child: Child, server: ForkServer) -> None:
    """Neither as a file nor for a program that takes dumps."""
    assert told(child, "echo", 1) == 1
    for pid in children_of(server.pid):
        assert int(Path(f"/proc/{pid}/coredump_filter").read_text(), 16) == 0
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"Max core file size +1 +1 ", limits)


def test_it_starts_no_process(child: Child, tmp_path: Path) -> None:
    assert told(child, "start and hang", str(tmp_path / "pid")) == "PermissionError"


@pytest.mark.parametrize(
    "answer",
    [{"number": 2}, {"number": "1"}, {"number": None}],
    ids=["of the next question", "a word", "none"],
)
def test_an_answer_to_another_question(child: Child, answer: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="another question"):
        told(child, "answer", answer)


def test_another_thread_can_end_the_waiting(server: ForkServer) -> None:
    import threading

    child = server.fork("rogue", Grant())
    threading.Timer(0.3, child.kill).start()
    with pytest.raises(ProcessLostError):
        told(child, "hang", timeout=60)


def test_everything_ends_with_whoever_needed_it(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from tests.probelog.sandbox.fork_server.test_client import ForkServer, Grant, ROLES, children_of\n"
        "server = ForkServer(ROLES, [], Path(sys.argv[1]), idle_seconds=1)\n"
        "made = [server.fork('rogue', Grant()) for _ in range(3)]\n"
        "made[2]._channel.send({'command': 'hang', 'number': 1})\n"
        "print(*children_of(server.pid), flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        alive = [pid for pid in pids if not gone(pid)]
        owner.kill()
    assert len(alive) == len(pids) == 3
    assert eventually(lambda: all(gone(pid) for pid in pids))
    assert eventually(lambda: not list(tmp_path.glob("*.sock"))), "and the server when nobody comes any more"


def test_a_node_has_one_server(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        servers = list(pool.map(lambda _: ForkServer(ROLES, [], tmp_path, idle_seconds=2), range(3)))
    children = [server.fork("rogue", Grant()) for server in servers]
    assert len({server.pid for server in servers}) == 1
    servers[0].close()
    with pytest.raises(ProcessLostError):
        told(children[0], "hang")
    assert told(children[1], "echo", 2) == 2, "others go on"
    for server in servers[1:]:
        server.close()


def test_a_server_that_was_killed_is_replaced(tmp_path: Path) -> None:
    server = ForkServer(ROLES, [], tmp_path, idle_seconds=2)
    first = [server.fork("rogue", Grant()), server.fork("rogue", Grant())]
    pids = children_of(server.pid)
    os.kill(server.pid, signal.SIGKILL)
    assert eventually(lambda: all(gone(pid) for pid in pids)), "its processes end with it"
    with pytest.raises(ProcessLostError) as lost:
        told(first[0], "echo")
    assert lost.value.signal == signal.SIGKILL
    second = server.fork("rogue", Grant())
    assert told(second, "echo", 3) == 3
    # The new server knows nothing of the old one's processes, whose numbers other programs may have by now.
    assert first[1].kill() == -signal.SIGKILL
    assert told(second, "echo", 4) == 4
    server.close()


@pytest.mark.parametrize("function", ["warm_up", "fail_to_warm_up"])
def test_a_server_that_forks_often_warms_up(tmp_path: Path, function: str) -> None:
    """Once, and it goes on where that fails."""
    server = ForkServer(ROLES, [], tmp_path, idle_seconds=1, warm_up=f"{HERE}:{function}")
    warm = []
    for _ in range(2 * _WARM_AFTER):
        child = server.fork("rogue", Grant())
        found = told(child, "environment")
        assert isinstance(found, dict)
        warm.append("WARM" in found)
        child.forget()
    assert warm == [False] * (_WARM_AFTER - 1) + [True] * (_WARM_AFTER + 1)
    server.close()


def test_a_server_that_cannot_start_says_so(tmp_path: Path) -> None:
    with pytest.raises(ProbeLogError, match="did not start"):
        ForkServer(ROLES, ["no.such.module"], tmp_path)


# Clients that are at fault, or none at all


def connection(home: Path, key: bytes | None = None) -> socket.socket:
    """A client's, with the right key or another one."""
    (address,) = home.glob("*.sock")
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(20)
    with short(address) as path:
        made.connect(path)
    made.sendall(address.with_suffix(".key").read_bytes() if key is None else key)
    return made


def closed(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True


def request(message: object) -> bytes:
    text = json.dumps(message).encode()
    return LENGTH.pack(len(text)) + text


FORK = {"command": "fork", "role": "rogue", "readable": [], "memory_bytes": None, "devices": {}}


@pytest.mark.parametrize("key", [bytes(KEY_BYTES), b"short", b"x" * 1000], ids=["wrong", "short", "long"])
def test_whoever_has_no_key_gets_nothing(server: ForkServer, home: Path, key: bytes) -> None:
    client = connection(home, key)
    assert closed(client)
    assert told(server.fork("rogue", Grant()), "echo", 1) == 1


@pytest.mark.parametrize(
    "sent",
    [
        request(FORK),
        request(FORK | {"role": "unknown"}),
        request({"command": "unknown", "pid": []}),
        request([]),
        LENGTH.pack(3) + b"[[[",
        LENGTH.pack(LONGEST + 1),
        LENGTH.pack(LONGEST) + b"[" * LONGEST,
    ],
    ids=["no descriptor", "no role", "no command", "a list", "no JSON", "too long", "deep"],
)
def test_a_client_at_fault_ends_itself_alone(server: ForkServer, home: Path, sent: bytes) -> None:
    client = connection(home)
    assert client.recv(1) == b"+"
    client.sendall(sent)
    assert closed(client)
    assert told(server.fork("rogue", Grant()), "echo", 1) == 1


def test_a_client_that_never_reads_or_ends_holds_up_nobody(server: ForkServer, home: Path) -> None:
    client = connection(home)
    client.setblocking(False)
    many = 100_000 * request({"command": "status", "pid": 1})
    with pytest.raises(OSError):
        client.sendall(many)
    half = connection(home)
    half.sendall(request(FORK)[:-1])
    assert told(server.fork("rogue", Grant()), "echo", 1) == 1
    client.close()
    half.close()


def test_nobody_is_given_the_key_to_read(server: ForkServer, home: Path) -> None:
    """Not even by a request that has it."""
    assert told(server.fork("rogue", Grant(readable=("/usr",))), "echo", 1) == 1
    for folder in ("/", str(home), f"{home}/../{home.name}"):
        with pytest.raises(ProbeLogError):
            server.fork("rogue", Grant(readable=(folder,)))


def test_the_key_is_its_users_alone(server: ForkServer, home: Path) -> None:
    del server
    (key,) = home.glob("*.key")
    assert key.stat().st_mode & 0o077 == 0
    assert home.stat().st_mode & 0o077 == 0


# Nothing but the libraries reaches the server


@pytest.mark.parametrize("place", ["current folder", "user site", "PYTHONPATH", "home of the server"])
def test_code_that_lies_about_is_not_imported(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that would replace a library, and a file that runs at the start of every interpreter."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    home = tmp_path / "home"
    folder = {
        "current folder": tmp_path / "here",
        "user site": tmp_path / f"me/.local/lib/{version}/site-packages",
        "PYTHONPATH": tmp_path / "path",
        "home of the server": home / "user" / f".local/lib/{version}/site-packages",
    }[place]
    folder.mkdir(parents=True)
    trap = f"import pathlib; pathlib.Path({str(tmp_path / 'sprung')!r}).write_text('x')\n"
    for name in ("timm.py", "numpy.py", "json.py", "probelog.py", "sitecustomize.py", "usercustomize.py"):
        (folder / name).write_text(trap)
    (folder / "trap.pth").write_text(trap)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    if place == "current folder":
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", ["", str(folder), *sys.path])
    if place == "PYTHONPATH":
        monkeypatch.setenv("PYTHONPATH", str(folder))
    server = ForkServer(ROLES, ["probelog.arrays"], home, idle_seconds=1)
    assert told(server.fork("rogue", Grant()), "echo", 1) == 1
    server.close()
    assert not (tmp_path / "sprung").exists()

"""Processes that lose their rights, crash and hang, and a server that survives them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from probelog.errors import ProbeLogError
from probelog.sandbox.fork_server import Child, ForkServer, ProcessLostError, bare_environment, writable_home
from tests.support.processes.processes import eventually

HERE = "tests.support.hub.rogue"
TOKEN = "hf_a-secret-that-nobody-may-see"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[ForkServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("AWS_SECRET_ACCESS_KEY", TOKEN)
        made = ForkServer(f"{HERE}:serve", [HERE], home)
    yield made
    made.close()


@pytest.fixture
def child(server: ForkServer) -> Iterator[Child]:
    made = server.fork()
    yield made
    made.close()


def told(child: Child, command: str, value: object = None, timeout: float = 20) -> object:
    answer, blobs = child.ask(timeout, command=command, **{"with": value})
    assert blobs == [b"beside"]
    return answer["found"]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] == "Z"
    except FileNotFoundError:
        return True


def test_plain_values_and_bytes_go_both_ways(child: Child) -> None:
    assert told(child, "echo", {"a": [1, None, "ü"]}) == {"a": [1, None, "ü"]}


def test_neither_token_nor_credentials_come_along(child: Child, home: Path) -> None:
    found = told(child, "environment")
    assert isinstance(found, dict)
    assert TOKEN not in str(found)
    assert found["HOME"] == str(writable_home(home))
    assert found["HF_HUB_OFFLINE"] == "1"
    # Neither in what the kernel remembers of the server that it was forked from.
    assert TOKEN not in Path(f"/proc/{child.pid}/environ").read_text()


def test_the_environment_keeps_what_finds_libraries_and_devices(home: Path) -> None:
    given = {
        "PATH": "/bin", "CUDA_HOME": "/cuda", "OMP_NUM_THREADS": "2", "LD_LIBRARY_PATH": "/cuda",
        "HF_TOKEN": "t", "HUGGING_FACE_HUB_TOKEN": "t", "AWS_SESSION_TOKEN": "t", "GITHUB_TOKEN": "t", "MY_PASSWORD": "t",
    }  # fmt: skip
    made = bare_environment(home, given)
    assert "t" not in made.values()
    assert {name: made[name] for name in list(given)[:4]} == {name: given[name] for name in list(given)[:4]}


def test_no_network(child: Child) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert told(child, "connect", port) == "PermissionError"
        assert told(child, "shell connects", port) != 0, "nor what it starts"
        socket.create_connection(("127.0.0.1", port), 5).close()  # here it works


def test_no_files_but_those_it_was_given(child: Child, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "token").write_text(TOKEN)
    assert told(child, "read", str(tmp_path / "token")) == TOKEN
    held = told(child, "files", [["/usr", "/proc/self", str(tmp_path / "absent")], [str(tmp_path / "mine")]])
    if not held:
        pytest.skip("this kernel has no Landlock")
    assert told(child, "read", str(tmp_path / "token")) == "PermissionError"
    assert told(child, "write", str(tmp_path / "token")) == "PermissionError"
    assert told(child, "write", str(tmp_path / "mine/new")) == 1
    assert told(child, "parent's environment", os.getpid()) == "PermissionError"


def test_memory_is_limited(child: Child) -> None:
    assert told(child, "allocate", 200 << 20) == f"{200 << 20} bytes"
    assert told(child, "memory", 100 << 20) is True
    assert told(child, "allocate", 200 << 20) == "MemoryError"
    assert told(child, "allocate", 50 << 20) == f"{50 << 20} bytes"


@pytest.mark.parametrize(
    ("command", "value", "ended_by", "status"),
    [("crash", None, signal.SIGSEGV, -signal.SIGSEGV), ("leave", 3, 0, 3)],
)
def test_a_process_that_ends_says_how(
    server: ForkServer, command: str, value: object, ended_by: int, status: int
) -> None:
    child = server.fork()
    with pytest.raises(ProcessLostError) as lost:
        told(child, command, value)
    assert lost.value.signal == ended_by
    assert child.kill() == status
    assert gone(child.pid)
    with pytest.raises(ProcessLostError):
        told(child, "echo")
    assert told(server.fork(), "echo", 1) == 1, "the server goes on"


def test_a_process_that_hangs_is_ended_with_all_that_it_started(server: ForkServer, home: Path) -> None:
    child = server.fork()
    with pytest.raises(TimeoutError):
        told(child, "start and hang", timeout=1)
    grandchild = int((writable_home(home) / "grandchild").read_text())
    assert eventually(lambda: gone(child.pid) and gone(grandchild))


def test_an_answer_that_is_none(child: Child) -> None:
    with pytest.raises(ValueError):
        told(child, "nonsense")


def test_another_thread_can_end_the_waiting(server: ForkServer) -> None:
    import threading

    child = server.fork()
    threading.Timer(0.3, child.kill).start()
    with pytest.raises(ProcessLostError):
        told(child, "hang", timeout=60)


def test_everything_ends_with_whoever_needed_it(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from probelog.sandbox.fork_server import ForkServer\n"
        f"server = ForkServer('{HERE}:serve', [], Path(sys.argv[1]), idle_seconds=1)\n"
        "made = [server.fork() for _ in range(2)]\n"
        'hung = server.fork(); hung._connection.send_bytes(b\'{"command": "hang"}\'); made.append(hung)\n'
        "print(*(one.pid for one in made), flush=True); time.sleep(600)"
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
    entry = f"{HERE}:serve"
    with ThreadPoolExecutor(3) as pool:
        servers = list(pool.map(lambda _: ForkServer(entry, [], tmp_path, idle_seconds=2), range(3)))
    children = [server.fork() for server in servers]
    parents = {
        Path(f"/proc/{child.pid}/stat").read_text().rsplit(") ", 1)[1].split()[1] for child in children
    }
    assert len(parents) == 1
    servers[0].close()
    assert eventually(lambda: gone(children[0].pid))
    assert told(children[1], "echo", 2) == 2, "others go on"
    for server in servers[1:]:
        server.close()


def test_a_server_that_was_killed_is_replaced(tmp_path: Path) -> None:
    server = ForkServer(f"{HERE}:serve", [], tmp_path, idle_seconds=2)
    first = [server.fork(), server.fork()]
    parent = int(Path(f"/proc/{first[0].pid}/stat").read_text().rsplit(") ", 1)[1].split()[1])
    os.kill(parent, signal.SIGKILL)
    assert eventually(lambda: all(gone(child.pid) for child in first)), "its processes end with it"
    with pytest.raises(ProcessLostError) as lost:
        told(first[0], "echo")
    assert lost.value.signal == signal.SIGKILL
    second = server.fork()
    assert told(second, "echo", 3) == 3
    # The new server knows nothing of the old one's processes, whose numbers other programs may have by now.
    assert first[1].kill() == -signal.SIGKILL
    assert told(second, "echo", 4) == 4
    server.close()


def test_a_server_that_cannot_start_says_so(tmp_path: Path) -> None:
    with pytest.raises(ProbeLogError, match="did not start"):
        ForkServer(f"{HERE}:serve", ["no.such.module"], tmp_path)

"""What holds where a device is open, and on platforms that lack a guard."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from probelog.sandbox.fork_server.client import ForkServer, Grant, Role
from probelog.sandbox.fork_server.confinement import Confinement
from probelog.sandbox.process import libraries_of
from tests.support.paths import CHECKOUT

HERE = "tests.support.hub.rogue"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="these guards are Linux's")


def test_no_socket_reaches_anybody_once_a_device_is_set_up(tmp_path: Path) -> None:
    """Drivers may need sockets until then; afterwards neither `connect` nor a datagram of a pair gets out."""
    rights = Confinement(tuple(libraries_of([HERE])), devices=("/dev/zero",))
    server = ForkServer({"device": Role(f"{HERE}:serve", rights)}, [HERE], tmp_path / "home")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "socket"))
        os.chmod(tmp_path / "socket", 0o777)
        receiver.settimeout(0.2)
        child = server.fork("device", Grant())
        for command in ("set up a device", "make a socket", "send a datagram"):
            answer, _ = child.ask(20, most=[10], command=command, **{"with": str(tmp_path / "socket")})
            assert answer["found"] == (True if command == "set up a device" else "PermissionError"), command
        with pytest.raises(TimeoutError):
            receiver.recv(10)
    child.kill()
    server.close()


def test_without_namespaces_too_all_processes_end_with_the_server_that_forked_them(tmp_path: Path) -> None:
    """A change of user takes back what the kernel was asked to do when the server ends: it is asked again."""
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tests.probelog.sandbox.fork_server.test_client import *\n"
        "server = ForkServer(ROLES, [], Path(sys.argv[1]), idle_seconds=1)\n"
        "child = server.fork('rogue', Grant())\n"
        "assert told(child, 'echo', 1) == 1\n"
        "child._channel.send({'command': 'hang', 'number': 2})\n"
        "(pid,) = children_of(server.pid)\n"
        "assert os.readlink(f'/proc/{pid}/ns/pid') == os.readlink('/proc/self/ns/pid')\n"
        "os.kill(server.pid, signal.SIGKILL)\n"
        "assert eventually(lambda: gone(pid)), 'it goes on'\n"
    )
    run = [
        sys.executable,
        "-m",
        "tests.support.processes.refusing",
        "namespaces",
        sys.executable,
        "-c",
        program,
    ]
    done = subprocess.run(
        [*run, str(tmp_path)], capture_output=True, text=True, timeout=120, cwd=CHECKOUT, check=False
    )
    assert done.returncode == 0, done.stderr

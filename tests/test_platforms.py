"""The query client where modules of POSIX are missing, as on Windows: it imports, searches, and says what guards nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from probelog import __version__
from probelog.encoders import process
from tests.compatibility.make import KEPT

# Of the standard library's modules those that Windows does not have, as far as anything here could import them.
_HIDE = """
import sys

HIDDEN = ["fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "syslog", "readline", "curses"]

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in HIDDEN:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Hide())
"""
_SEARCH = """
import probelog.encoders.process as process

process._POSIX = False  # sockets cannot be handed to a process there
process._MAIN = HIDE + process._MAIN
import pickle
import probelog
from PIL import Image

index = probelog.open_index(sys.argv[1])
assert len(index.search("dog", images=Image.new("RGB", (9, 9)), k=2)) == 2
repo = index.models(columns=["repo"], limit=1)["repo"][0].as_py()
assert repo in index and index.show(repo).logits
assert pickle.loads(pickle.dumps(index)).search("dog") == index.search("dog")
index.close()
assert not set(HIDDEN) & set(sys.modules), "somebody put it there"
from probelog.cli import main

sys.argv = ["probelog", "search", "dog", "-k", "1", "--json", "--index", sys.argv[1]]
main()
"""


URI = str(KEPT / __version__ / "store")


def test_the_client_answers_without_posix() -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"HIDE = {_HIDE!r}\n{_HIDE}{_SEARCH}", URI],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"rank": 1' in done.stdout
    assert "nothing bounds the process of the index's encoder" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_limits_a_posix_system_has_no_encoder() -> None:
    """Where they are missing for another reason, nothing is done without them."""
    done = subprocess.run(
        [sys.executable, "-c", f"{_HIDE}\nfrom probelog.encoders.server import main\nmain(['3'])"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "lacks the module resource" in done.stderr


def _start(*arguments: str) -> process._Started:
    return process._start_to_connect([*arguments], {})


def test_only_the_process_itself_can_connect(tmp_path: Path) -> None:
    code = """
import socket, sys
key = sys.stdin.buffer.read(32)
def connect(content):
    channel = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
    channel.sendall(content)
    return channel
rogues = [connect(bytes(32)), connect(key[:-1])]
rogues[1].shutdown(socket.SHUT_WR)
channels = [connect(key) for _ in range(int(sys.argv[3]))]
channels[0].sendall(b"here")
assert rogues[0].recv(1) == b"", "it was closed"
sys.stdin.read()
"""
    with pytest.warns(RuntimeWarning, match="nothing bounds"):
        popen, channels = _start(sys.executable, "-c", code)
    try:
        assert len(channels) == process._CHANNELS
        assert channels[0].recv(4) == b"here"
    finally:
        for channel in channels:
            channel.close()
        popen.wait(30)
    assert popen.returncode == 0


def test_a_process_that_ends_before_it_connects() -> None:
    with (
        pytest.warns(RuntimeWarning, match="nothing bounds"),
        pytest.raises(ConnectionError, match="ended before it connected"),
    ):
        _start(sys.executable, "-c", "import sys; sys.stdin.read()")

"""What is around a process that code of a model has taken over: a worker's token, folder and sockets, other downloads."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from probelog.sandbox.spec import downloads_folder, home_folder
from tests.redteam.payloads import Places
from tests.support.paths import CHECKOUT


@contextlib.contextmanager
def surroundings(root: Path, scratch: Path, name: str) -> Iterator[Places]:
    """The places that an attacker would know or guess, but for those of the server that forks (`server_places`).

    This process has a token in its environment, and its current folder, which holds another, is where it imports from.
    """
    here, victim, downloads = root / "here", root / "victim", downloads_folder(scratch)
    here.mkdir()
    (here / "token").write_text("hf_secret")
    victim.write_text("mine")
    abstract = f"probelog-redteam-{name}-{os.getpid()}"
    with (
        pytest.MonkeyPatch.context() as patch,
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.socket(socket.AF_UNIX) as hidden,
    ):
        patch.setenv("HF_TOKEN", "hf_secret")
        patch.chdir(here)
        patch.syspath_prepend(str(here))
        hidden.bind(f"\0{abstract}")
        hidden.listen()
        yield {
            "abstract": abstract,
            "port": listening.getsockname()[1],
            "worker": os.getpid(),
            "here": str(here),
            "checkout": str(CHECKOUT),
            "downloads": str(downloads),
            "own": str(downloads / "rogue"),
            "other": str(downloads / "gated"),
            "victim": str(victim),
        }


def server_places(scratch: Path) -> Places:
    """Those of the one server that runs below a scratch folder."""
    (address,) = home_folder(scratch).glob("*.sock")
    return {"server": str(address), "key": str(address.with_suffix(".key"))}

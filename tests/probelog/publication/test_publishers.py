"""Publishers and readers as processes, at the same time: readers see whole generations, publishers lose nothing."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import probelog
from probelog.index.pointer import read_pointer
from probelog.publication.lifecycle import roll_back, sweep
from probelog.search import client
from probelog.storage.layout import POINTER
from probelog.storage.store import Store
from tests.support.processes.operator_command import CHECKOUT
from tests.support.processes.publisher import load_encoder, publish, save_encoder
from tests.support.processes.reader import Reader
from tests.support.processes.s3 import s3_server


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "files")


LOCAL_AND_S3 = ["local", "s3"]


@pytest.fixture(params=LOCAL_AND_S3)
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(tmp_path / "store" / "index")
    return Store(f"{request.getfixturevalue('bucket')}/{tmp_path.name}/index")


@contextlib.contextmanager
def started(module: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def generations(index: Store) -> set[str]:
    return {name.split("/")[1] for name in index.names("generations")}


def test_of_two_publishers_one_wins_and_the_other_says_so(index: Store, encoder: Path) -> None:
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                started("tests.support.processes.publisher", index.uri, encoder, number, 1, "--ask")
            )
            for number in range(2)
        ]
        assert [line(process) for process in processes] == ["built", "built"]
        assert len(generations(index)) == 2
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        ended = [process.communicate(timeout=120) for process in processes]
        statuses = [process.returncode for process in processes]
    assert sorted(statuses) == [0, 1]
    won, lost = ended[statuses.index(0)], ended[statuses.index(1)]
    assert "somebody else published or rolled back meanwhile" in lost[1]
    assert "Run again" in lost[1]
    live = read_pointer(index)[0]
    assert live.generation == won[0].strip()
    assert live.previous == []
    assert generations(index) == {live.generation}, "what lost is removed"


@pytest.mark.acceptance
@pytest.mark.parametrize(("index", "publishes"), [("local", 16), ("s3", 12)], indirect=["index"])
def test_readers_through_many_publishes_and_rollbacks(
    index: Store, encoder: Path, publishes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = load_encoder(encoder)
    monkeypatch.setattr(client, "POLL_SECONDS", 0.02)
    publish(index, files, "g0")
    gone: set[str] = set()
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(started("tests.support.processes.reader", index.uri)) for _ in range(2)
        ]
        assert [line(process) for process in processes] == ["open", "open"]
        own = Reader(index.uri)
        for number in range(1, publishes + 1):
            publish(index, files, f"g{number}")
            if number % 7 == 0:
                roll_back(index)
                own.ask()
            if number % 14 == 0:
                roll_back(index, read_pointer(index)[0].withdrawn[0]["generation"])
            own.ask()
            # Some fifty times what these readers take to look again.
            gone |= set(sweep(index, dt.timedelta(seconds=1)))
        told = [json.loads(process.communicate("", timeout=120)[0]) for process in processes]
    assert [found["problems"] for found in [*told, own.told()]] == [[], [], []]
    assert all(found["asked"] > 20 for found in told)
    assert all(len(found["seen"]) > 3 for found in told)
    assert len(gone) > publishes // 3
    assert len(generations(index)) < 3 + 3 + publishes // 2


def at_step(index: Store, name: str) -> Callable[[], bool]:
    """Whether something of this name is there that was not before."""
    before = dict.fromkeys(index.names("generations")), index.read_or_none(POINTER)

    def happened() -> bool:
        if name == POINTER:
            return index.read_or_none(POINTER) != before[1]
        return any(name in found and found not in before[0] for found in index.names("generations"))

    return happened


STEPS = ("hold.json", "logits.lance", "models.lance", "meta.lance", "files.json", POINTER)


@pytest.mark.acceptance
@pytest.mark.parametrize("index", ["local", "s3"], indirect=True)
def test_a_publisher_is_killed_at_every_step(index: Store, encoder: Path) -> None:
    """SIGKILL when a file appears. The old generation answers on, and the next publisher is not in its way."""
    publish(index, load_encoder(encoder), "g0")
    number = 1
    for step in STEPS:
        with started("tests.support.processes.publisher", index.uri, encoder, number, 1000) as process:
            # A rerun publishes; then it is killed at the next step of the one after.
            assert line(process).startswith(f"g{number}-"), process.stderr and process.stderr.read()
            happened = at_step(index, step)
            deadline = time.monotonic() + 60
            while not happened():
                assert time.monotonic() < deadline
                time.sleep(0.005)  # which leaves the processors to the publisher and the server
            process.send_signal(signal.SIGKILL)
            process.wait()
        number += 1000
        live = read_pointer(index)[0]
        reader = Reader(index.uri)
        reader.ask()
        assert reader.told() | {"asked": 1} == {
            "asked": 1, "seen": [live.generation.split("-")[0]], "problems": [],
        }  # fmt: skip


@pytest.mark.parametrize("index", ["local"], indirect=True)
def test_nothing_of_killed_publishers_stays(
    index: Store, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from probelog.publication import lifecycle

    files = load_encoder(encoder)
    publish(index, files, "g0")
    with started("tests.support.processes.publisher", index.uri, encoder, 1, 1, "--ask") as process:
        assert line(process) == "built"
    assert len(generations(index)) == 2
    monkeypatch.setattr(lifecycle, "BUILDING", dt.timedelta(0))
    publish(index, files, "g2")
    assert len(sweep(index, dt.timedelta(0))) == 1
    assert generations(index) == set(read_pointer(index)[0].referenced)


@pytest.mark.acceptance
def test_publishers_are_killed_at_random(index: Store, encoder: Path) -> None:
    generator = random.Random(0)
    publish(index, load_encoder(encoder), "g0")
    for number in range(1, 8_001, 1000):
        with started("tests.support.processes.publisher", index.uri, encoder, number, 1000) as process:
            assert line(process).startswith(f"g{number}-")
            time.sleep(generator.uniform(0.0, 0.3))
            os.kill(process.pid, signal.SIGKILL)
        found = probelog.open_index(index.uri).search("dog", k=100)
        assert {hit.licence for hit in found} == {read_pointer(index)[0].generation.split("-")[0]}

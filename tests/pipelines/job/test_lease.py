"""The lease on a directory, and where its clock and its swap matter on a real S3 server: one at a time, and a dead or halted holder blocks nobody."""

from __future__ import annotations

import datetime as dt
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipelines.job.lease import Lease, LeaseHeldError, LeaseLostError, hold_lease
from probelog.errors import ConflictError, StoreError, UsageError
from probelog.storage.store import Store
from tests.support.processes.s3 import s3_server

NAME = "nightly/lease.json"
# Shorter ones could run out while this shared machine looks away; an object store's clock ticks in seconds.
SECONDS = 2.0
HOLDER = f"""
import sys
from pipelines.job.lease import LeaseLostError, hold_lease
from probelog.storage.store import Store

with hold_lease(Store(sys.argv[1]), "{NAME}", seconds=float(sys.argv[3]), holder=sys.argv[2]) as lease:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            lease.check()
            print("still held", flush=True)
        except LeaseLostError as error:
            print("lost:", error, flush=True)
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server("leases") as address:
        yield address


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if getattr(request, "param", "directory") == "s3":
        return Store(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")
    return Store(tmp_path / "store")


on_both_stores = pytest.mark.parametrize("store", ["directory", "s3"], indirect=True)


class Holder:
    """A process that holds the lease until its input ends."""

    def __init__(self, store: Store, name: str, seconds: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, store.uri, name, str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.heard() == "held"

    def heard(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def check(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("check\n")
        self.process.stdin.flush()
        return self.heard()


@contextmanager
def holding(store: Store, name: str, seconds: float = SECONDS) -> Iterator[Holder]:
    holder = Holder(store, name, seconds)
    try:
        yield holder
    finally:
        holder.process.kill()
        holder.process.communicate()


def test_of_two_processes_the_second_leaves_and_says_what_to_do(store: Store) -> None:
    with holding(store, "night A on host-1", 3.0) as first:
        time.sleep(4.5)  # renewed meanwhile
        with (
            pytest.raises(
                LeaseHeldError, match=r"night A on host-1, since 20.* runs out at 20.* UTC"
            ) as caught,
            hold_lease(store, NAME, seconds=SECONDS),
        ):
            pass
        assert caught.value.exit_status == 1
        assert caught.value.holder == pickle.loads(pickle.dumps(caught.value)).holder == "night A on host-1"
        assert first.check() == "still held"
        assert first.process.communicate()[0] == "done\n"
    # Given up: nobody waits for it to run out.
    with hold_lease(store, NAME, seconds=SECONDS) as lease:
        lease.check()


def test_the_second_run_waits_for_lease_wait_seconds(store: Store) -> None:
    entered, refused = threading.Event(), threading.Event()

    def first() -> None:
        with hold_lease(store, NAME, seconds=SECONDS):
            entered.set()
            refused.wait(60)
            time.sleep(0.5)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait()
    with pytest.raises(LeaseHeldError), hold_lease(store, NAME, seconds=SECONDS, wait=0.2):
        pass
    refused.set()
    with hold_lease(store, NAME, seconds=SECONDS, wait=20) as lease:
        assert not thread.join(5)
        lease.check()


@on_both_stores
def test_a_killed_holders_lease_is_taken_over_by_one_of_those_that_wait(store: Store) -> None:
    seconds = 2 * SECONDS  # it must not run out before somebody is refused
    with holding(store, "killed", seconds) as dead:
        dead.process.send_signal(signal.SIGKILL)
        dead.process.wait()
        killed = time.monotonic()
        with pytest.raises(LeaseHeldError, match="killed"), hold_lease(store, NAME, seconds=SECONDS):
            pass
        at_work, most, turns = 0, 0, []
        turn = threading.Lock()
        barrier = threading.Barrier(4)

        def night(number: int) -> None:
            nonlocal at_work, most
            barrier.wait()
            with hold_lease(store, NAME, seconds=3 * SECONDS, wait=30, holder=f"night {number}") as lease:
                with turn:
                    at_work += 1
                    most = max(most, at_work)
                    turns.append(time.monotonic())
                time.sleep(0.1)
                lease.check()
                with turn:
                    at_work -= 1

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(night, range(4)))
    assert len(turns) == 4
    assert most == 1
    # Its last renewal may be as old as the pause between two, and the object store's clock is coarse.
    assert turns[0] - killed > seconds * 2 / 3 - 1


def test_a_halted_holder_learns_that_it_may_not_publish(store: Store) -> None:
    with holding(store, "halted") as halted:
        assert halted.check() == "still held"
        halted.process.send_signal(signal.SIGSTOP)
        try:
            with hold_lease(store, NAME, seconds=5 * SECONDS, wait=20, holder="second") as second:
                halted.process.send_signal(signal.SIGCONT)
                assert halted.check().startswith("lost:")
                assert halted.process.communicate()[0] == "done\n"
                second.check()  # the first did not give up what was no longer its own
        finally:
            halted.process.send_signal(signal.SIGCONT)


def test_a_holder_that_was_halted_too_long_has_lost_its_lease_even_if_it_is_free(tmp_path: Path) -> None:
    with holding(Store(tmp_path), "halted") as halted:
        halted.process.send_signal(signal.SIGSTOP)
        time.sleep(SECONDS + 0.5)
        halted.process.send_signal(signal.SIGCONT)
        assert "must not publish" in halted.check()


@on_both_stores
def test_a_lease_that_somebody_else_took_is_lost(store: Store) -> None:
    with hold_lease(store, NAME, seconds=60) as lease:
        store.delete(NAME)
        with hold_lease(store, NAME, seconds=60, holder="intruder"):
            with pytest.raises(LeaseLostError, match="another run has taken it"):
                lease.check()
            with pytest.raises(LeaseLostError):
                lease.check()
    # Neither the loser's end nor the intruder's stands in the way of the next.
    with hold_lease(store, NAME, seconds=60):
        pass


def test_a_store_that_stops_answering_ends_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    real, broken = Store.swap, threading.Event()

    def swap(self: Store, name: str, data: bytes, expected: bytes | None) -> None:
        if broken.is_set():
            raise StoreError("the object store refused")
        real(self, name, data, expected)

    monkeypatch.setattr(Store, "swap", swap)
    with hold_lease(store, NAME, seconds=SECONDS) as lease:
        broken.set()
        threading.Timer(0.4, broken.clear).start()
        lease.check()  # a refusal that passes does no harm
        broken.set()
        with pytest.raises(LeaseLostError, match="not renewed for 2 seconds"):
            lease.check()
        broken.clear()
        with pytest.raises(LeaseLostError):
            lease.check()


def test_a_renewal_that_hangs_does_not_hang_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    real, hung, go_on = Store.swap, threading.Event(), threading.Event()

    def swap(self: Store, name: str, data: bytes, expected: bytes | None) -> None:
        if threading.current_thread().name == "lease":
            hung.set()
            go_on.wait()
        real(self, name, data, expected)

    monkeypatch.setattr(Store, "swap", swap)
    with hold_lease(store, NAME, seconds=SECONDS) as lease:
        assert hung.wait(20)
        with pytest.raises(LeaseLostError, match="did not answer"):
            lease.check()
        go_on.set()


@pytest.mark.parametrize(
    ("answered_after", "later", "lost"), [(40, 59, False), (40, 61, True), (70, 70, True)]
)
def test_a_lease_counts_from_when_its_renewal_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered_after: int, later: int, lost: bool
) -> None:
    """The store may have written it at once and answered late: somebody else counts from then on."""
    now, real = [1000.0], Store.swap

    def slow(self: Store, *given: Any) -> None:
        real(self, *given)
        now[0] = max(now[0], 1000.0 + answered_after)

    monkeypatch.setattr("pipelines.job.lease._now", lambda: now[0])
    with hold_lease(Store(tmp_path), NAME, seconds=60) as held:
        monkeypatch.setattr(Store, "swap", slow)
        if answered_after > 60:
            with pytest.raises(LeaseLostError, match="it was not renewed for 60 seconds"):
                held.check()
            return
        held.check()
        now[0] = 1000.0 + later
        if lost:
            with pytest.raises(LeaseLostError, match="it was not renewed for 60 seconds"):
                held.check()
        else:
            held.check()


@pytest.mark.parametrize("content", [b"", b"no JSON", b"[]", b'{"seconds": "x", "since": 3, "number": null}'])
def test_a_damaged_lease_is_one_until_it_ran_out(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    store.write(NAME, content)
    with pytest.raises(LeaseHeldError, match="unknown"), hold_lease(store, NAME, seconds=SECONDS):
        pass
    old = time.time() - SECONDS - 2
    os.utime(tmp_path / NAME, (old, old))
    with hold_lease(store, NAME, seconds=SECONDS) as lease:
        lease.check()


def test_its_age_is_that_of_the_store_and_its_life_that_of_its_holder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with holding(store, "long") as holder:
        holder.process.send_signal(signal.SIGKILL)
        holder.process.wait()
    # What a holder's clock wrote does not count.
    state = store.read_json(NAME)
    store.write_json(NAME, {**state, "since": "1999-01-01T00:00:00+00:00", "seconds": 600})
    with pytest.raises(LeaseHeldError, match="since 1999"), hold_lease(store, NAME, seconds=SECONDS):
        pass


@pytest.mark.parametrize(("age", "held"), [(30, True), (601.0, True), (601.5, False)])
def test_a_lease_runs_out_a_second_after_the_life_that_its_holder_gave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, held: bool
) -> None:
    store = Store(tmp_path)
    store.write_json(
        NAME, {"holder": "dead", "since": "2026-01-01T00:00:00+00:00", "seconds": 600, "number": 3}
    )
    written = store.modified(NAME)
    assert written is not None
    monkeypatch.setattr(Store, "time", lambda _: written + dt.timedelta(seconds=age))
    if held:
        with pytest.raises(LeaseHeldError, match="dead"), hold_lease(store, NAME, seconds=SECONDS):
            pass
        return
    with hold_lease(store, NAME, seconds=60) as lease:
        assert store.read_json(NAME)["number"] == 4, "numbers go on"
    lease._thread.join(10)
    assert not lease._thread.is_alive(), "nobody renews what was given up"


def test_what_the_block_raises_passes_and_the_lease_ends(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ZeroDivisionError), hold_lease(store, NAME, seconds=60):
        raise ZeroDivisionError
    with hold_lease(store, NAME, seconds=60) as lease:
        assert isinstance(lease, Lease)
    with pytest.raises(LeaseLostError, match="given up"):
        lease.check()
    with pytest.raises(UsageError), hold_lease(store, NAME, seconds=1):
        pass
    with pytest.raises(ConflictError):
        store.swap(NAME, b"x", None)

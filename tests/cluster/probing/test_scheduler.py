"""The scheduler on a real Ray, with items that crash, hang and fail."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster.probing.results import Requeued
from cluster.probing.scheduler import ItemOutcome, Policy, Scheduler
from probelog.errors import FailureReason, ProbeLogError

pytestmark = pytest.mark.usefixtures("local_ray")


@ray.remote(num_cpus=0, max_concurrency=2)
class Stub:
    """Does what the item's name says."""

    def __init__(self, log: str) -> None:
        self._log = log

    def ready(self) -> None:
        pass

    def run(self, item: str) -> str | Requeued:
        with open(self._log, "a") as stream:
            stream.write(item + "\n")
        if item.startswith("crash"):
            time.sleep(0.2)
            os._exit(1)
        if item.startswith("hang"):
            time.sleep(3600)
        if item.startswith("slow"):
            time.sleep(1)
        if item.startswith("brief"):
            time.sleep(0.05)
        if item.startswith("back") and Path(self._log).read_text().split().count(item) == 1:
            return Requeued()
        return item.upper()


@ray.remote(num_cpus=0)
class NeverStarts:
    def __init__(self) -> None:
        raise OSError("no such store")

    def ready(self) -> None:
        pass


def outcomes(items: list[str], tmp_path, workers: int = 2, **policy):
    log = tmp_path / "log"
    scheduler: Scheduler[str] = Scheduler(lambda: Stub.remote(str(log)), workers, Policy(**policy))
    found = list(scheduler.run(iter(items)))
    return {outcome.item: outcome for outcome in found}, Counter(log.read_text().split()), found


def test_every_item_comes_back_once(tmp_path) -> None:
    items = [f"item-{i}" for i in range(40)]
    by_item, runs, found = outcomes(items, tmp_path)
    assert len(found) == len(items)
    assert {outcome.result for outcome in found} == {item.upper() for item in items}
    assert set(runs.values()) == {1}
    assert set(by_item) == set(items)


def test_no_items_is_no_work(tmp_path) -> None:
    scheduler: Scheduler[str] = Scheduler(lambda: Stub.remote(str(tmp_path / "log")), 2)
    assert list(scheduler.run([])) == []


def test_a_killer_is_blamed_and_its_neighbours_are_not(tmp_path) -> None:
    items = [f"item-{i}" for i in range(6)] + ["crash-a"] + [f"slow-{i}" for i in range(6)]
    by_item, runs, found = outcomes(items, tmp_path)
    assert len(found) == len(items)
    assert by_item["crash-a"].reason is FailureReason.CRASHED_WORKER
    assert runs["crash-a"] <= 3
    assert all(outcome.reason is None for item, outcome in by_item.items() if item != "crash-a")


def test_a_hung_item_is_killed(tmp_path) -> None:
    by_item, _, found = outcomes(["hang-a", "item-1", "item-2"], tmp_path, silence_seconds=3.0)
    assert len(found) == 3
    assert by_item["hang-a"].reason is FailureReason.TIMEOUT
    assert by_item["item-1"].result == "ITEM-1"


def test_workers_are_recycled(tmp_path) -> None:
    _, runs, found = outcomes([f"item-{i}" for i in range(12)], tmp_path, workers=1, recycle_after=4)
    assert len(found) == 12
    assert set(runs.values()) == {1}


def test_workers_that_cannot_start_end_the_job() -> None:
    scheduler: Scheduler[str] = Scheduler(NeverStarts.remote, 1, Policy(start_attempts=2))
    with pytest.raises(ProbeLogError, match="no such store"):
        list(scheduler.run(["item"]))


def test_what_is_handed_back_costs_nothing(tmp_path) -> None:
    items = ["item-1", "back-1", "item-2", "back-2", *(f"item-{i}" for i in range(3, 12))]
    by_item, runs, found = outcomes(items, tmp_path, losses=1, blames=1)
    assert len(found) == len(items)
    assert all(outcome.reason is None and outcome.attempts == 1 for outcome in found)
    assert {item: count for item, count in runs.items() if count > 1} == {"back-1": 2, "back-2": 2}
    assert by_item["back-1"].result == "BACK-1"


def test_workers_that_cannot_be_placed_are_not_waited_for(tmp_path) -> None:
    """As after the loss of a node: its workers' successors find no room, and are no failed starts either."""
    made = 0

    def make():
        nonlocal made
        made += 1
        here = Stub if made % 2 else Stub.options(resources={"elsewhere": 1})
        return here.remote(str(tmp_path / "log"))

    scheduler: Scheduler[str] = Scheduler(make, 4, Policy(start_attempts=1))
    found = list(scheduler.run(f"item-{i}" for i in range(30)))
    assert {outcome.result for outcome in found} == {f"ITEM-{i}" for i in range(30)}


def test_the_number_of_workers_follows_the_cluster(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.probing.scheduler._LOOK_SECONDS", 0.2)
    wanted = 1
    scheduler: Scheduler[str] = Scheduler(lambda: Stub.remote(str(tmp_path / "log")), lambda: wanted)
    most = 0

    def slowly() -> Iterator[str]:
        i = 0
        while most < 3 or scheduler.workers > 1:
            i += 1
            yield f"slow-{i}"

    running = scheduler.run(slowly())
    found: list[ItemOutcome[str]] = []
    for outcome in running:
        found.append(outcome)
        most = max(most, scheduler.workers)
        wanted = 3 if most < 3 else 1
    assert most == 3
    assert all(outcome.reason is None and outcome.attempts == 1 for outcome in found)


def test_suspects_get_their_turn_while_there_is_other_work(tmp_path) -> None:
    """The killer is through long before the items are."""
    # Ten seconds of other work for each of two workers, which a replacement's start does not outlast.
    items = ["crash-a", *(f"brief-{i}" for i in range(400))]
    _, _, found = outcomes(items, tmp_path)
    place = next(number for number, outcome in enumerate(found) if outcome.reason is not None)
    assert found[place].item == "crash-a"
    assert place < 390


def test_items_are_read_as_they_are_needed(tmp_path) -> None:
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield f"item-{read}"

    scheduler: Scheduler[str] = Scheduler(lambda: Stub.remote(str(tmp_path / "log")), 2)
    running = scheduler.run(endless())
    for _ in range(5):
        next(running)
    running.close()
    assert read < 30

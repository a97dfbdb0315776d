"""The scheduler's decisions, without Ray: workers that the test answers for, in the order that it chooses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayActorError

from cluster.probing.results import Requeued
from cluster.probing.scheduler import ItemOutcome, Policy, Scheduler
from probelog.errors import FailureReason, ProbeLogError

Answering = Callable[[str, "Worker"], Any]


class Reference:
    """What a call gives at once: its answer comes later."""

    def __init__(self) -> None:
        self.answer: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.answer


class Method:
    def __init__(self, call: Callable[..., Reference]) -> None:
        self.remote = call


class Worker:
    """Answers as the test says; what it answers to is kept."""

    def __init__(self, farm: Farm) -> None:
        self.farm = farm
        self.given: list[str] = []
        self.held: dict[str, Reference] = {}
        self.alive = True
        self.ready = Method(self._ready)
        self.run = Method(self._run)

    def _ready(self) -> Reference:
        reference = Reference()
        self.farm.starts.append(reference)
        error = self.farm.start_errors.pop(0) if self.farm.start_errors else None
        if error is not None:
            reference.answer.set_exception(error)
        elif not self.farm.hold_starts:
            reference.answer.set_result(None)
        return reference

    def _run(self, item: str) -> Reference:
        reference = Reference()
        if not self.alive:  # the scheduler has not heard of it yet
            reference.answer.set_exception(RayActorError())
            return reference
        self.given.append(item)
        self.held[item] = reference
        self.farm.most_held = max(self.farm.most_held, len(self.held))
        self.farm.order.append(item)
        self.farm.answering(item, self)
        return reference

    def say(self, item: str, result: Any = None) -> None:
        self.held.pop(item).answer.set_result(result if result is not None else item.upper())

    def die(self, error: Exception | None = None) -> None:
        self.alive = False
        for item in list(self.held):
            self.held.pop(item).answer.set_exception(error or RayActorError())


class Farm:
    """Makes workers, and sees them end."""

    def __init__(self, answering: Answering | None = None, hold_starts: bool = False) -> None:
        self.answering = answering or (lambda item, worker: worker.say(item))
        self.hold_starts = hold_starts
        self.made: list[Worker] = []
        self.ended: list[Worker] = []
        self.starts: list[Reference] = []
        self.start_errors: list[Exception | None] = []
        self.order: list[str] = []
        self.most_held = 0

    def make(self) -> Worker:
        self.made.append(Worker(self))
        return self.made[-1]

    def scheduler(self, workers: int | Callable[[], int] = 1, **policy: Any) -> Scheduler[str]:
        return Scheduler(self.make, workers, Policy(**policy), end_worker=self.ended.append)


def items(count: int) -> list[str]:
    return [f"item-{number}" for number in range(count)]


def crashing(*killers: str, error: Exception | None = None) -> Answering:
    """A worker dies of some items as soon as it has all it may have; others are answered when it has."""

    def answer(item: str, worker: Worker) -> None:
        if item in killers:
            worker.die(error)
        else:
            worker.say(item)

    return answer


def test_what_a_policy_is_by_default() -> None:
    policy = Policy()
    assert (policy.in_flight, policy.blames, policy.losses) == (2, 2, 6)
    assert (policy.recycle_after, policy.start_attempts) == (5000, 5)
    assert policy.silence == 2 * 1800 + 300
    assert Policy(in_flight=3, item_seconds=10).silence == 330
    assert Policy(silence_seconds=7).silence == 7


def test_every_item_comes_back_once_and_workers_end() -> None:
    farm = Farm()
    scheduler = farm.scheduler(3)
    found = list(scheduler.run(items(40)))
    assert sorted(outcome.item for outcome in found) == sorted(items(40))
    assert all(outcome == ItemOutcome(outcome.item, outcome.item.upper()) for outcome in found)
    assert sorted(farm.order) == sorted(items(40))
    assert {*farm.ended} == {*farm.made}
    assert len(farm.ended) == len(farm.made) <= 3
    assert (scheduler.in_flight, scheduler.workers) == (0, 0)


def test_without_items_no_worker_is_made() -> None:
    farm = Farm()
    assert list(farm.scheduler(3).run([])) == []
    assert farm.made == []


def test_no_more_workers_than_items() -> None:
    farm = Farm(hold_starts=True, answering=lambda item, worker: None)
    scheduler = farm.scheduler(10, in_flight=2)
    running = scheduler.run(items(3))
    thread = threading.Timer(0.05, lambda: farm.starts[0].answer.set_result(None))
    thread.start()
    threading.Timer(0.1, lambda: [farm.made[0].say(item) for item in [*farm.made[0].held]]).start()
    next(running)
    assert len(farm.made) == 3
    running.close()


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_a_worker_has_as_many_items_as_it_may_and_no_more(in_flight: int) -> None:
    def answer(item: str, worker: Worker) -> None:
        if len(worker.held) == in_flight or item == "item-11":
            for held in [*worker.held]:
                worker.say(held)

    farm = Farm(answer)
    scheduler = farm.scheduler(1, in_flight=in_flight)
    assert len(list(scheduler.run(items(12)))) == 12
    assert farm.most_held == in_flight
    assert farm.order == items(12)


def test_items_are_read_as_they_are_needed() -> None:
    read: list[str] = []

    def source() -> Iterator[str]:
        for item in items(1000):
            read.append(item)
            yield item

    farm = Farm()
    running = farm.scheduler(2, in_flight=2).run(source())
    next(running)
    assert 2 <= len(read) <= 8
    running.close()
    assert {*farm.ended} == {*farm.made}


def test_an_item_that_kills_alone_is_blamed_and_given_up_at_the_second_time() -> None:
    farm = Farm(crashing("item-2", error=RayActorError()))
    found = {outcome.item: outcome for outcome in farm.scheduler(1, in_flight=1).run(items(6))}
    assert len(found) == 6
    assert farm.order.count("item-2") == 2
    assert found["item-2"].reason is FailureReason.CRASHED_WORKER
    assert found["item-2"].attempts == 2
    assert found["item-2"].result is None
    assert all(outcome.reason is None for item, outcome in found.items() if item != "item-2")
    # A worker for each death, and the one that went on.
    assert len(farm.made) == 3


@pytest.mark.parametrize("blames", [1, 3])
def test_the_number_of_blames_is_the_policys(blames: int) -> None:
    farm = Farm(crashing("item-0"))
    (outcome,) = farm.scheduler(1, in_flight=1, blames=blames).run(["item-0"])
    assert (outcome.attempts, farm.order.count("item-0")) == (blames, blames)


def test_two_that_shared_a_worker_are_suspects_and_run_alone() -> None:
    alone: list[int] = []

    def answer(item: str, worker: Worker) -> None:
        if item == "killer":
            alone.append(len(worker.held))
            if len(alone) > 1 or len(worker.held) == 2:
                worker.die()
        elif len(alone) > 0:
            alone.append(-len(worker.held))
            worker.say(item)
        elif len(worker.held) == 2:
            for held in [*worker.held]:
                worker.say(held)

    farm = Farm(answer)
    found = {outcome.item: outcome for outcome in farm.scheduler(1).run(["neighbour", "killer"])}
    assert found["neighbour"].reason is None
    assert found["neighbour"].attempts == 2
    assert found["killer"].reason is FailureReason.CRASHED_WORKER
    assert found["killer"].attempts == 3  # nobody knew at first
    assert alone[0] == 2
    assert {abs(count) for count in alone[1:]} == {1}


def test_losses_are_counted_beside_blames() -> None:
    farm = Farm(crashing("item-0", error=ActorUnavailableError("gone", b"\0" * 16)))
    (outcome,) = farm.scheduler(1, in_flight=1, losses=4, blames=1).run(["item-0"])
    assert (outcome.attempts, farm.order.count("item-0")) == (4, 4)
    assert outcome.reason is FailureReason.CRASHED_WORKER


def test_a_machine_that_goes_away_makes_no_suspects() -> None:
    deaths = [0]

    def answer(item: str, worker: Worker) -> None:
        if not deaths[0] and len(worker.held) == 2:
            deaths[0] = 1
            worker.die(RayActorError(error_msg="The actor died because its node has died."))
        elif deaths[0] and len(worker.held) == 2:
            for held in [*worker.held]:
                worker.say(held)

    farm = Farm(answer)
    found = list(farm.scheduler(1, blames=1, losses=9).run(items(4)))
    assert all(outcome.reason is None for outcome in found)
    assert sorted(outcome.attempts for outcome in found) == [1, 1, 2, 2]
    # They go first, in their order, and two at a time as before.
    assert farm.order[2:4] == ["item-0", "item-1"]
    assert farm.most_held == 2


def test_the_detail_is_the_first_line_of_what_was_said() -> None:
    farm = Farm(crashing("item-0", error=RuntimeError("it broke\nin many lines")))
    (outcome,) = farm.scheduler(1, in_flight=1).run(["item-0"])
    assert outcome.detail == "it broke"
    farm = Farm(crashing("item-0", error=RuntimeError()))
    (outcome,) = farm.scheduler(1, in_flight=1).run(["item-0"])
    assert outcome.detail == "RuntimeError"
    farm = Farm(crashing("item-0", error=RuntimeError("x" * 999)))
    (outcome,) = farm.scheduler(1, in_flight=1).run(["item-0"])
    assert outcome.detail == "x" * 300


def test_suspects_get_their_turn_while_there_is_other_work() -> None:
    first = [True]

    def answer(item: str, worker: Worker) -> None:
        if item == "killer":
            worker.die()
        elif len(worker.held) == 2 and first[0]:
            first[0] = False
            for held in [*worker.held]:
                worker.say(held)
        elif not first[0]:
            worker.say(item)

    farm = Farm(answer)
    source = ["item-a", "item-b", "killer", *items(200)]
    found = list(farm.scheduler(2).run(source))
    place = [outcome.item for outcome in found].index("killer")
    assert found[place].reason is FailureReason.CRASHED_WORKER
    assert place < 100
    assert len(found) == len(source)


def until(true: Callable[[], bool]) -> None:
    """Wait for something that the scheduler does in its thread."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


@pytest.mark.parametrize(("workers", "dry"), [(9, 2), (4, 1), (3, 1)])
def test_a_quarter_of_the_workers_run_dry_for_suspects_and_one_at_least(workers: int, dry: int) -> None:
    farm = Farm(answering=lambda item, worker: None)
    found: list[ItemOutcome[str]] = []
    running = farm.scheduler(workers).run(items(60))
    thread = threading.Thread(target=lambda: found.extend(running))
    thread.start()
    until(lambda: len(farm.order) == 2 * workers)
    first, second, *others = [*farm.made]
    farm.hold_starts = True  # those that take the places of the dead do not come yet
    suspects = {*first.held, *second.held} if workers > 3 else {*first.held}
    first.die()
    if workers > 3:
        second.die()
    else:
        others.append(second)
    until(lambda: len(farm.made) == workers + (2 if workers > 3 else 1))
    # Those that ran dry come before the first that gets something new.
    for worker in others[: dry + 1]:
        worker.say(next(iter(worker.held)))
    until(lambda: len(others[dry].given) == 3)
    assert [len(worker.given) for worker in others[:dry]] == [2] * dry
    assert others[dry].given[2] not in suspects
    others[0].say(next(iter(others[0].held)))
    until(lambda: len(others[0].given) == 3)
    assert others[0].given[2] in suspects
    together = 0
    while thread.is_alive():
        for start in [*farm.starts]:
            if not start.answer.done():
                start.answer.set_result(None)
        for worker in [*farm.made]:
            held = [*worker.held]
            together = max(together, len(held) if suspects & {*held} else 0)
            for item in held:
                worker.say(item)
        thread.join(0.001)
    assert together <= 1, "a suspect has a worker for itself"
    assert sorted(outcome.item for outcome in found) == sorted(items(60))
    assert {outcome.attempts for outcome in found if outcome.item in suspects} == {2}


def test_a_worker_is_replaced_after_so_many_items() -> None:
    farm = Farm()
    assert len(list(farm.scheduler(1, recycle_after=4, in_flight=1).run(items(12)))) == 12
    assert [len(worker.given) for worker in farm.made] == [4, 4, 4]
    assert len(farm.ended) == 3


def test_what_is_handed_back_is_done_by_another_and_costs_nothing() -> None:
    def answer(item: str, worker: Worker) -> None:
        if item == "item-1" and len(farm.made) == 1:
            worker.say(item, Requeued())
        else:
            worker.say(item)

    farm = Farm(answer)
    found = list(farm.scheduler(1, in_flight=1, losses=1, blames=1).run(items(4)))
    assert all(outcome.reason is None and outcome.attempts == 1 for outcome in found)
    assert farm.made[0].given == ["item-0", "item-1"]
    assert farm.made[1].given == ["item-1", "item-2", "item-3"]


def test_a_worker_that_leaves_finishes_what_it_has() -> None:
    def answer(item: str, worker: Worker) -> None:
        if worker is farm.made[0]:
            if len(worker.held) == 2:
                worker.say("item-0", Requeued())
                worker.say("item-1")
        else:
            worker.say(item)

    farm = Farm(answer)
    found = list(farm.scheduler(1).run(items(4)))
    assert sorted(outcome.item for outcome in found) == items(4)
    assert farm.made[0].given == ["item-0", "item-1"]
    assert farm.order.count("item-1") == 1


def test_workers_that_cannot_start_end_the_job_with_the_last_ones_words() -> None:
    farm = Farm()
    farm.start_errors = [RuntimeError("Traceback\n\nOSError: no such store\n\n") for _ in range(3)]
    with pytest.raises(ProbeLogError, match=r"3 workers in a row failed.*OSError: no such store$"):
        list(farm.scheduler(1, start_attempts=3).run(["item"]))
    assert len(farm.made) == 3
    assert {*farm.ended} == {*farm.made}


def test_a_start_between_failures_forgets_them() -> None:
    farm = Farm(crashing("killer"))
    broken = RuntimeError("broken")
    farm.start_errors = [broken, broken, None, broken, broken]
    found = list(farm.scheduler(1, start_attempts=3, in_flight=1).run(["killer", "item-0"]))
    assert [outcome.item for outcome in found if outcome.reason is None] == ["item-0"]


def test_a_start_that_the_machine_prevented_does_not_count() -> None:
    farm = Farm()
    farm.start_errors = [ActorUnavailableError("gone", b"\0" * 16)] * 7
    assert len(list(farm.scheduler(1, start_attempts=2).run(["item"]))) == 1
    assert len(farm.made) == 8


def test_a_silent_worker_is_taken_for_hung() -> None:
    def answer(item: str, worker: Worker) -> None:
        if item != "silent":
            worker.say(item)

    farm = Farm(answer)
    policy = {"silence_seconds": 0.05, "in_flight": 1}
    found = {outcome.item: outcome for outcome in farm.scheduler(1, **policy).run(["silent", "item-0"])}
    assert found["silent"].reason is FailureReason.TIMEOUT
    assert found["silent"].detail == "no answer within 0.05 seconds"
    assert found["silent"].attempts == 2
    assert found["item-0"].result == "ITEM-0"
    assert farm.made[0] in farm.ended


def test_the_oldest_item_of_a_worker_says_how_long_it_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that answers to everything else is hung all the same."""
    now = [0.0]

    def clock() -> float:
        now[0] += 0.01
        return now[0]

    def answer(item: str, worker: Worker) -> None:
        if item != "silent":
            now[0] += 0.02
            worker.say(item)

    monkeypatch.setattr("cluster.probing.scheduler.time.monotonic", clock)
    farm = Farm(answer)
    scheduler = farm.scheduler(1, silence_seconds=0.2, in_flight=2)
    found = {outcome.item: outcome for outcome in scheduler.run(["silent", *items(50)])}
    assert len(found) == 51
    assert found["silent"].reason is FailureReason.TIMEOUT
    assert farm.order.index("silent", 1) < 25, (
        "it was given to another worker long before the others were done"
    )


def test_an_answer_of_a_worker_that_was_given_up_is_not_heard() -> None:
    def answer(item: str, worker: Worker) -> None:
        if worker is not farm.made[0]:
            farm.made[0].held.clear()
            worker.say(item)

    farm = Farm(answer)
    late = farm.scheduler(1, silence_seconds=0.05, in_flight=1)
    running = late.run(["item-0", "item-1"])
    first = next(running)
    assert first.item == "item-0"
    assert first.attempts == 2
    assert [outcome.item for outcome in running] == ["item-1"]


def test_the_number_of_workers_follows_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.probing.scheduler._LOOK_SECONDS", 0.0)
    wanted = [4]
    farm = Farm()
    scheduler = farm.scheduler(lambda: wanted[0], in_flight=1)
    running = scheduler.run(items(300))
    for _ in range(30):
        next(running)
    assert scheduler.workers == 4
    wanted[0] = 1
    for _ in range(100):
        next(running)
    assert scheduler.workers == 1
    assert len(farm.made) == 4
    wanted[0] = 0  # never none
    for _ in range(50):
        next(running)
    assert scheduler.workers == 1
    assert len(list(running)) == 120


def test_a_count_that_wavers_once_ends_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.probing.scheduler._LOOK_SECONDS", 0.0)
    counts = iter([2] * 20 + [1] + [2] * 10**6)
    farm = Farm()
    scheduler = farm.scheduler(lambda: next(counts), in_flight=1)
    assert len(list(scheduler.run(items(200)))) == 200
    assert len(farm.made) == 2


def test_a_tick_hears_how_many_are_in_flight() -> None:
    heard: list[int] = []
    farm = Farm()
    list(farm.scheduler(1).run(items(3), tick=heard.append))
    assert len(heard) == 1
    assert 0 <= heard[0] <= 2

"""The rate limit on a clock of the test's own: who waits, for how long, and whose limit is kept."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probelog.errors import UsageError
from probelog.hub.rate_limit import (
    HUB_LIMITS,
    WINDOW_SECONDS,
    Kind,
    SlidingWindowLimit,
    hub_account,
    is_loopback,
)


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def limit(clock: Clock, limits: Mapping[Kind, float], window: float = 10.0) -> SlidingWindowLimit:
    return SlidingWindowLimit(limits, window, clock=clock, sleep=clock.sleep)


def test_a_token_comes_back_one_window_after_it_was_taken() -> None:
    clock = Clock()
    bucket = limit(clock, {"api": 2})
    assert bucket.try_acquire("api") == 0.0
    clock.now += 4
    assert bucket.try_acquire("api") == 0.0
    assert bucket.try_acquire("api") == 6.0
    clock.now += 6  # exactly one window after the first
    assert bucket.try_acquire("api") == 0.0
    assert bucket.try_acquire("api") == 4.0


def test_refused_requests_are_not_counted() -> None:
    clock = Clock()
    bucket = limit(clock, {"api": 1})
    bucket.acquire("api")
    for _ in range(5):
        assert bucket.try_acquire("api") == 10.0
    clock.now += 10
    assert bucket.try_acquire("api") == 0.0


def test_the_wait_is_never_so_short_that_it_is_none() -> None:
    clock = Clock()
    bucket = limit(clock, {"api": 1})
    bucket.acquire("api")
    clock.now += 10 - 1e-6
    assert bucket.try_acquire("api") == 1e-3


def test_two_threads_do_not_take_the_same_token() -> None:
    """The second asks while the first has looked how many there are and not yet taken one."""
    bucket, waits = limit(Clock(), {"api": 1}), list[float]()
    second = threading.Thread(target=lambda: waits.append(bucket.try_acquire("api")))

    class Interrupted(deque[float]):
        def append(self, taken: float) -> None:
            if second.ident is None:
                second.start()
                second.join(0.2)
            super().append(taken)

    bucket._taken["api"] = Interrupted()
    waits.append(bucket.try_acquire("api"))
    second.join()
    assert sorted(waits) == [0.0, 10.0]


def test_acquiring_sleeps_until_there_is_a_token() -> None:
    clock = Clock()
    bucket = limit(clock, {"api": 1})
    bucket.acquire("api")
    bucket.acquire("api")
    assert clock.slept == [10.0]


def test_kinds_are_counted_apart_and_a_missing_one_has_no_limit() -> None:
    clock = Clock()
    bucket = limit(clock, {"api": 1})
    bucket.acquire("api")
    for _ in range(100):
        assert bucket.try_acquire("file") == 0.0
    unlimited = limit(clock, {"api": float("inf"), "file": 1})
    for _ in range(100):
        assert unlimited.try_acquire("api") == 0.0
    assert unlimited.try_acquire("file") == 0.0
    assert unlimited.try_acquire("file") == 10.0


@pytest.mark.parametrize(("first", "second"), [(6.0, 2.0), (2.0, 6.0)])
def test_the_longer_of_two_penalties_counts(first: float, second: float) -> None:
    clock = Clock()
    bucket = limit(clock, {"api": 100})
    bucket.penalise("api", first)
    bucket.penalise("api", second)
    assert bucket.try_acquire("api") == 6.0
    assert bucket.try_acquire("file") == 0.0
    clock.now += 6.0
    assert bucket.try_acquire("api") == 0.0


def test_a_penalty_counts_from_now() -> None:
    clock = Clock()
    bucket = limit(clock, {})
    bucket.penalise("file", 3.0)
    clock.now += 2.0
    bucket.penalise("file", 3.0)
    assert bucket.try_acquire("file") == 3.0


def test_a_long_penalty_is_waited_out_a_window_at_a_time() -> None:
    clock = Clock()
    bucket = limit(clock, {"api": 1})
    bucket.penalise("api", 25.0)
    bucket.acquire("api")
    assert clock.slept == [10.0, 10.0, 5.0]


@given(st.integers(1, 4), st.lists(st.floats(0.0, 8.0).map(lambda seconds: round(seconds, 3)), max_size=40))
def test_no_span_of_a_window_sees_more_than_the_limit(most: int, pauses: list[float]) -> None:
    clock, taken = Clock(0.0), []
    bucket = limit(clock, {"api": most}, window=5.0)
    for pause in pauses:
        clock.now += pause
        bucket.acquire("api")
        taken.append(clock.now)
    for earlier, later in zip(taken, taken[most:], strict=False):
        assert later - earlier >= 5.0 - 1e-9


@pytest.mark.parametrize("refused", [{"api": 0}, {"file": 0.5}, {"api": 5, "file": -1}])
def test_a_limit_below_one_request_is_refused(refused: dict[Kind, float]) -> None:
    with pytest.raises(UsageError, match="one request per window or more"):
        SlidingWindowLimit(refused)
    SlidingWindowLimit({"api": 1})


def test_the_hubs_limits_by_account() -> None:
    assert HUB_LIMITS == {
        "anonymous": {"api": 500, "file": 3000},
        "free account": {"api": 1000, "file": 5000},
        "Enterprise": {"api": 6000, "file": 50_000},
    }
    assert WINDOW_SECONDS == 300
    assert hub_account("https://hub.example", with_token=False) == "anonymous"
    assert hub_account("https://hub.example", with_token=True) == "free account"
    assert hub_account("http://127.0.0.1:8000", with_token=True) is None


@pytest.mark.parametrize(("token", "api"), [(False, 500), (True, 1000)])
def test_the_endpoints_limit_is_that_of_its_account(token: bool, api: int) -> None:
    bucket = SlidingWindowLimit.for_endpoint("https://hub.example", with_token=token)
    assert {bucket.try_acquire("api") for _ in range(api)} == {0.0}
    assert bucket.try_acquire("api") > 299
    local = SlidingWindowLimit.for_endpoint("http://localhost:1", with_token=token)
    assert {local.try_acquire("api") for _ in range(api + 1)} == {0.0}


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("http://localhost", True),
        ("http://localhost:8080/hub", True),
        ("http://127.0.0.1:1", True),
        ("http://127.8.8.8", True),
        ("http://[::1]:5", True),
        ("http://10.0.0.1", False),
        ("http://localhost.example", False),
        ("https://hub.example", False),
        ("nothing", False),
    ],
)
def test_what_is_on_this_machine(endpoint: str, expected: bool) -> None:
    assert is_loopback(endpoint) is expected

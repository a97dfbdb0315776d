"""What is left is weighed by what models cost, not counted."""

from __future__ import annotations

import io

import numpy as np
import pytest

from pipelines.job.eta import Pace, duration
from pipelines.job.progress import Report


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_large_ones_first_do_not_frighten() -> None:
    rng = np.random.default_rng(0)
    sizes = np.sort(rng.lognormal(18, 1.5, 2000))[::-1]
    cost = 2.0 + sizes * 1e-7 * rng.uniform(0.8, 1.2, len(sizes))
    workers, clock = 10, Clock()
    pace = Pace(len(sizes), float(sizes.sum()), clock)
    for done, (size, seconds) in enumerate(zip(sizes, cost, strict=True), 1):
        clock.now += seconds / workers
        pace.add(size, seconds)
        if done in (400, 1000, 1500):
            truth = cost[done:].sum() / workers
            assert pace.eta_seconds == pytest.approx(truth, rel=0.25)
            assert pace.models_an_hour is not None
            by_count = (len(sizes) - done) / pace.models_an_hour * 3600
            assert abs(pace.eta_seconds - truth) < abs(by_count - truth)
    assert pace.eta_seconds == 0


def test_more_workers_are_noticed() -> None:
    clock = Clock()
    pace = Pace(20_000, 20_000.0, clock)
    for workers, items in ((1, 500), (10, 8000)):
        for _ in range(items):
            clock.now += 1 / workers
            pace.add(1.0, 1.0)
    assert pace.eta_seconds == pytest.approx(11_500 / 10, rel=0.1)


def test_refusals_that_cost_nothing() -> None:
    clock = Clock()
    pace = Pace(100, 0.0, clock)
    assert pace.eta_seconds is None
    assert pace.models_an_hour is None
    for _ in range(50):
        clock.now += 1
        pace.add(0.0, 0.0)
    assert pace.eta_seconds == pytest.approx(50)


def test_durations() -> None:
    assert [duration(s) for s in (42, 200, 18_720, 273_600)] == [
        "42 s",
        "3 min 20 s",
        "5 h 12 min",
        "3 d 4 h",
    ]


def test_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(), io.StringIO()
    pace = Pace(30, 30.0, clock)
    counter = Report(stream).counter("probe", 50, "models", 20, pace)
    for number in range(10):
        clock.now += 2
        pace.add(1.0, 1.0)
        counter.add(reason="too-large" if number % 5 == 0 else None)
    counter.show(final=True)
    assert stream.getvalue().splitlines()[-1] == (
        "probe: 30 of 50 models, 2 failed (too-large 2), 1,800 an hour, 40 s left"
    )

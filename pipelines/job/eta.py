"""How fast a run is and when it will be through.

Models differ by a thousand in what they cost, and the dear ones come first: counting them says little about the
rest. So a line is fitted to what models cost so far, ``seconds = a + b * bytes`` (least squares, neither part
negative), and what is left is weighed by it. Speed is worker-seconds of work a second of wall time: it holds
however many workers there are.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_WINDOW_SECONDS = 600.0
_SAMPLE_SECONDS = 5.0


class Pace:
    """Rates over the last ten minutes."""

    def __init__(
        self, remaining: int, remaining_bytes: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Nothing is through yet.

        Args:
            remaining: models to do.
            remaining_bytes: of their weights.
            clock: seconds, ascending.
        """
        self.remaining, self.remaining_bytes = remaining, remaining_bytes
        self._clock = clock
        self._count = 0
        self._x = self._y = self._xx = self._xy = 0.0
        self._samples: deque[tuple[float, int, float]] = deque([(clock(), 0, 0.0)])

    def add(self, size: float, seconds: float) -> None:
        """One model is through: the bytes that it was planned with, the seconds that a worker spent on it."""
        self.remaining -= 1
        self.remaining_bytes -= size
        self._count += 1
        self._x += size
        self._y += seconds
        self._xx += size * size
        self._xy += size * seconds
        now = self._clock()
        if now - self._samples[-1][0] >= _SAMPLE_SECONDS:
            self._samples.append((now, self._count, self._y))
            while now - self._samples[0][0] > _WINDOW_SECONDS and len(self._samples) > 2:
                self._samples.popleft()

    @property
    def models_an_hour(self) -> float | None:
        """None in the first second."""
        since, count, _ = self._samples[0]
        seconds = self._clock() - since
        return 3600 * (self._count - count) / seconds if seconds > 1 and self._count > count else None

    @property
    def work_left(self) -> float:
        """Worker-seconds that the remaining models will take."""
        constant, per_byte = self._fit()
        return max(0.0, constant * self.remaining + per_byte * max(0.0, self.remaining_bytes))

    @property
    def eta_seconds(self) -> float | None:
        """Wall time until all are through; None while nothing is known."""
        if not self.remaining:
            return 0.0
        since, count, work = self._samples[0]
        wall = self._clock() - since
        if wall <= 1 or self._count == count:
            return None
        if self._y - work <= 0:  # nothing but failures that cost nothing: only their number is known
            return self.remaining * wall / (self._count - count)
        return self.work_left * wall / (self._y - work)

    def _fit(self) -> tuple[float, float]:
        n = self._count
        if not n:
            return 0.0, 0.0
        spread = n * self._xx - self._x * self._x
        # Sizes that are all but equal give no slope: a cost by the byte, which errs less where small ones follow.
        if spread <= 1e-6 * n * self._xx:
            return (self._y / n, 0.0) if self._x <= 0 else (0.0, self._y / self._x)
        slope = (n * self._xy - self._x * self._y) / spread
        constant = (self._y - slope * self._x) / n
        if slope < 0:
            return self._y / n, 0.0
        if constant < 0:
            return 0.0, self._xy / self._xx
        return constant, slope


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 20 s, 5 h 12 min, 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"

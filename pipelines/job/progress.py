"""What a long job says while it works: one line that counts, often on a terminal, rarely in a log."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import TextIO

from pipelines.job.eta import Pace, duration
from probelog.credentials import redacted
from probelog.terminal import printable

_LOG_SECONDS = 15.0
_TERMINAL_SECONDS = 0.5


class Report:
    """Writes stage headings, progress lines and results to a stream (standard error by default)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._open_line = False
        self._logged = time.monotonic()

    def say(self, text: str) -> None:
        """One finished line."""
        self._end_line()
        self._stream.write(
            "\n".join(printable(line, limit=500) for line in redacted(text).splitlines()) + "\n"
        )
        self._stream.flush()

    def line(self, text: str) -> None:
        """A passing line: the next one overwrites it on a terminal; in a log it is left out if one was just there."""
        if self._terminal:
            self._stream.write("\r\x1b[2K" + printable(redacted(text), limit=200))
            self._stream.flush()
            self._open_line = True
        elif time.monotonic() - self._logged >= _LOG_SECONDS:
            self._logged = time.monotonic()
            self.say(text)

    def _end_line(self) -> None:
        if self._open_line:
            self._stream.write("\n")
            self._open_line = False

    def counter(
        self, name: str, total: int | None, unit: str, done: int = 0, pace: Pace | None = None
    ) -> Counted:
        """Progress of a loop over ``total`` things, of which ``done`` were there before.

        The rate and what is left are taken from ``pace`` where things differ in what they cost.
        """
        return Counted(self, name, total, unit, done, pace)


class Counted:
    """Counts successes and failures by reason, and knows the rate and what is left."""

    def __init__(
        self, report: Report, name: str, total: int | None, unit: str, done: int, pace: Pace | None = None
    ) -> None:
        self._report = report
        self._name, self._total, self._unit = name, total, unit
        self._before = done
        self._pace = pace
        self.good = 0
        self.failed: Counter[str] = Counter()
        self._started = time.monotonic()
        self._shown = float("-inf")

    def add(self, count: int = 1, reason: str | None = None) -> None:
        """Count things that are through, or one that failed for a reason."""
        if reason is None:
            self.good += count
        else:
            self.failed[reason] += count
        self.show()

    def show(self, final: bool = False) -> None:
        """Print the line if the last one is old enough."""
        now = time.monotonic()
        if final:
            self._report.say(self._text(now))
        elif now - self._shown >= _TERMINAL_SECONDS:
            self._shown = now
            self._report.line(self._text(now))

    def _text(self, now: float) -> str:
        fresh = self.good + self.failed.total()
        done = self._before + fresh
        text = f"{self._name}: {done:,}" + (f" of {self._total:,}" if self._total is not None else "")
        text += f" {self._unit}"
        if self.failed:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.failed.most_common())
            text += f", {self.failed.total():,} failed ({reasons})"
        if self._pace is not None:
            rate, remaining = self._pace.models_an_hour, self._pace.eta_seconds
            text += f", {rate:,.0f} an hour" if rate is not None else ""
            return text + (f", {duration(remaining)} left" if remaining else "")
        seconds = now - self._started
        if fresh and seconds > 1:
            rate = fresh / seconds
            text += f", {rate * 3600:,.0f} an hour" if rate < 1 else f", {rate:,.1f} a second"
            if self._total is not None and done < self._total:
                text += f", {duration((self._total - done) / rate)} left"
        return text

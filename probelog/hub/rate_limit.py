"""How often the Hub may be asked: a limit shared by everybody who asks it under one address or token."""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Literal, Protocol
from urllib.parse import urlsplit

from probelog.errors import UsageError

log = logging.getLogger(__name__)

Kind = Literal["api", "file"]

#: The Hub counts requests in spans of so many seconds.
WINDOW_SECONDS = 300.0
#: Requests a window by kind of account (huggingface.co/docs/hub/rate-limits: "Hub APIs" and "Resolvers").
HUB_LIMITS: Mapping[str, Mapping[Kind, int]] = {
    "anonymous": {"api": 500, "file": 3000},
    "free account": {"api": 1000, "file": 5000},
    "Enterprise": {"api": 6000, "file": 50_000},
}


def hub_account(endpoint: str, *, with_token: bool) -> str | None:
    """Which of ``HUB_LIMITS`` is kept: a token counts as that of a free account. None on loopback: no limit."""
    if is_loopback(endpoint):
        return None
    return "free account" if with_token else "anonymous"


class Limiter(Protocol):
    """Says when the Hub may be asked next. One for all workers that share an address or a token."""

    def acquire(self, kind: Kind) -> None:
        """Return when one more request of this kind may be sent."""

    def penalise(self, kind: Kind, seconds: float) -> None:
        """Let nobody send a request of this kind for so long: the Hub said so."""


class SlidingWindowLimit:
    """A limiter within one process, safe to share between threads.

    Every request takes a token that comes back one ``window`` later: no span of that length, wherever it begins,
    sees more requests than the limit, however the Hub's own windows lie.

    Args:
        limits: requests per window and kind; ``inf`` or a missing kind: as many as you like.
        window: seconds; the Hub's are five minutes.
        clock, sleep: the time, for tests.
    """

    def __init__(
        self,
        limits: Mapping[Kind, float],
        window: float = WINDOW_SECONDS,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if any(limit < 1 for limit in limits.values()):
            raise UsageError("a rate limit must be one request per window or more")
        self._limits = dict(limits)
        self._window = window
        self._clock, self._sleep = clock, sleep
        self._taken: dict[Kind, deque[float]] = {"api": deque(), "file": deque()}
        self._barred: dict[Kind, float] = {}
        self._lock = threading.Lock()

    @classmethod
    def for_endpoint(cls, endpoint: str, *, with_token: bool) -> SlidingWindowLimit:
        """The public Hub's limits per five minutes, without or with a token of a free account; none on loopback."""
        account = hub_account(endpoint, with_token=with_token)
        return cls(HUB_LIMITS[account] if account is not None else {})

    def acquire(self, kind: Kind) -> None:
        """Wait for a token and take it."""
        while (wait := self.try_acquire(kind)) > 0:
            if wait > 5:
                log.info("waiting %.0f s for the Hub's rate limit (%s requests)", wait, kind)
            self._sleep(wait)

    def try_acquire(self, kind: Kind) -> float:
        """Take a token and return 0.0, or return in how many seconds there may be one (at most a window)."""
        with self._lock:
            now = self._clock()
            if (barred := self._barred.get(kind, now)) > now:
                return min(barred - now, self._window)
            limit, taken = self._limits.get(kind, float("inf")), self._taken[kind]
            if limit == float("inf"):
                return 0.0
            while taken and taken[0] <= now - self._window:
                taken.popleft()
            if len(taken) >= limit:
                return max(taken[0] + self._window - now, 1e-3)
            taken.append(now)
            return 0.0

    def penalise(self, kind: Kind, seconds: float) -> None:
        """Give no tokens of this kind for so long."""
        with self._lock:
            self._barred[kind] = max(self._barred.get(kind, 0.0), self._clock() + seconds)


def is_loopback(endpoint: str) -> bool:
    """Whether an address is on this machine."""
    host = urlsplit(endpoint).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

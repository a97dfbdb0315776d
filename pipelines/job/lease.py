"""A lease in a store: of several runs that must not work at once, one does, and a dead one does not block for ever.

The lease is one small object. Whoever replaces it by a conditional put (`Store.swap`) holds it, and renews it at a
third of its life. Its age is the store's own time less the time at which the store says it was written, so that no
machine's clock is compared with another's; what the holder measures itself are durations only. See C. Gray and
D. Cheriton, "Leases: an efficient fault-tolerant mechanism for distributed file cache consistency" (SOSP 1989).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from probelog.errors import ConflictError, ProbeLogError, StoreError, UsageError
from probelog.storage.checksummed_json import sealed_json, unsealed_json
from probelog.storage.store import Store

_log = logging.getLogger(__name__)

# Object stores tell times in whole seconds.
_GRACE = 1.0
_RENEWALS = 3
_LONGEST_POLL = 10.0


class LeaseHeldError(ProbeLogError):
    """Somebody else holds the lease. ``holder`` says who."""

    def __init__(self, message: str, holder: str) -> None:
        self.holder = holder
        super().__init__(message)

    def __reduce__(self) -> tuple[type[LeaseHeldError], tuple[str, str]]:
        return type(self), (str(self), self.holder)


class LeaseLostError(ProbeLogError):
    """The lease ran out, or somebody else took it: what was done under it must not be made visible."""


def this_process() -> str:
    """What a holder is called unless it says otherwise: its host and process."""
    return f"process {os.getpid()} on {socket.gethostname()}"


class Lease:
    """A lease that this process holds; made by `hold_lease`."""

    def __init__(
        self, store: Store, name: str, state: dict[str, Any], content: bytes, asked: float, seconds: float
    ) -> None:
        self._store, self._name, self._seconds = store, name, seconds
        self._state, self._content = state, content
        self._until = asked + seconds
        self._lost: str | None = None
        self._turn = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Renew the lease here and now: after this it is ours for its whole life.

        Call it before whatever others must see only of the lease's holder.

        Raises:
            LeaseLostError: it ran out (this process or its machine was halted, or the store did not answer for
                longer than the lease's life), or another run has taken it.
        """
        while True:
            try:
                self._renew()
                return
            except StoreError as error:
                _log.warning("the lease %s was not renewed: %s", self._store.path(self._name), error)
            time.sleep(max(0.0, min(self._seconds / 10, 1.0, self._until - _now())))

    def _keep(self) -> None:
        wait = self._seconds / _RENEWALS
        while not self._over.wait(wait):
            try:
                self._renew()
                wait = self._seconds / _RENEWALS
            except LeaseLostError as error:
                _log.error("%s", error)
                return
            except Exception as error:  # whatever it is, there is time left to try again
                ours = not isinstance(error, StoreError)
                path = self._store.path(self._name)
                _log.warning("the lease %s was not renewed: %s", path, error, exc_info=ours)
                wait = self._seconds / 10

    def _renew(self) -> None:
        # A renewal that hangs in the store's library must not hang `check` beyond the lease's end.
        if not self._turn.acquire(timeout=max(0.0, self._until - _now())):
            self._mark_lost("the store did not answer in time")
        try:
            if self._lost is not None:
                self._mark_lost(self._lost)
            asked = _now()
            if asked >= self._until:
                self._mark_lost(f"it was not renewed for {self._seconds:.0f} seconds")
            state = {**self._state, "number": self._state["number"] + 1}
            content = sealed_json(state)
            try:
                self._store.swap(self._name, content, self._content)
            except ConflictError:
                self._mark_lost("another run has taken it")
            if _now() >= self._until:
                self._mark_lost(f"it was not renewed for {self._seconds:.0f} seconds")
            self._state, self._content, self._until = state, content, asked + self._seconds
        finally:
            self._turn.release()

    def _mark_lost(self, why: str) -> None:
        self._lost = why
        raise LeaseLostError(
            f"{self._store.path(self._name)}: this run no longer holds its lease ({why}), so it must not publish. "
            "Run again; what was done is kept."
        )

    def _end(self) -> None:
        """Give the lease up, if it is still ours."""
        self._over.set()
        if not self._turn.acquire(timeout=max(0.0, self._until - _now())):
            return
        try:
            if self._lost is None:
                self._lost = "it was given up"
                ended = {**self._state, "number": self._state["number"] + 1, "ended": True}
                # A conditional put: deleting could hit the lease of somebody who took over at this moment.
                self._store.swap(self._name, sealed_json(ended), self._content)
        except StoreError as error:
            _log.warning("the lease %s was not given up: %s", self._store.path(self._name), error)
        finally:
            self._turn.release()


@contextlib.contextmanager
def hold_lease(
    store: Store, name: str, *, seconds: float, wait: float = 0.0, holder: str | None = None
) -> Iterator[Lease]:
    """Hold a lease for as long as the block runs.

    A thread renews it meanwhile. The lease of a process that died is taken over when it has run out: of several that
    try, one wins.

    Args:
        store: where the lease lies; everybody who competes for it names the same store.
        name: its path in the store.
        seconds: its life, unless renewed (2 or more: object stores tell times in whole seconds).
        wait: for how long to wait for somebody else's lease; 0: not at all.
        holder: what to tell others; None: this process and host.

    Raises:
        LeaseHeldError: somebody else holds it, and still did after ``wait`` seconds.
        StoreError: the store refuses.
        UsageError: a lease of less than two seconds.
    """
    if seconds < 2:
        raise UsageError(f"a lease must last 2 seconds or more, not {seconds:g}")
    deadline = time.monotonic() + wait
    announced = False
    while True:
        asked = _now()
        state, content, held_state = _take(store, name, seconds, holder or this_process())
        if held_state is None:
            break
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise LeaseHeldError(
                f"another run is at work: {held_state.holder}, since {_shown(held_state.since)}; unless renewed, its lease "
                f"({store.path(name)}) runs out at {_shown(held_state.expires)}. Wait for it to end, or end it; if it died, "
                "run again after that time.",
                held_state.holder,
            )
        if not announced:
            announced = True
            _log.warning("waiting up to %.0f s for another run: %s", remaining, held_state.holder)
        time.sleep(min(remaining, max(0.05, min(seconds / 10, _LONGEST_POLL))))
    lease = Lease(store, name, state, content, asked, seconds)
    try:
        yield lease
    finally:
        lease._end()


@dataclass(frozen=True, slots=True)
class _Other:
    """Somebody else's lease; times by the store's clock."""

    holder: str
    since: dt.datetime
    expires: dt.datetime


def _take(
    store: Store, name: str, seconds: float, holder: str
) -> tuple[dict[str, Any], bytes, _Other | None]:
    """Put a lease of our own in the place of none, or of one that ended or ran out; else says whose is there."""
    while True:
        # In this order: a lease that is renewed between these calls looks younger than what was read, never older.
        previous = store.read_or_none(name)
        written = store.modified(name)
        now = store.time()
        number = 0
        if previous is not None:
            if written is None:
                continue
            existing = _read(previous, store.path(name))
            life = existing.get("seconds")
            # Also of one that cannot be read: nobody takes it over before its holder must have noticed.
            life = float(life) if isinstance(life, int | float) and 0 < life < 1e9 else seconds
            expires = written + dt.timedelta(seconds=life + _GRACE)
            if existing.get("ended") is not True and now <= expires:
                since = existing.get("since")
                return (
                    {},
                    b"",
                    _Other(str(existing.get("holder", "unknown")), _time(since) or written, expires),
                )
            number = existing["number"] if isinstance(existing.get("number"), int) else 0
        state = {
            "holder": holder,
            "since": now.isoformat(timespec="seconds"),
            "seconds": seconds,
            # No content comes twice: a conditional put then knows its own, and never mistakes an old one for a new.
            "token": secrets.token_hex(16),
            "number": number + 1,
        }
        content = sealed_json(state)
        try:
            store.swap(name, content, previous)
        except ConflictError:
            continue
        return state, content, None


def _read(content: bytes, where: str) -> dict[str, Any]:
    try:
        return unsealed_json(content, where)
    except StoreError:
        return {}


def _time(text: object) -> dt.datetime | None:
    try:
        return dt.datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _shown(time: dt.datetime) -> str:
    return time.astimezone(dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _now() -> float:
    """Seconds that pass on this machine, also while it is suspended (where the system tells)."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

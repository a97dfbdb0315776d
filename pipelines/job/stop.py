"""SIGTERM and Ctrl-C: a stage cleans up and ends in time, with one line that says how to go on.

The first signal is raised in the main thread as `Stopped`, through everything that cleans up behind itself: the state is in
the store, and Ray ends with its session. A thread hears of it at once, also while the main thread is inside a library that
runs for minutes, and ends the process, and all that it started, when the time is over: before Kubernetes or a person does.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

# Pods have 30 seconds by default, those of deploy/kuberay that run a driver at least as many.
SECONDS = 20.0
# One signal may arrive twice, from a terminal and from what started the command; a second one of a person's does later.
_SAME_SECONDS = 1.0
_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The command was told to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)

    @property
    def status(self) -> int:
        """What shells call the exit status of a command that a signal ended."""
        return 128 + self.number


@contextlib.contextmanager
def stoppable(line: Callable[[Stopped], str], seconds: float = SECONDS) -> Iterator[None]:
    """Within the block the first SIGTERM or Ctrl-C raises `Stopped`; the process ends with its status and one line.

    Args:
        line: what is said.
        seconds: after so many, or with a second signal, the process ends without further clean-up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch(line, seconds)
    handlers = {number: signal.signal(number, watch.on_signal) for number in _NUMBERS}
    wakeup = signal.set_wakeup_fd(watch.wakes.fileno(), warn_on_full_buffer=False)
    # Before all that a stage imports registers, so that it is called after these.
    atexit.register(watch.end)
    watch.start()
    try:
        yield
    except (Stopped, SystemExit) as ending:
        # While Ray starts its own handler is in place, which ends the interpreter with a status of its own.
        stopped = ending if isinstance(ending, Stopped) else watch.stopped
        if stopped is None:
            raise
        # The handlers stay, and the watch, for what ends with the interpreter.
        watch.say(stopped)
        raise SystemExit(stopped.status) from None
    finally:
        if watch.stopped is None:
            atexit.unregister(watch.end)
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            watch.wakes.close()


class _Watch(threading.Thread):
    """Hears of signals as soon as the kernel delivers them, whatever the main thread is doing."""

    def __init__(self, line: Callable[[Stopped], str], seconds: float) -> None:
        super().__init__(name="stop", daemon=True)
        self._line, self._seconds = line, seconds
        self._heard, self.wakes = socket.socketpair()
        self.wakes.setblocking(False)
        self._saying = threading.Lock()
        self._raised = False
        self.stopped: Stopped | None = None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The handler: runs in the main thread, as soon as that one is in Python."""
        if not self._raised:
            self._raised = True
            self.stopped = self.stopped or Stopped(number)
            raise self.stopped

    def run(self) -> None:
        """Wait for the first signal, then for the end of the time."""
        begun = time.monotonic()
        with self._heard:
            while numbers := self._received():
                for number in (number for number in numbers if number in _NUMBERS):
                    if self._heard.gettimeout() is None:
                        begun = time.monotonic()
                        self.stopped = self.stopped or Stopped(number)
                    elif time.monotonic() - begun > _SAME_SECONDS:
                        self._end_at_once()
                    self._heard.settimeout(max(0.01, begun + self._seconds - time.monotonic()))
        # Nobody writes any more: the block has ended by itself.

    def _received(self) -> bytes:
        try:
            return self._heard.recv(16)
        except TimeoutError:
            self._end_at_once()

    def say(self, stopped: Stopped) -> None:
        """The line, once."""
        if self._saying.acquire(blocking=False):
            start = "\n" if os.isatty(2) else ""
            with contextlib.suppress(OSError):
                os.write(2, f"{start}{self._line(stopped)}\n".encode(errors="replace"))

    def end(self) -> None:
        """End when all has been cleaned up: to take torch apart lasts seconds, in which no thread can end the process."""
        if self.stopped is not None:
            with contextlib.suppress(OSError):  # nobody reads it any more
                sys.stdout.flush()
            os._exit(self.stopped.status)

    def _end_at_once(self) -> NoReturn:
        assert self.stopped is not None
        self.say(self.stopped)
        for pid in reversed(_descendants(os.getpid())):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        os._exit(self.stopped.status)


def _descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that these have, as Linux tells them."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *_descendants(child)]
    return found

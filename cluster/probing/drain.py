"""A worker's notice that its machine is going away: SIGTERM, or its node being drained (spot machines)."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable

import ray

from cluster.runtime.ray_private import draining_nodes

_POLL_SECONDS = 2.0

_log = logging.getLogger(__name__)


class Drain:
    """Watches for the end. Make it in a process's main thread.

    ``on_notice`` is called once, in a thread of its own, with the seconds that are left. The process itself ends
    (status 0) when those are over, whatever it is doing.
    """

    def __init__(self, seconds: float, on_notice: Callable[[float], None]) -> None:
        self._seconds, self._on_notice = seconds, on_notice
        self._noticed = threading.Event()
        self._lock = threading.Lock()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: self._start_draining(self._seconds))
        threading.Thread(target=self._watch_node, daemon=True, name="drain").start()

    @property
    def noticed(self) -> bool:
        """Whether the end is near."""
        return self._noticed.is_set()

    def _start_draining(self, seconds: float) -> None:
        # In a signal handler nothing may wait. Never released: the first notice is the only one.
        if self._lock.acquire(blocking=False):
            self._noticed.set()
            threading.Thread(target=self._on_notice, args=(seconds,), daemon=True).start()
            timer = threading.Timer(seconds, os._exit, (0,))
            timer.daemon = True
            timer.start()

    def _watch_node(self) -> None:
        node = ray.get_runtime_context().get_node_id()
        while not self._noticed.is_set():
            try:
                deadline = draining_nodes().get(node)
                if deadline is not None:
                    remaining = deadline / 1000 - time.time() if deadline else self._seconds
                    self._start_draining(max(1.0, min(self._seconds, remaining - 1.0)))
            except NotImplementedError as error:
                _log.warning("which nodes are drained is not known (%s): only SIGTERM is heeded", error)
                return
            except Exception as error:  # a head that does not answer just now
                _log.debug("which nodes are drained is not known now: %s", error)
            self._noticed.wait(_POLL_SECONDS)

"""Waiting for LanceDB's asynchronous client, in the thread that its other client waits for as well."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def wait(answer: Coroutine[Any, Any, T]) -> T:
    """What LanceDB answers, or raises. Safe to share between threads, and with processes that are forked."""
    from lancedb.background_loop import LOOP

    found: T = LOOP.run(answer)  # type: ignore[no-untyped-call] # LanceDB's own is not typed
    return found

"""Writes to a store that refuses for a while."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from probelog.errors import ConflictError, StoreError
from probelog.storage.store import Store, retry_with_backoff


def test_a_store_that_comes_back(tmp_path: Path) -> None:
    """The folder is a file for half a second."""
    blocked = tmp_path / "store"
    blocked.write_text("in the way")
    threading.Timer(0.5, blocked.unlink).start()
    retry_with_backoff(lambda: Store(blocked).write("a/b", b"content"), 30.0)
    assert Store(blocked).read("a/b") == b"content"


def test_patience_ends(tmp_path: Path) -> None:
    blocked = tmp_path / "store"
    blocked.write_text("in the way")
    begun = time.monotonic()
    with pytest.raises(StoreError, match="store/a/b cannot be written"):
        retry_with_backoff(lambda: Store(blocked).write("a/b", b"content"), 0.6)
    assert time.monotonic() - begun > 0.5


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), ConflictError("somebody else")])
def test_errors_that_waiting_does_not_cure_are_raised_at_once(error: Exception) -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        retry_with_backoff(call, 60.0)
    assert len(calls) == 1


def test_a_store_error_is_tried_again() -> None:
    calls = []

    def call() -> int:
        calls.append(1)
        if len(calls) < 3:
            raise StoreError("slow down")
        return len(calls)

    assert retry_with_backoff(call, 60.0) == 3

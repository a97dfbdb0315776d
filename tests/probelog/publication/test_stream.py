from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probelog.publication.stream import run_consumer_in_thread


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(), max_size=30))
def test_all_items_in_their_order(items: list[int]) -> None:
    assert run_consumer_in_thread(iter(items), list) == items


def test_items_are_made_here_and_consumed_elsewhere() -> None:
    makers, consumers = set(), set()

    def made() -> Iterator[int]:
        for item in range(5):
            makers.add(threading.get_ident())
            yield item

    def consume(items: Iterator[int]) -> int:
        for _ in items:
            consumers.add(threading.get_ident())
        return 7

    assert run_consumer_in_thread(made(), consume) == 7
    assert makers == {threading.get_ident()}
    assert consumers
    assert not consumers & makers


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_making_fails(kind: type[BaseException]) -> None:
    seen: list[BaseException] = []

    def made() -> Iterator[int]:
        yield 1
        raise kind("making")

    def consume(items: Iterator[int]) -> None:
        try:
            list(items)
        except BaseException as error:
            seen.append(error)
            raise RuntimeError("the reader broke off") from None

    with pytest.raises(kind, match="making"):
        run_consumer_in_thread(made(), consume)
    assert [type(error) for error in seen] == [kind]


def test_a_slow_consumer_gets_everything() -> None:
    """Slower than the maker looks whether anybody still consumes."""

    def consume(items: Iterator[int]) -> list[int]:
        time.sleep(0.5)
        return list(items)

    assert run_consumer_in_thread(range(9), consume) == list(range(9))


def test_consuming_fails_or_ends_early() -> None:
    made = []

    def endless() -> Iterator[int]:
        while True:
            made.append(len(made))
            yield len(made)

    def broken(items: Iterator[int]) -> None:
        next(items)
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        run_consumer_in_thread(endless(), broken)
    before = len(made)
    assert run_consumer_in_thread(endless(), next) == before + 1
    assert len(made) < 100

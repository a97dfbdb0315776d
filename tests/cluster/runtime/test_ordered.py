"""Results of tasks in the order of their items, on a real Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.runtime.ordered import in_order
from probelog.errors import StoreError

pytestmark = pytest.mark.usefixtures("local_ray")


def slower_first(number: int, added: int) -> int:
    time.sleep(0.1 if number == 0 else 0)
    return number + added


def die_once(number: int, folder: Path) -> int:
    flag = folder / str(number)
    if number == 1 and not flag.exists():
        flag.write_text("seen")
        os._exit(1)
    return number


def damaged(number: int) -> int:
    if number == 3:
        raise StoreError(f"{number} is damaged")
    return number


def test_results_come_in_order_and_no_more_items_are_taken_than_can_be_worked_on() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    results = []
    for result in in_order(slower_first, items(), [100]):
        results.append(result)
        # Four CPUs: two tasks for each are ahead of the one that is taken.
        assert len(taken) - len(results) <= 9
    assert results == [*range(100, 120)]


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    assert list(in_order(die_once, range(3), [tmp_path])) == [0, 1, 2]
    assert (tmp_path / "1").exists()


def test_what_a_task_raises_is_raised_as_it_is() -> None:
    results = in_order(damaged, range(9))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StoreError, match=r"^3 is damaged$"):
        next(results)

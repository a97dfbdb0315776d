"""Tasks that need another's result, on a real Ray."""

from __future__ import annotations

import logging
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cluster.runtime.task_graph import Finished, run_families
from probelog import logs


def add(amount: int, before: int | None) -> int:
    if amount < 0:
        raise ValueError("less than nothing\nand more lines")
    return amount + (before or 0)


def die_once(flag: Path, before: None) -> str:
    if not flag.exists():
        flag.write_text("seen")
        os._exit(1)
    return "alive"


def stamps(seconds: float, before: None) -> tuple[float, float]:
    begin = time.monotonic()
    time.sleep(seconds)
    return begin, time.monotonic()


def level(before: None) -> int:
    return logging.getLogger("probelog").level


def ran(
    work: Any, arguments: dict[str, list[Any]], parents: dict[str, str], at_once: int = 2
) -> list[Finished]:
    return list(run_families(work, arguments, parents, at_once=at_once, cpus=0.5, gpus=0))


def test_children_get_their_parents_result(local_ray: None) -> None:
    found = ran(add, {"c": [100], "b": [10], "a": [1], "alone": [7]}, {"b": "a", "c": "b"})
    assert {end.name: end.result for end in found} == {"a": 1, "b": 11, "c": 111, "alone": 7}
    names = [end.name for end in found]
    assert names.index("a") < names.index("b") < names.index("c")


def test_a_failure_fails_its_descendants_and_no_other_task(local_ray: None) -> None:
    found = {
        end.name: end for end in ran(add, {"a": [-1], "b": [1], "c": [1], "d": [4]}, {"b": "a", "c": "b"})
    }
    assert found["a"].error == "ValueError: less than nothing"
    assert found["b"].error == "its parent a failed"
    assert found["c"].error == "its parent b failed"
    assert found["d"].result == 4


def test_a_worker_that_dies_is_replaced(local_ray: None, tmp_path: Path) -> None:
    assert ran(die_once, {"a": [tmp_path / "flag"]}, {}) == [Finished("a", "alive")]


def test_no_more_at_once_than_allowed(local_ray: None) -> None:
    ends = [end.result for end in ran(stamps, {name: [0.2] for name in "abc"}, {}, at_once=1)]
    assert all(first[1] <= second[0] for first, second in pairwise(ends))


@pytest.mark.parametrize("parents", [{"a": "nobody"}, {"a": "b", "b": "a"}])
def test_parents_that_never_come(local_ray: None, parents: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="not among the tasks"):
        ran(add, {"a": [1], "b": [1]}, parents)


def test_tasks_log_as_the_command_does(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen in ("info", "error"):
        monkeypatch.setattr(logging.getLogger("probelog"), "level", getattr(logging, chosen.upper()))
        assert logs.current() == chosen
        assert [end.result for end in ran(level, {"a": []}, {})] == [getattr(logging, chosen.upper())]

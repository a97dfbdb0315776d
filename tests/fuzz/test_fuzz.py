"""Every target on damaged inputs, and the harness on targets that fail."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fuzz import targets  # noqa: F401 - registers them
from tests.fuzz.harness import CORPUS, TARGETS, Target, fuzz

#: Of all targets together, in acceptance.
_SECONDS = 60.0


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_inputs_raise_what_is_declared(name: str) -> None:
    fuzz(TARGETS[name], 150)


@pytest.mark.acceptance
@pytest.mark.parametrize("name", TARGETS)
def test_for_longer(name: str) -> None:
    until, number = time.monotonic() + _SECONDS / len(TARGETS), 0
    while time.monotonic() < until:
        fuzz(TARGETS[name], 100, number)
        number += 1


def test_every_target_has_a_small_corpus() -> None:
    assert {path.name for path in CORPUS.iterdir()} == TARGETS.keys()
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < 1 << 20


def fails(data: bytes, _: Path) -> None:
    if b"1" in data:
        raise KeyError(data)


def test_an_error_that_is_not_declared_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "examples", lambda _: [b'{"a": [2, 0]}'])
    fuzz(Target("declared", fails, (LookupError,)), 50)
    with pytest.raises(KeyError) as caught:
        fuzz(Target("not-declared", fails, (ValueError,)), 500)
    assert any("input of not-declared: b'" in note for note in caught.value.__notes__)


def test_time_and_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bytes] = []
    monkeypatch.setattr(Target, "examples", lambda _: [b"x"])
    monkeypatch.setattr("tests.fuzz.harness.MOST_SECONDS", 0.01)
    with pytest.raises(AssertionError, match=r"took \d+\.\d s"):
        fuzz(Target("slow", lambda _data, _folder: sum(range(3_000_000)), ()), 5)
    monkeypatch.setattr("tests.fuzz.harness.MOST_SECONDS", 10.0)
    monkeypatch.setattr("tests.fuzz.harness.MOST_MEBIBYTES", 20)
    with pytest.raises(AssertionError, match=r"took \d+ MiB"):
        fuzz(Target("large", lambda _data, _folder: kept.append(bytes(range(256)) * (1 << 18)), ()), 5)

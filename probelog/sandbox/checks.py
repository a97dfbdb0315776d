"""Single facts of what a model's process says: types, ranges and lengths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from probelog.models.config import UNPRINTABLE


class AnswerError(ValueError):
    """No process of ours could have said this."""


def is_number(value: object) -> bool:
    """Whether it is a number that float32 could hold."""
    return type(value) in (int, float) and abs(value) < 1e39  # type: ignore[arg-type]


def number(said: Mapping[str, Any], name: str, least: float, most: float) -> float:
    """A number in a range."""
    value = said.get(name)
    if not is_number(value) or not least <= float(value) <= most:  # type: ignore[arg-type]
        raise AnswerError(f"{name} that is no number in range")
    return float(value)  # type: ignore[arg-type]


def whole(said: Mapping[str, Any], name: str, least: int, most: int) -> int:
    """A whole number in a range."""
    value = said.get(name)
    if type(value) is not int or not least <= value <= most:
        raise AnswerError(f"{name} that is no whole number from {least} to {most}")
    return value


def one_of(said: Mapping[str, Any], name: str, known: Sequence[str]) -> str:
    """One of the values that there are."""
    value = said.get(name)
    if value not in known:
        raise AnswerError(f"{name} that does not exist")
    return str(value)


def text(said: Mapping[str, Any], name: str, longest: int) -> str:
    """A text, as `check_text`."""
    value = said.get(name)
    check_text(value, name, longest)
    return str(value)


def matching(said: Mapping[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    """A text of a form."""
    value = text(said, name, 200)
    if not pattern.fullmatch(value):
        raise AnswerError(f"{name} of another form")
    return value


def check_text(value: object, name: str, longest: int) -> None:
    """Text that Arrow, a log and a terminal can hold."""
    if not isinstance(value, str) or len(value) > longest or UNPRINTABLE.search(value):
        raise AnswerError(f"{name} that is no printable text of at most {longest} characters")


def texts(said: Mapping[str, Any], name: str, longest: int, most: int) -> list[str]:
    """At most so many texts, as `check_text`."""
    values = said.get(name)
    if not isinstance(values, list) or len(values) > most:
        raise AnswerError(f"{name} that are not at most {most} texts")
    for value in values:
        check_text(value, name, longest)
    return values


def indices(said: Mapping[str, Any], name: str, count: int, below: int) -> list[int] | None:
    """So many whole numbers from 0 to ``below``, or None."""
    values = said.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != count:
        raise AnswerError(f"{name} that are not {count}")
    if not all(type(value) is int and 0 <= value < below for value in values):
        raise AnswerError(f"{name} that are not numbers below {below}")
    return values

"""Untrusted configurations reduced to known keys, each with a type and bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from probelog.errors import FailureReason, ItemFailure

#: Returns the value as it is used, or raises ValueError.
Check = Callable[[object], Any]


def reduced(config: Mapping[str, Any], known: Mapping[str, Check], name: str) -> dict[str, Any]:
    """The known keys of a configuration that are not null, each as its check gives it back; no other key is looked at.

    Raises:
        ItemFailure: CORRUPT_CONFIG where a value is of another type or out of bounds.
    """
    kept = {}
    for key, check in known.items():
        value = config.get(key)
        if value is None:
            continue
        try:
            kept[key] = check(value)
        except ValueError as error:
            raise ItemFailure(
                FailureReason.CORRUPT_CONFIG, f"{name} says {key} = {str(value)[:60]}: {error}"
            ) from None
    return kept


def whole(least: int, most: int) -> Check:
    """A whole number in a range."""

    def check(value: object) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"expected a whole number from {least} to {most}")
        return value

    return check


def number(least: float, most: float) -> Check:
    """A finite number in a range."""

    def check(value: object) -> float:
        if type(value) not in (int, float) or not least <= value <= most or not math.isfinite(value):  # type: ignore[operator, arg-type]
            raise ValueError(f"expected a number from {least} to {most}")
        return float(value)  # type: ignore[arg-type]

    return check


def flag(value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def one_of(names: Collection[str]) -> Check:
    """One of some names."""

    def check(value: object) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"expected one of {', '.join(sorted(names))}")
        return value

    return check


def several(item: Check, most: int) -> Check:
    """A list of at most so many."""

    def check(value: object) -> list[Any]:
        if not isinstance(value, list) or not 1 <= len(value) <= most:
            raise ValueError(f"expected a list of 1 to {most} values")
        return [item(one) for one in value]

    return check


def either(*checks: Check) -> Check:
    """What the first of the checks accepts."""

    def check(value: object) -> object:
        for one in checks[:-1]:
            try:
                return one(value)
            except ValueError:
                continue
        return checks[-1](value)

    return check

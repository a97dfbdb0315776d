"""Records that come from JSON which somebody else wrote: every value is checked against the record's types."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from probelog.errors import StoreError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_MOST = 2**53
# Texts are names, dates and sentences; deeper than this no record is.
LONGEST_TEXT = 10_000
_DEEPEST = 16

Check = tuple[str, Callable[[Any], bool]]


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value of JSON is a number, perhaps not a finite one."""
    return type(value) in (int, float)


def is_finite(value: object) -> TypeGuard[int | float]:
    """Whether a value of JSON is a number that a float can hold."""
    return is_number(value) and abs(value) < 1e300  # an integer may be too large for a float


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value of JSON is a whole number of at least 0 that every reader of JSON understands."""
    return type(value) is int and 0 <= value <= _MOST


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value of JSON is a text of reasonable length."""
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def is_shallow(value: object, levels: int = _DEEPEST) -> bool:
    """Whether lists and objects are nested a few times at most: deeper ones exhaust the stack of what walks them."""
    if not isinstance(value, list | dict):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(is_shallow(item, levels - 1) for item in inner)


def each(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The check that a value is a list whose items all pass a check."""
    return lambda value: isinstance(value, list) and all(map(check, value))


# What any value of a type must be.
_CHECKS: dict[object, Check] = {
    bool: ("true or false", lambda value: type(value) is bool),
    int: ("a count", is_count),
    float: ("a finite number", is_finite),
    str: ("a text", is_text),
    dict[str, Any]: ("an object", lambda value: isinstance(value, dict) and is_shallow(value)),
    dict[str, str]: (
        "an object of texts",
        lambda value: isinstance(value, dict) and all(map(is_text, value.values())),
    ),
    list[str]: ("a list of texts", each(is_text)),
    list[int]: ("a list of counts", each(is_count)),
    list[float]: ("a list of finite numbers", each(is_finite)),
}

Record = TypeVar("Record", bound="DataclassInstance")


def read_record(kind: type[Record], content: object, where: str, label: str) -> Record:
    """Read and check what ``asdict`` of a record gave; unknown entries are ignored.

    A field's metadata may hold another check (``check``) than that of its type, or what reads it (``read``); a field
    of a record's type is read as such.

    Args:
        kind: the record.
        content: the JSON object.
        where: its address, for messages.
        label: its name, for messages.

    Raises:
        StoreError: it is no object, or an entry is missing or invalid.
    """
    if not isinstance(content, Mapping):
        raise StoreError(f"{where} is damaged: its {label} is no object")
    field_types = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        optional = isinstance(field_types[item.name], types.UnionType)
        hint = typing.get_args(field_types[item.name])[0] if optional else field_types[item.name]
        value: Any = content.get(item.name)
        if value is None and optional:
            values[item.name] = None
        elif "read" in item.metadata:
            values[item.name] = item.metadata["read"](content.get(item.name, {}))
        elif dataclasses.is_dataclass(hint):
            values[item.name] = read_record(
                typing.cast("type[Any]", hint), value, where, f"{label}' {item.name}"
            )
        else:
            requirement, is_valid = item.metadata.get("check") or _CHECKS[hint]
            if item.name not in content or not is_valid(value):
                problem = f"is {shown(value)}" if item.name in content else "is missing"
                raise StoreError(
                    f"{where} is damaged: {item.name} in its {label} {problem}; it must be {requirement}"
                )
            values[item.name] = float(value) if hint is float else value
    return kind(**values)


def shown(value: object) -> str:
    """A value for messages, short and harmless on a terminal. Long texts, numbers and nested lists would take their time to be written out."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if type(value) is int and abs(value) > _MOST:
        return "a number beyond 2^53"
    return ascii(value[:60] if isinstance(value, str) else value)

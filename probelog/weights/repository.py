"""The files of one downloaded repository, opened as untrusted input: plain files inside the folder, bounded JSON."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from probelog.errors import FailureReason, ItemFailure

#: 50,000 labels take 5 MB; a file made to be costly takes eighty times its size in Python objects.
MAX_JSON_BYTES = 16 << 20
_MAX_DEPTH = 40


def member(folder: Path, name: str) -> Path | None:
    """A file of the repository, or None where it has none of that name.

    Raises:
        ItemFailure: UNSAFE_PATH for a name with a folder in it, a link that leaves the repository, and anything
            that is not a plain file (a pipe would hang the reader).
    """
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        raise ItemFailure(
            FailureReason.UNSAFE_PATH, f"{name[:100]!r} is not the name of a file in the repository"
        )
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError:
        if path.is_symlink():
            raise ItemFailure(FailureReason.UNSAFE_PATH, f"{name} is a link to nothing") from None
        return None
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError before Python 3.13
        raise ItemFailure(FailureReason.UNSAFE_PATH, f"{name} cannot be resolved: {error}") from error
    if not real.is_relative_to(folder.resolve()):
        raise ItemFailure(FailureReason.UNSAFE_PATH, f"{name} is a link that leaves the repository")
    if not stat.S_ISREG(real.stat().st_mode):
        raise ItemFailure(FailureReason.UNSAFE_PATH, f"{name} is not a plain file")
    return real


def read_json(folder: Path, name: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    """A JSON object of the repository, or None where there is no such file.

    Stricter than Python's own reader: duplicate keys, deep nesting, whole numbers beyond 64 bits and anything but plain
    UTF-8 are refused, because two readers would understand such a file differently. ``Infinity`` and ``NaN``, which
    Python writes and reads, are taken, because configurations hold them where they do no harm: whoever uses a number
    checks that it is finite.

    Raises:
        ItemFailure: CORRUPT_CONFIG, or UNSAFE_PATH as `member`.
    """
    path = member(folder, name)
    if path is None:
        return None
    size = path.stat().st_size
    if size > max_bytes:
        raise ItemFailure(FailureReason.CORRUPT_CONFIG, f"{name} has {size} bytes; {max_bytes} are accepted")
    return parse_object(path.read_bytes(), name, FailureReason.CORRUPT_CONFIG, finite=False)


def parse_object(data: bytes, name: str, reason: FailureReason, *, finite: bool = True) -> dict[str, Any]:
    """Bytes as one JSON object, strictly (see `read_json`), by default with finite numbers only.

    Raises:
        ItemFailure: with the reason given.
    """
    numbers: dict[str, Any] = {"parse_constant": _refuse, "parse_float": _finite} if finite else {}
    try:
        # Decoded here: of bytes, `json.loads` would guess the encoding.
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_int=_bounded, **numbers)
    except (ValueError, RecursionError) as error:
        raise ItemFailure(reason, f"{name} is not sound JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise ItemFailure(reason, f"{name} holds {type(value).__name__}, not an object")
    if _nested_too_deep(value):
        raise ItemFailure(reason, f"{name} is nested more than {_MAX_DEPTH} deep")
    return value


def walk(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Every scalar below a JSON value, with the nearest key above it (list items bear their list's key)."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from walk(item, str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from walk(item, key)
    else:
        yield key, value


def _nested_too_deep(value: object) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        children = (
            box.values() if isinstance(box, dict) else box for box in level if isinstance(box, dict | list)
        )
        level = [item for items in children for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return mapping


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _bounded(text: str) -> int:
    value = int(text) if len(text) <= 20 else 1 << 64
    if not -(1 << 63) <= value < 1 << 64 or text == "-0":  # which other readers take for a fraction
        raise ValueError(f"{text[:20]} is no whole number of 64 bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is out of range")
    return value

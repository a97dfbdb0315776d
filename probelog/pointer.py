"""The pointer: a small file that says which generation of the index readers use, and those before it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import NoReturn

from probelog.errors import IndexNotFoundError, SchemaVersionError, StoreError
from probelog.storage import Store

POINTER = "current.json"
POINTER_VERSION = 2


@dataclass(frozen=True)
class Pointer:
    """Which generation is live, and which ones before it can still be returned to (newest first)."""

    generation: str
    source: str
    published: str
    previous: list[dict[str, str]] = field(default_factory=list)
    version: int = POINTER_VERSION

    def to_bytes(self) -> bytes:
        """The pointer file's content."""
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Pointer:
        """Read a pointer file.

        Raises:
            SchemaVersionError: published by a newer ProbeLog.
            StoreError: damaged.
        """
        try:
            content = json.loads(data)
            version = int(content["version"])
            if version > POINTER_VERSION:
                raise SchemaVersionError(
                    f"{where}: index version {version} is newer than this ProbeLog knows ({POINTER_VERSION}). "
                    "Upgrade ProbeLog."
                )
            return cls(
                **{name: _text(content[name]) for name in _FACTS},
                previous=[{name: _text(item[name]) for name in _FACTS} for item in content["previous"]],
                version=version,
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise StoreError(f"{where} is damaged ({error!r}). Delete it and publish again.") from error


_FACTS = ("generation", "source", "published")


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} is not a name")
    return value


def find_index(uri: str) -> Store:
    """The index at an address: its own, or that of a store that holds one.

    Raises:
        IndexNotFoundError: there is none; the message says what to do.
        StoreError: the address cannot be reached.
    """
    store = Store(uri)
    for candidate in (store, store.child("index")):
        try:
            if candidate.exists(POINTER):
                return candidate
        except OSError as error:
            _unreachable(candidate, error)
    raise IndexNotFoundError(
        f"no published index at {store.uri} (looked for {POINTER} there and in index/). "
        "Give the index's address or the store's, or publish one first: probelog-index publish"
    )


def read_pointer(index: Store) -> tuple[Pointer, bytes]:
    """The live pointer and its bytes (to swap against).

    Raises:
        IndexNotFoundError: there is none.
        SchemaVersionError: published by a newer ProbeLog.
        StoreError: it is damaged or cannot be read.
    """
    try:
        data = index.read_or_none(POINTER)
    except OSError as error:
        _unreachable(index, error)
    if data is None:
        raise IndexNotFoundError(f"no published index at {index.uri}: publish one first")
    return Pointer.from_bytes(data, index.path(POINTER)), data


def _unreachable(index: Store, error: OSError) -> NoReturn:
    raise StoreError(f"{index.uri} cannot be read: {error}") from error

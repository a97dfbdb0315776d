"""The pointer: a small file that names the generation of the index that readers use, and the others that are kept.

All state about generations is in this one file, which is replaced in one atomic step: readers and publishers see one
state or the next, and of two publishers that replace the same state one gets a conflict.
`probelog.publication.lifecycle` has the rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from probelog.errors import IndexNotFoundError, SchemaVersionError, StoreError
from probelog.storage.checksummed_json import sealed_json, unsealed_json
from probelog.storage.layout import INDEX, POINTER, is_generation_name
from probelog.storage.records import is_count, is_text, shown
from probelog.storage.store import Store
from probelog.storage.versions import MADE_BY, check_version

POINTER_VERSION = 1
# Some hundred bytes for every generation that is kept or waits to be deleted.
_MOST_BYTES = 16 << 20


@dataclass(frozen=True)
class Pointer:
    """The live generation, and the states of the others.

    Attributes:
        generation: name of the live generation.
        source: key of the data that it was made from.
        published: when it became live (UTC, ISO 8601).
        files: SHA-256 of its list of files; empty only for a generation that is not published yet.
        previous: ``generation``, ``source``, ``published``, ``files`` and, of updates, ``base`` and ``base_files`` of
            the earlier generations, newest first, that a rollback can return to.
        withdrawn: the same facts of the generations that were rolled back, oldest first, that a rollback can return
            to until the next publish.
        retired: generations that can never be live again, and since when (UTC by the store's clock): they are
            deleted when their last readers have had time to reopen.
        serial: grows with every change of the file, so that no content is ever written twice.
        base: the generation that the live one is an update of, if any.
        base_files: SHA-256 of that one's list of files.
        held: ``reason`` and ``since`` (UTC, ISO 8601), where nothing is to be published over the live generation.
    """

    generation: str
    source: str
    published: str
    files: str = ""
    previous: Sequence[Mapping[str, str | None]] = field(default_factory=list)
    withdrawn: Sequence[Mapping[str, str | None]] = field(default_factory=list)
    retired: Mapping[str, str] = field(default_factory=dict)
    serial: int = 1
    base: str | None = None
    base_files: str | None = None
    held: Mapping[str, str] | None = None
    version: int = POINTER_VERSION
    made_by: str = MADE_BY

    @property
    def facts(self) -> dict[str, str | None]:
        """The facts about the live generation that are kept when another one replaces it."""
        base = {} if self.base is None else {"base": self.base, "base_files": self.base_files}
        return {name: getattr(self, name) for name in _FACTS} | base

    @property
    def kept_facts(self) -> list[Mapping[str, str | None]]:
        """The facts of the generations that are live or that a rollback can return to, the live one first."""
        return [self.facts, *self.previous, *self.withdrawn]

    @property
    def referenced(self) -> list[str]:
        """Names of the generations that must not be deleted: those of ``kept_facts``, and their bases."""
        names = [str(item["generation"]) for item in self.kept_facts]
        bases = [str(item["base"]) for item in self.kept_facts if item.get("base") is not None]
        return list(dict.fromkeys([*names, *bases]))

    @property
    def choice(self) -> list[str]:
        """Names of the live and the earlier generations, newest first: changed by publishers and rollbacks, not by sweeps."""
        return [self.generation, *(str(item["generation"]) for item in self.previous)]

    def to_bytes(self) -> bytes:
        """The pointer file's content."""
        return sealed_json(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Pointer:
        """Read a pointer file.

        Raises:
            SchemaVersionError: published by a newer ProbeLog.
            StoreError: the file is damaged.
        """
        try:
            content = unsealed_json(data, where)
            check_version(content, POINTER_VERSION, where, "pointer")
            return cls(
                **_facts(content),
                previous=[_facts(item) for item in content["previous"]],
                withdrawn=[_facts(item) for item in content["withdrawn"]],
                retired={_name(name): _text(since) for name, since in content["retired"].items()},
                serial=_count(content["serial"]),
                held=_held(content.get("held")),
            )
        except SchemaVersionError:
            raise
        except StoreError as error:
            raise StoreError(f"{error}. Delete it and publish again.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{where} is damaged ({error!r:.200}). Delete it and publish again.") from error


_FACTS = ("generation", "source", "published", "files")
_OF_UPDATES = ("base", "base_files")
_NAMES = ("generation", "base")


def _facts(item: Mapping[str, Any]) -> dict[str, Any]:
    base = {} if item.get("base") is None else {name: _fact(item, name) for name in _OF_UPDATES}
    return {name: _fact(item, name) for name in _FACTS} | base


def _held(item: Mapping[str, Any] | None) -> dict[str, str] | None:
    return None if item is None else {name: _text(item[name]) for name in ("reason", "since")}


def _fact(item: Mapping[str, Any], name: str) -> str:
    return (_name if name in _NAMES else _text)(item[name])


def _name(value: object) -> str:
    if not is_generation_name(value):
        raise TypeError(f"{shown(value)} is not a generation's name")
    return str(value)


def _text(value: object) -> str:
    if not is_text(value) or not value:
        raise TypeError(f"{shown(value)} is not a text")
    return value


def _count(value: object) -> int:
    if not is_count(value):
        raise TypeError(f"{shown(value)} is not a count")
    return value


def find_index(uri: str) -> Store:
    """The index at an address: of the index itself, or of a store that holds one.

    Raises:
        IndexNotFoundError: there is none; the message says what to do.
        StoreError: the address cannot be reached.
    """
    store = Store(uri)
    for candidate in (store, store.child(INDEX)):
        if candidate.exists(POINTER):
            return candidate
    raise IndexNotFoundError(
        f"no published index at {store.uri} (looked for {POINTER} there and in {INDEX}/). "
        "Give the index's address or the store's, or publish one first: probelog-index publish"
    )


def store_around(index: Store) -> Store:
    """The store that an index lies in; the index itself where it lies in none."""
    parent, _, folder = index.uri.rpartition("/")
    return Store(parent) if folder == INDEX and parent else index


def read_pointer(index: Store) -> tuple[Pointer, bytes]:
    """The pointer and its bytes, which a swap compares with.

    Raises:
        IndexNotFoundError: there is none.
        SchemaVersionError: published by a newer ProbeLog.
        StoreError: it is damaged or cannot be read.
    """
    data = index.read_or_none(POINTER, _MOST_BYTES)
    if data is None:
        raise IndexNotFoundError(f"no published index at {index.uri}: publish one first")
    return Pointer.from_bytes(data, index.path(POINTER)), data

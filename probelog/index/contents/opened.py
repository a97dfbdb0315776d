"""A published generation opened: its settings, its tables, its base, and how values of its ``meta`` are read.

A generation is whole, or an *update* of a whole one, its *base* (``probelog.publication.update``): it holds the added
models, lists the base's models that were removed, and shares probes, background, encoder and vector index with the
base. To the reader both look alike.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt

from probelog.errors import StoreError
from probelog.index.conditions import filtered_columns, not_understood, unknown_column
from probelog.index.pointer import Pointer
from probelog.index.schema import INDEX_VERSION
from probelog.index.settings import GenerationSettings
from probelog.index.tables import Tables, first_line
from probelog.storage.encoding import from_npy
from probelog.storage.versions import check_version
from probelog.terminal import printable

if TYPE_CHECKING:
    from probelog.storage.store import Store

T = TypeVar("T")

# What LanceDB says about a column that it does not have, and before a statement that it made of a condition.
_UNKNOWN_COLUMN = re.compile(r"Schema error: No field named (\S+)\.( |$)")
_NO_CONDITION = ("Error parsing statement", "Error resolving filter", "rust future panicked")
# Logits, or models, of an index that is not large: several times as many as the publisher keeps there.
_MOST_IN_MEMORY = 1_000_000


def _only(count: int) -> range:
    return range(count, count + 1)


class Once(Generic[T]):
    """Like ``cached_property``, but made once even when several threads ask at the same time."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._name = make.__name__
        self.__doc__ = make.__doc__

    @overload
    def __get__(self, owner: None, kind: type) -> Once[T]: ...
    @overload
    def __get__(self, owner: OpenedGeneration, kind: type) -> T: ...
    def __get__(self, owner: OpenedGeneration | None, kind: type) -> Once[T] | T:
        if owner is None:
            return self
        with owner._lock:
            cache = owner.__dict__
            if self._name not in cache:
                cache[self._name] = self._make(
                    owner
                )  # an instance's dictionary is looked up before this descriptor
            value: T = cache[self._name]
            return value


class OpenedGeneration:
    """What every part of a generation reads with (``probelog.index.generation.Generation``)."""

    def __init__(self, index: Store, pointer: Pointer) -> None:
        self.index = index
        self.pointer = pointer
        self._lock = threading.RLock()
        self._tables = Tables(index, pointer.generation)
        where = f"{index.uri}: generation {pointer.generation}"
        content = self._json(self._tables.meta("settings"), "settings")
        if not isinstance(content, dict):
            raise self._tables.damaged("settings", "they are no object")
        check_version(content, INDEX_VERSION, index.uri, "index")
        self.settings = settings = GenerationSettings.from_dict(content, where)
        base = settings.base
        if base is not None and (base.generation == pointer.generation or base.rows > settings.rows):
            raise self._tables.damaged("settings", "it cannot be an update of its base")
        if not settings.large and max(settings.rows, settings.models) > _MOST_IN_MEMORY:
            raise self._tables.damaged(
                "settings", "it is too large to be held in memory, and not marked as large"
            )
        # Rows from this number on are the update's.
        self._base_row_count = settings.rows if base is None else base.rows
        self._base_model_count = settings.models if base is None else base.models
        self._base = self._tables if base is None else Tables(index, base.generation)
        self._tables.expect(
            {"logits": _only(settings.rows - self._base_row_count), "models": range(settings.models + 1)}
        )
        if settings.edges is not None:
            self._tables.expect({"edges": _only(settings.edges)})
        self._base.expect(
            {
                "logits": _only(self._base_row_count),
                "models": _only(self._base_model_count),
                "probes": _only(settings.probes),
            }
        )

    @property
    def is_update(self) -> bool:
        """Whether it is an update of another generation."""
        return self._base is not self._tables

    def meta(self, key: str) -> bytes:
        """One value of the ``meta`` table, of an update's base where the update lacks it."""
        value = self._tables.meta(key)
        if value is None and self.is_update:
            value = self._base.meta(key)
        if value is None:
            raise StoreError(f"{self.index.uri}: generation {self.pointer.generation} has no {key!r}")
        return value

    def _json(self, data: bytes | None, key: str) -> object:
        try:
            return json.loads(data or b"{}")
        except (ValueError, RecursionError) as error:
            raise self._tables.damaged(key, f"it is no JSON: {printable(error, 100)}") from None

    def _array(self, key: str, shape: Sequence[int | range | None], kinds: str = "f") -> npt.NDArray[Any]:
        """An array of the ``meta`` table, of a shape (None: any size) and of finite numbers of some kinds.

        Raises:
            StoreError: it is not such an array.
        """
        try:
            array = from_npy(self.meta(key))
        except ValueError as error:
            raise self._tables.damaged(key, printable(error)) from None
        expected = len(shape) == array.ndim and all(
            size is None or (actual in size if isinstance(size, range) else actual == size)
            for actual, size in zip(array.shape, shape, strict=True)
        )
        if not expected or array.dtype.kind not in kinds:
            raise self._tables.damaged(key, f"it holds {array.dtype} numbers of shape {array.shape}")
        if not np.isfinite(array).all():
            raise self._tables.damaged(key, "it holds numbers that are not finite")
        return array

    def damaged(self, subject: str, reason: str) -> StoreError:
        """The error for a table or value that is not what every index has."""
        return self._tables.damaged(subject, reason)

    @property
    def size(self) -> int:
        """Number of rows of the ``logits`` table: logits of distinct weights, those of removed models included."""
        return self.settings.rows

    @property
    def large(self) -> bool:
        """Whether it is searched by a shortlist instead of being held in memory."""
        return self.settings.large

    @contextlib.contextmanager
    def _filter_errors(
        self, condition: str | None, name: str, tables: Tables | None = None
    ) -> Iterator[None]:
        """Turn the StoreError of a table over a condition that is not understood into a QueryError.

        Args:
            condition: that was asked.
            name: of the table.
            tables: where it lies; by default with the base's.
        """
        tables = tables or self._base
        try:
            yield
        except StoreError as error:
            if error.__cause__ is None or condition is None:  # what was read is damaged
                raise
            columns = filtered_columns(name)
            # Raises StoreError if the table is at fault, not the condition.
            tables.rows(name, columns[:1], limit=1)
            present = tables.present(name, columns)
            message = first_line(error.__cause__ or error)
            if unknown := _UNKNOWN_COLUMN.match(message):
                column = unknown[1].strip("`\"'")
                reason = unknown_column(column, present)
                if f'"{column}"' in condition:
                    reason += f" (texts are written in single quotes: '{column}')"
            elif message.startswith(_NO_CONDITION):  # what follows is the statement that LanceDB made of it
                reason = "it is no SQL condition"
            else:
                reason = message
            raise not_understood(name, reason, present) from error

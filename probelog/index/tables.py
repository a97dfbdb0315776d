"""Reading the LanceDB tables of one generation."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from probelog.arrays import Column
from probelog.errors import StoreError
from probelog.index.generators.groups import GROUPS
from probelog.index.generators.schema import GENERATOR_FACTS, GENERATOR_TABLE, SHOWN
from probelog.index.local_files import check_files
from probelog.index.schema import (
    META,
    MODEL_FACTS,
    MODELS,
    PROBED_FACTS,
    connect,
    new_session,
    open_for_search,
    probes_schema,
)
from probelog.storage.layout import GenerationFolder
from probelog.storage.schemas import EDGES, LISTED_FACTS, TREE_FACTS
from probelog.storage.store import Store
from probelog.terminal import printable

if TYPE_CHECKING:
    from lancedb.table import AsyncTable, Table

# Parts of LanceDB's messages that say nothing to users: its prefix, and lines of its source code.
_NOISE = re.compile(r"^(Invalid input, |lance error: )+|,? ?\S*/\S+\.rs:\d+(:\d+)?")
# The pattern takes the square of a message's length, and messages hold what the index says.
_LONGEST_MESSAGE = 1000
_LIBRARY_ERRORS = (OSError, ValueError, LookupError, TypeError, RuntimeError, ArithmeticError, MemoryError)
_PANICS = {"PanicException", "RustPanic"}
# Numbers of an embedding.
_LONGEST_VECTOR = 1 << 16

_SCHEMAS = {
    "meta": META,
    "models": MODELS,
    "probes": probes_schema(1),
    "edges": EDGES,
    "generators": GENERATOR_TABLE.append(SHOWN),
    "groups": GROUPS,
}
# Columns that tables of older versions lack.
_OPTIONAL = {
    "models": {*PROBED_FACTS, *LISTED_FACTS, *TREE_FACTS},
    "generators": {*LISTED_FACTS, *TREE_FACTS, SHOWN.name},
}
# Columns without which a row is none.
_REQUIRED = {
    "meta": {"value"},
    "models": {"id", "weights", "first_row", "rows", "repo", "logits", "copies"},
    "probes": {"id", "embedding"},
    "logits": {"facts"},
    "generators": {
        "id",
        "row",
        "repo",
        "sha",
        "pipeline",
        "architecture",
        "conditioning",
        "copies",
        "pictures",
        "samples",
    },
    "samples": {"row", "generator", "description"},
    "groups": {"row", "vector"},
    "edges": {"child", "parent", "relation", "probability", "weight", "latent", "evidence"},
}


class Tables:
    """The tables in one generation's folder, opened when first needed. Safe to share between threads.

    Raises:
        StoreError: the folder is missing, or the store cannot be reached.
    """

    def __init__(self, index: Store, generation: str) -> None:
        self._index = index
        self._generation = generation
        self._lock = threading.RLock()
        self._tables: dict[str, Table] = {}
        self._searched: dict[str, AsyncTable] = {}
        self._columns: dict[str, set[str]] = {}
        self._counts: dict[str, range] = {}
        with self.reading("settings"):
            if index.is_local:
                folder = Path(index.path(GenerationFolder.of(generation).path))
                # LanceDB would make the missing folder.
                if not folder.is_dir():
                    raise FileNotFoundError("there is no such folder; publish again or roll back")
                check_files(Path(index.root), folder)
            self._session = new_session()
            self._connection = connect(index, generation, self._session)

    def expect(self, counts: Mapping[str, range]) -> None:
        """Refuse tables from now on whose number of rows is another than the settings say."""
        self._counts.update(counts)

    def open(self, name: str) -> Table:
        """LanceDB's handle of a table, which has the columns and as many rows as it must have."""
        with self._lock:
            if name not in self._tables:
                table = self._connection.open_table(name)
                self._columns[name] = self._check(name, table)
                self._tables[name] = table
            return self._tables[name]

    def open_for_search(self, name: str) -> AsyncTable:
        """LanceDB's handle that a table's vector index is searched by; the table is checked as any other."""
        with self._lock:
            if name not in self._searched:
                self.open(name)
                self._searched[name] = open_for_search(self._index, self._generation, self._session, name)
            return self._searched[name]

    def _check(self, name: str, table: Table) -> set[str]:
        """Refuse a table that is not what it must be; returns the names of its columns, which LanceDB reads at every request."""
        # Of logits, one column is read, and its type follows from the basis (`structured`).
        expected = _SCHEMAS.get(name, pa.schema([]))
        schema = table.schema
        for field in expected:
            if field.name not in schema.names:
                if field.name not in _OPTIONAL.get(name, ()):
                    raise ValueError(f"it has no {field.name}")
            elif not _is_type(schema.field(field.name).type, field.type):
                kind = printable(schema.field(field.name).type, 60)
                raise ValueError(f"its {field.name} is {kind} in place of {field.type}")
        if name in self._counts and (count := table.count_rows()) not in self._counts[name]:
            raise ValueError(f"it has {count} rows, and the settings say otherwise")
        return set(schema.names)

    def rows(
        self, name: str, columns: Sequence[str], where: str | None = None, limit: int | None = None
    ) -> pa.Table:
        """Columns of a table's rows, all of them or those that meet an SQL condition."""
        with self.reading(name):
            table = self.open(name)
            query = (
                table.search().select(self.present(name, columns)).limit(limit or max(1, table.count_rows()))
            )
            found = completed((query if where is None else query.where(where)).to_arrow(), columns)
        self.check_rows(name, found)
        return found

    def blocks(
        self, name: str, columns: Sequence[str], where: str | None, batch_size: int
    ) -> Iterator[pa.Table]:
        """The same rows in blocks, which are read as they are asked for; the columns must be in every such table."""
        with self.reading(name):
            table = self.open(name)
            query = table.search().select(list(columns)).limit(max(1, table.count_rows()))
            batches = (query if where is None else query.where(where)).to_batches(batch_size=batch_size)
        while True:
            with self.reading(name):
                batch = next(batches, None)
            if batch is None:
                return
            block = pa.Table.from_batches([batch])
            self.check_rows(name, block)
            yield block

    def check_rows(self, name: str, rows: pa.Table) -> None:
        """Refuse rows that lack a value which every row has, or have a number below 0.

        Raises:
            StoreError: there is such a row.
        """
        for column in rows.column_names:
            values = rows[column]
            if column in _REQUIRED[name] and values.null_count:
                raise self.damaged(name, f"a row has no {column}")
            if pa.types.is_integer(values.type) and (pc.min(values).as_py() or 0) < 0:
                raise self.damaged(name, f"a row has a {column} below 0")
            if pa.types.is_nested(values.type) and _has_null_items(values):
                raise self.damaged(name, f"a row has a {column} with something missing")

    def present(self, name: str, columns: Sequence[str]) -> list[str]:
        """Those of the columns to ask a table for: one that was written before a fact was added does not have it."""
        self.open(name)
        names, optional = self._columns[name], _OPTIONAL.get(name, ())
        return [column for column in columns if column in names or column not in optional]

    def count(self, name: str, where: str) -> int:
        """Number of a table's rows that meet an SQL condition."""
        with self.reading(name):
            return int(self.open(name).count_rows(where))

    def meta(self, key: str) -> bytes | None:
        """One value of the ``meta`` table; None without one."""
        rows = self.rows("meta", ["value"], f"key = {sql_literal(key)}", limit=1)
        return bytes(rows["value"][0].as_py()) if rows.num_rows else None

    @contextlib.contextmanager
    def reading(self, subject: str) -> Iterator[None]:
        """Turn LanceDB's errors into a StoreError that names ``subject``, the table or value that was read."""
        try:
            yield
        except BaseException as error:  # reason: of a panic in LanceDB's own code, too, which is no Exception
            # LanceDB raises any of these for tables that are missing, damaged or out of reach.
            if not isinstance(error, _LIBRARY_ERRORS) and type(error).__name__ not in _PANICS:
                raise
            message = first_line(error)
            if not self._index.is_local and "credentials" in message.casefold():
                variable = {"gs": "GOOGLE", "az": "AZURE"}.get(self._index.scheme, "AWS") + "_SKIP_SIGNATURE"
                message += f" (for a bucket that is open to everybody set {variable}=true)"
            raise StoreError(
                f"{self._index.uri}: generation {self._generation} cannot be read ({subject}): {message}"
            ) from error

    def gap_error(self, name: str) -> StoreError:
        """The error for a table that lacks rows."""
        return StoreError(f"{self._index.uri}: the {name} table of generation {self._generation} has gaps")

    def damaged(self, subject: str, reason: str) -> StoreError:
        """The error for a table or value that is not what every index has."""
        return StoreError(
            f"{self._index.uri}: generation {self._generation} is damaged ({subject}): {reason}. "
            "Publish again or roll back."
        )


def completed(rows: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Rows with all of these columns, in this order; of facts that the table does not have nothing is known."""
    for column in columns:
        if column not in rows.column_names:
            facts = MODEL_FACTS if column in MODEL_FACTS.names else GENERATOR_FACTS
            kind = facts.field(column).type
            unknown: list[object] = [[] if pa.types.is_list(kind) else None] * rows.num_rows
            rows = rows.append_column(column, pa.array(unknown, kind))
    return rows.select(list(columns))


def sql_literal(text: str) -> str:
    """A text as an SQL literal, quoted and escaped."""
    return "'" + text.replace("'", "''") + "'"


def is_valid_sql_text(text: str) -> bool:
    """Whether an SQL literal can hold a text: no zero byte and no lone surrogate, which no repository's name has."""
    return "\x00" not in text and text.encode("utf-8", "replace").decode() == text


def sql_in(column: str, values: Iterable[int | str]) -> str:
    """The SQL condition that a column has one of these numbers or texts."""
    listed = ", ".join(sql_literal(value) if isinstance(value, str) else str(int(value)) for value in values)
    return f"{column} IN ({listed})" if listed else "false"


def first_line(error: BaseException) -> str:
    """First line of a LanceDB error's message, at most 300 characters, without its prefix and source lines."""
    lines = _NOISE.sub("", str(error)[:_LONGEST_MESSAGE].strip()).splitlines()
    return printable(lines[0].strip(), 300) if lines else printable(repr(error), 300)


def _is_type(found: pa.DataType, expected: pa.DataType) -> bool:
    if isinstance(expected, pa.FixedSizeListType):  # of a length that other parts of the index say
        return (
            isinstance(found, pa.FixedSizeListType)
            and found.value_type == expected.value_type
            and 0 < found.list_size <= _LONGEST_VECTOR
        )
    return found == expected


def _has_null_items(values: Column) -> bool:
    """Whether some item of lists, or some entry of it, is missing."""
    items = pc.list_flatten(values)
    entries: list[Any] = list(items.flatten()) if pa.types.is_struct(items.type) else []
    return bool(items.null_count or any(entry.null_count for entry in entries))

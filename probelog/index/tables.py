"""Reading the LanceDB tables of one generation."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from probelog.errors import StoreError
from probelog.index.schema import MODEL_FACTS, connect
from probelog.storage.layout import GenerationFolder
from probelog.storage.schemas import LISTED_FACTS
from probelog.storage.store import Store

if TYPE_CHECKING:
    from lancedb.table import Table

# Parts of LanceDB's messages that say nothing to users: its prefix, and lines of its source code.
_NOISE = re.compile(r"^(Invalid input, |lance error: )+|,? ?\S*/\S+\.rs:\d+(:\d+)?")


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
        with self.reading("settings"):
            # LanceDB would make the missing folder.
            if index.is_local and not Path(index.path(GenerationFolder.of(generation).path)).is_dir():
                raise FileNotFoundError("there is no such folder; publish again or roll back")
            self._connection = connect(index, generation)

    def open(self, name: str) -> Table:
        """LanceDB's handle of a table."""
        with self._lock:
            if name not in self._tables:
                self._tables[name] = self._connection.open_table(name)
            return self._tables[name]

    def rows(
        self, name: str, columns: Sequence[str], where: str | None = None, limit: int | None = None
    ) -> pa.Table:
        """Columns of a table's rows, all of them or those that meet an SQL condition."""
        with self.reading(name):
            table = self.open(name)
            query = (
                table.search().select(self.present(name, columns)).limit(limit or max(1, table.count_rows()))
            )
            return completed((query if where is None else query.where(where)).to_arrow(), columns)

    def present(self, name: str, columns: Sequence[str]) -> list[str]:
        """Those of the columns to ask a table for: one that was written before a fact was added does not have it."""
        names = self.open(name).schema.names
        return [column for column in columns if column in names or column not in LISTED_FACTS]

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
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            # LanceDB raises any of these for tables that are missing, damaged or out of reach.
            message = first_line(error)
            if not self._index.is_local and "credentials" in message.casefold():
                message += " (for a bucket that is open to everybody set AWS_SKIP_SIGNATURE=true)"
            raise StoreError(
                f"{self._index.uri}: generation {self._generation} cannot be read ({subject}): {message}"
            ) from error

    def gap_error(self, name: str) -> StoreError:
        """The error for a table that lacks rows."""
        return StoreError(f"{self._index.uri}: the {name} table of generation {self._generation} has gaps")


def completed(rows: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Rows with all of these columns, in this order; of facts that the table does not have nothing is known."""
    for column in columns:
        if column not in rows.column_names:
            kind = MODEL_FACTS.field(column).type
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
    lines = _NOISE.sub("", str(error).strip()).splitlines()
    return lines[0].strip()[:300] if lines else repr(error)

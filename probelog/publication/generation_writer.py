"""The writer of one generation's tables."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from probelog.errors import StoreError
from probelog.index.schema import META, connect
from probelog.index.tables import first_line
from probelog.publication.lifecycle import list_files, renew, reserve
from probelog.publication.stream import run_consumer_in_thread
from probelog.storage.store import Store

if TYPE_CHECKING:
    from lancedb.table import Table

_RENEW_SECONDS = 60.0


class GenerationWriter:
    """Builds one generation's tables. Nothing is live before ``go_live`` is called with its name.

    Raises:
        StoreError: there is a generation of this name already.
    """

    def __init__(self, index: Store, name: str) -> None:
        self.index = index
        self.name = name
        reserve(index, name)
        self._renewed = time.monotonic()
        self._connection = connect(index, name)

    def write(self, table: str, schema: pa.Schema, batches: Iterable[pa.Table]) -> int:
        """Stream batches into a table; returns its number of rows.

        Raises:
            StoreError: the store refuses, or LanceDB counts other rows than were written.
        """
        rows = 0
        renew(self.index, self.name)

        def counted_batches() -> Iterator[pa.RecordBatch]:
            nonlocal rows
            for batch in batches:
                rows += batch.num_rows
                self._renew_if_due()
                yield from batch.to_batches()

        def create_table(received: Iterator[pa.RecordBatch]) -> Table:
            # One streamed write: LanceDB cuts it into fragments of a good size, whatever the batches' sizes.
            reader = pa.RecordBatchReader.from_batches(schema, received)
            with self.writing(table):
                return self._connection.create_table(table, data=reader, schema=schema)

        opened = run_consumer_in_thread(counted_batches(), create_table)
        if opened.count_rows() != rows:
            raise StoreError(f"table {table}: wrote {rows} rows, LanceDB counts {opened.count_rows()}")
        return rows

    def open(self, table: str) -> Table:
        """Open a table that was written."""
        return self._connection.open_table(table)

    def index_columns(self, table: str, *columns: str) -> None:
        """Make rows of a written table quick to find by any of these columns."""
        from lancedb.index import BTree

        with self.writing(f"indexes of {table}"):
            for column in columns:
                self.open(table).create_index(column, config=BTree())

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """What LanceDB raises where the store refuses becomes a StoreError that says what was written."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            # reason: LanceDB raises these, as it comes, for a full disk and a store out of reach
            raise StoreError(
                f"{self.index.uri}: generation {self.name} cannot be written ({what}): {first_line(error)}"
            ) from error

    def write_meta(self, values: dict[str, bytes]) -> None:
        """Write the ``meta`` table: named byte strings."""
        self.write("meta", META, [pa.table({"key": list(values), "value": list(values.values())}, META)])

    def finish(self) -> str:
        """Write the list of the generation's files; returns its digest. Nothing may be written after it.

        Raises:
            StoreError: a sweep retired the generation meanwhile, or the store cannot be written.
        """
        renew(self.index, self.name)
        return list_files(self.index, self.name)

    def _renew_if_due(self) -> None:
        if time.monotonic() - self._renewed > _RENEW_SECONDS:
            self._renewed = time.monotonic()
            renew(self.index, self.name)

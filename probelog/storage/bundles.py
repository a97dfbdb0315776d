"""Many receipts in one object, so that reading a large ledger takes hundreds of requests, not hundreds of thousands.

A *bundle* repeats the receipts of some batches and the failures that their parts hold. It is a copy and proves nothing:
receipts stay where they are, a reader takes of a bundle what it has seen a receipt of, and passes over one that is damaged
or of a newer ProbeLog.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from probelog.arrays import values_of
from probelog.errors import StoreError
from probelog.storage.encoding import digest, parquet_bytes
from probelog.storage.layout import LedgerFolder
from probelog.storage.schemas import BUNDLE, FAILURES
from probelog.storage.store import Store
from probelog.storage.versions import check_schema

#: Receipts of one bundle. Fewer are read one by one.
BUNDLED = 1000
_READERS = 8
_log = logging.getLogger(__name__)


class Bundles:
    """The bundles of a ledger."""

    def __init__(self, store: Store, paths: LedgerFolder) -> None:
        self._store = store
        self._paths = paths

    def write(self, names: Sequence[str], receipts: Sequence[bytes], failures: Sequence[pa.Table]) -> None:
        """Write one bundle: names of receipts, their bytes, and the failures of each (``FAILURES``)."""
        rows = [table.to_struct_array().combine_chunks() for table in failures]
        offsets = pa.array([0, *(len(array) for array in rows)], pa.int32())
        lists = pa.ListArray.from_arrays(
            pc.cumulative_sum(offsets), pa.concat_arrays([array.cast(_FAILURE) for array in rows])
        )
        columns = [pa.array(names, pa.string()), pa.array(receipts, pa.large_binary()), lists]
        data = parquet_bytes(pa.table(columns, schema=BUNDLE), use_dictionary=False)
        self._store.write(self._paths.bundle(digest(data)), data)

    def receipts(self) -> Iterator[tuple[str, bytes]]:
        """The bytes of all bundled receipts, by name; one may be in two bundles."""
        for table in self._tables(["name", "receipt"]):
            yield from zip(values_of(table["name"], str), table["receipt"].to_pylist(), strict=True)

    def failures(self, names: Collection[str]) -> tuple[set[str], list[pa.Table]]:
        """Those of some receipts that are bundled, and the failures that their parts hold."""
        bundled: set[str] = set()
        tables = []
        for table in self._tables(["name", "failures"]):
            here = [name in names and name not in bundled for name in values_of(table["name"], str)]
            table = table.filter(pa.array(here, pa.bool_()))
            bundled.update(values_of(table["name"], str))
            flat: Any = pc.list_flatten(table["failures"])
            tables.append(pa.Table.from_struct_array(flat.combine_chunks()).cast(FAILURES))
        return bundled, tables

    def _tables(self, columns: list[str]) -> Iterator[pa.Table]:
        with ThreadPoolExecutor(_READERS) as pool:
            names = self._store.names(self._paths.bundles, suffix=".parquet")
            for start in range(0, len(names), _READERS):
                some = names[start : start + _READERS]
                yield from filter(None, pool.map(lambda name: self._readable(name, columns), some))

    def _readable(self, name: str, columns: list[str]) -> pa.Table | None:
        try:
            return self.read(name, columns)
        except (StoreError, FileNotFoundError) as error:
            _log.warning("a bundle of receipts is not used: %s", error)
            return None

    def read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """One bundle, all columns of ``BUNDLE`` or some.

        Raises:
            SchemaVersionError, StoreError: written by a newer ProbeLog, or damaged.
        """
        data = self._store.read(name)
        if name != self._paths.bundle(digest(data)):
            raise StoreError(f"{self._store.path(name)} is damaged: it is a copy of receipts, delete it")
        file = pq.ParquetFile(pa.BufferReader(data))
        check_schema(file.schema_arrow, BUNDLE, self._store.path(name))
        return file.read(columns)


_FAILURE = BUNDLE.field("failures").type.value_type

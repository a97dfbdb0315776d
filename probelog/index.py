"""The published index: its LanceDB tables, and the generations that a small pointer file tells apart.

An index lies under ``STORE/index``::

    current.json                     the pointer: which generation readers use, and those before it
    generations/NAME/logits.lance    a row per logit of distinct weights: direction, offset, the probes that fire it most;
                                     in a large index under a vector index
    generations/NAME/models.lance    a row per model: its facts, declared labels, and which rows of logits are its own
    generations/NAME/probes.lance    a row per probe: thumbnail and embedding
    generations/NAME/meta.lance      settings, background, text and image encoder
    generations/NAME/files.json      every file of these tables with its size and digest
    generations/NAME/hold.json       while it is being built

A generation is built whole under a new name, then the pointer is swapped in one atomic step. Readers never see
a half-built one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from probelog.directions import Basis
from probelog.errors import StoreError
from probelog.handover import handed_over
from probelog.publishing import folder_of, list_files, renew, reserve
from probelog.storage import Store, lance_options

# Of a generation, in its settings; the pointer has a version of its own.
INDEX_VERSION = 4
_RENEW_SECONDS = 60.0


# What one generation's connection keeps in memory of indexes and of tables' metadata, however large they are.
_INDEX_CACHE = 256 << 20
_METADATA_CACHE = 64 << 20


def connect(index: Store, generation: str) -> Any:
    """LanceDB's connection to one generation."""
    import lancedb

    return lancedb.connect(
        index.path(folder_of(generation)),
        storage_options=lance_options(index.uri) or None,
        session=lancedb.Session(_INDEX_CACHE, _METADATA_CACHE),
    )


# What is known of a model, whoever asks.
MODEL_FACTS = pa.schema(
    [
        ("repo", pa.string()),
        ("sha", pa.string()),
        ("library", pa.string()),
        ("pipeline_tag", pa.string()),
        ("architecture", pa.string()),
        ("head", pa.string()),
        ("logits", pa.int32()),
        ("labels", pa.list_(pa.string())),
        ("licence", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("downloads", pa.int64()),
        ("likes", pa.int64()),
        ("last_modified", pa.timestamp("ms", tz="UTC")),
        ("parameters", pa.int64()),
        ("base_model", pa.string()),
        ("weight_digest", pa.string()),
        ("observed", pa.int32()),
        ("copies", pa.int32()),  # models with these weights, this one counted
    ]
)

# Besides the facts: ``weights`` is the number of the first model with the same weights, which all of them share the
# rows ``first_row`` .. ``first_row + rows`` of the logits table with; ``identity`` is equal for just these models.
MODELS = pa.schema(
    [
        ("id", pa.int32()),
        ("weights", pa.int32()),
        ("first_row", pa.int64()),
        ("rows", pa.int32()),
        ("identity", pa.string()),
        *MODEL_FACTS,
    ]
)

META = pa.schema([("key", pa.string()), ("value", pa.large_binary())])

# How many of the probes that fire a logit most an index keeps, for people to look at.
SHOWN_PROBES = 8


def logits_schema(basis: Basis, probes: int) -> pa.Schema:
    """Schema of the ``logits`` table: ``vector`` to be looked up by, and ``facts``, a value of ``logit_facts``.

    Args:
        basis: of its directions.
        probes: how many there are.
    """
    return pa.schema(
        [
            ("vector", pa.list_(pa.float16(), basis.width)),
            ("facts", pa.binary(logit_facts(basis, probes).itemsize)),
        ]
    )


def logit_facts(basis: Basis, probes: int) -> np.dtype[np.void]:
    """What is known of a logit, as one value of fixed size; ``row`` is its number in the table.

    To fetch the rows of a shortlist from here and there is what a question costs most, and it costs a read for each
    row and column: with the same numbers in eight columns four times as much.
    """
    return np.dtype(
        [
            ("row", "<u4"),
            ("weights", "<i4"),
            ("logit", "<i4"),
            ("offset", "<f4"),
            ("scale", "<f4"),
            ("precise", "<f2", basis.precise),
            ("rest", np.int8, len(basis.axes) - basis.precise),
            ("negated", "?"),
            ("probes", "<u2" if probes <= 1 << 16 else "<u4", min(SHOWN_PROBES, probes)),
        ]
    )


def probes_schema(dimension: int) -> pa.Schema:
    """Schema of the ``probes`` table."""
    return pa.schema(
        [
            ("id", pa.int32()),
            ("name", pa.string()),
            ("sha256", pa.string()),
            ("thumbnail", pa.binary()),
            ("embedding", pa.list_(pa.float32(), dimension)),
        ]
    )


def fixed_lists(matrix: np.ndarray[Any, Any], value_type: pa.DataType) -> pa.FixedSizeListArray:
    """A (N, w) matrix as an Arrow column of N fixed-size lists."""
    flat = pa.array(np.ascontiguousarray(matrix).reshape(-1), value_type)
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])


def matrix_of(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """An Arrow column of fixed-size lists as a (N, w) matrix."""
    width = column.type.list_size
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    if not chunks:
        return np.empty((0, width), column.type.value_type.to_pandas_dtype())
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def fixed_binary(values: np.ndarray[Any, Any]) -> pa.FixedSizeBinaryArray:
    """A (N,) structured array as an Arrow column of N fixed-size byte strings."""
    kind = pa.binary(values.dtype.itemsize)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def structured(column: pa.ChunkedArray, kind: np.dtype[np.void]) -> np.ndarray[Any, Any]:
    """An Arrow column of fixed-size byte strings as the (N,) structured array that it was.

    Raises:
        ValueError: its values have another size.
    """
    if column.type != pa.binary(kind.itemsize):
        raise ValueError(f"values of {column.type} instead of {kind.itemsize} bytes")
    chunks = [
        np.frombuffer(chunk.buffers()[1], kind, len(chunk), chunk.offset * kind.itemsize)
        for chunk in column.chunks
        if len(chunk)
    ]
    if not chunks:
        return np.empty(0, kind)
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


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
            StoreError: LanceDB counts other rows than were written.
        """
        rows = 0
        renew(self.index, self.name)

        def counted() -> Iterator[pa.RecordBatch]:
            nonlocal rows
            for batch in batches:
                rows += batch.num_rows
                self._stay()
                yield from batch.to_batches()

        def written(received: Iterator[pa.RecordBatch]) -> Any:
            # One streamed write: LanceDB cuts it into fragments of a good size, whatever the batches' sizes.
            reader = pa.RecordBatchReader.from_batches(schema, received)
            return self._connection.create_table(table, data=reader, schema=schema)

        opened = handed_over(counted(), written)
        if opened.count_rows() != rows:
            raise StoreError(f"table {table}: wrote {rows} rows, LanceDB counts {opened.count_rows()}")
        return rows

    def open(self, table: str) -> Any:
        """A table that was written."""
        return self._connection.open_table(table)

    def write_meta(self, values: dict[str, bytes]) -> None:
        """Write the ``meta`` table: named byte strings."""
        self.write("meta", META, [pa.table({"key": list(values), "value": list(values.values())}, META)])

    def finish(self) -> str:
        """Write down which files there are; returns the digest of that list. Nothing may be written after it."""
        renew(self.index, self.name)
        return list_files(self.index, self.name)

    def _stay(self) -> None:
        if time.monotonic() - self._renewed > _RENEW_SECONDS:
            self._renewed = time.monotonic()
            renew(self.index, self.name)

"""Parquet files of whole models: written in memory, read back against their digests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from probelog.errors import StoreError
from probelog.storage.encoding import digest
from probelog.storage.schemas import DESCRIPTORS, OBSERVATIONS, PROBED_MODELS, SAMPLES, WEIGHTS
from probelog.storage.store import Store
from probelog.storage.versions import check_schema

# Row groups of fewer rows cost space; whole models per group, so that a reader of one model reads one group.
_ROWS_PER_GROUP = 400


@dataclass(frozen=True, slots=True)
class Part:
    """One Parquet object as its receipt describes it."""

    path: str
    rows: int
    size: int
    sha256: str


def count_rows(parts: Iterable[Mapping[str, Any]]) -> int:
    """Rows of some parts, as a receipt's JSON lists them."""
    return sum(int(part["rows"]) for part in parts)


def read_part(
    store: Store,
    part: Part,
    schema: pa.Schema,
    columns: Sequence[str] | None = None,
    encoded: Sequence[str] = (),
) -> pa.Table:
    """The rows of one part, with all columns or some, checked against its receipt and the schema's version.

    Columns named in ``encoded`` (as Parquet names them) come with a dictionary of their values, which saves memory.

    Raises:
        StoreError: the bytes are not those that the receipt was written for.
    """
    return open_part(store, part, schema, encoded).read(None if columns is None else list(columns))


def open_part(store: Store, part: Part, schema: pa.Schema, encoded: Sequence[str] = ()) -> pq.ParquetFile:
    data = store.read(part.path)
    if len(data) != part.size or digest(data) != part.sha256:
        raise StoreError(f"{store.path(part.path)} is damaged: its digest is not the one in its receipt")
    file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=list(encoded))
    check_schema(file.schema_arrow, schema, store.path(part.path))
    return file


def part_bytes(tables: Sequence[pa.Table], schema: pa.Schema) -> bytes:
    """Tables (whole models each) as one Parquet file: zstd, byte-stream split for values, no dictionary on them.

    Smaller than Parquet's defaults by a tenth on logits (PLATFORM, Parquet); probe numbers are delta-packed.
    """
    sink = pa.BufferOutputStream()
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 1}
    if schema is OBSERVATIONS:
        options |= {
            "use_dictionary": ["repo", "sha"],
            "use_byte_stream_split": ["values.list.element"],
            "write_statistics": False,
        }
    if schema is SAMPLES:
        options |= {
            "use_dictionary": ["repo", "sha", "prompt", "class"],
            "use_byte_stream_split": ["feature.list.element", "base_feature.list.element"],
            "write_statistics": False,
        }
    if schema is WEIGHTS:
        options |= {"use_dictionary": ["repo", "sha", "tensor", "dtype"], "write_statistics": False}
    if schema is DESCRIPTORS:
        options |= {
            "use_dictionary": ["repo", "sha", "observed"],
            "use_byte_stream_split": [
                *("mean", "std", "z_mean", "z_std"),
                *(
                    f"{name}.list.element"
                    for name in schema.names
                    if pa.types.is_list(schema.field(name).type)
                ),
            ],
            "write_statistics": False,
        }
    if schema is PROBED_MODELS:
        options |= {
            "use_dictionary": ["library", "architecture", "recipe", "dtype", "device", "head"],
            "column_encoding": {"probes.list.element": "DELTA_BINARY_PACKED"},
        }
    with pq.ParquetWriter(sink, schema, **options) as writer:
        for group in row_groups(tables):
            writer.write_table(pa.concat_tables(group).cast(schema))
    return bytes(sink.getvalue())


def row_groups(tables: Sequence[pa.Table]) -> Iterator[list[pa.Table]]:
    """Neighbouring tables in groups of at least 400 rows each (the last may be smaller)."""
    group: list[pa.Table] = []
    count = 0
    for table in tables:
        group.append(table)
        count += table.num_rows
        if count >= _ROWS_PER_GROUP:
            yield group
            group, count = [], 0
    if group:
        yield group

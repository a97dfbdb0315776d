"""Bytes of arrays and tables, and hashes of bytes."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from probelog.errors import StoreError

_DIGEST_BYTES = 32


def digest(data: bytes | memoryview) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def short_key(*parts: object) -> str:
    """A 16-digit key of what a result depends on. Parts are joined through JSON, so that none run together."""
    return digest(json.dumps([str(part) for part in parts]).encode())[:16]


def npy(array: np.ndarray[Any, Any]) -> bytes:
    """An array as the bytes of a ``.npy`` file."""
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    return sink.getvalue()


def from_npy(data: bytes) -> np.ndarray[Any, Any]:
    """The array of a ``.npy`` file's bytes; never unpickles, and takes no memory for what is not there.

    Raises:
        ValueError: not such a file, or one of Python objects.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, kind = read_header(stream)
    except Exception as error:  # reason: numpy parses the header as Python, which raises what it likes
        raise ValueError(f"not an array: {str(error)[:200]}") from error
    if kind.hasobject:
        raise ValueError("an array of Python objects: no pickle is read")
    if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize != len(data) - stream.tell():
        raise ValueError("not an array of as many numbers as it says")
    stream.seek(0)
    array: np.ndarray[Any, Any] = np.load(stream, allow_pickle=False)
    return array


def sealed_tables(tables: Iterable[pa.Table]) -> bytes:
    """Tables as Arrow streams, one behind the other, then the SHA-256 of all that."""
    sink = io.BytesIO()
    for table in tables:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue() + bytes.fromhex(digest(sink.getvalue()))


def unsealed_tables(data: bytes, count: int, what: str) -> list[pa.Table]:
    """So many tables that `sealed_tables` wrote.

    Raises:
        StoreError: these are not the bytes that it made.
    """
    content = memoryview(data)[:-_DIGEST_BYTES]
    if data[len(content) :].hex() != digest(content):
        raise StoreError(f"{what} is damaged: its digest is not the one at its end")
    source = pa.BufferReader(pa.py_buffer(content))
    return [pa.ipc.open_stream(source).read_all() for _ in range(count)]


def parquet_bytes(table: pa.Table, use_dictionary: bool = True) -> bytes:
    """A table as a Parquet file in memory (zstd); without a dictionary for values that hardly repeat."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", compression_level=1, use_dictionary=use_dictionary)
    return bytes(sink.getvalue())

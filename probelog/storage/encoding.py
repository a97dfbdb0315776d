"""Bytes of arrays and tables, and hashes of bytes."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


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
    """The array of a ``.npy`` file's bytes; never unpickles.

    Raises:
        ValueError: not such a file, or one of Python objects.
    """
    array: np.ndarray[Any, Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return array


def parquet_bytes(table: pa.Table, use_dictionary: bool = True) -> bytes:
    """A table as a Parquet file in memory (zstd); without a dictionary for values that hardly repeat."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", compression_level=1, use_dictionary=use_dictionary)
    return bytes(sink.getvalue())

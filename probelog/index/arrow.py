"""Matrices and structured arrays as Arrow columns, and back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from probelog.arrays import ArrowArray, Column


def fixed_lists(matrix: npt.NDArray[np.generic], value_type: pa.DataType) -> ArrowArray:
    """A (N, w) matrix as an Arrow column of N fixed-size lists."""
    flat = pa.array(np.ascontiguousarray(matrix).reshape(-1), value_type)
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])


def matrix_of(column: Column) -> npt.NDArray[np.generic]:
    """An Arrow column of fixed-size lists as a (N, w) matrix."""
    width = column.type.list_size
    chunks = [
        pc.list_flatten(chunk).to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks
    ]
    if not chunks:
        return np.empty((0, width), column.type.value_type.to_pandas_dtype())
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def fixed_binary(values: npt.NDArray[np.void]) -> ArrowArray:
    """A (N,) structured array as an Arrow column of N fixed-size byte strings."""
    kind = pa.binary(values.dtype.itemsize)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values).data)])


def structured(column: Column, kind: np.dtype[np.void]) -> npt.NDArray[np.void]:
    """An Arrow column of fixed-size byte strings as the (N,) structured array that it was.

    Raises:
        ValueError: its values have another size.
    """
    if column.type != pa.binary(kind.itemsize):
        raise ValueError(f"values of {column.type} instead of {kind.itemsize} bytes")
    chunks = [
        np.frombuffer(memoryview(values), kind, len(chunk), chunk.offset * kind.itemsize)
        for chunk in column.chunks
        if len(chunk) and (values := chunk.buffers()[1]) is not None
    ]
    if not chunks:
        return np.empty(0, kind)
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)

"""Logits as observation rows, float16 with a scale and an offset a row, and back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from probelog.storage.schemas import OBSERVATIONS

Floats = npt.NDArray[np.float32]

# float16 ends at 65504 and loses digits below 2^-14.
_LARGEST, _SMALLEST = 30_000.0, 2.0**-10
# A row whose spread is so much smaller than its values would lose the spread to rounding.
_NARROW = 1 / 16


def to_rows(repo: str, sha: str, values: npt.ArrayLike) -> pa.Table:
    """Logits (L, m) as observation rows.

    A value is ``offset + scale * stored``. The offset is 0 unless the row's spread is below a sixteenth of its
    largest magnitude; the scale is a power of two, 1 unless what remains is above 30,000 or below 2^-10. Every
    value is restored to within 2^-10 of the largest magnitude of what remains.

    Raises:
        ValueError: not a matrix of finite numbers.
    """
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise ValueError(f"observations must be a matrix of finite numbers, not {matrix.shape}")
    logits, count = matrix.shape
    low, high = (matrix.min(axis=1), matrix.max(axis=1)) if count else (np.zeros(logits), np.zeros(logits))
    narrow = (high - low) < _NARROW * np.maximum(np.abs(low), np.abs(high))
    offset = np.where(narrow, low + (high - low) / 2, 0.0).astype(np.float32)
    rest = matrix - offset[:, None].astype(np.float64)
    largest = np.abs(rest).max(axis=1, initial=0.0)
    scale = np.ones(logits, np.float32)
    odd = ((largest > _LARGEST) | (largest < _SMALLEST)) & (largest > 0)
    # Brings the largest into [2^12, 2^13). Denormals of float32 end at 2^-149; a scale of 2^-126 is normal.
    scale[odd] = np.exp2(np.clip(np.floor(np.log2(largest[odd])) - 12, -126, 127))
    stored = (rest / scale[:, None]).astype(np.float16)
    bounds = np.arange(logits + 1, dtype=np.int32) * count
    columns = {
        "repo": pa.array([repo] * logits, pa.string()),
        "sha": pa.array([sha] * logits, pa.string()),
        "logit": pa.array(np.arange(logits, dtype=np.int32)),
        "scale": pa.array(scale),
        "offset": pa.array(offset),
        "values": pa.ListArray.from_arrays(
            pa.array(bounds, pa.int32()), pa.array(stored.reshape(-1), pa.float16())
        ),
    }
    return pa.table(columns, schema=OBSERVATIONS)


def from_rows(table: pa.Table) -> Floats:
    """The matrix (L, m) behind the observation rows of one model, in the order of the rows.

    Raises:
        ValueError: the rows are not equally long (they belong to several models).
    """
    values = table.column("values").combine_chunks()
    lengths = np.unique(pc.list_value_length(values).to_numpy(zero_copy_only=False))
    if len(lengths) > 1:
        raise ValueError(f"rows of {lengths.tolist()} values are not of one model")
    flat = pc.list_flatten(values).to_numpy(zero_copy_only=False)
    scale = table.column("scale").to_numpy().astype(np.float64)
    offset = table.column("offset").to_numpy().astype(np.float64)
    stored = flat.reshape(table.num_rows, int(lengths[0]) if len(lengths) else 0)
    if (scale == 1).all() and (offset == 0).all():  # nearly always
        return np.asarray(stored, np.float32)
    matrix = stored.astype(np.float64) * scale[:, None] + offset[:, None]
    # The largest float32 numbers may have been rounded up, to just above what float32 can hold.
    bound = np.finfo(np.float32).max
    clipped: Floats = np.clip(matrix, -bound, bound).astype(np.float32)
    return clipped

"""Types of the arrays that the mathematics takes, and of the columns that tables have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow as pa

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]

Column: TypeAlias = "pa.ChunkedArray[Any]"
ArrowArray: TypeAlias = "pa.Array[Any]"

Value = TypeVar("Value")


def evenly_spread(count: int, most: int) -> npt.NDArray[np.int64]:
    """Up to ``most`` of the places 0 to ``count`` - 1, ascending: the first, the last and some between, the same in every run."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def values_of(column: Column | ArrowArray, kind: type[Value]) -> list[Value]:
    """The values of an Arrow column without nulls, whose type its schema guarantees."""
    return cast("list[Value]", column.to_pylist())

"""What generators made, as rows: an embedding a sample, float16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.storage.schemas import SAMPLES

Floats = npt.NDArray[np.float32]


def sample_rows(
    repo: str,
    sha: str,
    features: npt.ArrayLike,
    *,
    base_features: npt.ArrayLike | None = None,
    prompts: Sequence[int] | None = None,
    classes: Sequence[int] | None = None,
) -> pa.Table:
    """The rows of one generator, numbered in the order of its samples.

    Args:
        repo: repository.
        sha: commit.
        features: (n, d) of unit length.
        base_features: (n, d), of an adapter's base.
        prompts: of each sample, as indices.
        classes: of each sample.

    Raises:
        ValueError: not matrices of finite numbers of one shape.
    """
    matrix = _matrix(features)
    count = len(matrix)
    if base_features is not None and _matrix(base_features).shape != matrix.shape:
        raise ValueError("the base's samples are not as many as the adapter's")
    columns = {
        "repo": pa.array([repo] * count, pa.string()),
        "sha": pa.array([sha] * count, pa.string()),
        "number": pa.array(np.arange(count, dtype=np.int32)),
        "prompt": _numbers(prompts, count),
        "class": _numbers(classes, count),
        "feature": _lists(matrix),
        "base_feature": pa.nulls(count, SAMPLES.field("base_feature").type)
        if base_features is None
        else _lists(_matrix(base_features)),
    }
    return pa.table(columns, schema=SAMPLES)


def _matrix(features: npt.ArrayLike) -> Floats:
    matrix = np.asarray(features, np.float32)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise ValueError(f"features must be a matrix of finite numbers, not {matrix.shape}")
    return matrix


def _numbers(values: Sequence[int] | None, count: int) -> pa.Array[Any]:
    return pa.nulls(count, pa.int32()) if values is None else pa.array(values, pa.int32())


def _lists(matrix: Floats) -> pa.Array[Any]:
    bounds = np.arange(len(matrix) + 1, dtype=np.int32) * matrix.shape[1]
    return pa.ListArray.from_arrays(
        pa.array(bounds, pa.int32()), pa.array(matrix.astype(np.float16).reshape(-1), pa.float16())
    )

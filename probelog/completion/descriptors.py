"""Descriptors: what the index keeps of every logit, given the columns V of a completion.

The same for the models that V was fitted on and for new ones (``completion.fold_in``).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.arrays import ArrowArray
from probelog.completion import scoring
from probelog.completion.als import Block, Float32, FoldedIn, complete_rows, fold_in, row_moments
from probelog.ranking.matched_heads import HeadSpace, Observed
from probelog.storage.schemas import DESCRIPTORS, Head, ProbedModel

# Bounds the completed rows that are in memory at a time: 2^21 float64 values are 16 MB, and a few such copies live.
_AT_ONCE = 1 << 21

# Probes that fire a logit least, which are kept for people to look at.
WEAKEST = 6

ObservedModel = tuple[ProbedModel, npt.NDArray[np.int32], npt.NDArray[np.float32]]


def describe(
    models: Iterable[ObservedModel],
    columns: Float32,
    space: HeadSpace,
    regularisation: float,
    top_r: int,
) -> list[pa.Table]:
    """Descriptors of models, a table (``DESCRIPTORS``) for each that has any logit that is not constant.

    Args:
        models: their facts, logit numbers (L,) and raw values (L, m), as ``ledger.observed_models`` gives them.
        columns: V (n, k) of a finished completion.
        space: of the probes' embeddings; its background does not matter.
        regularisation: that completion's lambda.
        top_r: entries kept a logit.
    """
    described = (_described(*model, columns, space, regularisation, top_r) for model in models)
    return [table for table in described if table is not None]


def _described(
    facts: ProbedModel,
    logits: npt.NDArray[np.int32],
    values: npt.NDArray[np.float32],
    columns: Float32,
    space: HeadSpace,
    regularisation: float,
    top_r: int,
) -> pa.Table | None:
    probes, head = np.asarray(facts.probes, np.int32), Head(facts.head)
    folded = fold_in(probes, values, columns, regularisation)
    values, logits = values[folded.kept], logits[folded.kept]
    count = len(logits)
    if not count:
        return None
    # Only a one-logit head has an opposite that is searched for.
    single = head == Head.SINGLE
    completed = _Completed(folded, columns, top_r, both_ends=single)
    bottom = completed.opposite_top
    opposite = space.of_model(Observed(head, probes, -values)) if single else None
    return pa.table(
        {
            "repo": [facts.repo] * count,
            "sha": [facts.sha] * count,
            "logit": logits,
            "observed": np.full(count, len(probes), np.int32),
            "mean": folded.moments.mean.astype(np.float32),
            "std": folded.moments.std.astype(np.float32),
            "z_mean": completed.mean.astype(np.float32),
            "z_std": completed.std.astype(np.float32),
            "factor": _lists(folded.factors, count, pa.float16()),
            "top_probes": _lists(completed.top.probes, count, pa.int32()),
            "top_values": _lists(completed.top.values, count, pa.float16()),
            "bottom_probes": _lists(None if bottom is None else bottom.probes, count, pa.int32()),
            "bottom_values": _lists(None if bottom is None else -bottom.values, count, pa.float16()),
            "direction": _lists(space.of_model(Observed(head, probes, values)), count, pa.float16()),
            "opposite_direction": _lists(opposite, count, pa.float16()),
            "weakest_probes": _lists(completed.weakest.probes, count, pa.int32()),
            "weakest_values": _lists(-completed.weakest.values, count, pa.float16()),
        },
        schema=DESCRIPTORS,
    )


class _Completed:
    """Moments and ends of completed rows, which are made some at a time."""

    def __init__(self, folded: FoldedIn, columns: Float32, top_r: int, both_ends: bool) -> None:
        step = max(1, _AT_ONCE // len(columns))
        means, stds, tops, opposites, weakest = [], [], [], [], []
        for start in range(0, len(folded.factors), step):
            rows = slice(start, start + step)
            block = Block(folded.block.probes, folded.block.values[rows])
            full = complete_rows(block, folded.factors[rows], columns)
            moments = row_moments(full)
            z = (full - moments.mean[:, None]) / moments.std[:, None]
            means.append(moments.mean)
            stds.append(moments.std)
            tops.append(scoring.top_pairs(z, top_r))
            bottom = scoring.top_pairs(-z, max(top_r, WEAKEST) if both_ends else WEAKEST)
            weakest.append(_first(bottom, WEAKEST))
            if both_ends:
                opposites.append(_first(bottom, top_r))
        self.mean, self.std = np.concatenate(means), np.concatenate(stds)
        self.top = _joined(tops)
        self.opposite_top = _joined(opposites) if both_ends else None
        self.weakest = _joined(weakest)


def _first(pairs: scoring.TopPairs, count: int) -> scoring.TopPairs:
    return scoring.TopPairs(pairs.probes[:, :count], pairs.values[:, :count])


def _joined(pairs: list[scoring.TopPairs]) -> scoring.TopPairs:
    return scoring.TopPairs(
        np.concatenate([some.probes for some in pairs]), np.concatenate([some.values for some in pairs])
    )


def _lists(matrix: npt.NDArray[np.generic] | None, count: int, kind: pa.DataType) -> ArrowArray:
    """The rows of a matrix as lists of another type of number; without a matrix ``count`` nulls."""
    if matrix is None:
        return pa.nulls(count, pa.list_(kind))
    bounds = pa.array(np.arange(count + 1, dtype=np.int32) * matrix.shape[1])
    return pa.ListArray.from_arrays(bounds, pa.array(matrix.astype(kind.to_pandas_dtype()).reshape(-1), kind))

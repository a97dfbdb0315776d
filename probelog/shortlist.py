"""The shortlist of a large index: small vectors of all logits under a vector index, asked by inner product.

The score ``s(l, c) = b w_l.w_c - o_l`` (``probelog.matching``) is linear in the query, so that the logits that score
best are those of largest inner product of ``[w_l, -o_l / b]`` and ``[w_c, 1]`` (maximum inner-product search). The
directions of a hub's logits fill a few dozen of the encoder's dimensions: the principal ones of a sample are kept
(PCA), and what all logits have in common, which ranks none before another, is taken off first.

A shortlist leaves order and scores to an exact re-ranking (``probelog.search``); it must hold the best, no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.gallery import Floats

TABLE = "shortlist"
# Below this many logits all of them are scored: that is exact, and no slower (100,000 in 512 dimensions: 8 ms and
# 200 MB; shortlist and re-ranking: 13 ms).
EXACT_LOGITS = 100_000
# Numbers a logit in the shortlist, the offset's among them. IVF_RQ wants a multiple of 8.
WIDTH = 48
# Logits that the principal dimensions are learnt from.
SAMPLE = 16_384
_BITS = 5
# Partitions that are looked into, and how many times the answers wanted are re-ranked by their uncompressed vectors.
_PROBES = 50
_REFINE = 4


@dataclass(frozen=True, eq=False)
class Projection:
    """From the encoder's space to the shortlist's.

    Attributes:
        basis: (p, d) orthonormal principal directions.
        centre: (d,) mean direction.
        middle: mean offset.
        sharpness: the score's temperature ``b``.
    """

    basis: npt.NDArray[np.float32]
    centre: npt.NDArray[np.float32]
    middle: float
    sharpness: float

    @classmethod
    def learnt(cls, directions: Floats, offsets: Floats, sharpness: float) -> Projection:
        """From a sample of the gallery: directions (S, d) and offsets (S,)."""
        sample = np.asarray(directions, np.float64)
        centre = sample.mean(axis=0)
        spread = (sample - centre).T @ (sample - centre)
        _, vectors = np.linalg.eigh(spread)  # ascending
        basis = vectors[:, ::-1][:, : WIDTH - 1].T
        return cls(
            np.ascontiguousarray(basis, np.float32),
            centre.astype(np.float32),
            float(np.mean(offsets)),
            sharpness,
        )

    @classmethod
    def from_arrays(cls, arrays: Floats, middle: float, sharpness: float) -> Projection:
        """From what ``arrays`` gave."""
        rows = np.asarray(arrays, np.float32)
        return cls(rows[1:], rows[0], middle, sharpness)

    def arrays(self) -> npt.NDArray[np.float32]:
        """Centre and basis as one matrix (1 + p, d), to be stored."""
        return np.concatenate([self.centre[None], self.basis])

    @property
    def width(self) -> int:
        """Length of the vectors: p and the offset's, filled up with zeros to a multiple of 8."""
        return -(-(len(self.basis) + 1) // 8) * 8

    def of_logits(self, directions: Floats, offsets: Floats) -> npt.NDArray[np.float16]:
        """Vectors (N, width) of logits' directions (N, d) and offsets (N,)."""
        out = np.zeros((len(directions), self.width), np.float16)
        p = len(self.basis)
        out[:, :p] = (np.asarray(directions, np.float32) - self.centre) @ self.basis.T
        out[:, p] = (self.middle - np.asarray(offsets)) / self.sharpness
        return out

    def of_query(self, direction: Floats) -> npt.NDArray[np.float32]:
        """Vector (width,) to ask with, from the query's direction (d,)."""
        out = np.zeros(self.width, np.float32)
        p = len(self.basis)
        out[:p] = self.basis @ np.asarray(direction, np.float32)
        out[p] = 1.0
        return out

    def schema(self) -> pa.Schema:
        """Of the ``shortlist`` table: its rows are those of ``logits``, in their order."""
        return pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.float16(), self.width))])


def build(table: Any) -> None:
    """Index the vectors of a written ``shortlist`` table."""
    from lancedb.index import IvfRq

    table.create_index("vector", config=IvfRq(distance_type="dot", num_bits=_BITS))


def ask(table: Any, vector: npt.NDArray[np.float32], count: int, effort: int = 1) -> npt.NDArray[np.int64]:
    """Numbers of about the ``count`` best logits for a query's vector, in no particular order.

    Args:
        table: the ``shortlist`` table.
        vector: (width,) ``Projection.of_query``.
        count: how many are wanted.
        effort: how many times more of the index is looked into than for a plain question.
    """
    found = (
        table.search(vector, vector_column_name="vector")
        .distance_type("dot")  # another one than the index was built for would silently scan everything
        .nprobes(_PROBES * effort)
        .refine_factor(_REFINE)
        .limit(count)
        .select(["id", "_distance"])
        .to_arrow()
    )
    return np.asarray(found["id"].to_numpy(), np.int64)

"""The shortlist of a large index: about the best logits for a question, looked up by their vectors.

The vectors' inner product with a question's (``probelog.index.basis``) is nearly the score, but for a constant and a
factor, so that a vector index finds the best. It leaves order and scores to an exact re-ranking (``probelog.search.ranking``);
it must hold the best, no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.arrays import Column

if TYPE_CHECKING:
    from lancedb.query import LanceVectorQueryBuilder
    from lancedb.table import Table

# Below this many logits all of them are scored: that is exact, and no slower. Measured on one core with 381
# coordinates: all of 20,000 take 3 ms, of 50,000 10 ms and of 100,000 16 ms; shortlist and re-ranking 11 ms at a million.
EXACT_LOGITS = 50_000
_BITS = 5
# Partitions, of some 8,000 logits each, that are looked into. Of a million logits, share of the exact ten in a list of
# 300 for names, pictures and logits: 16 partitions .997 .987 .982; 64 partitions .997 .995 .992, and half a ms longer.
_PROBES = 64


def build(table: Table) -> None:
    """Index the vectors of a written ``logits`` table."""
    from lancedb.index import IvfRq

    table.create_index("vector", config=IvfRq(distance_type="dot", num_bits=_BITS))


def ask(table: Table, vector: npt.NDArray[np.float32], count: int, effort: int = 1) -> Column:
    """The facts of about the ``count`` best logits for a question, in no particular order.

    Search and fetch are one request.

    Args:
        table: the ``logits`` table.
        vector: (w,) ``Basis.query``.
        count: how many are wanted.
        effort: how many times more of the index is looked into than for a plain question.
    """
    found: pa.Table = (
        cast("LanceVectorQueryBuilder", table.search(vector, vector_column_name="vector"))
        .distance_type("dot")  # another one than the index was built for would silently scan everything
        .nprobes(_PROBES * effort)
        .limit(count)
        .select(["facts", "_distance"])
        .to_arrow()
    )
    return found["facts"]

"""The shortlist of a large index: approximately the best logits for a query, from a vector index.

The inner product of a logit's vector with the query's (``probelog.index.basis``) is nearly the score, up to a constant
and a factor. Order and scores come from exact re-ranking (``probelog.search.ranking``); the shortlist only has to contain
the best logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.arrays import Column
from probelog.index.waiting import wait

if TYPE_CHECKING:
    from lancedb.table import AsyncTable, Table

# Below this many logits all of them are scored: that is exact, and no slower. Measured on one core with 381
# coordinates: all of 20,000 take 3 ms, of 50,000 10 ms and of 100,000 16 ms; shortlist and re-ranking 11 ms at a million.
EXACT_LOGITS = 50_000
_BITS = 5
# Partitions, of some 8,000 logits each, that are searched. Of a million logits, share of the exact ten in a list of
# 300 for names, pictures and logits: 16 partitions .997 .987 .982; 64 partitions .997 .995 .992, and half a ms longer.
_PROBES = 64
# By Euclidean distance: how many times a query is lengthened.
_FAR = 300.0

#: LanceDB's own number of a row, which rises in the order in which rows were written.
ROW_ID = "_rowid"
Distance = Literal["dot", "l2"]


def build(table: Table, distance: Distance = "dot", partitions: int | None = None, bits: int = _BITS) -> None:
    """Build the vector index of a written table, of some ``bits`` a number; without ``partitions`` LanceDB chooses how many."""
    from lancedb.index import IvfRq

    config = IvfRq(distance_type=distance, num_partitions=partitions, num_bits=bits)
    table.create_index("vector", config=config)


def look_up(
    table: AsyncTable,
    vector: npt.NDArray[np.float32],
    count: int,
    effort: int = 1,
    column: str = "facts",
    distance: Distance = "dot",
) -> Column:
    """The ``facts`` of approximately the ``count`` best logits for a query, in no particular order, in one request.

    Best are those of largest inner product, by either distance: of ``|s q - x|^2 = s^2 |q|^2 - 2 s q.x + |x|^2`` nothing but the
    product matters where s is large.

    Args:
        table: the ``logits`` table (`probelog.index.tables.Tables.open_for_search`).
        vector: (w,) of ``Basis.query``.
        count: number of logits.
        effort: factor by which more of the vector index is searched than by default.
        column: another one than the facts; of ``_rowid`` nothing is read from the table, which takes a third less.
        distance: that the vector index was built for; with another LanceDB silently scans everything.
    """
    if distance == "l2":
        vector = vector * np.float32(_FAR)

    # LanceDB's client without asyncio asks for the schema three times and for each batch: six changes of thread in place of one.
    async def found() -> pa.Table:
        query = table.vector_search(vector).column("vector").distance_type(distance).nprobes(_PROBES * effort)
        if column == ROW_ID:
            query = query.with_row_id()
        return await query.limit(count).select([column, "_distance"]).to_arrow()

    return wait(found())[column]

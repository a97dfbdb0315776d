"""The published index: its LanceDB tables, and the generations that a small pointer file tells apart.

An index lies under ``STORE/index``::

    current.json                     the pointer: which generation readers use, and those before it
    generations/NAME/logits.lance    a row per logit of distinct weights: direction, offset, the probes that fire it most and least;
                                     in a large index under a vector index
    generations/NAME/models.lance    a row per model: its facts, declared labels, and which rows of logits are its own
    generations/NAME/edges.lance     a row for each parent of a model, where trees were recovered
    generations/NAME/generators.lance  a row per generator, where there are any: its facts, and which row of samples is its own
    generations/NAME/samples.lance   a row per generator that differs: its description, and samples as pictures
    generations/NAME/groups.lance    some rows per row of samples of a large index: what its vector index is over
    generations/NAME/probes.lance    a row per probe: thumbnail and embedding
    generations/NAME/meta.lance      settings, background, text and image encoder
    generations/NAME/files.json      every file of these tables with its size and digest
    generations/NAME/hold.json       while it is being built

A generation is built whole under a new name, then the pointer is swapped in one atomic step. Readers never see
a half-built one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from probelog.index.basis import Basis
from probelog.index.waiting import wait
from probelog.storage.layout import GenerationFolder
from probelog.storage.schemas import ListedFacts, TreeFacts, arrow_fields
from probelog.storage.store import Store, lance_options

if TYPE_CHECKING:
    from lancedb import DBConnection, Session
    from lancedb.table import AsyncTable

# Of a generation, in its settings; the pointer has a version of its own.
INDEX_VERSION = 1


# What one generation's connections keep in memory of indexes and of tables' metadata, however large they are.
_INDEX_CACHE = 256 << 20
_METADATA_CACHE = 64 << 20


def new_session() -> Session:
    """What all connections to one generation keep in memory together."""
    import lancedb

    return lancedb.Session(_INDEX_CACHE, _METADATA_CACHE)


def connect(index: Store, generation: str, session: Session | None = None) -> DBConnection:
    """LanceDB's connection to one generation; without a ``session`` it has its own."""
    import lancedb

    return lancedb.connect(**_address(index, generation), session=session or new_session())


def open_for_search(index: Store, generation: str, session: Session, table: str) -> AsyncTable:
    """The handle of a table whose vector index is searched (`probelog.index.shortlist.look_up`)."""
    import lancedb

    async def opened() -> AsyncTable:
        connection = await lancedb.connect_async(**_address(index, generation), session=session)
        return await connection.open_table(table)

    return wait(opened())


def _address(index: Store, generation: str) -> dict[str, Any]:
    folder = index.path(GenerationFolder.of(generation).path)
    return {"uri": folder, "storage_options": lance_options(index.uri) or None}


# How a model was run, in indexes of this version: its preprocessing as JSON (``probelog.models.preprocessing.Recipe``),
# the type of its weights, that of the forward pass, and the configuration's ``model_type``.
PROBED_FACTS = ("recipe", "dtype", "precision", "model_type")

# Facts about a model, in every index.
_FACTS: list[tuple[str, pa.DataType]] = [
    ("repo", pa.string()),
    ("sha", pa.string()),
    ("library", pa.string()),
    ("architecture", pa.string()),
    ("head", pa.string()),
    ("logits", pa.int32()),
    ("labels", pa.list_(pa.string())),
    ("parameters", pa.int64()),
    ("weight_digest", pa.string()),
    ("observed", pa.int32()),
    ("copies", pa.int32()),  # models with these weights, this one counted
    *[(name, pa.string()) for name in PROBED_FACTS],
    *arrow_fields(ListedFacts),
    *arrow_fields(TreeFacts),
]
MODEL_FACTS = pa.schema(_FACTS)

# Besides the facts: ``weights`` is the number of the first model with the same weights, which all of them share the
# rows ``first_row`` .. ``first_row + rows`` of the logits table with; ``identity`` is equal for just these models.
MODELS = pa.schema(
    [
        ("id", pa.int32()),
        ("weights", pa.int32()),
        ("first_row", pa.int64()),
        ("rows", pa.int32()),
        ("identity", pa.string()),
        *MODEL_FACTS,
    ]
)

_META: list[tuple[str, pa.DataType]] = [("key", pa.string()), ("value", pa.large_binary())]
META = pa.schema(_META)

# Number of the probes that fire a logit most, and least, that an index keeps, for people to look at.
SHOWN_PROBES = 8
WEAKEST_PROBES = 6

# What is known of these probes, as one value of fixed size in a column of its own, which queries do not read: the
# standardised value on each, a bit for each that says whether the model saw it (else completion estimated the value), and
# the numbers of the weakest (``count`` of them, ascending by value; older descriptors do not have them).
EVIDENCE = np.dtype(
    [
        ("values", "<f2", SHOWN_PROBES),
        ("weakest_values", "<f2", WEAKEST_PROBES),
        ("weakest", "<u4", WEAKEST_PROBES),
        ("observed", "u1"),
        ("weakest_observed", "u1"),
        ("count", "u1"),
    ]
)


def logits_schema(basis: Basis, probes: int) -> pa.Schema:
    """Schema of the ``logits`` table: ``vector`` for the vector index, ``facts``, a value of ``logit_facts``, and ``evidence``.

    Args:
        basis: that the directions are encoded in.
        probes: number of probes of the probe set.
    """
    return pa.schema(
        [
            ("vector", pa.list_(pa.float16(), basis.width)),
            ("facts", pa.binary(logit_facts(basis, probes).itemsize)),
            ("evidence", pa.binary(EVIDENCE.itemsize)),
        ]
    )


def logit_facts(basis: Basis, probes: int) -> np.dtype[np.void]:
    """The facts of a logit as one value of fixed size; ``row`` is its number in the table.

    Fetching the scattered rows of a shortlist is the largest cost of a query, and every row and column costs a read: the
    same numbers in eight columns cost four times as much.
    """
    return np.dtype(
        [
            ("row", "<u4"),
            ("weights", "<i4"),
            ("logit", "<i4"),
            ("offset", "<f4"),
            ("scale", "<f4"),
            ("precise", "<f2", basis.precise),
            ("rest", np.int8, len(basis.axes) - basis.precise),
            ("negated", "?"),
            ("probes", "<u2" if probes <= 1 << 16 else "<u4", min(SHOWN_PROBES, probes)),
        ]
    )


def probes_schema(dimension: int) -> pa.Schema:
    """Schema of the ``probes`` table."""
    fields: list[tuple[str, pa.DataType]] = [
        ("id", pa.int32()),
        ("name", pa.string()),
        ("sha256", pa.string()),
        ("thumbnail", pa.binary()),
        ("embedding", pa.list_(pa.float32(), dimension)),
    ]
    return pa.schema(fields)

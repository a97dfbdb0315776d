"""The tables of a generation's generators: ``generators``, a row each, and ``samples``, a row for each that differs.

Repositories that make the same samples share a row of ``samples``, as those with the same weights share logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa

from probelog.storage.layout import is_generation_name
from probelog.storage.records import Check, is_finite
from probelog.storage.schemas import GENERATORS, ListedFacts, TreeFacts, arrow_fields

# Of the record of sampling, what an index keeps.
SAMPLED_FACTS = (
    "repo", "sha", "pipeline", "architecture", "conditioning", "image_size", "parameters", "base_repo", "base_sha",
    "trigger_words", "prompts", "classes", "samples", "steps", "dtype", "precision", "weight_digest",
)  # fmt: skip

_FACTS: list[tuple[str, pa.DataType]] = [
    *((name, GENERATORS.field(name).type) for name in SAMPLED_FACTS),
    ("copies", pa.int32()),  # generators that make the same samples, this one counted
    ("pictures", pa.int32()),  # samples that are kept as pictures
    # Of adapters: how far their samples are from their base's, and how alike they are in that.
    ("strength", pa.float32()),
    ("consistency", pa.float32()),
    *arrow_fields(ListedFacts),
    *arrow_fields(TreeFacts),
]
GENERATOR_FACTS = pa.schema(_FACTS)

# Besides the facts: ``row`` is that of ``samples``, ``identity`` equal for just the generators that share it.
GENERATOR_TABLE = pa.schema(
    [("id", pa.int32()), ("row", pa.int32()), ("identity", pa.string()), *GENERATOR_FACTS]
)
# The same facts in one column (``shown``); indexes of before do not have it.
SHOWN = pa.field("shown", pa.binary())


def samples_schema(size: int) -> pa.Schema:
    """Schema of the ``samples`` table: ``generator`` is the first that makes them, ``size`` the bytes of a description."""
    columns: list[tuple[str, pa.DataType]] = [
        ("row", pa.int32()),
        ("generator", pa.int32()),
        ("description", pa.binary(size)),
        ("thumbnails", pa.list_(pa.binary())),
    ]
    return pa.schema(columns)


_POSITIVE: Check = ("a number above 0", lambda value: is_finite(value) and value > 0)
_GENERATION: Check = ("a generation's name", is_generation_name)


@dataclass(frozen=True)
class GeneratorSettings:
    """What a generation says about its generators.

    Attributes:
        models: how many there are.
        rows: of the ``samples`` table: generators that differ.
        ledger: key of the ledger that the samples are of.
        generation: the one whose folder holds the tables: itself, or the base of an update.
        direction_sharpness: temperatures of the scores (``probelog.ranking.samples.matched``), for directions, and
        embedding_sharpness: for embeddings.
        sketches: whether it knows how sketches become pictures.
        groups: rows of the ``groups`` table, whose vector index shortlists the generators; none in a small index.
        euclidean: whether that vector index is by Euclidean distance; those of before are by inner product.
        by_row: whether ``meta`` says of all rows of ``samples`` which groups and which generator they are of, so that a question
            does not read it from the tables.
    """

    models: int
    rows: int
    ledger: str
    generation: str = field(metadata={"check": _GENERATION})
    direction_sharpness: float = field(metadata={"check": _POSITIVE})
    embedding_sharpness: float = field(metadata={"check": _POSITIVE})
    sketches: bool
    groups: int | None = None
    euclidean: bool | None = None
    by_row: bool | None = None

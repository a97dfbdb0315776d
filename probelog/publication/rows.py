"""Writes the searchable tables of a generation from streamed arrays: logits, with a large index's vector index, and models.

Repositories with the same weights share the rows of their logits: the ``logits`` table has one row per output of each
*distinct* network, and every row of ``models`` says which rows belong to the model. So thousands of copies of one
model cost one row of facts each, and they fill one place of an answer, not thousands.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.arrays import Floats
from probelog.index import shortlist
from probelog.index.arrow import fixed_binary, fixed_lists, matrix_of, structured
from probelog.index.basis import Basis
from probelog.index.schema import (
    EVIDENCE,
    MODELS,
    SHOWN_PROBES,
    WEAKEST_PROBES,
    logit_facts,
    logits_schema,
)
from probelog.index.shortlist import EXACT_LOGITS
from probelog.publication.generation_writer import GenerationWriter
from probelog.ranking.matched_heads import Background, Float64
from probelog.storage.encoding import npy
from probelog.storage.schemas import EDGES

# Logits whose scores stand for the whole gallery's where it is too large to be scored (``probelog.ranking.confidence``).
_GALLERY_SAMPLE = 4096
# From this many models on, looking one up by name or by weights needs an index.
_INDEXED_MODELS = 10_000


class LogitBatch(NamedTuple):
    """L logits, those of one model beside each other.

    Attributes:
        model: (L,) numbers of their models.
        logit: (L,) places in their models' heads.
        negated: (L,) whether it is the opposite of a one-logit head's concept.
        directions: (L, d) unit vectors in the encoder's space.
        probes: (L, r) numbers of the probes with the largest values, descending; the first ``SHOWN_PROBES`` are kept.
        evidence: (L,) what is known of these probes and of the weakest (``EVIDENCE``); None: nothing.
    """

    model: npt.NDArray[np.integer[Any]]
    logit: npt.NDArray[np.integer[Any]]
    negated: npt.NDArray[np.bool_]
    directions: npt.NDArray[np.floating[Any]]
    probes: npt.NDArray[np.integer[Any]]
    evidence: npt.NDArray[np.void] | None = None

    def at(self, places: npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_]) -> LogitBatch:
        """Those at some positions, or under a mask (L,)."""
        return LogitBatch._make(None if values is None else values[places] for values in self)


class EncodedRows(NamedTuple):
    """L rows of ``logits`` but for their numbers, those of one model beside each other.

    Attributes:
        model: (L,) numbers of their models.
        facts: (L,) ``logit_facts`` without ``row`` and ``weights``, which are known when all rows before these are.
        vectors: (L, w) for the vector index.
        evidence: (L,) ``EVIDENCE``; None: nothing is known.
    """

    model: npt.NDArray[np.integer[Any]]
    facts: npt.NDArray[np.void]
    vectors: npt.NDArray[np.float16]
    evidence: npt.NDArray[np.void] | None

    def at(self, places: npt.NDArray[np.integer[Any]]) -> EncodedRows:
        """Those at some positions."""
        return EncodedRows._make(None if values is None else values[places] for values in self)


@dataclass(frozen=True, eq=False)
class RowEncoder:
    """Makes rows of logits. Nothing else is needed for a row, so that any process can make some of them.

    Attributes:
        basis: that directions are stored in.
        background: that the logits are compared with; offsets are computed from the stored directions.
        probes: number of probes of the probe set.
    """

    basis: Basis
    background: Background
    probes: int

    @classmethod
    def fit(cls, sample: Floats, background: Background, probes: int) -> RowEncoder:
        """With a basis that is fitted on the directions (S, d) of some thousand logits drawn from all models."""
        return cls(Basis.fit(sample, background), background, probes)

    @property
    def schema(self) -> pa.Schema:
        """Of the table ``logits``."""
        return logits_schema(self.basis, self.probes)

    @cached_property
    def facts(self) -> np.dtype[np.void]:
        """What is stored of a logit."""
        return logit_facts(self.basis, self.probes)

    @cached_property
    def _stored_background(self) -> Background:
        directions = self.basis.coordinates(self.background.directions).astype(np.float64)
        return Background(directions, self.background.sharpness)

    def encode(self, batch: LogitBatch) -> EncodedRows:
        """The rows of some logits."""
        stored = self.basis.encode(batch.directions)
        coordinates = self.basis.decode(stored)
        facts = np.zeros(len(batch.model), self.facts)
        facts["logit"], facts["negated"] = batch.logit, batch.negated
        facts["offset"] = self._stored_background.offsets(coordinates)
        facts["precise"], facts["rest"], facts["scale"] = stored
        facts["probes"] = batch.probes[:, :SHOWN_PROBES]
        # LanceDB refuses values that are not finite without naming the row: the publisher's checks find them in the facts.
        vectors = np.nan_to_num(self.basis.vectors(coordinates, facts["offset"]), posinf=0, neginf=0)
        return EncodedRows(batch.model, facts, vectors, batch.evidence)

    def table(self, rows: EncodedRows) -> pa.Table:
        """Rows as they are stored."""
        return pa.table(
            {
                "vector": fixed_lists(rows.vectors, pa.float16()),
                "facts": fixed_binary(rows.facts),
                "evidence": (
                    pa.nulls(len(rows.facts), pa.binary(EVIDENCE.itemsize))
                    if rows.evidence is None
                    else fixed_binary(rows.evidence)
                ),
            },
            self.schema,
        )

    def rows_of(self, table: pa.Table, model: npt.NDArray[np.integer[Any]]) -> EncodedRows:
        """Rows that `table` made, of models (L,).

        Raises:
            ValueError: they are not of this encoder.
        """
        known = table["evidence"].null_count == 0
        return EncodedRows(
            model,
            structured(table["facts"], self.facts),
            np.asarray(matrix_of(table["vector"]), np.float16),
            structured(table["evidence"], EVIDENCE) if known else None,
        )


class Ends(NamedTuple):
    """Probes at one end of L logits, the extreme ones first: numbers (L, r) and the standardised values (L, r) on them."""

    probes: npt.NDArray[np.integer[Any]]
    values: npt.NDArray[np.floating[Any]]

    def first(self, count: int) -> Ends:
        """The most extreme ones."""
        return Ends(self.probes[:, :count], self.values[:, :count])


def evidence_of(
    seen: npt.NDArray[np.integer[Any]], strongest: Ends, weakest: Ends | None
) -> npt.NDArray[np.void]:
    """What an index keeps of the probes at both ends of one model's logits: (L,), values of ``EVIDENCE``.

    Args:
        seen: numbers of the probes that the model saw; on the others, completion estimated its values.
        strongest: probes that fire the logits most.
        weakest: those that fire them least; None: not known.
    """

    def observed(probes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
        return np.packbits(np.isin(probes, seen), axis=1, bitorder="little")[:, 0]

    evidence = np.zeros(len(strongest.probes), EVIDENCE)
    probes, values = strongest.first(SHOWN_PROBES)
    evidence["values"][:, : values.shape[1]], evidence["observed"] = values, observed(probes)
    if weakest is not None:
        probes, values = weakest.first(WEAKEST_PROBES)
        count = probes.shape[1]
        evidence["count"], evidence["weakest_observed"] = count, observed(probes)
        evidence["weakest"][:, :count], evidence["weakest_values"][:, :count] = probes, values
    return evidence


@dataclass(frozen=True, eq=False)
class TableSummary:
    """Counts of the written tables, and values for the ``meta`` table.

    Attributes:
        logits: number of logits of all models, those of copies counted too.
        rows: number of rows of the ``logits`` table.
        settings: entries for the generation's settings (`probelog.index.settings.GenerationSettings`).
        meta: further values for the ``meta`` table, by key.
    """

    logits: int
    rows: int
    settings: dict[str, Any]
    meta: dict[str, bytes]


def same_weights(keys: Sequence[str | None]) -> npt.NDArray[np.int32]:
    """For every model the number of the first model with the same key: (M,). A model without a key gets its own number."""
    first: dict[str, int] = {}
    return np.asarray(
        [number if not key else first.setdefault(key, number) for number, key in enumerate(keys)],
        np.int32,
    )


def write_tables(
    writer: GenerationWriter,
    batches: Iterable[LogitBatch | EncodedRows],
    models: pa.Table,
    encoder: RowEncoder,
    exact_logits: int = EXACT_LOGITS,
    same: Sequence[str | None] | None = None,
) -> TableSummary:
    """Write ``logits`` and ``models``, and from ``exact_logits`` rows on a vector index of the logits.

    Args:
        writer: of a generation that has neither table yet.
        batches: all logits, in any number of batches, or the rows that ``encoder`` made of them; the logits of one
            model follow each other. Those of a model whose weights were written before are skipped.
        models: the facts of all M models by number (``MODEL_FACTS``, but for ``copies``, which are counted here).
        encoder: of the rows.
        exact_logits: below this many rows a client scores all of them, and no vector index is built.
        same: a key for every model (M,), equal where the logits are the same (``ProbedModel.identity``); by default
            the weight digests.

    Raises:
        ValueError: the logits of a model do not follow each other.
        StoreError: the generation was swept meanwhile, or LanceDB counts other rows than were written.
    """
    same = models["weight_digest"].to_pylist() if same is None else same
    numbering = Numbering(same_weights(same))
    gallery = _Sample(_GALLERY_SAMPLE, np.empty(0, encoder.facts))
    rows = writer.write("logits", encoder.schema, logit_tables(batches, encoder, numbering, gallery))
    writer.write("models", MODELS, [numbering.joined(models, same)])
    if models.num_rows >= _INDEXED_MODELS:
        writer.index_columns("models", "repo", "weights", "identity")
    large = rows >= exact_logits and rows > 0
    basis = encoder.basis
    settings = {"rows": rows, "large": large, "middle_offset": basis.middle, "probes": encoder.probes}
    meta = {"basis.npy": npy(basis.array())}
    if large:
        with writer.writing("the vector index of logits"):
            shortlist.build(writer.open("logits"))
        meta["sample"] = gallery.rows.tobytes()
    return TableSummary(numbering.logits, rows, settings, meta)


def write_edges(writer: GenerationWriter, edges: pa.Table) -> None:
    """Write ``edges`` (``EDGES``), and indexes by which those of one model are found among many."""
    writer.write("edges", EDGES, [edges.cast(EDGES)])
    if edges.num_rows >= _INDEXED_MODELS:
        writer.index_columns("edges", "child", "parent")


def logit_tables(
    batches: Iterable[LogitBatch | EncodedRows],
    encoder: RowEncoder,
    numbering: Numbering,
    gallery: _Sample | None = None,
    first_row: int = 0,
    weights: npt.NDArray[np.integer[Any]] | None = None,
) -> Iterator[pa.Table]:
    """The ``logits`` table, batch by batch.

    Args:
        batches: all logits, or the rows of them; those of weights that were written before are skipped.
        encoder: of the rows.
        numbering: assigns rows and weights.
        gallery: sample that all rows are offered to.
        first_row: number of the table's first row.
        weights: (M,) the table's number for each number of weights in ``numbering``; by default the same.
    """
    for batch in batches:
        first = first_row + numbering.rows
        places = numbering.take(batch.model)
        if not len(places):
            continue
        own = batch.at(places)
        rows = own if isinstance(own, EncodedRows) else encoder.encode(own)
        rows.facts["row"] = np.arange(first, first + len(places))
        weight_numbers = numbering.weights[rows.model]
        rows.facts["weights"] = weight_numbers if weights is None else weights[weight_numbers]
        if gallery is not None:
            gallery.add(rows.facts)
        yield encoder.table(rows)


class Numbering:
    """Assigns the rows of ``logits`` to weights while they are written.

    Args:
        weights: (M,) for every model the number of the first model with the same weights.
    """

    def __init__(self, weights: npt.NDArray[np.int32]) -> None:
        self.weights = weights
        self.rows = 0
        # By number of weights: the model whose logits are written; -1: none yet.
        self._owner = np.full(len(weights), -1, np.int32)
        self._first = np.zeros(len(weights), np.int64)
        self._count = np.zeros(len(weights), np.int32)

    def take(self, models: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Positions (L',) in the next batch of the logits to write, of models (L,): each weights' once.

        Raises:
            ValueError: a model's logits do not follow each other.
        """
        models = np.asarray(models, np.int64)
        starts = np.flatnonzero(np.diff(models, prepend=-1))
        owned = np.zeros(len(models), bool)
        for start, stop in zip(starts, [*starts[1:], len(models)], strict=True):
            model = models[start]
            weights = self.weights[model]
            if self._owner[weights] == -1:
                self._owner[weights] = model
                self._first[weights] = self.rows
            if self._owner[weights] != model:
                continue
            if self._first[weights] + self._count[weights] != self.rows:
                raise ValueError(f"the logits of model {model} do not follow each other")
            owned[start:stop] = True
            self._count[weights] += stop - start
            self.rows += stop - start
        return np.flatnonzero(owned)

    @property
    def logits(self) -> int:
        """Number of logits of all models, those of copies counted too."""
        return int(self._count[self.weights].sum(dtype=np.int64))

    @property
    def places(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """First row of every model and its number of rows: (M,) each."""
        return self._first[self.weights], self._count[self.weights]

    def joined(self, models: pa.Table, same: Sequence[str | None]) -> pa.Table:
        """The ``models`` table (``MODELS``): the models' facts and the places of their logits."""
        copies = np.bincount(self.weights, minlength=len(self.weights))
        first, rows = self.places
        columns: dict[str, npt.NDArray[np.generic] | Sequence[object]] = {
            "id": np.arange(len(self.weights), dtype=np.int32),
            "weights": self.weights,
            "identity": same,
            "copies": copies[self.weights].astype(np.int32),
            "first_row": first,
            "rows": rows,
        }
        for name, values in columns.items():
            models = models.append_column(MODELS.field(name), pa.array(values, MODELS.field(name).type))
        return models.select(MODELS.names).cast(MODELS)


@dataclass(eq=False)
class _Sample:
    """A uniform random sample of fixed size of a stream of rows: those with the smallest random keys."""

    size: int
    rows: npt.NDArray[np.void]
    _keys: Float64 = field(default_factory=lambda: np.empty(0))
    _random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def add(self, rows: npt.NDArray[np.void]) -> None:
        keys = self._random.random(len(rows))
        if len(self._keys) == self.size:
            selected = keys < self._keys[-1]
            keys, rows = keys[selected], rows[selected]
        if len(keys):
            keys, rows = np.concatenate([self._keys, keys]), np.concatenate([self.rows, rows])
            order = np.argsort(keys)[: self.size]
            self._keys, self.rows = keys[order], rows[order]

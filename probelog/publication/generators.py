"""Writes a generation's generators from their samples: the tables ``generators`` and ``samples``.

Samples are streamed, twice: once for a sample of their features, which basis and temperatures are fitted on, once to be
described. Memory does not grow with the number of generators, but for their facts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.arrays import Floats
from probelog.errors import StoreError
from probelog.index import shortlist
from probelog.index.arrow import fixed_binary, fixed_lists, structured
from probelog.index.contents.generators import EXACT_GENERATORS
from probelog.index.generators.encoding import decode, description_type, encode, fit_axes, set_offsets
from probelog.index.generators.groups import GROUP_BITS, GROUPS, GroupSpace, partitions
from probelog.index.generators.schema import GENERATOR_TABLE, SHOWN, GeneratorSettings, samples_schema
from probelog.index.generators.shown import packed
from probelog.publication.generation_writer import GenerationWriter
from probelog.ranking.matched_heads import HeadSpace
from probelog.ranking.samples.description import Difference, Float32s, unit
from probelog.ranking.samples.matched import SampleSpace
from probelog.ranking.samples.sketches import SketchMap
from probelog.storage.encoding import npy

# Features that basis and temperatures are fitted on, and models at a time while these are written.
_FITTED = 20_000
_AT_ONCE = 64
# Probes that pictures are compared with: more change an offset by less than the samples' own noise.
_ANCHORS = 1000
_INDEXED = 10_000


class Sampled(NamedTuple):
    """The samples of one generator.

    Attributes:
        number: of the generator.
        features: (m, d) embeddings of its samples, m at least 1.
        base: (m, d) of its base's, where it is an adapter.
        thumbnails: some samples as pictures.
    """

    number: int
    features: Floats
    base: Floats | None
    thumbnails: Sequence[bytes]


@dataclass(frozen=True, eq=False)
class GeneratorSource:
    """The M generators of an index.

    Attributes:
        facts: columns of ``GENERATOR_FACTS`` by number, but for those that are counted here (``copies``, ``pictures``,
            ``strength``, ``consistency``).
        identities: (M,) keys, equal for generators that make the same samples.
        stream: reads the samples, in any order; of equal generators once or more.
        ledger: key of the ledger that they are of.
    """

    facts: pa.Table
    identities: Sequence[str]
    stream: Callable[[], Iterable[Sampled]]
    ledger: str


def write_generators(
    writer: GenerationWriter,
    source: GeneratorSource,
    space: HeadSpace,
    probes: Floats,
    sketches: SketchMap | None,
) -> tuple[GeneratorSettings, dict[str, bytes]]:
    """Write both tables; returns what the generation's settings say of them, and values for its ``meta`` table.

    Args:
        writer: of a generation that has neither table yet.
        source: the generators.
        space: of the generation's probes and background.
        probes: (n, d) unit embeddings of the probes.
        sketches: how sketches become pictures, where that is known.

    Raises:
        StoreError: a generator has no samples.
    """
    fitted = _some_features(source)
    anchors = np.asarray(probes, np.float32)
    anchors = anchors[np.random.default_rng(0).permutation(len(anchors))[:_ANCHORS]]
    plain = SampleSpace.fit(fitted, space.centre, space.background, space.texts, anchors)
    axes = fit_axes(fitted, anchors, *([space.texts] if len(space.texts) else []))
    described = _Described(source, plain.projected(axes), axes)
    schema = samples_schema(description_type(len(axes)).itemsize)
    rows = writer.write("samples", schema, described.tables(schema))
    writer.write("generators", GENERATOR_TABLE.append(SHOWN), [described.generators()])
    meta, groups = {"sample_axes.npy": npy(axes)}, None
    if rows > EXACT_GENERATORS:
        finder = GroupSpace.fit(plain.projected(axes), fitted @ axes.T, space.spread**0.5)
        groups, found_by = write_groups(writer, finder, len(axes))
        meta |= found_by
    if source.facts.num_rows >= _INDEXED:
        writer.index_columns("generators", "repo", "row")
    settings = GeneratorSettings(
        models=source.facts.num_rows,
        rows=rows,
        ledger=source.ledger,
        generation=writer.name,
        direction_sharpness=plain.direction_sharpness,
        embedding_sharpness=plain.embedding_sharpness,
        sketches=sketches is not None,
        groups=groups,
        euclidean=None if groups is None else True,
        by_row="row_groups.npy" in meta or None,
    )
    if sketches is not None:
        meta["sketch_map.npy"] = npy(sketches.array())
    return settings, meta


def write_groups(
    writer: GenerationWriter, finder: GroupSpace, coordinates: int
) -> tuple[int, dict[str, bytes]]:
    """Write the ``groups`` table of the ``samples`` table that was written, with its vector index.

    Returns:
        Its number of rows, and values for the generation's ``meta`` table.
    """

    def tables() -> Iterator[pa.Table]:
        kind, centre = description_type(coordinates), None
        samples = writer.open("samples")
        query = samples.search().select(["row", "description"]).limit(samples.count_rows())
        for batch in query.to_batches(batch_size=_AT_ONCE):
            table = pa.Table.from_batches([batch])
            owners, vectors = finder.vectors(decode(structured(table["description"], kind)).described)
            if (
                centre is None
            ):  # What all vectors have in common ranks none before another, and costs exactness.
                centre = vectors.mean(axis=0)
            rows = pa.array(table["row"].to_numpy()[owners], pa.int32())
            vectors = (vectors - centre).astype(np.float16)
            yield pa.table({"row": rows, "vector": fixed_lists(vectors, pa.float16())}, GROUPS)

    count = writer.write("groups", GROUPS, tables())
    with writer.writing("the vector index of generators"):
        shortlist.build(writer.open("groups"), "l2", partitions(count), GROUP_BITS)
        by_row = _by_row(writer)
    return count, {"group_axes.npy": npy(finder.axes)} | by_row


def _by_row(writer: GenerationWriter) -> dict[str, bytes]:
    """LanceDB's number of the first group of each row of ``samples``, and the first generator of each."""
    groups, ids = _in_order(writer, "groups", "row", shortlist.ROW_ID)
    rows, generators = _in_order(writer, "samples", "row", "generator")
    # LanceDB reads what was written in its order, and does not promise it.
    if not (np.array_equal(rows, np.arange(len(rows))) and (np.diff(groups) >= 0).all()):
        return {}
    first = ids[np.unique(groups, return_index=True)[1]]
    return {"row_groups.npy": npy(first.astype(np.int64)), "row_generators.npy": npy(generators)}


def _in_order(writer: GenerationWriter, name: str, *columns: str) -> list[npt.NDArray[Any]]:
    """Columns of a written table, in the order of LanceDB's own numbers of rows."""
    table = writer.open(name)
    query = table.search().with_row_id(True).select(list(dict.fromkeys([*columns, shortlist.ROW_ID])))
    found = query.limit(table.count_rows()).to_arrow().sort_by(shortlist.ROW_ID)
    return [found[column].to_numpy() for column in columns]


def _some_features(source: GeneratorSource) -> Float32s:
    """Features (F, d) of all models alike, some thousand."""
    each = max(1, _FITTED // max(1, source.facts.num_rows))
    rows = [_units(item.features)[:each] for item in source.stream()]
    if not rows:
        raise StoreError("none of the generators has samples")
    joined = np.concatenate(rows)
    return joined[np.random.default_rng(0).permutation(len(joined))[:_FITTED]]


class _Described:
    """Describes the models while their samples are streamed, and gives the table of facts afterwards."""

    def __init__(self, source: GeneratorSource, space: SampleSpace, axes: Float32s) -> None:
        self._source, self._space, self._axes = source, space, axes
        numbered = [*enumerate(source.identities)]
        self._first = {identity: number for number, identity in reversed(numbered)}
        # By identity: row, number of pictures, and how adapters differ.
        self._known: dict[str, tuple[int, int, Difference | None]] = {}

    def tables(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """The ``samples`` table, a few models at a time."""
        batch: list[tuple[int, npt.NDArray[np.void], Sequence[bytes]]] = []
        for item in self._source.stream():
            identity = self._source.identities[item.number]
            if identity in self._known:
                continue
            features = _units(item.features)
            difference = None if item.base is None else Difference.of(features, _units(item.base))
            self._known[identity] = (len(self._known), len(item.thumbnails), difference)
            described = encode(features, difference, self._axes)
            batch.append((self._first[identity], described, item.thumbnails))
            if len(batch) == _AT_ONCE:
                yield self._table(batch, schema)
                batch = []
        if batch:
            yield self._table(batch, schema)

    def _table(
        self, batch: Sequence[tuple[int, npt.NDArray[np.void], Sequence[bytes]]], schema: pa.Schema
    ) -> pa.Table:
        generators, described, thumbnails = zip(*batch, strict=True)
        stored = np.concatenate(described)
        set_offsets(stored, self._space.offsets(decode(stored).described))
        first = len(self._known) - len(batch)
        return pa.table(
            {
                "row": pa.array(range(first, len(self._known)), pa.int32()),
                "generator": pa.array(generators, pa.int32()),
                "description": fixed_binary(stored),
                "thumbnails": [list(some) for some in thumbnails],
            },
            schema,
        )

    def generators(self) -> pa.Table:
        """The ``generators`` table: the facts, and which row of samples is each one's own.

        Raises:
            StoreError: a generator has no samples.
        """
        source = self._source
        missing = [n for n, identity in enumerate(source.identities) if identity not in self._known]
        if missing:
            repo = source.facts["repo"][missing[0]].as_py()
            raise StoreError(f"{len(missing)} generators have no samples, {repo} for one: sample them again")
        known = [self._known[identity] for identity in source.identities]
        rows, pictures, differences = zip(*known, strict=True)
        counts = np.bincount(rows, minlength=len(self._known))
        columns: dict[str, Sequence[object] | npt.NDArray[np.generic]] = {
            "id": np.arange(len(known), dtype=np.int32),
            "row": np.asarray(rows, np.int32),
            "identity": source.identities,
            "copies": counts[list(rows)].astype(np.int32),
            "pictures": np.asarray(pictures, np.int32),
            "strength": [None if item is None else item.strength for item in differences],
            "consistency": [None if item is None else item.consistency for item in differences],
        }
        table = source.facts
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, GENERATOR_TABLE.field(name).type))
        table = table.select(GENERATOR_TABLE.names).cast(GENERATOR_TABLE)
        return table.append_column(SHOWN, pa.array(packed(table), SHOWN.type))


def _units(rows: Floats) -> Float32s:
    """Features as they were before they were rounded for storage: of length 1.

    Raises:
        StoreError: there are none, or some are not finite.
    """
    values = np.asarray(rows, np.float32)
    if not len(values) or not np.isfinite(values).all():
        raise StoreError(
            "a generator's samples are damaged: their features are not finite, or there are none"
        )
    return np.asarray(unit(values), np.float32)

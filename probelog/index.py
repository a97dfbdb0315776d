"""The published index: its LanceDB tables, and the generations that a small pointer file tells apart.

An index lies under ``STORE/index``::

    current.json                     the pointer: which generation readers use, and those before it
    generations/NAME/logits.lance    a row per logit of distinct weights: direction, offset, the probes that fire it most
    generations/NAME/models.lance    a row per model: its facts, declared labels, and which rows of logits are its own
    generations/NAME/shortlist.lance in a large index: small vectors of all logits, under a vector index
    generations/NAME/probes.lance    a row per probe: thumbnail and embedding
    generations/NAME/meta.lance      settings, background, text and image encoder
    generations/NAME/hold.json       until when a sweep leaves it alone (it is being built, or was just withdrawn)

A generation is built whole under a new name, then the pointer is swapped in one atomic step. Readers never see
a half-built one.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from probelog.errors import IndexNotFoundError, SchemaVersionError, StoreError, UsageError
from probelog.storage import Store, lance_options

INDEX_VERSION = 3
POINTER = "current.json"
_HOLD = "hold.json"
# A publisher renews its hold before every table, none of which takes this long; one that died leaves its ruins
# behind for no longer. A withdrawn generation needs to outlive the readers that look for a newer one every 30 s.
_BUILDING = dt.timedelta(hours=24)
_WITHDRAWN = dt.timedelta(minutes=10)


@dataclass(frozen=True)
class Pointer:
    """Which generation is live, and which ones before it can still be returned to (newest first)."""

    generation: str
    source: str
    published: str
    previous: list[dict[str, str]] = field(default_factory=list)
    version: int = INDEX_VERSION

    def to_bytes(self) -> bytes:
        """The pointer file's content."""
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Pointer:
        """Read a pointer file.

        Raises:
            SchemaVersionError: published by a newer ProbeLog.
            StoreError: damaged.
        """
        try:
            content = json.loads(data)
            version = int(content["version"])
            if version > INDEX_VERSION:
                raise SchemaVersionError(
                    f"{where}: index version {version} is newer than this ProbeLog knows ({INDEX_VERSION}). "
                    "Upgrade ProbeLog."
                )
            return cls(
                **{name: _text(content[name]) for name in _FACTS},
                previous=[{name: _text(item[name]) for name in _FACTS} for item in content["previous"]],
                version=version,
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise StoreError(f"{where} is damaged ({error!r}). Delete it and publish again.") from error


_FACTS = ("generation", "source", "published")


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} is not a name")
    return value


def find_index(uri: str) -> Store:
    """The index at an address: its own, or that of a store that holds one.

    Raises:
        IndexNotFoundError: there is none; the message says what to do.
        StoreError: the address cannot be reached.
    """
    store = Store(uri)
    for candidate in (store, store.child("index")):
        try:
            if candidate.exists(POINTER):
                return candidate
        except OSError as error:
            _unreachable(candidate, error)
    raise IndexNotFoundError(
        f"no published index at {store.uri} (looked for {POINTER} there and in index/). "
        "Give the index's address or the store's, or publish one first: probelog-index publish"
    )


def read_pointer(index: Store) -> tuple[Pointer, bytes]:
    """The live pointer and its bytes (to swap against).

    Raises:
        IndexNotFoundError: there is none.
        SchemaVersionError: published by a newer ProbeLog.
        StoreError: it is damaged or cannot be read.
    """
    try:
        data = index.read_or_none(POINTER)
    except OSError as error:
        _unreachable(index, error)
    if data is None:
        raise IndexNotFoundError(f"no published index at {index.uri}: publish one first")
    return Pointer.from_bytes(data, index.path(POINTER)), data


def go_live(index: Store, generation: str, source: str, keep: int = 3) -> Pointer:
    """Make a finished generation the live one.

    Raises:
        ConflictError: another publisher was faster; the pointer is left as that one wrote it.
    """
    before = index.read_or_none(POINTER)
    previous: list[dict[str, str]] = []
    if before is not None:
        old = Pointer.from_bytes(before, index.path(POINTER))
        previous = [_past(old), *old.previous][: keep - 1]
    pointer = Pointer(generation, source, _now(), previous)
    index.swap(POINTER, pointer.to_bytes(), before)
    return pointer


def roll_back(index: Store) -> Pointer:
    """Return to the generation before the live one, and forget the live one.

    Raises:
        UsageError: there is no earlier generation.
        StoreError: the earlier generation is no longer there.
        ConflictError: somebody published meanwhile.
    """
    pointer, before = read_pointer(index)
    if not pointer.previous:
        raise UsageError(f"{index.uri}: there is no earlier generation to roll back to")
    first, *rest = pointer.previous
    back = Pointer(first["generation"], first["source"], _now(), rest)
    if not index.names(f"generations/{back.generation}/meta.lance"):
        raise StoreError(f"{index.uri}: the earlier generation {back.generation} is gone; publish again")
    _hold(index, pointer.generation, _WITHDRAWN)
    index.swap(POINTER, back.to_bytes(), before)
    return back


def sweep(index: Store) -> list[str]:
    """Delete the generations that nobody needs any more; returns their names.

    Kept are those that the pointer names (the live one and those to roll back to, which readers that have not
    looked yet still answer from), and those on hold: being built by another publisher, or just withdrawn.
    """
    found = {name.split("/")[1] for name in index.names("generations")}
    held = {name for name in found if _on_hold(index, name)}
    # Read last: what went live since the listing was on hold then, or is named by now.
    pointer, _ = read_pointer(index)
    named = {pointer.generation, *(item["generation"] for item in pointer.previous)}
    for name in sorted(named & held):
        index.delete(f"generations/{name}/{_HOLD}")
    gone = sorted(found - held - named)
    for name in gone:
        index.delete_folder(f"generations/{name}")
    return gone


def _hold(index: Store, generation: str, duration: dt.timedelta) -> None:
    until = dt.datetime.now(dt.UTC) + duration
    index.write_json(f"generations/{generation}/{_HOLD}", {"until": until.isoformat(timespec="seconds")})


def _on_hold(index: Store, generation: str) -> bool:
    data = index.read_or_none(f"generations/{generation}/{_HOLD}")
    if data is None:
        return False
    try:
        return dt.datetime.fromisoformat(json.loads(data)["until"]) > dt.datetime.now(dt.UTC)
    except (ValueError, KeyError, TypeError):
        return False


def _unreachable(index: Store, error: OSError) -> NoReturn:
    raise StoreError(f"{index.uri} cannot be read: {error}") from error


def _past(pointer: Pointer) -> dict[str, str]:
    return {"generation": pointer.generation, "source": pointer.source, "published": pointer.published}


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


# What one generation's connection keeps in memory of indexes and of tables' metadata, however large they are.
_INDEX_CACHE = 256 << 20
_METADATA_CACHE = 64 << 20


def connect(index: Store, generation: str) -> Any:
    """LanceDB's connection to one generation."""
    import lancedb

    return lancedb.connect(
        index.path(f"generations/{generation}"),
        storage_options=lance_options(index.uri) or None,
        session=lancedb.Session(_INDEX_CACHE, _METADATA_CACHE),
    )


# What is known of a model, whoever asks.
MODEL_FACTS = pa.schema(
    [
        ("repo", pa.string()),
        ("sha", pa.string()),
        ("library", pa.string()),
        ("pipeline_tag", pa.string()),
        ("architecture", pa.string()),
        ("head", pa.string()),
        ("logits", pa.int32()),
        ("labels", pa.list_(pa.string())),
        ("licence", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("downloads", pa.int64()),
        ("likes", pa.int64()),
        ("last_modified", pa.timestamp("ms", tz="UTC")),
        ("parameters", pa.int64()),
        ("base_model", pa.string()),
        ("weight_digest", pa.string()),
        ("observed", pa.int32()),
        ("copies", pa.int32()),  # models with these weights, this one counted
    ]
)

# Besides the facts: ``weights`` is the number of the first model with the same weights, which all of them share the
# rows ``first_row`` .. ``first_row + rows`` of the logits table with.
MODELS = pa.schema(
    [
        ("id", pa.int32()),
        ("weights", pa.int32()),
        ("first_row", pa.int64()),
        ("rows", pa.int32()),
        *MODEL_FACTS,
    ]
)

META = pa.schema([("key", pa.string()), ("value", pa.large_binary())])

# How many of the probes that fire a logit most an index keeps, for people to look at.
SHOWN_PROBES = 8


def logits_schema(dimension: int, probes: int) -> pa.Schema:
    """Schema of the ``logits`` table; ``id`` is the row's number.

    Args:
        dimension: of the encoder's space.
        probes: how many there are.
    """
    number = pa.uint16() if probes <= 1 << 16 else pa.uint32()
    return pa.schema(
        [
            ("id", pa.int64()),
            ("weights", pa.int32()),
            ("logit", pa.int32()),
            ("negated", pa.bool_()),
            ("offset", pa.float32()),
            ("scale", pa.float32()),
            ("direction", pa.list_(pa.int8(), dimension)),
            ("probes", pa.list_(number, min(SHOWN_PROBES, probes))),
        ]
    )


def probes_schema(dimension: int) -> pa.Schema:
    """Schema of the ``probes`` table."""
    return pa.schema(
        [
            ("id", pa.int32()),
            ("name", pa.string()),
            ("sha256", pa.string()),
            ("thumbnail", pa.binary()),
            ("embedding", pa.list_(pa.float32(), dimension)),
        ]
    )


def fixed_lists(matrix: np.ndarray[Any, Any], value_type: pa.DataType) -> pa.FixedSizeListArray:
    """A (N, w) matrix as an Arrow column of N fixed-size lists."""
    flat = pa.array(np.ascontiguousarray(matrix).reshape(-1), value_type)
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])


def matrix_of(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """An Arrow column of fixed-size lists as a (N, w) matrix."""
    width = column.type.list_size
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    if not chunks:
        return np.empty((0, width), column.type.value_type.to_pandas_dtype())
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


class GenerationWriter:
    """Builds one generation's tables. Nothing is live before ``go_live`` is called with its name."""

    def __init__(self, index: Store, name: str) -> None:
        self.index = index
        self.name = name
        index.delete_folder(f"generations/{name}")  # what an interrupted publish of the same name left
        _hold(index, name, _BUILDING)
        self._connection = connect(index, name)

    def write(self, table: str, schema: pa.Schema, batches: Iterable[pa.Table]) -> int:
        """Stream batches into a table; returns its number of rows.

        Raises:
            StoreError: LanceDB counts other rows than were written.
        """
        rows = 0
        _hold(self.index, self.name, _BUILDING)

        def counted() -> Iterator[pa.RecordBatch]:
            nonlocal rows
            for batch in batches:
                rows += batch.num_rows
                yield from batch.to_batches()

        # One streamed write: LanceDB cuts it into fragments of a good size, whatever the batches' sizes.
        reader = pa.RecordBatchReader.from_batches(schema, counted())
        opened = self._connection.create_table(table, data=reader, schema=schema)
        if opened.count_rows() != rows:
            raise StoreError(f"table {table}: wrote {rows} rows, LanceDB counts {opened.count_rows()}")
        return rows

    def open(self, table: str) -> Any:
        """A table that was written."""
        return self._connection.open_table(table)

    def write_meta(self, values: dict[str, bytes]) -> None:
        """Write the ``meta`` table: named byte strings."""
        self.write("meta", META, [pa.table({"key": list(values), "value": list(values.values())}, META)])

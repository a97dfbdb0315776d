"""One published generation, opened for reading.

The logits of a small index (below ``shortlist.EXACT_LOGITS``) are read into memory once. A large index holds nothing in
memory whose size grows with it: logits are taken from the table as a query needs them, or streamed.

A generation is whole, or an *update* of a whole one, its *base* (``probelog.publication.update``): it holds the added
models, lists the base's models that were removed, and shares probes, background, encoder and vector index with the
base. To the reader both look alike.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from probelog.arrays import ArrowArray, values_of
from probelog.errors import QueryError, StoreError
from probelog.index import shortlist
from probelog.index.arrow import matrix_of, structured
from probelog.index.basis import BYTES, Basis, EncodedDirections
from probelog.index.conditions import filtered_columns, not_understood, unknown_column
from probelog.index.pointer import Pointer
from probelog.index.schema import (
    EVIDENCE,
    INDEX_VERSION,
    MODELS,
    WEAKEST_PROBES,
    logit_facts,
)
from probelog.index.settings import GenerationSettings
from probelog.index.tables import Tables, completed, first_line, is_valid_sql_text, sql_in, sql_literal
from probelog.ranking.confidence import ColumnStatistics, Confidence, background_scores
from probelog.ranking.matched_heads import Float64, HeadSpace
from probelog.storage.encoding import from_npy
from probelog.storage.records import is_text
from probelog.storage.schemas import EDGES
from probelog.storage.versions import check_version
from probelog.terminal import printable

if TYPE_CHECKING:
    from probelog.encoders.image import ImageEncoder
    from probelog.encoders.text import TextEncoder
    from probelog.storage.store import Store

T = TypeVar("T")
AnyEncoder = TypeVar("AnyEncoder", "TextEncoder", "ImageEncoder")

# Logits that are read and scored at a time: 8,192 in 512 dimensions are 17 MB.
ROWS_AT_ONCE = 8192
# Edges that are read at a time: some hundred bytes each.
EDGES_AT_ONCE = 1024
# Models that are read at a time, where all are.
_MODELS_AT_ONCE = 8192
# Values of one SQL condition.
_TEXTS_AT_ONCE = 500
# What LanceDB says about a column that it does not have, and before a statement that it made of a condition.
_UNKNOWN_COLUMN = re.compile(r"Schema error: No field named (\S+)\.( |$)")
_NO_CONDITION = ("Error parsing statement", "Error resolving filter", "rust future panicked")
# Number of names that an unknown one is compared with, to suggest similar ones: some 20 microseconds each.
_COMPARED_NAMES = 10_000


# Logits, or models, of an index that is not large: several times as many as the publisher keeps there.
_MOST_IN_MEMORY = 1_000_000
_ROUNDING = 0.01
# Numbers of a direction.
_MOST_DIMENSIONS = 1 << 16


def _only(count: int) -> range:
    return range(count, count + 1)


class _Once(Generic[T]):
    """Like ``cached_property``, but made once even when several threads ask at the same time."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._name = make.__name__
        self.__doc__ = make.__doc__

    @overload
    def __get__(self, owner: None, kind: type) -> _Once[T]: ...
    @overload
    def __get__(self, owner: Generation, kind: type) -> T: ...
    def __get__(self, owner: Generation | None, kind: type) -> _Once[T] | T:
        if owner is None:
            return self
        with owner._lock:
            cache = owner.__dict__
            if self._name not in cache:
                cache[self._name] = self._make(
                    owner
                )  # an instance's dictionary is looked up before this descriptor
            value: T = cache[self._name]
            return value


@dataclass(frozen=True, eq=False)
class Logits:
    """n logits of an index.

    Attributes:
        rows: (n,) rows in the ``logits`` table.
        weights: (n,) number of the first model with the weights that the logit belongs to.
        logit: (n,) position in the model's head.
        negated: (n,) whether it is the opposite of a one-logit head's concept.
        offsets: (n,) over the whole background (docs/method.md).
        coordinates: (n, p) directions in the index's basis (``probelog.index.basis``), unit vectors.
        probes: (n, r) numbers of the probes that fire the logit most, descending.
    """

    rows: npt.NDArray[np.int64]
    weights: npt.NDArray[np.int32]
    logit: npt.NDArray[np.int32]
    negated: npt.NDArray[np.bool_]
    offsets: Float64
    coordinates: npt.NDArray[np.float32]
    probes: npt.NDArray[np.integer[Any]]

    @classmethod
    def joined(cls, parts: Sequence[Logits]) -> Logits:
        """Concatenate one or more parts, in their order."""
        if len(parts) == 1:
            return parts[0]
        names = [item.name for item in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_] | slice) -> Logits:
        """The logits at some positions, or under a mask (n,)."""
        return Logits(*(getattr(self, item.name)[places] for item in fields(self)))


class Evidence(NamedTuple):
    """What is known of the probes that fire n logits most and least.

    Attributes:
        values: (n,) as ``EVIDENCE`` says.
        known: (n,) whether anything is known: older indexes do not say.
    """

    values: npt.NDArray[np.void]
    known: npt.NDArray[np.bool_]


class Generation:
    """One published generation, immutable. Large parts are read when first needed.

    Safe to share between threads. Every property and method may raise StoreError: the generation was swept, is
    damaged, or the store cannot be reached.

    Raises:
        SchemaVersionError: made by a newer ProbeLog.
        StoreError: it is missing or damaged.
    """

    def __init__(self, index: Store, pointer: Pointer) -> None:
        self.index = index
        self.pointer = pointer
        self._lock = threading.RLock()
        self._tables = Tables(index, pointer.generation)
        where = f"{index.uri}: generation {pointer.generation}"
        content = self._json(self._tables.meta("settings"), "settings")
        if not isinstance(content, dict):
            raise self._tables.damaged("settings", "they are no object")
        check_version(content, INDEX_VERSION, index.uri, "index")
        self.settings = settings = GenerationSettings.from_dict(content, where)
        base = settings.base
        if base is not None and (base.generation == pointer.generation or base.rows > settings.rows):
            raise self._tables.damaged("settings", "it cannot be an update of its base")
        if not settings.large and max(settings.rows, settings.models) > _MOST_IN_MEMORY:
            raise self._tables.damaged(
                "settings", "it is too large to be held in memory, and not marked as large"
            )
        # Rows from this number on are the update's.
        self._base_row_count = settings.rows if base is None else base.rows
        self._base_model_count = settings.models if base is None else base.models
        self._base = self._tables if base is None else Tables(index, base.generation)
        self._tables.expect(
            {"logits": _only(settings.rows - self._base_row_count), "models": range(settings.models + 1)}
        )
        if settings.edges is not None:
            self._tables.expect({"edges": _only(settings.edges)})
        self._base.expect(
            {
                "logits": _only(self._base_row_count),
                "models": _only(self._base_model_count),
                "probes": _only(settings.probes),
            }
        )

    def close(self) -> None:
        """End the processes of the encoders; the next query by text or image starts them again."""
        with self._lock:
            for encoder in (self.__dict__.get(name) for name in ("text_encoder", "image_encoder")):
                if encoder is not None:
                    encoder.close()

    @property
    def is_update(self) -> bool:
        """Whether it is an update of another generation."""
        return self._base is not self._tables

    def meta(self, key: str) -> bytes:
        """One value of the ``meta`` table, of an update's base where the update lacks it."""
        value = self._tables.meta(key)
        if value is None and self.is_update:
            value = self._base.meta(key)
        if value is None:
            raise StoreError(f"{self.index.uri}: generation {self.pointer.generation} has no {key!r}")
        return value

    def _json(self, data: bytes | None, key: str) -> object:
        try:
            return json.loads(data or b"{}")
        except (ValueError, RecursionError) as error:
            raise self._tables.damaged(key, f"it is no JSON: {printable(error, 100)}") from None

    def _array(self, key: str, shape: Sequence[int | range | None], kinds: str = "f") -> npt.NDArray[Any]:
        """An array of the ``meta`` table, of a shape (None: any size) and of finite numbers of some kinds.

        Raises:
            StoreError: it is not such an array.
        """
        try:
            array = from_npy(self.meta(key))
        except ValueError as error:
            raise self._tables.damaged(key, printable(error)) from None
        expected = len(shape) == array.ndim and all(
            size is None or (actual in size if isinstance(size, range) else actual == size)
            for actual, size in zip(array.shape, shape, strict=True)
        )
        if not expected or array.dtype.kind not in kinds:
            raise self._tables.damaged(key, f"it holds {array.dtype} numbers of shape {array.shape}")
        if not np.isfinite(array).all():
            raise self._tables.damaged(key, "it holds numbers that are not finite")
        return array

    # Models

    def models_table(
        self, columns: Sequence[str], where: str | None = None, limit: int | None = None
    ) -> pa.Table:
        """Columns of the models, all of them or those that meet an SQL condition, and ``id``; sorted by ``id``.

        Numbers have gaps where models of the base were removed. A condition over ``copies`` sees the base's counts.
        """
        names = list(dict.fromkeys(["id", *columns, *(["weights"] if "copies" in columns else [])]))
        if not self.is_update:
            return self._checked(self._tables.rows("models", names, where, limit).sort_by("id"))
        table = self._base.rows(
            "models", names, where, None if limit is None else limit + len(self._replaced)
        )
        table = table.filter(pa.array(~np.isin(table["id"].to_numpy(), self._replaced)))
        if "copies" in columns:
            table = self._with_current_copies(table)
        table = pa.concat_tables([table, self._tables.rows("models", names, where)]).sort_by("id")
        return self._checked(table if limit is None else table.slice(0, limit))

    def model_blocks(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The same columns of all models, in blocks of at most ``_MODELS_AT_ONCE``."""
        end = max(
            self._base_model_count, int(self._update_numbers.max(initial=-1)) + 1 if self.is_update else 0
        )
        for start in range(0, end, _MODELS_AT_ONCE):
            yield self.models_table(columns, f"id >= {start} AND id < {start + _MODELS_AT_ONCE}")

    def _checked(self, models: pa.Table) -> pa.Table:
        """Rows of the models, whose logits are rows of the index.

        Raises:
            StoreError: some are not.
        """
        if "first_row" in models.column_names and "rows" in models.column_names:
            starts, counts = (np.asarray(models[name].to_numpy(), np.int64) for name in ("first_row", "rows"))
            # Neither is below 0; compared in this order, the sum cannot overflow.
            if (starts > self.size).any() or (starts + counts > self.size).any():
                raise self._tables.damaged("models", "a model has logits that the index does not have")
        return models

    def models_named(
        self, column: str, values: Iterable[str], columns: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Rows of the models whose ``column`` has one of ``values``, sorted by ``id``."""
        texts, rows = sorted(set(values)), []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            condition = sql_in(column, texts[start : start + _TEXTS_AT_ONCE])
            rows += self.models_table(columns, condition).to_pylist()
        return sorted(rows, key=lambda row: int(row["id"]))

    def take_models(self, numbers: Sequence[int] | npt.NDArray[Any], columns: Sequence[str]) -> pa.Table:
        """Columns of the models with the given numbers, in the order of the numbers, and ``id``.

        Raises:
            StoreError: a number has no row.
        """
        unique_numbers, places = np.unique(np.asarray(numbers, np.int64), return_inverse=True)
        names = list(dict.fromkeys(["id", *columns, *(["weights"] if "copies" in columns else [])]))
        update_numbers = (
            unique_numbers[np.isin(unique_numbers, self._update_numbers)]
            if self.is_update
            else np.empty(0, np.int64)
        )
        base_numbers = np.setdiff1d(unique_numbers, update_numbers)
        parts: list[pa.Table] = []
        if len(base_numbers):
            parts.append(self._base_models(base_numbers, names))
            if self.is_update and "copies" in columns:
                parts[-1] = self._with_current_copies(parts[-1])
        if len(update_numbers):
            parts.append(self._tables.rows("models", names, sql_in("id", update_numbers.tolist())))
        if not parts:
            return self._base.rows("models", names, limit=1).slice(0, 0)
        table = pa.concat_tables(parts)
        if not np.array_equal(table["id"].to_numpy(), unique_numbers):
            table = table.sort_by("id")
            if not np.array_equal(table["id"].to_numpy(), unique_numbers):
                raise self._base.gap_error("models")
        return self._checked(table.take(places))

    def _base_models(self, numbers: npt.NDArray[np.int64], names: Sequence[str]) -> pa.Table:
        """Columns of models of the base, or of a whole generation, by ascending number, removed ones included."""
        if numbers[0] < 0 or numbers[-1] >= self._base_model_count:
            raise self._base.gap_error("models")
        with self._base.reading("models"):
            query = self._base.open("models").take_offsets(numbers.tolist())
            rows = completed(query.select(self._base.present("models", names)).to_arrow(), names)
        self._base.check_rows("models", rows)
        return rows

    @_Once
    def _replaced(self) -> npt.NDArray[np.int64]:
        """Numbers of the base's models that were removed, or whose rows the update replaces; ascending."""
        return np.asarray(self._array("replaced.npy", [None], "iu"), np.int64)

    @_Once
    def _update_numbers(self) -> npt.NDArray[np.int64]:
        return np.asarray(self._tables.rows("models", ["id"])["id"].to_numpy(), np.int64)

    @_Once
    def _removed_weights(self) -> npt.NDArray[np.int64]:
        """Numbers of the base's weights that no model has any more (numbers of other removed models are among them)."""
        return np.setdiff1d(self._replaced, self._update_numbers)

    @_Once
    def _counts(self) -> dict[int, int]:
        """Number of models by weights of the base, where it has changed."""
        return {int(weights): int(count) for weights, count in self._array("copies.npy", [None, 2], "iu")}

    def _with_current_copies(self, models: pa.Table) -> pa.Table:
        """Rows of the base's models with the present counts of ``copies``."""
        pairs = zip(values_of(models["weights"], int), values_of(models["copies"], int), strict=True)
        copies = pa.array([self._counts.get(weights, count) for weights, count in pairs], pa.int32())
        return models.set_column(models.column_names.index("copies"), "copies", copies)

    # Background, encoder, probes

    @_Once
    def background(self) -> list[str]:
        """Names of the background concepts, by number."""
        names = self._json(self.meta("background"), "background")
        if not isinstance(names, list) or not all(map(is_text, names)):
            raise self._tables.damaged("background", "it is no list of names")
        return names

    @property
    def size(self) -> int:
        """Number of rows of the ``logits`` table: logits of distinct weights, those of removed models included."""
        return self.settings.rows

    @property
    def large(self) -> bool:
        """Whether it is searched by a shortlist instead of being held in memory."""
        return self.settings.large

    @_Once
    def basis(self) -> Basis:
        """The basis of the logits' coordinates in the encoder's space."""
        array = self._array("basis.npy", [range(2, BYTES), range(1, _MOST_DIMENSIONS + 1)])
        if len(array) > array.shape[1] + 1:
            raise self._tables.damaged(
                "basis.npy", f"it has {len(array) - 1} axes in {array.shape[1]} dimensions"
            )
        return Basis.from_array(array, self.settings.middle_offset, self.sharpness)

    @_Once
    def _facts(self) -> np.dtype[np.void]:
        return logit_facts(self.basis, self.settings.probes)

    def _logits(self, facts: npt.NDArray[np.void]) -> Logits:
        """Logits from their values in the table (``logit_facts``).

        Raises:
            StoreError: some value is none.
        """
        logits = Logits(
            facts["row"].astype(np.int64),
            # Copied, so that the array of all facts can be freed.
            facts["weights"].copy(),
            facts["logit"].copy(),
            facts["negated"].copy().view(np.uint8) != 0,  # any byte may be there
            facts["offset"].astype(np.float64),
            self.basis.decode(EncodedDirections(facts["precise"], facts["rest"], facts["scale"])),
            facts["probes"].copy(),
        )
        # A direction that is not finite makes every coordinate so.
        bad = {"offset": _not_finite(logits.offsets), "direction": _not_finite(logits.coordinates[:, 0])}
        if any(bad.values()):
            found = [
                f"{count} values of {name} of its logits are not finite"
                for name, count in bad.items()
                if count
            ]
            raise self._base.damaged("logits", "; ".join(found))
        numbered = min(logits.weights.min(initial=0), logits.logit.min(initial=0)) >= 0
        if not numbered or logits.probes.max(initial=0) >= max(1, self.settings.probes):
            raise self._base.damaged("logits", "a value is not one that a logit has")
        return logits

    @_Once
    def all_logits(self) -> Logits:
        """All logits. For small indexes, or a machine with 2 KB of memory per logit."""
        return Logits.joined([*self._stream(), self.recent])

    @_Once
    def recent(self) -> Logits:
        """The logits of an update itself: not in the vector index, and few enough that all are scored for every query."""
        if not self.is_update:
            return self._logits(np.empty(0, self._facts))
        with self._tables.reading("logits"):
            facts = structured(self._tables.rows("logits", ["facts"])["facts"], self._facts)
            facts = facts[np.argsort(facts["row"])]
            if not np.array_equal(facts["row"], np.arange(self._base_row_count, self.size)):
                raise self._tables.gap_error("logits")
        return self._logits(facts)

    def logits(self, rows: npt.NDArray[np.int64]) -> Logits:
        """The logits at some rows, in the order of ``rows``. The rows' models must not have been removed.

        Raises:
            StoreError: a row is missing.
        """
        if not self.large:
            places = np.minimum(np.searchsorted(self.all_logits.rows, rows), len(self.all_logits) - 1)
            if len(rows) and not np.array_equal(self.all_logits.rows[places], rows):
                raise self._base.gap_error("logits")
            return self.all_logits[places]
        unique_rows, places = np.unique(rows, return_inverse=True)
        base_rows = unique_rows[unique_rows < self._base_row_count]
        facts = np.empty(0, self._facts)
        if len(base_rows):
            with self._base.reading("logits"):
                query = self._base.open("logits").take_offsets(base_rows.tolist())
                facts = structured(query.select(["facts"]).to_arrow()["facts"], self._facts)
            facts = facts[np.argsort(facts["row"])]
            if not np.array_equal(facts["row"], base_rows):
                raise self._base.gap_error("logits")
        logits = self._logits(facts)
        if len(base_rows) < len(unique_rows):
            logits = Logits.joined(
                [logits, self.recent[unique_rows[len(base_rows) :] - self._base_row_count]]
            )
        return logits[places]

    def evidence(self, rows: npt.NDArray[np.int64]) -> Evidence:
        """What is known of the probes that fire the logits at some rows most and least, in the order of ``rows``.

        Raises:
            StoreError: a row is missing, or a value is not one that a logit has.
        """
        unique_rows, places = np.unique(rows, return_inverse=True)
        in_base = unique_rows < self._base_row_count
        parts = [
            self._evidence_of(tables, unique_rows[selected], first)
            for tables, selected, first in (
                (self._base, in_base, 0),
                (self._tables, ~in_base, self._base_row_count),
            )
        ]
        return Evidence(*(np.concatenate(columns)[places] for columns in zip(*parts, strict=True)))

    def own_evidence(self) -> Iterator[Evidence]:
        """That of all rows of the generation's own table, in blocks of at most ``ROWS_AT_ONCE``."""
        first = self._base_row_count if self.is_update else 0
        for start in range(first, self.size, ROWS_AT_ONCE):
            rows = np.arange(start, min(start + ROWS_AT_ONCE, self.size))
            yield self._evidence_of(self._tables, rows, first)

    def _evidence_of(self, tables: Tables, rows: npt.NDArray[np.int64], first: int) -> Evidence:
        """That of ascending rows of one table, which starts with the row ``first``."""
        unknown = Evidence(np.zeros(len(rows), EVIDENCE), np.zeros(len(rows), bool))
        if not len(rows):
            return unknown
        with tables.reading("logits"):
            table = tables.open("logits")
            if "evidence" not in table.schema.names:
                return unknown
            found = table.take_offsets((rows - first).tolist()).select(["facts", "evidence"]).to_arrow()
            numbers = structured(found["facts"], self._facts)["row"]
            column = found["evidence"]
            evidence, known = structured(column, EVIDENCE), column.is_valid().to_numpy()
        order = np.argsort(numbers)
        if not np.array_equal(numbers[order], rows):
            raise tables.gap_error("logits")
        evidence, known = np.where(known, evidence, unknown.values)[order], known[order]
        finite = all(np.isfinite(evidence[name]).all() for name in ("values", "weakest_values"))
        in_range = evidence["weakest"].max() < max(1, self.settings.probes)
        if not finite or not in_range or evidence["count"].max() > WEAKEST_PROBES:
            raise tables.damaged("logits", "its evidence is none: a value is not one that a logit has")
        return Evidence(evidence, known)

    def blocks(self) -> Iterator[Logits]:
        """All logits in the order of their rows; of a large index in blocks of at most ``ROWS_AT_ONCE``."""
        if self.large:
            yield from self._stream()
            if len(self.recent):
                yield self.recent
        else:
            yield self.all_logits

    def _stream(self) -> Iterator[Logits]:
        """All logits of the base, or of a whole generation, in the order of their rows, in one or more blocks."""
        count = 0
        base = self._base
        with base.reading("logits"):
            query = base.open("logits").search().select(["facts"]).limit(max(1, self._base_row_count))
            batches = query.to_batches(batch_size=ROWS_AT_ONCE)
        while True:
            with base.reading("logits"):
                batch = next(batches, None)
                if batch is None:
                    break
                facts = structured(pa.chunked_array([batch["facts"]]), self._facts)
                # Lance scans in the order of writing.
                if not np.array_equal(facts["row"], np.arange(count, count + len(facts))):
                    raise base.gap_error("logits")
            count += len(facts)
            yield self._without_removed(facts)
        if count != self._base_row_count:
            raise base.gap_error("logits")
        if not count:
            yield self._logits(np.empty(0, self._facts))

    def _without_removed(self, facts: npt.NDArray[np.void]) -> Logits:
        """Logits from values of the base's table, without those of removed models."""
        if self.is_update and len(self._removed_weights):
            facts = facts[~np.isin(facts["weights"], self._removed_weights)]
        return self._logits(facts)

    def at(self, rows: npt.NDArray[np.int64]) -> Iterator[Logits]:
        """The logits at some rows, in one or more blocks of at most ``ROWS_AT_ONCE``."""
        for start in range(0, max(1, len(rows)), ROWS_AT_ONCE):
            yield self.logits(rows[start : start + ROWS_AT_ONCE])

    @_Once
    def sample(self) -> Logits:
        """A random sample of a large index's logits: the same share of the base's and of the update's."""
        with self._tables.reading("sample"):
            facts = np.frombuffer(self.meta("sample"), self._facts)
        share = len(facts) / max(1, self._base_row_count)
        drawn = np.random.default_rng(0).random(len(self.recent)) < share
        return Logits.joined([self._without_removed(facts), self.recent[drawn]])

    def shortlisted(
        self, coordinates: npt.NDArray[np.float32], count: int, effort: int = 1
    ) -> Iterator[Logits]:
        """About the ``count`` best logits of a large index for a query's coordinates (p,), in blocks, by rows.

        ``recent`` is not searched: it is not in the vector index.
        """
        vector = self.basis.query(coordinates)
        with self._base.reading("logits"):
            column = shortlist.look_up(self._base.open("logits"), vector, count, effort)
            facts = structured(column, self._facts)
        facts = facts[np.argsort(facts["row"])]
        for start in range(0, max(1, len(facts)), ROWS_AT_ONCE):
            yield self._without_removed(facts[start : start + ROWS_AT_ONCE])

    @_Once
    def space(self) -> HeadSpace:
        """Turns queries into directions, with the encoder's embeddings of the probes and of the background."""
        embeddings = self.probe_embeddings
        background = self._array("background_vectors.npy", [len(self.background), embeddings.shape[1]])
        if not _are_units(background):
            raise self._tables.damaged("background_vectors.npy", "its vectors are not of length 1")
        return HeadSpace(embeddings, background)

    @_Once
    def background_coordinates(self) -> npt.NDArray[np.float32]:
        """Directions of the background concepts in the index's basis: (B, p)."""
        return self.basis.coordinates(self.space.background)

    @_Once
    def statistics(self) -> ColumnStatistics:
        """Mean and standard deviation of each background concept's score over the gallery."""
        means, stds = self._array("background_statistics.npy", [2, len(self.background)])
        return ColumnStatistics(means, stds)

    @_Once
    def confidence(self) -> Confidence:
        """The fitted confidence: turns scores and margins into probabilities."""
        return self.settings.confidence

    @property
    def sharpness(self) -> float:
        """Inverse temperature ``b`` of the scores (docs/method.md)."""
        return self.settings.sharpness

    def names(self, logits: Logits, count: int) -> tuple[list[list[str]], list[list[float]]]:
        """The ``count`` background concepts that each of n logits recognises most likely, best first, and their scores.

        Ordered by standardised score ``z`` (``probelog.ranking.confidence``): plain scores would name the concepts that
        score high for every logit.
        """
        background = self.background_coordinates
        if not len(background) or not len(logits):
            return [[] for _ in logits.rows], [[] for _ in logits.rows]
        scores = background_scores(logits.coordinates, background, logits.offsets, self.sharpness)
        order = np.argsort(-self.statistics.standardise(scores), axis=1, kind="stable")[:, :count]
        top_scores = np.take_along_axis(scores, order, axis=1)
        return [[self.background[i] for i in row] for row in order], top_scores.tolist()

    @_Once
    def probe_embeddings(self) -> npt.NDArray[np.float32]:
        """The encoder's embeddings of the n probes: (n, d), unit vectors."""
        table = self.probes(["embedding"]).sort_by("id")
        if not np.array_equal(table["id"].to_numpy(), np.arange(table.num_rows)):
            raise self._base.gap_error("probes")
        embeddings = matrix_of(table["embedding"]).astype(np.float32, copy=False)
        if embeddings.shape[1] != self.basis.axes.shape[1] or not _are_units(embeddings):
            raise self._base.damaged("probes", "its embeddings are none of the index's encoder")
        return embeddings

    def probes(self, columns: Sequence[str], where: str | None = None) -> pa.Table:
        """Columns of the probes, all of them or those that meet an SQL condition, and ``id``."""
        return self._base.rows("probes", ["id", *columns], where)

    @_Once
    def text_encoder(self) -> TextEncoder:
        """The encoder for texts that travels with the index."""
        from probelog.encoders.text import TextEncoder

        tokenizer = self.meta("tokenizer.json").decode("utf-8", "replace")
        return self._fitting(
            TextEncoder(lambda: self.meta("text_encoder.onnx"), tokenizer, self.settings.text_encoder)
        )

    @_Once
    def image_encoder(self) -> ImageEncoder:
        """The encoder for images that travels with the index, where it could be exported."""
        from probelog.encoders.image import ImageEncoder

        if self.settings.image_encoder is None:
            raise QueryError(
                "this index cannot be searched by image: "
                + (self.settings.image_encoder_missing or "its image encoder was not published")
            )
        return self._fitting(
            ImageEncoder(lambda: self.meta("image_encoder.onnx"), self.settings.image_encoder)
        )

    def _fitting(self, encoder: AnyEncoder) -> AnyEncoder:
        if encoder.dimension != self.basis.axes.shape[1]:
            raise self._tables.damaged("settings", "its encoder has another dimension than its directions")
        return encoder

    def models(
        self,
        condition: str,
        columns: Sequence[str],
        among: Iterable[int] | None = None,
        limit: int | None = None,
    ) -> dict[str, npt.NDArray[Any]]:
        """Numeric columns of the models that meet an SQL condition, in the order of their numbers, and ``id``.

        Args:
            condition: over ``MODEL_FACTS``.
            columns: names of the columns.
            among: only models with one of these ``weights``.
            limit: at most this many models, in no particular selection.

        Raises:
            QueryError: the condition is not understood; names the columns.
        """
        table = self.models_where(condition, columns, limit, among)
        return {name: table[name].to_numpy() for name in table.column_names}

    def models_where(
        self,
        condition: str | None,
        columns: Sequence[str],
        limit: int | None = None,
        among: Iterable[int] | None = None,
    ) -> pa.Table:
        """The same as a table, of any columns; without a condition, of all models."""
        # In brackets, because Lance parses the first expression only and silently ignores the rest.
        bracketed = None if condition is None else f"({condition}\n)"
        if among is not None:
            bracketed = f"{bracketed or 'true'} AND {sql_in('weights', among)}"
        with self._filter_errors(condition, "models"):
            return self.models_table(columns, bracketed, limit)

    def count_models(self, condition: str) -> int:
        """How many models meet an SQL condition.

        Raises:
            QueryError: the condition is not understood; names the columns.
        """
        bracketed = f"({condition}\n)"
        with self._filter_errors(condition, "models"):
            count = self._base.count("models", bracketed)
            if self.is_update:
                replaced = sql_in("id", self._replaced.tolist())
                count += self._tables.count("models", bracketed) - self._base.count(
                    "models", f"{bracketed} AND {replaced}"
                )
        return count

    @contextlib.contextmanager
    def _filter_errors(self, condition: str | None, name: str) -> Iterator[None]:
        """Turn the StoreError of a table over a condition that is not understood into a QueryError."""
        try:
            yield
        except StoreError as error:
            if error.__cause__ is None or condition is None:  # what was read is damaged
                raise
            columns = filtered_columns(name)
            # Raises StoreError if the table is at fault, not the condition.
            self._base.rows(name, columns[:1], limit=1)
            present = self._base.present(name, columns)
            message = first_line(error.__cause__ or error)
            if unknown := _UNKNOWN_COLUMN.match(message):
                column = unknown[1].strip("`\"'")
                reason = unknown_column(column, present)
                if f'"{column}"' in condition:
                    reason += f" (texts are written in single quotes: '{column}')"
            elif message.startswith(_NO_CONDITION):  # what follows is the statement that LanceDB made of it
                reason = "it is no SQL condition"
            else:
                reason = message
            raise not_understood(name, reason, present) from error

    # Model trees

    def edges(self, condition: str | None = None) -> Iterator[pa.Table]:
        """The edges of model trees (``EDGES``), all or those that meet an SQL condition, in blocks.

        Of an update, those of the base come first. A condition over ``latent`` sees, in the base's edges, what was so
        when the base was made.

        Raises:
            QueryError: the index has no trees, or the condition is not understood.
        """
        if self.settings.edges is None:
            raise QueryError(
                f"{self.index.uri} has no model trees: it was published without them, or by an older version. "
                "Whoever publishes it can add them: probelog-index full (or publish), with [trees] enabled = true"
            )
        bracketed = None if condition is None else f"({condition}\n)"
        for tables in dict.fromkeys([self._base, self._tables]):
            blocks = tables.blocks("edges", EDGES.names, bracketed, EDGES_AT_ONCE)
            while True:
                with self._filter_errors(condition, "edges"):
                    block = next(blocks, None)
                if block is None:
                    break
                if tables is not self._tables:
                    block = block.filter(pc.invert(pc.is_in(block["child"], self._children_replaced)))
                yield block

    @_Once
    def _children_replaced(self) -> ArrowArray:
        """Children whose edges in the base's table are no longer valid.

        They were removed, are at another commit now, or have edges in the update's own table.
        """
        current = {
            (row["repo"], row["sha"]) for row in self._tables.rows("models", ["repo", "sha"]).to_pylist()
        }
        names: set[str] = set()
        if len(self._replaced):
            previous = self._base_models(np.unique(self._replaced), ["repo", "sha"]).to_pylist()
            names = {row["repo"] for row in previous if (row["repo"], row["sha"]) not in current}
        names.update(values_of(self._tables.rows("edges", ["child"])["child"], str))
        return pa.array(sorted(names), pa.string())

    def damaged(self, subject: str, reason: str) -> StoreError:
        """The error for a table or value that is not what every index has."""
        return self._tables.damaged(subject, reason)

    def model(self, repo: str) -> dict[str, Any]:
        """The row of one repository's model.

        Raises:
            QueryError: the index does not hold it; the message names similar ones.
        """
        rows = self._models_called(repo, MODELS.names)
        if rows:
            return rows[0]
        close = self._similar(repo) if is_valid_sql_text(repo) else []
        raise QueryError(
            f"the index does not hold {repo!r}" + (f"; did you mean {' or '.join(close)}?" if close else "")
        )

    def has_model(self, repo: str) -> bool:
        """Whether the index holds a repository."""
        return bool(self._models_called(repo, ["repo"]))

    def _models_called(self, repo: str, columns: Sequence[str]) -> list[dict[str, Any]]:
        if not is_valid_sql_text(repo):
            return []
        rows: list[dict[str, Any]] = self.models_table(
            columns, f"repo = {sql_literal(repo)}", limit=1
        ).to_pylist()
        return rows

    def _similar(self, repo: str) -> list[str]:
        """Up to three repositories with a similar name."""
        folded = repo.casefold()
        if self.settings.models <= _COMPARED_NAMES:
            condition = None
        else:
            # Assumes that the beginning of the owner's or of the model's name is spelled right.
            owner, _, name = folded.rpartition("/")
            patterns = [f"{owner or name}%", f"%/{name}%", f"%/{name[:4]}%", f"{(owner or name)[:4]}%"]
            condition = " OR ".join(f"lower(repo) LIKE {sql_literal(start)}" for start in patterns)
        table = self.models_table(["repo"], condition, limit=_COMPARED_NAMES)
        repos = [str(name) for name in table["repo"].to_pylist()]
        same_names = [
            name for name in repos if folded in (name.casefold(), name.casefold().rpartition("/")[2])
        ]
        return (list(dict.fromkeys(same_names)) or difflib.get_close_matches(repo, repos, n=3, cutoff=0.5))[
            :3
        ]


def _are_units(rows: npt.NDArray[Any]) -> bool:
    """Whether rows have length 1, but for rounding: all that comes from an encoder has."""
    return bool((np.abs(np.linalg.norm(rows, axis=1) - 1) < _ROUNDING).all())


def _not_finite(values: npt.ArrayLike) -> int:
    return int(np.count_nonzero(~np.isfinite(np.asarray(values))))

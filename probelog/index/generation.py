"""One published generation, opened for reading.

What a small index (below ``shortlist.EXACT_LOGITS``) is searched by is read into memory once. Of a large one nothing
is held whose size grows with it: logits are taken from the table as a query needs them, or streamed through.

A generation is whole, or an *update* of a whole one, its *base* (``probelog.publication.update``): it holds what came since,
says which of the base's models are gone, and leaves probes, background, encoder and vector index to the base. To the
reader both look alike.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.arrays import values_of
from probelog.errors import QueryError, SchemaVersionError, StoreError
from probelog.index import shortlist
from probelog.index.arrow import matrix_of, structured
from probelog.index.basis import Basis, Stored
from probelog.index.pointer import Pointer
from probelog.index.schema import INDEX_VERSION, MODEL_FACTS, MODELS, logit_facts
from probelog.index.settings import GenerationSettings
from probelog.index.tables import Tables, first_line, is_valid_sql_text, sql_in, sql_literal
from probelog.ranking.confidence import ColumnStatistics, Confidence, background_scores
from probelog.ranking.matched_heads import Float64, HeadSpace
from probelog.storage.encoding import from_npy

if TYPE_CHECKING:
    from probelog.encoders.image import ImageEncoder
    from probelog.encoders.text import TextEncoder
    from probelog.storage.store import Store

T = TypeVar("T")

# Logits that are read and scored at a time: 8,192 in 512 dimensions are 17 MB.
ROWS_AT_ONCE = 8192
# Values of one SQL condition.
_TEXTS_AT_ONCE = 500
# Names that a mistyped one is compared with, letter by letter: some 20 microseconds each.
_COMPARED_NAMES = 10_000


class _Once(Generic[T]):
    """Like ``cached_property``, but threads that ask at the same time make the value once, not each its own."""

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
            made = owner.__dict__
            if self._name not in made:
                made[self._name] = self._make(owner)  # found there from now on, before this method is asked
            value: T = made[self._name]
            return value


@dataclass(frozen=True, eq=False)
class Logits:
    """Some logits of an index.

    Attributes:
        rows: (n,) their rows in the ``logits`` table.
        weights: (n,) whose they are: the number of the first model with these weights.
        logit: (n,) their places in their models' heads.
        negated: (n,) which are the opposite of a one-logit head's concept.
        offsets: (n,) over the whole background.
        coordinates: (n, p) their directions in the index's basis (``probelog.index.basis``), unit vectors.
        probes: (n, r) numbers of the probes that fire them most, descending.
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
        """Those of all parts (one at the least), in their order."""
        if len(parts) == 1:
            return parts[0]
        names = [item.name for item in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_] | slice) -> Logits:
        """Those at some places."""
        return Logits(*(getattr(self, item.name)[places] for item in fields(self)))


class Generation:
    """One published generation, read once and never changed. What is large is read when first needed.

    Safe to share between threads. Whatever is read may raise StoreError: the generation was swept, is damaged, or
    the store cannot be reached.

    Raises:
        SchemaVersionError: made by a newer ProbeLog.
        StoreError: it is not there, or damaged.
    """

    def __init__(self, index: Store, pointer: Pointer) -> None:
        self.index = index
        self.pointer = pointer
        self._lock = threading.RLock()
        self._own = Tables(index, pointer.generation)
        with self._own.reading("settings"):
            content = json.loads(self._own.meta("settings") or b"{}")
            version = int(content["version"])
        if version > INDEX_VERSION:
            raise SchemaVersionError(
                f"{index.uri}: index version {version} is newer than this ProbeLog knows ({INDEX_VERSION}). "
                "Upgrade ProbeLog."
            )
        if version < INDEX_VERSION:
            raise SchemaVersionError(
                f"{index.uri}: index version {version} is older than this ProbeLog reads ({INDEX_VERSION}). "
                "Publish it again (probelog-index publish), or use the ProbeLog that made it."
            )
        self.settings = GenerationSettings.from_dict(content, f"{index.uri}: generation {pointer.generation}")
        base = self.settings.base
        self._base = self._own if base is None else Tables(index, base.generation)
        # Models and rows from here on are the update's own.
        self._base_rows = self.settings.rows if base is None else base.rows

    @property
    def is_update(self) -> bool:
        """Whether it is an update of another generation."""
        return self._base is not self._own

    def meta(self, key: str) -> bytes:
        """One value of the ``meta`` table."""
        found = self._own.meta(key)
        if found is None and self.is_update:
            found = self._base.meta(key)
        if found is None:
            raise StoreError(f"{self.index.uri}: generation {self.pointer.generation} has no {key!r}")
        return found

    # Models

    def models_table(
        self, columns: Sequence[str], where: str | None = None, limit: int | None = None
    ) -> pa.Table:
        """Columns of the models, all of them or those that meet an SQL condition, by ``id``, which is among them.

        Numbers have gaps where models of the base are gone. What ``copies`` is compared with in a condition are the
        base's counts.
        """
        names = list(dict.fromkeys(["id", *columns, *(["weights"] if "copies" in columns else [])]))
        if not self.is_update:
            return self._own.rows("models", names, where, limit).sort_by("id")
        found = self._base.rows(
            "models", names, where, None if limit is None else limit + len(self._replaced)
        )
        found = found.filter(pa.array(~np.isin(found["id"].to_numpy(), self._replaced)))
        if "copies" in columns:
            found = self._recounted(found)
        found = pa.concat_tables([found, self._own.rows("models", names, where)]).sort_by("id")
        return found if limit is None else found.slice(0, limit)

    def models_named(
        self, column: str, values: Iterable[str], columns: Sequence[str]
    ) -> list[dict[str, Any]]:
        """The models that have one of some texts in a column, by ``id``."""
        wanted, found = sorted(set(values)), []
        for start in range(0, len(wanted), _TEXTS_AT_ONCE):
            condition = sql_in(column, wanted[start : start + _TEXTS_AT_ONCE])
            found += self.models_table(columns, condition).to_pylist()
        return sorted(found, key=lambda row: int(row["id"]))

    def take_models(self, numbers: Sequence[int] | npt.NDArray[Any], columns: Sequence[str]) -> pa.Table:
        """Columns of the models with some numbers, in the order of the numbers, and ``id``."""
        wanted, places = np.unique(np.asarray(numbers, np.int64), return_inverse=True)
        names = list(dict.fromkeys(["id", *columns, *(["weights"] if "copies" in columns else [])]))
        own = wanted[np.isin(wanted, self._own_numbers)] if self.is_update else np.empty(0, np.int64)
        of_base = np.setdiff1d(wanted, own)
        parts: list[pa.Table] = []
        if len(of_base):
            with self._base.reading("models"):
                query = self._base.open("models").take_offsets(of_base.tolist()).select(names)
                parts.append(query.to_arrow())
            if self.is_update and "copies" in columns:
                parts[-1] = self._recounted(parts[-1])
        if len(own):
            parts.append(self._own.rows("models", names, sql_in("id", own.tolist())))
        if not parts:
            return self._base.rows("models", names, limit=1).slice(0, 0)
        found = pa.concat_tables(parts)
        if not np.array_equal(found["id"].to_numpy(), wanted):
            found = found.sort_by("id")
            if not np.array_equal(found["id"].to_numpy(), wanted):
                raise self._base.gaps("models")
        return found.take(places)

    @_Once
    def _replaced(self) -> npt.NDArray[np.int64]:
        """Numbers of the base's models that are gone, or whose rows an update has written anew; ascending."""
        return np.asarray(from_npy(self.meta("replaced.npy")), np.int64)

    @_Once
    def _own_numbers(self) -> npt.NDArray[np.int64]:
        return np.asarray(self._own.rows("models", ["id"])["id"].to_numpy(), np.int64)

    @_Once
    def _dead(self) -> npt.NDArray[np.int64]:
        """Weights of the base that no model has any more: among others, which have no logits."""
        return np.setdiff1d(self._replaced, self._own_numbers)

    @_Once
    def _counts(self) -> dict[int, int]:
        """How many models there are with some weights of the base, where that has changed."""
        return {int(weights): int(count) for weights, count in from_npy(self.meta("copies.npy"))}

    def _recounted(self, models: pa.Table) -> pa.Table:
        """The base's models with their ``copies`` as they are now."""
        pairs = zip(values_of(models["weights"], int), values_of(models["copies"], int), strict=True)
        copies = pa.array([self._counts.get(weights, count) for weights, count in pairs], pa.int32())
        return models.set_column(models.column_names.index("copies"), "copies", copies)

    # Background, encoder, probes

    @_Once
    def background(self) -> list[str]:
        """Names of the background concepts, by number."""
        return [str(name) for name in json.loads(self.meta("background"))]

    @property
    def size(self) -> int:
        """Rows of the ``logits`` table: logits of distinct weights, those of models that are gone among them."""
        return self.settings.rows

    @property
    def large(self) -> bool:
        """Whether it is searched by its shortlist, and not held in memory."""
        return self.settings.large

    @_Once
    def basis(self) -> Basis:
        """From the encoder's space to that of the logits' coordinates."""
        with self._own.reading("basis"):
            return Basis.from_array(
                from_npy(self.meta("basis.npy")), self.settings.middle_offset, self.sharpness
            )

    @_Once
    def _facts(self) -> np.dtype[np.void]:
        return logit_facts(self.basis, self.settings.probes)

    def _logits(self, facts: npt.NDArray[np.void]) -> Logits:
        """From what the table holds of them (``logit_facts``)."""
        return Logits(
            facts["row"].astype(np.int64),
            # Copies, which do not hold on to all of the facts.
            facts["weights"].copy(),
            facts["logit"].copy(),
            facts["negated"].copy(),
            facts["offset"].astype(np.float64),
            self.basis.decoded(Stored(facts["precise"], facts["rest"], facts["scale"])),
            facts["probes"].copy(),
        )

    @_Once
    def all_logits(self) -> Logits:
        """All logits. For small indexes, or a machine that has room for 2 KB a logit."""
        return Logits.joined([*self._stream(), self.recent])

    @_Once
    def recent(self) -> Logits:
        """The logits that an update holds itself: not in the vector index, and few enough to be scored one and all."""
        if not self.is_update:
            return self._logits(np.empty(0, self._facts))
        with self._own.reading("logits"):
            facts = structured(self._own.rows("logits", ["facts"])["facts"], self._facts)
            facts = facts[np.argsort(facts["row"])]
            if not np.array_equal(facts["row"], np.arange(self._base_rows, self.size)):
                raise self._own.gaps("logits")
        return self._logits(facts)

    def logits(self, rows: npt.NDArray[np.int64]) -> Logits:
        """The logits at some rows of living models, in their order."""
        if not self.large:
            places = np.minimum(np.searchsorted(self.all_logits.rows, rows), len(self.all_logits) - 1)
            if len(rows) and not np.array_equal(self.all_logits.rows[places], rows):
                raise self._base.gaps("logits")
            return self.all_logits[places]
        wanted, places = np.unique(rows, return_inverse=True)
        of_base = wanted[wanted < self._base_rows]
        facts = np.empty(0, self._facts)
        if len(of_base):
            with self._base.reading("logits"):
                rows_of_base = self._base.open("logits").take_offsets(of_base.tolist())
                facts = structured(rows_of_base.select(["facts"]).to_arrow()["facts"], self._facts)
            facts = facts[np.argsort(facts["row"])]
            if not np.array_equal(facts["row"], of_base):
                raise self._base.gaps("logits")
        found = self._logits(facts)
        if len(of_base) < len(wanted):
            found = Logits.joined([found, self.recent[wanted[len(of_base) :] - self._base_rows]])
        return found[places]

    def blocks(self) -> Iterator[Logits]:
        """All logits in the order of their rows, a large index's in pieces."""
        if self.large:
            yield from self._stream()
            if len(self.recent):
                yield self.recent
        else:
            yield self.all_logits

    def _stream(self) -> Iterator[Logits]:
        """All logits of the base, or of a whole generation, in the order of their rows, in pieces: one at the least."""
        count = 0
        base = self._base
        with base.reading("logits"):
            query = base.open("logits").search().select(["facts"]).limit(max(1, self._base_rows))
            batches = query.to_batches(batch_size=ROWS_AT_ONCE)
        while True:
            with base.reading("logits"):
                batch = next(batches, None)
                if batch is None:
                    break
                facts = structured(pa.chunked_array([batch["facts"]]), self._facts)
                # Lance scans in the order of writing.
                if not np.array_equal(facts["row"], np.arange(count, count + len(facts))):
                    raise base.gaps("logits")
            count += len(facts)
            yield self._living(facts)
        if count != self._base_rows:
            raise base.gaps("logits")
        if not count:
            yield self._logits(np.empty(0, self._facts))

    def _living(self, facts: npt.NDArray[np.void]) -> Logits:
        """From what the base holds of some logits, without those of models that are gone."""
        if self.is_update and len(self._dead):
            facts = facts[~np.isin(facts["weights"], self._dead)]
        return self._logits(facts)

    def at(self, rows: npt.NDArray[np.int64]) -> Iterator[Logits]:
        """The logits at some rows, in pieces: one at the least."""
        for start in range(0, max(1, len(rows)), ROWS_AT_ONCE):
            yield self.logits(rows[start : start + ROWS_AT_ONCE])

    @_Once
    def sample(self) -> Logits:
        """A random sample of a large index's logits; of an update's own ones the same share as of the base's."""
        with self._own.reading("sample"):
            facts = np.frombuffer(self.meta("sample"), self._facts)
        share = len(facts) / max(1, self._base_rows)
        drawn = np.random.default_rng(0).random(len(self.recent)) < share
        return Logits.joined([self._living(facts), self.recent[drawn]])

    def shortlisted(
        self, coordinates: npt.NDArray[np.float32], count: int, effort: int = 1
    ) -> Iterator[Logits]:
        """About the ``count`` best logits of a large index for a question's coordinates (p,), in pieces, by rows.

        None of ``recent`` is among them.
        """
        vector = self.basis.query(coordinates)
        with self._base.reading("logits"):
            found = shortlist.ask(self._base.open("logits"), vector, count, effort)
            facts = structured(found, self._facts)
        facts = facts[np.argsort(facts["row"])]
        for start in range(0, max(1, len(facts)), ROWS_AT_ONCE):
            yield self._living(facts[start : start + ROWS_AT_ONCE])

    @_Once
    def space(self) -> HeadSpace:
        """What turns queries into directions: the probes and the background, as the encoder sees them."""
        with self._own.reading("background"):
            return HeadSpace(self.probe_embeddings, from_npy(self.meta("background_vectors.npy")))

    @_Once
    def background_coordinates(self) -> npt.NDArray[np.float32]:
        """Directions of the background concepts in the index's basis: (B, p)."""
        return self.basis.coordinates(self.space.background)

    @_Once
    def statistics(self) -> ColumnStatistics:
        """How the background concepts score over the gallery."""
        with self._own.reading("background"):
            means, stds = from_npy(self.meta("background_statistics.npy"))
            return ColumnStatistics(means, stds)

    @_Once
    def confidence(self) -> Confidence:
        """What turns scores and margins into probabilities."""
        return self.settings.confidence

    @property
    def sharpness(self) -> float:
        """The score's temperature ``b``."""
        return self.settings.sharpness

    def names(self, logits: Logits, count: int) -> tuple[list[list[str]], list[list[float]]]:
        """The background concepts that some logits stand for most likely, best first, and their scores.

        In the order of ``z`` (``probelog.ranking.confidence``): plain scores would name concepts that score high everywhere.
        """
        background = self.background_coordinates
        if not len(background) or not len(logits):
            return [[] for _ in logits.rows], [[] for _ in logits.rows]
        scores = background_scores(logits.coordinates, background, logits.offsets, self.sharpness)
        order = np.argsort(-self.statistics.standardise(scores), axis=1, kind="stable")[:, :count]
        found = np.take_along_axis(scores, order, axis=1)
        return [[self.background[i] for i in row] for row in order], found.tolist()

    @_Once
    def probe_embeddings(self) -> npt.NDArray[np.float32]:
        """The encoder's embedding of every probe: (n, d), unit vectors."""
        found = self.probes(["embedding"]).sort_by("id")
        if not np.array_equal(found["id"].to_numpy(), np.arange(found.num_rows)):
            raise self._base.gaps("probes")
        return matrix_of(found["embedding"]).astype(np.float32, copy=False)

    def probes(self, columns: Sequence[str], where: str | None = None) -> pa.Table:
        """Columns of the probes, all of them or those that meet an SQL condition, and ``id``."""
        return self._base.rows("probes", ["id", *columns], where)

    @_Once
    def text_encoder(self) -> TextEncoder:
        """The encoder for texts that travels with the index."""
        from probelog.encoders.text import TextEncoder

        return TextEncoder(
            self.meta("text_encoder.onnx"),
            self.meta("tokenizer.json").decode(),
            self.settings.text_encoder,
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
        return ImageEncoder(self.meta("image_encoder.onnx"), self.settings.image_encoder)

    def models(
        self,
        condition: str,
        columns: Sequence[str],
        among: Iterable[int] | None = None,
        limit: int | None = None,
    ) -> dict[str, npt.NDArray[Any]]:
        """Columns of the models that meet an SQL condition, in the order of their numbers, and ``id``.

        Args:
            condition: over ``MODEL_FACTS``.
            columns: of numbers.
            among: only models with one of these ``weights``.
            limit: not more than so many, any of them.

        Raises:
            QueryError: the condition is not understood; names the columns.
        """
        # In brackets, because Lance reads the first expression only: it would drop whatever follows a mistake.
        bracketed = f"({condition}\n)"
        if among is not None:
            bracketed += f" AND {sql_in('weights', among)}"
        with self._understood(condition):
            found = self.models_table(columns, bracketed, limit)
        return {name: found[name].to_numpy() for name in found.column_names}

    def count_models(self, condition: str) -> int:
        """How many models meet an SQL condition.

        Raises:
            QueryError: the condition is not understood; names the columns.
        """
        bracketed = f"({condition}\n)"
        with self._understood(condition):
            count = self._base.count("models", bracketed)
            if self.is_update:
                replaced = sql_in("id", self._replaced.tolist())
                count += self._own.count("models", bracketed) - self._base.count(
                    "models", f"{bracketed} AND {replaced}"
                )
        return count

    @contextlib.contextmanager
    def _understood(self, condition: str) -> Iterator[None]:
        try:
            yield
        except StoreError as error:
            # Raises where the table is at fault, not the condition.
            self._base.rows("models", ["id", "repo"], limit=1)
            raise QueryError(
                f"the filter {condition!r} is not understood: {first_line(error.__cause__ or error)}\n"
                f"It is an SQL condition over: {', '.join(MODEL_FACTS.names)}. "
                "For example: licence = 'mit' AND downloads > 100"
            ) from error

    def model(self, repo: str) -> dict[str, Any]:
        """The row of one repository's model.

        Raises:
            QueryError: the index does not hold it; names similar ones.
        """
        found = (
            self.models_table(MODELS.names, f"repo = {sql_literal(repo)}", limit=1)
            if is_valid_sql_text(repo)
            else None
        )
        if found is not None and found.num_rows:
            row: dict[str, Any] = found.to_pylist()[0]
            return row
        close = self._similar(repo) if is_valid_sql_text(repo) else []
        raise QueryError(
            f"the index does not hold {repo!r}" + (f"; did you mean {' or '.join(close)}?" if close else "")
        )

    def _similar(self, repo: str) -> list[str]:
        """Up to three repositories that may have been meant."""
        wanted = repo.casefold()
        if self.settings.models <= _COMPARED_NAMES:
            condition = None
        else:
            # Nobody mistypes the beginning of both the owner's and the model's name.
            owner, _, name = wanted.rpartition("/")
            starts = [f"{owner or name}%", f"%/{name}%", f"%/{name[:4]}%", f"{(owner or name)[:4]}%"]
            condition = " OR ".join(f"lower(repo) LIKE {sql_literal(start)}" for start in starts)
        found = self.models_table(["repo"], condition, limit=_COMPARED_NAMES)
        repos = [str(name) for name in found["repo"].to_pylist()]
        alike = [name for name in repos if wanted in (name.casefold(), name.casefold().rpartition("/")[2])]
        return (list(dict.fromkeys(alike)) or difflib.get_close_matches(repo, repos, n=3, cutoff=0.5))[:3]

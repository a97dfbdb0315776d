"""One published generation, opened for reading: what the query client holds in memory."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.confidence import ColumnStatistics, Confidence, background_scores
from probelog.errors import QueryError, SchemaVersionError, StoreError
from probelog.index import INDEX_VERSION, connect, matrix_of
from probelog.matching import HeadSpace
from probelog.pointer import Pointer
from probelog.scoring import TopPairs
from probelog.storage import from_npy

if TYPE_CHECKING:
    from probelog.image_encoder import ImageEncoder
    from probelog.storage import Store
    from probelog.text_encoder import TextEncoder

T = TypeVar("T")

# What LanceDB's messages carry besides what is wrong: its own prefix, and lines of its source code.
_NOISE = re.compile(r"^(Invalid input, |lance error: )+|,? ?\S*/\S+\.rs:\d+(:\d+)?")


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
        self._tables: dict[str, Any] = {}
        with self._reading("settings"):
            # LanceDB would make the missing folder.
            if index.is_local and not Path(index.path(f"generations/{pointer.generation}")).is_dir():
                raise FileNotFoundError("there is no such folder; publish again or roll back")
            self._connection = connect(index, pointer.generation)
            self.settings: dict[str, Any] = json.loads(self.meta("settings"))
            version = int(self.settings["version"])
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

    def meta(self, key: str) -> bytes:
        """One value of the ``meta`` table."""
        found = self.rows("meta", ["value"], f"key = '{key}'", limit=1)
        if not found.num_rows:
            raise StoreError(f"{self.index.uri}: generation {self.pointer.generation} has no {key!r}")
        return bytes(found["value"][0].as_py())

    def rows(
        self, name: str, columns: Sequence[str], where: str | None = None, limit: int | None = None
    ) -> pa.Table:
        """Columns of a table's rows, all of them or those that meet a condition."""
        with self._reading(name):
            table = self._table(name)
            found = table.search().select(list(columns)).limit(limit or max(1, table.count_rows()))
            return (found if where is None else found.where(where)).to_arrow()

    def _table(self, name: str) -> Any:
        with self._lock:
            if name not in self._tables:
                self._tables[name] = self._connection.open_table(name)
            return self._tables[name]

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            # reason: LanceDB raises these, as it comes, for what is missing, damaged or out of reach
            message = _first_line(error)
            if not self.index.is_local and "credentials" in message.casefold():
                message += " (for a bucket that is open to everybody set AWS_SKIP_SIGNATURE=true)"
            raise StoreError(
                f"{self.index.uri}: generation {self.pointer.generation} cannot be read ({what}): {message}"
            ) from error

    def _numbered(self, name: str, columns: list[str]) -> pa.Table:
        """All rows of a table whose ids are their numbers, in that order."""
        found = self.rows(name, ["id", *columns])
        numbers = np.arange(found.num_rows)
        # Lance scans in the order of writing, which is this one: sorting would copy everything for nothing.
        if not np.array_equal(found["id"].to_numpy(), numbers):
            found = found.sort_by("id")
            if not np.array_equal(found["id"].to_numpy(), numbers):
                raise StoreError(
                    f"{self.index.uri}: the {name} table of generation {self.pointer.generation} has gaps"
                )
        return found

    @_Once
    def background(self) -> list[str]:
        """Names of the background concepts, by number."""
        return [str(name) for name in json.loads(self.meta("background"))]

    @_Once
    def models(self) -> pa.Table:
        """All models by number, without their labels and tags."""
        with self._reading("models"):
            names = self._table("models").schema.names
        return self._numbered("models", [name for name in names if name not in ("id", "labels", "tags")])

    @_Once
    def repos(self) -> list[str]:
        """Every model's repository."""
        return [str(repo) for repo in self.models["repo"].to_pylist()]

    @_Once
    def logits(self) -> pa.Table:
        """What a logit is called: ``model`` (its number), ``logit`` (its place in the head), ``negated``."""
        return self._numbered("logits", ["model", "logit", "negated"])

    @_Once
    def model_of(self) -> npt.NDArray[np.int32]:
        """The model number of every logit: (N,)."""
        return np.asarray(self.logits["model"].to_numpy())

    @_Once
    def logit_of(self) -> npt.NDArray[np.int32]:
        """The place of every logit in its model's head: (N,)."""
        return np.asarray(self.logits["logit"].to_numpy())

    @_Once
    def negated(self) -> npt.NDArray[np.bool_]:
        """Which logits are the opposite of a one-logit head's concept: (N,)."""
        return np.asarray(self.logits["negated"].to_numpy())

    @_Once
    def pairs(self) -> TopPairs:
        """Every logit's top (probe, value) pairs: two (N, r) matrices."""
        found = self._numbered("logits", ["probes", "values"])
        return TopPairs(matrix_of(found["probes"]), matrix_of(found["values"]))

    @_Once
    def vectors(self) -> npt.NDArray[np.float32]:
        """Every logit's direction in the encoder's space: (N, d), unit vectors."""
        return matrix_of(self._numbered("logits", ["vector"])["vector"])

    @_Once
    def offsets(self) -> npt.NDArray[np.float64]:
        """Every logit's offset, over the whole background: (N,)."""
        return np.asarray(self._numbered("logits", ["offset"])["offset"].to_numpy(), np.float64)

    @_Once
    def space(self) -> HeadSpace:
        """What turns queries into directions: the probes and the background, as the encoder sees them."""
        with self._reading("background"):
            return HeadSpace(self.probe_embeddings, from_npy(self.meta("background_vectors.npy")))

    @_Once
    def statistics(self) -> ColumnStatistics:
        """How the background concepts score over the gallery."""
        with self._reading("background"):
            means, stds = from_npy(self.meta("background_statistics.npy"))
            return ColumnStatistics(means, stds)

    @_Once
    def confidence(self) -> Confidence:
        """What turns scores and margins into probabilities."""
        return Confidence.from_dict(self.settings["confidence"])

    @property
    def sharpness(self) -> float:
        """The score's temperature ``b``."""
        return float(self.settings["sharpness"])

    def names(self, rows: Sequence[int], count: int) -> tuple[list[list[str]], list[list[float]]]:
        """The background concepts that some logits stand for most likely, best first, and their scores.

        In the order of ``z`` (``probelog.confidence``): plain scores would name concepts that score high everywhere.
        """
        numbers = np.asarray(rows, np.int64)
        background = self.space.background
        if not len(background) or not len(numbers):
            return [[] for _ in rows], [[] for _ in rows]
        scores = background_scores(self.vectors[numbers], background, self.offsets[numbers], self.sharpness)
        order = np.argsort(-self.statistics.standardise(scores), axis=1, kind="stable")[:, :count]
        found = np.take_along_axis(scores, order, axis=1)
        return [[self.background[i] for i in row] for row in order], found.tolist()

    @_Once
    def same_weights(self) -> npt.NDArray[np.int64]:
        """Equal for models of the same weights: (models,), the number of the first of them."""
        first: dict[str, int] = {}
        digests = self.models["weight_digest"].to_pylist()
        # Without a digest a model is like no other.
        return np.asarray(
            [first.setdefault(digest or f"#{i}", i) for i, digest in enumerate(digests)], np.int64
        )

    @_Once
    def fold_keys(self) -> npt.NDArray[np.int64]:
        """Equal for logits that are the same output of the same weights: (N,)."""
        logit = self.logit_of.astype(np.int64)
        model = self.same_weights[self.model_of]
        return np.asarray((model * (int(logit.max(initial=0)) + 1) + logit) * 2 + self.negated)

    @_Once
    def probe_embeddings(self) -> npt.NDArray[np.float32]:
        """The encoder's embedding of every probe: (n, d), unit vectors."""
        return matrix_of(self._numbered("probes", ["embedding"])["embedding"])

    @_Once
    def text_encoder(self) -> TextEncoder:
        """The encoder for texts that travels with the index."""
        from probelog.text_encoder import TextEncoder

        return TextEncoder(
            self.meta("text_encoder.onnx"),
            self.meta("tokenizer.json").decode(),
            self.settings["text_encoder"],
        )

    @_Once
    def image_encoder(self) -> ImageEncoder:
        """The encoder for images that travels with the index, where it could be exported."""
        from probelog.image_encoder import ImageEncoder

        if self.settings.get("image_encoder") is None:
            raise QueryError(
                "this index cannot be searched by image: "
                + str(self.settings.get("image_encoder_missing", "its image encoder was not published"))
            )
        return ImageEncoder(self.meta("image_encoder.onnx"), self.settings["image_encoder"])

    def model_rows(self, condition: str) -> npt.NDArray[np.int32]:
        """Numbers of the models that meet an SQL condition.

        Raises:
            QueryError: the condition is not understood; names the columns.
        """
        try:
            # In brackets, because Lance reads the first expression only: it would drop whatever follows a mistake.
            found = self.rows("models", ["id"], f"({condition}\n)")
        except StoreError as error:
            self.rows(
                "models", ["id", "repo"], limit=1
            )  # raises where the table is at fault, not the condition
            names = ", ".join(name for name in self._table("models").schema.names if name != "id")
            raise QueryError(
                f"the filter {condition!r} is not understood: {_first_line(error.__cause__ or error)}\n"
                f"It is an SQL condition over: {names}. For example: licence = 'mit' AND downloads > 100"
            ) from error
        return np.asarray(found["id"].to_numpy(), np.int32)

    def labels(self, models: Sequence[int]) -> dict[int, list[str]]:
        """The declared labels of some models."""
        wanted = sorted({int(model) for model in models})
        if not wanted:
            return {}
        found = self.rows(
            "models", ["id", "labels"], f"id IN ({', '.join(map(str, wanted))})", limit=len(wanted)
        )
        return {row["id"]: row["labels"] or [] for row in found.to_pylist()}


def _first_line(error: BaseException) -> str:
    lines = _NOISE.sub("", str(error).strip()).splitlines()
    return lines[0].strip()[:300] if lines else repr(error)

"""One published generation, opened for reading: what the query client holds in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from probelog.errors import QueryError, StoreError
from probelog.index import Pointer, connect, matrix_of
from probelog.scoring import NearestBackground, TopPairs

if TYPE_CHECKING:
    from probelog.image_encoder import ImageEncoder
    from probelog.storage import Store
    from probelog.text_encoder import TextEncoder


class Generation:
    """One published generation, read once and never changed. What is large is read when first needed."""

    def __init__(self, index: Store, pointer: Pointer) -> None:
        self.index = index
        self.pointer = pointer
        self._tables = connect(index, pointer.generation)
        self.settings: dict[str, Any] = json.loads(self.meta("settings"))

    def table(self, name: str) -> Any:
        """An opened LanceDB table."""
        return self._tables.open_table(name)

    def meta(self, key: str) -> bytes:
        """One value of the ``meta`` table."""
        found = self.table("meta").search().where(f"key = '{key}'").limit(1).to_arrow()
        if not found.num_rows:
            raise StoreError(f"{self.index.uri}: generation {self.pointer.generation} has no {key!r}")
        return bytes(found["value"][0].as_py())

    def _all(self, name: str, columns: list[str]) -> pa.Table:
        table = self.table(name)
        found = table.search().select(columns).limit(max(1, table.count_rows())).to_arrow()
        return found.sort_by("id")

    @cached_property
    def background(self) -> list[str]:
        """Names of the background concepts, by number."""
        return [str(name) for name in json.loads(self.meta("background"))]

    @cached_property
    def models(self) -> pa.Table:
        """All models, without their labels."""
        schema = self.table("models").schema
        return self._all("models", [name for name in schema.names if name not in ("labels", "tags")])

    @cached_property
    def logits(self) -> pa.Table:
        """What every query reads of a logit: its model, number, pairs and nearest background concepts."""
        return self._all(
            "logits",
            ["id", "model", "logit", "negated", "probes", "values", "nearest", "nearest_distances"],
        )

    @cached_property
    def model_of(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The model number of every logit."""
        return np.asarray(self.logits["model"].to_numpy())

    @cached_property
    def pairs(self) -> TopPairs:
        """Every logit's top (probe, value) pairs."""
        return TopPairs(matrix_of(self.logits["probes"]), matrix_of(self.logits["values"]))

    @cached_property
    def nearest(self) -> NearestBackground:
        """Every logit's nearest background concepts."""
        return NearestBackground(
            matrix_of(self.logits["nearest"]), matrix_of(self.logits["nearest_distances"])
        )

    @cached_property
    def fold_keys(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Equal for logits that are the same output of the same weights."""
        digests = self.models["weight_digest"].to_pylist()
        repos = self.models["repo"].to_pylist()
        first: dict[str, int] = {}
        same = [
            first.setdefault(digest or repo, i)
            for i, (digest, repo) in enumerate(zip(digests, repos, strict=True))
        ]
        model = np.asarray(same, np.int64)[self.model_of]
        logit = self.logits["logit"].to_numpy().astype(np.int64)
        negated = self.logits["negated"].to_numpy(zero_copy_only=False).astype(np.int64)
        return np.asarray((model * (int(logit.max(initial=0)) + 1) + logit) * 2 + negated)

    @cached_property
    def probe_embeddings(self) -> np.ndarray[Any, Any]:
        """The encoder's embedding of every probe: (n, d), unit vectors."""
        return matrix_of(self._all("probes", ["id", "embedding"])["embedding"])

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The encoder for texts that travels with the index."""
        from probelog.text_encoder import TextEncoder

        return TextEncoder(
            self.meta("text_encoder.onnx"),
            self.meta("tokenizer.json").decode(),
            self.settings["text_encoder"],
        )

    @cached_property
    def image_encoder(self) -> ImageEncoder:
        """The encoder for images that travels with the index, where it could be exported."""
        from probelog.image_encoder import ImageEncoder

        if self.settings.get("image_encoder") is None:
            raise QueryError(
                "this index cannot be searched by image: "
                + str(self.settings.get("image_encoder_missing", "its image encoder was not published"))
            )
        return ImageEncoder(self.meta("image_encoder.onnx"), self.settings["image_encoder"])

    def model_rows(self, condition: str | None) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Numbers of the models that meet an SQL condition."""
        if not self.models.num_rows:
            return np.empty(0, np.int32)
        search = self.table("models").search()
        try:
            found = search.where(condition).select(["id"]).limit(self.models.num_rows).to_arrow()
        except (ValueError, RuntimeError, OSError) as error:
            names = ", ".join(name for name in self.table("models").schema.names if name != "id")
            first_line = str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)
            raise QueryError(
                f"the filter {condition!r} is not understood: {first_line}\n"
                f"It is an SQL condition over: {names}. For example: licence = 'mit' AND downloads > 100"
            ) from error
        return np.asarray(found["id"].to_numpy(), np.int32)

    def labels(self, models: Sequence[int]) -> dict[int, list[str]]:
        """The declared labels of some models."""
        wanted = sorted({int(model) for model in models})
        if not wanted:
            return {}
        condition = f"id IN ({', '.join(map(str, wanted))})"
        found = self.table("models").search().where(condition).select(["id", "labels"]).limit(len(wanted))
        return {row["id"]: row["labels"] or [] for row in found.to_arrow().to_pylist()}

    def columns_at(self, probes: Sequence[int]) -> np.ndarray[Any, Any]:
        """Standardised values of every logit on some probes: (k, N) float32, rows in the order asked for."""
        wanted = [int(probe) for probe in probes]
        condition = f"probe IN ({', '.join(map(str, wanted))})"
        table = self.table("columns")
        found = table.search().where(condition).limit(table.count_rows()).to_arrow()
        place = {probe: i for i, probe in enumerate(wanted)}
        out = np.empty((len(wanted), self.logits.num_rows), np.float32)
        blocks = sorted(set(found["block"].to_pylist()))
        start = 0
        for block in blocks:
            rows = found.filter(pc.equal(found["block"], block))
            width = len(rows["values"][0])
            for probe, values in zip(rows["probe"].to_pylist(), rows["values"], strict=True):
                out[place[probe], start : start + width] = values.values.to_numpy(zero_copy_only=False)
            start += width
        if start != self.logits.num_rows or found.num_rows != len(blocks) * len(wanted):
            raise StoreError(f"{self.index.uri}: the columns table is incomplete; publish again")
        return out

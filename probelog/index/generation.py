"""One published generation, opened for reading: its models, logits and edges, and what questions are asked with.

What belongs to all of it (background concepts, probes, encoders, confidence) is here, each table's reading in a module
of ``probelog.index.contents``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.errors import QueryError
from probelog.index.arrow import matrix_of
from probelog.index.contents.edges import EdgeTable
from probelog.index.contents.generators import GeneratorTables
from probelog.index.contents.logits import Logits, LogitTable
from probelog.index.contents.opened import Once
from probelog.ranking.confidence import ColumnStatistics, Confidence, background_scores
from probelog.ranking.matched_heads import HeadSpace
from probelog.storage.records import is_text

if TYPE_CHECKING:
    from probelog.encoders.image import ImageEncoder
    from probelog.encoders.text import TextEncoder

AnyEncoder = TypeVar("AnyEncoder", "TextEncoder", "ImageEncoder")

_ROUNDING = 0.01


class Generation(LogitTable, EdgeTable, GeneratorTables):
    """One published generation, immutable. Large parts are read when first needed.

    Safe to share between threads. Every property and method may raise StoreError: the generation was swept, is
    damaged, or the store cannot be reached.

    Raises:
        SchemaVersionError: made by a newer ProbeLog.
        StoreError: it is missing or damaged.
    """

    def close(self) -> None:
        """End the processes of the encoders; the next query by text or image starts them again."""
        with self._lock:
            for encoder in (self.__dict__.get(name) for name in ("text_encoder", "image_encoder")):
                if encoder is not None:
                    encoder.close()

    @Once
    def background(self) -> list[str]:
        """Names of the background concepts, by number."""
        names = self._json(self.meta("background"), "background")
        if not isinstance(names, list) or not all(map(is_text, names)):
            raise self._tables.damaged("background", "it is no list of names")
        return names

    @Once
    def space(self) -> HeadSpace:
        """Turns queries into directions, with the encoder's embeddings of the probes and of the background."""
        embeddings = self.probe_embeddings
        background = self._array("background_vectors.npy", [len(self.background), embeddings.shape[1]])
        if not _are_units(background):
            raise self._tables.damaged("background_vectors.npy", "its vectors are not of length 1")
        return HeadSpace(embeddings, background)

    @Once
    def background_coordinates(self) -> npt.NDArray[np.float32]:
        """Directions of the background concepts in the index's basis: (B, p)."""
        return self.basis.coordinates(self.space.background)

    @Once
    def statistics(self) -> ColumnStatistics:
        """Mean and standard deviation of each background concept's score over the gallery."""
        means, stds = self._array("background_statistics.npy", [2, len(self.background)])
        return ColumnStatistics(means, stds)

    @Once
    def confidence(self) -> Confidence:
        """The fitted confidence: turns scores and margins into probabilities."""
        return self.settings.confidence

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

    @Once
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

    @Once
    def text_encoder(self) -> TextEncoder:
        """The encoder for texts that travels with the index."""
        from probelog.encoders.text import TextEncoder

        tokenizer = self.meta("tokenizer.json").decode("utf-8", "replace")
        return self._fitting(
            TextEncoder(lambda: self.meta("text_encoder.onnx"), tokenizer, self.settings.text_encoder)
        )

    @Once
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


def _are_units(rows: npt.NDArray[Any]) -> bool:
    """Whether rows have length 1, but for rounding: all that comes from an encoder has."""
    return bool((np.abs(np.linalg.norm(rows, axis=1) - 1) < _ROUNDING).all())

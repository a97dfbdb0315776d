"""Queries to an index: texts, images, a logit, or mixtures of them, and what must not be recognised (negatives)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from probelog.errors import QueryError, StoreError
from probelog.ranking import confidence, matched_heads
from probelog.ranking.confidence import ScoreMoments
from probelog.ranking.names import canonical_name, name_vectors, normal_name

if TYPE_CHECKING:
    from PIL import Image

    from probelog.index.contents.logits import Logits
    from probelog.index.generation import Generation

# Measured with superclasses of the bench without one of their classes ("cat" but not "Egyptian cat", 189 pairs):
# share of right first answers 0.37 without, 0.60 with 0.5, 0.67 with 0.7, 0.59 with 1.
NEGATIVE_WEIGHT = 0.7

Picture: TypeAlias = "str | Path | bytes | Image.Image | npt.NDArray[np.uint8]"
Pictures: TypeAlias = "Picture | Sequence[Picture]"
Embeddings: TypeAlias = "npt.ArrayLike"
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Query:
    """One query as directions, in coordinates of the index's basis (``probelog.index.basis``).

    Attributes:
        coordinates: (p,) the concept that is looked for.
        excluded: (e,) numbers of the background concepts that have one of the query's names.
        negative: (u, p) concepts that must not be recognised.
        by_name: whether the query has a text, so that ``excluded`` holds all background concepts of the same meaning.
        by_logit: whether a logit is part of the query. Two logits are more alike than a concept and a logit: the
            confidence, which is fitted on concepts, does not apply.
    """

    coordinates: npt.NDArray[np.float32]
    excluded: npt.NDArray[np.int64]
    negative: npt.NDArray[np.float32]
    by_name: bool = True
    by_logit: bool = False

    def similarities(self, gallery: npt.NDArray[np.float32]) -> Float64:
        """Cosines (n,) of n logits (n, p) to the concept that is looked for."""
        return np.asarray(gallery @ self.coordinates, np.float64)

    def positive_scores(
        self,
        generation: Generation,
        gallery: npt.NDArray[np.float32],
        offsets: Float64,
        similarities: Float64,
    ) -> Float64:
        """Scores (n,) of n logits for the concept that is looked for, negatives left out (docs/method.md).

        Args:
            generation: of the index.
            gallery: (n, p) coordinates of the logits.
            offsets: (n,) of the logits, over the whole background.
            similarities: (n,) cosines of the logits to the concept.
        """
        background, b = generation.background_coordinates, generation.sharpness
        return matched_heads.scores(similarities, gallery, offsets, background, b, self.excluded)

    def scores(
        self,
        generation: Generation,
        gallery: npt.NDArray[np.float32],
        offsets: Float64,
        positive_scores: Float64,
    ) -> Float64:
        """Scores (n,) of n logits: ``positive_scores`` (n,) less a penalty for every negative.

        A logit that looks more like a negative than like the background loses ``NEGATIVE_WEIGHT`` of its score for that
        negative.
        """
        if not len(self.negative):
            return positive_scores
        scores = positive_scores.copy()
        for direction in self.negative:
            similarities = np.asarray(gallery @ direction, np.float64)
            against = self.positive_scores(generation, gallery, offsets, similarities)
            scores -= NEGATIVE_WEIGHT * np.maximum(against, 0.0)
        return scores

    def confidences(
        self, generation: Generation, logits: Logits, scores: Float64, gallery: ScoreMoments
    ) -> Float64 | None:
        """Probability that each of n logits is relevant: (n,). None for queries by a logit.

        Args:
            generation: of the index.
            logits: the n logits.
            scores: (n,) scores of the logits.
            gallery: moments of the scores of all logits, or of a sample.
        """
        if self.by_logit:
            return None
        background = generation.background_coordinates
        excluded = self.excluded
        if not self.by_name and len(background):
            # Nobody said what the pictures or the logit are called: the nearest name is taken to mean the same.
            excluded = np.array([int(np.argmax(background @ self.coordinates))])
        margins = confidence.margins(
            logits.coordinates,
            gallery.standardise(scores),
            background,
            logits.offsets,
            generation.sharpness,
            generation.statistics,
            excluded,
        )
        return generation.confidence.of(scores, margins)


def ask(
    generation: Generation,
    texts: Sequence[str],
    images: Pictures | None,
    embeddings: Embeddings | None,
    like: npt.NDArray[np.floating[Any]] | None,
    negative: Sequence[str],
    notes: list[str],
) -> Query:
    """Turn a query into directions, in coordinates.

    Args:
        generation: of the index.
        texts: names of one concept, synonyms of each other.
        images: pictures of the concept, and
        embeddings: (d,) or (s, d) of pictures.
        like: direction (d,) of a logit that recognises the concept.
        negative: names of concepts that must not be recognised.
        notes: gets a line about words that the encoder does not know.

    Raises:
        QueryError: empty text, words that the encoder does not know, an unreadable image.
    """
    check_texts(generation, [*texts, *negative], notes)
    parts = []
    excluded = background_numbers(generation, texts)
    if texts:
        parts.append(text_direction(generation, texts, excluded))
    shown = [
        *([] if images is None else [embed_pictures(generation, images)]),
        *([] if embeddings is None else [unit_vectors(generation, embeddings)]),
    ]
    if shown:
        parts.append(generation.space.of_images(np.concatenate(shown))[0])
    if like is not None:
        parts.append(np.asarray(like, np.float64))
    direction = np.sum(parts, axis=0)
    length = np.linalg.norm(direction)
    against = [
        text_direction(generation, [text], background_numbers(generation, [text])) for text in negative
    ]
    basis = generation.basis
    if not np.isfinite(direction).all() or not np.isfinite(against).all():
        raise not_finite(generation)
    return Query(
        basis.coordinates(direction / length if length > 0 else direction),
        excluded,
        basis.coordinates(np.reshape(against, (-1, len(direction)))),
        by_name=bool(texts),
        by_logit=like is not None,
    )


def ask_many(
    generation: Generation, texts: Sequence[Sequence[str]], notes: Sequence[list[str]]
) -> list[Query | None]:
    """Queries by texts, as of ``ask``, with one request to the encoder for all; None for those that cannot be asked.

    Args:
        generation: of the index.
        texts: for each query, names of one concept.
        notes: for each query, gets a line about unknown words, or why it cannot be asked.
    """
    askable = which_askable(generation, texts, notes)
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(generation.background):
        numbers.setdefault(_compared(name), []).append(number)
    asked = [names for names, is_askable in zip(texts, askable, strict=True) if is_askable]
    if not asked:
        return [None for _ in texts]
    excluded = [
        np.unique(np.array([n for name in names for n in numbers.get(_compared(name), ())], np.int64))
        for names in asked
    ]
    ends = np.cumsum([len(names) for names in asked])
    vectors = np.split(text_vectors(generation, [name for names in asked for name in names]), ends[:-1])
    means = np.stack([rows.mean(axis=0) for rows in vectors])
    directions = generation.space.of_texts(means / np.linalg.norm(means, axis=1, keepdims=True), excluded)
    if not np.isfinite(directions).all():
        raise not_finite(generation)
    coordinates = generation.basis.coordinates(directions)
    none = np.empty((0, coordinates.shape[1]), np.float32)
    queries = iter([Query(*parts, none) for parts in zip(coordinates, excluded, strict=True)])
    return [next(queries) if is_askable else None for is_askable in askable]


def which_askable(
    generation: Generation, texts: Sequence[Sequence[str]], notes: Sequence[list[str]]
) -> list[bool]:
    """Which queries by texts can be asked; ``notes`` as of ``ask_many``."""
    unknown = generation.text_encoder.unknown_words([name for names in texts for name in names])
    left = iter(unknown)
    return [
        _is_askable(generation, names, [*itertools.islice(left, len(names))], notes[i])
        for i, names in enumerate(texts)
    ]


def _is_askable(
    generation: Generation, names: Sequence[str], unknown: Sequence[Sequence[str]], notes: list[str]
) -> bool:
    try:
        if not names:
            raise QueryError("the query is empty")
        for name, words in zip(names, unknown, strict=True):
            _check_words(generation, name, words, notes)
    except QueryError as error:
        notes[:] = [str(error)]
        return False
    return True


@dataclass(frozen=True)
class ComparedQuery(Query):
    """A query that has been compared with a gallery together with others, which costs little more than one alone.

    Attributes:
        gallery: (N, p) coordinates of the gallery's logits.
        cosines: (N,) of them to the concept that is looked for.
        rivals: (N, e) of them to the excluded background concepts.
    """

    gallery: npt.NDArray[np.float32] = field(kw_only=True)
    cosines: npt.NDArray[np.float32] = field(kw_only=True)
    rivals: npt.NDArray[np.float32] = field(kw_only=True)

    def similarities(self, gallery: npt.NDArray[np.float32]) -> Float64:
        """As of ``Query``."""
        return (
            np.asarray(self.cosines, np.float64) if gallery is self.gallery else super().similarities(gallery)
        )

    def positive_scores(
        self,
        generation: Generation,
        gallery: npt.NDArray[np.float32],
        offsets: Float64,
        similarities: Float64,
    ) -> Float64:
        """As of ``Query``."""
        if gallery is not self.gallery:
            return super().positive_scores(generation, gallery, offsets, similarities)
        size, b = len(generation.background_coordinates), generation.sharpness
        return b * similarities - matched_heads.without(offsets, self.rivals, b, size)


def compared(
    generation: Generation, queries: Sequence[Query], gallery: npt.NDArray[np.float32]
) -> list[ComparedQuery]:
    """Queries with their cosines to a gallery (N, p), by one matrix product."""
    excluded, places = np.unique(np.concatenate([query.excluded for query in queries]), return_inverse=True)
    rows = [np.stack([query.coordinates for query in queries]), generation.background_coordinates[excluded]]
    cosines = np.concatenate(rows).astype(np.float32) @ gallery.T
    starts = np.cumsum([len(queries), *(len(query.excluded) for query in queries)])
    own = np.split(len(queries) + places, starts[1:-1] - len(queries))
    return [
        ComparedQuery(
            query.coordinates,
            query.excluded,
            query.negative,
            gallery=gallery,
            cosines=cosines[i],
            rivals=cosines[own[i]].T,
        )
        for i, query in enumerate(queries)
    ]


def not_finite(generation: Generation) -> StoreError:
    """The error for a generation whose numbers, sound one by one, give none together."""
    return StoreError(
        f"{generation.index.uri}: generation {generation.pointer.generation} is damaged: it gives scores that are "
        "not finite. Publish again or roll back."
    )


def text_direction(generation: Generation, texts: Sequence[str], excluded: npt.NDArray[np.int64]) -> Float64:
    """Direction of one concept under one name or several: (d,). The names' embeddings are averaged."""
    vectors = text_vectors(generation, texts).mean(axis=0, keepdims=True)
    return np.asarray(generation.space.of_texts(vectors / np.linalg.norm(vectors), [excluded])[0])


def text_vectors(generation: Generation, names: Sequence[str]) -> npt.NDArray[np.float32]:
    """Unit vectors of names in the index's prompts: (C, d)."""
    return name_vectors(generation.text_encoder.embed, generation.settings.prompts, names)


def background_numbers(generation: Generation, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Numbers of the background concepts of an index that have one of these names."""
    return numbers_named(generation.background, names)


def numbers_named(background: Sequence[str], names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Numbers of those names of a background that are one of these names, in another number or spelling too."""
    own = {_compared(name) for name in names}
    return np.asarray([i for i, name in enumerate(background) if _compared(name) in own], np.int64)


def _compared(name: str) -> str:
    return canonical_name(name) or normal_name(name)


def check_texts(generation: Generation, texts: Sequence[str], notes: list[str]) -> None:
    """Refuse texts that cannot be asked, and note words that the encoder does not know.

    Raises:
        QueryError: empty text, words that the encoder does not know.
    """
    if texts:
        for text, unknown in zip(texts, generation.text_encoder.unknown_words(texts), strict=True):
            _check_words(generation, text, unknown, notes)


def _check_words(generation: Generation, text: str, unknown: Sequence[str], notes: list[str]) -> None:
    if not text.strip():
        raise QueryError("the query is empty: name a concept, for example: probelog search dog --index URI")
    from probelog.encoders.text import words

    if unknown and set(words(text)) <= set(unknown):
        raise QueryError(
            f"this index's text encoder ({generation.settings.encoder}) does not know "
            f"{', '.join(repr(word) for word in unknown)}: "
            "try another word, try English, or search by image (--image)"
        )
    if unknown:
        listed = ", ".join(repr(word) for word in unknown)
        notes.append(f"the text encoder does not know {listed}; the answer rests on the other words")


def embed_pictures(generation: Generation, images: Pictures) -> npt.NDArray[np.float32]:
    """Unit vectors of pictures: (s, d)."""
    listed: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
    if not listed:
        raise QueryError("images must be a picture, or a list of at least one")
    return np.asarray(generation.image_encoder.embed(listed, mirror=True))


def unit_vectors(generation: Generation, embeddings: Embeddings) -> npt.NDArray[np.float32]:
    """Vectors of a user's as unit vectors (s, d)."""
    dimension = generation.space.centre.shape[0]
    try:
        vectors = np.atleast_2d(np.asarray(embeddings, np.float64))
    except (TypeError, ValueError) as error:
        raise QueryError(f"embeddings must be numbers: {error}") from None
    if vectors.ndim != 2 or vectors.shape[1] != dimension or not len(vectors):
        raise QueryError(
            f"embeddings have the shape {np.shape(embeddings)}: this index's encoder ({generation.settings.encoder}) "
            f"gives ({dimension},), or (s, {dimension}) for s pictures"
        )
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or not lengths.all():
        raise QueryError("embeddings must be finite, and not zero")
    return np.asarray(vectors / lengths, np.float32)

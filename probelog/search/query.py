"""What is asked of an index: texts, images, a logit, mixtures of them, and what must not be recognised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from probelog.errors import QueryError
from probelog.ranking import confidence, matched_heads
from probelog.ranking.confidence import ScoreMoments
from probelog.ranking.names import name_vectors, normal_name

if TYPE_CHECKING:
    from PIL import Image

    from probelog.index.generation import Generation, Logits

# Measured with superclasses of the bench without one of their classes ("cat" but not "Egyptian cat", 189 pairs):
# share of right first answers 0.37 without, 0.60 with 0.5, 0.67 with 0.7, 0.59 with 1.
NEGATIVE_WEIGHT = 0.7

Pictures = Sequence["str | Path | bytes | Image.Image"]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Query:
    """One query as directions, in coordinates of the asked index's basis (``probelog.index.basis``).

    Attributes:
        coordinates: (p,) what is looked for.
        excluded: numbers of the background concepts that have one of its names.
        negative: (u, p) what must not be recognised.
        named: whether it was asked by name, so that ``excluded`` holds all that means the same.
        of_logit: whether a logit is part of it. Logits are more alike than a concept and a logit are: what the
            confidence was fitted on says nothing about them.
    """

    coordinates: npt.NDArray[np.float32]
    excluded: npt.NDArray[np.int64]
    negative: npt.NDArray[np.float32]
    named: bool = True
    of_logit: bool = False

    def similarities(self, gallery: npt.NDArray[np.float32]) -> Float64:
        """Cosines (n,) of some logits (n, p) to what is looked for."""
        return np.asarray(gallery @ self.coordinates, np.float64)

    def wanted(
        self,
        generation: Generation,
        gallery: npt.NDArray[np.float32],
        offsets: Float64,
        similarities: Float64,
    ) -> Float64:
        """Scores (n,) of some logits for what is looked for alone.

        Args:
            generation: the index's generation that is asked.
            gallery: (n, p) coordinates of the logits.
            offsets: (n,) of the logits, over the whole background.
            similarities: (n,) their cosines to what is looked for.
        """
        background, b = generation.background_coordinates, generation.sharpness
        return matched_heads.scores(similarities, gallery, offsets, background, b, self.excluded)

    def scores(
        self,
        generation: Generation,
        gallery: npt.NDArray[np.float32],
        offsets: Float64,
        wanted: Float64,
    ) -> Float64:
        """Scores (n,) of some logits, from those for what is looked for alone.

        A logit that looks more like something negative than like the background loses most of that score.
        """
        if not len(self.negative):
            return wanted
        scores = wanted.copy()
        for direction in self.negative:
            similarities = np.asarray(gallery @ direction, np.float64)
            against = self.wanted(generation, gallery, offsets, similarities)
            scores -= NEGATIVE_WEIGHT * np.maximum(against, 0.0)
        return scores

    def confidences(
        self, generation: Generation, logits: Logits, scores: Float64, gallery: ScoreMoments
    ) -> Float64 | None:
        """Probability that each of some logits is relevant: (n,). None for questions by a logit.

        Args:
            generation: the index's generation that was asked.
            logits: the n logits.
            scores: (n,) theirs.
            gallery: of the scores of all logits, or of a sample.
        """
        if self.of_logit:
            return None
        background = generation.background_coordinates
        excluded = self.excluded
        if not self.named and len(background):
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
    like: npt.NDArray[np.floating[Any]] | None,
    negative: Sequence[str],
    notes: list[str],
) -> Query:
    """Turn a query into directions, in coordinates.

    Args:
        generation: the index's generation that is asked.
        texts: names of one concept, synonyms of each other.
        images: pictures of it.
        like: direction (d,) of a logit that is one.
        negative: names of what must not be recognised.
        notes: hears of words that the encoder does not know.

    Raises:
        QueryError: empty text, words that the encoder does not know, an unreadable image.
    """
    for text in [*texts, *negative]:
        _check_words(generation, text, notes)
    parts = []
    excluded = background_numbers(generation, texts)
    if texts:
        parts.append(text_direction(generation, texts, excluded))
    if images is not None:
        parts.append(generation.space.of_images(_embedded(generation, images))[0])
    if like is not None:
        parts.append(np.asarray(like, np.float64))
    direction = np.sum(parts, axis=0)
    length = np.linalg.norm(direction)
    against = [
        text_direction(generation, [text], background_numbers(generation, [text])) for text in negative
    ]
    basis = generation.basis
    return Query(
        basis.coordinates(direction / length if length > 0 else direction),
        excluded,
        basis.coordinates(np.reshape(against, (-1, len(direction)))),
        named=bool(texts),
        of_logit=like is not None,
    )


def text_direction(generation: Generation, texts: Sequence[str], excluded: npt.NDArray[np.int64]) -> Float64:
    """Direction of one concept under one name or several: (d,). The names' embeddings are averaged."""
    vectors = text_vectors(generation, texts).mean(axis=0, keepdims=True)
    return np.asarray(generation.space.of_texts(vectors / np.linalg.norm(vectors), [excluded])[0])


def text_vectors(generation: Generation, names: Sequence[str]) -> npt.NDArray[np.float32]:
    """Unit vectors of names in the index's prompts: (C, d)."""
    return name_vectors(generation.text_encoder.embed, generation.settings.prompts, names)


def background_numbers(generation: Generation, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Numbers of the background concepts that have one of these names."""
    wanted = {normal_name(name) for name in names}
    return np.asarray(
        [i for i, name in enumerate(generation.background) if normal_name(name) in wanted], np.int64
    )


def _check_words(generation: Generation, text: str, notes: list[str]) -> None:
    if not text.strip():
        raise QueryError("the query is empty: name a concept, for example: probelog search dog --index URI")
    from probelog.encoders.text import words

    unknown = generation.text_encoder.unknown_words(text)
    if unknown and set(words(text)) <= set(unknown):
        raise QueryError(
            f"this index's text encoder ({generation.settings.encoder}) does not know "
            f"{', '.join(repr(word) for word in unknown)}: "
            "try another word, try English, or search by image (--image)"
        )
    if unknown:
        listed = ", ".join(repr(word) for word in unknown)
        notes.append(f"the text encoder does not know {listed}; the answer rests on the other words")


def _embedded(generation: Generation, images: object) -> npt.NDArray[np.float32]:
    """Unit vectors of pictures: (s, d)."""
    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence) or not images:
        raise QueryError("images must be a list of at least one picture")
    return np.asarray(generation.image_encoder.embed(list(images), mirror=True))

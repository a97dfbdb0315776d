"""Queries for generators: each text, picture, sketch or model is an expert, and all of them describe one concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats, evenly_spread
from probelog.errors import QueryError
from probelog.index.contents.generators import Generators
from probelog.index.generation import Generation
from probelog.index.generators.encoding import StoredDescriptions
from probelog.ranking.samples.description import unit
from probelog.ranking.samples.matched import Asked, of_any
from probelog.ranking.samples.methods import METHODS, product_of_experts
from probelog.search.generators.classifiers import Classifier
from probelog.search.query import NEGATIVE_WEIGHT, Float64, background_numbers, text_vectors

MATCHED = "matched"
# Of the logits of a classifier, so many are looked up in a large index.
_LOOKED_UP = 32
NONE = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class GeneratorQuery:
    """One concept.

    Attributes:
        experts: what describes it, in the encoder's space.
        negative: what must not be made.
        by_model: whether a model is part of it: models are more alike than a concept and a model, and the confidence
            does not apply.
        classifier: a whole one, which counts as one expert more.
    """

    experts: Sequence[Asked]
    negative: Sequence[Asked]
    by_model: bool
    classifier: Classifier | None = None

    def projected(self, generators: Generators) -> list[Asked]:
        """The experts in coordinates of descriptions, some of a classifier's logits in place of it: what is looked up."""
        logits = self._logits
        places = evenly_spread(len(logits), _LOOKED_UP)
        return [_projected(item, generators.axes) for item in (*self.experts, *(logits[i] for i in places))]

    def scores(self, generators: Generators, stored: StoredDescriptions) -> tuple[Float64, Float64 | None]:
        """Scores (N,) of generators by matched samples, and confidences (N,)."""
        space = generators.space
        every = [_projected(item, generators.axes) for item in (*self.experts, *self.negative, *self._logits)]
        scores = space.scores(stored.described, stored.offsets, every)
        ends = np.cumsum([len(self.experts), len(self.negative)])
        positive, against, logits = np.split(scores, ends)
        penalty = NEGATIVE_WEIGHT * np.maximum(against, 0.0).sum(axis=0)
        total = product_of_experts([*positive, *([of_any(logits)] if len(logits) else [])]) - penalty
        if self.by_model:
            return total, None
        # As probable as its least probable part.
        parts = [
            space.confidences(row - penalty, len(item.excluded))
            for row, item in zip(positive, self.experts, strict=True)
        ]
        return total, np.min(parts, axis=0)

    def logit_scores(self, generators: Generators, stored: StoredDescriptions) -> Float64:
        """Scores (q, N) of generators for each logit of the classifier that is asked."""
        logits = [_projected(item, generators.axes) for item in self._logits]
        return generators.space.scores(stored.described, stored.offsets, logits)

    def cosines(self, generators: Generators, stored: StoredDescriptions) -> Float64:
        """Cosines (N,) of the query to the means of generators, as directions: the mean over experts.

        A classifier's is that of its nearest logit.
        """
        means = generators.space.mean_directions(stored.described)
        parts = [_cosines(means, generators.axes, [item]) for item in self.experts]
        if self.classifier is not None:
            parts.append(_cosines(means, generators.axes, self._logits))
        return np.asarray(np.mean([part.max(axis=1) for part in parts], axis=0))

    @cached_property
    def _logits(self) -> list[Asked]:
        return [] if self.classifier is None else [by_direction(row) for row in self.classifier.directions]

    def scores_by(self, method: str, generators: Generators, stored: StoredDescriptions) -> Float64:
        """Scores (N,) by another method.

        Raises:
            QueryError: there is no such method, or it needs embeddings and the query has none.
        """
        if method not in METHODS:
            raise QueryError(f"there is no method {method!r}: choose one of {', '.join([MATCHED, *METHODS])}")
        if self.negative:
            raise QueryError(f"negatives need the default method ({MATCHED}): leave one of both out")
        vectors = [item.embedding for item in self.experts if item.embedding is not None]
        if len(vectors) < len(self.experts) or self.classifier is not None:
            raise QueryError(f"a model or a logit as a query needs the default method ({MATCHED})")
        asked = np.stack(vectors) @ generators.axes.T
        return product_of_experts([*METHODS[method](stored.described, asked)])


def asked(
    generation: Generation,
    texts: Sequence[str] = (),
    pictures: Floats | None = None,
    sketches: Floats | None = None,
) -> list[Asked]:
    """The experts of a query, of each modality one.

    Args:
        generation: of the index.
        texts: names of one concept.
        pictures: (s, d) embeddings of pictures of it.
        sketches: (s, d) embeddings of sketches of it, before they are moved to where pictures are.
    """
    experts = named(generation, [texts]) if texts else []
    for shown in (pictures, None if sketches is None else sketched(generation, sketches)):
        if shown is not None:
            direction = generation.space.of_images(shown)[0]
            experts.append(Asked(direction, unit(shown.mean(axis=0, keepdims=True))[0], NONE, False))
    return experts


def named(generation: Generation, texts: Sequence[Sequence[str]]) -> list[Asked]:
    """The experts of queries by names of one concept each, with one request to the encoder for all."""
    excluded = [background_numbers(generation, names) for names in texts]
    ends = np.cumsum([len(names) for names in texts])
    vectors = np.split(text_vectors(generation, [name for names in texts for name in names]), ends[:-1])
    means = unit(np.stack([rows.mean(axis=0) for rows in vectors]))
    directions = generation.space.of_texts(means, excluded)
    return [Asked(*parts, True) for parts in zip(directions, means, excluded, strict=True)]


def sketched(generation: Generation, sketches: Floats) -> Floats:
    """Embeddings (s, d) of the pictures that sketches (s, d) stand for, as far as the index knows."""
    if generation.settings.generators is None or (moved := generation.generators.sketch_map) is None:
        return sketches
    return moved.pictures_of(sketches)


def by_direction(direction: npt.NDArray[np.floating]) -> Asked:
    """A model or a logit as an expert."""
    return Asked(np.asarray(direction, np.float64), None, NONE, False)


def direction_of_generator(generation: Generation, repo: str) -> npt.NDArray[np.float32]:
    """Direction (d,) of what one generator makes: of the mean of its samples, beside that of the probes.

    Raises:
        QueryError: the index does not hold it.
    """
    generators = generation.generators
    row = generators.row_named(repo)["row"]
    means = generators.stored(np.array([row])).described
    return np.asarray(unit(generators.space.mean_directions(means) @ generators.axes)[0])


def _cosines(means: Floats, axes: npt.NDArray[np.float32], asked: Sequence[Asked]) -> Floats:
    """Cosines (N, q) of directions (N, p), in coordinates, to those that are asked."""
    directions = np.stack([axes @ item.direction for item in asked])
    return np.asarray(means @ unit(directions).T)


def _projected(item: Asked, axes: npt.NDArray[np.float32]) -> Asked:
    embedding = None if item.embedding is None else axes @ item.embedding
    return item._replace(direction=unit((axes @ item.direction)[None])[0], embedding=embedding)

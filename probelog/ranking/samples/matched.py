"""Matched samples: how this project ranks generators, calibrated against the background like matched heads.

Two experts judge a model by its samples' features h, each like Monte Carlo, and each against what the same samples
would score for anything else; their log-odds are added (a product of experts: Hinton 2002).

1. Directions. A query is a direction w in the encoder's centred space, as for logits (``matched_heads.HeadSpace``), and so
   is a sample, ``g = (h - centre) / |h - centre|``, the centre being the mean embedding of the probes:
   ``s1(m, q) = log mean_h exp(b w.g) - log mean over background c of mean_h exp(b w_c.g)``.
2. Embeddings. A text is a vector q of length 1 as well, the encoder's own:
   ``s2(m, q) = log mean_h exp(a q.h) - log mean over the background's names r of mean_h exp(a r.h)``.

``s = s1 + s2`` is the log-odds of a text against an average background concept. Pictures and sketches have no s2, for their
embeddings say how they look as well as what they show: there ``s = PICTURE_ODDS s1``. The confidence that a model makes the
concept is its posterior beside the B background concepts, ``e^s / (e^s + B)``: none is fitted, for generators declare
no labels. Temperatures are in units of the spread that they divide, as for matched heads:
``b = SHARPNESS / std over c of w_c.g``, ``a = 2 SHARPNESS / std over probes of r.h`` (means over samples).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from probelog.arrays import Floats, Ints
from probelog.ranking.matched_heads import SHARPNESS
from probelog.ranking.samples.description import Descriptions, Float32s, Float64, unit

# What the directions alone say of a picture is too careful: fitted by the log loss of the first answer's confidence on 48 trained
# generators and 20 absent concepts (either half of the concepts wants 1.8 to 2.5). With embeddings that count by weights of 0,
# 0.25, 0.5 and 1 top-1 by picture and by sketch were 90.8 86.1, 88.7 83.2, 86.8 81.6, 84.9 79.3.
PICTURE_ODDS = 1.8
# Bounds the working copies of similarities: 2^23 float32 values are 32 MB.
_AT_ONCE = 1 << 23
# Samples that temperatures are fitted on.
_FITTED = 4096


class Offsets(NamedTuple):
    """What models score for anything: the second terms of the formulas, (N,) each.

    Attributes:
        directions: of the background's directions.
        names: of its names.
    """

    directions: Float64
    names: Float64


class Asked(NamedTuple):
    """One query of one modality.

    Attributes:
        direction: (d,) of length 1, in the centred space.
        embedding: (d,) of length 1, where the encoder has embedded it itself.
        excluded: numbers of the background concepts of the same name.
        is_text: whether the embedding is that of a text.
    """

    direction: Floats
    embedding: Floats | None
    excluded: Ints
    is_text: bool


@dataclass(frozen=True, eq=False)
class SampleSpace:
    """What encoder, probes and background fix; everything in the encoder's space or in coordinates of a basis of it.

    Attributes:
        centre: (d,) mean embedding of the probes.
        directions: (B, d) of the background concepts.
        names: (B, d) unit embeddings of their names.
        direction_sharpness: ``b``, and
        embedding_sharpness: ``a``.
    """

    centre: Float32s
    directions: Float32s
    names: Float32s
    direction_sharpness: float
    embedding_sharpness: float

    @classmethod
    def fit(
        cls, features: Floats, centre: Floats, directions: Floats, names: Floats, pictures: Floats
    ) -> SampleSpace:
        """Set the temperatures by a sample of the features of all models, (F, d), and ``pictures`` of all sorts, (n, d)."""
        rows = np.asarray(features, np.float32)
        rows = rows[np.random.default_rng(0).permutation(len(rows))[:_FITTED]]
        middle, concepts, texts, anchors = (
            np.asarray(item, np.float32) for item in (centre, directions, names, pictures)
        )
        by_direction = SHARPNESS / _spread(unit(rows - middle) @ concepts.T)
        by_embedding = 2 * SHARPNESS / _spread(rows @ anchors.T)
        return cls(middle, concepts, texts, by_direction, by_embedding)

    def projected(self, axes: Float32s) -> SampleSpace:
        """The same in coordinates of orthonormal axes (p, d)."""
        directions, names = self.directions @ axes.T, self.names @ axes.T
        sharpness = self.direction_sharpness, self.embedding_sharpness
        return SampleSpace(axes @ self.centre, unit(directions), names, *sharpness)

    def offsets(self, models: Descriptions) -> Offsets:
        """What models score for anything."""
        return Offsets(
            log_mean(self._by_direction(models, self.directions, self._lengths(models))),
            log_mean(self._by_embedding(models, self.names)),
        )

    def scores(self, models: Descriptions, offsets: Offsets, asked: Sequence[Asked]) -> Float64:
        """Scores ``s`` (q, N) of models for queries."""
        lengths = self._lengths(models)
        out = self._by_direction(models, np.stack([item.direction for item in asked]), lengths)
        for place, item in enumerate(asked):
            rivals = self._by_direction(models, self.directions[item.excluded], lengths)
            out[place] -= _without(offsets.directions, rivals, len(self.directions))
            if item.embedding is None:
                continue
            if not item.is_text:
                out[place] *= PICTURE_ODDS
                continue
            seen = self._by_embedding(models, item.embedding[None])[0]
            rivals = self._by_embedding(models, self.names[item.excluded])
            out[place] += seen - _without(offsets.names, rivals, len(self.names))
        return out

    def confidences(self, scores: Float64, excluded: int = 0) -> Float64:
        """Probability that a model makes a concept, for scores of any shape."""
        rivals = len(self.directions) - excluded or len(self.directions) or 1
        return np.asarray(np.exp(-np.logaddexp(0.0, np.log(rivals) - scores)))

    def mean_directions(self, models: Descriptions) -> Float32s:
        """Directions (N, d) of models as queries, and for a shortlist: of their mean features."""
        return np.asarray(unit(models.means - self.centre), np.float32)

    def concepts(self, models: Descriptions) -> Float64:
        """Log-odds (N, B) of every background concept against the average one, by the directions."""
        every = self._by_direction(models, self.directions, self._lengths(models))
        return np.asarray((every - log_mean(every)).T)

    def _by_direction(self, models: Descriptions, directions: Floats, lengths: Float32s) -> Float64:
        """``log mean exp(b w.g)``: (q, N), from the features' ``lengths`` (F,) beside the centre."""
        asked = np.asarray(directions, np.float32)
        return _evidence(models, asked, self.direction_sharpness, (asked @ self.centre, lengths))

    def _by_embedding(self, models: Descriptions, embeddings: Floats) -> Float64:
        """``log mean exp(a q.h)``: (q, N)."""
        return _evidence(models, np.asarray(embeddings, np.float32), self.embedding_sharpness)

    def _lengths(self, models: Descriptions) -> Float32s:
        """``|h - centre|`` of every feature: (F,); without a copy of all of them, which would take most of a query."""
        rows = models.features
        squares = np.einsum("fd,fd->f", rows, rows) - 2 * (rows @ self.centre) + self.centre @ self.centre
        return np.asarray(np.sqrt(np.maximum(squares, 1e-12)), np.float32)


def _evidence(
    models: Descriptions,
    queries: Float32s,
    sharpness: float,
    centred: tuple[Float32s, Float32s] | None = None,
) -> Float64:
    """``log mean over a model's features of exp(sharpness x)``: (q, N).

    ``x`` is the inner product of query and feature; or ``centred`` by (q,), which is taken off, and scaled by (F,).
    """
    out = np.empty((len(queries), len(models)))
    starts, ends = models.starts, np.cumsum(models.counts)
    first = 0
    while first < len(models) and len(queries):
        # As many whole models as the working copy allows, at least one.
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + _AT_ONCE // len(queries), "right")))
        rows = slice(starts[first], ends[last - 1])
        similarities = queries @ models.features[rows].T
        if centred is not None:
            similarities -= centred[0][:, None]
            similarities /= centred[1][rows]
        similarities *= np.float32(sharpness)
        own = starts[first:last] - starts[first]
        top = np.maximum.reduceat(similarities, own, axis=1)
        terms = np.exp(similarities - np.repeat(top, models.counts[first:last], axis=1))
        out[:, first:last] = top + np.log(np.add.reduceat(terms, own, axis=1) / models.counts[first:last])
        first = last
    return out


def log_mean(evidence: Float64) -> Float64:
    """``log mean exp`` over the first axis of (r, N): (N,); 0 without any."""
    if not len(evidence):
        return np.zeros(evidence.shape[1])
    top = evidence.max(axis=0)
    return np.asarray(top + np.log(np.exp(evidence - top).mean(axis=0)))


def of_any(scores: Float64) -> Float64:
    """Scores (N,) of models for several concepts together, from those for each, (q, N): who makes any of them, and much.

    ``2 log mean over concepts of exp(s / 2)``. A model's samples are each of one concept or so, and so ``e^s / B`` is the share of
    its samples that show the concept (``s`` is against the average of all B). Who makes n of the q concepts and K in all,
    alike, scores ``2 log (n / q sqrt(B / K)) = log B + log (n / K) + log (n / q) - log q``: how much of what it makes is asked
    for times how much of what is asked for it makes (precision times recall). One concept scores as by itself.
    """
    return 2 * log_mean(scores / 2)


def _without(offset: Floats, evidence: Float64, size: int) -> Float64:
    """An offset (N,) over ``size`` rivals without some of them, whose evidence is (x, N)."""
    remaining = size - len(evidence)
    if not len(evidence) or remaining < 1:
        return np.asarray(offset, np.float64)
    every = np.asarray(offset, np.float64) + np.log(size)
    excluded = log_mean(evidence) + np.log(len(evidence))
    # Rounding must not take more than everything.
    return np.asarray(every + np.log1p(-np.exp(np.minimum(excluded - every, -1e-6))) - np.log(remaining))


def _spread(similarities: Floats) -> float:
    """Mean over rows of the standard deviation over columns; 1 where it says nothing."""
    if similarities.shape[1] < 2 or not len(similarities):
        return 1.0
    return max(float(similarities.std(axis=1).mean()), 1e-6)

"""Distances between standardised logits and concepts (arXiv 2502.09619 and its second version).

A logit is standardised over the probes that its model saw, a concept over all probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from probelog.arrays import Floats, Ints
from probelog.completion import scoring
from probelog.evaluation.gallery import Concepts, Gallery

# The papers' truncation.
TOP = 50

# How many of the nearest background concepts count. The paper does not publish its choice.
NEAREST = 20


def first_version(gallery: Gallery, concepts: Concepts, k: int = TOP) -> Floats:
    """Version 1, query-side truncation: (C, N) scores ``-d(q, l)``.

    ``d(q, l) = || (z_q - z_l) restricted to A_q || / sqrt(|A_q|)``, ``A_q`` the k probes with the largest value in
    the query among those that the model saw. The root of ``|A_q|``, a constant of the paper's, keeps models that saw
    fewer than k probes from being nearer for it.
    """
    z_queries = scoring.text_descriptors(gallery.embeddings, concepts.queries)
    order = np.argsort(-z_queries, axis=1, kind="stable")
    scores = []
    for model in gallery.models:
        place = np.full(z_queries.shape[1], -1)
        place[model.probes] = np.arange(len(model.probes))
        kept = min(k, len(model.probes))
        top = _first_seen(place[order], kept)
        values = np.take_along_axis(z_queries[:, model.probes], top, axis=1)
        # The truncated distance with the sides exchanged.
        pairs = scoring.TopPairs(top.astype(np.int32), values.astype(np.float32))
        distances = scoring.truncated_distances(pairs, scoring.standardise(model.values))
        scores.append(-distances / np.sqrt(kept))
    return np.concatenate(scores, axis=1)


def _first_seen(places: Ints, count: int) -> Ints:
    """The first ``count`` entries of each row that are not negative; every row has so many."""
    seen = places >= 0
    return places[seen & (np.cumsum(seen, axis=1) <= count)].reshape(len(places), count)


def second_version(gallery: Gallery, concepts: Concepts, r: int = TOP, k: int = NEAREST) -> Floats:
    """Version 2: gallery-side truncation and calibration; (C, N) scores ``h_l - d(l, c)``.

    ``d(l, c) = || (z_l - z_c) restricted to A_l ||``, ``A_l`` the r probes with the largest value in the logit among
    those that its model saw; ``h_l`` the mean of the k smallest ``d(l, c_b)`` over the background.
    """
    z_queries = scoring.text_descriptors(gallery.embeddings, concepts.queries)
    z_background = scoring.text_descriptors(gallery.embeddings, concepts.background)
    scores = [
        calibrated(
            scoring.truncated_distances(pairs, z_queries),
            scoring.truncated_distances(pairs, z_background),
            concepts.excluded,
            k,
        )
        for pairs in _supports(gallery, r)
    ]
    return np.concatenate(scores, axis=1)


def second_version_uncalibrated(gallery: Gallery, concepts: Concepts, r: int = TOP) -> Floats:
    """Version 2 without calibration: (C, N) scores ``-d(l, c)``."""
    z_queries = scoring.text_descriptors(gallery.embeddings, concepts.queries)
    scores = [-scoring.truncated_distances(pairs, z_queries).T for pairs in _supports(gallery, r)]
    return np.concatenate(scores, axis=1)


def _supports(gallery: Gallery, r: int) -> Iterator[scoring.TopPairs]:
    for model in gallery.models:
        top = scoring.top_pairs(scoring.standardise(model.values), r)
        yield scoring.TopPairs(model.probes[top.probes].astype(np.int32), top.values)


def all_probes(gallery: Gallery, concepts: Concepts) -> Floats:
    """No truncation: (C, N) scores ``-d(l, c)``.

    ``d(l, c) = || (z_l - z_c) restricted to S || / sqrt(|S|)``, S the probes that the model saw; the root of ``|S|``
    makes models that saw more and fewer probes comparable.
    """
    to_queries = _root_mean_square(gallery, concepts.queries)
    return np.concatenate([-to_queries(number).T for number in range(len(gallery.models))], axis=1)


def all_probes_calibrated(gallery: Gallery, concepts: Concepts, k: int = NEAREST) -> Floats:
    """No truncation, with version 2's calibration: (C, N) scores ``h_l - d(l, c)``."""
    to_queries = _root_mean_square(gallery, concepts.queries)
    to_background = _root_mean_square(gallery, concepts.background)
    scores = [
        calibrated(to_queries(number), to_background(number), concepts.excluded, k)
        for number in range(len(gallery.models))
    ]
    return np.concatenate(scores, axis=1)


def _root_mean_square(gallery: Gallery, vectors: Floats) -> Callable[[int], Floats]:
    """Distances (L, C) of one model's logits to concepts by the model's number.

    By the scalar product, ``d^2 = mean z_l^2 + mean z_c^2 - 2 mean z_l z_c``: no (L, m, C) differences.
    """
    z = scoring.text_descriptors(gallery.embeddings, vectors)

    def distances(number: int) -> Floats:
        model = gallery.models[number]
        seen = z[:, model.probes]
        cross = scoring.standardise(model.values) @ seen.T / len(model.probes)
        # A standardised row has a mean square of one.
        return np.asarray(np.sqrt(np.maximum(1.0 + np.square(seen).mean(axis=1) - 2.0 * cross, 0.0)))

    return distances


def calibrated(
    distances: Floats, to_background: Floats, excluded: Sequence[Ints], k: int = NEAREST
) -> Floats:
    """Scores (C, L) ``h(l, c) - d(l, c)``, ``h`` the mean of the k smallest distances to background concepts.

    A query's excluded background concepts do not count for it; where none is left, ``h`` is 0.

    Args:
        distances: (L, C), of one model's logits to the queries.
        to_background: (L, B), of the same logits to the background.
        excluded: for each query the numbers of its excluded background concepts.
        k: how many of the nearest count.
    """
    spare = max((len(numbers) for numbers in excluded), default=0)
    nearest = scoring.nearest_background(to_background, k + spare)
    offsets = [scoring.calibration_offsets(nearest, k, numbers) for numbers in excluded]
    return np.reshape(offsets, distances.T.shape) - distances.T

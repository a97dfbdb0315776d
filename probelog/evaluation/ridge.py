"""Logits as directions in the encoder's space: ridge regression from probe embeddings to a logit's values.

``w_l = (E_S^T E_S + lam m / 1000 I)^-1 E_S^T z_l`` over the m probes S that the model saw, E_S centred on the mean of
all probe embeddings. The score is the cosine of w_l and the query, calibrated like version 2's distances.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats, Ints
from probelog.completion import scoring
from probelog.evaluation.gallery import Concepts, Gallery
from probelog.evaluation.truncated import NEAREST, calibrated
from probelog.ranking import matched_heads
from probelog.ranking.matched_heads import Observed
from probelog.storage.schemas import Head

Float64 = npt.NDArray[np.float64]

# Of the normal equations, for each 1,000 probes.
REGULARISATION = 1.0


def ridge(gallery: Gallery, concepts: Concepts, lam: float = REGULARISATION, k: int = NEAREST) -> Floats:
    """Ridge to the logit itself: (C, N) scores."""
    return _cosines(gallery, concepts, lambda model: scoring.standardise(model.values), lam, k)


def ridge_probability(
    gallery: Gallery, concepts: Concepts, lam: float = REGULARISATION, k: int = NEAREST
) -> Floats:
    """Ridge to the square root of the probability that the model gives to the logit's class: (C, N) scores."""
    return _cosines(gallery, concepts, root_probabilities, lam, k)


def root_probabilities(model: Observed) -> Float64:
    """Square roots of the class probabilities, standardised: (L, m).

    Softmax over the model's logits (those that are not constant), or a sigmoid for each where the head is sigmoid or
    has one logit. A logit whose probability does not vary (it saturates, or the softmax has one logit) keeps its
    values, and so do regression heads, which have no probabilities.
    """
    values = np.asarray(model.values, np.float64)
    if model.head == Head.REGRESSION:
        return scoring.standardise(values)
    if model.head == Head.SOFTMAX:
        weights = np.exp(values - values.max(axis=0))
        roots = np.sqrt(weights / weights.sum(axis=0))
    else:
        roots = np.exp(-0.5 * np.logaddexp(0.0, -values))
    return scoring.standardise(np.where(scoring.is_constant(roots)[:, None], values, roots))


class Ridge:
    """The ridge regressions of a gallery's models, one factorisation for neighbours that saw the same probes."""

    def __init__(self, embeddings: Floats, lam: float) -> None:
        embeddings = np.asarray(embeddings, np.float64)
        self.centred = embeddings - embeddings.mean(axis=0)
        self._lam = lam
        self._probes: Ints | None = None
        self._solved: Float64 = np.empty((0, 0))

    def directions(self, probes: Ints, z: Floats) -> Float64:
        """``w_l`` of every row of ``z`` (L, m), the values on ``probes`` (m,): (L, d)."""
        return np.asarray(z @ self._solution(probes).T)

    def left_out_errors(self, probes: Ints, z: Floats) -> Float64:
        """The error on each value of ``z`` (L, m) of the regression on all other values of its row: (L, m).

        ``(z[i] - w . e_i) / (1 - h_i)``, ``h_i`` the leverage of probe i, without fitting again (Allen 1974, PRESS).
        """
        solved, seen = self._solution(probes), self.centred[probes]
        leverage = np.einsum("md,dm->m", seen, solved)
        return np.asarray((z - (z @ solved.T) @ seen.T) / (1.0 - leverage))

    def _solution(self, probes: Ints) -> Float64:
        """``(E_S^T E_S + lam m / 1000 I)^-1 E_S^T``: (d, m)."""
        if self._probes is None or not np.array_equal(self._probes, probes):
            seen = self.centred[probes]
            gram = seen.T @ seen + self._lam * len(probes) / 1000 * np.eye(seen.shape[1])
            self._probes, self._solved = probes, np.linalg.solve(gram, seen.T)
        return self._solved


def _cosines(
    gallery: Gallery, concepts: Concepts, target: Callable[[Observed], Float64], lam: float, k: int
) -> Floats:
    fit = Ridge(gallery.embeddings, lam)
    scores = []
    for model in gallery.models:
        directions = fit.directions(model.probes, target(model))
        lengths = np.linalg.norm(directions, axis=1, keepdims=True)
        # A logit that no direction explains is at a right angle to everything.
        unit = directions / np.where(lengths > 0, lengths, 1.0)
        to_queries, to_background = (1.0 - unit @ part.T for part in (concepts.queries, concepts.background))
        scores.append(calibrated(to_queries, to_background, concepts.excluded, k))
    return np.concatenate(scores, axis=1)


def rank_by_matched_heads(
    gallery: Gallery,
    concepts: Concepts,
    ridge: float = matched_heads.RIDGE,
    text_units: float = matched_heads.SHARPNESS,
    score_units: float = matched_heads.SHARPNESS,
    image_share: float = matched_heads.IMAGE_SHARE,
    concept_weight: float = matched_heads.CONCEPT_WEIGHT,
    feedback: int = matched_heads.FEEDBACK,
    noise: float = matched_heads.NOISE,
    plain: float = matched_heads.PLAIN,
) -> Floats:
    """Log-odds of every concept for every logit: (C, N).

    Args:
        gallery: N logits.
        concepts: C queries.
        ridge: rho, see ``matched_heads.HeadSpace``.
        text_units: the zero-shot temperature, see there.
        score_units: the score's temperature, see ``matched_heads.sharpness``.
        image_share: how much of an image query is its own embedding.
        concept_weight: how many logits a concept counts for, see ``matched_heads.with_feedback``.
        feedback: see ``matched_heads.FEEDBACK``.
        noise: see ``matched_heads.NOISE``.
        plain: see ``matched_heads.PLAIN``.
    """
    space = matched_heads.HeadSpace(
        gallery.embeddings, concepts.background, ridge, text_units, image_share, noise, plain
    )
    directions = np.concatenate([space.of_model(model) for model in gallery.models])
    b = matched_heads.sharpness(directions, space.background, score_units)
    offset = matched_heads.offsets(directions, space.background, b)
    if concepts.images is None:
        queries = space.of_texts(concepts.queries, concepts.excluded)
    else:
        queries = np.concatenate([space.of_images(images) for images in concepts.images])
    return np.stack(
        [
            matched_heads.scores_of_concept(
                query,
                directions,
                gallery.owners,
                offset,
                space.background,
                b,
                excluded,
                concept_weight,
                feedback,
            )
            for query, excluded in zip(queries, concepts.excluded, strict=True)
        ]
    )

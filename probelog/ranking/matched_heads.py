"""Matched heads: how this project ranks logits, for texts, images, logits and models alike.

A model's head and the encoder's zero-shot classifier are treated alike. Both answer "how probable is this class on
probe i, beside the others?"; both answers are regressed on the probes' embeddings, which turns every logit and every
concept into one direction in the encoder's space. A logit is ranked by the posterior of the concept among the
background concepts, given its direction.

1. Response of a logit, ``y_l[i] = sqrt(p_l(x_i))``. For a softmax head ``p`` is the softmax over the model's logits
   and one class more, "none of them", whose logit is the model's mean log-sum-exp over its probes: probes that look
   like nothing the model knows weigh little (the log-sum-exp as a sign of the unknown: Liu et al. 2020, "Energy-based
   out-of-distribution detection"). For sigmoid and one-logit heads ``p`` is the sigmoid.
   Few probes seldom show a class at its best, where the root has its shape: with m probes the response is
   ``z(y_l) + (PLAIN / m)^2 z(f_l)``, ``f_l`` the plain logit, less the mean of the model's logits for a softmax head;
   the factor is at most 1.
2. Response of a concept: the root of the zero-shot probability ``softmax_c(a <e_i, t_c>)`` of the concept among
   the background concepts (the query's own names left out of them), as in CLIP (Radford et al. 2021).
3. Direction: ridge regression of the standardised response on the centred embeddings of the probes that were seen,
   ``w = (E^T E + rho m v I)^-1 E^T z(y)``, scaled to length 1; ``v`` is the mean squared length of the centred
   embeddings. A model that saw few probes needs no other completion, but its direction is noisier along some principal
   components of the embeddings than along others: each is divided by one plus its ratio of noise to signal (a Wiener
   filter), ``1 + NOISE / m x v_j / mean over j of v_j``, ``v_j = lambda_j / (lambda_j + rho v)^2``, lambda_j the variance
   of the embeddings along it.
4. Score: ``s(l, c) = b w_l.w_c - log mean over background c_b of exp(b w_l.w_cb)``, the log-odds of the concept
   against an average background concept. The second term is one number a logit, its offset; it takes the place of
   version 2's mean over the k nearest.
5. Feedback: the direction of a concept moves towards the logits that answer it best, one of each model, which say what the
   hub's models mean by it, and the score is computed again: ``w_c' = CONCEPT_WEIGHT w_c + sum over l of p_l w_l``,
   ``p_l = e^s / (e^s + B)`` the concept's posterior beside the B background concepts (pseudo-relevance feedback: Rocchio
   1971). A model's further logits are what it tells the concept from, however alike they are.

The constants are few and have no unit. ``SHARPNESS`` sets both temperatures, each in units of the spread that it
divides: ``a = SHARPNESS / std over concepts of <e_i, t_c>``, ``b = SHARPNESS / std over background of w_l.w_cb``
(means over probes, over logits). ``RIDGE`` is rho. docs/results.md, "How the constants were chosen", has the sweeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats, Ints
from probelog.storage.schemas import Head

Float64 = npt.NDArray[np.float64]

SHARPNESS = 1.5
RIDGE = 0.005
# The number of probes with which a direction's noise is as large as its signal, on average over components.
NOISE = 50.0
# The number of probes with which a plain logit counts for as much as the root of its probability; with all, for next to nothing.
PLAIN = 140.0
# How much of an image query is its own embedding, beside the names that it was recognised by.
IMAGE_SHARE = 0.5
# A concept weighs as much as so many models that certainly recognise it; more of them weigh no more than it does itself.
CONCEPT_WEIGHT = 7.0
# The number of a concept's best logits among which each model's first is what its direction is moved towards.
FEEDBACK = 60
# Below this standard deviation a response has underflowed (a head that is certain everywhere): it has no shape.
_FLAT = 1e-12
# Bounds the working copy of similarities to the background: 2^24 float64 values are 128 MB.
_AT_ONCE = 1 << 24


class Observed(NamedTuple):
    """The observations of one model: its ``head``, ``probes`` (m,) ascending, raw logit ``values`` (L, m).

    Constant logits are left out before (``scoring.is_constant``). A one-logit head has two rows: the logit and
    its negative, for the opposite concept.
    """

    head: Head
    probes: Ints
    values: Floats


def probabilities(values: Floats, head: Head) -> Float64:
    """Step 1's ``p``: (L, m) from one model's raw logits (L, m) on its probes.

    The rows of a softmax head add up to less than 1 on every probe; what is missing is "none of them".
    """
    x = np.asarray(values, np.float64)
    if head != Head.SOFTMAX:
        return np.asarray(np.exp(-np.logaddexp(0.0, -x)))
    every = _log_sum_exp(x, axis=0)
    return np.asarray(np.exp(x - np.logaddexp(every, every.mean())))


def standardised_responses(model: Observed, plain: float = PLAIN) -> Float64:
    """Step 1's response: (L, m) for one model. A root that underflows is replaced by the logit itself.

    Args:
        model: its observations.
        plain: see ``PLAIN``.
    """
    head, logits = Head(model.head), np.asarray(model.values, np.float64)
    roots = np.sqrt(probabilities(logits, head))
    flat = roots.std(axis=1) < _FLAT
    roots[flat] = logits[flat]
    if head == Head.SOFTMAX and len(logits) > 1:
        logits = logits - logits.mean(axis=0)
    share = min(1.0, (plain / logits.shape[1]) ** 2)
    return _standardise(_standardise(roots) + share * _standardise(logits))


class HeadSpace:
    """What probes, encoder and background fix: turns models, texts and images into unit directions (., d).

    Args:
        embeddings: (n, d) unit vectors of the probes.
        background: (B, d) unit vectors of the background concepts; with fewer than two of them a concept has nothing
            to compete with, and its plain similarities take the place of its probabilities.
        ridge: rho.
        units: the zero-shot temperature, in units of the spread of similarities over concepts.
        image_share: see ``IMAGE_SHARE``.
        noise: see ``NOISE``.
        plain: see ``PLAIN``.
    """

    def __init__(
        self,
        embeddings: Floats,
        background: Floats,
        ridge: float = RIDGE,
        units: float = SHARPNESS,
        image_share: float = IMAGE_SHARE,
        noise: float = NOISE,
        plain: float = PLAIN,
    ) -> None:
        self._rho, self._noise, self._units, self._image_share = ridge, noise, units, image_share
        self._plain = plain
        self._embeddings = np.asarray(embeddings, np.float64)
        self.texts: Float64 = np.asarray(background, np.float64).reshape(-1, self._embeddings.shape[1])
        self.centre: Float64 = self._embeddings.mean(axis=0)
        self._centred = self._embeddings - self.centre
        self.spread = float(np.square(self._centred).sum(axis=1).mean())

    def of_model(self, model: Observed) -> Float64:
        """Directions of one model's logits: (L, d)."""
        fitted = self._ridge(standardised_responses(model, self._plain), np.asarray(model.probes))
        axes, noise = self._noise_of_one_probe
        return _unit((fitted @ axes / (1 + noise / len(model.probes))) @ axes.T)

    def of_texts(self, texts: Floats, excluded: Sequence[Ints] | None = None) -> Float64:
        """Directions of texts: (C, d) from (C, d) unit vectors.

        Args:
            texts: the queries' embeddings.
            excluded: for each query, numbers of background concepts that do not compete with it.
        """
        # Reading thousands of probes' embeddings twice is what a query costs here: float32 is half of it.
        responses = np.asarray(np.asarray(texts, np.float32) @ self._embeddings_single.T, np.float64)
        if len(self.texts) > 1:
            for row, response in enumerate(responses):
                rivals = self._rivals(excluded[row] if excluded is not None else ())
                term = self._sharpness * response
                responses[row] = np.exp(0.5 * (term - np.logaddexp(term, rivals)))
        targets = _standardise(responses).astype(np.float32)
        return _unit((targets @ self._centred_single) @ self._inverse)

    def of_images(self, images: Floats) -> Float64:
        """Direction of one concept shown by s images: (1, d) from (s, d) unit vectors.

        The background names that the images are recognised by (naive Bayes over the images, each name judged by its
        text and by its direction), and beside them the mean image, for what the names do not say.
        """
        images = np.asarray(images, np.float64)
        shown = images - self.centre
        direct = _unit(shown.mean(axis=0, keepdims=True))
        if len(self.texts) < 2:
            return direct
        total = self.names_of_images(images)
        weights = np.exp(total - total.max())
        named = _unit((weights / weights.sum())[None] @ self.background)
        return _unit(named + self._image_share * direct)

    def names_of_images(self, images: Floats) -> Float64:
        """Log-evidence, up to a constant, that s images (s, d) all show each of the background concepts: (B,)."""
        images = np.asarray(images, np.float64)
        evidence = self._sharpness * images @ self.texts.T
        # The directions speak another language than the texts (images'), with less weight: they know only the probes.
        evidence += (images - self.centre) @ self.background.T / self._direction_spread
        return np.asarray(evidence.sum(axis=0))

    @cached_property
    def background(self) -> Float64:
        """Directions of the background concepts: (B, d), each among all others."""
        if len(self.texts) < 2:
            return self.of_texts(self.texts) if len(self.texts) else self.texts
        terms = self._sharpness * self._similarities
        return self._ridge(_standardise(np.exp(0.5 * (terms - self._every_rival[:, None])).T))

    @cached_property
    def _similarities(self) -> Float64:
        return np.asarray(self._embeddings @ self.texts.T)

    @cached_property
    def _sharpness(self) -> float:
        return self._units / max(float(self._similarities.std(axis=1).mean()), 1e-12)

    @cached_property
    def _direction_spread(self) -> float:
        """How far the background's directions differ on a probe, the mean over probes."""
        return max(float((self._centred @ self.background.T).std(axis=1).mean()), 1e-12)

    @cached_property
    def _every_rival(self) -> Float64:
        return _log_sum_exp(self._sharpness * self._similarities, axis=1)

    def _rivals(self, excluded: Sequence[int] | Ints) -> Float64:
        """Log-sum-exp over the competing background concepts for every probe: (n,)."""
        if not len(excluded):
            return self._every_rival
        numbers = np.unique(np.asarray(excluded, np.int64))
        if len(numbers) == len(self.texts):
            return self._every_rival
        excluded_sum = _log_sum_exp(self._sharpness * self._similarities[:, numbers], axis=1)
        share = np.exp(np.minimum(excluded_sum - self._every_rival, 0.0))
        # Taking away what is nearly everything would leave rounding noise: there the rest is added up again.
        doubtful = np.flatnonzero(share > 1 - 1e-6)
        rest = self._every_rival + np.log1p(-np.minimum(share, 1 - 1e-6))
        if len(doubtful):
            kept = np.delete(self._similarities[doubtful], numbers, axis=1)
            rest[doubtful] = _log_sum_exp(self._sharpness * kept, axis=1)
        return np.asarray(rest)

    @cached_property
    def _embeddings_single(self) -> npt.NDArray[np.float32]:
        return np.asarray(self._embeddings, np.float32)

    @cached_property
    def _centred_single(self) -> npt.NDArray[np.float32]:
        return np.asarray(self._centred, np.float32)

    @cached_property
    def _inverse(self) -> Float64:
        """(E^T E + rho n v I)^-1 over all probes."""
        n, d = self._centred.shape
        return np.asarray(
            np.linalg.inv(self._centred.T @ self._centred + self._rho * n * self.spread * np.eye(d))
        )

    @cached_property
    def _noise_of_one_probe(self) -> tuple[Float64, Float64]:
        """Principal components of the embeddings (d, d), and a direction's noise to signal (d,) along each after one probe."""
        variances, axes = np.linalg.eigh(self._centred.T @ self._centred / len(self._centred))
        variances = np.maximum(variances, 0.0)
        noise = variances / np.square(np.maximum(variances + self._rho * self.spread, 1e-300))
        return axes, self._noise * noise / max(float(noise.mean()), 1e-300)

    def _ridge(self, targets: Float64, probes: Ints | None = None) -> Float64:
        """Step 3 for targets (L, m) seen on some probes or on all of them: (L, d)."""
        if probes is None or len(probes) == len(self._centred):
            return _unit(targets @ self._centred @ self._inverse)
        # Once a model: float32 takes a quarter of the time, and the penalty keeps the systems far from singular (no
        # eigenvalue is above 1 / rho times the smallest).
        seen, targets = self._centred_single[probes], targets.astype(np.float32)
        m, d = seen.shape
        penalty = np.float32(self._rho * m * self.spread)
        if m < d:  # the same by the kernel matrix, which is the smaller one
            weights = np.linalg.solve(seen @ seen.T + penalty * np.eye(m, dtype=np.float32), targets.T)
            return _unit((weights.T @ seen).astype(np.float64))
        system = seen.T @ seen + penalty * np.eye(d, dtype=np.float32)
        return _unit(np.linalg.solve(system, seen.T @ targets.T).T.astype(np.float64))


@dataclass(frozen=True)
class Background:
    """What every logit is compared with: directions (B, d) of the background concepts, and the temperature ``b``."""

    directions: Float64
    sharpness: float

    def offsets(self, gallery: Floats) -> Float64:
        """Offsets of logits' directions (N, d): (N,)."""
        return offsets(gallery, self.directions, self.sharpness)


def sharpness(directions: Floats, background: Floats, units: float = SHARPNESS) -> float:
    """The score's temperature ``b`` for a gallery: (N, d) and (B, d) directions.

    A sample of the gallery does as well: it is the mean over logits of a spread over background concepts.
    """
    if len(background) < 2 or not len(directions):
        return units
    spreads = [
        (np.asarray(directions[rows], np.float64) @ np.asarray(background, np.float64).T).std(axis=1)
        for rows in _pieces(len(directions), len(background))
    ]
    return units / max(float(np.concatenate(spreads).mean()), 1e-12)


def offsets(directions: Floats, background: Floats, b: float, excluded: Ints | Sequence[int] = ()) -> Float64:
    """The score's second term for every logit: (N,), without some background concepts."""
    rivals = np.asarray(background, np.float64)
    if len(excluded) and len(np.unique(np.asarray(excluded))) < len(rivals):
        rivals = np.delete(rivals, np.asarray(excluded, np.int64), axis=0)
    if not len(rivals):
        return np.zeros(len(directions))
    out = np.empty(len(directions))
    for rows in _pieces(len(directions), len(rivals)):
        similarities = b * (np.asarray(directions[rows], np.float64) @ rivals.T)
        out[rows] = _log_sum_exp(similarities, axis=1) - np.log(len(rivals))
    return out


def without(offset: Floats, similarities: Floats, b: float, size: int) -> Float64:
    """``offsets`` again without some background concepts, from the offset with all of them: (N,).

    Args:
        offset: (N,) over all ``size`` background concepts.
        similarities: (N, x) cosines to the x concepts to leave out, fewer than ``size``.
        b: the score's temperature.
        size: B.
    """
    remaining = size - similarities.shape[1]
    if not similarities.shape[1] or remaining < 1:
        return np.asarray(offset, np.float64)
    excluded_sum = _log_sum_exp(b * np.asarray(similarities, np.float64), axis=1)
    every = np.asarray(offset, np.float64) + np.log(size)
    # log(e^every - e^gone); rounding must not take more than everything, and what remains is at least what the
    # rest would have at the lowest possible cosine.
    share = np.minimum(excluded_sum - every, -1e-9)
    remains = every + np.log1p(-np.exp(share))
    return np.asarray(np.maximum(remains, np.log(remaining) - b) - np.log(remaining))


def scores(
    similarities: Floats,
    gallery: Floats,
    offset: Floats,
    background: Floats,
    b: float,
    excluded: Ints | Sequence[int] = (),
) -> Float64:
    """Step 4 for one query: (N,).

    Args:
        similarities: (N,) cosines of the gallery's logits to the query.
        gallery: (N, d) directions; their precision is the products'.
        offset: (N,) over the whole background.
        background: (B, d) directions.
        b: the temperature.
        excluded: numbers of the background concepts that do not compete with the query.
    """
    rivals = np.asarray(background[np.asarray(excluded, np.int64)], gallery.dtype)
    own_offset = without(offset, gallery @ rivals.T, b, len(background))
    return np.asarray(b * np.asarray(similarities, np.float64) - own_offset)


def with_feedback(
    direction: Floats,
    answers: Floats,
    owners: Ints,
    scores: Floats,
    rivals: int,
    concept_weight: float = CONCEPT_WEIGHT,
) -> Float64:
    """Step 5: a concept's direction (d,), of length 1, moved towards the logits that answer it best.

    Args:
        direction: (d,) of the concept.
        answers: (k, d) directions of its ``FEEDBACK`` best logits, the best one first.
        owners: (k,) whose they are, a number for each model.
        scores: (k,) of these.
        rivals: number of the background concepts that compete with it; without any, nothing says who stands for it.
        concept_weight: see ``CONCEPT_WEIGHT``.
    """
    own: Float64 = np.asarray(direction, np.float64)
    if not rivals:
        return own
    first = np.unique(owners, return_index=True)[1]
    posteriors = np.exp(-np.logaddexp(0.0, np.log(rivals) - np.asarray(scores, np.float64)[first]))
    # However many logits answer, together they say no more than the concept itself.
    share = min(1.0, concept_weight / max(float(posteriors.sum()), 1e-12))
    moved = concept_weight * own + share * (posteriors @ np.asarray(answers, np.float64)[first])
    return np.asarray(_unit(moved[None])[0])


def rival_count(background: int, excluded: Ints | Sequence[int]) -> int:
    """Number of the background concepts that compete with a query; where none would, all of them do."""
    remaining = background - len(np.unique(np.asarray(excluded, np.int64)))
    return remaining or background


def scores_of_concept(
    direction: Floats,
    gallery: Floats,
    owners: Ints,
    offset: Floats,
    background: Floats,
    b: float,
    excluded: Ints | Sequence[int] = (),
    concept_weight: float = CONCEPT_WEIGHT,
    feedback: int = FEEDBACK,
) -> Float64:
    """Steps 4 and 5 for one concept's direction (d,): (N,). The other arguments are those of ``scores``.

    ``owners`` (N,) says whose each logit of the gallery is, by a number for each model.
    """

    def ask(asked: Floats) -> Float64:
        return scores(gallery @ np.asarray(asked, gallery.dtype), gallery, offset, background, b, excluded)

    first = ask(direction)
    best = np.argsort(-first, kind="stable")[:feedback]
    rivals = rival_count(len(background), excluded)
    return ask(with_feedback(direction, gallery[best], owners[best], first[best], rivals, concept_weight))


def _pieces(rows: int, width: int) -> list[slice]:
    step = max(1, _AT_ONCE // max(1, width))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _log_sum_exp(x: Float64, axis: int) -> Float64:
    top = x.max(axis=axis, keepdims=True)
    return np.asarray(np.log(np.exp(x - top).sum(axis=axis)) + np.squeeze(top, axis))


def _standardise(rows: Float64) -> Float64:
    rows = rows - rows.mean(axis=1, keepdims=True)
    deviation = rows.std(axis=1, keepdims=True)
    return np.asarray(rows / np.where(deviation > 0, deviation, 1.0))


def _unit(rows: Float64) -> Float64:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(length > 0, length, 1.0))

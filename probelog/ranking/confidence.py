"""How probable it is that a logit which was found is right: calibrated confidence, and "nothing here knows this".

A score alone does not tell an absent concept from a present one: whatever the gallery holds, some logit is first.
What tells them apart is whether the logit prefers another concept. With the score ``s(l, c)`` of ``probelog.ranking.matched_heads``
(its offset without the concepts excluded for c; a background concept excludes itself):

1. ``z(l, c) = (s(l, c) - mean over l of s(., c)) / std over l of s(., c)``: some concepts score high everywhere.
2. ``margin(l, c) = z(l, c) - max over background c_b, not excluded for c, of z(l, c_b)``: below 0 where the logit
   knows some background concept better than the one that was asked for.
3. ``confidence = sigmoid(w0 + w1 margin + w2 s)``, logistic regression (Platt 1999) on pairs of a concept and one of
   its best-scored logits. Weights are never negative: more evidence never lowers the confidence.

Without enough labelled pairs the confidence is the concept's posterior share beside the B background concepts,
``exp(s) / (exp(s) + B)``, which is a sigmoid too: ``w = (-log B, 0, 1)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from probelog.arrays import Floats, Ints
from probelog.errors import StoreError
from probelog.ranking import matched_heads
from probelog.ranking.matched_heads import Float64

DECLARED_LABELS: Literal["declared labels"] = "declared labels"
POSTERIOR: Literal["posterior"] = "posterior"
# Three weights need some ten examples of the rarer outcome each (Peduzzi et al. 1996).
FEWEST_POSITIVES = 30
# Strength of the prior on the weights of standardised features: one pair's worth.
_PENALTY = 1.0
_STEPS = 50
# Bounds the working copies of scores: 2^21 float64 values are 16 MB, of which some ten are held.
_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class ColumnStatistics:
    """How the background concepts score over a gallery: step 1's ``means`` (B,) and ``stds`` (B,)."""

    means: Float64
    stds: Float64

    @classmethod
    def of(cls, directions: Floats, background: Floats, offsets: Floats, b: float) -> ColumnStatistics:
        """Statistics of a gallery, in memory that does not grow with it.

        Args:
            directions: (N, d) of the gallery's logits; rows are read in pieces.
            background: (B, d) directions of the background concepts.
            offsets: (N,) of the logits, over the whole background (``matching.offsets``).
            b: the score's temperature.
        """
        size = len(background)
        count, means, squares = 0, np.zeros(size), np.zeros(size)
        step = max(1, _AT_ONCE // max(1, size))
        for start in range(0, len(directions) if size else 0, step):
            rows = slice(start, start + step)
            scores = background_scores(directions[rows], background, offsets[rows], b)
            # Chan, Golub and LeVeque (1979): sums of squares about each piece's own mean lose no digits.
            mean, added = scores.mean(axis=0), len(scores)
            away = mean - means
            means = means + away * (added / (count + added))
            squares += np.square(scores - mean).sum(axis=0) + np.square(away) * (
                count * added / (count + added)
            )
            count += added
        return cls(means, np.sqrt(squares / max(count, 1)))

    def standardise(self, scores: Float64) -> Float64:
        """``z`` (., B) of the background's scores (., B)."""
        return np.asarray((scores - self.means) / np.where(self.stds > 0, self.stds, 1.0))


def background_scores(directions: Floats, background: Floats, offsets: Floats, b: float) -> Float64:
    """Scores of every background concept, each without itself among its rivals: (m, B) for logits (m, d)."""
    cosines = np.asarray(directions, np.float64) @ np.asarray(background, np.float64).T
    size = cosines.shape[1]
    corrected = matched_heads.without(
        np.repeat(np.asarray(offsets, np.float64), size), cosines.reshape(-1, 1), b, size
    )
    return np.asarray(b * cosines - corrected.reshape(cosines.shape))


def margins(
    directions: Floats,
    candidate: Floats,
    background: Floats,
    offsets: Floats,
    b: float,
    statistics: ColumnStatistics,
    excluded: Ints | Sequence[int] = (),
) -> Float64:
    """Step 2 for the k hits of one query: (k,), all 0 where no background concept competes.

    Args:
        directions: (k, d) of the hits.
        candidate: (k,) the hits' ``z`` for the query: score less the mean, by the standard deviation, over the gallery.
        background: (B, d) directions of the background concepts.
        offsets: (k,) of the hits, over the whole background.
        b: the score's temperature.
        statistics: of the background over the same gallery.
        excluded: numbers of the background concepts that do not compete with the query.
    """
    rivals = np.delete(np.arange(len(background)), np.asarray(excluded, np.int64))
    if not len(rivals):
        return np.zeros(len(directions))
    known = statistics.standardise(background_scores(directions, background, offsets, b))
    return np.asarray(np.asarray(candidate, np.float64) - known[:, rivals].max(axis=1))


@dataclass(frozen=True)
class ScoreMoments:
    """Mean and standard deviation of one query's scores over a gallery, or over a random sample of it."""

    mean: float
    std: float

    @classmethod
    def of(cls, scores: Float64) -> ScoreMoments:
        """Of scores (N,)."""
        return cls(float(scores.mean()), float(scores.std())) if len(scores) else cls(0.0, 0.0)

    def standardise(self, scores: Float64) -> Float64:
        """Step 1's ``z`` for scores of the same query."""
        return np.asarray((scores - self.mean) / max(self.std, 1e-12))


def hit_margins(
    directions: Floats,
    offsets: Floats,
    scores: Float64,
    hits: Ints,
    background: Floats,
    b: float,
    statistics: ColumnStatistics,
    excluded: Ints | Sequence[int],
) -> Float64:
    """Margins (k,) of some logits (k,) for a query whose scores (N,) over the whole gallery are known."""
    standardised = ScoreMoments.of(scores).standardise(scores[hits])
    return margins(directions[hits], standardised, background, offsets[hits], b, statistics, excluded)


@dataclass(frozen=True)
class Confidence:
    """Step 3's weights and where they come from.

    Attributes:
        intercept: w0.
        margin: w1, not negative.
        score: w2, not negative.
        source: ``declared labels``, or ``posterior`` where there were too few of them.
        pairs: how many labelled pairs of a concept and a logit there were.
        positives: how many of these were relevant.
    """

    intercept: float
    margin: float
    score: float
    source: Literal["declared labels", "posterior"]
    pairs: int = 0
    positives: int = 0

    def of(self, scores: Floats, margins: Floats) -> Float64:
        """Probability that a logit is relevant: (k,) from scores ``s`` (k,) and margins (k,), or any other shape."""
        evidence = (
            self.intercept
            + self.margin * np.asarray(margins, np.float64)
            + self.score * np.asarray(scores, np.float64)
        )
        return np.asarray(np.exp(-np.logaddexp(0.0, -evidence)))

    @classmethod
    def posterior(cls, background: int, pairs: int = 0, positives: int = 0) -> Confidence:
        """The share of the concept beside ``background`` concepts, for where there are too few labels."""
        return cls(-math.log(max(background, 1)), 0.0, 1.0, POSTERIOR, pairs, positives)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Confidence:
        """Read what ``to_dict`` gave.

        Raises:
            StoreError: something is missing, or is no weight, source or count.
        """
        try:
            weights = [content[name] for name in ("intercept", "margin", "score")]
            counts = [content[name] for name in ("pairs", "positives")]
            source = content["source"]
        except (KeyError, TypeError) as error:
            raise StoreError(f"the index's confidence is incomplete ({error!r})") from None
        if not all(_is_number(weight) for weight in weights) or min(weights[1:]) < 0:
            raise StoreError(f"the index's confidence has weights that are none: {weights!r:.200}")
        if not all(type(count) is int for count in counts) or not 0 <= counts[1] <= counts[0]:
            raise StoreError(f"the index's confidence has counts that are none: {counts!r:.200}")
        if source not in (DECLARED_LABELS, POSTERIOR):
            raise StoreError(f"the index's confidence has an unknown source: {source!r:.60}")
        intercept, margin, score = map(float, weights)
        return cls(intercept, margin, score, source, *counts)


def _is_number(value: object) -> bool:
    # An integer too large for a float is no weight either.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def fit(scores: Floats, margins: Floats, relevant: Sequence[bool] | Ints, background: int) -> Confidence:
    """Fit step 3 to labelled pairs; with fewer than ``FEWEST_POSITIVES`` of either outcome, the posterior.

    Args:
        scores: (P,) ``s`` of each pair.
        margins: (P,).
        relevant: (P,) whether the labels call the logit relevant.
        background: B.
    """
    outcome = np.asarray(relevant, np.float64)
    pairs, positives = len(outcome), int(outcome.sum())
    if min(positives, pairs - positives) < FEWEST_POSITIVES:
        return Confidence.posterior(background, pairs, positives)
    features = np.stack([np.asarray(margins, np.float64), np.asarray(scores, np.float64)], axis=1)
    centre, spread = features.mean(axis=0), features.std(axis=0)
    weights = np.zeros(2)
    kept = np.flatnonzero(spread > 0)
    while True:
        fitted = _logistic((features[:, kept] - centre[kept]) / spread[kept], outcome)
        if not len(kept) or fitted[1:].min() >= 0:
            break
        kept = np.delete(kept, fitted[1:].argmin())  # misleading: fitted again without it
    weights[kept] = fitted[1:] / spread[kept]
    return Confidence(
        float(fitted[0] - weights @ centre),
        float(weights[0]),
        float(weights[1]),
        DECLARED_LABELS,
        pairs,
        positives,
    )


def _logistic(features: Float64, outcome: Float64) -> Float64:
    """Intercept and weights (1 + F,) of penalised logistic regression on features (P, F), by Newton's method."""
    design = np.concatenate([np.ones((len(features), 1)), features], axis=1)
    penalty = np.full(design.shape[1], _PENALTY)
    penalty[0] = 0

    def loss(weights: Float64) -> float:
        evidence = design @ weights
        return float(
            (np.logaddexp(0, evidence) - outcome * evidence).sum() + 0.5 * (penalty * weights**2).sum()
        )

    weights = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        probable = np.exp(-np.logaddexp(0, -(design @ weights)))
        slope = design.T @ (probable - outcome) + penalty * weights
        curvature = (design * (probable * (1 - probable))[:, None]).T @ design + np.diag(penalty)
        step = np.linalg.solve(curvature + 1e-12 * np.eye(len(weights)), slope)
        # Far from the optimum a whole step can overshoot.
        while loss(weights - step) > loss(weights) and np.abs(step).max() > 1e-9:
            step = step / 2
        weights = weights - step
        if np.abs(step).max() < 1e-9:
            break
    return weights

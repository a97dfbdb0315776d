"""Confidence: margins and statistics against their formulas, the fit against planted weights, and what it refuses."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.labels.confidence import BEST, MAX_CONCEPTS, fit_confidence
from probelog.errors import StoreError
from probelog.ranking import confidence, matched_heads
from probelog.ranking.confidence import (
    DECLARED_LABELS,
    FEWEST_POSITIVES,
    POSTERIOR,
    ColumnStatistics,
    Confidence,
    fit,
    margins,
)
from probelog.ranking.matched_heads import Float64, HeadSpace

FITTED = Confidence(-2.5, 3.0, 0.5, DECLARED_LABELS, 400, 60)


def unit(rng: np.random.Generator, rows: int, d: int) -> Float64:
    found = rng.standard_normal((rows, d))
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def world(seed: int, logits: int, background: int, d: int = 6) -> tuple[Float64, Float64, Float64, float]:
    rng = np.random.default_rng(seed)
    directions, rivals = unit(rng, logits, d), unit(rng, background, d)
    b = matched_heads.sharpness(directions, rivals)
    return directions, rivals, matched_heads.offsets(directions, rivals, b), b


def literal_score(direction: Float64, concept: Float64, rivals: Float64, b: float) -> float:
    """The score by its formula, over just these rivals."""
    return float(b * direction @ concept - np.log(np.mean(np.exp(b * rivals @ direction))))


# Statistics and margins


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(2, 7), st.integers(1, 50))
def test_statistics_in_pieces_are_those_of_the_formula(
    seed: int, logits: int, background: int, at_once: int
) -> None:
    directions, rivals, offsets, b = world(seed, logits, background)
    scores = np.array([
        [literal_score(row, rivals[c], np.delete(rivals, c, axis=0), b) for c in range(background)]
        for row in directions
    ])  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confidence, "_AT_ONCE", at_once)
        found = ColumnStatistics.of(directions, rivals, offsets, b)
    np.testing.assert_allclose(found.means, scores.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.stds, scores.std(axis=0), atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 7), st.data())
def test_margins_are_those_of_the_formula(seed: int, background: int, data: st.DataObject) -> None:
    excluded = data.draw(st.sets(st.integers(0, background - 1), max_size=background - 1))
    directions, rivals, offsets, b = world(seed, 20, background)
    query = unit(np.random.default_rng(seed + 1), 1, 6)[0]
    left = np.delete(rivals, sorted(excluded), axis=0)
    scores = np.array([literal_score(row, query, left, b) for row in directions])
    rival_scores = np.array([
        [literal_score(row, rivals[c], np.delete(rivals, c, axis=0), b) for c in range(background)]
        for row in directions
    ])  # fmt: skip
    z = (rival_scores - rival_scores.mean(axis=0)) / rival_scores.std(axis=0)
    own = (scores - scores.mean()) / scores.std()
    expected = own - np.delete(z, sorted(excluded), axis=1).max(axis=1)

    statistics = ColumnStatistics.of(directions, rivals, offsets, b)
    numbers = np.array(sorted(excluded), np.int64)
    hits = np.array([3, 0, 11])
    found = margins(directions[hits], own[hits], rivals, offsets[hits], b, statistics, numbers)
    np.testing.assert_allclose(found, expected[hits], atol=1e-5)
    own_scores = matched_heads.scores(directions @ query, directions, offsets, rivals, b, numbers)
    np.testing.assert_allclose(own_scores, scores, atol=1e-6)
    found = confidence.hit_margins(directions, offsets, own_scores, hits, rivals, b, statistics, numbers)
    np.testing.assert_allclose(found, expected[hits], atol=1e-5)


def test_without_rivals_the_margin_says_nothing() -> None:
    directions, rivals, offsets, b = world(0, 5, 2)
    statistics = ColumnStatistics.of(directions, rivals, offsets, b)
    assert margins(directions, np.ones(5), rivals, offsets, b, statistics, [0, 1]).tolist() == [0] * 5
    nothing = np.empty((0, 6))
    statistics = ColumnStatistics.of(directions, nothing, np.zeros(5), b)
    assert margins(directions, np.ones(5), nothing, np.zeros(5), b, statistics).tolist() == [0] * 5


# The fit


def planted(
    intercept: float, margin: float, score: float, pairs: int = 20_000
) -> tuple[Float64, Float64, Any]:
    rng = np.random.default_rng(7)
    scores, own = 3 + 2 * rng.standard_normal(pairs), rng.standard_normal(pairs) - 1
    probable = 1 / (1 + np.exp(-(intercept + margin * own + score * scores)))
    return scores, own, rng.random(pairs) < probable


def test_planted_weights_are_found() -> None:
    scores, own, relevant = planted(-3, 2, 0.7)
    found = fit(scores, own, relevant, background=100)
    assert (found.source, found.pairs, found.positives) == (DECLARED_LABELS, 20_000, relevant.sum())
    assert (found.intercept, found.margin, found.score) == pytest.approx((-3, 2, 0.7), abs=0.15)
    assert found.of(scores, own).mean() == pytest.approx(relevant.mean(), abs=0.001)


@pytest.mark.parametrize(
    ("margin", "score", "kept"), [(2, -0.7, "margin"), (-2, 0.7, "score"), (-2, -0.7, None)]
)
def test_more_evidence_never_lowers_the_confidence(margin: float, score: float, kept: str | None) -> None:
    scores, own, relevant = planted(0, margin, score)
    found = fit(scores, own, relevant, background=100)
    assert {name for name in ("margin", "score") if getattr(found, name) > 0} == ({kept} if kept else set())
    assert min(found.margin, found.score) == 0
    # What is left out is fitted without: the mean still holds.
    assert found.of(scores, own).mean() == pytest.approx(relevant.mean(), abs=0.001)


def test_labels_without_a_doubt_leave_weights_finite() -> None:
    own = np.repeat([-1.0, 1.0], 200)
    found = fit(np.zeros(400), own, own > 0, background=10)
    assert found.score == 0  # a constant says nothing
    assert 1 < found.margin < 100
    assert np.isfinite(found.intercept)


@pytest.mark.parametrize("positives", [0, FEWEST_POSITIVES - 1, 400 - FEWEST_POSITIVES + 1, 400])
def test_too_few_labels_leave_the_posterior(positives: int) -> None:
    found = fit(np.zeros(400), np.zeros(400), np.arange(400) < positives, background=50)
    assert (found.source, found.pairs, found.positives) == (POSTERIOR, 400, positives)
    scores = np.linspace(-5, 20, 30)
    np.testing.assert_allclose(found.of(scores, np.zeros(30)), np.exp(scores) / (np.exp(scores) + 50))


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_confidence_is_a_probability_and_grows(s: float, m: float, up: float, right: float) -> None:
    low, high = FITTED.of(np.array(s), np.array(m)), FITTED.of(np.array(s + up), np.array(m + right))
    assert 0 <= low <= high <= 1


# Its file form


def test_it_survives_json() -> None:
    for item in (FITTED, Confidence.posterior(245)):
        assert Confidence.from_dict(json.loads(json.dumps(item.to_dict()))) == item


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("margin", -0.1), ("score", "1"), ("intercept", math.nan), ("score", math.inf), ("margin", True),
        ("intercept", None), ("intercept", 10**400), ("intercept", -(10**400)), ("intercept", -math.inf),
        ("intercept", -1e300), ("source", "truth"), ("source", ["posterior"]), ("pairs", -1),
        ("pairs", 1.5), ("positives", 401), ("positives", "3"),
    ],
)  # fmt: skip
def test_nonsense_is_refused(name: str, value: object) -> None:
    with pytest.raises(StoreError, match="confidence"):
        Confidence.from_dict({**FITTED.to_dict(), name: value})


def test_what_is_missing_is_refused() -> None:
    for name in FITTED.to_dict():
        with pytest.raises(StoreError, match="incomplete"):
            Confidence.from_dict({key: value for key, value in FITTED.to_dict().items() if key != name})
    with pytest.raises(StoreError, match="incomplete"):
        Confidence.from_dict([])


# From declared labels


class Planted:
    """A gallery whose logits lie near the directions of the names they declare."""

    def __init__(self, names: list[str], labels: list[str], noise: float = 0.6) -> None:
        rng = np.random.default_rng(3)
        self.names = names
        self._texts = dict(zip(names, unit(rng, len(names), 24), strict=True))
        self.space = HeadSpace(unit(rng, 200, 24), np.stack(list(self._texts.values())))
        known = dict(zip(names, self.space.background, strict=True))
        nobody = unit(rng, len(labels), 24)
        rows = [known.get(label, nobody[i]) for i, label in enumerate(labels)]
        self.labels = labels
        self.directions = np.stack(rows) + noise * unit(rng, len(labels), 24)
        self.directions /= np.linalg.norm(self.directions, axis=1, keepdims=True)

    def embed(self, names: Any) -> Float64:
        return np.stack([self._texts[name] for name in names])

    def fit(self, labels: list[str] | None = None) -> Confidence:
        b = matched_heads.sharpness(self.directions, self.space.background)
        offsets = matched_heads.offsets(self.directions, self.space.background, b)
        statistics = ColumnStatistics.of(self.directions, self.space.background, offsets, b)
        return fit_confidence(
            self.directions, np.arange(len(self.labels)), offsets, self.labels if labels is None else labels, self.space, b, self.embed,
            self.names, statistics, seed=0,
        )  # fmt: skip


NAMES = [f"{a}{b}" for a in ("bla", "ker", "mun", "sto", "tri") for b in ("dorf", "gan", "lum", "pik")]


def test_declared_labels_teach_it() -> None:
    gallery = Planted(NAMES, [NAMES[i % 20] for i in range(100)] + [f"LABEL_{i}" for i in range(30)])
    found = gallery.fit()
    assert found.source == DECLARED_LABELS
    assert found.pairs == len(NAMES) * BEST  # logits without a name are no examples, neither right nor wrong
    assert 80 <= found.positives <= 100
    assert found.margin > 0
    assert gallery.fit() == found


def test_without_names_there_is_the_posterior() -> None:
    gallery = Planted(NAMES, [f"LABEL_{i}" for i in range(60)])
    assert gallery.fit() == Confidence.posterior(len(NAMES))
    assert gallery.fit([""] * 60) == Confidence.posterior(len(NAMES))


def test_a_large_hub_costs_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.labels.confidence.MAX_LOGITS", 70)
    monkeypatch.setattr("pipelines.labels.confidence.MAX_CONCEPTS", 12)
    gallery = Planted(NAMES, [NAMES[i % 20] for i in range(200)])
    found = gallery.fit()
    assert found.pairs <= 12 * BEST
    assert found.source == DECLARED_LABELS
    assert found == gallery.fit()
    assert MAX_CONCEPTS > 12


def test_the_fit_is_the_penalised_optimum() -> None:
    """At the optimum the slope of the loss is zero, the prior's included (one pair's worth on standardised features)."""
    rng = np.random.default_rng(3)
    scores, margin = rng.normal(size=120), rng.normal(size=120)
    relevant = rng.random(120) < 1 / (1 + np.exp(-(0.3 + 0.8 * margin + 0.5 * scores)))
    found = fit(scores, margin, relevant, 50)
    features = np.stack([margin, scores], axis=1)
    z = (features - features.mean(axis=0)) / features.std(axis=0)
    weights = np.array([found.margin, found.score]) * features.std(axis=0)
    slope = z.T @ (found.of(scores, margin) - relevant) + 1.0 * weights
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    assert np.sum(found.of(scores, margin)) == pytest.approx(relevant.sum(), abs=1e-6)


@pytest.mark.parametrize(
    ("positives", "source"), [(29, POSTERIOR), (30, DECLARED_LABELS), (70, DECLARED_LABELS), (71, POSTERIOR)]
)
def test_thirty_of_either_outcome_are_enough(positives: int, source: str) -> None:
    rng = np.random.default_rng(0)
    relevant = np.arange(100) < positives
    found = fit(rng.normal(size=100) + relevant, rng.normal(size=100), relevant, 50)
    assert (found.source, found.pairs, found.positives) == (source, 100, positives)


def test_a_posterior_without_background_is_a_plain_sigmoid() -> None:
    for background in (0, 1):
        assert Confidence.posterior(background).intercept == 0
    assert Confidence.posterior(7).intercept == pytest.approx(-math.log(7))

"""Every search method against its formula, written out pair by pair, and what all of them have in common."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probelog.completion import scoring
from probelog.completion.als import Block
from probelog.evaluation import METHODS, completed, dissect, ridge, truncated
from probelog.evaluation.gallery import Concepts, Gallery
from probelog.ranking.matched_heads import Observed
from probelog.storage.schemas import Head

COMPLETIONS = [name for name in METHODS if name.startswith("version 2 + ")]
# Methods that compare the logits of one model before they standardise.
WITHOUT_CONSTANTS = ["ridge, square-root probability", "version 2, centred"]
# Matched heads read a probe's constant too: how sure a model is that it knows anything on it.
OWN_SCALE = ["matched heads", *WITHOUT_CONSTANTS]
HEADS = [Head.SOFTMAX, Head.SIGMOID, Head.SINGLE, Head.REGRESSION]
worlds = st.integers(0, 2**32 - 1)
few = settings(max_examples=25, deadline=None)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def random_world(seed: int, whole: bool = False) -> tuple[Gallery, Concepts]:
    """A few models of all heads, each on its own probes (``whole``: on all), and questions with exclusions."""
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(12, 60)), int(rng.integers(3, 9))
    models = []
    for _ in range(rng.integers(1, 6)):
        head = HEADS[rng.integers(len(HEADS))]
        seen = np.sort(rng.choice(n, n if whole else int(rng.integers(4, n + 1)), replace=False))
        values = 3 * rng.standard_normal((int(rng.integers(1, 6)), len(seen))) + rng.standard_normal()
        if head == Head.SINGLE:
            values = np.concatenate([values[:1], -values[:1]])
        models.append(Observed(head, seen, values.astype(np.float32)))
    background, queries = int(rng.integers(0, 9)), int(rng.integers(1, 5))
    return Gallery(models, unit(rng.standard_normal((n, d)))), Concepts(
        unit(rng.standard_normal((queries, d))),
        unit(rng.standard_normal((background, d))) if background else np.empty((0, d)),
        [
            np.sort(rng.choice(background, int(rng.integers(0, background + 1)), replace=False))
            for _ in range(queries)
        ],
    )


# The formulas, pair by pair.


def z(values) -> list[float]:
    values = [float(v) for v in values]
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / std for v in values]


def rows_of(gallery: Gallery, values_of=lambda model: model.values) -> list[tuple[list[int], list[float]]]:
    """Probes and values of every logit."""
    return [
        ([int(p) for p in m.probes], [float(v) for v in row]) for m in gallery.models for row in values_of(m)
    ]


def descriptor(gallery: Gallery, vector: np.ndarray) -> list[float]:
    return z([float(np.dot(embedding, vector)) for embedding in gallery.embeddings])


def norm(one, other) -> float:
    return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(one, other, strict=True)))


def largest(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def allowed(concepts: Concepts, query: int) -> list[np.ndarray]:
    return [b for i, b in enumerate(concepts.background) if i not in concepts.excluded[query]]


def by_pairs(gallery: Gallery, concepts: Concepts, score, **options) -> np.ndarray:
    """``score(probes, values of the logit, query's number)`` of all pairs: (C, N)."""
    rows = rows_of(gallery, **options)
    return np.array([[score(*row, query) for row in rows] for query in range(len(concepts.queries))])


def calibrated(distance, gallery: Gallery, concepts: Concepts, k: int):
    """``distance(probes, z_l, vector)`` as a calibrated score of pairs."""

    def score(probes, values, query: int) -> float:
        nearest = sorted(distance(probes, values, b) for b in allowed(concepts, query))[:k]
        offset = sum(nearest) / len(nearest) if nearest else 0.0
        return offset - distance(probes, values, concepts.queries[query])

    return score


@few
@given(worlds, st.integers(1, 60))
def test_version_1(seed: int, k: int) -> None:
    gallery, concepts = random_world(seed)

    def score(probes, values, query: int) -> float:
        z_q, z_l = descriptor(gallery, concepts.queries[query]), dict(zip(probes, z(values), strict=True))
        support = [probes[i] for i in largest([z_q[p] for p in probes], k)]
        return -norm([z_q[p] for p in support], [z_l[p] for p in support]) / math.sqrt(len(support))

    found = truncated.first_version(gallery, concepts, k)
    np.testing.assert_allclose(found, by_pairs(gallery, concepts, score), atol=1e-4)


def truncated_distance(gallery: Gallery, r: int):
    def distance(probes, values, vector) -> float:
        z_c, z_l = descriptor(gallery, vector), z(values)
        support = largest(z_l, r)
        return norm([z_l[i] for i in support], [z_c[probes[i]] for i in support])

    return distance


@few
@given(worlds, st.integers(1, 60), st.integers(1, 9))
def test_version_2(seed: int, r: int, k: int) -> None:
    gallery, concepts = random_world(seed)
    distance = truncated_distance(gallery, r)
    found = truncated.second_version(gallery, concepts, r=r, k=k)
    expected = by_pairs(gallery, concepts, calibrated(distance, gallery, concepts, k))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    plain = by_pairs(gallery, concepts, lambda p, v, query: -distance(p, v, concepts.queries[query]))
    np.testing.assert_allclose(truncated.second_version_uncalibrated(gallery, concepts, r), plain, atol=1e-4)


@few
@given(worlds, st.integers(1, 9))
def test_all_probes(seed: int, k: int) -> None:
    gallery, concepts = random_world(seed)

    def distance(probes, values, vector) -> float:
        z_c = descriptor(gallery, vector)
        return norm(z(values), [z_c[p] for p in probes]) / math.sqrt(len(probes))

    plain = by_pairs(gallery, concepts, lambda p, v, query: -distance(p, v, concepts.queries[query]))
    np.testing.assert_allclose(truncated.all_probes(gallery, concepts), plain, atol=1e-5)
    expected = by_pairs(gallery, concepts, calibrated(distance, gallery, concepts, k))
    np.testing.assert_allclose(truncated.all_probes_calibrated(gallery, concepts, k), expected, atol=1e-5)


def naive_dissect(
    gallery: Gallery, concepts: Concepts, top: int, a: float, lam: float, soft: bool
) -> np.ndarray:
    def probability(probe: int, query: int) -> float:
        own = math.exp(a * gallery.embeddings[probe] @ concepts.queries[query])
        others = (math.exp(a * gallery.embeddings[probe] @ b) for b in allowed(concepts, query))
        return own / (own + math.fsum(others))

    def likelihood(probes, values, query: int) -> float:
        count = min(top, max(1, len(probes) // 10))
        total = 0.0
        for t, i in enumerate(largest(values, count)):
            p = probability(probes[i], query)
            total += math.log((1 + (0.998 - 0.028 * t / count) * (p - 1) if soft else p) + 1e-7)
        return total * top / count

    found = by_pairs(gallery, concepts, likelihood)
    prior = [[math.log(math.fsum(math.exp(x) for x in row)) - math.log(len(row))] for row in found]
    return found - lam * np.array(prior)


@few
@given(worlds, st.integers(1, 5))
def test_clip_dissect(seed: int, top: int) -> None:
    gallery, concepts = random_world(seed)
    np.testing.assert_allclose(
        dissect.wpmi(gallery, concepts, top), naive_dissect(gallery, concepts, top, 2, 0.6, False), atol=1e-6
    )
    np.testing.assert_allclose(
        dissect.soft_wpmi(gallery, concepts, top),
        naive_dissect(gallery, concepts, top, 10, 1, True),
        atol=1e-6,
    )


@few
@given(worlds)
def test_the_prior_matters_for_naming_a_logit_only(seed: int) -> None:
    gallery, concepts = random_world(seed)
    for method in (dissect.wpmi, dissect.soft_wpmi):
        without, half = method(gallery, concepts, lam=0.0), method(gallery, concepts, lam=0.5)
        shift = without - half
        np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1], shift.shape), atol=1e-9)


def test_the_prior_names_the_rarer_concept() -> None:
    """All three logits are likeliest under the first concept; the third one is least untypical of the second."""
    likelihoods = np.log([[0.5, 0.5, 0.4], [0.01, 0.01, 0.3]])
    assert dissect.mutual_information(likelihoods, 0.0).argmax(axis=0).tolist() == [0, 0, 0]
    assert dissect.mutual_information(likelihoods, 1.0).argmax(axis=0).tolist() == [0, 0, 1]


def test_few_observed_probes_mean_few_top_probes() -> None:
    assert [dissect.top_count(m, 100) for m in (4, 250, 999, 4000)] == [1, 25, 99, 100]


def root_probabilities(model: Observed) -> np.ndarray:
    """Square roots of probabilities, entry by entry."""
    values = model.values.astype(np.float64)
    if model.head == Head.SOFTMAX and len(values) > 1:
        return np.sqrt(np.exp(values) / np.exp(values).sum(axis=0))
    if model.head in (Head.SIGMOID, Head.SINGLE):
        return np.sqrt(1 / (1 + np.exp(-values)))
    return values


@few
@given(worlds, st.floats(0.1, 1000), st.integers(1, 9), st.booleans())
def test_ridge(seed: int, lam: float, k: int, root: bool) -> None:
    gallery, concepts = random_world(seed)
    centre = gallery.embeddings.mean(axis=0)

    def distance(probes, values, vector) -> float:
        # Least squares with the penalty as further equations.
        penalty = math.sqrt(lam * len(probes) / 1000) * np.eye(len(vector))
        system = np.concatenate([gallery.embeddings[probes] - centre, penalty])
        w = np.linalg.lstsq(system, np.concatenate([z(values), np.zeros(len(vector))]))[0]
        return 1 - w @ vector / np.linalg.norm(w)

    expected = by_pairs(
        gallery,
        concepts,
        calibrated(distance, gallery, concepts, k),
        values_of=root_probabilities if root else lambda model: model.values,
    )
    method = ridge.ridge_probability if root else ridge.ridge
    np.testing.assert_allclose(method(gallery, concepts, lam, k), expected, atol=1e-5)


def test_probabilities_that_do_not_vary_leave_the_logit() -> None:
    values = np.array([[0.0, 1, 2, 5], [9000, 9001, 9002, 9003]], np.float32)
    for head, kept in ((Head.SOFTMAX, [0, 1]), (Head.SIGMOID, [1]), (Head.REGRESSION, [0, 1])):
        found = ridge.root_probabilities(Observed(head, np.arange(4), values))
        np.testing.assert_allclose(found[kept], scoring.standardise(values)[kept])


@few
@given(worlds, st.floats(0.1, 1000))
def test_left_out_errors_are_those_of_fits_without(seed: int, lam: float) -> None:
    rng = np.random.default_rng(seed)
    fit = ridge.Ridge(unit(rng.standard_normal((20, 4))), lam)
    probes = np.sort(rng.choice(20, 9, replace=False))
    rows, seen = rng.standard_normal((3, 9)), fit.centred[probes]
    expected = np.empty((3, 9))
    for i in range(9):
        rest = np.arange(9) != i
        gram = seen[rest].T @ seen[rest] + lam * 9 / 1000 * np.eye(4)
        w = rows[:, rest] @ seen[rest] @ np.linalg.inv(gram)
        expected[:, i] = rows[:, i] - w @ seen[i]
    np.testing.assert_allclose(fit.left_out_errors(probes, rows), expected, rtol=1e-6, atol=1e-8)


# What methods have in common.


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=8, deadline=None)
@given(seed=worlds)
def test_scores_have_their_shape_and_are_finite(name: str, seed: int) -> None:
    gallery, concepts = random_world(seed)
    scores = METHODS[name](gallery, concepts)
    assert scores.shape == (len(concepts.queries), len(gallery))
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("name", METHODS)
def test_degenerate_input_gives_finite_scores(name: str) -> None:
    rng = np.random.default_rng(0)
    nearly = np.full((3, 30), 100.0) + 0.002 * rng.standard_normal((3, 30))
    one_probe_counts = np.zeros((3, 30))
    one_probe_counts[np.arange(3), [1, 4, 6]] = 1e4
    models = [
        Observed(Head.SOFTMAX, np.arange(30), nearly),
        Observed(Head.SIGMOID, np.arange(30), one_probe_counts - 5e3),
        Observed(Head.SOFTMAX, np.arange(30), one_probe_counts),
        Observed(Head.SOFTMAX, np.array([3, 8]), np.array([[1.0, 2], [5, 3], [6, 1]])),
        Observed(Head.SOFTMAX, np.array([3, 8, 9]), np.array([[1.0, 2, 9]])),
        Observed(Head.SINGLE, np.array([0, 29]), np.array([[1.0, 2], [-1, -2]])),
    ]
    assert not any(scoring.is_constant(model.values).any() for model in models)
    gallery = Gallery(models, unit(rng.standard_normal((30, 40))))
    queries, background = unit(rng.standard_normal((2, 40))), unit(rng.standard_normal((5, 40)))
    for concepts in (
        Concepts(queries, np.empty((0, 40)), [np.array([], np.int64)] * 2),
        Concepts(queries, background, [np.arange(5), np.arange(4)]),
        Concepts(queries, background[:1], [np.array([], np.int64)] * 2),
    ):
        scores = METHODS[name](gallery, concepts)
        assert scores.shape == (2, len(gallery))
        assert np.isfinite(scores).all()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OWN_SCALE])
@settings(max_examples=5, deadline=None)
@given(seed=worlds, scale=st.sampled_from([0.25, 2.0, 8.0]), shift=st.floats(-10, 10))
def test_scale_and_shift_of_a_logit_do_not_matter(name: str, seed: int, scale: float, shift: float) -> None:
    if name in COMPLETIONS:
        shift = 0.0  # rounding may tip a held-out choice; powers of two leave none
    gallery, concepts = random_world(seed)
    moved = Gallery(
        [model._replace(values=model.values.astype(np.float64) * scale + shift) for model in gallery.models],
        gallery.embeddings,
    )
    np.testing.assert_allclose(METHODS[name](moved, concepts), METHODS[name](gallery, concepts), atol=1e-3)


@pytest.mark.parametrize("name", WITHOUT_CONSTANTS)
@few
@given(seed=worlds)
def test_a_constant_of_each_probe_does_not_matter_to_softmax_heads(name: str, seed: int) -> None:
    gallery, concepts = random_world(seed)
    rng = np.random.default_rng(seed)
    softmax = [m for m in gallery.models if m.head == Head.SOFTMAX and len(m.values) > 2]
    moved = [
        m._replace(values=m.values.astype(np.float64) + 5 * rng.standard_normal(len(m.probes)))
        for m in softmax
    ]
    if softmax:
        np.testing.assert_allclose(
            METHODS[name](Gallery(moved, gallery.embeddings), concepts),
            METHODS[name](Gallery(softmax, gallery.embeddings), concepts),
            atol=1e-3,
        )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_the_planted_logit_is_first(name: str, share: float) -> None:
    """Twelve concepts, each the subject of its own probes; four models know three of them each."""
    rng = np.random.default_rng(1)
    texts = unit(rng.standard_normal((12, 24)))
    embeddings = unit(texts[np.arange(480) % 12] + 0.12 * rng.standard_normal((480, 24)))
    models = []
    for number in range(4):
        seen = np.sort(rng.choice(480, round(share * 480), replace=False))
        own = texts[3 * number : 3 * number + 3]
        noise = 0.5 * rng.standard_normal((3, len(seen)))
        models.append(Observed(Head.SOFTMAX, seen, 6 * own @ embeddings[seen].T + noise))
    background = np.concatenate([texts, unit(rng.standard_normal((20, 24)))])
    concepts = Concepts(texts, background, [np.array([i]) for i in range(12)])
    scores = METHODS[name](Gallery(models, embeddings), concepts)
    np.testing.assert_array_equal(scores.argmax(axis=1), np.arange(12))


# Completions.


@pytest.mark.parametrize("name", COMPLETIONS)
@few
@given(seed=worlds)
def test_with_all_probes_a_completion_is_version_2(name: str, seed: int) -> None:
    gallery, concepts = random_world(seed, whole=True)
    np.testing.assert_array_equal(METHODS[name](gallery, concepts), METHODS["version 2"](gallery, concepts))


def halves(rows: np.ndarray, embeddings: np.ndarray, logits: int = 5, share: float = 0.5) -> Gallery:
    """The rows in models of some logits, each model on its own part of the probes."""
    rng = np.random.default_rng(5)
    models = []
    for start in range(0, len(rows), logits):
        seen = np.sort(rng.choice(len(embeddings), round(share * len(embeddings)), replace=False))
        models.append(Observed(Head.SIGMOID, seen, rows[start : start + logits, seen]))
    return Gallery(models, embeddings)


def error(gallery: Gallery, observed: Gallery, rows: np.ndarray) -> float:
    """Root mean squared error of completed rows, in units of the observed deviation; nothing observed may change."""
    squared, start = [], 0
    for model, before in zip(gallery.models, observed.models, strict=True):
        own = rows[start : start + len(before.values)]
        mean, std = before.values.mean(axis=1, keepdims=True), before.values.std(axis=1, keepdims=True)
        np.testing.assert_array_equal(model.probes, np.arange(rows.shape[1]))
        np.testing.assert_allclose(model.values[:, before.probes], (before.values - mean) / std, atol=1e-5)
        missing = np.setdiff1d(model.probes, before.probes)
        squared.append(np.square(model.values - (own - mean) / std)[:, missing])
        start += len(own)
    return float(np.sqrt(np.mean(squared)))


def test_each_completion_finds_its_own_structure() -> None:
    rng = np.random.default_rng(0)
    # Too many directions for ALS to find in so few rows.
    embeddings = unit(rng.standard_normal((120, 20)))
    linear = rng.standard_normal((60, 20)) @ embeddings.T
    shared = rng.standard_normal((60, 3)) @ rng.standard_normal((3, 120)) / np.sqrt(3)
    both = linear + shared
    errors = {
        (kind, complete.__name__): error(complete(halves(rows, embeddings)), halves(rows, embeddings), rows)
        for kind, rows in (("linear", linear), ("shared", shared), ("both", both))
        for complete in (
            completed.complete_by_als,
            completed.complete_by_ridge,
            completed.complete_by_ridge_and_als,
        )
    }
    assert errors["linear", "complete_by_ridge"] < 0.25
    assert errors["shared", "complete_by_als"] < 0.3
    assert errors["shared", "complete_by_ridge"] > 0.7
    joined = errors["both", "complete_by_ridge_and_als"]
    assert joined < 0.9 * min(errors["both", "complete_by_als"], errors["both", "complete_by_ridge"])


def test_text_rows_help_where_models_are_few() -> None:
    rng = np.random.default_rng(0)
    embeddings = unit(rng.standard_normal((120, 6)))
    rows = rng.standard_normal((10, 6)) @ embeddings.T
    gallery = halves(rows, embeddings, share=0.25)
    without = error(completed.complete_by_als(gallery), gallery, rows)
    texts = unit(rng.standard_normal((80, 6)))
    assert error(completed.complete_by_als(gallery, texts), gallery, rows) < 0.6 * without


def test_models_that_saw_everything_stay_as_they_are() -> None:
    gallery, _ = random_world(3, whole=True)
    first, *rest = gallery.models
    partly = Observed(first.head, first.probes[::2], first.values[:, ::2])
    mixed = Gallery([partly, *rest], gallery.embeddings)
    found = completed.complete_by_ridge(mixed)
    assert len(found) == len(mixed)
    assert len(found.models[0].probes) == len(gallery.embeddings)
    assert all(one is other for one, other in zip(found.models[1:], rest, strict=True))


def test_centring() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4, 9)).astype(np.float32)
    stays = [
        Observed(Head.SOFTMAX, np.arange(9), rows[:2]),
        Observed(Head.SIGMOID, np.arange(9), rows),
        Observed(Head.SINGLE, np.arange(9), np.stack([rows[0], -rows[0]])),
        Observed(Head.REGRESSION, np.arange(9), rows),
    ]
    # The third row is the mean of all three, and would vanish.
    flat = Observed(Head.SOFTMAX, np.arange(9), np.stack([rows[0], rows[1], (rows[0] + rows[1]) / 2]))
    models = [*stays, Observed(Head.SOFTMAX, np.arange(9), rows), flat]
    found = completed.centred(Gallery(models, np.eye(9))).models
    assert all(one is other for one, other in zip(found, stays, strict=False))
    np.testing.assert_allclose(found[4].values, rows - rows.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found[5].values[:2], (rows[:2] - rows[1::-1]) / 2, atol=1e-6)
    assert not scoring.is_constant(found[5].values).any()


def test_copies_share_what_they_saw() -> None:
    rng = np.random.default_rng(0)
    rows, other = rng.standard_normal((3, 20)), rng.standard_normal((2, 20))
    seen = [np.arange(0, 12), np.arange(8, 16), np.array([1, 19])]
    models = [Observed(Head.SOFTMAX, probes, rows[:, probes]) for probes in seen]
    models.insert(1, Observed(Head.SIGMOID, np.arange(20), other))
    # A copy that ran in another precision: everyone keeps their own values.
    models[2] = models[2]._replace(values=models[2].values + 0.001)
    gallery = Gallery(models, np.eye(20))
    found = completed.share_observations(gallery, [[0, 2, 3]])
    assert found.models[1] is models[1]
    union = [*range(16), 19]
    for number in (0, 2, 3):
        assert found.models[number].probes.tolist() == union
        np.testing.assert_allclose(found.models[number].values, rows[:, union], atol=0.0011)
        own = np.isin(union, models[number].probes)
        np.testing.assert_array_equal(found.models[number].values[:, own], models[number].values)
    np.testing.assert_array_equal(found.models[3].values[:, 2:8], models[0].values[:, 2:8])
    assert completed.share_observations(gallery, []).models == models
    with pytest.raises(ValueError, match="different numbers"):
        completed.share_observations(gallery, [[0, 1]])
    with pytest.raises(ValueError, match="one group"):
        completed.share_observations(gallery, [[0, 2], [2, 3]])


def test_completed_rows_are_made_when_read() -> None:
    gallery, _ = random_world(4)
    asked = []
    found = completed._filled(gallery, lambda block: asked.append(block) or full_rows(block, gallery))
    assert not asked
    assert len(found.models) == len(gallery.models)
    assert len(found.models[1:]) == len(gallery.models) - 1
    assert not asked
    assert found.models[0].values.shape[1] == len(gallery.embeddings)
    assert len(asked) == 1


def full_rows(block: Block, gallery: Gallery) -> np.ndarray:
    return np.ones((len(block.values), len(gallery.embeddings)))

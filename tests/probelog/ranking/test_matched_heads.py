"""Matched heads against the literal formulas, and what must hold for any input."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probelog.evaluation.gallery import Concepts, Gallery
from probelog.evaluation.ridge import rank_by_matched_heads
from probelog.ranking import matched_heads
from probelog.ranking.matched_heads import Observed
from probelog.storage.schemas import Head
from tests.support.worlds import naive

HEADS = st.sampled_from([Head.SOFTMAX, Head.SIGMOID, Head.SINGLE])
SEEDS = st.integers(0, 2**32 - 1)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class World:
    """Random probes, background and models."""

    def __init__(self, seed: int, probes: int = 60, d: int = 8, background: int = 7) -> None:
        self.random = np.random.default_rng(seed)
        self.embeddings = unit(self.random.normal(size=(probes, d)) + 0.5)
        self.texts = unit(self.random.normal(size=(background, d)))
        self.space = matched_heads.HeadSpace(self.embeddings, self.texts)

    def model(self, head: Head, logits: int, seen: int | None = None) -> Observed:
        n = len(self.embeddings)
        probes = np.sort(self.random.choice(n, seen or n, replace=False))
        values = self.random.normal(size=(logits, self.embeddings.shape[1])) @ self.embeddings[probes].T * 4
        return Observed(head, probes, values + self.random.normal(size=values.shape))


@given(SEEDS, HEADS, st.integers(1, 5))
def test_probabilities_are_the_formulas(seed: int, head: Head, logits: int) -> None:
    values = np.random.default_rng(seed).normal(size=(logits, 9)) * 3
    found = matched_heads.probabilities(values, head)
    np.testing.assert_allclose(np.sqrt(found), naive.responses(values, head), rtol=1e-9)
    assert (found > 0).all()
    assert (found < 1).all()
    if head == Head.SOFTMAX:
        assert (found.sum(axis=0) < 1).all()
        # A softmax head is fixed only up to a constant.
        np.testing.assert_allclose(matched_heads.probabilities(values + 1234.5, head), found, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(SEEDS, HEADS, st.integers(1, 4), st.sampled_from([5, 20, 60, 200]))
def test_directions_of_a_model_are_ridge_regressions(seed: int, head: Head, logits: int, seen: int) -> None:
    world = World(seed, probes=max(60, seen))
    model = world.model(head, logits, seen)
    expected = naive.model_directions(model.values, head, world.embeddings, model.probes.tolist())
    found = world.space.of_model(model)
    np.testing.assert_allclose(found, expected, atol=5e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.lists(st.integers(0, 6), max_size=4))
def test_directions_of_texts_compete_with_the_background(seed: int, excluded: list[int]) -> None:
    world = World(seed)
    query = unit(world.random.normal(size=(1, 8)))
    expected = naive.text_direction(query[0], world.embeddings, world.texts, excluded)
    np.testing.assert_allclose(
        world.space.of_texts(query, [np.array(excluded, np.int64)])[0], expected, atol=1e-5
    )
    np.testing.assert_allclose(
        world.space.background, naive.background_directions(world.embeddings, world.texts), atol=1e-8
    )


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 6))
def test_directions_of_images(seed: int, count: int) -> None:
    world = World(seed)
    images = unit(world.random.normal(size=(count, 8)) + 0.5)
    expected = naive.image_direction(images, world.embeddings, world.texts)
    np.testing.assert_allclose(world.space.of_images(images)[0], expected, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.lists(st.integers(0, 6), max_size=6))
def test_offsets_without_some_concepts(seed: int, excluded: list[int]) -> None:
    world = World(seed)
    gallery = unit(world.random.normal(size=(11, 8)))
    named, numbers = world.space.background, np.unique(np.array(excluded, np.int64))
    b = matched_heads.sharpness(gallery, named)
    assert b == pytest.approx(naive.sharpness(gallery, named))
    every = matched_heads.offsets(gallery, named, b)
    expected = [naive.offset(w, named, b, excluded) for w in gallery]
    np.testing.assert_allclose(matched_heads.offsets(gallery, named, b, numbers), expected, atol=1e-9)
    np.testing.assert_allclose(matched_heads.Background(named, b).offsets(gallery), every)
    all_of_them = np.arange(len(named))  # then none is left out
    np.testing.assert_allclose(matched_heads.offsets(gallery, named, b, all_of_them), every)
    found = matched_heads.without(every, gallery @ named[numbers].T, b, len(named))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from([60, 25]))
def test_the_method_is_the_formulas(seed: int, seen: int) -> None:
    world = World(seed)
    models = [
        world.model(head, logits, seen)
        for head, logits in [(Head.SOFTMAX, 4), (Head.SIGMOID, 3), (Head.SINGLE, 2)]
    ]
    queries = unit(world.random.normal(size=(3, 8)))
    excluded = [np.array(numbers, np.int64) for numbers in ([], [2], [0, 5])]
    found = rank_by_matched_heads(Gallery(models, world.embeddings), Concepts(queries, world.texts, excluded))
    gallery = np.concatenate(
        [naive.model_directions(m.values, m.head, world.embeddings, m.probes.tolist()) for m in models]
    )
    owners = [number for number, model in enumerate(models) for _ in model.values]
    named = naive.background_directions(world.embeddings, world.texts)
    b = naive.sharpness(gallery, named)
    for row, (query, out) in zip(found, zip(queries, excluded, strict=True), strict=True):
        name = naive.text_direction(query, world.embeddings, world.texts, out.tolist())
        direction = naive.with_feedback(name, gallery, owners, named, b, out.tolist())
        expected = [naive.score(w, direction, named, b, out.tolist()) for w in gallery]
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_the_feedback_of_many_logits_weighs_no_more_than_the_name() -> None:
    random = np.random.default_rng(5)
    name, answers = unit(random.normal(size=(1, 8)))[0], unit(random.normal(size=(1, 8)))
    crowd = np.repeat(answers, 50, axis=0)
    models = np.arange(50)
    moved = matched_heads.with_feedback(name, crowd, models, np.full(50, 20.0), rivals=100)
    np.testing.assert_allclose(moved, unit((name + answers[0])[None])[0], atol=1e-6)
    one = matched_heads.with_feedback(name, answers, models[:1], np.array([20.0]), rivals=100)
    np.testing.assert_allclose(one, unit((7 * name + answers[0])[None])[0], atol=1e-6)
    # However many of them are one model's, only its best one counts.
    np.testing.assert_array_equal(
        matched_heads.with_feedback(name, crowd, np.zeros(50, int), np.full(50, 20.0), rivals=100), one
    )
    best_first = np.stack([answers[0], name, -answers[0]])
    mixed = matched_heads.with_feedback(name, best_first, np.array([4, 3, 4]), np.full(3, 20.0), rivals=100)
    np.testing.assert_allclose(mixed, unit((8 * name + answers[0])[None])[0], atol=1e-6)
    # What is no more probable than an average background concept hardly counts, and without one nothing does.
    unsure = matched_heads.with_feedback(name, crowd, models, np.zeros(50), rivals=10_000)
    np.testing.assert_allclose(unsure, name, atol=1e-3)
    assert matched_heads.with_feedback(name, crowd, models, np.zeros(50), rivals=0) is name


def test_the_ranking_does_not_care_whether_the_query_is_in_its_own_background() -> None:
    # s = log(p / (1 - p)) and log p are monotone in each other: the property that k-nearest calibration lacks.
    world = World(3)
    gallery = unit(world.random.normal(size=(50, 8)))
    named = world.space.background
    with_itself = 9.0 * gallery @ named[2] - matched_heads.offsets(gallery, named, 9.0)
    alone = 9.0 * gallery @ named[2] - matched_heads.offsets(gallery, named, 9.0, [2])
    assert np.argsort(with_itself).tolist() == np.argsort(alone).tolist()


def planted(world: World, head: Head) -> Observed:
    """One logit a background concept, which fires where the encoder sees that concept."""
    similarities = world.texts @ world.embeddings.T
    return Observed(head, np.arange(len(world.embeddings)), 8 * similarities)


@pytest.mark.parametrize("head", list(HEADS.elements))
def test_planted_logits_are_found(head: Head) -> None:
    world = World(0, probes=300, d=16, background=9)
    gallery = Gallery([planted(world, head)], world.embeddings)
    excluded = [np.array([i]) for i in range(9)]
    by_text = rank_by_matched_heads(gallery, Concepts(world.texts, world.texts, excluded))
    assert by_text.argmax(axis=1).tolist() == list(range(9))
    images = [unit(text + 0.05 * world.random.normal(size=(3, 16))) for text in world.texts]
    shown = Concepts(
        np.stack([i.mean(axis=0) for i in images]), world.texts, [np.empty(0, np.int64)] * 9, images
    )
    assert rank_by_matched_heads(gallery, shown).argmax(axis=1).tolist() == list(range(9))


@pytest.mark.parametrize(
    "values",
    [
        lambda n: np.array([np.zeros(n), np.where(np.arange(n) == 3, 5000.0, -5000.0)]),
        lambda n: np.array([np.linspace(-1e6, 1e6, n), np.linspace(1e6, -1e6, n)]),
        lambda n: np.full((2, n), -800.0) + np.random.default_rng(0).normal(size=(2, n)) * 1e-3,
        lambda n: np.random.default_rng(0).normal(size=(1, n)),
    ],
)
@pytest.mark.parametrize("head", list(HEADS.elements))
def test_extreme_logits_still_have_a_direction(head: Head, values: Callable[[int], np.ndarray]) -> None:
    world = World(1)
    found = world.space.of_model(Observed(head, np.arange(60), values(60)))
    assert np.isfinite(found).all()
    lengths = np.linalg.norm(found, axis=1)
    assert all(length == pytest.approx(1) or length == 0 for length in lengths)


def test_a_response_that_underflows_is_the_logit_itself() -> None:
    world = World(1)
    row = -3000.0 + 40 * world.embeddings @ world.texts[0]
    found = world.space.of_model(Observed(Head.SIGMOID, np.arange(60), row[None]))
    expected = naive.filtered(naive.ridge(naive.z(row), world.embeddings), world.embeddings, 60)
    np.testing.assert_allclose(found[0], expected, atol=1e-8)


@pytest.mark.parametrize("size", [0, 1, 2])
def test_a_background_of_next_to_nothing(size: int) -> None:
    world = World(2, background=size)
    model = world.model(Head.SOFTMAX, 3)
    queries = unit(world.random.normal(size=(2, 8)))
    excluded = [np.empty(0, np.int64), np.arange(size)]
    found = rank_by_matched_heads(
        Gallery([model], world.embeddings), Concepts(queries, world.texts, excluded)
    )
    assert found.shape == (2, 3)
    assert np.isfinite(found).all()
    assert np.isfinite(world.space.of_images(queries)).all()


def test_large_galleries_are_scored_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(4)
    gallery = unit(world.random.normal(size=(40, 8)))
    whole = matched_heads.offsets(gallery, world.space.background, 5.0)
    b = matched_heads.sharpness(gallery, world.space.background)
    monkeypatch.setattr(matched_heads, "_AT_ONCE", 16)
    np.testing.assert_allclose(matched_heads.offsets(gallery, world.space.background, 5.0), whole)
    assert matched_heads.sharpness(gallery, world.space.background) == pytest.approx(b)


def test_one_background_concept_is_nothing_to_compete_with() -> None:
    """Its plain similarities take the place of probabilities, and the temperature is the default."""
    world = World(6, background=1)
    query = unit(world.random.normal(size=(1, 8)))
    plain = naive.ridge(naive.z(world.embeddings @ query[0]), world.embeddings)
    np.testing.assert_allclose(world.space.of_texts(query)[0], plain, atol=1e-5)
    gallery = unit(world.random.normal(size=(5, 8)))
    assert matched_heads.sharpness(gallery, world.texts) == matched_heads.SHARPNESS
    assert matched_heads.sharpness(gallery[:0], gallery) == matched_heads.SHARPNESS


def test_many_images_and_large_scores_do_not_overflow() -> None:
    world = World(7)
    images = unit(world.random.normal(size=(400, 8)) * 0.1 + world.texts[3])
    assert np.isfinite(world.space.of_images(images)).all()
    gallery = unit(world.random.normal(size=(5, 8)))
    with np.errstate(all="raise", under="ignore"):
        found = matched_heads.offsets(gallery, world.texts, 2000.0)
    np.testing.assert_allclose(found, 2000.0 * (gallery @ world.texts.T).max(axis=1) - np.log(7), atol=1)


@pytest.mark.parametrize("excluded", [[0], [0, 3], [3, 0, 3], [1, 2]])
def test_what_competes_without_nearly_everything_is_added_up_again(excluded: list[int]) -> None:
    """One name is far ahead on every probe: without it, what is left is not to be had by a subtraction."""
    random = np.random.default_rng(5)
    ahead = unit(random.normal(size=(1, 8)))
    embeddings = unit(ahead + 0.2 * random.normal(size=(20, 8)))
    texts = np.concatenate([ahead, unit(random.normal(size=(5, 8)))])
    space = matched_heads.HeadSpace(embeddings, texts, units=40.0)
    terms = space._sharpness * (embeddings @ texts.T)
    rest = np.delete(terms, excluded, axis=1)
    expected = np.log(np.exp(rest - rest.max()).sum(axis=1)) + rest.max()
    assert (terms.max(axis=1) - rest.max(axis=1)).max() > 20 or 0 not in excluded
    np.testing.assert_allclose(space._rivals(excluded), expected, rtol=1e-6)

"""Matched samples against naive formulas; "nothing here"; sketches."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from probelog.ranking.samples import matched
from probelog.ranking.samples.description import Descriptions, unit
from probelog.ranking.samples.matched import Asked, SampleSpace
from probelog.ranking.samples.sketches import SketchMap

WIDTH = 16
NONE = np.empty(0, np.int64)


class World:
    """Concepts as directions around a centre; models make one of the first ten concepts each, of forty."""

    def __init__(self, seed: int = 0, noise: float = 0.15) -> None:
        random = np.random.default_rng(seed)
        centre = unit(random.normal(size=(1, WIDTH)))[0]
        self.concepts = unit(random.normal(size=(40, WIDTH)))
        names = unit(centre + 0.5 * self.concepts)
        shown = random.integers(0, 40, 400)
        self.pictures = unit(centre + 0.5 * self.concepts[shown] + 0.05 * random.normal(size=(400, WIDTH)))
        made = [np.repeat(n, random.integers(5, 20)) for n in range(10)]
        self.features = [
            unit(centre + 0.5 * self.concepts[item] + noise * random.normal(size=(len(item), WIDTH)))
            for item in made
        ]
        self.models = Descriptions.of(self.features)
        mean = self.pictures.mean(axis=0)
        directions = unit(names - mean)
        self.space = SampleSpace.fit(self.models.features, mean, directions, names, self.pictures)
        self.offsets = self.space.offsets(self.models)
        self.asked = [Asked(directions[n], names[n], np.array([n]), True) for n in range(40)]


def log_mean(values: npt.ArrayLike) -> float:
    return float(np.log(np.mean(np.exp(np.asarray(values, np.float64)))))


def test_scores_are_the_formulas() -> None:
    world = World()
    space, a, b = world.space, world.space.embedding_sharpness, world.space.direction_sharpness
    picture = Asked(world.asked[3].direction, world.pictures[0], NONE, False)
    logit = Asked(world.asked[3].direction, None, NONE, False)
    scores = space.scores(world.models, world.offsets, [world.asked[3], picture, logit])
    for n, h in enumerate(world.models.features[: world.models.counts[0]][None]):
        g = unit(h - space.centre)

        def evidence(queries: npt.NDArray[np.floating], rows: npt.NDArray[np.floating], t: float) -> float:
            return log_mean([log_mean(t * rows @ query) for query in np.atleast_2d(queries)])

        rivals = np.delete(np.arange(40), 3)
        first = evidence(world.asked[3].direction, g, b)
        text = first - evidence(space.directions[rivals], g, b)
        text += evidence(space.names[3], h, a) - evidence(space.names[rivals], h, a)
        alone = first - evidence(space.directions, g, b)
        assert scores[:, n] == pytest.approx([text, matched.PICTURE_ODDS * alone, alone], abs=1e-3)


def test_models_are_found_and_absent_concepts_are_told_apart() -> None:
    world = World()
    scores = world.space.scores(world.models, world.offsets, world.asked)
    assert (scores[:10].argmax(axis=1) == np.arange(10)).all()
    best = world.space.confidences(scores, 1).max(axis=1)
    assert best[:10].min() > 0.7
    # Others of forty concepts in sixteen dimensions lie near the ten.
    assert np.median(best[10:]) < 0.2
    concepts = world.space.concepts(world.models)
    assert (concepts.argmax(axis=1) == np.arange(10)).all()


def test_models_are_scored_alike_alone_and_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1)
    scores = world.space.scores(world.models, world.offsets, world.asked)
    monkeypatch.setattr(matched, "_AT_ONCE", 100)  # a few models at a time
    assert world.space.scores(world.models, world.offsets, world.asked) == pytest.approx(scores, abs=1e-4)
    assert world.space.offsets(world.models).names == pytest.approx(world.offsets.names, abs=1e-4)
    places = np.array([7, 2])
    few = matched.Offsets(*(item[places] for item in world.offsets))
    alone = world.space.scores(world.models.at(places), few, world.asked)
    assert alone == pytest.approx(scores[:, places], abs=1e-4)


def test_without_a_background_nothing_is_calibrated_and_all_is_finite() -> None:
    world = World()
    none = np.empty((0, WIDTH))
    space = SampleSpace.fit(world.models.features, world.space.centre, none, none, world.pictures)
    offsets = space.offsets(world.models)
    asked = world.asked[0]._replace(excluded=NONE)
    assert np.isfinite(space.confidences(space.scores(world.models, offsets, [asked]))).all()
    assert not offsets.names.any()


def test_sketches_are_moved_to_where_their_pictures_are() -> None:
    world = World()
    pictures = world.pictures
    random = np.random.default_rng(3)
    turn = np.linalg.qr(random.normal(size=(WIDTH, WIDTH)))[0]
    sketches = unit(pictures @ turn + 0.5 + 0.02 * random.normal(size=pictures.shape))
    fitted = SketchMap.fit(sketches[:300], pictures[:300])
    moved = SketchMap.from_array(fitted.array()).pictures_of(sketches[300:])
    assert np.linalg.norm(moved, axis=1) == pytest.approx(1, abs=1e-5)
    before, after = ((item * pictures[300:]).sum(axis=1).mean() for item in (sketches[300:], moved))
    assert after > 0.95 > before


def test_any_of_several_concepts_is_precision_times_recall() -> None:
    """Of models that make n of q concepts and K in all, alike; the background has B."""
    background, asked = 40.0, 4
    scores = np.full((asked, 3), -50.0)
    for model, (made, every) in enumerate([(1, 1), (2, 2), (2, 4)]):
        scores[:made, model] = np.log(background / every)
    expected = [np.log(background * n / k * n / asked / asked) for n, k in ((1, 1), (2, 2), (2, 4))]
    np.testing.assert_allclose(matched.of_any(scores), expected)
    np.testing.assert_allclose(matched.of_any(scores[:1]), scores[0])

"""Ways to score generators, on made-up features whose answer is known."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from pipelines.benchmark.generators.figures import EncoderFigures, GeneratorEvaluation
from pipelines.benchmark.generators.ways import (
    MATCHED,
    MONTE_CARLO,
    Queries,
    Questions,
    Scored,
    figures_of,
    scored,
    ways_of,
)
from probelog.evaluation.accuracy import Interval
from probelog.ranking.samples.description import Descriptions, unit
from probelog.ranking.samples.matched import Asked, SampleSpace
from probelog.ranking.samples.methods import METHODS

DIMENSION, CONCEPTS, MODELS, EACH = 24, 6, 12, 3


def features(samples: int = 16) -> list[np.ndarray]:
    """Model i makes concept i modulo their number."""
    random = np.random.default_rng(0)
    return [
        unit(np.eye(DIMENSION)[i % CONCEPTS] + random.normal(size=(samples, DIMENSION)) * 0.03)
        for i in range(MODELS)
    ]


def questions(noise: float = 0.1, concepts: int = CONCEPTS) -> Questions:
    """Pictures of each concept; those from number 6 on are made by no model."""
    random = np.random.default_rng(1)
    groups = np.repeat(np.arange(concepts), EACH)
    embeddings = unit(np.eye(DIMENSION)[groups] + random.normal(size=(len(groups), DIMENSION)) * noise)
    relevant = groups[:, None] == np.arange(MODELS) % CONCEPTS
    return Questions([queries(embeddings)], groups, relevant)


def queries(embeddings: np.ndarray) -> Queries:
    none = np.empty(0, np.int64)
    return Queries(embeddings, [Asked(row, row, none, is_text=False) for row in embeddings])


@pytest.fixture(scope="module")
def space() -> SampleSpace:
    random = np.random.default_rng(2)
    rows = np.concatenate(features())
    others = unit(random.normal(size=(30, DIMENSION)))
    return SampleSpace.fit(rows, np.zeros(DIMENSION), others, others, others)


def test_every_way_finds_what_lies_apart_and_knows_what_is_absent(space: SampleSpace) -> None:
    asked = questions(concepts=CONCEPTS + 2)
    described = {count: Descriptions.of([row[:count] for row in features()]) for count in (4, 16)}
    ways = ways_of(space)
    assert {*ways} == {*METHODS, MATCHED}
    found = figures_of("image", asked, scored(asked, described, ways))
    plain = [(item.method, item.samples) for item in found if "matrix" not in item.method]
    assert plain == [(name, count) for count in (4, 16) for name in ways]
    assert {item.method.split()[-2] for item in found if "matrix" in item.method} == {
        "diagonal",
        "triangular",
        "full",
    }
    for item in found:
        assert (item.queries, item.concepts) == (EACH * CONCEPTS, CONCEPTS)
        assert item.absent_area is not None
        if "matrix" not in item.method:
            assert item.measures["top1"].mean == 1.0, item
            assert item.absent_area.mean > 0.95, item
            assert item.milliseconds is not None
            assert item.milliseconds > 0
    reference = next(item for item in found if (item.method, item.samples) == (MONTE_CARLO, 16))
    assert set(reference.differences.values()) == {Interval(0.0, 0.0, 0.0)}


def test_differences_are_paired() -> None:
    """The same answers in another order of models: no difference at all, though each has a wide interval."""
    asked = questions()
    random = np.random.default_rng(3)
    scores = random.normal(size=asked.relevant.shape)
    better = scores + 9 * (asked.relevant & (asked.groups == 0)[:, None])
    ways = [
        Scored(MONTE_CARLO, 4, better, better.max(axis=1)),
        Scored(MONTE_CARLO, 16, scores, scores.max(axis=1)),
        Scored("the same", 16, 2 * scores, scores.max(axis=1)),
    ]
    first, reference, same = figures_of("image", asked, ways)
    assert set(same.differences.values()) == {Interval(0.0, 0.0, 0.0)}
    assert same.measures == reference.measures
    assert first.differences["map"].mean == pytest.approx(
        first.measures["map"].mean - reference.measures["map"].mean
    )
    assert first.absent_area is None


def test_no_matrix_has_seen_the_concept_that_it_is_asked_for() -> None:
    """Nothing about a concept's other queries, or about who makes it, changes what its own query is answered."""
    asked = questions(noise=0.5)
    described = {16: Descriptions.of(features())}
    before = {way.method: way.scores for way in scored(asked, described, {})}
    own = asked.groups == 2
    embeddings = asked.experts[0].embeddings.copy()
    embeddings[np.flatnonzero(own)[1:]] = np.eye(DIMENSION)[-1]
    relevant = asked.relevant.copy()
    relevant[own] = np.roll(relevant[own], 1, axis=1)
    first = np.flatnonzero(own)[0]
    changed = Questions([queries(embeddings)], asked.groups, asked.relevant)
    for way in scored(changed, described, {}):
        np.testing.assert_array_equal(way.scores[first], before[way.method][first])
    assert len(before) == 3


def test_a_generator_is_no_answer_to_itself() -> None:
    models = Descriptions.of(features())
    groups = np.arange(MODELS) % CONCEPTS
    relevant = (groups[:, None] == groups) & ~np.eye(MODELS, dtype=bool)
    asked = Questions([queries(unit(models.means))], groups, relevant, own=np.arange(MODELS))
    (found,) = figures_of(
        "generator", asked, scored(asked, {16: models}, {MONTE_CARLO: ways_of_plain(MONTE_CARLO)})
    )
    assert found.measures["top1"].mean == 1.0


def ways_of_plain(name: str):
    return lambda models, asked: METHODS[name](models, asked.embeddings)


def test_experts_that_are_asked_together_are_a_product() -> None:
    models = Descriptions.of(features())
    first, second = questions(0.6), questions(0.9)
    together = Questions([*first.experts, *second.experts], first.groups, first.relevant)
    way, places = ways_of_plain(MONTE_CARLO), np.arange(len(first))
    np.testing.assert_allclose(
        together.scores(way, models, places),
        first.scores(way, models, places) + second.scores(way, models, places),
    )


def test_figures_are_shown_and_written(space: SampleSpace) -> None:
    asked = questions(concepts=CONCEPTS + 1)
    figures = figures_of("sketch", asked, scored(asked, {4: Descriptions.of(features(4))}, ways_of(space)))
    certain = Interval(0.5, 0.25, 0.75)
    evaluation = GeneratorEvaluation(
        "somewhere", MODELS, {"sketch": 1 / 6}, figures,
        [EncoderFigures("samples", certain, None, 6, 48)], [], 12_345.6,
    )  # fmt: skip
    plain = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert plain["methods"][0]["measures"]["top1"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert {item.name for item in dataclasses.fields(GeneratorEvaluation)} == plain.keys()
    text = "\n".join(evaluation.lines())
    assert "sketch: 18 queries of 6 concepts, chance 16.7" in text
    assert "100.0 [100.0, 100.0]" in text
    assert "50.0 [25.0, 75.0]" in text
    assert "12,346 bytes a generator" in text
    assert text.count("matched") == 1

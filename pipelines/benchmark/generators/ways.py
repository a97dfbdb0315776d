"""Every way to score generators for queries of one modality, and the figures of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from pipelines.benchmark.generators.figures import MethodFigures
from probelog.arrays import Floats, Ints
from probelog.evaluation.accuracy import Bools, Float64, bootstrap
from probelog.evaluation.generators import MEASURES, measures, presence_area
from probelog.ranking.samples.description import Descriptions
from probelog.ranking.samples.learned import Learned, Shape
from probelog.ranking.samples.matched import Asked, Offsets, SampleSpace
from probelog.ranking.samples.methods import METHODS, Method

MONTE_CARLO = "monte-carlo"
MATCHED = "matched"
_FOLDS = 5
# So many queries are timed one by one.
_TIMED = 20


@dataclass(frozen=True, eq=False)
class Queries:
    """Queries of one sort.

    Attributes:
        embeddings: (Q, d) of the encoder.
        asked: (Q,) the same as the index's own method takes them.
    """

    embeddings: Floats
    asked: Sequence[Asked]

    def at(self, places: Ints) -> Queries:
        """Those at some places."""
        return Queries(self.embeddings[places], [self.asked[place] for place in places])


# Scores (q, M) of generators for queries.
Way: TypeAlias = Callable[[Descriptions, Queries], Float64]


@dataclass(frozen=True, eq=False)
class Questions:
    """The queries of one modality and their answers.

    Attributes:
        experts: what stands for each query, one sort or more that are asked together (product of experts).
        groups: (Q,) numbers of the concepts.
        relevant: (Q, M).
        own: (Q,) of queries by a generator, its own number, which is no answer; None for all others.
    """

    experts: Sequence[Queries]
    groups: Ints
    relevant: Bools
    own: Ints | None = None

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def present(self) -> Bools:
        """(Q,) whether any generator makes what is asked for."""
        return np.asarray(self.relevant.any(axis=1))

    def scores(self, way: Way, models: Descriptions, places: Ints) -> Float64:
        """Scores (q, M) of the queries at some places."""
        scores = np.sum([way(models, expert.at(places)) for expert in self.experts], axis=0)
        if self.own is not None:
            scores[np.arange(len(places)), self.own[places]] = -np.inf
        return np.asarray(scores)


@dataclass(frozen=True, eq=False)
class Scored:
    """What one way gave: scores (Q, M), how present it thinks that what was asked for is (Q,), and the time of a query."""

    method: str
    samples: int
    scores: Float64
    presence: Float64
    milliseconds: float | None = None


def ways_of(space: SampleSpace) -> dict[str, Way]:
    """The methods of the paper on plain embeddings, and the index's own."""
    return {**{name: _plain(method) for name, method in METHODS.items()}, MATCHED: _matched(space)}


def _plain(method: Method) -> Way:
    return lambda models, queries: method(models, queries.embeddings)


def _matched(space: SampleSpace) -> Way:
    offsets: dict[
        int, Offsets
    ] = {}  # of descriptions that live as long as this does: an index holds them ready

    def way(models: Descriptions, queries: Queries) -> Float64:
        if id(models) not in offsets:
            offsets[id(models)] = space.offsets(models)
        return space.scores(models, offsets[id(models)], queries.asked)

    return way


def scored(
    questions: Questions, described: Mapping[int, Descriptions], ways: Mapping[str, Way]
) -> Iterator[Scored]:
    """Every way with every number of samples, and learned matching with the most.

    Args:
        questions: of one modality.
        described: the generators by their first samples, by how many; kept by the caller.
        ways: by name.
    """
    everything = np.arange(len(questions))
    for samples, models in described.items():
        for name, way in ways.items():
            scores = questions.scores(way, models, everything)
            yield Scored(name, samples, scores, scores.max(axis=1), _milliseconds(questions, way, models))
    if questions.own is None and len(questions.experts) == 1:
        most = max(described)
        for shape in Shape:
            scores = _learned_on_others(questions, described[most], shape)
            yield Scored(f"first-moment, {shape} matrix", most, scores, scores.max(axis=1))


def _learned_on_others(questions: Questions, models: Descriptions, shape: Shape) -> Float64:
    """Scores (Q, M) by learned matching: no matrix has seen a concept that it is asked for, or a generator of it."""
    method = METHODS["first-moment"]
    vectors, relevant = questions.experts[0].embeddings, questions.relevant
    concepts, numbers = np.unique(questions.groups, return_inverse=True)
    folds = (np.random.default_rng(0).permutation(len(concepts)) % _FOLDS)[numbers]
    out = np.empty(relevant.shape)
    for fold in range(min(_FOLDS, len(concepts))):
        asked = folds == fold
        kept = np.flatnonzero(~relevant[asked].any(axis=0))
        training = ~asked & relevant[:, kept].any(axis=1)
        if training.any():
            answers = relevant[training][:, kept].argmax(axis=1)
            learned = Learned.train(vectors[training], answers, models.means[kept], shape)
            out[asked] = learned.of(method)(models, vectors[asked])
        else:
            out[asked] = method(models, vectors[asked])
    return out


def _milliseconds(questions: Questions, way: Way, models: Descriptions) -> float:
    """Median over some queries, one by one."""
    times = []
    for place in range(min(_TIMED, len(questions))):
        began = time.perf_counter()
        questions.scores(way, models, np.array([place]))
        times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times))


def figures_of(modality: str, questions: Questions, ways: Iterable[Scored]) -> list[MethodFigures]:
    """The figures of every way; Monte Carlo with the most samples is among them, which all are compared with."""
    present = questions.present
    if not present.any():
        return []
    listed = list(ways)
    relevant, groups = questions.relevant[present], questions.groups[present]
    found = [measures(way.scores[present], relevant) for way in listed]
    compared = max(
        (place for place, way in enumerate(listed) if way.method == MONTE_CARLO),
        key=lambda place: listed[place].samples,
    )
    figures = []
    for way, own in zip(listed, found, strict=True):
        area = None
        if not present.all():
            seen, unseen = way.presence[present], way.presence[~present]
            area = presence_area(seen, unseen, groups, questions.groups[~present])
        means = bootstrap(own, groups=groups)
        differences = bootstrap(own - found[compared], groups=groups)
        figures.append(
            MethodFigures(
                modality=modality,
                method=way.method,
                samples=way.samples,
                queries=int(present.sum()),
                concepts=len(np.unique(groups)),
                measures=dict(zip(MEASURES, means, strict=True)),
                differences=dict(zip(MEASURES, differences, strict=True)),
                absent_area=area,
                milliseconds=way.milliseconds,
            )
        )
    return figures

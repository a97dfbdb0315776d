"""Queries a new generation through the client and compares the answers with exact ones, before readers see it.

The exact answers come from a plain scan of the descriptors' Parquet: the index is not used for them, offsets are
computed again, and nothing is approximated. A query with a logit's own direction must find that logit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.runtime.ordered import in_order
from pipelines.complete.descriptors import Key, ModelDescriptors, SampledLogit, distinct, same_logits
from pipelines.publish.expected import Expected, ExpectedUpdate
from pipelines.publish.pieces import Making, Piece
from probelog.errors import QueryError
from probelog.index.generation import Generation
from probelog.ranking import matched_heads
from probelog.ranking.names import name_vectors
from probelog.search.client import Index
from probelog.search.query import ask, background_numbers
from probelog.search.ranking import with_feedback
from probelog.search.results import Hit
from probelog.storage.store import Store

# Numbers of background names and of logits that are queried: enough to notice a broken index, few enough to be cheap.
_NAMES = 5
ASKED_LOGITS = 20
# Names in no background: a query by a background name excludes that name, these exclude none.
_OTHER_NAMES = ("something else entirely", "a picture")
_ANSWERS = 10
# Least mean over all queries of the share of the exact first ten that the client gives. An index that scans all logits
# has 1; a vector index misses a few where many logits are nearly alike.
_LEAST_RECALL = 0.95
# Tolerance of a cosine. The exported encoder differs from torch's by rounding; wrong answers differ by hundredths.
_COSINE = 5e-3
_BLOCK_LOGITS = 8192

Float64 = npt.NDArray[np.float64]


def wrong_answers(generation: Generation, expected: Expected) -> Iterator[str]:
    """Check a whole generation's answers against its descriptors and its encoder; yields a sentence per problem."""
    space = matched_heads.HeadSpace(expected.embeddings, expected.vectors)
    client = _Client(generation)
    step = max(1, len(expected.background) // _NAMES)
    names = [*expected.background[::step][:_NAMES], *_OTHER_NAMES]
    same = {model.repo: same_logits(model) for model in expected.models}
    canaries = [_canary_of_name(client, name) for name in names]
    shifts = np.stack([_shift_of_name(generation, space, expected, name) for name in names])
    for logit in expected.written.samples:
        try:
            hits = client.like(logit)
        except QueryError as error:
            yield f"{logit.name} cannot be asked for: {error}"
            continue
        canaries.append(_Canary(logit.name, logit.direction, np.zeros(0, np.int64), hits, logit.key))
    asked = [canary.asked(same) for canary in canaries]
    exact = _exact(Questions(asked, shifts, space.background, generation.sharpness), expected)
    # Without logits the background tells how far the exported encoder is from the original.
    moved = exact.moved if expected.models else np.abs(space.background @ shifts.T).max(axis=0)
    yield from (
        f"its encoder answers {name!r} differently from the one it was made with"
        for name, difference in zip(names, moved, strict=True)
        if not difference < _COSINE
    )
    tolerance = generation.sharpness * 2 * _COSINE
    recalls = []
    for canary, best, scores in zip(canaries, exact.best, exact.scores, strict=True):
        recalls.append(_recall(canary.hits, best, scores, tolerance))
        off = [hit for hit in canary.hits if not abs(scores.get(_key(hit), np.inf) - hit.score) < tolerance]
        if off:
            yield f"asked for {canary.name} it gives {off[0].repo}#{off[0].logit} a wrong score"
        if canary.itself in best and not _itself(canary.hits):
            yield _not_found(canary.name)
    if recalls and not np.mean(recalls) >= _LEAST_RECALL:
        yield (
            f"its answers hold {np.mean(recalls):.0%} of the exact first {_ANSWERS}, less than "
            f"{_LEAST_RECALL:.0%}, over {len(recalls)} questions"
        )


def wrong_answers_of_update(generation: Generation, expected: ExpectedUpdate) -> Iterator[str]:
    """Check that the client finds logits that an update adds by their own directions; yields a sentence per problem."""
    client = _Client(generation)
    background, b = expected.base.space.background, expected.base.sharpness
    for logit in expected.written.samples:
        try:
            itself = _itself(client.like(logit))
        except QueryError as error:
            yield f"{logit.name} cannot be asked for: {error}"
            continue
        if not itself:
            yield _not_found(logit.name)
            continue
        offsets = _Offsets(logit.direction[None], background, b).without(np.zeros(0, np.int64))
        exact = b * float(logit.direction @ logit.direction) - float(offsets[0])
        if not abs(itself[0].score - exact) < b * 4 * _COSINE:
            yield f"asked for the direction of {logit.name} it gives it the score {itself[0].score:.2f}, not {exact:.2f}"


class _Client:
    """The query client, opened on a generation that is not live."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.index = Index(generation.index, pinned=generation)
        self._elsewhere = Index(generation.index, pinned=generation)

    def like(self, logit: SampledLogit) -> Sequence[Hit]:
        """Answers to a logit's direction, queried as a logit of another index so that the logit itself may answer."""
        return self.index.search(like=logit.name, like_index=self._elsewhere, k=_ANSWERS)


def _itself(hits: Sequence[Hit]) -> list[Hit]:
    """The hits with the same direction as the query, up to rounding."""
    return [hit for hit in hits if hit.distance < _COSINE]


def _not_found(name: str) -> str:
    return f"asked for the direction of {name} it does not find that logit"


@dataclass(frozen=True)
class _Canary:
    """One query with the client's answer.

    Attributes:
        name: of the query in messages.
        direction: (d,) that the client asks with: of a text, after feedback, or of a logit.
        excluded: numbers of the background names that do not compete with the query.
        hits: the client's answer.
        itself: the logit whose direction it is; None for a text.
    """

    name: str
    direction: Float64
    excluded: npt.NDArray[np.int64]
    hits: Sequence[Hit]
    itself: Key | None = None

    def asked(self, same: Mapping[str, str]) -> Asked:
        """What the exact answer is computed from; ``same`` is the identity of the models' logits, by repository."""
        answered: dict[str, list[Key]] = {}
        for hit in self.hits:
            answered.setdefault(same.get(hit.repo, ""), []).append(_key(hit))
        return Asked(self.direction, self.excluded, answered)


@dataclass(frozen=True)
class Asked:
    """A query as it is asked of all descriptors.

    Attributes:
        direction: (d,).
        excluded: numbers of the background names that do not compete with it.
        answered: the client's answers by the identity of their logits (`same_logits`).
    """

    direction: Float64
    excluded: npt.NDArray[np.int64]
    answered: Mapping[str, Sequence[Key]]


@dataclass(frozen=True)
class Questions:
    """All that is asked of the descriptors at once.

    Attributes:
        asked: the queries.
        shifts: (s, d) changes of directions, of which the largest change of a cosine counts.
        background: (B, d) directions of the background's names.
        sharpness: of the generation.
    """

    asked: Sequence[Asked]
    shifts: Float64
    background: Float64
    sharpness: float


class Exact:
    """Exact answers over some of the logits.

    Attributes:
        best: for every query the best scores; copies of the same weights count once, as in answers.
        scores: for every query the scores of the client's answers.
        moved: (s,) the largest change of a cosine by each shift.
    """

    def __init__(self, questions: Questions) -> None:
        self.best: list[dict[Key, float]] = [{} for _ in questions.asked]
        self.scores: list[dict[Key, float]] = [{} for _ in questions.asked]
        self.moved = np.zeros(len(questions.shifts))

    @classmethod
    def of(cls, questions: Questions, described: Iterable[ModelDescriptors]) -> Exact:
        """Score every logit of some models, none of which is a copy of another."""
        exact, b = cls(questions), questions.sharpness
        directions = np.stack([asked.direction for asked in questions.asked]).T
        for block in _blocks(described):
            gallery = np.concatenate([item.directions for item in block]).astype(np.float64)
            moved = np.abs(gallery @ questions.shifts.T).max(axis=0, initial=0.0)
            exact.moved = np.maximum(exact.moved, moved)
            cosines = gallery @ directions
            offsets = _Offsets(gallery, questions.background, b)
            for number, asked in enumerate(questions.asked):
                scores = b * cosines[:, number] - offsets.without(asked.excluded)
                exact._add(number, asked, block, scores)
        return exact

    def add(self, other: Exact) -> None:
        """Add the answers over other logits."""
        self.moved = np.maximum(self.moved, other.moved)
        for number, (best, scores) in enumerate(zip(other.best, other.scores, strict=True)):
            self.scores[number].update(scores)
            self._add_best(number, best.items())

    def _add(self, number: int, asked: Asked, block: Sequence[ModelDescriptors], scores: Float64) -> None:
        """Add the scores (N,) of all logits of some models for one query."""
        starts = np.cumsum([0, *(len(described.negated) for described in block)])
        for described, start in zip(block, starts[:-1].tolist(), strict=True):
            for key in asked.answered.get(same_logits(described.model), ()):
                place = described.place(key)
                if place is not None:
                    self.scores[number][key] = float(scores[start + place])
        folds: dict[Key, float] = {}
        for row in np.argsort(-scores, kind="stable").tolist():
            if len(folds) == _ANSWERS:
                break
            owner = int(np.searchsorted(starts, row, side="right")) - 1
            folds.setdefault(block[owner].fold(row - int(starts[owner])), float(scores[row]))
        self._add_best(number, folds.items())

    def _add_best(self, number: int, scores: Iterable[tuple[Key, float]]) -> None:
        best = self.best[number]
        for fold, score in scores:
            best[fold] = max(score, best.get(fold, -np.inf))
        self.best[number] = dict(sorted(best.items(), key=lambda item: -item[1])[:_ANSWERS])


def _exact(questions: Questions, expected: Expected) -> Exact:
    """The exact answers over all logits; workers compute them where they made the rows."""
    if expected.pieces is None:
        return Exact.of(questions, distinct(expected.descriptors.stream()))
    exact = Exact(questions)
    for some in in_order(
        _exact_of_piece, expected.pieces.with_originals(), [expected.pieces.making, questions]
    ):
        exact.add(some)
    return exact


def _exact_of_piece(item: tuple[Piece, npt.NDArray[np.bool_]], making: Making, questions: Questions) -> Exact:
    piece, originals = item
    described = piece.descriptors(Store(making.store), making.unlisted).stream()
    return Exact.of(questions, itertools.compress(described, originals))


def _canary_of_name(client: _Client, name: str) -> _Canary:
    query = with_feedback(client.generation, ask(client.generation, [name], None, None, None, [], []))
    direction = client.generation.basis.directions(query.coordinates).astype(np.float64)
    return _Canary(repr(name), direction, query.excluded, client.index.search(name, k=_ANSWERS))


def _shift_of_name(
    generation: Generation, space: matched_heads.HeadSpace, expected: Expected, name: str
) -> Float64:
    """How far the original encoder's direction (d,) of a name is from the exported one's."""
    excluded = [background_numbers(generation, [name])]
    exported = name_vectors(generation.text_encoder.embed, expected.prompts, [name])
    return np.asarray(
        space.of_texts(expected.embed([name]), excluded)[0] - generation.space.of_texts(exported, excluded)[0]
    )


class _Offsets:
    """The score's second term (`probelog.ranking.matched_heads`, step 4) for some logits, from its definition."""

    def __init__(self, gallery: Float64, background: Float64, b: float) -> None:
        self._exponents = b * (gallery @ background.T)
        self._top = self._exponents.max(axis=1, keepdims=True, initial=-b)
        self._weights = np.exp(self._exponents - self._top)

    def without(self, excluded: npt.NDArray[np.int64]) -> Float64:
        """Offsets (n,) over the background without some of its names."""
        rivals = self._weights
        if 0 < len(excluded) < rivals.shape[1]:
            rivals = np.delete(rivals, excluded, axis=1)
        if not rivals.shape[1]:
            return np.zeros(len(rivals))
        return np.asarray(np.log(rivals.mean(axis=1)) + self._top[:, 0])


def _blocks(described: Iterable[ModelDescriptors]) -> Iterator[list[ModelDescriptors]]:
    """Neighbouring models, some thousand logits at a time."""
    block: list[ModelDescriptors] = []
    rows = 0
    for item in described:
        block.append(item)
        rows += len(item.negated)
        if rows >= _BLOCK_LOGITS:
            yield block
            block, rows = [], 0
    if block:
        yield block


def _recall(
    hits: Sequence[Hit], exact: Mapping[Key, float], scores: Mapping[Key, float], tolerance: float
) -> float:
    """Share of the exact first ten that the client gave; a logit of an equal score counts as well."""
    if not exact:
        return 1.0
    good = [hit for hit in hits if scores.get(_key(hit), -np.inf) >= min(exact.values()) - tolerance]
    return len(good) / len(exact)


def _key(hit: Hit) -> Key:
    return hit.repo, hit.logit, hit.negated

"""Which logits answer a question best: all of a small index are scored, a large one is asked for a shortlist first.

Scores and order are always those of the formulas (``probelog.ranking.matched_heads``) on the stored directions. The shortlist only
says which logits are worth scoring. It is taken longer where it did not hold enough: because of a filter, of what is
not wanted, or of many answers asked for; and where even a long one does not, all logits are streamed through. So there
are never fewer answers than the index holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from probelog.arrays import values_of
from probelog.errors import QueryError
from probelog.index.generation import ROWS_AT_ONCE, Generation, Logits
from probelog.ranking.confidence import ScoreMoments
from probelog.ranking.matched_heads import Float64
from probelog.search.query import Query

# A shortlist holds this many logits at first, and this many for every answer wanted; four times as many at the next
# try, up to the longest. Of a million logits, 200 hold .975 of the exact ten for a name, 300 .997. In a larger index more
# logits are nearly alike: of five million, 300 hold .88 and 800 .97. The length grows as the size to the power of .6.
FIRST = 300
_FIRST_UP_TO = 1_000_000
_FIRST_GROWTH = 0.6
_PER_ANSWER = 5
_GROWTH = 4
_LONGEST = 50_000
# A row that is taken by its number costs 3 microseconds, one of a shortlist as much, and the shortlist itself as much
# as so many rows: whatever meets a filter is taken and scored where that is cheaper than a shortlist that holds enough.
_SHORTLIST_ROWS = 4_000
# Up to so many logits of models that meet a filter are all scored (0.1 s) to find models; more are looked for first.
_FILTERED = 20_000
# Taking single rows of a table costs more than streaming through twenty: beyond this share of them it does not pay.
_LARGEST_SHARE = 1 / 20
# Filters that more models meet are asked about each candidate instead of being listed.
_LISTED_MODELS = 5_000
# Of a large index this many models for every one wanted are scored in full, at first.
_MODELS_PER_ANSWER = 10
# So many of a model's logits are asked for candidates; its scores are over all of them.
_ASKED_LOGITS = 32

Int64 = npt.NDArray[np.int64]


class Filter:
    """The models that may answer: those that meet an SQL condition, or all of them.

    Raises:
        QueryError: the condition is empty or not understood.
    """

    def __init__(self, generation: Generation, condition: str | None) -> None:
        self._generation = generation
        self._condition = condition
        self._listed: dict[str, npt.NDArray[Any]] | None = None
        if condition is None:
            return
        if not condition.strip():
            raise QueryError("the filter is empty: leave it out or write an SQL condition")
        limit = _LISTED_MODELS + 1 if generation.large else None
        listed = generation.models(condition, ["weights", "first_row", "rows"], limit=limit)
        if limit is None or len(listed["id"]) < limit:
            self._listed = listed
        else:
            self._models = generation.count_models(condition)

    @property
    def count(self) -> float:
        """How many distinct logits may answer; infinite where they are not listed."""
        if self._listed is None:
            return np.inf
        return float(self._listed["rows"][self._distinct].sum())

    @property
    def share(self) -> float:
        """Which part of all logits may answer, about."""
        if self._condition is None:
            return 1.0
        if self._listed is not None:
            return max(self.count, 1.0) / self._generation.size
        return self._models / self._generation.settings.models

    @property
    def rows(self) -> Int64:
        """The rows of the logits that may answer, ascending, where they are listed."""
        assert self._listed is not None
        starts, counts = (self._listed[name][self._distinct] for name in ("first_row", "rows"))
        before = np.cumsum(counts) - counts
        return np.sort(np.repeat(starts - before, counts) + np.arange(counts.sum()))

    @property
    def _distinct(self) -> Int64:
        assert self._listed is not None
        return np.asarray(np.unique(self._listed["weights"], return_index=True)[1])

    def allowed(self, weights: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """Which of some logits may answer, by their weights: (n,)."""
        if self._condition is None:
            return np.ones(len(weights), bool)
        return np.isin(weights, self._meeting(weights)["weights"])

    def members(self, weights: Iterable[int]) -> dict[int, tuple[int, int | None]]:
        """For some weights the first model that may answer, and how many may: {weights: (number, count)}.

        The count is None where all models with these weights may.
        """
        wanted = sorted(set(weights))
        if self._condition is None:
            return {number: (number, None) for number in wanted}
        found = self._meeting(wanted)
        met, first, counts = np.unique(found["weights"], return_index=True, return_counts=True)
        numbers = found["id"][first].tolist()
        known = {
            key: (numbers[i], count)
            for i, (key, count) in enumerate(zip(met.tolist(), counts.tolist(), strict=True))
        }
        return {number: known[number] for number in wanted}

    def _meeting(self, weights: Iterable[Any]) -> dict[str, npt.NDArray[Any]]:
        """Models that meet the condition: all that do, or those with one of some weights."""
        if self._listed is not None:
            return self._listed
        assert self._condition is not None
        return self._generation.models(self._condition, ["weights"], among=np.unique(np.asarray([*weights])))


@dataclass(frozen=True, eq=False)
class Found:
    """The best logits for a question, best first: ``scores`` (k,) and ``similarities`` (k,) (cosines).

    ``gallery`` tells how the question scores over all logits, in a large index over a sample.
    """

    logits: Logits
    scores: Float64
    similarities: Float64
    gallery: ScoreMoments


def best(generation: Generation, question: Query, k: int, chosen: Filter, skip: int | None = None) -> Found:
    """The k best logits, fewer only where there are no more.

    Args:
        generation: what is searched.
        question: what is asked.
        k: how many.
        chosen: which models may answer.
        skip: row of a logit that may not.
    """
    ranking = _Ranking(generation, question, k, skip)
    if not generation.large:
        whole = generation.whole
        scored = ranking.add(whole, chosen.allowed(whole.weights))
        return ranking.found(ScoreMoments.of(scored.scores))
    taken = _SHORTLIST_ROWS + _shortest(generation, k, chosen)
    if chosen.count <= taken or not _shortlisted(generation, question, ranking, chosen):
        ranking.clear()
        if chosen.count <= max(taken, _LARGEST_SHARE * generation.size):
            for logits in generation.at(chosen.rows):
                ranking.add(logits)
        else:
            for logits in generation.blocks():
                ranking.add(logits, chosen.allowed(logits.weights))
    return ranking.found(_sampled(generation, question))


def _shortlisted(generation: Generation, question: Query, ranking: _Ranking, chosen: Filter) -> bool:
    """Rank a shortlist that holds the best; False where none short enough does."""
    count, effort = _shortest(generation, ranking.k, chosen), 1
    while count <= min(_LONGEST, max(FIRST, _LARGEST_SHARE * generation.size)):
        ranking.clear()
        if len(generation.recent):
            ranking.add(generation.recent, chosen.allowed(generation.recent.weights))
        wanted = [
            ranking.add(logits, chosen.allowed(logits.weights)).wanted
            for logits in generation.shortlisted(question.coordinates, count, effort)
        ]
        # What it left out scores no better than its worse half, whatever the question does not want.
        if np.isfinite(ranking.worst) and ranking.worst >= np.median(np.concatenate(wanted)):
            return True
        count, effort = count * _GROWTH, effort * 2
    return False


def first_length(size: int) -> int:
    """Length of the first shortlist of an index with so many logits."""
    return round(FIRST * float(max(1.0, size / _FIRST_UP_TO) ** _FIRST_GROWTH))


def _shortest(generation: Generation, k: int, chosen: Filter) -> int:
    """Length of the first shortlist: it holds about ``_PER_ANSWER`` for every answer that the filter lets through."""
    return max(first_length(generation.size), math.ceil(_PER_ANSWER * k / chosen.share))


class _Scored(NamedTuple):
    """Scores (n,) of some logits: for what is looked for alone, and with what is unwanted."""

    wanted: Float64
    scores: Float64


class _Ranking:
    """The k best of the logits that were added."""

    def __init__(self, generation: Generation, question: Query, k: int, skip: int | None) -> None:
        self._generation, self._question, self.k, self._skip = generation, question, k, skip
        self.clear()

    def clear(self) -> None:
        """Forget what was added."""
        self._kept: list[tuple[Logits, Float64, Float64]] = []
        self._held = 0

    def add(self, logits: Logits, allowed: npt.NDArray[np.bool_] | None = None) -> _Scored:
        """Rank some more logits; returns the scores of all of them."""
        generation, gallery, offsets = self._generation, logits.coordinates, logits.offsets
        similarities = self._question.similarities(gallery)
        wanted = self._question.wanted(generation, gallery, offsets, similarities)
        scores = self._question.scores(generation, gallery, offsets, wanted)
        kept = np.ones(len(scores), bool) if allowed is None else allowed.copy()
        if self._skip is not None:
            kept &= logits.rows != self._skip
        candidates = np.flatnonzero(kept)
        if len(candidates) > self.k:
            # All that are as good as the k-th, for equal scores go by rows.
            least = np.partition(scores[candidates], len(candidates) - self.k)[len(candidates) - self.k]
            candidates = candidates[scores[candidates] >= least]
        candidates = candidates[np.argsort(-scores[candidates], kind="stable")[: self.k]]
        self._kept.append((logits[candidates], scores[candidates], similarities[candidates]))
        self._held += len(candidates)
        if self._held > 2 * self.k + ROWS_AT_ONCE:
            self._kept = [self._best()]
            self._held = len(self._kept[0][1])
        return _Scored(wanted, scores)

    @property
    def worst(self) -> float:
        """Score of the k-th best; without k of them, infinitely bad."""
        if self._held < self.k:
            return -np.inf
        return float(self._best()[1][-1])

    def found(self, gallery: ScoreMoments) -> Found:
        """The k best, best first."""
        logits, scores, similarities = self._best()
        return Found(logits, scores, similarities, gallery)

    def _best(self) -> tuple[Logits, Float64, Float64]:
        if len(self._kept) == 1:
            return self._kept[0]
        logits = Logits.joined([logits for logits, _, _ in self._kept])
        scores = np.concatenate([scores for _, scores, _ in self._kept])
        similarities = np.concatenate([cosines for _, _, cosines in self._kept])
        order = np.lexsort((logits.rows, -scores))[: self.k]
        return logits[order], scores[order], similarities[order]


def _sampled(generation: Generation, question: Query) -> ScoreMoments:
    sample = generation.sample
    gallery, offsets = sample.coordinates, sample.offsets
    wanted = question.wanted(generation, gallery, offsets, question.similarities(gallery))
    return ScoreMoments.of(question.scores(generation, gallery, offsets, wanted))


@dataclass(frozen=True)
class FoundModel:
    """Distinct weights that do what other ones do, and their mean score."""

    weights: int
    score: float


def best_models(
    generation: Generation, asked: Logits, weights: int, k: int, chosen: Filter
) -> list[FoundModel]:
    """The k distinct weights that recognise best what some logits recognise, best first.

    Args:
        generation: what is searched.
        asked: the logits of the model that is asked about.
        weights: its weights, which do not answer.
        k: how many.
        chosen: which models may answer.
    """
    if not generation.large:
        return _ranked(generation, asked, generation.blocks(), weights, k, chosen)
    if chosen.count <= _FILTERED:
        return _ranked(generation, asked, generation.at(chosen.rows), weights, k, chosen)
    wanted, most = k * _MODELS_PER_ANSWER, _LARGEST_SHARE * generation.size
    while wanted <= min(_LONGEST, most):
        rows = _rows_of_candidates(generation, asked, weights, wanted, chosen)
        if len(rows) > most:
            break
        found = _ranked(generation, asked, generation.at(rows), weights, k, chosen)
        if len(found) == k:
            return found
        wanted *= _GROWTH
    return _ranked(generation, asked, generation.blocks(), weights, k, chosen)


def _ranked(
    generation: Generation,
    asked: Logits,
    blocks: Iterable[Logits],
    weights: int,
    k: int,
    chosen: Filter,
) -> list[FoundModel]:
    """From the logits of whole models, each model's beside each other."""
    totals: dict[int, float] = {}
    last: tuple[int, Float64] | None = None  # weights whose logits may go on in the next block
    for logits in blocks:
        if not len(logits):
            continue
        starts = np.flatnonzero(np.diff(logits.weights, prepend=-1))
        scores = generation.sharpness * (logits.coordinates @ asked.coordinates.T) - logits.offsets[:, None]
        most = np.maximum.reduceat(scores, starts, axis=0)
        numbers = logits.weights[starts].tolist()
        if last is not None and last[0] == numbers[0]:
            most[0] = np.maximum(most[0], last[1])
        totals.update(zip(numbers, most.mean(axis=1).tolist(), strict=True))
        last = numbers[-1], most[-1]
    totals.pop(weights, None)
    numbers = np.array([*totals], np.int32)
    means = np.array([*totals.values()])
    may = np.flatnonzero(chosen.allowed(numbers)) if len(numbers) else np.empty(0, np.int64)
    order = may[np.lexsort((numbers[may], -means[may]))[:k]]
    return [FoundModel(int(numbers[place]), float(means[place])) for place in order]


def _rows_of_candidates(
    generation: Generation, asked: Logits, weights: int, count: int, chosen: Filter
) -> Int64:
    """Rows of all logits of some ``count`` models that answer many of the asked logits well, ascending."""
    places = np.unique(np.linspace(0, len(asked) - 1, min(len(asked), _ASKED_LOGITS)).astype(np.int64))
    gains: dict[int, float] = {}
    for one in asked.coordinates[places]:
        logits = Logits.joined(
            [*generation.shortlisted(one, max(first_length(generation.size), count)), generation.recent]
        )
        scores = generation.sharpness * (logits.coordinates @ one) - logits.offsets
        least = float(scores.min(initial=np.inf))
        best: dict[int, float] = {}
        for number, score in zip(logits.weights.tolist(), scores.tolist(), strict=True):
            best[number] = max(best.get(number, 0.0), score - least)
        for number, gain in best.items():
            gains[number] = gains.get(number, 0.0) + gain
    gains.pop(weights, None)
    numbers = np.array([*gains], np.int32)
    allowed = numbers[chosen.allowed(numbers)] if len(numbers) else numbers
    first = sorted(allowed.tolist(), key=lambda number: -gains[number])[:count]
    if not first:
        return np.empty(0, np.int64)
    found = generation.take_models(sorted(first), ["first_row", "rows"])
    spans = zip(values_of(found["first_row"], int), values_of(found["rows"], int), strict=True)
    return np.sort(np.concatenate([np.arange(start, start + count) for start, count in spans]))

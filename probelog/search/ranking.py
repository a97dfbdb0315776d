"""The logits that answer a query best: a small index scores all of them, a large one looks up a shortlist first.

Scores and order are always those of the formulas (``probelog.ranking.matched_heads``) on the stored directions. The
shortlist only selects the logits worth scoring. It is extended where it did not hold enough answers (because of a
filter, of negatives, or of a large ``k``); where even the longest does not, all logits are scored. So a query never
gets fewer answers than the index has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from probelog.arrays import evenly_spread, values_of
from probelog.errors import QueryError
from probelog.index.conditions import Bound, prepared
from probelog.index.contents.logits import ROWS_AT_ONCE, Logits
from probelog.index.generation import Generation
from probelog.ranking import matched_heads
from probelog.ranking.confidence import ScoreMoments
from probelog.ranking.matched_heads import Float64
from probelog.search.query import Query, not_finite

# A shortlist holds this many logits at first, and this many for every answer requested; four times as many at the next
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
# The models that pass a filter are listed, up to this many; with more, the filter is applied to each candidate.
_LISTED_MODELS = 5_000
# In a large index this many candidate models for every answer requested are scored in full, at first.
_MODELS_PER_ANSWER = 10
# Number of a model's logits that are used to look up candidates; scores use all of them.
_ASKED_LOGITS = 32
# A ranking that is folded, or selected by confidence, is this many times as long as the answers, at first and at every
# further try, up to the longest.
_RANKED_PER_ANSWER = 4
_LONGEST_RANKING = 10_000
# Of so many of the best scores the most confident are looked for, where answers are sorted by confidence.
_SORTED = 200

Int64 = npt.NDArray[np.int64]
T = TypeVar("T")


class Filter:
    """The models that may answer: those that meet an SQL condition, or all of them.

    Raises:
        QueryError: the condition is empty or not understood.
    """

    def __init__(self, generation: Generation, condition: str | None) -> None:
        self._generation = generation
        self.condition = condition
        self._listed: dict[str, npt.NDArray[Any]] | None = None
        if condition is None:
            return
        self.condition = condition = prepared(condition, "models")
        limit = _LISTED_MODELS + 1 if generation.large else None
        listed = generation.models(condition, ["weights", "first_row", "rows"], limit=limit)
        if limit is None or len(listed["id"]) < limit:
            self._listed = listed
        else:
            self._models = generation.count_models(condition)

    @property
    def count(self) -> float:
        """Number of distinct logits that pass; infinite where the models are not listed."""
        if self._listed is None:
            return np.inf
        return float(self._listed["rows"][self._distinct].sum())

    @property
    def share(self) -> float:
        """Approximate share of all logits that pass, between 0 and 1."""
        if self.condition is None:
            return 1.0
        if self._listed is not None:
            return max(self.count, 1.0) / self._generation.size
        return self._models / self._generation.settings.models

    @property
    def rows(self) -> Int64:
        """Rows (r,) of the logits that pass, ascending. Only where the models are listed (``count`` is finite)."""
        assert self._listed is not None
        starts, counts = (self._listed[name][self._distinct] for name in ("first_row", "rows"))
        preceding = np.cumsum(counts) - counts
        return np.sort(np.repeat(starts - preceding, counts) + np.arange(counts.sum()))

    @property
    def _distinct(self) -> Int64:
        assert self._listed is not None
        return np.asarray(np.unique(self._listed["weights"], return_index=True)[1])

    def allowed(self, weights: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """Whether each of n logits passes, by its weights (n,): (n,)."""
        if self.condition is None:
            return np.ones(len(weights), bool)
        return np.isin(weights, self._meeting(weights)["weights"])

    def members(self, weights: Iterable[int]) -> dict[int, tuple[int, int | None]]:
        """For each of some weights the first model that passes, and how many do: {weights: (number, count)}.

        The count is None where there is no condition, so that all models with these weights pass.
        """
        requested = sorted(set(weights))
        if self.condition is None:
            return {number: (number, None) for number in requested}
        models = self._meeting(requested)
        found_weights, first, counts = np.unique(models["weights"], return_index=True, return_counts=True)
        numbers = models["id"][first].tolist()
        members = {
            key: (numbers[i], count)
            for i, (key, count) in enumerate(zip(found_weights.tolist(), counts.tolist(), strict=True))
        }
        return {number: members[number] for number in requested}

    def _meeting(self, weights: Iterable[Any]) -> dict[str, npt.NDArray[Any]]:
        """Columns of the models that meet the condition: of all where they are listed, else of those with these weights."""
        if self._listed is not None:
            return self._listed
        assert self.condition is not None
        return self._generation.models(self.condition, ["weights"], among=np.unique(np.asarray([*weights])))


@dataclass(frozen=True, eq=False)
class LogitMatches:
    """The k best logits for a query, best first.

    Attributes:
        logits: the k logits.
        scores: (k,) of the logits.
        similarities: (k,) cosines of the logits to the query.
        gallery: moments of the query's scores over all logits, in a large index over a sample.
    """

    logits: Logits
    scores: Float64
    similarities: Float64
    gallery: ScoreMoments

    def at(self, places: Int64) -> LogitMatches:
        """Those at some positions."""
        return LogitMatches(self.logits[places], self.scores[places], self.similarities[places], self.gallery)


def best(
    generation: Generation, query: Query, k: int, model_filter: Filter, skip: int | None = None
) -> LogitMatches:
    """The k best logits for a query; fewer only where fewer pass the filter.

    Args:
        generation: that is searched.
        query: the query.
        k: number of answers.
        model_filter: the models that may answer.
        skip: row of a logit that may not answer.
    """
    ranking = _Ranking(generation, query, k, skip)
    if not generation.large:
        gallery = generation.all_logits
        scored = ranking.add(gallery, model_filter.allowed(gallery.weights))
        return ranking.result(ScoreMoments.of(scored.scores))
    shortlist_cost = _SHORTLIST_ROWS + _shortest(generation, k, model_filter)
    if model_filter.count <= shortlist_cost or not _shortlisted(generation, query, ranking, model_filter):
        ranking.clear()
        if model_filter.count <= max(shortlist_cost, _LARGEST_SHARE * generation.size):
            for logits in generation.at(model_filter.rows):
                ranking.add(logits)
        else:
            for logits in generation.blocks():
                ranking.add(logits, model_filter.allowed(logits.weights))
    return ranking.result(sampled_moments(generation, query))


@dataclass(frozen=True)
class Selection:
    """Which of the ranked logits are answers.

    Attributes:
        k: number of answers.
        by: ``logit`` or None: all; ``model``, ``family``: the first of each.
        min_confidence: the least confidence of an answer.
        sort: what answers are ordered by, ``score`` or ``confidence``.
        bounds: of the scores and confidences of answers.

    Raises:
        QueryError: a value is none of these.
    """

    k: int
    by: str | None = None
    min_confidence: float | None = None
    sort: str = "score"
    bounds: Sequence[Bound] = ()

    def __post_init__(self) -> None:
        if self.by not in (None, "logit", "model", "family"):
            raise QueryError(f"answers can be folded by model or by family, not by {self.by!r}")
        if self.sort not in ("score", "confidence"):
            raise QueryError(f"answers can be sorted by score or by confidence, not by {self.sort!r}")
        if self.min_confidence is not None:
            check_confidence(self.min_confidence)

    @property
    def limits(self) -> list[Bound]:
        """All bounds."""
        least = [] if self.min_confidence is None else [Bound("confidence", ">=", self.min_confidence)]
        return [*least, *self.bounds]

    @property
    def by_confidence(self) -> bool:
        """Whether the confidence decides which logits are answers."""
        return self.sort == "confidence" or any(bound.name == "confidence" for bound in self.limits)


def check_confidence(value: float) -> None:
    """Refuse a least confidence that is no probability."""
    if not 0 <= value <= 1:
        raise QueryError(f"a least confidence is between 0 and 1, not {value}")


def select_logits(
    generation: Generation,
    query: Query,
    selection: Selection,
    model_filter: Filter,
    skip: int | None,
    notes: list[str],
) -> tuple[LogitMatches, Float64 | None]:
    """The logits that answer a query, in their order, and their confidences (none for queries by a logit).

    Args:
        generation: that is searched.
        query: the query.
        selection: which are answers.
        model_filter: the models that may answer.
        skip: row of a logit that may not answer.
        notes: gets a line where the longest ranking holds too few answers.
    """
    k, by = selection.k, selection.by
    folded, limits = by in ("model", "family"), selection.limits
    longest = count = k
    if folded or limits or selection.by_confidence:
        longest = max(k, _LONGEST_RANKING)
        count = min(longest, max(k * _RANKED_PER_ANSWER, _SORTED if selection.by_confidence else 0))
    while True:
        matches = best(generation, query, count, model_filter, skip)
        confidences = query.confidences(generation, matches.logits, matches.scores, matches.gallery)
        places = np.arange(len(matches.scores))
        values = {"score": matches.scores, "confidence": confidences}
        allowed = [bound.allows(values[bound.name]) for bound in limits]
        enough = places[np.all(allowed, axis=0)] if limits else places
        exhausted = len(places) < count or count >= longest
        if limits and not exhausted and all(bound.is_least for bound in limits):
            # Confidence falls with the score, but for differences between logits: none among the worse half, none below.
            exhausted = not (enough >= count // 2).any()
        if confidences is not None and selection.sort == "confidence":
            enough = enough[np.argsort(-confidences[enough], kind="stable")]
        if folded:
            keys = fold_keys(generation, model_filter, matches.logits.weights[enough].tolist(), by)
            first = {key: place for place, key in reversed([*enumerate(keys)])}
            enough = enough[sorted(first.values())]
        if len(enough) >= k or exhausted:
            break
        count = min(longest, count * _RANKED_PER_ANSWER)
    if len(enough) < k and len(places) >= longest > k:
        notes.append(f"only {len(enough)} answers are among the {longest:,} best scores")
    enough = enough[:k]
    return matches.at(enough), None if confidences is None else confidences[enough]


def first_of_families(
    generation: Generation, model_filter: Filter, k: int, ranked: Callable[[int], Sequence[ModelMatch]]
) -> list[ModelMatch]:
    """The best model of each of k families; fewer where fewer are in the longest ranking.

    Args:
        generation: that is searched.
        model_filter: the models that may answer.
        k: number of families.
        ranked: the best models, as many as it is asked for.
    """
    count = k * _RANKED_PER_ANSWER
    while True:
        matches = ranked(count)
        keys = fold_keys(generation, model_filter, [item.weights for item in matches], "family")
        first = dict(zip(reversed(keys), reversed(matches), strict=True))
        if len(first) >= k or len(matches) < count or count >= _LONGEST_RANKING:
            return [match for match in matches if match in {*first.values()}][:k]
        count = min(_LONGEST_RANKING, count * _RANKED_PER_ANSWER)


def fold_keys(
    generation: Generation, model_filter: Filter, weights: Sequence[int], by: str | None
) -> list[object]:
    """What answers of these weights are folded by: the weights, or the family. A model of unknown tree is its own."""
    if by != "family":
        return [*weights]
    members = model_filter.members(weights)
    numbers = [number for number, _ in members.values()]
    rows = generation.take_models(numbers, ["repo", "root"]).to_pylist() if numbers else []
    families = {row["id"]: row["root"] or row["repo"] for row in rows}
    return [families[members[item][0]] for item in weights]


def with_feedback(generation: Generation, query: Query) -> Query:
    """A query for a concept, its direction moved towards what answers it best in the whole index (docs/method.md)."""
    positive = replace(query, negative=query.negative[:0])
    answers = best(generation, positive, matched_heads.FEEDBACK, Filter(generation, None))
    rivals = matched_heads.rival_count(len(generation.background), query.excluded)
    logits = answers.logits
    moved = matched_heads.with_feedback(
        query.coordinates, logits.coordinates, logits.weights, answers.scores, rivals
    )
    return replace(query, coordinates=moved.astype(np.float32))


def _shortlisted(generation: Generation, query: Query, ranking: _Ranking, model_filter: Filter) -> bool:
    """Rank a shortlist that holds the k best logits; False where none of an acceptable length does."""
    count, effort = _shortest(generation, ranking.k, model_filter), 1
    while count <= min(_LONGEST, max(FIRST, _LARGEST_SHARE * generation.size)):
        ranking.clear()
        if len(generation.recent):
            ranking.add(generation.recent, model_filter.allowed(generation.recent.weights))
        positive_scores = [
            ranking.add(logits, model_filter.allowed(logits.weights)).positive
            for logits in generation.shortlisted(query.coordinates, count, effort)
        ]
        # What the shortlist lacks scores no better than its worse half, whatever the negatives are.
        if np.isfinite(ranking.worst) and ranking.worst >= np.median(np.concatenate(positive_scores)):
            return True
        count, effort = count * _GROWTH, effort * 2
    return False


def first_length(size: int) -> int:
    """Length of the first shortlist of an index with ``size`` logits."""
    return round(FIRST * float(max(1.0, size / _FIRST_UP_TO) ** _FIRST_GROWTH))


def _shortest(generation: Generation, k: int, model_filter: Filter) -> int:
    """Length of the first shortlist: about ``_PER_ANSWER`` logits that pass the filter for every answer."""
    return max(first_length(generation.size), math.ceil(_PER_ANSWER * k / model_filter.share))


class _Scored(NamedTuple):
    """Scores (n,) of n logits: ``positive`` without negatives, ``scores`` with them."""

    positive: Float64
    scores: Float64


class _Ranking:
    """The k best of the logits that were added."""

    def __init__(self, generation: Generation, query: Query, k: int, skip: int | None) -> None:
        self._generation, self._query, self.k, self._skip = generation, query, k, skip
        self.clear()

    def clear(self) -> None:
        """Remove all logits that were added."""
        self._candidates: list[tuple[Logits, Float64, Float64]] = []
        self._candidate_count = 0

    def add(self, logits: Logits, allowed: npt.NDArray[np.bool_] | None = None) -> _Scored:
        """Add n logits, of which those ``allowed`` (n,) are ranked; returns the scores of all n."""
        generation, gallery, offsets = self._generation, logits.coordinates, logits.offsets
        similarities = self._query.similarities(gallery)
        positive = self._query.positive_scores(generation, gallery, offsets, similarities)
        scores = self._query.scores(generation, gallery, offsets, positive)
        if not np.isfinite(scores).all():
            raise not_finite(generation)
        eligible = np.ones(len(scores), bool) if allowed is None else allowed.copy()
        if self._skip is not None:
            eligible &= logits.rows != self._skip
        candidates = np.flatnonzero(eligible)
        if len(candidates) > self.k:
            # All that are as good as the k-th, for equal scores go by rows.
            least = np.partition(scores[candidates], len(candidates) - self.k)[len(candidates) - self.k]
            candidates = candidates[scores[candidates] >= least]
        candidates = candidates[np.argsort(-scores[candidates], kind="stable")[: self.k]]
        self._candidates.append((logits[candidates], scores[candidates], similarities[candidates]))
        self._candidate_count += len(candidates)
        if self._candidate_count > 2 * self.k + ROWS_AT_ONCE:
            self._candidates = [self._best()]
            self._candidate_count = len(self._candidates[0][1])
        return _Scored(positive, scores)

    @property
    def worst(self) -> float:
        """Score of the k-th best logit; minus infinity with fewer than k."""
        if self._candidate_count < self.k:
            return -np.inf
        return float(self._best()[1][-1])

    def result(self, gallery: ScoreMoments) -> LogitMatches:
        """The k best logits, best first."""
        logits, scores, similarities = self._best()
        return LogitMatches(logits, scores, similarities, gallery)

    def _best(self) -> tuple[Logits, Float64, Float64]:
        if len(self._candidates) == 1:
            return self._candidates[0]
        logits = Logits.joined([logits for logits, _, _ in self._candidates])
        scores = np.concatenate([scores for _, scores, _ in self._candidates])
        similarities = np.concatenate([cosines for _, _, cosines in self._candidates])
        order = np.lexsort((logits.rows, -scores))[: self.k]
        return logits[order], scores[order], similarities[order]


def sampled_moments(generation: Generation, query: Query) -> ScoreMoments:
    """Moments of a query's scores over a large index, from its sample."""
    return ScoreMoments.of(_scores(generation, query, generation.sample))


def _scores(generation: Generation, query: Query, logits: Logits) -> Float64:
    gallery, offsets = logits.coordinates, logits.offsets
    positive = query.positive_scores(generation, gallery, offsets, query.similarities(gallery))
    scores = query.scores(generation, gallery, offsets, positive)
    if not np.isfinite(scores).all():
        raise not_finite(generation)
    return scores


@dataclass(frozen=True)
class ModelMatch:
    """Number of distinct weights that recognise the same as a model, and their mean score (log-odds)."""

    weights: int
    score: float


def best_models(
    generation: Generation, query_logits: Logits, weights: int, k: int, model_filter: Filter
) -> list[ModelMatch]:
    """The k distinct weights that recognise best what a model's logits recognise, best first.

    Args:
        generation: that is searched.
        query_logits: the logits of that model.
        weights: number of that model's weights, which do not answer.
        k: number of answers.
        model_filter: the models that may answer.
    """
    if not generation.large:
        return _ranked(generation, query_logits, generation.blocks(), weights, k, model_filter)
    if model_filter.count <= _FILTERED:
        return _ranked(generation, query_logits, generation.at(model_filter.rows), weights, k, model_filter)
    candidate_count, max_rows = k * _MODELS_PER_ANSWER, _LARGEST_SHARE * generation.size
    while candidate_count <= min(_LONGEST, max_rows):
        rows = _rows_of_candidates(generation, query_logits, weights, candidate_count, model_filter)
        if len(rows) > max_rows:
            break
        matches = _ranked(generation, query_logits, generation.at(rows), weights, k, model_filter)
        if len(matches) == k:
            return matches
        candidate_count *= _GROWTH
    return _ranked(generation, query_logits, generation.blocks(), weights, k, model_filter)


def _ranked(
    generation: Generation,
    query_logits: Logits,
    blocks: Iterable[Logits],
    weights: int,
    k: int,
    model_filter: Filter,
) -> list[ModelMatch]:
    """The k best weights, from blocks that hold all logits of a model next to each other."""
    totals: dict[int, float] = {}
    last: tuple[int, Float64] | None = None  # weights whose logits may go on in the next block
    for logits in blocks:
        if not len(logits):
            continue
        starts = np.flatnonzero(np.diff(logits.weights, prepend=-1))
        scores = (
            generation.sharpness * (logits.coordinates @ query_logits.coordinates.T) - logits.offsets[:, None]
        )
        if not np.isfinite(scores).all():
            raise not_finite(generation)
        most = np.maximum.reduceat(scores, starts, axis=0)
        numbers = logits.weights[starts].tolist()
        if last is not None and last[0] == numbers[0]:
            most[0] = np.maximum(most[0], last[1])
        totals.update(zip(numbers, most.mean(axis=1).tolist(), strict=True))
        last = numbers[-1], most[-1]
    totals.pop(weights, None)
    numbers = np.array([*totals], np.int32)
    means = np.array([*totals.values()])
    eligible = np.flatnonzero(model_filter.allowed(numbers)) if len(numbers) else np.empty(0, np.int64)
    order = eligible[np.lexsort((numbers[eligible], -means[eligible]))[:k]]
    return [ModelMatch(int(numbers[place]), float(means[place])) for place in order]


@dataclass(frozen=True)
class ConceptScores:
    """The best logit of each of M models for each of C concepts.

    Attributes:
        weights: (M,) of the models.
        scores: (M, C) of their best logits.
        rows: (M, C) of these logits.
        moments: of each concept's scores over all logits; None where not all were scored.
    """

    weights: Int64
    scores: Float64
    rows: Int64
    moments: list[ScoreMoments] | None


def best_of_models(
    generation: Generation, queries: Sequence[Query], count: int, model_filter: Filter
) -> ConceptScores:
    """Up to ``count`` models that pass, those first whose scores alone promise the highest mean confidence."""
    if not generation.large:
        blocks = generation.blocks()
    elif model_filter.count <= _FILTERED:
        blocks = generation.at(model_filter.rows)
    else:
        asked = np.stack([query.coordinates for query in queries])
        rows = _rows_scoring_well(
            generation,
            asked,
            lambda number, logits: _scores(generation, queries[number], logits),
            count,
            model_filter,
        )
        blocks = generation.at(rows)
    logits = Logits.joined([*blocks])
    scores = np.stack([_scores(generation, query, logits) for query in queries], axis=1)
    moments = None if generation.large else [ScoreMoments.of(column) for column in scores.T]
    allowed = model_filter.allowed(logits.weights)
    logits, scores = logits[allowed], scores[allowed]
    if not len(logits):
        none = np.empty((0, len(queries)))
        return ConceptScores(np.empty(0, np.int64), none, none.astype(np.int64), moments)
    # The logits of a model are beside each other.
    starts = np.flatnonzero(np.diff(logits.weights, prepend=-1))
    most = np.maximum.reduceat(scores, starts, axis=0)
    promise = generation.confidence.of(most, np.zeros_like(most)).mean(axis=1)
    first = np.argsort(-promise, kind="stable")[:count]
    ends = np.append(starts[1:], len(scores))
    places = np.stack([starts[i] + scores[starts[i] : ends[i]].argmax(axis=0) for i in first.tolist()])
    return ConceptScores(
        logits.weights[starts[first]].astype(np.int64), most[first], logits.rows[places], moments
    )


def _rows_of_candidates(
    generation: Generation, query_logits: Logits, weights: int, count: int, model_filter: Filter
) -> Int64:
    """Rows of all logits of up to ``count`` models that score well for many of the query's logits, ascending."""
    asked = query_logits.coordinates[evenly_spread(len(query_logits), _ASKED_LOGITS)]

    def score(number: int, logits: Logits) -> Float64:
        return np.asarray(generation.sharpness * (logits.coordinates @ asked[number]) - logits.offsets)

    return _rows_scoring_well(generation, asked, score, count, model_filter, weights)


def _rows_scoring_well(
    generation: Generation,
    asked: npt.NDArray[np.float32],
    score: Callable[[int, Logits], Float64],
    count: int,
    model_filter: Filter,
    weights: int | None = None,
) -> Int64:
    """Rows of all logits of up to ``count`` models that score well for many directions, ascending.

    Args:
        generation: that is searched.
        asked: (s, p) the directions, in coordinates.
        score: scores of n logits for the direction of a number: (n,).
        count: number of models.
        model_filter: the models that may answer.
        weights: of a model that may not.
    """
    gains: dict[int, float] = {}
    for number, coordinates in enumerate(asked):
        logits = Logits.joined(
            [
                *generation.shortlisted(coordinates, max(first_length(generation.size), count)),
                generation.recent,
            ]
        )
        scores = score(number, logits)
        least = float(scores.min(initial=np.inf))
        best: dict[int, float] = {}
        for owner, value in zip(logits.weights.tolist(), scores.tolist(), strict=True):
            best[owner] = max(best.get(owner, 0.0), value - least)
        for owner, gain in best.items():
            gains[owner] = gains.get(owner, 0.0) + gain
    if weights is not None:
        gains.pop(weights, None)
    numbers = np.array([*gains], np.int32)
    allowed = numbers[model_filter.allowed(numbers)] if len(numbers) else numbers
    first = sorted(allowed.tolist(), key=lambda number: -gains[number])[:count]
    if not first:
        return np.empty(0, np.int64)
    models = generation.take_models(sorted(first), ["first_row", "rows"])
    spans = zip(values_of(models["first_row"], int), values_of(models["rows"], int), strict=True)
    return np.sort(np.concatenate([np.arange(start, start + count) for start, count in spans]))

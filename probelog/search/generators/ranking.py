"""The generators that answer a query best: a small index scores all of them, a large one looks up a shortlist first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probelog.arrays import values_of
from probelog.errors import QueryError
from probelog.index.conditions import prepared
from probelog.index.contents.generators import Generators
from probelog.index.generation import Generation
from probelog.index.tables import sql_in
from probelog.search.generators.query import MATCHED, GeneratorQuery
from probelog.search.query import Float64
from probelog.search.ranking import Selection

# Groups of samples that a shortlist holds at first, at least and for each answer; four times as many at the next try, up to
# the longest. Each that more are scored costs 80 microseconds (docs/performance.md has what a list holds).
FIRST = 50
_PER_ANSWER = 5
_GROWTH = 4
_LONGEST = 10_000
# The generators that pass a filter are listed, up to this many; with more, the filter is applied to each candidate.
_LISTED = 2_000
# Ranked generators whose families are read at a time, at least and for each answer.
_LOOKED_AT = 40
_PER_FAMILY = 4
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class GeneratorMatches:
    """The k best generators that differ, best first.

    Attributes:
        rows: (k,) of the ``samples`` table.
        scores: (k,).
        confidences: (k,); None where there are none.
        distances: (k,) cosine distances of the query to the means, as directions.
        makers: (k,) the first generator of each row, of a large index; None of a small one.
    """

    rows: Int64
    scores: Float64
    confidences: Float64 | None
    distances: Float64
    makers: Int64 | None


class GeneratorFilter:
    """The generators that may answer: those that meet an SQL condition, or all of them; without one row, perhaps.

    Raises:
        QueryError: the condition is empty or not understood.
    """

    def __init__(self, generators: Generators, condition: str | None, skip: int | None = None) -> None:
        self._generators, self._skip = generators, skip
        self.condition = None if condition is None else prepared(condition, "generators")
        # Rows of ``samples`` that pass, where they are few enough to be listed.
        self.rows: Int64 | None = None
        if self.condition is not None:
            found = generators.rows([], self.condition, _LISTED + 1 if generators.large else None)
            if not generators.large or found.num_rows <= _LISTED:
                self.rows = self._allowed(np.unique(_numbers(values_of(found["row"], int))))

    def passing(self, rows: Int64) -> Int64:
        """Those of some rows that pass."""
        if self.condition is None:
            return self._allowed(rows)
        if self.rows is not None:
            return np.intersect1d(rows, self.rows)
        return self._allowed(np.asarray(sorted(self.members(rows)), np.int64))

    def members(self, rows: Int64, makers: Int64 | None = None) -> dict[int, tuple[int, int | None]]:
        """For each of some rows that pass: the first generator that does, and how many do; None: all that have the row.

        Without a condition the ``makers`` of the rows, where they are known, need no request.
        """
        if not len(rows):
            return {}
        if self.condition is None and makers is not None:
            return {row: (first, None) for row, first in zip(rows.tolist(), makers.tolist(), strict=True)}
        condition = sql_in("row", rows.tolist())
        if self.condition is not None:
            condition += f" AND ({self.condition}\n)"
        members: dict[int, tuple[int, int]] = {}
        for item in self._generators.rows([], condition).to_pylist():
            first, count = members.get(item["row"], (item["id"], 0))
            members[item["row"]] = (first, count + 1)
        return {**members}

    def _allowed(self, rows: Int64) -> Int64:
        return rows if self._skip is None else rows[rows != self._skip]


def best(
    generation: Generation,
    query: GeneratorQuery,
    selection: Selection,
    chosen: GeneratorFilter,
    method: str | None,
    notes: list[str],
) -> GeneratorMatches:
    """The k best generators for a query; fewer where fewer meet filter and bounds, or are in the longest shortlist.

    Args:
        generation: that is searched.
        query: the query.
        selection: which are answers.
        chosen: the generators that may answer.
        method: of ``probelog.ranking.samples.methods``; by default matched samples.
        notes: gets a line where the longest shortlist holds too few answers.
    """
    generators = generation.generators
    if selection.by_confidence and (query.by_model or method not in (None, MATCHED)):
        raise QueryError(
            "answers to a model (like), and of other methods than the default, have no confidence to select or sort by: "
            "leave that out"
        )
    if not generators.large or chosen.rows is not None:
        rows = chosen.passing(np.arange(generators.settings.rows)) if chosen.rows is None else chosen.rows
        return _selected(generators, query, selection, chosen, rows, method)
    count = max(FIRST, _PER_ANSWER * selection.k)
    while True:
        candidates = [generators.shortlisted(item, count) for item in query.projected(generators)]
        listed = np.unique(np.concatenate(candidates))
        matches = _selected(generators, query, selection, chosen, chosen.passing(listed), method)
        if len(matches.rows) >= selection.k or count >= min(_LONGEST, generators.settings.rows):
            break
        count = min(count * _GROWTH, _LONGEST)
    if len(matches.rows) < selection.k and count < generators.settings.rows:
        notes.append(f"only {len(matches.rows)} answers are among the {count:,} nearest generators")
    return matches


def _selected(
    generators: Generators,
    query: GeneratorQuery,
    selection: Selection,
    chosen: GeneratorFilter,
    rows: Int64,
    method: str | None,
) -> GeneratorMatches:
    """The best of some rows, each once, by exact scores."""
    if not len(rows):
        none = np.empty(0)
        return GeneratorMatches(rows, none, None if query.by_model else none, none, None)
    makers = None
    if generators.large:
        stored, makers = generators.candidates(rows)
    else:
        # A copy of all of them would take as long as to score them.
        stored = generators.all if len(rows) == generators.settings.rows else generators.all.at(rows)
    if method in (None, MATCHED):
        scores, confidences = query.scores(generators, stored)
    else:
        assert method is not None
        scores, confidences = query.scores_by(method, generators, stored), None
    cosines = query.cosines(generators, stored)
    if not all(
        np.isfinite(item).all() for item in (scores, cosines, *([] if confidences is None else [confidences]))
    ):
        raise generators.damaged("it gives scores that are not finite")
    values = {"score": scores, "confidence": confidences}
    allowed = [bound.allows(values[bound.name]) for bound in selection.limits]
    places = np.flatnonzero(np.all(allowed, axis=0)) if allowed else np.arange(len(rows))
    order = np.argsort(-scores[places], kind="stable")
    if selection.sort == "confidence" and confidences is not None:
        order = np.lexsort((-scores[places], -confidences[places]))
    places = places[order]
    if selection.by == "family":
        found = None if makers is None else makers[places]
        places = places[_first_of_families(generators, chosen, rows[places], found, selection.k)]
    places = places[: selection.k]
    return GeneratorMatches(
        rows[places],
        scores[places],
        None if confidences is None else confidences[places],
        np.asarray(1.0 - cosines[places], np.float64),
        None if makers is None else makers[places],
    )


def _first_of_families(
    generators: Generators, chosen: GeneratorFilter, rows: Int64, makers: Int64 | None, count: int
) -> list[int]:
    """Places of the first of each family in ranked rows, ``count`` at most. A generator of unknown tree is its own."""
    found: dict[str, int] = {}
    step = max(_LOOKED_AT, _PER_FAMILY * count)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        members = chosen.members(piece, None if makers is None else makers[start : start + step])
        numbers = [members[row][0] for row in piece.tolist()]
        for place, item in enumerate(generators.numbered(numbers, ["repo", "root"])):
            found.setdefault(item["root"] or item["repo"], start + place)
        if len(found) >= count:
            break
    return [*found.values()][:count]


def _numbers(values: list[int]) -> Int64:
    return np.asarray(values, np.int64)

"""Hits from ranked logits: queries with feedback, the facts of the models, what is noted beside the answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from probelog.index.contents.logits import Logits
from probelog.index.generation import Generation
from probelog.search.models import MODEL_FACT_NAMES, duplicates_of, facts_of, label_of, relatives_of
from probelog.search.query import Query, compared, not_finite
from probelog.search.ranking import Filter, LogitMatches, Selection, select_logits, with_feedback
from probelog.search.results import Hit, Origin, Results

if TYPE_CHECKING:
    from probelog.search.client import Index

# With no hit of a higher confidence, "nothing here" is the likelier answer. On the bench hub (docs/results.md) 99 of
# 100 classes that the hub has get a hit above it.
UNRECOGNISED = 0.2


def check_finite(generation: Generation, *numbers: npt.ArrayLike) -> None:
    """Refuse an answer with numbers that are none: the order of the answers means nothing then.

    Raises:
        StoreError: there are such numbers.
    """
    if not all(np.isfinite(item).all() for item in numbers):
        raise not_finite(generation)


def logit_numbers(logits: Logits) -> Iterator[tuple[int, bool, list[int]]]:
    """For each logit: its number in the head, whether it is negated, and the probes that fire it most."""
    return zip(logits.logit.tolist(), logits.negated.tolist(), logits.probes.tolist(), strict=True)


def moved_queries(generation: Generation, queries: Sequence[Query]) -> Sequence[Query]:
    """Queries by name with feedback; those to a small index are compared with it together, before and after."""
    if generation.large or not queries:
        return [with_feedback(generation, query) for query in queries]
    gallery = generation.all_logits.coordinates
    first = compared(generation, queries, gallery)
    return compared(generation, [with_feedback(generation, query) for query in first], gallery)


def results_of(
    index: Index,
    generation: Generation,
    queries: Sequence[Query],
    selection: Selection,
    model_filter: Filter,
    skip: int | None,
    notes: Sequence[list[str]],
) -> list[Results]:
    """The best logits for each query; the facts of all of them are read at once."""
    selected = [
        select_logits(generation, query, selection, model_filter, skip, own)
        for query, own in zip(queries, notes, strict=True)
    ]
    members = model_filter.members(
        itertools.chain.from_iterable(matches.logits.weights.tolist() for matches, _ in selected)
    )
    models = facts_of(
        generation, [number for number, _ in members.values()], ["labels", "copies", *MODEL_FACT_NAMES]
    )
    nothing = ["this index holds no classifiers"] if not generation.settings.models else []
    if nothing and generation.settings.generators is not None:
        nothing = ['this index holds generators alone: ask for these (--kind generator, kind="generator")']
    results = []
    for (matches, confidences), own in zip(selected, notes, strict=True):
        hits = _hits(index, generation, matches, confidences, selection, model_filter, members, models)
        highest = max((hit.confidence for hit in hits if hit.confidence is not None), default=1.0)
        if highest < UNRECOGNISED:
            own.append(
                f"no answer has a confidence above {highest:.0%}: perhaps nothing in this index recognises this"
            )
        own += nothing
        results.append(Results(hits, own))
    return results


def _hits(
    index: Index,
    generation: Generation,
    matches: LogitMatches,
    confidences: npt.NDArray[np.float64] | None,
    selection: Selection,
    model_filter: Filter,
    members: Mapping[int, tuple[int, int | None]],
    models: Mapping[int, Mapping[str, Any]],
) -> list[Hit]:
    """Hits of logits. Models with equal weights share one hit, shown as the first of them that passes the filter."""
    logits = matches.logits
    check_finite(generation, matches.similarities, () if confidences is None else confidences)
    hits = []
    for place, (logit, negated, probes) in enumerate(logit_numbers(logits)):
        number, count = members[int(logits.weights[place])]
        model = models[number]
        hit = Hit(
            rank=place + 1,
            label=label_of(model["labels"], logit),
            logit=logit,
            score=float(matches.scores[place]),
            confidence=None if confidences is None else float(confidences[place]),
            distance=float(1.0 - matches.similarities[place]),
            negated=negated,
            duplicates=duplicates_of(count, model),
            probes=probes,
            relatives=relatives_of(generation, model, model_filter.condition)
            if selection.by == "family"
            else None,
            url=model["url"],
            **{name: model[name] for name in MODEL_FACT_NAMES},
        )
        origin = Origin(index, generation.pointer.generation, int(logits.rows[place]))
        object.__setattr__(hit, "_origin", origin)
        hits.append(hit)
    return hits

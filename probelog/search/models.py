"""Models as answers: their facts, a table of them, those that do what one does, and those that cover a set of concepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from probelog.errors import QueryError, StoreError
from probelog.index.conditions import check_columns, prepared
from probelog.index.generation import Generation
from probelog.index.schema import MODEL_FACTS
from probelog.index.tables import is_valid_sql_text, sql_literal
from probelog.ranking.names import canonical_name, normal_name
from probelog.search.query import ask, not_finite
from probelog.search.ranking import (
    Filter,
    ModelMatch,
    best_models,
    best_of_models,
    first_of_families,
    fold_keys,
    sampled_moments,
    with_feedback,
)
from probelog.search.results import ConceptMatch, DomainHit, DomainResults, ModelFacts, ModelHit, ModelResults
from probelog.search.snippet import commit_url
from probelog.storage.schemas import Parent

Ask = Callable[[Callable[[Generation], pa.Table]], pa.Table]

# Facts that an answer says about its model, besides the page's address.
MODEL_FACT_NAMES = [item.name for item in fields(ModelFacts) if item.name != "url"]
# Facts that every model has.
_KNOWN_FACTS = ("sha", "head")
# A model lacks the concepts that it recognises with less confidence, if nothing else is said.
COVERED = 0.5
# Concepts of one query: each is scored against every logit.
_MOST_CONCEPTS = 100
# Of so many models, or so many times the answers, the confidence is computed.
_CANDIDATES = 200
_CANDIDATES_PER_ANSWER = 20


def facts_of(
    generation: Generation, numbers: Sequence[int], names: Sequence[str]
) -> dict[int, dict[str, Any]]:
    """Facts of some models, by number."""
    rows = generation.take_models(numbers, names).to_pylist() if numbers else []
    return {row.pop("id"): as_facts(generation, row) for row in rows}


def as_facts(generation: Generation, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the ``models`` table with lists where it has none, with typed parents and the page's address."""
    missing = [name for name in _KNOWN_FACTS if row.get(name, "") is None]
    if missing:
        raise StoreError(f"the index is damaged: a model has no {missing[0]}. Publish again or roll back.")
    parents = [Parent(**parent) for parent in row["parents"] or []]
    url = commit_url(generation.settings.endpoint, row["repo"], row["sha"])
    lists = {name: row[name] or [] for name in ("tags", "licences") if name in row}
    return {**row, **lists, "parents": parents, "url": url}


def duplicates_of(count: int | None, model: Mapping[str, Any]) -> int:
    """Number of other models with the same weights that pass the filter: ``count`` - 1, by default all copies - 1."""
    return int(model["copies"] if count is None else count) - 1


def relatives_of(generation: Generation, model: Mapping[str, Any], where: str | None) -> int:
    """Number of the other models of a model's tree that pass a filter."""
    root = model["root"]
    if root is None or not is_valid_sql_text(root):
        return 0
    condition = f"root = {sql_literal(root)}"
    return generation.count_models(condition if where is None else f"{condition} AND ({where}\n)") - 1


def logit_rows(model: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Rows of a model's logits: (L,)."""
    return np.arange(model["first_row"], model["first_row"] + model["rows"])


def find_logit(generation: Generation, like: str, negated: bool = False) -> int:
    """Row of the logit that ``REPO#NUMBER`` or ``REPO#LABEL`` names, or of its opposite (``negated``).

    Raises:
        QueryError: it names no indexed logit; the message lists the model's logits.
    """
    repo, _, name = like.partition("#")
    if not repo or not name:
        raise QueryError(
            f"{like!r} names no logit: write REPO#NUMBER or REPO#LABEL, for example owner/model#3"
        )
    model = generation.model(repo)
    logits = generation.logits(logit_rows(model))
    logits = logits[logits.negated == negated]
    rows, numbers = logits.rows.tolist(), logits.logit.tolist()
    by_number = {str(number): row for number, row in zip(numbers, rows, strict=True)}
    if name in by_number:
        return int(by_number[name])
    declared = [label_of(model["labels"], number) for number in numbers]
    for spelling, names in (
        (name, declared),
        (normal_name(name), [normal_name(label) for label in declared]),
    ):
        if spelling in names:
            return int(rows[names.index(spelling)])
    known = ", ".join([*by_number][:20])
    raise QueryError(
        f"{repo} has no indexed {'negated ' if negated else ''}logit {name!r}; it has {known or 'none'}{', ...' if len(by_number) > 20 else ''}"
    )


def find_direction(generation: Generation, like: str, other: Generation | None = None) -> npt.NDArray[Any]:
    """Direction (d,) of the logit that ``REPO#NUMBER`` or ``REPO#LABEL`` names, in this index or in another one.

    Raises:
        QueryError: it names no indexed logit, or the other index has another encoder.
    """
    holder = generation if other is None else other
    check_comparable(generation, holder)
    logit = holder.logits(np.array([find_logit(holder, like)]))
    return holder.basis.directions(logit.coordinates[0])


def check_comparable(generation: Generation, other: Generation) -> None:
    """Refuse logits of an index with another encoder."""
    if other.settings.encoder_digest != generation.settings.encoder_digest:
        raise QueryError(
            f"{other.index.uri} and {generation.index.uri} were made with different encoders "
            f"({other.settings.encoder} and {generation.settings.encoder}): their logits cannot be compared"
        )


def label_of(labels: Sequence[str] | None, logit: int) -> str:
    """The declared label of a logit."""
    return labels[logit] if labels is not None and logit < len(labels) else f"LABEL_{logit}"


def check_fold(by: str | None) -> None:
    """Refuse what models cannot be folded by."""
    if by not in (None, "model", "family"):
        raise QueryError(f"models can be folded by family, not by {by!r}")


def models_like(generation: Generation, repo: str, k: int, where: str | None, by: str | None) -> ModelResults:
    """The k models whose logits recognise best what a model's logits recognise."""
    model = generation.model(repo)
    model_filter = Filter(generation, where)
    logits = generation.logits(logit_rows(model))
    query_logits = logits[~logits.negated]

    def ranked(count: int) -> list[ModelMatch]:
        if not len(query_logits):
            return []
        return best_models(generation, query_logits, model["weights"], count, model_filter)

    matches = first_of_families(generation, model_filter, k, ranked) if by == "family" else ranked(k)
    members = model_filter.members(item.weights for item in matches)
    names = ["logits", *MODEL_FACT_NAMES]
    facts = facts_of(generation, [number for number, _ in members.values()], [*names, "copies"])
    models = [facts[members[item.weights][0]] for item in matches]
    return ModelResults(
        ModelHit(
            rank=place + 1,
            score=item.score,
            duplicates=duplicates_of(members[item.weights][1], models[place]),
            relatives=relatives_of(generation, models[place], model_filter.condition)
            if by == "family"
            else None,
            url=models[place]["url"],
            **{name: models[place][name] for name in names},
        )
        for place, item in enumerate(matches)
    )


def domain_of(
    generation: Generation,
    concepts: Sequence[str],
    k: int,
    where: str | None,
    by: str | None,
    min_confidence: float,
) -> DomainResults:
    """The k models that cover a set of concepts best: by their mean confidence, each concept by their best logit.

    The confidence is computed of the models that the scores alone put in front: some hundred.
    """
    notes: list[str] = []
    queries = [
        with_feedback(generation, ask(generation, [name], None, None, None, (), notes))
        for name in _checked(concepts)
    ]
    model_filter = Filter(generation, where)
    count = max(_CANDIDATES, _CANDIDATES_PER_ANSWER * k)
    found = best_of_models(generation, queries, count, model_filter)
    confidences = np.empty_like(found.scores)
    for place, query in enumerate(queries):
        logits = generation.logits(found.rows[:, place])
        moments = sampled_moments(generation, query) if found.moments is None else found.moments[place]
        computed = query.confidences(generation, logits, found.scores[:, place], moments)
        assert computed is not None  # queries by name have confidences
        confidences[:, place] = computed
    if not np.isfinite(confidences).all():
        raise not_finite(generation)
    coverage = confidences.mean(axis=1)
    order = np.lexsort((-found.scores.mean(axis=1), -coverage))
    keys = fold_keys(generation, model_filter, found.weights[order].tolist(), by or "model")
    first = dict(zip(reversed(keys), reversed(order.tolist()), strict=True))
    places = sorted(first.values(), key=order.tolist().index)[:k]
    members = model_filter.members(found.weights[places].tolist())
    facts = facts_of(
        generation, [number for number, _ in members.values()], ["labels", "copies", *MODEL_FACT_NAMES]
    )
    hits = []
    for rank, place in enumerate(places):
        number, copies = members[int(found.weights[place])]
        matches = _matches(
            generation, concepts, facts[number], found.rows[place], found.scores[place], confidences[place]
        )
        hits.append(
            DomainHit(
                rank=rank + 1,
                coverage=float(coverage[place]),
                matches=matches,
                lacks=[item.concept for item in matches if item.confidence < min_confidence],
                duplicates=duplicates_of(copies, facts[number]),
                relatives=relatives_of(generation, facts[number], model_filter.condition)
                if by == "family"
                else None,
                url=facts[number]["url"],
                **{name: facts[number][name] for name in MODEL_FACT_NAMES},
            )
        )
    return DomainResults(hits, notes)


def _checked(concepts: Sequence[str]) -> Sequence[str]:
    """Concepts that make a query.

    Raises:
        QueryError: they do not.
    """
    if isinstance(concepts, str) or not concepts:
        raise QueryError('name the concepts as a list, for example ["husky", "poodle"]')
    if len(concepts) > _MOST_CONCEPTS:
        raise QueryError(f"at most {_MOST_CONCEPTS} concepts make one query, not {len(concepts)}")
    names = [canonical_name(name) or normal_name(name) for name in concepts]
    twice = [concept for place, concept in enumerate(concepts) if names[place] in names[:place]]
    if twice:
        raise QueryError(f"{twice[0]!r} is among the concepts twice")
    return concepts


def _matches(
    generation: Generation,
    concepts: Sequence[str],
    facts: Mapping[str, Any],
    rows: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float64],
    confidences: npt.NDArray[np.float64],
) -> list[ConceptMatch]:
    """One model's best logit for each concept."""
    logits = generation.logits(rows)
    return [
        ConceptMatch(
            concept=concept,
            logit=int(logits.logit[place]),
            label=label_of(facts["labels"], int(logits.logit[place])),
            negated=bool(logits.negated[place]),
            score=float(scores[place]),
            confidence=float(confidences[place]),
        )
        for place, concept in enumerate(concepts)
    ]


class ModelCount(int):
    """The number of an index's models, which can be called for a table of them."""

    _FACTS: ClassVar[pa.Schema] = MODEL_FACTS
    # Of these some models have thousands, or they are long: only who asks for them by name gets them.
    _LONG: ClassVar[Sequence[str]] = ("labels", "recipe")
    _ask: Ask

    def __new__(cls, count: int, ask: Ask) -> ModelCount:
        """Of an index with so many models, which answers by ``ask``."""
        number = super().__new__(cls, count)
        number._ask = ask
        return number

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def __call__(
        self,
        where: str | None = None,
        *,
        columns: Sequence[str] | None = None,
        sort: str | None = None,
        limit: int | None = None,
    ) -> pa.Table:
        """Models of the index as an Arrow table, a row each.

        Args:
            where: SQL condition over the models' facts.
            columns: names of facts; all but ``labels`` by default.
            sort: the fact to sort by: numbers and times from the largest, texts from A to Z, unknown ones at the end. By
                default the order of the index.
            limit: at most so many, the first.

        Raises:
            QueryError: a condition that is not understood, or no such column.
        """
        if limit is not None and limit < 1:
            raise QueryError(f"limit must be at least 1, not {limit}")
        facts = self._FACTS
        names = [name for name in facts.names if name not in self._LONG] if columns is None else [*columns]
        read = list(dict.fromkeys([*names, *([] if sort is None else [sort])]))
        check_columns(read, facts.names)
        table = self._ask(
            lambda generation: self._rows(generation, where, read, limit if sort is None else None)
        )
        if sort is not None:
            table = _sorted(table, sort, facts)
        return (table if limit is None else table.slice(0, limit)).select(names)

    @staticmethod
    def _rows(
        generation: Generation, where: str | None, columns: Sequence[str], limit: int | None
    ) -> pa.Table:
        condition = None if where is None else prepared(where, "models")
        return generation.models_where(condition, columns, limit)


def _sorted(table: pa.Table, sort: str, facts: pa.Schema) -> pa.Table:
    kind = facts.field(sort).type
    if pa.types.is_nested(kind):
        raise QueryError(f"models cannot be sorted by {sort}, which is a list")
    # Unknown ones come last, either way.
    return table.take(
        pc.sort_indices(table, [(sort, "ascending" if pa.types.is_string(kind) else "descending")])
    )

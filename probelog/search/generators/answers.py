"""Answers from the generators of a generation, and what a client says about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.arrays import Floats, values_of
from probelog.errors import QueryError, suggestion
from probelog.index.conditions import prepared, split
from probelog.index.generation import Generation
from probelog.index.generators.schema import GENERATOR_FACTS
from probelog.index.tables import is_valid_sql_text, sql_in, sql_literal
from probelog.search.generators.classifiers import Classifier, meant
from probelog.search.generators.query import (
    GeneratorQuery,
    asked,
    by_direction,
    direction_of_generator,
    named,
)
from probelog.search.generators.ranking import GeneratorFilter, GeneratorMatches, best
from probelog.search.generators.results import (
    GeneratorFacts,
    GeneratorHit,
    GeneratorResults,
    GeneratorSummary,
    MadeLogit,
)
from probelog.search.models import ModelCount, as_facts, find_direction
from probelog.search.query import Embeddings, check_texts, embed_pictures, unit_vectors, which_askable
from probelog.search.ranking import Selection
from probelog.search.results import Origin

if TYPE_CHECKING:
    from probelog.search.client import Index
    from probelog.search.query import Pictures

T = TypeVar("T")

# With no hit of a higher confidence, "nothing here" is the likelier answer.
UNMADE = 0.2
_FACT_NAMES = [item.name for item in fields(GeneratorFacts) if item.name != "url"]
# Concepts that a summary names.
_CONCEPTS = 10
# Logits of a classifier that an answer names.
_FOUND_BY = 5
# Of so many other repositories that make the same samples, the names are listed.
_SAME = 100


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneratorRequest:
    """A query for generators as the client takes it (``Index.search``)."""

    texts: Sequence[str]
    images: Pictures | None
    embeddings: Embeddings | None
    sketch: Pictures | None
    sketch_embeddings: Embeddings | None
    like: str | None
    like_index: Index | None
    negative: Sequence[str]
    where: str | None
    k: int
    by: str | None
    min_confidence: float | None
    sort: str
    method: str | None


def search_generators(index: Index, generation: Generation, request: GeneratorRequest) -> GeneratorResults:
    """The generators that make a concept, best first."""
    condition, bounds = split(request.where)
    selection = Selection(request.k, request.by, request.min_confidence, request.sort, bounds)
    notes: list[str] = []
    query, skip = _query(generation, request, notes)
    chosen = GeneratorFilter(generation.generators, condition, skip)
    return _results(index, generation, query, selection, chosen, request.method, notes)


def search_many_generators(
    index: Index,
    generation: Generation,
    texts: Sequence[Sequence[str]],
    selection: Selection,
    condition: str | None,
) -> list[GeneratorResults]:
    """The generators that make each of many concepts; the encoder is asked once for all."""
    chosen = GeneratorFilter(generation.generators, condition)
    notes: list[list[str]] = [[] for _ in texts]
    askable = which_askable(generation, texts, notes)
    names = [item for item, is_askable in zip(texts, askable, strict=True) if is_askable]
    experts = iter(named(generation, names) if names else ())
    return [
        _results(index, generation, GeneratorQuery([next(experts)], (), False), selection, chosen, None, own)
        if is_askable
        else GeneratorResults([], own)
        for is_askable, own in zip(askable, notes, strict=True)
    ]


def _results(
    index: Index,
    generation: Generation,
    query: GeneratorQuery,
    selection: Selection,
    chosen: GeneratorFilter,
    method: str | None,
    notes: list[str],
) -> GeneratorResults:
    matches = best(generation, query, selection, chosen, method, notes)
    found_by = _found_by(generation, query, matches)
    hits = _hits(index, generation, matches, chosen, found_by, selection.by == "family")
    highest = max((hit.confidence for hit in hits if hit.confidence is not None), default=1.0)
    if highest < UNMADE:
        notes.append(
            f"no answer has a confidence above {highest:.0%}: perhaps nothing in this index makes this"
        )
    return GeneratorResults(hits, notes)


def _query(
    generation: Generation, request: GeneratorRequest, notes: list[str]
) -> tuple[GeneratorQuery, int | None]:
    """The query, and the row of the generator that is part of it."""
    check_texts(generation, [*request.texts, *request.negative], notes)
    pictures = embeddings_of(generation, request.images, request.embeddings)
    sketches = embeddings_of(generation, request.sketch, request.sketch_embeddings)
    if sketches is not None and generation.generators.sketch_map is None:
        notes.append(
            "this index does not know how sketches become pictures: the sketch is taken as a picture"
        )
    experts = asked(generation, request.texts, pictures, sketches)
    like, skip, classifier = request.like, None, None
    if like is not None and "#" in like:
        direction = _of(request.like_index, lambda other: find_direction(generation, like, other))
        experts.append(by_direction(meant(generation, direction[None])[0]))
    elif like is not None and request.like_index is None and is_generator(generation, like):
        skip = int(generation.generators.row_named(like)["row"])
        experts.append(by_direction(direction_of_generator(generation, like)))
    elif like is not None:
        classifier = _of(request.like_index, lambda other: _classifier(generation, like, other))
        notes += [] if classifier.note is None else [classifier.note]
    negative = [item for name in request.negative for item in asked(generation, [name])]
    return GeneratorQuery(experts, negative, like is not None, classifier), skip


def _of(index: Index | None, answer: Callable[[Generation | None], T]) -> T:
    """An answer of another index; of this one where there is no other."""
    return answer(None) if index is None else index._ask(answer)


def _classifier(generation: Generation, repo: str, other: Generation | None) -> Classifier:
    """The classifier that is asked with.

    Raises:
        QueryError: there is none, nor a generator of this name.
    """
    if other is not None and is_generator(other, repo):
        raise QueryError(
            f"{repo!r} is a generator: of another index (like_index) a logit or a classifier is asked with"
        )
    if other is None and not generation.has_model(repo):
        close = [*generation.generators.similar(repo), *generation.similar(repo)]
        raise QueryError(f"the index does not hold a generator or a classifier {repo!r}{suggestion(close)}")
    return Classifier.named(generation, repo, other)


def embeddings_of(
    generation: Generation, images: Pictures | None, embeddings: Embeddings | None
) -> Floats | None:
    """Unit vectors (s, d) of pictures and of a user's own vectors; None without any."""
    parts = [
        *([] if images is None else [embed_pictures(generation, images)]),
        *([] if embeddings is None else [unit_vectors(generation, embeddings)]),
    ]
    return np.concatenate(parts) if parts else None


def _found_by(
    generation: Generation, query: GeneratorQuery, matches: GeneratorMatches
) -> list[list[MadeLogit]]:
    """For each answer, the logits of the classifier that recognise what it makes: at least one."""
    classifier = query.classifier
    if classifier is None or not len(matches.rows):
        return [[] for _ in matches.rows]
    generators = generation.generators
    found = []
    for scores in query.logit_scores(generators, generators.stored(matches.rows)).T:
        best = np.argsort(-scores, kind="stable")[:_FOUND_BY].tolist()
        named = [place for place in best if scores[place] > 0] or best[:1]
        found.append(
            [
                MadeLogit(int(classifier.logits[place]), classifier.labels[place], float(scores[place]))
                for place in named
            ]
        )
    return found


def _hits(
    index: Index,
    generation: Generation,
    matches: GeneratorMatches,
    chosen: GeneratorFilter,
    found_by: Sequence[list[MadeLogit]],
    folded: bool,
) -> list[GeneratorHit]:
    """Hits of rows. Generators that make the same samples share one, shown as the first that passes the filter."""
    members = chosen.members(matches.rows, matches.makers)
    numbers = [number for number, _ in members.values()]
    facts = {row["id"]: row for row in generation.generators.shown(numbers)}
    hits = []
    for place, row in enumerate(matches.rows.tolist()):
        number, count = members[row]
        hit = GeneratorHit(
            rank=place + 1,
            score=float(matches.scores[place]),
            confidence=None if matches.confidences is None else float(matches.confidences[place]),
            distance=float(matches.distances[place]),
            duplicates=int(facts[number]["copies"] if count is None else count) - 1,
            relatives=_relatives(generation, facts[number]["root"], chosen.condition) if folded else None,
            found_by=found_by[place],
            **_as_facts(generation, facts[number]),
        )
        object.__setattr__(hit, "_origin", Origin(index, generation.pointer.generation, row))
        hits.append(hit)
    return hits


def _relatives(generation: Generation, root: str | None, condition: str | None) -> int:
    """Number of the other generators of a tree that pass a filter."""
    if root is None or not is_valid_sql_text(root):
        return 0
    of_tree = f"root = {sql_literal(root)}"
    where = of_tree if condition is None else f"{of_tree} AND ({condition}\n)"
    return generation.generators.count(where) - 1


def _as_facts(generation: Generation, row: Mapping[str, Any]) -> dict[str, Any]:
    known = as_facts(generation, row)
    lists = {name: known[name] or [] for name in ("trigger_words", "classes")}
    return {**{name: known[name] for name in (*_FACT_NAMES, "url")}, **lists}


def summary_of(generation: Generation, repo: str) -> GeneratorSummary:
    """What one generator makes."""
    generators = generation.generators
    row = generators.row_named(repo)
    described = generators.stored(np.array([row["row"]])).described
    scores = generators.space.concepts(described)[0]
    order = np.argsort(-scores, kind="stable")[:_CONCEPTS]
    same: list[str] = []
    if row["copies"] > 1:
        found = generators.rows(["repo"], sql_in("row", [row["row"]]), _SAME + 1)
        same = [name for name in values_of(found["repo"], str) if name != repo][:_SAME]
    return GeneratorSummary(
        prompts=row["prompts"] or [],
        same_samples=same,
        concepts=[generation.background[number] for number in order],
        scores=scores[order].tolist(),
        **_as_facts(generation, row),
    )


class GeneratorCount(ModelCount):
    """The number of an index's generators, which can be called for a table of them, as ``models`` can."""

    _FACTS: ClassVar[pa.Schema] = GENERATOR_FACTS
    _LONG: ClassVar[Sequence[str]] = ("classes", "prompts")

    @staticmethod
    def _rows(
        generation: Generation, where: str | None, columns: Sequence[str], limit: int | None
    ) -> pa.Table:
        if generation.settings.generators is None:
            return GENERATOR_FACTS.empty_table()
        condition = None if where is None else prepared(where, "generators")
        return generation.generators.rows(columns, condition, limit)


class GeneratorQueries:
    """What an index answers about generators, besides ``search`` (`probelog.search.client.Index`)."""

    _ask: Callable[[Callable[[Generation], Any]], Any]

    @property
    def generators(self) -> GeneratorCount:
        """Number of generators in the index; called, a table of them, as of ``models``."""
        settings = self._ask(lambda generation: generation.settings.generators)
        return GeneratorCount(0 if settings is None else settings.models, self._ask)

    def has_generator(self, repo: str) -> bool:
        """Whether the index holds a generator of this name."""
        held: bool = self._ask(lambda generation: is_generator(generation, repo))
        return held

    def show_generator(self, repo: str) -> GeneratorSummary:
        """The facts of one generator, and the background concepts that it makes most likely.

        Raises:
            QueryError: the index does not hold it.
        """
        summary: GeneratorSummary = self._ask(lambda generation: summary_of(generation, repo))
        return summary

    def generator_samples(self, repo: str) -> list[bytes]:
        """Some samples of one generator as pictures (WebP bytes).

        Raises:
            QueryError: the index does not hold it.
        """

        def ask(generation: Generation) -> list[bytes]:
            generators = generation.generators
            return generators.pictures([int(generators.row_named(repo)["row"])])[0]

        pictures: list[bytes] = self._ask(ask)
        return pictures

    def embed_sketch(self, sketch: Pictures) -> npt.NDArray[np.float32]:
        """Embeddings (s, d) of sketches by the index's own encoder: what ``search(sketch_embeddings=...)`` takes.

        Raises:
            QueryError: an unreadable image, or an index that cannot be searched by image.
        """
        embeddings: npt.NDArray[np.float32] = self._ask(lambda generation: embed_pictures(generation, sketch))
        return embeddings


def is_generator(generation: Generation, repo: str) -> bool:
    """Whether an index holds a generator of this name."""
    return generation.settings.generators is not None and generation.generators.named(repo) is not None

"""The query client: opens a published index and answers from it. No torch, no Ray, no Hub."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from probelog.errors import ProbeLogError, QueryError, StoreError, UsageError
from probelog.index.generation import Generation, Logits
from probelog.index.pointer import Pointer, find_index, read_pointer, store_around
from probelog.index.tables import first_line, is_valid_sql_text, sql_literal
from probelog.ranking.names import normal_name
from probelog.search.licences import LicenceConflicts, conflicts_of
from probelog.search.models import ModelCount
from probelog.search.query import (
    Embeddings,
    Pictures,
    Query,
    ask,
    background_numbers,
    embed_pictures,
    not_finite,
    text_direction,
)
from probelog.search.ranking import Filter, LogitMatches, ModelMatch, best, best_models
from probelog.search.results import (
    Hit,
    LogitSummary,
    ModelFacts,
    ModelHit,
    ModelResults,
    ModelSummary,
    Results,
)
from probelog.search.trees import Edges, Tree, some_edges, tree_of
from probelog.storage.checksummed_json import unsealed_json
from probelog.storage.layout import report
from probelog.storage.schemas import Parent
from probelog.trees.licences import ConflictKind

if TYPE_CHECKING:
    from probelog.storage.store import Store

# How long a client answers from the generation that it has open before it looks at the pointer again.
POLL_SECONDS = 30.0
# With no hit of a higher confidence, "nothing here" is the likelier answer. On the bench hub (docs/results.md) 99 of
# 100 classes that the hub has get a hit above it.
UNRECOGNISED = 0.2

# A ranking is this many times as long as the families that are looked for, at first and at every further try.
_ANSWERS_PER_FAMILY = 4
_MOST_ANSWERS = 10_000
# Some kilobytes with a few dozen examples.
_LARGEST_REPORT = 4 << 20

T = TypeVar("T")


class Index:
    """A published index, open for queries. Made by ``open_index``; safe to share between threads.

    An index answers from one generation and looks for a newer one at most every 30 seconds. A pickled one answers from the
    generation that it had, wherever it is opened again. ``len(index)`` is the number of models, ``repo in index`` says
    whether it holds one, and ``with`` closes it.
    """

    def __init__(self, store: Store, pinned: Generation | None = None) -> None:
        """Open what the pointer names, or one generation for good, whatever the pointer says (``pinned``)."""
        self._store = store
        self._pinned = pinned
        self._lock = threading.Lock()
        self._polling = threading.Lock()
        self._generation = pinned or _open_live(store)
        self._checked = time.monotonic()
        self._closed = False

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self._store, "pointer": self._generation.pointer}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        store: Store = state["store"]
        pointer: Pointer = state["pointer"]
        Index.__init__(self, store, Generation(store, pointer))

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes of the index's encoder. A closed index answers no more; closing it twice does nothing."""
        self._closed = True
        self._generation.close()

    def __len__(self) -> int:
        return self.models

    def __bool__(self) -> bool:
        return True  # as an open file is, whatever it holds

    def __contains__(self, repo: object) -> bool:
        return isinstance(repo, str) and self._ask(lambda generation: generation.has_model(repo))

    def __repr__(self) -> str:
        return f"<ProbeLog index {self._store.uri}: {self.models} models, {self.logits} logits>"

    @property
    def uri(self) -> str:
        """Where the index lies."""
        return self._store.uri

    @property
    def models(self) -> ModelCount:
        """Number of models in the index; called, a table of them: ``index.models(where="licence = 'mit'")``."""
        return ModelCount(self._generation.settings.models, self._ask)

    @property
    def logits(self) -> int:
        """Number of logits of the index's models; negated ones of one-logit heads and those of copies count too."""
        return self._generation.settings.logits

    @property
    def generation(self) -> str:
        """Name of the generation that answers."""
        return self._generation.pointer.generation

    @property
    def published(self) -> str:
        """When this generation became live (UTC, ISO 8601)."""
        return self._generation.pointer.published

    @property
    def settings(self) -> dict[str, Any]:
        """How the index was made (probe set, encoder, fraction, rank, calibration and counts), as JSON values."""
        return self._generation.settings.to_dict()

    def quality_report(self) -> dict[str, Any] | None:
        """What the quality gate said of this generation before it went live; None where there is no report.

        ``measures`` have ``name``, ``value``, ``limit``, ``verdict`` and ``meaning``. Whoever published the index wrote it.

        Raises:
            StoreError: the report is damaged, or cannot be read.
        """
        store, name = store_around(self._store), report(self.generation, "json")
        data = store.read_or_none(name, _LARGEST_REPORT)
        return None if data is None else unsealed_json(data, store.path(name))

    def search(
        self,
        text: str | Sequence[str] | None = None,
        *,
        images: Pictures | None = None,
        embeddings: Embeddings | None = None,
        like: str | None = None,
        like_index: Index | None = None,
        negative: str | Sequence[str] = (),
        k: int = 10,
        where: str | None = None,
        by: str | None = None,
        unwanted: str | Sequence[str] | None = None,
    ) -> Results:
        """The logits that recognise a concept, best first.

        Text, images and a logit may be mixed; they then describe one concept together.

        Args:
            text: the concept's name, as a person would say it ("dog"), or several names of the same thing.
            images: a picture of the concept (path, bytes, PIL image or NumPy array of uint8), or a list of several, which
                make one query.
            embeddings: the same as vectors (d,) or (s, d) of the index's own image encoder (``embed_images``).
            like: a logit as ``REPO#NUMBER`` or ``REPO#LABEL``; finds others of the same meaning.
            like_index: the index that holds that logit, where it is not this one. Both must have the same encoder;
                their probes may differ.
            negative: what must not be recognised, a name or several ("hot dog").
            k: how many answers.
            where: SQL condition over the models' facts, e.g. ``licence = 'mit' AND downloads > 100``.
            by: ``"family"`` gives of each model tree the best answer alone, with the number of its ``relatives``.
            unwanted: the former name of ``negative``.

        Raises:
            QueryError: no query, empty text, words that the encoder does not know, an unreadable image, an unknown
                logit, a filter that is not understood.
        """
        texts = [text] if isinstance(text, str) else list(text or ())
        if unwanted is not None:
            warnings.warn(
                "search(unwanted=...) is search(negative=...) now", DeprecationWarning, stacklevel=2
            )
            negative = unwanted
        against = [negative] if isinstance(negative, str) else list(negative)
        if not texts and images is None and embeddings is None and like is None:
            raise QueryError(
                "the query is empty: give a text, images or a logit (like), or a mixture of them"
            )
        if like_index is not None and like is None:
            raise QueryError(
                "like_index (--like-index) says which index holds a logit: name the logit with like (--like)"
            )
        if k < 1:
            raise QueryError(f"k must be at least 1, not {k}")
        _check_fold(by)

        def answer(generation: Generation) -> Results:
            notes: list[str] = []
            row = direction = None
            if like is not None and like_index is not None and like_index is not self:
                direction = like_index._ask(lambda other: _direction_elsewhere(generation, other, like))
            elif like is not None:
                row = _find_logit(generation, like)
                direction = _direction(generation, row)
            query = ask(generation, texts, images, embeddings, direction, against, notes)
            model_filter = Filter(generation, where)
            hits = _hits(generation, query, k, model_filter, row, by, notes)
            highest = max((hit.confidence for hit in hits if hit.confidence is not None), default=1.0)
            if highest < UNRECOGNISED:
                notes.append(
                    f"no answer has a confidence above {highest:.0%}: perhaps nothing in this index recognises this"
                )
            return Results(hits, notes)

        return self._ask(answer)

    def search_many(
        self, texts: Iterable[str | Sequence[str]], *, k: int = 10, where: str | None = None
    ) -> list[Results]:
        """The answers to many texts, each as of ``search``, in one batch: many times faster than one by one.

        A text that cannot be asked (empty, or of words that the encoder does not know) has no answers, and a note says why.

        Args:
            texts: names of one concept each, or several names of the same one.
            k: how many answers to each.
            where: as of ``search``.

        Raises:
            QueryError: a filter that is not understood.
        """
        if isinstance(texts, str):
            raise QueryError("search_many takes a list of texts: for one text there is search")
        names = [[text] if isinstance(text, str) else list(text) for text in texts]

        def one(texts: Sequence[str]) -> Results:
            try:
                return self.search(texts, k=k, where=where)
            except QueryError as error:
                return Results([], [str(error)])

        return [one(item) for item in names]

    def embed_images(self, images: Pictures) -> npt.NDArray[np.float32]:
        """Embeddings (s, d) of pictures by the index's own encoder, of length 1: what ``search(embeddings=...)`` takes.

        Args:
            images: as of ``search``.

        Raises:
            QueryError: an unreadable image, or an index that cannot be searched by image.
        """
        return self._ask(lambda generation: embed_pictures(generation, images))

    def models_like(
        self, repo: str, *, k: int = 10, where: str | None = None, by: str | None = None
    ) -> ModelResults:
        """The models that do what one model of the index does, best first.

        A model's score is the mean, over the logits of the model that is asked about, of its best logit's score for
        that logit: it has to recognise all of what the other one does, and may recognise more.

        Args:
            repo: a repository of the index.
            k: how many answers.
            where: SQL condition over the models' facts.
            by: as of ``search``.

        Raises:
            QueryError: the index does not hold this repository, or a filter that is not understood.
        """
        if k < 1:
            raise QueryError(f"k must be at least 1, not {k}")
        _check_fold(by)
        return self._ask(lambda generation: _models_like(generation, repo, k, where, by))

    def tree(self, repo: str, *, limit: int = 1000) -> Tree:
        """The edges around one model: its ancestors, siblings and descendants, each with probability and evidence.

        Args:
            repo: a repository of the index, or the name of a latent ancestor.
            limit: at most so many edges below the model, and so many to its siblings; a note says what is left out.

        Raises:
            QueryError: the index has no model trees, or does not hold this repository.
        """
        if limit < 1:
            raise QueryError(f"limit must be at least 1, not {limit}")
        return self._ask(lambda generation: tree_of(generation, repo, limit))

    def edges(self, where: str | None = None, *, limit: int = 1000) -> Edges:
        """Edges of model trees: which model was made from which.

        Args:
            where: SQL condition over the edges, e.g. ``relation = 'quantised' AND probability > 0.9``.
            limit: at most so many; a note says when there are more.

        Raises:
            QueryError: the index has no model trees, or a condition that is not understood.
        """
        if limit < 1:
            raise QueryError(f"limit must be at least 1, not {limit}")
        return self._ask(lambda generation: some_edges(generation, where, limit))

    def licence_conflicts(
        self, kinds: Sequence[str] = tuple(ConflictKind), *, repo: str | None = None, limit: int = 1000
    ) -> LicenceConflicts:
        """Edges of model trees along which licences conflict, and declared parents that the weights contradict or miss.

        Reads all edges, or those of one model. What a licence asks for is from a small table (`probelog.trees.licences`);
        others are unknown.

        Args:
            kinds: ``forbidden``, ``conditions``, ``notice``, ``contradicted``, ``undeclared`` (`LicenceConflict`).
            repo: only what concerns this model as the child.
            limit: at most so many of each kind; a note says when there are more.

        Raises:
            QueryError: the index has no model trees, or does not hold this repository, or there is no such kind.
        """
        if limit < 1:
            raise QueryError(f"limit must be at least 1, not {limit}")
        return self._ask(lambda generation: conflicts_of(generation, kinds, limit, repo))

    def scores(
        self, texts: Sequence[str], excluded: Sequence[Sequence[str]] | None = None
    ) -> np.ndarray[Any, Any]:
        """Scores of every logit for many texts at once: (C, N), higher is better, a column for each row of the index.

        Models with the same weights share their rows (``probelog.publication.rows``).

        Args:
            texts: C concept names.
            excluded: for each text, further names that are left out of the background (its synonyms).

        Raises:
            StoreError: the index cannot be read.
        """

        def answer(generation: Generation) -> np.ndarray[Any, Any]:
            queries = []
            for i, text in enumerate(texts):
                names = [text, *(excluded[i] if excluded is not None else ())]
                excluded_numbers = background_numbers(generation, names)
                coordinates = generation.basis.coordinates(
                    text_direction(generation, [text], excluded_numbers)
                )
                queries.append(Query(coordinates, excluded_numbers, np.empty((0, 0), np.float32)))
            out = np.full((len(texts), generation.size), -np.inf)  # of models that are gone
            for logits in generation.blocks():
                for i, query in enumerate(queries):
                    similarities = query.similarities(logits.coordinates)
                    out[i, logits.rows] = query.positive_scores(
                        generation, logits.coordinates, logits.offsets, similarities
                    )
            return out

        return self._ask(answer)

    def show(self, repo: str, concepts: int = 5, *, start: int = 0, limit: int | None = None) -> ModelSummary:
        """What each logit of one model recognises: the background concepts that it stands for most likely.

        Args:
            repo: a repository of the index.
            concepts: number of concepts for each logit.
            start: so many of its logits are left out, and
            limit: at most so many follow; None: all. Each costs a comparison with the whole background.

        Raises:
            QueryError: the index does not hold this repository (the message names similar ones).
        """
        if concepts < 1:
            raise QueryError(f"the number of concepts must be at least 1, not {concepts}")
        if start < 0 or (limit is not None and limit < 0):
            raise QueryError(f"start and limit must not be below 0: {start}, {limit}")
        stop = None if limit is None else start + limit

        def ask(generation: Generation) -> ModelSummary:
            model = _as_facts(generation.model(repo))
            logits = generation.logits(_logit_rows(model)[start:stop])
            names, scores = generation.names(logits, concepts)
            _check_finite(generation, scores)
            twins = generation.models_table(["repo"], f"weights = {model['weights']}")
            return ModelSummary(
                **{name: model[name] for name in _SUMMARY_FACTS},
                same_weights=[twin["repo"] for twin in twins.to_pylist() if twin["id"] != model["id"]],
                logits=[
                    LogitSummary(
                        logit=logit,
                        label=_label(model["labels"], logit),
                        negated=negated,
                        concepts=names[i],
                        scores=scores[i],
                        probes=probes,
                    )
                    for i, (logit, negated, probes) in enumerate(_logit_numbers(logits))
                ],
            )

        return self._ask(ask)

    def thumbnail(self, probe: int) -> bytes:
        """A small picture (JPEG or WebP bytes) of one probe, to show what fires a logit.

        Raises:
            QueryError: there is no such probe.
        """

        def ask(generation: Generation) -> bytes:
            thumbnails = generation.probes(["thumbnail"], f"id = {int(probe)}")["thumbnail"]
            if not len(thumbnails) or not thumbnails[0].is_valid:
                raise QueryError(f"there is no picture of a probe {int(probe)} in this index")
            return bytes(thumbnails[0].as_py())

        return self._ask(ask)

    def _ask(self, answer: Callable[[Generation], T]) -> T:
        """Answer from the live generation; from its successor if a sweep deleted it meanwhile."""
        if self._closed:
            raise UsageError(f"the index {self.uri} is closed: open it again with open_index")
        generation = self._current()
        try:
            return _answered(answer, generation)
        except StoreError:
            newer = self._live()
            if newer is generation:
                raise
            return _answered(answer, newer)

    def _current(self) -> Generation:
        """The open generation; every 30 seconds one caller checks whether it is still the live one."""
        if time.monotonic() - self._checked > POLL_SECONDS and self._polling.acquire(blocking=False):
            try:
                self._checked = time.monotonic()
                # A pointer that cannot be read right now takes nothing away from the generation that is open.
                with contextlib.suppress(ProbeLogError):
                    return self._live()
            finally:
                self._polling.release()
        return self._generation

    def _live(self) -> Generation:
        """The generation that the pointer names: the open one, or a newly opened one where it has moved."""
        if self._pinned is not None:
            return self._pinned
        pointer = read_pointer(self._store)[0]
        with self._lock:
            if pointer.generation != self._generation.pointer.generation:
                self._generation = Generation(self._store, pointer)
            return self._generation


_SUMMARY_FACTS = [item.name for item in fields(ModelSummary) if item.name not in ("same_weights", "logits")]


def open_index(uri: str | Path) -> Index:
    """Open a published index: a directory or an ``s3://`` address, the index's own or that of its store.

    Raises:
        IndexNotFoundError: there is no index at this address.
        SchemaVersionError: it was published by a newer ProbeLog.
        StoreError: the address cannot be reached, or the index is damaged.
    """
    return Index(find_index(os.fspath(uri)))


def _answered(answer: Callable[[Generation], T], generation: Generation) -> T:
    """An answer of a generation that anybody may have published.

    What is read is checked where it is read; numbers that are sound one by one may still make none together (inverse of
    a matrix of zeros, a time beyond the calendar), and take more memory than there is.

    Raises:
        StoreError: the libraries failed on what was read.
    """
    try:
        with np.errstate(all="ignore"):  # what is not finite is an error below, and not a warning
            return answer(generation)
    except (ArithmeticError, LookupError, ValueError, TypeError, MemoryError, RuntimeError, OSError) as error:
        raise StoreError(
            f"{generation.index.uri}: generation {generation.pointer.generation} cannot be searched "
            f"({type(error).__name__}: {first_line(error)}). It is damaged, or this is a fault of ProbeLog's own."
        ) from error


def _open_live(store: Store) -> Generation:
    """The live generation; its successor if a sweep deleted it between reading the pointer and opening its tables."""
    pointer = read_pointer(store)[0]
    try:
        return Generation(store, pointer)
    except StoreError:
        again = read_pointer(store)[0]
        if again.generation == pointer.generation:
            raise
        return Generation(store, again)


def _direction(generation: Generation, row: int) -> np.ndarray[Any, Any]:
    """Direction (d,) of one logit."""
    return generation.basis.directions(generation.logits(np.array([row])).coordinates[0])


def _direction_elsewhere(generation: Generation, other: Generation, like: str) -> np.ndarray[Any, Any]:
    """Direction (d,) of a logit of another index with the same encoder."""
    digest, other_digest = (item.settings.encoder_digest for item in (generation, other))
    if digest != other_digest:
        raise QueryError(
            f"{other.index.uri} and {generation.index.uri} were made with different encoders "
            f"({other.settings.encoder} and {generation.settings.encoder}): their logits cannot be compared"
        )
    return _direction(other, _find_logit(other, like))


def _check_finite(generation: Generation, *numbers: npt.ArrayLike) -> None:
    """Refuse an answer with numbers that are none: the order of the answers means nothing then.

    Raises:
        StoreError: there are such numbers.
    """
    if not all(np.isfinite(item).all() for item in numbers):
        raise not_finite(generation)


def _models_like(
    generation: Generation, repo: str, k: int, where: str | None, by: str | None
) -> ModelResults:
    """The k models whose logits recognise best what a model's logits recognise."""
    model = generation.model(repo)
    model_filter = Filter(generation, where)
    logits = generation.logits(_logit_rows(model))
    query_logits = logits[~logits.negated]

    def ranked(count: int) -> list[ModelMatch]:
        if not len(query_logits):
            return []
        return best_models(generation, query_logits, model["weights"], count, model_filter)

    if by is None:
        matches = ranked(k)
    else:
        matches, places = _first_of_families(
            generation, model_filter, k, ranked, lambda matches: [item.weights for item in matches]
        )
        matches = [matches[place] for place in places]
    members = model_filter.members(item.weights for item in matches)
    names = ["logits", *_HIT_FACTS]
    facts = _facts(generation, [number for number, _ in members.values()], [*names, "copies"])
    models = [facts[members[item.weights][0]] for item in matches]
    return ModelResults(
        ModelHit(
            rank=place + 1,
            score=item.score,
            duplicates=_duplicates(members[item.weights][1], models[place]),
            relatives=None if by is None else _relatives(generation, models[place], model_filter.condition),
            **{name: models[place][name] for name in names},
        )
        for place, item in enumerate(matches)
    )


def _check_fold(by: str | None) -> None:
    if by not in (None, "family"):
        raise QueryError(f"answers can be folded by family, not by {by!r}")


def _first_of_families(
    generation: Generation,
    model_filter: Filter,
    k: int,
    ranked: Callable[[int], T],
    weights_of: Callable[[T], Sequence[int]],
) -> tuple[T, list[int]]:
    """A ranking that is long enough for k families, and the positions of the first answer of each.

    A model whose tree is not known is a family of its own.

    Args:
        generation: that is searched.
        model_filter: the models that may answer.
        k: number of families; fewer where fewer are among the longest ranking.
        ranked: the best answers, as many as it is asked for.
        weights_of: the weights that each of some answers belongs to.
    """
    count = k * _ANSWERS_PER_FAMILY
    while True:
        matches = ranked(count)
        weights = weights_of(matches)
        members = model_filter.members(weights)
        numbers = [number for number, _ in members.values()]
        rows = generation.take_models(numbers, ["repo", "root"]).to_pylist() if numbers else []
        families = {row["id"]: row["root"] or row["repo"] for row in rows}
        first: dict[str, int] = {}
        for place, item in enumerate(weights):
            first.setdefault(families[members[item][0]], place)
        if len(first) >= k or len(weights) < count or count >= _MOST_ANSWERS:
            return matches, [*first.values()][:k]
        count = min(_MOST_ANSWERS, count * _ANSWERS_PER_FAMILY)


def _relatives(generation: Generation, model: Mapping[str, Any], where: str | None) -> int:
    """Number of the other models of a model's tree that pass a filter."""
    root = model["root"]
    if root is None or not is_valid_sql_text(root):
        return 0
    condition = f"root = {sql_literal(root)}"
    return generation.count_models(condition if where is None else f"{condition} AND ({where}\n)") - 1


def _logit_rows(model: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Rows of a model's logits: (L,)."""
    return np.arange(model["first_row"], model["first_row"] + model["rows"])


def _find_logit(generation: Generation, like: str) -> int:
    """Row of the logit that ``REPO#NUMBER`` or ``REPO#LABEL`` names.

    Raises:
        QueryError: it names no indexed logit; the message lists the model's logits.
    """
    repo, _, name = like.partition("#")
    if not repo or not name:
        raise QueryError(
            f"{like!r} names no logit: write REPO#NUMBER or REPO#LABEL, for example owner/model#3"
        )
    model = generation.model(repo)
    logits = generation.logits(_logit_rows(model))
    logits = logits[~logits.negated]
    rows, numbers = logits.rows.tolist(), logits.logit.tolist()
    by_number = {str(number): row for number, row in zip(numbers, rows, strict=True)}
    if name in by_number:
        return int(by_number[name])
    declared = [_label(model["labels"], number) for number in numbers]
    for spelling, names in (
        (name, declared),
        (normal_name(name), [normal_name(label) for label in declared]),
    ):
        if spelling in names:
            return int(rows[names.index(spelling)])
    known = ", ".join([*by_number][:20])
    raise QueryError(
        f"{repo} has no indexed logit {name!r}; it has {known}{', ...' if len(by_number) > 20 else ''}"
    )


def _logit_numbers(logits: Logits) -> Iterator[tuple[int, bool, list[int]]]:
    """For each logit: its number in the head, whether it is negated, and the probes that fire it most."""
    return zip(logits.logit.tolist(), logits.negated.tolist(), logits.probes.tolist(), strict=True)


def _label(labels: Sequence[str] | None, logit: int) -> str:
    return labels[logit] if labels is not None and logit < len(labels) else f"LABEL_{logit}"


def _hits(
    generation: Generation,
    query: Query,
    k: int,
    model_filter: Filter,
    skip: int | None,
    by: str | None,
    notes: list[str],
) -> list[Hit]:
    """The k best logits. Models with equal weights share one hit, shown as the first of them that passes the filter."""

    def ranked(count: int) -> LogitMatches:
        return best(generation, query, count, model_filter, skip)

    if by is None:
        matches = ranked(k)
    else:
        matches, places = _first_of_families(
            generation, model_filter, k, ranked, lambda matches: matches.logits.weights.tolist()
        )
        if len(places) < k and len(matches.scores) >= _MOST_ANSWERS:
            notes.append(f"only {len(places)} families are among the best {_MOST_ANSWERS:,} answers")
        matches = matches.at(np.array(places, np.int64))
    logits = matches.logits
    members = model_filter.members(logits.weights.tolist())
    models = _facts(generation, [number for number, _ in members.values()], ["labels", "copies", *_HIT_FACTS])
    confidences = query.confidences(generation, logits, matches.scores, matches.gallery)
    _check_finite(generation, matches.similarities, () if confidences is None else confidences)
    hits = []
    for place, (logit, negated, probes) in enumerate(_logit_numbers(logits)):
        number, count = members[int(logits.weights[place])]
        model = models[number]
        hits.append(
            Hit(
                rank=place + 1,
                label=_label(model["labels"], logit),
                logit=logit,
                score=float(matches.scores[place]),
                confidence=None if confidences is None else float(confidences[place]),
                distance=float(1.0 - matches.similarities[place]),
                negated=negated,
                duplicates=_duplicates(count, model),
                probes=probes,
                relatives=None if by is None else _relatives(generation, model, model_filter.condition),
                **{name: model[name] for name in _HIT_FACTS},
            )
        )
    return hits


_HIT_FACTS = [item.name for item in fields(ModelFacts)]
# Facts that every model has.
_KNOWN_FACTS = ("sha", "head")


def _duplicates(count: int | None, model: Mapping[str, Any]) -> int:
    """Number of other models with the same weights that pass the filter: ``count`` - 1, by default all copies - 1."""
    return int(model["copies"] if count is None else count) - 1


def _facts(generation: Generation, numbers: Sequence[int], names: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Facts of some models, by number."""
    rows = generation.take_models(numbers, names).to_pylist() if numbers else []
    return {row.pop("id"): _as_facts(row) for row in rows}


def _as_facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the ``models`` table with lists where it has none, and with typed parents."""
    missing = [name for name in _KNOWN_FACTS if row.get(name, "") is None]
    if missing:
        raise StoreError(f"the index is damaged: a model has no {missing[0]}. Publish again or roll back.")
    parents = [Parent(**parent) for parent in row["parents"] or []]
    return {**row, "tags": row["tags"] or [], "parents": parents}

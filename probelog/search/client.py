"""The query client: opens a published index and answers from it. No torch, no Ray, no Hub."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np
import numpy.typing as npt

from probelog.errors import ProbeLogError, QueryError, StoreError, UsageError
from probelog.index.conditions import split
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer, find_index, read_pointer, store_around
from probelog.index.tables import first_line
from probelog.search.evidence import Evidence, shown_probes
from probelog.search.generators.answers import (
    GeneratorQueries,
    GeneratorRequest,
    embeddings_of,
    is_generator,
    search_generators,
    search_many_generators,
)
from probelog.search.generators.query import direction_of_generator, sketched
from probelog.search.generators.results import GeneratorResults
from probelog.search.licences import LicenceConflicts, conflicts_of
from probelog.search.logits.hits import check_finite, logit_numbers, moved_queries, results_of
from probelog.search.models import (
    COVERED,
    ModelCount,
    as_facts,
    check_fold,
    domain_of,
    find_direction,
    find_logit,
    label_of,
    logit_rows,
    models_like,
)
from probelog.search.query import (
    Embeddings,
    Pictures,
    Query,
    ask,
    ask_many,
    background_numbers,
    embed_pictures,
    text_direction,
    unit_vectors,
)
from probelog.search.ranking import (
    Filter,
    Selection,
    check_confidence,
    with_feedback,
)
from probelog.search.results import (
    DomainResults,
    Hit,
    LogitSummary,
    ModelResults,
    ModelSummary,
    Results,
)
from probelog.search.snippet import snippet_of
from probelog.search.trees import Edges, Tree, some_edges, tree_of
from probelog.storage.checksummed_json import unsealed_json
from probelog.storage.layout import report
from probelog.trees.licences import ConflictKind

if TYPE_CHECKING:
    from probelog.storage.store import Store

# How long a client answers from the generation that it has open before it looks at the pointer again.
POLL_SECONDS = 30.0
# Some kilobytes with a few dozen examples.
_LARGEST_REPORT = 4 << 20

# Texts that are asked at a time: their cosines to the 50,000 logits of the largest index in memory are 13 MB.
_TEXTS_AT_ONCE = 64

T = TypeVar("T")


class Index(GeneratorQueries):
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

    @overload
    def search(
        self,
        text: str | Sequence[str] | None = None,
        *,
        kind: Literal["generator"],
        images: Pictures | None = None,
        embeddings: Embeddings | None = None,
        sketch: Pictures | None = None,
        sketch_embeddings: Embeddings | None = None,
        like: str | None = None,
        like_index: Index | None = None,
        negative: str | Sequence[str] = (),
        k: int = 10,
        where: str | None = None,
        by: str | None = None,
        min_confidence: float | None = None,
        sort: str = "score",
        method: str | None = None,
    ) -> GeneratorResults: ...
    @overload
    def search(
        self,
        text: str | Sequence[str] | None = None,
        *,
        images: Pictures | None = None,
        embeddings: Embeddings | None = None,
        sketch: Pictures | None = None,
        sketch_embeddings: Embeddings | None = None,
        like: str | None = None,
        like_index: Index | None = None,
        negative: str | Sequence[str] = (),
        k: int = 10,
        where: str | None = None,
        by: str | None = None,
        min_confidence: float | None = None,
        sort: str = "score",
        unwanted: str | Sequence[str] | None = None,
        kind: Literal["classifier"] = "classifier",
        method: str | None = None,
    ) -> Results: ...
    def search(
        self,
        text: str | Sequence[str] | None = None,
        *,
        images: Pictures | None = None,
        embeddings: Embeddings | None = None,
        sketch: Pictures | None = None,
        sketch_embeddings: Embeddings | None = None,
        like: str | None = None,
        like_index: Index | None = None,
        negative: str | Sequence[str] = (),
        k: int = 10,
        where: str | None = None,
        by: str | None = None,
        min_confidence: float | None = None,
        sort: str = "score",
        unwanted: str | Sequence[str] | None = None,
        kind: str = "classifier",
        method: str | None = None,
    ) -> Results | GeneratorResults:
        """The logits that recognise a concept, or the generators that make it, best first.

        Text, images, sketches and a model may be mixed; they then describe one concept together.

        Args:
            text: the concept's name, as a person would say it ("dog"), or several names of the same thing.
            images: a picture of the concept (path, bytes, PIL image or NumPy array of uint8), or a list of several, which
                make one query.
            embeddings: the same as vectors (d,) or (s, d) of the index's own image encoder (``embed_images``).
            sketch: a drawing of lines, dark on white, or several; given as ``images`` are.
            sketch_embeddings: the same as vectors (``embed_sketch``).
            like: a logit as ``REPO#NUMBER`` or ``REPO#LABEL``; finds others of the same meaning, or generators of what it
                recognises. Or a generator as ``REPO``: finds others that make the same, or logits that recognise it. Or a
                classifier as ``REPO``: finds generators of what its logits recognise (``found_by`` says of which).
            like_index: the index that holds that logit or classifier, where it is not this one. Both must have the same
                encoder; their probes may differ.
            negative: what must not be recognised, or made: a name or several ("hot dog").
            k: how many answers.
            where: SQL condition over the models' facts, and the answers' ``score`` and ``confidence``, e.g.
                ``licence = 'mit' AND downloads > 100 AND confidence > 0.5``. Texts are compared without case.
            by: ``"logit"`` (the default); ``"model"`` gives of each model the best answer alone; ``"family"`` of each
                model tree, with the number of its ``relatives``.
            min_confidence: only answers of at least this confidence, between 0 and 1.
            sort: ``"score"``, or ``"confidence"``: the most confident of the answers with the best scores come first.
            unwanted: the former name of ``negative``.
            kind: ``"classifier"``: answers are logits; ``"generator"``: answers are generators.
            method: of generators, how samples are compared with the query (docs/method.md); ``"matched"`` by default.

        Raises:
            QueryError: no query, empty text, words that the encoder does not know, an unreadable image, an unknown
                logit or generator, a filter that is not understood, a confidence asked of a query by a model, generators
                asked of an index without.
        """
        texts = [text] if isinstance(text, str) else list(text or ())
        if unwanted is not None:
            warnings.warn(
                "search(unwanted=...) is search(negative=...) now", DeprecationWarning, stacklevel=2
            )
            negative = unwanted
        against = [negative] if isinstance(negative, str) else list(negative)
        if not texts and all(part is None for part in (images, embeddings, sketch, sketch_embeddings, like)):
            raise QueryError(
                "the query is empty: give a text, images, a sketch or a model (like), or a mixture of them"
            )
        if like_index is not None and like is None:
            raise QueryError(
                "like_index (--like-index) says which index holds a logit: name the logit with like (--like)"
            )
        if k < 1:
            raise QueryError(f"k must be at least 1, not {k}")
        if kind == "generator":
            request = GeneratorRequest(
                texts=texts,
                images=images,
                embeddings=embeddings,
                sketch=sketch,
                sketch_embeddings=sketch_embeddings,
                like=like,
                like_index=None if like_index is self else like_index,
                negative=against,
                where=where,
                k=k,
                by=by,
                min_confidence=min_confidence,
                sort=sort,
                method=method,
            )
            return self._ask(lambda generation: search_generators(self, generation, request))
        _check_kind(kind)
        if method is not None:
            raise QueryError("only generators are compared by other methods (method)")
        condition, bounds = split(where)
        selection = Selection(k, by, min_confidence, sort, bounds)
        if selection.by_confidence and like is not None:
            raise QueryError(
                "answers to a model (like) have no confidence to select or sort them by: leave that out"
            )

        def answer(generation: Generation) -> Results:
            notes = _several_names(generation, texts)
            row = direction = None
            if like is not None and like_index is not None and like_index is not self:
                direction = like_index._ask(lambda other: find_direction(generation, like, other))
            elif like is not None and "#" not in like and is_generator(generation, like):
                direction = direction_of_generator(generation, like)
            elif like is not None:
                row = find_logit(generation, like)
                direction = find_direction(generation, like)
            drawn = embeddings_of(generation, sketch, sketch_embeddings)
            shown = embeddings
            if drawn is not None:
                moved = sketched(generation, drawn)
                shown = (
                    moved
                    if embeddings is None
                    else np.concatenate([unit_vectors(generation, embeddings), moved])
                )
            query = ask(generation, texts, images, shown, direction, against, notes)
            if like is None:
                query = with_feedback(generation, query)
            model_filter = Filter(generation, condition)
            return results_of(self, generation, [query], selection, model_filter, row, [notes])[0]

        return self._ask(answer)

    @overload
    def search_many(
        self,
        texts: Iterable[str | Sequence[str]],
        *,
        kind: Literal["generator"],
        k: int = 10,
        where: str | None = None,
        by: str | None = None,
        min_confidence: float | None = None,
        sort: str = "score",
    ) -> list[GeneratorResults]: ...
    @overload
    def search_many(
        self,
        texts: Iterable[str | Sequence[str]],
        *,
        k: int = 10,
        where: str | None = None,
        by: str | None = None,
        min_confidence: float | None = None,
        sort: str = "score",
        kind: Literal["classifier"] = "classifier",
    ) -> list[Results]: ...
    def search_many(
        self,
        texts: Iterable[str | Sequence[str]],
        *,
        k: int = 10,
        where: str | None = None,
        by: str | None = None,
        min_confidence: float | None = None,
        sort: str = "score",
        kind: str = "classifier",
    ) -> list[Results] | list[GeneratorResults]:
        """The answers to many texts, each as of ``search``, many times faster than one by one.

        The encoder and the index are asked once for many texts, and a small index is compared with all by one matrix product.
        A text that cannot be asked (empty, or of words that the encoder does not know) has no answers, and a note says why.

        Args:
            texts: names of one concept each, or several names of the same one.
            k: how many answers to each.
            where: as of ``search``, like all that follow.
            by: likewise.
            min_confidence: likewise.
            sort: likewise.
            kind: likewise. Of generators the encoder alone is asked once for many texts.

        Raises:
            QueryError: a filter that is not understood.
        """
        if isinstance(texts, str):
            raise QueryError("search_many takes a list of texts: for one text there is search")
        named = [[text] if isinstance(text, str) else list(text) for text in texts]
        if k < 1:
            raise QueryError(f"k must be at least 1, not {k}")
        condition, bounds = split(where)
        selection = Selection(k, by, min_confidence, sort, bounds)
        if kind == "generator":
            return self._ask(
                lambda generation: search_many_generators(self, generation, named, selection, condition)
            )
        _check_kind(kind)

        def answer(generation: Generation) -> list[Results]:
            model_filter = Filter(generation, condition)
            out: list[Results] = []
            for start in range(0, len(named), _TEXTS_AT_ONCE):
                piece = named[start : start + _TEXTS_AT_ONCE]
                notes = [_several_names(generation, names) for names in piece]
                queries = ask_many(generation, piece, notes)
                asked = [place for place, query in enumerate(queries) if query is not None]
                own = moved_queries(generation, [query for query in queries if query is not None])
                answers = results_of(
                    self, generation, own, selection, model_filter, None, [notes[i] for i in asked]
                )
                by_place = dict(zip(asked, answers, strict=True))
                out += [by_place.get(place) or Results([], notes[place]) for place in range(len(piece))]
            return out

        return self._ask(answer)

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
            by: ``"model"`` (the default), or ``"family"`` as of ``search``.

        Raises:
            QueryError: the index does not hold this repository, or a filter that is not understood.
        """
        if k < 1:
            raise QueryError(f"k must be at least 1, not {k}")
        check_fold(by)
        return self._ask(lambda generation: models_like(generation, repo, k, where, by))

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
                query = Query(coordinates, excluded_numbers, np.empty((0, 0), np.float32))
                queries.append(with_feedback(generation, query))
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
            model = as_facts(generation, generation.model(repo))
            logits = generation.logits(logit_rows(model)[start:stop])
            names, scores = generation.names(logits, concepts)
            check_finite(generation, scores)
            twins = generation.models_table(["repo"], f"weights = {model['weights']}")
            return ModelSummary(
                **{name: model[name] for name in _SUMMARY_FACTS},
                url=model["url"],
                same_weights=[twin["repo"] for twin in twins.to_pylist() if twin["id"] != model["id"]],
                logits=[
                    LogitSummary(
                        logit=logit,
                        label=label_of(model["labels"], logit),
                        negated=negated,
                        concepts=names[i],
                        scores=scores[i],
                        probes=probes,
                    )
                    for i, (logit, negated, probes) in enumerate(logit_numbers(logits))
                ],
            )

        return self._ask(ask)

    def evidence(self, repo: str, logit: int, *, negated: bool = False) -> Evidence:
        """The probes that fire one logit most and least.

        Args:
            repo: a repository of the index.
            logit: its number in the model's head.
            negated: of the opposite of a one-logit head's concept.

        Raises:
            QueryError: the index does not hold this logit.
        """

        def ask(generation: Generation) -> Evidence:
            model = generation.model(repo)
            row = find_logit(generation, f"{repo}#{logit}", negated)
            strongest, weakest = shown_probes(generation, np.array([row]), pictures=True)[0]
            return Evidence(repo, model["sha"], logit, negated, strongest, weakest)

        return self._ask(ask)

    def evidence_of(self, hits: Sequence[Hit] | ModelSummary, *, pictures: bool = True) -> list[Evidence]:
        """The evidence of several hits of this index, in their order; read at once, which is faster than one by one.

        Args:
            hits: answers of ``search``, or what ``show`` says of a model: then of each of its logits.
            pictures: whether the probes' pictures are read, too.

        Raises:
            QueryError: the index holds another commit of a hit's repository by now, or none.
        """

        def ask(generation: Generation) -> list[Evidence]:
            if isinstance(hits, ModelSummary):
                logits = [(hits.repo, hits.sha, item.logit, item.negated) for item in hits.logits]
                rows = _rows_of(generation, hits)
            else:
                logits = [(hit.repo, hit.sha, hit.logit, hit.negated) for hit in hits]
                rows = [_row_of(generation, hit) for hit in hits]
            shown = shown_probes(generation, np.array(rows, np.int64), pictures) if rows else []
            return [Evidence(*logit, *probes) for logit, probes in zip(logits, shown, strict=True)]

        return self._ask(ask)

    def snippet(self, repo: str, logit: int | str, *, image: str = "image.jpg") -> str:
        """Python code that loads just the indexed commit of a model and computes one logit of an image, as it was probed.

        Args:
            repo: a repository of the index.
            logit: its number in the model's head, or its declared label.
            image: path of the image in the code.

        Raises:
            QueryError: the index does not hold this logit, or does not say how the model was run (older versions).
        """
        return self._snippet(repo, logit, image)

    def _snippet(
        self, repo: str, logit: int | str, image: str, sha: str | None = None, negated: bool = False
    ) -> str:
        def ask(generation: Generation) -> str:
            model = generation.model(repo)
            _check_commit(model, sha)
            row = find_logit(generation, f"{repo}#{logit}")
            number = int(generation.logits(np.array([row])).logit[0])
            label = label_of(model["labels"], number)
            return snippet_of(model, generation.settings.endpoint, number, label, negated, image)

        return self._ask(ask)

    def search_domain(
        self,
        concepts: Sequence[str],
        *,
        k: int = 10,
        where: str | None = None,
        by: str | None = None,
        min_confidence: float = COVERED,
    ) -> DomainResults:
        """The models that cover a set of concepts best, each with what it lacks.

        Models are ordered by their mean confidence over the concepts, each by the model's best logit for it.

        Args:
            concepts: names of different things, such as the breeds that a model of dogs is to know.
            k: how many answers.
            where: SQL condition over the models' facts.
            by: ``"model"`` (the default), or ``"family"`` as of ``search``.
            min_confidence: a model lacks the concepts that it recognises with less.

        Raises:
            QueryError: no concepts, or too many, or the same twice; otherwise as of ``search``.
        """
        if k < 1:
            raise QueryError(f"k must be at least 1, not {k}")
        check_fold(by)
        check_confidence(min_confidence)
        return self._ask(lambda generation: domain_of(generation, concepts, k, where, by, min_confidence))

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


_SUMMARY_FACTS = [
    item.name for item in fields(ModelSummary) if item.name not in ("same_weights", "logits", "url")
]


def open_index(uri: str | Path) -> Index:
    """Open a published index: a directory or an ``s3://`` address, the index's own or that of its store.

    Raises:
        IndexNotFoundError: there is no index at this address.
        SchemaVersionError: it was published by a newer ProbeLog.
        StoreError: the address cannot be reached, or the index is damaged.
    """
    return Index(find_index(os.fspath(uri)))


def _check_kind(kind: str) -> None:
    if kind not in ("classifier", "generator"):
        raise QueryError(f"a kind is classifier or generator, not {kind!r}")


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


def _row_of(generation: Generation, hit: Hit) -> int:
    """Row of a hit's logit in a generation, perhaps another one than the hit is from."""
    origin = hit._origin
    if origin is not None and origin.generation == generation.pointer.generation:
        return origin.row
    _check_commit(generation.model(hit.repo), hit.sha)
    return find_logit(generation, f"{hit.repo}#{hit.logit}", hit.negated)


def _rows_of(generation: Generation, summary: ModelSummary) -> list[int]:
    """Rows of the logits that are summarised."""
    model = generation.model(summary.repo)
    _check_commit(model, summary.sha)
    rows = logit_rows(model)
    numbers = {
        key[:2]: int(row) for key, row in zip(logit_numbers(generation.logits(rows)), rows, strict=True)
    }
    return [numbers[item.logit, item.negated] for item in summary.logits]


def _check_commit(model: Mapping[str, Any], sha: str | None) -> None:
    if sha is not None and model["sha"] != sha:
        raise QueryError(
            f"the index was published again and holds another commit of {model['repo']} now: search again"
        )


def _several_names(generation: Generation, texts: Sequence[str]) -> list[str]:
    """A hint where several names of one thing are together the name of another."""
    together = " ".join(texts)
    if len(texts) < 2 or not len(background_numbers(generation, [together])):
        return []
    return [
        f"{' and '.join(map(repr, texts))} are taken as names of the same thing; did you mean "
        f'"{together}"? Then write it as one name, in quotes'
    ]

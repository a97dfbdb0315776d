"""The query client: opens a published index and answers from it. No torch, no Ray, no Hub."""

from __future__ import annotations

import contextlib
import difflib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from probelog.errors import ProbeLogError, QueryError, StoreError
from probelog.generation import Generation
from probelog.pointer import find_index, read_pointer
from probelog.question import Pictures, Question, ask, background_numbers, normal_name, text_direction
from probelog.results import Hit, LogitSummary, ModelHit, ModelSummary, Results

if TYPE_CHECKING:
    from probelog.storage import Store

# How long a client answers from the generation that it has open before it looks at the pointer again.
POLL_SECONDS = 30.0
# With no hit surer than this, "nothing here" is the likelier answer. On the hub of the README's benchmark 99 of 100
# classes that are there have a surer one.
UNRECOGNISED = 0.2

T = TypeVar("T")


class Index:
    """A published index, open for questions. Made by ``open_index``; safe to share between threads.

    An index answers from one generation and looks for a newer one at most every 30 seconds.
    """

    def __init__(self, store: Store, pinned: Generation | None = None) -> None:
        """Open what the pointer names, or one generation for good, whatever the pointer says (``pinned``)."""
        self._store = store
        self._pinned = pinned
        self._lock = threading.Lock()
        self._polling = threading.Lock()
        self._generation = pinned or _opened(store)
        self._checked = time.monotonic()

    def __repr__(self) -> str:
        return f"<ProbeLog index {self._store.uri}: {self.models} models, {self.logits} logits>"

    @property
    def uri(self) -> str:
        """Where the index lies."""
        return self._store.uri

    @property
    def models(self) -> int:
        """How many models the index holds."""
        return int(self._generation.settings["models"])

    @property
    def logits(self) -> int:
        """How many logits the index holds (negated ones of one-logit heads counted too)."""
        return int(self._generation.settings["logits"])

    @property
    def generation(self) -> str:
        """Name of the generation that answers."""
        return self._generation.pointer.generation

    @property
    def settings(self) -> dict[str, Any]:
        """How the index was made: probe set, encoder, fraction, rank, calibration and counts."""
        return dict(self._generation.settings)

    def search(
        self,
        text: str | Sequence[str] | None = None,
        *,
        images: Pictures | None = None,
        like: str | None = None,
        like_index: Index | None = None,
        unwanted: str | Sequence[str] = (),
        k: int = 10,
        where: str | None = None,
    ) -> Results:
        """The logits that recognise a concept, best first.

        Text, images and a logit may be mixed; they then describe one concept together.

        Args:
            text: the concept's name, as a person would say it ("dog"), or several names of the same thing.
            images: pictures of one concept (paths, bytes or PIL images); several make one query.
            like: a logit as ``REPO#NUMBER`` or ``REPO#LABEL``; finds others of the same meaning.
            like_index: the index that holds that logit, where it is not this one. Both must have the same encoder;
                their probes may differ.
            unwanted: what must not be recognised, a name or several ("hot dog").
            k: how many answers.
            where: SQL condition over the models' facts, e.g. ``licence = 'mit' AND downloads > 100``.

        Raises:
            QueryError: no query, empty text, words that the encoder does not know, an unreadable image, an unknown
                logit, a filter that is not understood.
        """
        texts = [text] if isinstance(text, str) else list(text or ())
        against = [unwanted] if isinstance(unwanted, str) else list(unwanted)
        if not texts and images is None and like is None:
            raise QueryError("nothing was asked: give a text, images or a logit (like), or a mixture of them")
        if like_index is not None and like is None:
            raise QueryError(
                "like_index (--like-index) says which index holds a logit: name the logit with like (--like)"
            )
        if k < 1:
            raise QueryError(f"k must be at least 1, not {k}")

        def answer(generation: Generation) -> Results:
            notes: list[str] = []
            row = direction = None
            if like is not None and like_index is not None and like_index is not self:
                direction = like_index._ask(lambda other: _direction_elsewhere(generation, other, like))
            elif like is not None:
                row = _find_logit(generation, like)
                direction = generation.vectors[row]
            question = ask(generation, texts, images, direction, against, notes)
            similarities = question.similarities(generation)
            scores = question.scores(generation, similarities)
            skip = None if row is None else int(generation.fold_keys[row])
            hits = _best(generation, question, similarities, scores, k, where, skip)
            surest = max((hit.confidence for hit in hits if hit.confidence is not None), default=1.0)
            if surest < UNRECOGNISED:
                notes.append(
                    f"no answer is surer than {surest:.0%}: perhaps nothing in this index recognises this"
                )
            return Results(hits, notes)

        return self._ask(answer)

    def models_like(self, repo: str, *, k: int = 10, where: str | None = None) -> list[ModelHit]:
        """The models that do what one model of the index does, best first.

        A model's score is the mean, over the logits of the model that is asked about, of its best logit's score for
        that logit: it has to recognise all of what the other one does, and may recognise more.

        Args:
            repo: a repository of the index.
            k: how many answers.
            where: SQL condition over the models' facts.

        Raises:
            QueryError: the index does not hold this repository, or a filter that is not understood.
        """
        if k < 1:
            raise QueryError(f"k must be at least 1, not {k}")
        return self._ask(lambda generation: _models_like(generation, repo, k, where))

    def scores(
        self, texts: Sequence[str], excluded: Sequence[Sequence[str]] | None = None
    ) -> np.ndarray[Any, Any]:
        """Scores of every logit for many texts at once: (C, N), higher is better, columns in the index's order.

        Args:
            texts: concept names.
            excluded: for each text, further names that are left out of the background (its synonyms).
        """

        def answer(generation: Generation) -> np.ndarray[Any, Any]:
            out = np.empty((len(texts), len(generation.model_of)))
            for i, text in enumerate(texts):
                names = [text, *(excluded[i] if excluded is not None else ())]
                own = background_numbers(generation, names)
                question = Question(text_direction(generation, [text], own), own, np.empty((0, 0)))
                out[i] = question.scores(generation, question.similarities(generation))
            return out

        return self._ask(answer)

    def show(self, repo: str, concepts: int = 5) -> ModelSummary:
        """What each logit of one model recognises: the background concepts that it stands for most likely.

        Raises:
            QueryError: the index does not hold this repository (the message names similar ones).
        """
        if concepts < 1:
            raise QueryError(f"the number of concepts must be at least 1, not {concepts}")

        def ask(generation: Generation) -> ModelSummary:
            number = _find_model(generation, repo)
            twins = np.flatnonzero(generation.same_weights == generation.same_weights[number])
            labels = generation.labels([number]).get(number, [])
            rows = np.flatnonzero(generation.model_of == number)
            names, scores = generation.names(rows.tolist(), concepts)
            return ModelSummary(
                **_facts(generation, number, _SUMMARY_FACTS),
                same_weights=[generation.repos[twin] for twin in twins if twin != number],
                logits=[
                    LogitSummary(
                        logit=int(generation.logit_of[row]),
                        label=_label(labels, int(generation.logit_of[row])),
                        negated=bool(generation.negated[row]),
                        concepts=names[i],
                        scores=scores[i],
                        probes=_first_probes(generation, int(row)),
                    )
                    for i, row in enumerate(rows)
                ],
            )

        return self._ask(ask)

    def thumbnail(self, probe: int) -> bytes:
        """A small picture (JPEG or WebP bytes) of one probe, to show what fires a logit.

        Raises:
            QueryError: there is no such probe.
        """

        def ask(generation: Generation) -> bytes:
            found = generation.rows("probes", ["thumbnail"], f"id = {int(probe)}", limit=1)["thumbnail"]
            if not len(found) or not found[0].is_valid:
                raise QueryError(f"there is no picture of a probe {int(probe)} in this index")
            return bytes(found[0].as_py())

        return self._ask(ask)

    def _ask(self, question: Callable[[Generation], T]) -> T:
        """Answer from the live generation; if it was swept away meanwhile, ask the one after it instead."""
        generation = self._current()
        try:
            return question(generation)
        except StoreError:
            fresh = self._live()
            if fresh is generation:
                raise
            return question(fresh)

    def _current(self) -> Generation:
        """The generation that is open; every 30 seconds one caller looks whether it is still the live one."""
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


def _opened(store: Store) -> Generation:
    """The live generation; the next one where that was swept between the pointer and its tables."""
    pointer = read_pointer(store)[0]
    try:
        return Generation(store, pointer)
    except StoreError:
        again = read_pointer(store)[0]
        if again.generation == pointer.generation:
            raise
        return Generation(store, again)


def _direction_elsewhere(generation: Generation, other: Generation, like: str) -> np.ndarray[Any, Any]:
    """Direction (d,) of a logit of another index with the same encoder."""
    mine, theirs = (held.settings.get("encoder_digest") for held in (generation, other))
    if mine is None or mine != theirs:
        raise QueryError(
            f"{other.index.uri} and {generation.index.uri} were made with different encoders "
            f"({other.settings['encoder']} and {generation.settings['encoder']}): their logits cannot be compared"
        )
    return np.asarray(other.vectors[_find_logit(other, like)])


def _models_like(generation: Generation, repo: str, k: int, where: str | None) -> list[ModelHit]:
    number = _find_model(generation, repo)
    own = np.flatnonzero((generation.model_of == number) & ~generation.negated)
    starts = np.flatnonzero(np.diff(generation.model_of, prepend=-1))
    totals = np.zeros(len(starts))
    for row in own:
        cosines = generation.vectors @ generation.vectors[row]
        totals += np.maximum.reduceat(generation.sharpness * cosines - generation.offsets, starts)
    numbers = generation.model_of[starts]
    weights = generation.same_weights[numbers]
    allowed = weights != generation.same_weights[number]
    if where is not None:
        allowed &= np.isin(numbers, _meeting(generation, where))
    places = np.flatnonzero(allowed)
    chosen = _folded(places, totals, weights, k)
    return [
        ModelHit(
            rank=rank,
            score=float(totals[place] / len(own)),
            logits=int(generation.models["logits"][int(numbers[place])].as_py()),
            duplicates=int(np.count_nonzero(weights[places] == weight)) - 1,
            **_facts(generation, int(numbers[place]), _HIT_FACTS),
        )
        for rank, (weight, place) in enumerate(chosen.items(), start=1)
    ]


def _folded(
    candidates: np.ndarray[Any, Any], scores: np.ndarray[Any, Any], keys: np.ndarray[Any, Any], k: int
) -> dict[int, int]:
    """The first k keys in the order of falling scores, each with the best of the candidates that share it."""
    chosen: dict[int, int] = {}
    for place in candidates[np.argsort(-scores[candidates], kind="stable")]:
        chosen.setdefault(int(keys[place]), int(place))
        if len(chosen) == k:
            break
    return chosen


def _meeting(generation: Generation, where: str) -> np.ndarray[Any, Any]:
    if not where.strip():
        raise QueryError("the filter is empty: leave it out or write an SQL condition")
    return generation.model_rows(where)


def _find_model(generation: Generation, repo: str) -> int:
    repos = generation.repos
    if repo in repos:
        return repos.index(repo)
    wanted = repo.casefold()
    alike = [name for name in repos if wanted in (name.casefold(), name.casefold().rpartition("/")[2])]
    close = list(dict.fromkeys(alike)) or difflib.get_close_matches(repo, repos, n=3, cutoff=0.5)
    raise QueryError(
        f"the index does not hold {repo!r}" + (f"; did you mean {' or '.join(close[:3])}?" if close else "")
    )


def _find_logit(generation: Generation, like: str) -> int:
    repo, _, name = like.partition("#")
    if not repo or not name:
        raise QueryError(
            f"{like!r} names no logit: write REPO#NUMBER or REPO#LABEL, for example owner/model#3"
        )
    number = _find_model(generation, repo)
    rows = np.flatnonzero((generation.model_of == number) & ~generation.negated)
    by_number = {str(generation.logit_of[row]): int(row) for row in rows}
    if name in by_number:
        return by_number[name]
    labels = generation.labels([number]).get(number, [])
    declared = [_label(labels, int(generation.logit_of[row])) for row in rows]
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


def _label(labels: Sequence[str], logit: int) -> str:
    return labels[logit] if logit < len(labels) else f"LABEL_{logit}"


def _best(
    generation: Generation,
    question: Question,
    similarities: np.ndarray[Any, Any],
    scores: np.ndarray[Any, Any],
    k: int,
    where: str | None,
    skip: int | None,
) -> list[Hit]:
    """The k best logits, those of equal weights folded into the best of them."""
    keys = generation.fold_keys
    allowed = np.ones(len(scores), bool)
    if where is not None:
        allowed = np.isin(generation.model_of, _meeting(generation, where))
    if skip is not None:
        allowed &= keys != skip
    candidates = np.flatnonzero(allowed)
    chosen = _folded(candidates, scores, keys, k)
    labels = generation.labels([int(generation.model_of[row]) for row in chosen.values()])
    hits = []
    found = question.confidences(generation, scores, list(chosen.values()))
    confidences = {} if found is None else dict(zip(chosen.values(), found.tolist(), strict=True))
    for rank, (key, row) in enumerate(chosen.items(), start=1):
        number, logit = int(generation.model_of[row]), int(generation.logit_of[row])
        hits.append(
            Hit(
                rank=rank,
                label=_label(labels.get(number, []), logit),
                logit=logit,
                score=float(scores[row]),
                confidence=confidences.get(row),
                distance=float(1.0 - similarities[row]),
                negated=bool(generation.negated[row]),
                duplicates=int(np.count_nonzero(keys[candidates] == key)) - 1,
                probes=_first_probes(generation, row),
                **_facts(generation, number, _HIT_FACTS),
            )
        )
    return hits


_HIT_FACTS = ["repo", "sha", "head", "library", "architecture", "licence", "downloads", "likes"]


def _facts(generation: Generation, number: int, names: Sequence[str]) -> dict[str, Any]:
    return {name: generation.models[name][number].as_py() for name in names}


def _first_probes(generation: Generation, row: int) -> list[int]:
    """The probes that fire a logit most, as many as a person looks at."""
    return [int(probe) for probe in generation.pairs.probes[row][:8]]

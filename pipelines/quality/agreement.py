"""Agreement between what logits recognise and what their uploaders declare: no ground truth is needed.

Asked one way, names that logits declare are searched for: is the first answer, is one of the first ten declared so?
Only answers with a label that names something are looked at, so that a growing share of unlabelled models changes
nothing. The same names are asked of both generations; a name that is hard stays hard.

Asked the other way, logits are named from the background (`Generation.names`): is what their uploader declares among
the ten likeliest names? So every model counts, and not the largest ones alone, which give most first answers; and
what tonight added can be told from what was there before.

Labels err, and say too little rather than too much. None of that matters here: it errs alike before and after.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.labels.labels import Lexicon, Meaning, imagenet_lexicon, names_in
from pipelines.quality.canaries import EXAMPLES, FIRST, first
from pipelines.quality.measure import Measure, least_paired_fall, least_rise
from pipelines.quality.samples import Sampled, Version, draw, hashed, rows_of, sampled_models
from probelog.index.generation import Generation
from probelog.search.results import Hit

# Enough to be sure of a fall by 12 points; two generations answer 400 questions in seconds.
NAMES = 200
# Models whose labels are read for them: names that two of so few declare are common ones, which is what is wanted.
MODELS = 400
# Labels of one model that are read: heads of 21,000 classes would be most of what is read.
_LABELS = 1000
# Answers asked for, of which the first ten with a label are looked at.
_ASKED = 30
# Logits of one model that are named, and models.
_LOGITS = 40
_NAMED_MODELS = 200


# Names to answers


def declared_names(models: Iterable[Sampled], count: int = NAMES) -> list[str]:
    """At most ``count`` of the names that logits of two different weights' models, or two logits of one, declare."""
    declarers: dict[str, set[tuple[int, int]]] = {}
    for model in models:
        for logit, label in enumerate(itertools.islice(model.labels, _LABELS)):
            for name in names_in(label)[:1]:
                declarers.setdefault(name, set()).add((model.weights, logit))
    return draw((name for name, logits in declarers.items() if len(logits) > 1), count)


@dataclass(frozen=True)
class Agreed:
    """Whether the first labelled answer to a name is declared so, and whether one of the first ten is."""

    top: bool
    ten: bool
    shown: str


def agreed(name: str, hits: Sequence[Hit], lexicon: Lexicon) -> Agreed:
    """Judge the answers to a name by what they declare."""
    wanted = lexicon.meaning([name])
    told: list[tuple[Hit, bool]] = []
    for hit in hits:
        names = [] if hit.negated else names_in(hit.label)
        if names:
            told.append((hit, wanted.matches(lexicon.meaning(names))))
    right = [matches for _, matches in told[:FIRST]]
    shown = f"{told[0][0].repo}#{told[0][0].logit} ({told[0][0].label})" if told else "nothing with a label"
    return Agreed(right[:1] == [True], any(right), shown)


def declared_measures(candidate: Generation, live: Generation | None, limit: float) -> list[Measure]:
    """How often the first answer, and the first ten, are declared as what was asked for."""
    lexicon = imagenet_lexicon()
    if live is None:
        names = declared_names(sampled_models(candidate, MODELS))
    else:
        models = sampled_models(live, MODELS)
        # What left took its names with it.
        still = {row.version for row in rows_of(candidate, (model.repo for model in models))}
        names = declared_names(model for model in models if model.version in still)
    after = [agreed(name, first(candidate, name, _ASKED), lexicon) for name in names]
    before = [] if live is None else [agreed(name, first(live, name, _ASKED), lexicon) for name in names]
    return [
        _declared(names, before, after, limit, live is not None, kind, told)
        for kind, told in (("top", "first answer"), ("ten", "first ten answers"))
    ]


def _declared(
    names: Sequence[str],
    before: Sequence[Agreed],
    after: Sequence[Agreed],
    limit: float,
    compared: bool,
    kind: str,
    told: str,
) -> Measure:
    now = np.array([getattr(item, kind) for item in after], bool)
    then = np.array([getattr(item, kind) for item in before], bool)
    worse, note, examples = None, "", []
    if not len(names):
        note = "no name is declared by two logits of the models sampled"
    elif not compared:
        note = "there is no live generation to compare with"
    else:
        lost = np.flatnonzero(then & ~now)
        worse = least_paired_fall(len(lost), int((now & ~then).sum()), len(names))
        examples = [
            f"{names[i]}: first was {before[i].shown}, is {after[i].shown}" for i in lost.tolist()[:EXAMPLES]
        ]
    return Measure(
        name=f"declared, {told}",
        meaning=f"Share of the names that logits declare to which the {told}, labelled ones alone, hold a logit that "
        "is declared so; and by how much it fell at the least.",
        value=float(now.mean()) if len(now) else None,
        before=float(then.mean()) if len(then) else None,
        worse=worse,
        limit=limit,
        counted=len(names),
        note=note,
        examples=examples,
    )


# Logits to names


@dataclass(frozen=True)
class Named:
    """How many of a model's logits were judged by their names, and how many are named as they are declared."""

    model: Sampled
    judged: int
    right: int
    example: str

    @property
    def share(self) -> float:
        """Of one model."""
        return self.right / self.judged


def named(generation: Generation, model: Sampled, known: Meanings) -> Named | None:
    """Judge a model's logits by the background's names; None where the background lacks what they declare."""
    # Spread over the head, the same ones every night.
    places = np.unique(np.linspace(0, model.rows - 1, min(model.rows, _LOGITS)).astype(np.int64))
    if not len(model.labels) or not len(places):
        return None
    logits = generation.logits(model.first_row + places)
    wanted: list[Meaning | None] = []
    for logit, negated in zip(logits.logit.tolist(), logits.negated.tolist(), strict=True):
        own = names_in(model.labels[logit]) if logit < len(model.labels) and not negated else []
        meaning = known.lexicon.meaning(own) if own else None
        wanted.append(meaning if meaning is not None and known.holds(meaning) else None)
    judged = [place for place, meaning in enumerate(wanted) if meaning is not None]
    if not judged:
        return None
    told, _ = generation.names(logits[np.array(judged)], FIRST)
    right, example = 0, ""
    for place, names in zip(judged, told, strict=True):
        meaning = wanted[place]
        if meaning is not None and any(meaning.matches(known.of(name)) for name in names):
            right += 1
        elif not example:
            logit = int(logits.logit[place])
            example = f"{model.repo}#{logit} ({model.labels[logit]}) is named {', '.join(names[:3])}"
    return Named(model, len(judged), right, example)


class Meanings:
    """What the background's names mean."""

    def __init__(self, background: Sequence[str], lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self._known = {name: lexicon.meaning(names_in(name)) for name in background}
        self._same: set[str] = set().union(*(meaning.same for meaning in self._known.values()))
        self._wider: set[str] = set().union(*(meaning.wider for meaning in self._known.values()))

    def of(self, name: str) -> Meaning:
        """Of one name of the background."""
        return self._known[name]

    def holds(self, meaning: Meaning) -> bool:
        """Whether some name of the background matches a meaning."""
        return not (
            self._same.isdisjoint(meaning.same)
            and self._wider.isdisjoint(meaning.same)
            and self._same.isdisjoint(meaning.wider)
        )


def named_measures(
    candidate: Generation,
    live: Generation | None,
    added: Sequence[Version],
    limit: float,
    limit_of_new: float,
) -> list[Measure]:
    """How often logits are named as they are declared: of the models of both generations, and of the added ones.

    The first answers come from the few largest models; this sees the others too. Logits of one model stand or fall
    together (its preprocessing, its weights), so every model counts as one: its share of logits named as declared.
    """
    lexicon = imagenet_lexicon()
    known = Meanings(candidate.background, lexicon)
    if live is None:
        old = _judged(candidate, sampled_models(candidate, MODELS), known)
        return [
            _kept(old, [], limit, "there is no live generation to compare with"),
            _new([], [], limit_of_new, "there is no live generation: all models are new"),
        ]
    models = sampled_models(live, MODELS)
    there = {row.version: row for row in rows_of(candidate, (model.repo for model in models))}
    before = _judged(
        live,
        (model for model in models if model.version in there),
        Meanings(live.background, lexicon),
    )
    same = candidate.background == live.background
    pairs = []
    for item in before:
        again = named(candidate, there[item.model.version], known)
        # The same background holds what is declared; where it does no more, the declared labels are lost.
        if again is not None or same:
            pairs.append(
                (item, again or Named(item.model, 1, 0, f"{item.model.repo} declares nothing any more"))
            )
    old = [after for _, after in pairs]
    chosen = set(added)
    fresh = rows_of(candidate, sorted({repo for repo, _ in added}, key=hashed)[: 4 * _NAMED_MODELS])
    new = _judged(candidate, (model for model in fresh if model.version in chosen), known)
    return [
        _kept(old, [item for item, _ in pairs], limit, "" if pairs else _NOTHING),
        _new(new, old, limit_of_new, "" if new and old else _NOTHING),
    ]


_NOTHING = "no model declares a name that the background holds"
_MEANING = "Share of the logits that are among the ten likeliest names what their uploader declares, mean over the models "


def _kept(after: Sequence[Named], before: Sequence[Named], limit: float, note: str) -> Measure:
    """The models of both generations, pair by pair; of the candidate alone where ``before`` is empty."""
    falls = [one.share - other.share for one, other in zip(before, after, strict=False)]
    worst = sorted(zip(falls, after, strict=False), key=lambda pair: (-pair[0], pair[1].model.version))
    lost, gained = sum(max(0.0, fall) for fall in falls), sum(max(0.0, -fall) for fall in falls)
    return Measure(
        name="models named as declared",
        meaning=_MEANING + "that both generations hold; and by how much it fell at the least.",
        value=_mean(after),
        before=_mean(before),
        worse=None if note else least_paired_fall(lost, gained, len(falls)),
        limit=limit,
        counted=len(after),
        note=note,
        examples=[item.example for fall, item in worst[:EXAMPLES] if fall > 0],
    )


def _new(new: Sequence[Named], old: Sequence[Named], limit: float, note: str) -> Measure:
    """The added models beside the others."""
    worse = None
    if not note:
        worse = least_rise(
            sum(item.share for item in old), len(old), sum(item.share for item in new), len(new)
        )
    missed = sorted((item for item in new if item.example), key=lambda item: (item.share, item.model.version))
    return Measure(
        name="new models named as declared",
        meaning=_MEANING
        + "that this generation adds; beside it that of the others, and by how much it is lower at "
        "the least.",
        value=_mean(new),
        before=_mean(old),
        worse=worse,
        limit=limit,
        counted=len(new),
        note=note,
        examples=[item.example for item in missed[:EXAMPLES]],
    )


def _judged(generation: Generation, models: Iterable[Sampled], known: Meanings) -> list[Named]:
    """The first models, by hash and each weights once, that can be judged."""
    found: list[Named] = []
    met: set[int] = set()
    for model in sorted(models, key=lambda model: hashed(model.repo)):
        if len(found) == _NAMED_MODELS:
            break
        if model.weights not in met and (item := named(generation, model, known)) is not None:
            met.add(model.weights)
            found.append(item)
    return found


def _mean(models: Sequence[Named]) -> float | None:
    return sum(item.share for item in models) / len(models) if models else None

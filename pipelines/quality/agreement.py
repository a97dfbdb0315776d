"""Agreement between the concepts that logits recognise and their declared labels: no ground truth is needed.

*From names to logits*: names that logits declare are searched for. Is the first answer, is one of the first ten
declared so? Only answers with a label that names something count, so that a growing share of unlabelled models changes
nothing. Both generations get the same queries; a name that is hard is hard for both.

*From logits to names*: logits are named from the background (`Generation.names`). Is the declared label among the ten
likeliest names? This counts every model, not only the largest ones, which give most first answers; and it tells the
models that the candidate adds from the others.

Labels have errors and gaps. They do not matter here, because they affect both generations alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.labels.labels import Lexicon, Meaning, imagenet_lexicon, names_in
from pipelines.quality.canaries import FIRST, first
from pipelines.quality.measure import EXAMPLES, Measure, least_paired_fall, least_rise
from pipelines.quality.samples import Answer, Sampled, Version, draw, hashed, rows_of, sampled_models
from probelog.arrays import evenly_spread
from probelog.index.generation import Generation

# Enough to detect a fall by 12 points; two generations answer 400 queries in seconds.
NAMES = 200
# Number of models whose labels are read for these names: names that two of so few declare are common ones.
MODELS = 400
# Number of labels that are read per model: heads of 21,000 classes would otherwise dominate.
_LABELS = 1000
# Number of answers per query, of which the first ten with a label count.
_ASKED = 30
# Numbers of logits per model that are named, and of models.
_LOGITS = 40
_NAMED_MODELS = 200


# Names to answers


def declared_names(models: Iterable[Sampled], count: int = NAMES) -> list[str]:
    """At most ``count`` names that at least two logits declare, of different weights or of one model."""
    declarers: dict[str, set[tuple[int, int]]] = {}
    for model in models:
        for logit, label in enumerate(itertools.islice(model.labels, _LABELS)):
            for name in names_in(label)[:1]:
                declarers.setdefault(name, set()).add((model.weights, logit))
    return draw((name for name, logits in declarers.items() if len(logits) > 1), count)


@dataclass(frozen=True)
class LabelAgreement:
    """Agreement of the labelled answers to a name.

    Attributes:
        top: whether the first is declared as the name.
        ten: whether one of the first ten is.
        shown: the first, for messages.
    """

    top: bool
    ten: bool
    shown: str


def label_agreement(name: str, hits: Sequence[Answer], lexicon: Lexicon) -> LabelAgreement:
    """Compare the answers to a name with their declared labels."""
    queried = lexicon.meaning([name])
    labelled: list[tuple[Answer, bool]] = []
    for hit in hits:
        names = [] if hit.negated else names_in(hit.label)
        if names:
            labelled.append((hit, queried.matches(lexicon.meaning(names))))
    matching = [matches for _, matches in labelled[:FIRST]]
    shown = (
        f"{labelled[0][0].repo}#{labelled[0][0].logit} ({labelled[0][0].label})"
        if labelled
        else "nothing with a label"
    )
    return LabelAgreement(matching[:1] == [True], any(matching), shown)


def declared_measures(candidate: Generation, live: Generation | None, limit: float) -> list[Measure]:
    """Measures of how often the first answer to a name, and one of the first ten, is declared as that name.

    Args:
        candidate: not yet live.
        live: the live generation; None without one.
        limit: of the fall of each share.
    """
    lexicon = imagenet_lexicon()
    if live is None:
        names = declared_names(sampled_models(candidate, MODELS))
    else:
        models = sampled_models(live, MODELS)
        # Names that only removed models declare are not queried.
        remaining = {row.version for row in rows_of(candidate, (model.repo for model in models))}
        names = declared_names(model for model in models if model.version in remaining)
    candidate_agreements = [label_agreement(name, first(candidate, name, _ASKED), lexicon) for name in names]
    live_agreements = (
        [] if live is None else [label_agreement(name, first(live, name, _ASKED), lexicon) for name in names]
    )
    return [
        _declared_measure(names, live_agreements, candidate_agreements, limit, live is not None, kind, phrase)
        for kind, phrase in (("top", "first answer"), ("ten", "first ten answers"))
    ]


def _declared_measure(
    names: Sequence[str],
    before: Sequence[LabelAgreement],
    after: Sequence[LabelAgreement],
    limit: float,
    compared: bool,
    kind: str,
    phrase: str,
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
        name=f"declared, {phrase}",
        meaning=f"Share of the names that logits declare to which the {phrase}, labelled ones alone, hold a logit that "
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
class NamingAgreement:
    """Naming of one model's logits.

    Attributes:
        model: the model.
        judged: number of its logits whose declared label the background has.
        right: number of these that are named as they are declared.
        example: a sentence about one that is not.
    """

    model: Sampled
    judged: int
    right: int
    example: str

    @property
    def share(self) -> float:
        """Share of the judged logits that are named as they are declared."""
        return self.right / self.judged


def naming_agreement(generation: Generation, model: Sampled, known: Meanings) -> NamingAgreement | None:
    """Compare the names of a model's logits with their labels; None where the background has none of the labels."""
    places = evenly_spread(model.rows, _LOGITS)
    if not len(model.labels) or not len(places):
        return None
    logits = generation.logits(model.first_row + places)
    meanings: list[Meaning | None] = []
    for logit, negated in zip(logits.logit.tolist(), logits.negated.tolist(), strict=True):
        declared = names_in(model.labels[logit]) if logit < len(model.labels) and not negated else []
        meaning = known.lexicon.meaning(declared) if declared else None
        meanings.append(meaning if meaning is not None and known.holds(meaning) else None)
    judged = [place for place, meaning in enumerate(meanings) if meaning is not None]
    if not judged:
        return None
    background_names, _ = generation.names(logits[np.array(judged)], FIRST)
    right, example = 0, ""
    for place, names in zip(judged, background_names, strict=True):
        meaning = meanings[place]
        if meaning is not None and any(meaning.matches(known.of(name)) for name in names):
            right += 1
        elif not example:
            logit = int(logits.logit[place])
            example = f"{model.repo}#{logit} ({model.labels[logit]}) is named {', '.join(names[:3])}"
    return NamingAgreement(model, len(judged), right, example)


class Meanings:
    """Meanings of the background's names."""

    def __init__(self, background: Sequence[str], lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self._known = {name: lexicon.meaning(names_in(name)) for name in background}
        self._same: set[str] = set().union(*(meaning.same for meaning in self._known.values()))
        self._wider: set[str] = set().union(*(meaning.wider for meaning in self._known.values()))

    def of(self, name: str) -> Meaning:
        """Meaning of one name of the background."""
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
    """Measures of how often logits are named as they are declared: in the models of both generations, and in added ones.

    Logits of one model are not independent (they share preprocessing and weights), so every model counts once, with its
    share of logits named as declared.

    Args:
        candidate: not yet live.
        live: the live generation; None without one.
        added: models that the candidate holds and the live generation does not.
        limit: of the fall in the models of both.
        limit_of_new: of the difference between the added models and the others.
    """
    lexicon = imagenet_lexicon()
    known = Meanings(candidate.background, lexicon)
    if live is None:
        old_namings = _namings(candidate, sampled_models(candidate, MODELS), known)
        return [
            _kept_models_measure(old_namings, [], limit, "there is no live generation to compare with"),
            _new_models_measure([], [], limit_of_new, "there is no live generation: all models are new"),
        ]
    models = sampled_models(live, MODELS)
    candidate_rows = {row.version: row for row in rows_of(candidate, (model.repo for model in models))}
    live_namings = _namings(
        live,
        (model for model in models if model.version in candidate_rows),
        Meanings(live.background, lexicon),
    )
    same = candidate.background == live.background
    pairs = []
    for live_naming in live_namings:
        candidate_naming = naming_agreement(candidate, candidate_rows[live_naming.model.version], known)
        # With the same background the candidate can judge the model too; where it cannot, declared labels were lost.
        if candidate_naming is not None or same:
            pairs.append(
                (
                    live_naming,
                    candidate_naming
                    or NamingAgreement(
                        live_naming.model, 1, 0, f"{live_naming.model.repo} declares nothing any more"
                    ),
                )
            )
    old_namings = [after for _, after in pairs]
    added_set = set(added)
    new_rows = rows_of(candidate, sorted({repo for repo, _ in added}, key=hashed)[: 4 * _NAMED_MODELS])
    new_namings = _namings(candidate, (model for model in new_rows if model.version in added_set), known)
    return [
        _kept_models_measure(
            old_namings, [live_naming for live_naming, _ in pairs], limit, "" if pairs else _NOTHING
        ),
        _new_models_measure(
            new_namings, old_namings, limit_of_new, "" if new_namings and old_namings else _NOTHING
        ),
    ]


_NOTHING = "no model declares a name that the background holds"
_MEANING = "Share of the logits that are among the ten likeliest names what their uploader declares, mean over the models "


def _kept_models_measure(
    after: Sequence[NamingAgreement], before: Sequence[NamingAgreement], limit: float, note: str
) -> Measure:
    """The measure over pairs of a model in both generations; over the candidate alone where ``before`` is empty."""
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


def _new_models_measure(
    new: Sequence[NamingAgreement], old: Sequence[NamingAgreement], limit: float, note: str
) -> Measure:
    """The measure of the added models, compared with the others."""
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


def _namings(generation: Generation, models: Iterable[Sampled], known: Meanings) -> list[NamingAgreement]:
    """Namings of the first models by hash that can be judged, each weights once."""
    namings: list[NamingAgreement] = []
    weights_seen: set[int] = set()
    for model in sorted(models, key=lambda model: hashed(model.repo)):
        if len(namings) == _NAMED_MODELS:
            break
        if (
            model.weights not in weights_seen
            and (item := naming_agreement(generation, model, known)) is not None
        ):
            weights_seen.add(model.weights)
            namings.append(item)
    return namings


def _mean(models: Sequence[NamingAgreement]) -> float | None:
    return sum(item.share for item in models) / len(models) if models else None

"""Canary queries: what the first answers to some names lost, and whether known answers are among them.

What is a broken night, and what is ordinary growth? An answer that readers have among the first ten today should be
among the first ten tomorrow, unless there is a reason outside of the index:

- Its model left the catalogue, or has another sha: not counted. How many models may go at once is a measure of its
  own (`pipelines.quality.gate`), or a crawl that lost half of the Hub would pass as growth.
- Models that the live generation does not hold answer better: they are passed over when the candidate's ten are
  counted, so that what they pushed down is where it was. Where they leave no room to see it, it is not counted.
- Another repository with the same weights stands for it: the same answer.
- The settings of the method changed (encoder, prompts, probes, background): the answers should change. The loss is
  reported and not judged; declared labels judge such a generation.

What is left are answers that the same logits, asked the same way, no longer give: rows mixed up, missing, or
described anew by something broken. A little of that is ordinary too: temperature and basis are learnt anew by each
publish, and what is tenth today may be eleventh tomorrow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.job.job import read_names
from pipelines.quality.measure import Measure, wilson
from pipelines.quality.samples import Sampled, Version, draw, rows_of, sampled_models
from probelog.errors import QueryError, UsageError
from probelog.index.generation import Generation
from probelog.ranking.names import normal_name
from probelog.search.client import Index
from probelog.search.results import Hit

# What a reader sees of an answer.
FIRST = 10
# Asked for where new models are among the first ten.
_DEEPER = 60
# With fewer answers to compare, a swap at the tenth place would be a large share.
LEAST_ANSWERS = 50
EXAMPLES = 8


@dataclass(frozen=True)
class Canary:
    """A name to ask, and ``REPO#LOGIT`` or ``REPO#LABEL`` that must be among the first ten answers, where known."""

    name: str
    known: str | None = None


def read_canaries(given: Sequence[str] | Path | None) -> list[Canary]:
    """An operator's canaries: a list of lines or a text file of such, ``name`` or ``name<TAB>repo#logit-or-label``.

    Raises:
        UsageError: the file cannot be read, or a line has another form.
    """
    if given is None:
        return []
    lines = read_names(given, "canaries") if isinstance(given, Path) else list(given)
    return [_canary(line) for line in lines]


def _canary(line: str) -> Canary:
    name, mark, known = line.partition("\t")
    name, known = name.strip(), known.strip()
    repo, _, logit = known.partition("#")
    if not name or (mark and not (repo and logit)):
        raise UsageError(
            f"quality.canaries: {line!r}: write a name, or name<TAB>REPO#LOGIT, a logit's number or label"
        )
    return Canary(name, known or None)


def background_canaries(background: Sequence[str], count: int) -> list[Canary]:
    """Some of the background's names, from everywhere in it."""
    return [Canary(name) for name in draw(background, count)]


# What was lost


@dataclass(frozen=True)
class Compared:
    """One canary's answers: how many of the live first ten count, and which of these are lost."""

    name: str
    counted: int
    lost: list[Hit]


@dataclass(frozen=True)
class Known:
    """Some models of a generation: by version the digest of their weights, None where that is unknown."""

    versions: Mapping[Version, str | None]

    @classmethod
    def of(cls, rows: Iterable[Sampled]) -> Known:
        """From rows of the ``models`` table."""
        return cls({row.version: row.weight_digest for row in rows})


def compare(
    before: Sequence[Hit], after: Sequence[Hit], asked: int, held: Known, holds: Known
) -> tuple[int, list[Hit]]:
    """How many of the first answers count, and which of them are lost; the rules are in the module's text.

    Args:
        before: the live generation's first ten.
        after: the candidate's, as many as were asked for.
        asked: how many that was.
        held: the live generation's models, as far as they answered in either.
        holds: the candidate's, likewise.
    """
    mine = [_meanings(hit, held) for hit in before]
    old: set[_Meaning] = set()
    places = 0
    for hit in after:
        told = _meanings(hit, holds)
        if (hit.repo, hit.sha) not in held.versions and not any(told & own for own in mine):
            continue
        if places == FIRST:
            break
        places += 1
        old |= told
    crowded = places < FIRST and len(after) == asked
    counted, lost = 0, []
    for hit, own in zip(before, mine, strict=True):
        kept = bool(own & old)
        if kept or ((hit.repo, hit.sha) in holds.versions and not crowded):
            counted += 1
            if not kept:
                lost.append(hit)
    return counted, lost


_Meaning = tuple[str, str, int, bool]


def _meanings(hit: Hit, models: Known) -> set[_Meaning]:
    """What an answer is known by: its logit of its model, and of its weights."""
    found: set[_Meaning] = {(hit.repo, hit.sha, hit.logit, hit.negated)}
    if digest := models.versions.get((hit.repo, hit.sha)):
        found.add(("", digest, hit.logit, hit.negated))
    return found


def lost_answers(
    candidate: Generation, live: Generation | None, canaries: Sequence[Canary], limit: float, unlike: str
) -> Measure:
    """Share of the live first answers to canaries that the candidate lost.

    Args:
        candidate: not yet live.
        live: the live generation, where there is one.
        canaries: what is asked.
        limit: of the share.
        unlike: says which settings differ; empty where the two were made alike.
    """
    compared = _asked(candidate, live, canaries) if live is not None else []
    counted = sum(item.counted for item in compared)
    lost = sum(len(item.lost) for item in compared)
    value = lost / counted if counted else None
    note = ""
    if live is None:
        note = "there is no live generation to compare with"
    elif unlike:
        note = f"not judged: made with other settings ({unlike})"
    elif counted < LEAST_ANSWERS:
        note = f"not judged: {counted} answers can be compared, {LEAST_ANSWERS} are needed"
    worst = sorted(compared, key=lambda item: (-len(item.lost), item.name))[:EXAMPLES]
    return Measure(
        name="lost answers",
        meaning="Of the live generation's first ten answers to the canaries, the share that the candidate's first ten "
        "lack, new models and models that left passed over.",
        value=value,
        before=None,
        worse=None if note else value,
        limit=limit,
        counted=counted,
        note=note,
        examples=[
            f"{item.name}: lost {len(item.lost)} of {item.counted}: "
            + ", ".join(f"{hit.repo}#{hit.logit} ({hit.label})" for hit in item.lost[:3])
            for item in worst
            if item.lost
        ],
    )


def _asked(candidate: Generation, live: Generation, canaries: Sequence[Canary]) -> list[Compared]:
    before: dict[str, list[Hit]] = {}
    after: dict[str, tuple[list[Hit], int]] = {}
    for name in dict.fromkeys(canary.name for canary in canaries):
        try:
            before[name] = _search(live, name, FIRST)
        except QueryError:
            continue  # its encoder knows no word of it: there is nothing that could be lost
        after[name] = first(candidate, name, FIRST), FIRST
    held = _models(live, before, after)
    for name, (hits, _) in after.items():
        if any((hit.repo, hit.sha) not in held.versions for hit in hits):
            after[name] = first(candidate, name, _DEEPER), _DEEPER
    held, holds = _models(live, before, after), _models(candidate, before, after)
    return [Compared(name, *compare(hits, *after[name], held, holds)) for name, hits in before.items()]


def first(generation: Generation, name: str, count: int) -> list[Hit]:
    """A generation's first answers to a name; none where its encoder knows no word of it."""
    try:
        return _search(generation, name, count)
    except QueryError:
        return []


def _search(generation: Generation, name: str, count: int) -> list[Hit]:
    return list(Index(generation.index, pinned=generation).search(name, k=count))


def _models(
    generation: Generation, before: dict[str, list[Hit]], after: dict[str, tuple[list[Hit], int]]
) -> Known:
    """What one of the two generations holds of the models that answered in either."""
    repos = {hit.repo for hits in before.values() for hit in hits}
    repos |= {hit.repo for hits, _ in after.values() for hit in hits}
    return Known.of(rows_of(generation, repos))


# Known answers


def known_answers(
    candidate: Generation, live: Generation | None, canaries: Sequence[Canary], limit: float
) -> Measure:
    """Share of the canaries with a known answer that the candidate's first ten lack it of.

    An operator who says what must be found means it whatever the live generation does. Only an answer whose
    repository is not in the index is not counted: its owner may delete it any day.
    """
    asked = [canary for canary in canaries if canary.known is not None]
    found = {canary: _found(candidate, canary) for canary in asked}
    counted = [canary for canary in asked if found[canary] is not None]
    absent = [canary for canary in asked if found[canary] is None]
    missed = [canary for canary in counted if not found[canary]]
    value = len(missed) / len(counted) if counted else None
    before = None
    if live is not None and counted:
        before = sum(not _found(live, canary) for canary in counted) / len(counted)
    note = "" if counted else "no canary with a known answer"
    if absent:
        note = (
            f"not in the index, so not asked: {', '.join(str(canary.known) for canary in absent[:EXAMPLES])}"
        )
    return Measure(
        name="known answers missed",
        meaning="Share of the canaries with a known answer that is not among the candidate's first ten.",
        value=value,
        before=before,
        worse=value,
        limit=limit,
        counted=len(counted),
        note=note,
        examples=[f"{canary.name}: {canary.known}" for canary in missed[:EXAMPLES]],
    )


def _found(generation: Generation, canary: Canary) -> bool | None:
    """Whether a known answer, or one of the same weights, is among the first ten; None where its model is not held."""
    repo, _, logit = str(canary.known).partition("#")
    rows = rows_of(generation, [repo])
    if not rows:
        return None
    meant = {int(logit)} if logit.isdecimal() else _labelled(rows[0].labels, logit)
    hits = first(generation, canary.name, FIRST)
    same = {
        row.version
        for row in rows_of(generation, [hit.repo for hit in hits])
        if row.weights == rows[0].weights
    }
    return any((hit.repo, hit.sha) in same and hit.logit in meant and not hit.negated for hit in hits)


def _labelled(labels: Sequence[str], wanted: str) -> set[int]:
    return {number for number, label in enumerate(labels) if normal_name(label) == normal_name(wanted)}


_MODELS = 400


def gone_measure(candidate: Generation, live: Generation | None, limit: float) -> Measure:
    """Share of the live generation's repositories that the candidate lacks."""
    value = worse = None
    note, gone, count = "", [], 0
    if live is None:
        note = "there is no live generation to compare with"
    else:
        repos = [model.repo for model in sampled_models(live, _MODELS)]
        there = {row.repo for row in rows_of(candidate, repos)}
        gone, count = [repo for repo in repos if repo not in there], len(repos)
        if count:
            value, worse = len(gone) / count, wilson(len(gone), count)[0]
    return Measure(
        name="models gone",
        meaning="Share of the live generation's repositories that the candidate lacks; and the least that it can be, "
        "seen from a sample.",
        value=value,
        before=None,
        worse=worse,
        limit=limit,
        counted=count,
        note=note,
        examples=gone[:EXAMPLES],
    )

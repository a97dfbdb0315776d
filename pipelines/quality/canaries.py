"""Canary queries: which of the live generation's first answers a candidate loses, and whether known answers are found.

Damage must be told from ordinary growth. An answer among the live generation's first ten should be among the
candidate's first ten, unless there is a reason outside of the index:

- Its model left the catalogue, or has another sha: not counted. The number of removed models is a measure of its own
  (`removed_measure`), or a crawl that lost half of the Hub would pass as growth.
- Models that the live generation does not hold score higher: they are skipped when the candidate's first ten are
  counted. Where so many of them answer that this cannot be decided, the answer is not counted.
- Another repository with the same weights answers instead: the same answer.
- The settings of the method changed (encoder, prompts, probes, background): the answers should change. The loss is
  reported and not judged; declared labels judge such a generation.

The remaining losses are answers that the same logits no longer give to the same query: rows mixed up, missing, or
described wrongly. A few are ordinary too: each publish fits temperature and basis again, and the tenth answer may
become the eleventh.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.job.job import read_names
from pipelines.quality.generators import finds_generator
from pipelines.quality.measure import EXAMPLES, Measure, gone
from pipelines.quality.samples import Answer, Asking, Version, draw, rows_of, sampled_models
from probelog.errors import QueryError, UsageError
from probelog.index.generation import Generation
from probelog.ranking.names import normal_name
from probelog.search.client import Index
from probelog.search.results import Hit

# Number of answers that a reader sees.
FIRST = 10
# Number of answers requested where new models are among the first ten.
_DEEPER = 60
# With fewer answers to compare, a swap at the tenth place would be a large share.
LEAST_ANSWERS = 50


@dataclass(frozen=True)
class Canary:
    """A name to query, and what must be among the first ten answers, where known.

    ``known`` is a logit (``REPO#LOGIT`` or ``REPO#LABEL``) that recognises it, or a generator (``REPO``) that makes it.
    """

    name: str
    known: str | None = None

    @property
    def by_generator(self) -> bool:
        """Whether a generator must answer."""
        return self.known is not None and "#" not in self.known


def read_canaries(source: Sequence[str] | Path | None) -> list[Canary]:
    """An operator's canaries: a list of lines or a text file of such, ``name``, ``name<TAB>repo#logit-or-label``
    or ``name<TAB>repo`` of a generator.

    Raises:
        UsageError: the file cannot be read, or a line has another form.
    """
    if source is None:
        return []
    lines = read_names(source, "canaries") if isinstance(source, Path) else list(source)
    return [_canary(line) for line in lines]


def _canary(line: str) -> Canary:
    name, mark, known = line.partition("\t")
    name, known = name.strip(), known.strip()
    repo, _, logit = known.partition("#")
    if not name or (mark and not (repo and (logit or "#" not in known))):
        raise UsageError(
            f"quality.canaries: {line!r}: write a name, or name<TAB>REPO#LOGIT, a logit's number or label, "
            "or name<TAB>REPO, a generator"
        )
    return Canary(name, known or None)


def background_canaries(background: Sequence[str], count: int) -> list[Canary]:
    """``count`` of the background's names, drawn by hash."""
    return [Canary(name) for name in draw(background, count)]


# Lost answers


@dataclass(frozen=True)
class Compared:
    """One canary's answers: number of the live first ten that count, and those of them that are lost."""

    name: str
    counted: int
    lost: list[Answer]


@dataclass(frozen=True)
class KnownModels:
    """Some models of a generation: the digest of their weights by version, None where it is unknown."""

    versions: Mapping[Version, str | None]


def compare(
    live_hits: Sequence[Answer],
    candidate_hits: Sequence[Answer],
    requested: int,
    live_models: KnownModels,
    candidate_models: KnownModels,
) -> tuple[int, list[Answer]]:
    """Number of the first answers that count, and those of them that are lost, by the rules of this module.

    Args:
        live_hits: the live generation's first ten.
        candidate_hits: the candidate's first answers.
        requested: number of answers that were requested from the candidate.
        live_models: the live generation's models among those that answered in either.
        candidate_models: the candidate's models among those that answered in either.
    """
    live_identities = [_identities(hit, live_models) for hit in live_hits]
    identities_found: set[_Identity] = set()
    places = 0
    for hit in candidate_hits:
        identities = _identities(hit, candidate_models)
        if (hit.repo, hit.sha) not in live_models.versions and not any(
            identities & identities_of_hit for identities_of_hit in live_identities
        ):
            continue
        if places == FIRST:
            break
        places += 1
        identities_found |= identities
    crowded = places < FIRST and len(candidate_hits) == requested
    counted, lost = 0, []
    for hit, identities_of_hit in zip(live_hits, live_identities, strict=True):
        still_found = bool(identities_of_hit & identities_found)
        if still_found or ((hit.repo, hit.sha) in candidate_models.versions and not crowded):
            counted += 1
            if not still_found:
                lost.append(hit)
    return counted, lost


_Identity = tuple[str, str, int, bool]


def _identities(hit: Answer, models: KnownModels) -> set[_Identity]:
    """Identities of an answer: its logit of its model, and its logit of its weights where their digest is known."""
    identities: set[_Identity] = {(hit.repo, hit.sha, hit.logit, hit.negated)}
    if digest := models.versions.get((hit.repo, hit.sha)):
        identities.add(("", digest, hit.logit, hit.negated))
    return identities


def _search(generation: Generation, name: str, count: int) -> list[Hit]:
    return list(Index(generation.index, pinned=generation).search(name, k=count))


def _digests(generation: Generation, repos: Iterable[str]) -> dict[Version, str | None]:
    return {row.version: row.weight_digest for row in rows_of(generation, repos)}


def _shown(hit: Answer) -> str:
    return f"{hit.repo}#{hit.logit} ({hit.label})"


CLASSIFIERS = Asking(_search, _digests, "lost answers", _shown)


def lost_answers(
    candidate: Generation,
    live: Generation | None,
    canaries: Sequence[Canary],
    limit: float,
    unlike: str,
    asking: Asking = CLASSIFIERS,
) -> Measure:
    """Share of the live first answers to canaries that the candidate lost.

    Args:
        candidate: not yet live.
        live: the live generation; None without one.
        canaries: the queries.
        limit: of the share.
        unlike: names of the settings that differ; empty where the two have the same.
        asking: how the models are asked for.
    """
    compared = _compare_canaries(candidate, live, canaries, asking) if live is not None else []
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
        name=asking.lost,
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
            + ", ".join(asking.shown(hit) for hit in item.lost[:3])
            for item in worst
            if item.lost
        ],
    )


def _compare_canaries(
    candidate: Generation, live: Generation, canaries: Sequence[Canary], asking: Asking
) -> list[Compared]:
    live_hits: dict[str, Sequence[Answer]] = {}
    candidate_hits: dict[str, tuple[Sequence[Answer], int]] = {}
    for name in dict.fromkeys(canary.name for canary in canaries):
        try:
            live_hits[name] = asking.search(live, name, FIRST)
        except QueryError:
            continue  # its encoder knows no word of it: there are no answers to lose
        candidate_hits[name] = first(candidate, name, FIRST, asking), FIRST

    def models(generation: Generation) -> KnownModels:
        """The models of a generation among those that answered in either of the two."""
        repos = {hit.repo for hits in live_hits.values() for hit in hits}
        repos |= {hit.repo for hits, _ in candidate_hits.values() for hit in hits}
        return KnownModels(asking.versions(generation, repos))

    live_models = models(live)
    for name, (hits, _) in candidate_hits.items():
        if any((hit.repo, hit.sha) not in live_models.versions for hit in hits):
            candidate_hits[name] = first(candidate, name, _DEEPER, asking), _DEEPER
    live_models, candidate_models = models(live), models(candidate)
    return [
        Compared(name, *compare(hits, *candidate_hits[name], live_models, candidate_models))
        for name, hits in live_hits.items()
    ]


def first(generation: Generation, name: str, count: int, asking: Asking = CLASSIFIERS) -> Sequence[Answer]:
    """A generation's first ``count`` answers to a name; none where its encoder knows no word of it."""
    try:
        return asking.search(generation, name, count)
    except QueryError:
        return []


# Known answers


def known_answers(
    candidate: Generation, live: Generation | None, canaries: Sequence[Canary], limit: float
) -> Measure:
    """Share of the canaries with a known answer whose answer the candidate's first ten lack.

    The operator's answer counts whatever the live generation answers. It is not counted if its repository is not in the
    index: its owner may delete it any day.
    """
    with_answer = [canary for canary in canaries if canary.known is not None]
    is_found = {canary: _finds_known_answer(candidate, canary) for canary in with_answer}
    counted = [canary for canary in with_answer if is_found[canary] is not None]
    absent = [canary for canary in with_answer if is_found[canary] is None]
    missed = [canary for canary in counted if not is_found[canary]]
    value = len(missed) / len(counted) if counted else None
    live_share = None
    if live is not None and counted:
        live_share = sum(not _finds_known_answer(live, canary) for canary in counted) / len(counted)
    note = "" if counted else "no canary with a known answer"
    if absent:
        note = f"not in the index, so not queried: {', '.join(str(canary.known) for canary in absent[:EXAMPLES])}"
    return Measure(
        name="known answers missed",
        meaning="Share of the canaries with a known answer that is not among the candidate's first ten.",
        value=value,
        before=live_share,
        worse=value,
        limit=limit,
        counted=len(counted),
        note=note,
        examples=[f"{canary.name}: {canary.known}" for canary in missed[:EXAMPLES]],
    )


def _finds_known_answer(generation: Generation, canary: Canary) -> bool | None:
    """Whether a known answer, or one of the same weights, is among the first ten; None if its model is not indexed."""
    if canary.by_generator:
        return finds_generator(generation, canary.name, str(canary.known))
    repo, _, logit = str(canary.known).partition("#")
    rows = rows_of(generation, [repo])
    if not rows:
        return None
    meant = {int(logit)} if logit.isdecimal() else _logits_labelled(rows[0].labels, logit)
    hits = first(generation, canary.name, FIRST)
    same = {
        row.version
        for row in rows_of(generation, [hit.repo for hit in hits])
        if row.weights == rows[0].weights
    }
    return any((hit.repo, hit.sha) in same and hit.logit in meant and not hit.negated for hit in hits)


def _logits_labelled(labels: Sequence[str], requested: str) -> set[int]:
    return {number for number, label in enumerate(labels) if normal_name(label) == normal_name(requested)}


_MODELS = 400


def removed_measure(candidate: Generation, live: Generation | None, limit: float) -> Measure:
    """Share of the live generation's repositories that the candidate lacks."""
    if live is None:
        return gone("models", "repositories", (), (), limit, "there is no live generation to compare with")
    repos = [model.repo for model in sampled_models(live, _MODELS)]
    held = {row.repo for row in rows_of(candidate, repos)}
    return gone("models", "repositories", repos, held, limit)

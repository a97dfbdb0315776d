"""Generators in the quality gate: known answers, and which of the live generation's the candidate lacks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.quality.measure import Measure, gone
from pipelines.quality.samples import Asking, Version, draw
from probelog.arrays import values_of
from probelog.errors import QueryError
from probelog.index.generation import Generation
from probelog.index.tables import sql_in
from probelog.search.client import Index

# Number of answers that a reader sees.
_FIRST = 10
# Repositories of the live generation that are looked for in the candidate.
_COMPARED = 400


def finds_generator(generation: Generation, name: str, repo: str) -> bool | None:
    """Whether a generator, or one that makes the same samples, is among the first ten; None if it is not indexed."""
    if generation.settings.generators is None or (known := generation.generators.named(repo)) is None:
        return None
    try:
        hits = Index(generation.index, pinned=generation).search(name, kind="generator", k=_FIRST)
    except QueryError:
        return False
    rows = (generation.generators.named(hit.repo) for hit in hits)
    return any(row is not None and row["row"] == known["row"] for row in rows)


@dataclass(frozen=True)
class _Made:
    """A generator as an answer that is compared: no logit of it is one."""

    repo: str
    sha: str
    logit: int = 0
    negated: bool = False
    label: str = ""


def _search(generation: Generation, name: str, count: int) -> list[_Made]:
    hits = Index(generation.index, pinned=generation).search(name, kind="generator", k=count)
    return [_Made(hit.repo, hit.sha) for hit in hits]


def _identities(generation: Generation, repos: Iterable[str]) -> dict[Version, str | None]:
    rows = generation.generators.called(repos, ["repo", "sha", "identity"])
    return {(row["repo"], row["sha"]): row["identity"] for row in rows}


GENERATORS = Asking(_search, _identities, "lost generators", lambda hit: hit.repo)


def removed_generators(candidate: Generation, live: Generation | None, limit: float) -> list[Measure]:
    """Share of the live generation's generators that the candidate lacks; no measure where neither has any."""
    if live is None or live.settings.generators is None:
        return []
    if candidate.settings.generators is None:
        return [
            gone(
                "generators", "generators", (), (), limit, "not judged: generators are not published any more"
            )
        ]
    repos = draw(values_of(live.generators.rows(["repo"])["repo"], str), _COMPARED)
    held = values_of(candidate.generators.rows(["repo"], sql_in("repo", repos))["repo"], str)
    return [gone("generators", "generators", repos, set(held), limit)]

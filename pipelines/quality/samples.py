"""Samples of a generation's models, drawn by the hash of their names: the same in every run while they are indexed.

The size of a sample does not depend on that of the generation, and neither does the gate's cost; only the column of
the repositories' names is scanned (a quarter of a second for a million).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from probelog.arrays import values_of
from probelog.index.tables import is_valid_sql_text

if TYPE_CHECKING:
    from probelog.index.generation import Generation

_COLUMNS = ["repo", "sha", "weights", "weight_digest", "head", "labels", "first_row", "rows"]

Version = tuple[str, str]
"""A model: repository and sha."""


@dataclass(frozen=True)
class Sampled:
    """One model of a sample, as the ``models`` table has it."""

    repo: str
    sha: str
    weights: int
    weight_digest: str | None
    head: str
    labels: Sequence[str]
    first_row: int
    rows: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Sampled:
        """From a row of the table."""
        return cls(**{name: row[name] for name in _COLUMNS} | {"labels": row["labels"] or []})

    @property
    def version(self) -> Version:
        """Repository and sha."""
        return self.repo, self.sha


class Answer(Protocol):
    """What is compared of an answer."""

    @property
    def repo(self) -> str: ...
    @property
    def sha(self) -> str: ...
    @property
    def logit(self) -> int: ...
    @property
    def negated(self) -> bool: ...
    @property
    def label(self) -> str: ...


@dataclass(frozen=True)
class Asking:
    """How one kind of models is asked for.

    Attributes:
        search: the first answers of a generation to a name; as many as are wanted.
        versions: what equal models of a generation have in common, by version, of some repositories; None where unknown.
        lost: name of the measure of lost answers.
        shown: an answer as examples name it.
    """

    search: Callable[[Generation, str, int], Sequence[Answer]]
    versions: Callable[[Generation, Iterable[str]], Mapping[Version, str | None]]
    lost: str
    shown: Callable[[Answer], str]


def hashed(text: str) -> str:
    """MD5 of a text as hexadecimal digits, as SQL's ``md5`` gives it; samples are drawn by it."""
    return hashlib.md5(text.encode("utf-8", "replace"), usedforsecurity=False).hexdigest()


def draw(names: Iterable[str], count: int) -> list[str]:
    """The at most ``count`` names with the smallest hashes, each once, in the order of the hashes."""
    return sorted(set(names), key=hashed)[:count]


def sampled_models(generation: Generation, count: int) -> list[Sampled]:
    """At most ``count`` models of a generation, by the hashes of their repositories."""
    total = generation.settings.models
    # Twice as many as requested on average; eight hexadecimal digits resolve shares of 2^-32.
    share = min(1.0, 2 * count / max(1, total))
    below = None if share >= 1.0 else f"md5(repo) < '{int(share * 16**8):08x}'"
    repos = values_of(generation.models_table(["repo"], below)["repo"], str)
    return rows_of(generation, draw(repos, count))


def rows_of(generation: Generation, repos: Iterable[str]) -> list[Sampled]:
    """The models of some repositories that a generation holds, sorted by repository."""
    valid_repos = (repo for repo in repos if is_valid_sql_text(repo))
    rows = map(Sampled.of, generation.models_named("repo", valid_repos, _COLUMNS))
    return sorted(rows, key=lambda row: row.version)


def added_versions(candidate: Generation, live: Generation) -> list[Version]:
    """The models that a candidate holds and the live generation does not.

    Reads the names of all models of both, some 70 MB for a million: a publisher that knows the added models passes them.
    """
    candidate_versions, live_versions = (
        set(zip(values_of(table["repo"], str), values_of(table["sha"], str), strict=True))
        for table in (generation.models_table(["repo", "sha"]) for generation in (candidate, live))
    )
    return sorted(candidate_versions - live_versions)

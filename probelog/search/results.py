"""What the query client answers with: small typed lists that are Arrow tables too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import overload

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Hit:
    """One logit that answers a query.

    ``score`` is higher for better answers: the log-odds of the query against an average background concept, given
    the logit (``probelog.ranking.matched_heads``; above zero: the logit looks more like the query than like the background).
    ``confidence`` is the probability that the logit recognises the query, as far as the index's own declared labels
    tell (``probelog.ranking.confidence``); none for questions by a logit. ``distance`` is the cosine distance of their
    directions in the encoder's space. ``negated`` marks the opposite of a one-logit head's concept. ``duplicates`` counts the other repositories with the same weights, folded into this answer. ``label`` is what
    the uploader declared: untrusted text, as it was written.
    """

    rank: int
    repo: str
    sha: str
    logit: int
    label: str
    score: float
    confidence: float | None
    distance: float
    negated: bool
    duplicates: int
    head: str
    library: str
    architecture: str
    licence: str | None
    downloads: int | None
    likes: int | None
    probes: list[int]


@dataclass(frozen=True, slots=True)
class ModelHit:
    """One model that does what another one does.

    ``score`` is the mean, over the other one's logits, of the score of this model's best logit for each.
    ``duplicates`` counts the other repositories with the same weights, folded into this answer.
    """

    rank: int
    repo: str
    sha: str
    score: float
    logits: int
    duplicates: int
    head: str
    library: str
    architecture: str
    licence: str | None
    downloads: int | None
    likes: int | None


@dataclass(frozen=True, slots=True)
class LogitSummary:
    """What one logit of a model recognises: the background concepts it stands for most likely, and their scores."""

    logit: int
    label: str
    negated: bool
    concepts: list[str]
    scores: list[float]
    probes: list[int]


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """The facts of one model of the index and what each of its logits recognises."""

    repo: str
    sha: str
    head: str
    library: str
    architecture: str
    parameters: int | None
    licence: str | None
    downloads: int | None
    likes: int | None
    observed: int
    same_weights: list[str]
    logits: list[LogitSummary]


_HIT_FIELDS: list[tuple[str, pa.DataType]] = [
    ("rank", pa.int32()),
    ("repo", pa.string()),
    ("sha", pa.string()),
    ("logit", pa.int32()),
    ("label", pa.string()),
    ("score", pa.float64()),
    ("confidence", pa.float64()),
    ("distance", pa.float64()),
    ("negated", pa.bool_()),
    ("duplicates", pa.int32()),
    ("head", pa.string()),
    ("library", pa.string()),
    ("architecture", pa.string()),
    ("licence", pa.string()),
    ("downloads", pa.int64()),
    ("likes", pa.int64()),
    ("probes", pa.list_(pa.int32())),
]
_HIT_SCHEMA = pa.schema(_HIT_FIELDS)


class Results(Sequence[Hit]):
    """The answers to one query, best first, with what the searcher should know about them (``notes``)."""

    def __init__(self, hits: Sequence[Hit], notes: Sequence[str] = ()) -> None:
        self._hits = list(hits)
        self.notes = list(notes)

    @overload
    def __getitem__(self, item: int) -> Hit: ...
    @overload
    def __getitem__(self, item: slice) -> list[Hit]: ...
    def __getitem__(self, item: int | slice) -> Hit | list[Hit]:
        return self._hits[item]

    def __len__(self) -> int:
        return len(self._hits)

    def __repr__(self) -> str:
        return f"Results({self._hits!r})"

    def to_arrow(self) -> pa.Table:
        """The same answers as an Arrow table, a row a hit."""
        return pa.Table.from_pylist([asdict(hit) for hit in self._hits], schema=_HIT_SCHEMA)

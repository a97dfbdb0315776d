"""Results of the query client: small typed lists that convert to Arrow tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import overload

import pyarrow as pa

from probelog.storage.schemas import ListedFacts, TreeFacts, arrow_fields

_INT32 = {"arrow": pa.int32()}


@dataclass(frozen=True, kw_only=True)
class _Ranked:
    """The first fields of every answer: dataclass fields of the last base class come first."""

    rank: int = field(metadata=_INT32)
    repo: str
    sha: str


@dataclass(frozen=True, kw_only=True)
class ModelFacts(TreeFacts, ListedFacts):
    """Facts about the model of an answer, besides those of the Hub's listing (``ListedFacts``) and its tree's."""

    repo: str
    sha: str
    head: str
    library: str
    architecture: str


@dataclass(frozen=True, kw_only=True)
class Hit(ModelFacts, _Ranked):
    """One logit that answers a query.

    ``score`` is higher for better answers: the log-odds of the query against an average background concept, given
    the logit (``probelog.ranking.matched_heads``; above zero: the logit looks more like the query than like the background).
    ``confidence`` is the probability that the logit recognises the query, as far as the index's own declared labels
    tell (``probelog.ranking.confidence``); none for queries by a logit. ``distance`` is the cosine distance of their
    directions in the encoder's space. ``negated`` marks the opposite of a one-logit head's concept. ``duplicates`` counts the other repositories with the same weights, folded into this answer; ``relatives``, where answers
    are folded by family, the other models of its tree that may answer. ``label`` is what the uploader declared: untrusted text, as it was written.
    """

    logit: int = field(metadata=_INT32)
    label: str
    score: float
    confidence: float | None
    distance: float
    negated: bool
    duplicates: int = field(metadata=_INT32)
    probes: list[int] = field(metadata={"arrow": pa.list_(pa.int32())})
    relatives: int | None = field(default=None, metadata=_INT32)


@dataclass(frozen=True, kw_only=True)
class ModelHit(ModelFacts, _Ranked):
    """One model that recognises what another model does.

    ``score`` is the mean, over the other model's logits, of the score of this model's best logit for each.
    ``duplicates`` and ``relatives``: as of a hit.
    """

    score: float
    logits: int
    duplicates: int
    relatives: int | None = None


@dataclass(frozen=True, slots=True)
class LogitSummary:
    """What one logit of a model recognises: the background concepts it stands for most likely, and their scores."""

    logit: int
    label: str
    negated: bool
    concepts: list[str]
    scores: list[float]
    probes: list[int]


@dataclass(frozen=True, kw_only=True)
class ModelSummary(ModelFacts):
    """The facts of one model of the index and what each of its logits recognises."""

    parameters: int | None
    observed: int
    same_weights: list[str]
    logits: list[LogitSummary]


_HIT_SCHEMA = pa.schema(arrow_fields(Hit))


class Results(Sequence[Hit]):
    """The answers to one query, best first, and ``notes``: lines to show beside them (unknown words, low confidence)."""

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
        """The same answers as an Arrow table with one row per hit."""
        return pa.Table.from_pylist([asdict(hit) for hit in self._hits], schema=_HIT_SCHEMA)

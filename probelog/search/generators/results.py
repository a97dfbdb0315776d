"""Generators as answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import ClassVar

import pyarrow as pa

from probelog.errors import QueryError
from probelog.search.results import Answers, Origin, Tabular, name_of
from probelog.storage.schemas import ListedFacts, TreeFacts, arrow_fields

_INT32 = {"arrow": pa.int32()}


@dataclass(frozen=True, kw_only=True)
class GeneratorFacts(TreeFacts, ListedFacts):
    """Facts about a generator, besides those of the Hub's listing and its tree's.

    ``url`` is the Hub's page of just this commit, ``base_repo`` what an adapter was run with. ``samples`` were made, by
    ``steps`` of the sampler; ``pictures`` of them are kept. ``strength`` and ``consistency`` say how far an adapter's
    samples are from its base's, and how alike they are in that. Trigger words, prompts and classes are untrusted text.
    """

    repo: str
    sha: str
    url: str
    pipeline: str
    architecture: str
    conditioning: str
    image_size: int | None = field(metadata=_INT32)
    parameters: int | None
    base_repo: str | None
    base_sha: str | None
    trigger_words: list[str]
    classes: list[str]
    samples: int = field(metadata=_INT32)
    steps: int | None = field(metadata=_INT32)
    pictures: int = field(metadata=_INT32)
    strength: float | None
    consistency: float | None


@dataclass(frozen=True, kw_only=True)
class _Ranked:
    rank: int = field(metadata=_INT32)
    repo: str
    sha: str


@dataclass(frozen=True, slots=True)
class MadeLogit:
    """A logit of the classifier that was asked with, which recognises what a generator makes: its number in the head.

    ``label`` is what the uploader declared: untrusted text. ``score`` is the generator's for this logit alone.
    """

    logit: int
    label: str
    score: float


@dataclass(frozen=True, kw_only=True, repr=False)
class GeneratorHit(GeneratorFacts, _Ranked):
    """One generator that answers a query.

    ``score`` is higher for better answers: the log-odds of the query against an average background concept, given the
    samples (``probelog.ranking.samples.matched``), or what another method gives. ``confidence`` is the probability that it
    makes the concept; none for queries by a model, and for other methods. ``distance`` is the cosine distance of the query
    to the mean of the samples, as directions. ``duplicates`` counts the other repositories that make the same samples;
    ``relatives``, where answers are folded by family, the other generators of its tree that pass the filter.
    ``found_by``, where a classifier is asked with, are those of its logits that recognise most surely what it makes.
    """

    score: float
    confidence: float | None
    distance: float
    duplicates: int = field(metadata=_INT32)
    relatives: int | None = field(default=None, metadata=_INT32)
    found_by: list[MadeLogit] = field(default_factory=list)

    # Set by the index that answers; no field, so that it is no part of what is compared, shown or converted.
    _origin: ClassVar[Origin | None] = None

    @property
    def thumbnails(self) -> list[bytes]:
        """Some of its samples as pictures (WebP), read from the index now.

        Raises:
            QueryError: the index does not hold the repository by now.
        """
        if self._origin is None:
            raise QueryError("this hit was not given by an index: search for it again")
        return self._origin.index.generator_samples(self.repo)

    def __repr__(self) -> str:
        sure = "" if self.confidence is None else f", confidence {self.confidence:.0%}"
        return f"<GeneratorHit {self.rank}: {name_of(self.repo)}, score {self.score:.2f}{sure}>"


@dataclass(frozen=True, kw_only=True, repr=False)
class GeneratorSummary(Tabular, GeneratorFacts):
    """The facts of one generator, and what it makes: the likeliest background concepts, with their log-odds."""

    prompts: list[str]
    same_samples: list[str]
    concepts: list[str]
    scores: list[float]

    def __repr__(self) -> str:
        return f"<GeneratorSummary {name_of(self.repo)}: {', '.join(self.concepts[:3])}>"

    def to_arrow(self) -> pa.Table:
        """The same as an Arrow table of one row."""
        return pa.Table.from_pylist([asdict(self)], schema=pa.schema(arrow_fields(type(self))))


class GeneratorResults(Answers[GeneratorHit]):
    """The generators that answer a query, best first, and ``notes``: lines to show beside them."""

    _ROW, _NAME = GeneratorHit, "generator"

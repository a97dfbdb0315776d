"""Results of the query client: small typed lists that convert to tables of Arrow, pandas and Polars."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar, overload

import pyarrow as pa

from probelog.errors import QueryError, UsageError
from probelog.storage.schemas import ListedFacts, TreeFacts, arrow_fields

if TYPE_CHECKING:
    # None is installed with ProbeLog: each is imported when somebody asks for it.
    import pandas  # type: ignore[import-untyped, import-not-found, unused-ignore]
    import polars  # type: ignore[import-not-found, unused-ignore]
    from _typeshed import DataclassInstance

    from probelog.search.client import Index
    from probelog.search.evidence import Evidence

T = TypeVar("T")

_INT32 = {"arrow": pa.int32()}
# Letters of a label that a ``repr`` shows.
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an answer is from, for what is read later: its index, and its row in one generation."""

    index: Index
    generation: str
    row: int


class _HasArrow(Protocol):
    def to_arrow(self) -> pa.Table: ...


class Tabular:
    """What every answer of the client can become, by way of its Arrow table."""

    def to_pandas(self: _HasArrow) -> pandas.DataFrame:
        """The same as a pandas data frame.

        Raises:
            UsageError: pandas is not installed.
        """
        _import("pandas", "to_pandas")
        return self.to_arrow().to_pandas()

    def to_polars(self: _HasArrow) -> polars.DataFrame:
        """The same as a Polars data frame.

        Raises:
            UsageError: Polars is not installed.
        """
        frame: polars.DataFrame = _import("polars", "to_polars").DataFrame(self.to_arrow())
        return frame

    def __arrow_c_stream__(self: _HasArrow, requested_schema: object | None = None) -> object:
        """The same for any library that reads Arrow streams: ``duckdb``, ``polars.DataFrame(results)``."""
        stream: object = self.to_arrow().__arrow_c_stream__(requested_schema)  # type: ignore[no-untyped-call]
        return stream


def _import(package: str, method: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(
            f"{method}() needs {package}: pip install {package}, or use to_arrow(), which needs nothing more"
        ) from error


class Answers(Tabular, Sequence[T]):
    """Answers in their order, and ``notes``: lines to show beside them. Equal to any list of the same answers."""

    _ROW: ClassVar[type[DataclassInstance]]
    _NAME: ClassVar[str]

    def __init__(self, answers: Iterable[T], notes: Sequence[str] = ()) -> None:
        self._answers = list(answers)
        self.notes = list(notes)

    @overload
    def __getitem__(self, item: int) -> T: ...
    @overload
    def __getitem__(self, item: slice) -> list[T]: ...
    def __getitem__(self, item: int | slice) -> T | list[T]:
        return self._answers[item]

    def __len__(self) -> int:
        return len(self._answers)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Answers):
            return self._answers == other._answers and self.notes == other.notes
        return self._answers == other if isinstance(other, list) else NotImplemented

    __hash__ = None  # type: ignore[assignment] # of equal lists, as of all others

    def __repr__(self) -> str:
        first = f", first {self._answers[0]!r}" if self._answers else ""
        return f"<{type(self).__name__}: {_counted(len(self), self._NAME)}{first}>"

    def to_arrow(self) -> pa.Table:
        """The same answers as an Arrow table, a row each."""
        rows = [asdict(answer) for answer in self._answers]  # type: ignore[call-overload]
        return pa.Table.from_pylist(rows, schema=_schema(self._ROW))


@functools.cache
def _schema(record: type[DataclassInstance]) -> pa.Schema:
    return pa.schema(arrow_fields(record))


def _counted(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"


@dataclass(frozen=True, kw_only=True)
class _Ranked:
    """The first fields of every answer: dataclass fields of the last base class come first."""

    rank: int = field(metadata=_INT32)
    repo: str
    sha: str


@dataclass(frozen=True, kw_only=True)
class ModelFacts(TreeFacts, ListedFacts):
    """Facts about the model of an answer, besides those of the Hub's listing (``ListedFacts``) and its tree's.

    ``url`` is the Hub's page of just this commit.
    """

    repo: str
    sha: str
    url: str
    head: str
    library: str
    architecture: str


@dataclass(frozen=True, kw_only=True, repr=False)
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

    # Set by the index that answers; no field, so that it is no part of what is compared, shown or converted.
    _origin: ClassVar[Origin | None] = None

    @property
    def evidence(self) -> Evidence:
        """The probes that fire the logit most and least, read from the index now.

        Raises:
            QueryError: the index holds another commit of the repository by now.
        """
        return self._index.evidence_of([self])[0]

    def snippet(self, image: str = "image.jpg") -> str:
        """Python code that loads just this commit and computes this logit of an image, as it was probed.

        Args:
            image: path of the image in the code.

        Raises:
            QueryError: the index does not say how the model was run (older versions), or holds another commit by now.
        """
        return self._index._snippet(self.repo, self.logit, image, self.sha)

    @property
    def _index(self) -> Index:
        if self._origin is None:
            raise QueryError("this hit was not given by an index: search for it again")
        return self._origin.index

    def __repr__(self) -> str:
        sure = "" if self.confidence is None else f", confidence {self.confidence:.0%}"
        label = self.label if len(self.label) <= _SHOWN else f"{self.label[: _SHOWN - 1]}…"
        opposite = "not " * self.negated
        return f"<Hit {self.rank}: {name_of(self.repo)}#{self.logit} {opposite}{label!r}, score {self.score:.2f}{sure}>"


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelHit(ModelFacts, _Ranked):
    """One model that recognises what another model does.

    ``score`` is the mean, over the other model's logits, of the score of this model's best logit for each.
    ``duplicates`` and ``relatives``: as of a hit.
    """

    score: float
    logits: int
    duplicates: int
    relatives: int | None = None

    def __repr__(self) -> str:
        return f"<ModelHit {self.rank}: {name_of(self.repo)}, score {self.score:.3f}>"


@dataclass(frozen=True, slots=True)
class ConceptMatch:
    """A model's best logit for one of several concepts, with the fields of a hit."""

    concept: str
    logit: int
    label: str
    negated: bool
    score: float
    confidence: float


@dataclass(frozen=True, kw_only=True, repr=False)
class DomainHit(ModelFacts, _Ranked):
    """One model that covers a set of concepts.

    ``coverage`` is its mean confidence over the concepts, by which models are ordered. ``matches`` has its best logit for
    each concept, in their order; ``lacks`` names those that it recognises with too little confidence. ``duplicates`` and
    ``relatives``: as of a hit.
    """

    coverage: float
    matches: list[ConceptMatch]
    lacks: list[str]
    duplicates: int
    relatives: int | None = None

    def __repr__(self) -> str:
        return f"<DomainHit {self.rank}: {name_of(self.repo)}, covers {self.coverage:.0%}, lacks {len(self.lacks)}>"


@dataclass(frozen=True, slots=True)
class LogitSummary:
    """What one logit of a model recognises: the background concepts it stands for most likely, and their scores."""

    logit: int
    label: str
    negated: bool
    concepts: list[str]
    scores: list[float]
    probes: list[int]


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelSummary(Tabular, ModelFacts):
    """The facts of one model of the index and what each of its logits recognises."""

    parameters: int | None
    observed: int
    same_weights: list[str]
    logits: list[LogitSummary]

    def __repr__(self) -> str:
        return f"<ModelSummary {name_of(self.repo)}: {_counted(len(self.logits), 'logit')}>"

    def to_arrow(self) -> pa.Table:
        """What the logits recognise as an Arrow table, a row each."""
        rows = [{"repo": self.repo, "sha": self.sha, **asdict(item)} for item in self.logits]
        return pa.Table.from_pylist(rows, schema=_SUMMARY_SCHEMA)


_OF_SUMMARIES: list[tuple[str, pa.DataType]] = [("repo", pa.string()), ("sha", pa.string())]
_SUMMARY_SCHEMA = pa.schema([*_OF_SUMMARIES, *arrow_fields(LogitSummary)])


class Results(Answers[Hit]):
    """The answers to one query, best first, and ``notes``: lines to show beside them (unknown words, low confidence)."""

    _ROW, _NAME = Hit, "hit"

    def _repr_html_(self) -> str:
        from probelog.search.page import answers_table

        return answers_table(self)


class ModelResults(Answers[ModelHit]):
    """Models that recognise what another one does, best first."""

    _ROW, _NAME = ModelHit, "model"


class DomainResults(Answers[DomainHit]):
    """The models that cover a set of concepts, best first, and ``notes``."""

    _ROW, _NAME = DomainHit, "model"


def name_of(repo: str) -> str:
    """A repository's name without what could disguise a line of a terminal."""
    return repr(repo)[1:-1]

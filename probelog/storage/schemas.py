"""What the stages hand to each other: versioned Arrow schemas and the typed records behind them.

Each schema carries its name and version in its metadata. Readers accept their own version and the one before;
a newer one is refused with a message that says so, never half understood.
"""

from __future__ import annotations

import builtins
import dataclasses
import datetime as dt
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from probelog.credentials import redacted
from probelog.errors import FailureReason
from probelog.storage.versions import schema_metadata

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_TIME = pa.timestamp("ms", tz="UTC")
_STRINGS = pa.list_(pa.string())


def _schema(name: str, version: int, fields: list[tuple[str, pa.DataType]]) -> pa.Schema:
    return pa.schema(fields, metadata=schema_metadata(name, version))


FAILURES = _schema(
    "failures",
    1,
    [
        ("repo", pa.string()),
        ("sha", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("attempts", pa.int32()),
        ("retryable", pa.bool_()),
        ("at", _TIME),
    ],
)

# Receipts as they were written, and the rows of their parts of failures (`probelog.storage.bundles`).
BUNDLE = _schema(
    "receipt-bundle",
    1,
    [
        ("name", pa.string()),
        ("receipt", pa.large_binary()),
        ("failures", pa.list_(pa.struct(list(FAILURES)))),
    ],
)

OBSERVATIONS = _schema(
    "observations",
    1,
    [
        ("repo", pa.string()),
        ("sha", pa.string()),
        ("logit", pa.int32()),
        ("scale", pa.float32()),
        ("offset", pa.float32()),
        ("values", pa.list_(pa.float16())),
    ],
)

PROBED_MODELS = _schema(
    "probed-models",
    1,
    [
        ("repo", pa.string()),
        ("sha", pa.string()),
        ("logits", pa.int32()),
        ("head", pa.string()),
        ("labels", _STRINGS),
        ("probes", pa.list_(pa.int32())),
        ("library", pa.string()),
        ("architecture", pa.string()),
        ("parameters", pa.int64()),
        ("recipe", pa.string()),
        ("dtype", pa.string()),
        ("device", pa.string()),
        ("weight_digest", pa.string()),
        ("weight_mean", pa.float32()),
        ("weight_std", pa.float32()),
        ("seconds_download", pa.float32()),
        ("seconds_load", pa.float32()),
        ("seconds_preprocess", pa.float32()),
        ("seconds_forward", pa.float32()),
        ("identity", pa.string()),
        ("copy_of_repo", pa.string()),
        ("copy_of_sha", pa.string()),
        ("precision", pa.string()),
        ("batch_size", pa.int32()),
        ("bytes", pa.int64()),
        ("seconds_weights", pa.float32()),
        ("seconds_sketch", pa.float32()),
        ("name_or_path", pa.string()),
    ],
)

# A row a generator that was sampled; behind it `SampledModel`.
GENERATORS = _schema(
    "generators",
    1,
    [
        ("repo", pa.string()),
        ("sha", pa.string()),
        ("pipeline", pa.string()),
        ("architecture", pa.string()),
        ("conditioning", pa.string()),
        ("image_size", pa.int32()),
        ("parameters", pa.int64()),
        ("base_repo", pa.string()),
        ("base_sha", pa.string()),
        ("trigger_words", _STRINGS),
        ("prompts", _STRINGS),
        ("classes", _STRINGS),
        ("samples", pa.int32()),
        ("steps", pa.int32()),
        ("encoder_digest", pa.string()),
        ("dtype", pa.string()),
        ("device", pa.string()),
        ("precision", pa.string()),
        ("batch_size", pa.int32()),
        ("weight_digest", pa.string()),
        ("identity", pa.string()),
        ("copy_of_repo", pa.string()),
        ("copy_of_sha", pa.string()),
        ("bytes", pa.int64()),
        ("seconds_download", pa.float32()),
        ("seconds_load", pa.float32()),
        ("seconds_sample", pa.float32()),
        ("seconds_embed", pa.float32()),
        ("thumbnails", pa.list_(pa.binary())),
    ],
)

# A row a sample of a generator.
SAMPLES = _schema(
    "samples",
    1,
    [
        ("repo", pa.string()),
        ("sha", pa.string()),
        ("number", pa.int32()),
        # An index into the prompts of the generator; null without prompts.
        ("prompt", pa.int32()),
        # Null without classes.
        ("class", pa.int32()),
        # Of unit length before it was rounded.
        ("feature", pa.list_(pa.float16())),
        # Of the base's sample with the same seed and prompt; null but for adapters.
        ("base_feature", pa.list_(pa.float16())),
    ],
)

WEIGHTS = _schema(
    "weights",
    1,
    [
        ("repo", pa.string()),
        ("sha", pa.string()),
        ("tensor", pa.string()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int64())),
        # Of a single whole number: the number.
        ("mean", pa.float32()),
        ("std", pa.float32()),
        ("kurtosis", pa.float32()),
        # Of matrices (and what flattens into one) only.
        ("sketch", pa.list_(pa.float32())),
    ],
)

# Which model was made from which (`probelog.trees`): a row for each parent of a model.
EDGES = _schema(
    "edges",
    1,
    [
        ("child", pa.string()),
        # A repository, or the name of an ancestor that nobody has seen (`probelog.trees.evidence.latent`).
        ("parent", pa.string()),
        ("relation", pa.string()),
        ("probability", pa.float32()),
        # The share of a merge's parent; 1 otherwise.
        ("weight", pa.float32()),
        # Whether the child names this parent; null where it names none.
        ("declared", pa.bool_()),
        # Whether the parent is not among the models: deleted, or never uploaded.
        ("latent", pa.bool_()),
        ("evidence", pa.list_(pa.struct([("signal", pa.string()), ("value", pa.float64())]))),
    ],
)

# The models whose weights were compared, by repository.
TREE_MODELS = _schema(
    "tree-models",
    1,
    [
        ("repo", pa.string()),
        ("sha", pa.string()),
        ("family", pa.string()),
        ("root", pa.string()),
        ("parent", pa.string()),
        ("depth", pa.int32()),
    ],
)

DESCRIPTORS = _schema(
    "descriptors",
    1,
    [
        ("repo", pa.string()),
        ("sha", pa.string()),
        ("logit", pa.int32()),
        ("observed", pa.int32()),
        ("mean", pa.float32()),
        ("std", pa.float32()),
        ("z_mean", pa.float32()),
        ("z_std", pa.float32()),
        ("factor", pa.list_(pa.float16())),
        ("top_probes", pa.list_(pa.int32())),
        ("top_values", pa.list_(pa.float16())),
        # Of the opposite concept: one-logit heads only.
        ("bottom_probes", pa.list_(pa.int32())),
        ("bottom_values", pa.list_(pa.float16())),
        ("direction", pa.list_(pa.float16())),
        ("opposite_direction", pa.list_(pa.float16())),
        # Of every logit a few, ascending, for people to look at; parts of older versions do not have them.
        ("weakest_probes", pa.list_(pa.int32())),
        ("weakest_values", pa.list_(pa.float16())),
    ],
)


class Head(StrEnum):
    """What a model's last layer means.

    ``softmax``: one of several classes; ``sigmoid``: each class on its own (multi-label); ``single``: one
    logit, a concept and its opposite; ``regression``: numbers, not classes.
    """

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SINGLE = "single"
    REGRESSION = "regression"


@dataclass(frozen=True, slots=True)
class RepoFile:
    """One file of a repository as the Hub describes it; ``sha256`` only where the Hub knows it (LFS)."""

    path: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Parent:
    """One model that another one says it was made from.

    Attributes:
        repo: of the parent, which need not exist.
        relation: one of ``RELATIONS``.
        source: where it is declared: ``card`` (the model card's ``base_model``), ``tag`` (the Hub's tags),
            ``adapter`` (the adapter's configuration) or ``config`` (``_name_or_path`` of the configuration).
    """

    repo: str
    relation: str
    source: str


RELATIONS = ("finetune", "adapter", "merge", "quantized", "unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedFacts:
    """What the Hub says about a model and an index keeps. Anything may be unknown.

    A fact is declared here and read in `probelog.hub.model_info`: columns of catalogue and index, answers and
    summaries have it by themselves.

    Attributes:
        pipeline_tag: the task.
        licence: the first that the model card declares, as the Hub writes it, and
        licences: all of them.
        tags: of the model card and the Hub's own.
        downloads: of the last 30 days.
        likes: so far.
        last_modified: when the newest commit was made, and
        created_at: when the repository was made, both in UTC.
        base_model: the first declared parent of the model card.
        parents: all declared parents.
    """

    pipeline_tag: str | None = None
    licence: str | None = None
    tags: list[str] = field(default_factory=list)
    downloads: int | None = None
    likes: int | None = None
    last_modified: dt.datetime | None = None
    created_at: dt.datetime | None = None
    base_model: str | None = None
    parents: list[Parent] = field(default_factory=list)
    licences: list[str] = field(default_factory=list)


LISTED_FACTS = tuple(item.name for item in dataclasses.fields(ListedFacts))


@dataclass(frozen=True, kw_only=True)
class TreeFacts:
    """A model's place in the tree of models that it belongs to (docs/method.md, section 11).

    All are unknown where the weights were not compared. A root is its own ``root``, has no ``parent``, and ``depth`` 0.

    Attributes:
        root: the eldest ancestor: a repository, or the name of a latent ancestor.
        parent: the parent; of several, the one with the largest weight, then the most probable.
        depth: number of edges from the root.
    """

    root: str | None = None
    parent: str | None = None
    depth: int | None = field(default=None, metadata={"arrow": pa.int32()})


TREE_FACTS = tuple(item.name for item in dataclasses.fields(TreeFacts))


@dataclass(frozen=True, slots=True)
class CatalogueRow(ListedFacts):
    """One (repository, commit) of the Hub, as listed. Everything but the first two may be unknown.

    ``weight_bytes``: of the weights, from the sizes of their files or else from the counts of parameters by type
    (a listing tells no sizes).
    """

    repo: str
    sha: str
    library: str | None = None
    model_type: str | None = None
    architecture: str | None = None
    parameters: int | None = None
    files: list[RepoFile] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    gated: bool = False
    disabled: bool = False
    weight_bytes: int | None = None


_ARROW: dict[object, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    dt.datetime: _TIME,
}


def arrow_type(hint: object) -> pa.DataType:
    """The Arrow type of a record's field, from its annotation."""
    if isinstance(hint, types.UnionType):
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is list:
        return pa.list_(arrow_type(typing.get_args(hint)[0]))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return pa.struct(arrow_fields(hint))
    return _ARROW[hint]


def arrow_fields(record: type[DataclassInstance]) -> list[tuple[str, pa.DataType]]:
    """Names and Arrow types of a record's fields; a field's metadata may name another (``arrow``)."""
    hints = typing.get_type_hints(record)
    return [
        (item.name, item.metadata.get("arrow") or arrow_type(hints[item.name]))
        for item in dataclasses.fields(record)
    ]


CATALOGUE = _schema("catalogue", 1, arrow_fields(CatalogueRow))


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one model is not indexed. ``at`` is in UTC."""

    repo: str
    sha: str
    stage: str
    reason: str
    detail: str
    attempts: int = 1
    retryable: bool = False
    at: dt.datetime | None = None

    @classmethod
    def of(
        cls, repo: str, sha: str, stage: str, reason: FailureReason, detail: str, attempts: int = 1
    ) -> Failure:
        """A failure that happens now; whether a rerun retries it follows from its reason."""
        return cls(
            repo=clean_unicode(repo),
            sha=clean_unicode(sha),
            stage=stage,
            reason=reason.value,
            detail=redacted(clean_unicode(detail))[:1000],
            attempts=attempts,
            retryable=reason.retryable,
            at=dt.datetime.now(dt.UTC),
        )


@dataclass(frozen=True, slots=True)
class ProbedModel:
    """The facts of one model that was run: the sidecar row of its observations.

    ``probes`` are the indices of the probes it saw, ascending; every observation row of the model holds its
    values in that order. ``recipe`` is the preprocessing that was applied, as JSON. Times are in seconds:
    ``seconds_weights`` (reading and digest of the weights, their statistics) is part of ``seconds_load``, and
    ``seconds_sketch`` (statistics and sketches alone) part of that. ``identity`` is equal for models that give
    the same logits (same weights, architecture and preprocessing); a model with an identity that was met before
    is not run: its observations are those of ``copy_of_repo`` at ``copy_of_sha``. ``precision`` is that of the
    forward pass, ``bytes`` what was downloaded. ``name_or_path`` is what the configuration says in ``_name_or_path``:
    perhaps the repository that the model was made from.
    """

    repo: str
    sha: str
    logits: int
    head: str
    labels: list[str]
    probes: Sequence[int]
    library: str
    architecture: str
    parameters: int
    recipe: str
    dtype: str
    device: str
    weight_digest: str
    weight_mean: float
    weight_std: float
    seconds_download: float = 0.0
    seconds_load: float = 0.0
    seconds_preprocess: float = 0.0
    seconds_forward: float = 0.0
    identity: str | None = None
    copy_of_repo: str | None = None
    copy_of_sha: str | None = None
    precision: str = "float32"
    batch_size: int | None = None
    bytes: int | None = None
    seconds_weights: float = 0.0
    seconds_sketch: float = 0.0
    name_or_path: str | None = None


@dataclass(frozen=True, slots=True)
class SampledModel:
    """The facts of one generator that was sampled: the sidecar row of its samples.

    Attributes:
        repo: repository.
        sha: commit.
        pipeline: the class that its ``model_index.json`` names, ``lora`` for an adapter, ``gallery`` for a folder of
            pictures.
        architecture: of the network that makes the picture.
        conditioning: ``none``, ``class`` or ``text``.
        image_size: edge of a sample in pixels.
        parameters: number of them.
        base_repo: of an adapter: the repository that it was run with, and
        base_sha: its commit.
        trigger_words: that the adapter declares.
        prompts: those that were used.
        classes: declared names.
        samples: number of rows of samples.
        steps: of the sampler; 0 where there is none.
        encoder_digest: of the encoder whose features the rows hold.
        dtype: of the weights as they are stored.
        device: where it was run.
        precision: of the forward passes.
        batch_size: pictures at once.
        weight_digest: SHA-256 of the weights.
        identity: equal for generators that make the same samples.
        copy_of_repo: the repository with the same identity whose samples it shares, and
        copy_of_sha: its commit.
        bytes: downloaded.
        seconds_download: seconds spent on the download,
        seconds_load: on loading,
        seconds_sample: on sampling, and
        seconds_embed: on embeddings and thumbnails.
        thumbnails: some samples, at most ``MOST_THUMBNAILS``, as WebP.
    """

    repo: str
    sha: str
    pipeline: str
    architecture: str
    conditioning: str
    image_size: int
    parameters: int
    samples: int
    steps: int
    encoder_digest: str
    dtype: str
    device: str
    weight_digest: str
    base_repo: str | None = None
    base_sha: str | None = None
    trigger_words: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    precision: str = "float32"
    batch_size: int | None = None
    identity: str | None = None
    copy_of_repo: str | None = None
    copy_of_sha: str | None = None
    bytes: int | None = None
    seconds_download: float = 0.0
    seconds_load: float = 0.0
    seconds_sample: float = 0.0
    seconds_embed: float = 0.0
    thumbnails: list[builtins.bytes] = field(default_factory=list)


MOST_THUMBNAILS = 12


def clean_unicode(text: str) -> str:
    """Text that Arrow can hold: lone surrogates (legal in JSON, not in UTF-8) become replacement characters."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


Record = TypeVar("Record", CatalogueRow, Failure, ProbedModel, SampledModel)


def to_table(records: Sequence[Any], schema: pa.Schema) -> pa.Table:
    """Typed records as an Arrow table of the given schema."""
    columns = {
        name: [
            [dataclasses.asdict(item) if isinstance(item, (RepoFile, Parent)) else item for item in value]
            if isinstance(value := getattr(record, name), list)
            else value
            for record in records
        ]
        for name in schema.names
    }
    return pa.table(
        {name: pa.array(values, schema.field(name).type) for name, values in columns.items()}, schema=schema
    )


def from_table(table: pa.Table, record: type[Record]) -> list[Record]:
    """The rows of an Arrow table as typed records. Columns that the record does not know are left out."""
    names = [item.name for item in dataclasses.fields(record) if item.name in table.column_names]
    nested = _nested_records(record)
    rows: Iterable[dict[str, Any]] = table.select(names).to_pylist()
    built = []
    for row in rows:
        values: dict[str, Any] = {
            name: [nested[name](**item) for item in value or []] if name in nested else value
            for name, value in row.items()
        }
        built.append(record(**values))
    return built


def _nested_records(record: type) -> dict[str, type]:
    records: dict[str, type] = {}
    for name, hint in typing.get_type_hints(record).items():
        inner = typing.get_args(hint) if not isinstance(hint, types.UnionType) else ()
        if inner and isinstance(inner[0], type) and dataclasses.is_dataclass(inner[0]):
            records[name] = inner[0]
    return records

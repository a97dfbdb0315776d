"""The ledger of a stage that works item by item: what is done, what failed, and where the rows lie.

An item's result is written at once, alone, as a small *spool* object, so that a kill loses nothing. When all
items of a *batch* (a fixed group of neighbours in the plan) are there, the batch is *sealed*: their rows are
rewritten as Parquet parts of a useful size, then a receipt names the parts, their rows and digests. Readers trust
receipts and nothing else. Names follow from the content of the plan, so that sealing twice writes the same bytes
under the same name.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from probelog.arrays import values_of
from probelog.errors import StoreError
from probelog.storage.bundles import BUNDLED, Bundles
from probelog.storage.checksummed_json import unsealed_json
from probelog.storage.encoding import digest, sealed_tables, short_key, unsealed_tables
from probelog.storage.layout import LedgerFolder
from probelog.storage.observations import from_rows
from probelog.storage.parquet_parts import Part, open_part, part_bytes, read_part
from probelog.storage.schemas import (
    FAILURES,
    GENERATORS,
    OBSERVATIONS,
    PROBED_MODELS,
    SAMPLES,
    WEIGHTS,
    Failure,
    ProbedModel,
    SampledModel,
    from_table,
    to_table,
)
from probelog.storage.store import Store
from probelog.storage.versions import MADE_BY, check_schema, check_version

_READERS = 16
RECEIPT_VERSION = 1
# Of ``manifest.json``, which says what a ledger is for.
LEDGER_VERSION = 1


@dataclass(frozen=True)
class Contents:
    """What a ledger holds of one kind of model.

    Attributes:
        rows: name of its rows: of the folder of their parts, and in receipts.
        rows_schema: of these rows.
        models_schema: of the row for each model that was run, and
        record: the record behind that row.
        counted: the field of the record with the number of the model's rows.
        inputs: the field that says what it was run on: a number, or a list.
        phases: what a model's time is divided into (``seconds_PHASE`` of the record), and
        computed: those of them that a copy of another model's rows does without.
    """

    rows: str
    rows_schema: pa.Schema
    models_schema: pa.Schema
    record: type[Any]
    counted: str
    inputs: str
    phases: tuple[str, ...]
    computed: tuple[str, ...]

    @property
    def schemas(self) -> dict[str, pa.Schema]:
        """The schemas of all parts of a batch, by the names of their folders."""
        return {
            self.rows: self.rows_schema,
            "models": self.models_schema,
            "failures": FAILURES,
            "weights": WEIGHTS,
        }


# `weights` is a part of `load`, and `sketch` of that.
TIMED_PHASES = ("download", "load", "preprocess", "forward", "weights", "sketch")
PROBED = Contents(
    rows="observations",
    rows_schema=OBSERVATIONS,
    models_schema=PROBED_MODELS,
    record=ProbedModel,
    counted="logits",
    inputs="probes",
    phases=TIMED_PHASES,
    computed=("preprocess", "forward"),
)
SAMPLED = Contents(
    rows="samples",
    rows_schema=SAMPLES,
    models_schema=GENERATORS,
    record=SampledModel,
    counted="samples",
    inputs="samples",
    phases=("download", "load", "sample", "embed"),
    computed=("sample", "embed"),
)
_EVERY_CONTENTS = (PROBED, SAMPLED)


@dataclass(frozen=True, slots=True)
class Counts:
    """What items came to. Those of several receipts add up to those of the ledger.

    Attributes:
        indexed: models that were run, or that share the rows of one that was.
        copies: those of them that share.
        logits: of the indexed models; of generators: their samples.
        bytes: downloaded for them.
        failed: failures by reason.
        replaced: earlier failures, by reason, in whose place these items' results stand.
        seconds: spent on the indexed models, by part (`Contents.phases`).
    """

    indexed: int = 0
    copies: int = 0
    logits: int = 0
    bytes: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)
    replaced: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.indexed + other.indexed,
            self.copies + other.copies,
            self.logits + other.logits,
            self.bytes + other.bytes,
            _added(self.failed, other.failed),
            _added(self.replaced, other.replaced),
            _added(self.seconds, other.seconds),
        )

    @property
    def failures(self) -> dict[str, int]:
        """Models that failed and never succeeded, by the reason of their last failure; most frequent first."""
        remaining = Counter(self.failed)
        remaining.subtract(self.replaced)
        return {reason: count for reason, count in remaining.most_common() if count > 0}


def _added(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in sorted({*one, *other})}


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof of one sealed batch: its items, its parts, and when it was sealed (UTC, ISO 8601).

    ``originals`` maps the identities of the models that were run (not of copies) to their ``[repo, sha]``.
    """

    name: str
    items: list[str]
    rows: Part
    models: Part
    failures: Part
    weights: Part
    counts: Counts
    originals: Mapping[str, list[str]]
    at: str
    version: int = RECEIPT_VERSION
    made_by: str = MADE_BY

    @property
    def observations(self) -> Part:
        """The rows of a batch of classifiers."""
        return self.rows

    def to_json(self, contents: Contents = PROBED) -> dict[str, Any]:
        """What the store holds."""
        content = asdict(self)
        content[contents.rows] = content.pop("rows")
        return content


@dataclass(frozen=True)
class ItemResult:
    """One item's result before its batch is sealed: a model that was run with its rows and layers, or a failure."""

    rows: pa.Table
    models: pa.Table
    failures: pa.Table
    weights: pa.Table

    @classmethod
    def success(
        cls, model: ProbedModel | SampledModel, rows: pa.Table, weights: pa.Table | None = None
    ) -> ItemResult:
        """The result of a model that was run; ``weights`` are the facts of its layers (``WEIGHTS``)."""
        contents = next(contents for contents in _EVERY_CONTENTS if isinstance(model, contents.record))
        return cls(
            rows,
            to_table([model], contents.models_schema),
            FAILURES.empty_table(),
            WEIGHTS.empty_table() if weights is None else weights,
        )

    @classmethod
    def failure(cls, failure: Failure, contents: Contents = PROBED) -> ItemResult:
        """The result of a model that could not be run."""
        return cls(
            contents.rows_schema.empty_table(),
            contents.models_schema.empty_table(),
            to_table([failure], FAILURES),
            WEIGHTS.empty_table(),
        )

    @property
    def tables(self) -> tuple[pa.Table, ...]:
        """In the order of `Contents.schemas`."""
        return self.rows, self.models, self.failures, self.weights

    def to_bytes(self) -> bytes:
        """The four tables, with their digest."""
        return sealed_tables(self.tables)

    @classmethod
    def from_bytes(cls, data: bytes, contents: Contents = PROBED) -> ItemResult:
        """Read what ``to_bytes`` wrote.

        Raises:
            SchemaVersionError: written by a newer ProbeLog.
            StoreError: damaged.
        """
        tables = unsealed_tables(data, 4, "a spooled result")
        for table, schema in zip(tables, contents.schemas.values(), strict=True):
            check_schema(table.schema, schema, "a spooled result")
        return cls(*tables)


def key_numbers(keys: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Keys of items as the numbers that their hexadecimal digits stand for: eight bytes each, a million in 8 MB."""
    return np.fromiter((int(key, 16) for key in keys), np.uint64)


def item_key(repo: str, sha: str, attempt: int = 1) -> str:
    """Key of one item of the plan. A retried failure is a new item."""
    return short_key(repo, sha, attempt)


class Ledger:
    """The ledger below one folder of a store, by default of classifiers."""

    def __init__(self, store: Store, folder: str, contents: Contents = PROBED) -> None:
        self.store = store
        self.folder = folder
        self.contents = contents
        self.paths = LedgerFolder(folder)
        self._bundles = Bundles(store, self.paths)
        self._bundled: set[str] = set()

    # Spool

    def spool(self, item: str, result: ItemResult) -> None:
        """Make one item's result durable."""
        self.store.write(self.paths.spooled(item), result.to_bytes())

    def spooled_result(self, item: str) -> ItemResult | None:
        """One item's result, None where it is sealed already or was never there."""
        data = self.store.read_or_none(self.paths.spooled(item))
        return None if data is None else ItemResult.from_bytes(data, self.contents)

    def sealed_result(self, receipt: str, repo: str, sha: str) -> tuple[Any, pa.Table] | None:
        """One model that was run out of the parts of a receipt, with its rows; None where it is not there."""
        parts = self._receipt_or_none(receipt)
        if parts is None:
            return None
        mine = (pc.field("repo") == repo) & (pc.field("sha") == sha)
        contents = self.contents
        models = from_table(
            read_part(self.store, parts.models, contents.models_schema).filter(mine), contents.record
        )
        rows = read_part(self.store, parts.rows, contents.rows_schema).filter(mine)
        whole = len(models) == 1 and rows.num_rows == getattr(models[0], contents.counted)
        return (models[0], rows) if whole else None

    def spooled(self) -> set[str]:
        """Items that have a spool object; after a kill, sealed ones may be among them."""
        names = self.store.names(self.paths.spool, suffix=".arrow")
        return {name.rsplit("/", 1)[1].removesuffix(".arrow") for name in names}

    def drop_sealed_spool(self, receipts: Sequence[Receipt]) -> None:
        """Finish what a kill between a receipt and the end of its spool left undone."""
        spooled = self.spooled()
        for item in {item for receipt in receipts for item in receipt.items if item in spooled}:
            self.store.delete(self.paths.spooled(item))

    # Sealing

    def seal(self, items: Sequence[str], replaced: Mapping[str, int] | None = None) -> Receipt:
        """Turn the spooled results of a batch into parts and a receipt, then drop the spool.

        Args:
            items: keys of the batch.
            replaced: earlier failures, by reason, that these items are the next attempts at.

        Raises:
            FileNotFoundError: an item of the batch has no result.
        """
        ordered = sorted(items)
        name = short_key(*ordered)
        receipt = self._receipt_or_none(name)
        if receipt is None:
            with ThreadPoolExecutor(_READERS) as pool:
                results = [
                    ItemResult.from_bytes(data, self.contents)
                    for data in pool.map(lambda item: self.store.read(self.paths.spooled(item)), ordered)
                ]
            results.sort(key=_order)
            rows, models, failures, weights = (
                self._write_part(kind, name, [result.tables[place] for result in results])
                for place, kind in enumerate(self.contents.schemas)
            )
            receipt = Receipt(
                name=name,
                items=ordered,
                rows=rows,
                models=models,
                failures=failures,
                weights=weights,
                counts=replace(_counts(results, self.contents), replaced=dict(replaced or {})),
                originals=_originals(results),
                at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            )
            self.store.write_json(self.paths.receipt(name), receipt.to_json(self.contents))
        for item in ordered:
            self.store.delete(self.paths.spooled(item))
        return receipt

    def _write_part(self, kind: str, name: str, tables: Sequence[pa.Table]) -> Part:
        data = part_bytes([table for table in tables if table.num_rows], self.contents.schemas[kind])
        path = self.paths.part(kind, name)
        self.store.write(path, data)
        return Part(path, sum(table.num_rows for table in tables), len(data), digest(data))

    # Reading

    def receipt_names(self) -> list[str]:
        """Names of all receipts, without reading them."""
        names = self.store.names(self.paths.receipts, suffix=".json")
        return [name.rsplit("/", 1)[1].removesuffix(".json") for name in names]

    def receipts(self, names: Iterable[str] | None = None, originals: bool = True) -> list[Receipt]:
        """All receipts, or those of some names, by name; many of them from bundles, where they are bundled.

        Args:
            names: of the receipts; all by default.
            originals: whether to keep what they say of originals, a million names in a large ledger.

        Raises:
            FileNotFoundError, SchemaVersionError, StoreError: as `receipt`.
        """
        requested = self.receipt_names() if names is None else sorted(names)
        found = {
            receipt.name: receipt if originals else replace(receipt, originals={})
            for receipt in self.each_receipt(requested)
        }
        return [found[name] for name in requested]

    def originals(self) -> Iterator[tuple[Receipt, str, str, str]]:
        """Identity, repository and commit of every model that was run, with its receipt."""
        for receipt in self.each_receipt(self.receipt_names()):
            for identity, (repo, sha) in receipt.originals.items():
                yield receipt, identity, repo, sha

    def each_receipt(self, names: Sequence[str]) -> Iterator[Receipt]:
        """Receipts in any order, each once."""
        remaining = dict.fromkeys(names)
        if len(names) >= BUNDLED:
            for name, data in self._bundles.receipts():
                if name in remaining:
                    del remaining[name]
                    self._bundled.add(name)
                    where = self.store.path(self.paths.receipt(name))
                    yield _receipt(unsealed_json(data, where), where, self.contents)
        with ThreadPoolExecutor(_READERS) as pool:
            yield from pool.map(self.receipt, remaining)

    def bundle(self, receipts: Sequence[Receipt]) -> None:
        """Copy receipts into bundles, a thousand into each; those that were read from one, and the rest, are left.

        A refused write is no error: bundles only save requests.
        """
        single = [receipt for receipt in receipts if receipt.name not in self._bundled]
        with contextlib.suppress(StoreError, FileNotFoundError):
            for start in range(0, len(single) - BUNDLED + 1, BUNDLED):
                some = single[start : start + BUNDLED]
                paths = [self.paths.receipt(receipt.name) for receipt in some]
                with ThreadPoolExecutor(_READERS) as pool:
                    written = list(pool.map(self.store.read, paths))
                failures = list(self._tables([receipt.failures for receipt in some], FAILURES))
                self._bundles.write([receipt.name for receipt in some], written, failures)
                self._bundled.update(receipt.name for receipt in some)

    def receipt(self, name: str) -> Receipt:
        """One receipt.

        Raises:
            FileNotFoundError: there is none of this name.
            SchemaVersionError: written by a newer ProbeLog.
            StoreError: it is damaged.
        """
        path = self.paths.receipt(name)
        return _receipt(self.store.read_json(path), self.store.path(path), self.contents)

    def _receipt_or_none(self, name: str) -> Receipt | None:
        try:
            return self.receipt(name)
        except FileNotFoundError:
            return None

    def failure_rows(self, receipts: Sequence[Receipt]) -> pa.Table:
        """Every failure that is recorded, superseded ones included (``FAILURES``). Reads parts of failures alone."""
        parts = {receipt.name: receipt.failures for receipt in receipts if receipt.failures.rows}
        bundled, tables = self._bundles.failures(parts.keys()) if len(parts) >= BUNDLED else (set(), [])
        tables += self._tables([part for name, part in parts.items() if name not in bundled], FAILURES)
        return pa.concat_tables(tables) if tables else FAILURES.empty_table()

    def models(self, receipts: Sequence[Receipt], probes: bool = True) -> list[Any]:
        """The models that were run, by (repo, sha): the records of the ledger's contents.

        Args:
            receipts: of their batches.
            probes: whether to say which probes a classifier saw, or how many alone: a list of a thousand is 36 KB.
        """
        models_by_key = {
            (model.repo, model.sha): model if probes else replace(model, probes=range(len(model.probes)))
            for table in self._tables([receipt.models for receipt in receipts], self.contents.models_schema)
            for model in from_table(table, self.contents.record)
        }
        return [models_by_key[key] for key in sorted(models_by_key)]

    def failures(self, receipts: Sequence[Receipt], models: Sequence[Any]) -> list[Failure]:
        """The latest failure of every (repo, sha) that never succeeded."""
        good = {(model.repo, model.sha) for model in models}
        latest: dict[tuple[str, str], Failure] = {}
        for table in self._tables([receipt.failures for receipt in receipts], FAILURES):
            for failure in from_table(table, Failure):
                key = (failure.repo, failure.sha)
                if key not in good and (key not in latest or failure.attempts > latest[key].attempts):
                    latest[key] = failure
        return [latest[key] for key in sorted(latest)]

    def _tables(self, parts: Sequence[Part], schema: pa.Schema) -> Iterator[pa.Table]:
        with ThreadPoolExecutor(_READERS) as pool:
            yield from pool.map(lambda part: read_part(self.store, part, schema), parts)


def open_failures(failures: pa.Table, sealed: npt.NDArray[np.uint64]) -> pa.Table:
    """The last failure of every (repo, sha) that did not succeed since, by (repo, sha): ``FAILURES``.

    A later attempt that is sealed and did not fail has succeeded.

    Args:
        failures: all of a ledger (``Ledger.failure_rows``).
        sealed: keys of all items that are sealed (`key_numbers`).
    """
    if not failures.num_rows:
        return failures
    ordered = failures.sort_by([("repo", "ascending"), ("sha", "ascending"), ("attempts", "ascending")])
    last = np.ones(ordered.num_rows, bool)
    same = [pc.equal(ordered[name][1:], ordered[name][:-1]).to_numpy() for name in ("repo", "sha")]
    last[:-1] = ~(same[0] & same[1])
    ordered = ordered.filter(pa.array(last))
    following = key_numbers(
        item_key(repo, sha, attempts + 1)
        for repo, sha, attempts in zip(
            *(ordered[name].to_pylist() for name in ("repo", "sha", "attempts")), strict=True
        )
    )
    return ordered.filter(pa.array(~np.isin(following, sealed)))


def observed_models(
    store: Store, receipt: Receipt
) -> Iterator[tuple[ProbedModel, npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
    """Every model of one receipt with its logit numbers (L,) and observed values (L, m) in float32.

    Raises:
        StoreError: the observations are not those that the sidecar speaks of.
    """
    models = from_table(read_part(store, receipt.models, PROBED_MODELS), ProbedModel)
    counts = [model.logits for model in models]
    for model, rows in zip(models, rows_of_models(store, receipt, OBSERVATIONS, models, counts), strict=True):
        values = from_rows(rows)
        if not rows.num_rows or values.shape != (model.logits, len(model.probes)):
            raise _unlike_record(store, receipt, model.repo)
        yield model, rows["logit"].to_numpy(), values


def rows_of_models(
    store: Store,
    receipt: Receipt,
    schema: pa.Schema,
    models: Sequence[ProbedModel | SampledModel],
    counts: Sequence[int],
) -> Iterator[pa.Table]:
    """The rows of each model of one receipt, ``counts`` of them, in the order of the models.

    Of a part's rows only one group is unpacked at a time: some models, or a single large one.

    Raises:
        StoreError: they are fewer, or another repository's.
    """
    file = open_part(store, receipt.rows, schema)
    groups = iter(range(file.num_row_groups))
    rows = schema.empty_table()
    for model, count in zip(models, counts, strict=True):
        while rows.num_rows < count and (group := next(groups, None)) is not None:
            following = file.read_row_group(group)
            rows = pa.concat_tables([rows, following]) if rows.num_rows else following
        mine, rows = rows.slice(0, count), rows.slice(count)
        if mine.num_rows != count or mine["repo"].unique().to_pylist() not in ([model.repo], []):
            raise _unlike_record(store, receipt, model.repo)
        yield mine


def _unlike_record(store: Store, receipt: Receipt, repo: str) -> StoreError:
    return StoreError(f"{store.path(receipt.rows.path)} does not hold {repo} as recorded")


def _order(result: ItemResult) -> tuple[str, str]:
    table = result.models if result.models.num_rows else result.failures
    return (table["repo"][0].as_py(), table["sha"][0].as_py())


def _counts(results: Sequence[ItemResult], contents: Contents) -> Counts:
    """What some results came to; which failures they replace is not known here."""
    failed: Counter[str] = Counter()
    seconds = dict.fromkeys(contents.phases, 0.0)
    indexed = copies = logits = size = 0
    for result in results:
        failed.update(values_of(result.failures["reason"], str))
        models = result.models
        indexed += models.num_rows
        if not models.num_rows:
            continue
        logits += pc.sum(models[contents.counted]).as_py()
        copies += models.num_rows - models["copy_of_repo"].null_count
        size += pc.sum(models["bytes"]).as_py() or 0
        for part in contents.phases:
            seconds[part] += pc.sum(models[f"seconds_{part}"]).as_py()
    return Counts(indexed, copies, logits, size, dict(sorted(failed.items())), {}, seconds)


def _originals(results: Sequence[ItemResult]) -> dict[str, list[str]]:
    originals: dict[str, list[str]] = {}
    columns = ("identity", "copy_of_repo", "repo", "sha")
    for result in results:
        for identity, copy, repo, sha in zip(
            *(result.models[name].to_pylist() for name in columns), strict=True
        ):
            if identity is not None and copy is None:
                originals.setdefault(identity, [repo, sha])
    return originals


def _receipt(content: dict[str, Any], where: str, contents: Contents) -> Receipt:
    try:
        check_version(content, RECEIPT_VERSION, where, "receipt")
        names = ("rows", "models", "failures", "weights")
        parts = {part: Part(**content.pop(name)) for part, name in zip(names, contents.schemas, strict=True)}
        return Receipt(**{**content, **parts, "counts": Counts(**content["counts"])})
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{where} is damaged: {error!r}") from error

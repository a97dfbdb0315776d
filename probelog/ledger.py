"""The ledger of a stage that works item by item: what is done, what failed, and where the rows lie.

An item's result is written at once, alone, as a small *spool* object, so that a kill loses nothing. When all
items of a *batch* (a fixed group of neighbours in the plan) are there, the batch is *sealed*: their rows are
rewritten as Parquet parts of a useful size, then a receipt names the parts, their rows and digests. Readers trust
receipts and nothing else. Names follow from the content of the plan, so that sealing twice writes the same bytes
under the same name.
"""

from __future__ import annotations

import datetime as dt
import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from probelog.errors import StoreError
from probelog.observations import from_rows
from probelog.schemas import (
    FAILURES,
    OBSERVATIONS,
    PROBED_MODELS,
    WEIGHTS,
    Failure,
    ProbedModel,
    check_schema,
    from_table,
    to_table,
)
from probelog.storage import Store, digest, short_key

# Row groups of fewer rows cost space; whole models per group, so that a reader of one model reads one group.
_ROWS_PER_GROUP = 400
_READERS = 8


@dataclass(frozen=True)
class Part:
    """One Parquet object as its receipt describes it."""

    path: str
    rows: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Receipt:
    """Proof of one sealed batch: its items, its parts, and when it was sealed (UTC, ISO 8601)."""

    name: str
    items: list[str]
    observations: Part
    models: Part
    failures: Part
    at: str
    weights: Part | None = None  # none in receipts of version 1
    version: int = 2


@dataclass(frozen=True)
class Spooled:
    """One item's result before its batch is sealed: a probed model with its logits and layers, or a failure."""

    observations: pa.Table
    models: pa.Table
    failures: pa.Table
    weights: pa.Table

    @classmethod
    def success(cls, model: ProbedModel, observations: pa.Table, weights: pa.Table | None = None) -> Spooled:
        """The result of a model that was run; ``weights`` are the facts of its layers (``WEIGHTS``)."""
        return cls(
            observations,
            to_table([model], PROBED_MODELS),
            FAILURES.empty_table(),
            WEIGHTS.empty_table() if weights is None else weights,
        )

    @classmethod
    def failure(cls, failure: Failure) -> Spooled:
        """The result of a model that could not be run."""
        return cls(
            OBSERVATIONS.empty_table(),
            PROBED_MODELS.empty_table(),
            to_table([failure], FAILURES),
            WEIGHTS.empty_table(),
        )

    def to_bytes(self) -> bytes:
        """Four Arrow streams, one behind the other."""
        sink = io.BytesIO()
        for table in (self.observations, self.models, self.failures, self.weights):
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Spooled:
        """Read what ``to_bytes`` wrote."""
        source = pa.BufferReader(data)
        return cls(*(pa.ipc.open_stream(source).read_all() for _ in range(4)))


def item_key(repo: str, sha: str, attempt: int = 1) -> str:
    """Key of one item of the plan. A retried failure is a new item."""
    return short_key(repo, sha, attempt)


class Ledger:
    """The ledger below one folder of a store."""

    def __init__(self, store: Store, folder: str) -> None:
        self.store = store
        self.folder = folder

    # Spool

    def spool(self, item: str, result: Spooled) -> None:
        """Make one item's result durable."""
        self.store.write(self._spool_path(item), result.to_bytes())

    def spooled_result(self, item: str) -> Spooled | None:
        """One item's result, None where it is sealed already or was never there."""
        data = self.store.read_or_none(self._spool_path(item))
        return None if data is None else Spooled.from_bytes(data)

    def sealed_result(self, receipt: str, repo: str, sha: str) -> tuple[ProbedModel, pa.Table] | None:
        """One probed model out of the parts of a receipt with its observation rows; None where it is not there."""
        data = self.store.read_or_none(self._receipt_path(receipt))
        if data is None:
            return None
        parts = _receipt(json.loads(data))
        mine = (pc.field("repo") == repo) & (pc.field("sha") == sha)
        models = from_table(read_part(self.store, parts.models, PROBED_MODELS).filter(mine), ProbedModel)
        rows = read_part(self.store, parts.observations, OBSERVATIONS).filter(mine)
        return (models[0], rows) if len(models) == 1 and rows.num_rows == models[0].logits else None

    def spooled(self) -> set[str]:
        """Items that have a spool object; after a kill, sealed ones may be among them."""
        names = self.store.names(f"{self.folder}/spool", suffix=".arrow")
        return {name.rsplit("/", 1)[1].removesuffix(".arrow") for name in names}

    def drop_sealed_spool(self, receipts: Sequence[Receipt]) -> None:
        """Finish what a kill between a receipt and the end of its spool left undone."""
        for item in self.spooled() & {item for receipt in receipts for item in receipt.items}:
            self.store.delete(self._spool_path(item))

    # Sealing

    def seal(self, items: Sequence[str]) -> Receipt:
        """Turn the spooled results of a batch into parts and a receipt, then drop the spool.

        Raises:
            FileNotFoundError: an item of the batch has no result.
        """
        ordered = sorted(items)
        name = short_key(*ordered)
        done = self.store.read_or_none(self._receipt_path(name))
        if done is None:
            with ThreadPoolExecutor(_READERS) as pool:
                results = [
                    Spooled.from_bytes(data)
                    for data in pool.map(lambda item: self.store.read(self._spool_path(item)), ordered)
                ]
            results.sort(key=_order)
            receipt = Receipt(
                name=name,
                items=ordered,
                observations=self._write_part("observations", name, results),
                models=self._write_part("models", name, results),
                failures=self._write_part("failures", name, results),
                weights=self._write_part("weights", name, results),
                at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            )
            self.store.write_json(self._receipt_path(name), asdict(receipt))
        else:
            receipt = _receipt(json.loads(done))
        for item in ordered:
            self.store.delete(self._spool_path(item))
        return receipt

    def _write_part(self, kind: str, name: str, results: Sequence[Spooled]) -> Part:
        schema = {
            "observations": OBSERVATIONS,
            "models": PROBED_MODELS,
            "failures": FAILURES,
            "weights": WEIGHTS,
        }[kind]
        tables: list[pa.Table] = [getattr(result, kind) for result in results]
        data = part_bytes([table for table in tables if table.num_rows], schema)
        path = f"{self.folder}/{kind}/{name}.parquet"
        self.store.write(path, data)
        return Part(path, sum(table.num_rows for table in tables), len(data), digest(data))

    # Reading

    def receipts(self) -> list[Receipt]:
        """All receipts, by name."""
        names = self.store.names(f"{self.folder}/receipts", suffix=".json")
        with ThreadPoolExecutor(_READERS) as pool:
            return [_receipt(content) for content in pool.map(self.store.read_json, names)]

    def models(self, receipts: Sequence[Receipt]) -> list[ProbedModel]:
        """The models that were run, by (repo, sha)."""
        found = {
            (model.repo, model.sha): model
            for table in self._tables([receipt.models for receipt in receipts], PROBED_MODELS)
            for model in from_table(table, ProbedModel)
        }
        return [found[key] for key in sorted(found)]

    def failures(self, receipts: Sequence[Receipt], models: Sequence[ProbedModel]) -> list[Failure]:
        """The latest failure of every (repo, sha) that never succeeded."""
        good = {(model.repo, model.sha) for model in models}
        found: dict[tuple[str, str], Failure] = {}
        for table in self._tables([receipt.failures for receipt in receipts], FAILURES):
            for failure in from_table(table, Failure):
                key = (failure.repo, failure.sha)
                if key not in good and (key not in found or failure.attempts > found[key].attempts):
                    found[key] = failure
        return [found[key] for key in sorted(found)]

    def _tables(self, parts: Sequence[Part], schema: pa.Schema) -> Iterator[pa.Table]:
        with ThreadPoolExecutor(_READERS) as pool:
            yield from pool.map(lambda part: read_part(self.store, part, schema), parts)

    def _spool_path(self, item: str) -> str:
        return f"{self.folder}/spool/{item}.arrow"

    def _receipt_path(self, name: str) -> str:
        return f"{self.folder}/receipts/{name}.json"


def read_part(store: Store, part: Part, schema: pa.Schema) -> pa.Table:
    """The rows of one part, checked against its receipt and against the schema's version.

    Raises:
        StoreError: the bytes are not those that the receipt was written for.
    """
    data = store.read(part.path)
    if len(data) != part.size or digest(data) != part.sha256:
        raise StoreError(f"{store.path(part.path)} is damaged: its digest is not the one in its receipt")
    table = pq.read_table(pa.BufferReader(data))
    check_schema(table.schema, schema, store.path(part.path))
    return table


def observed_models(
    store: Store, receipt: Receipt
) -> Iterator[tuple[ProbedModel, npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
    """Every model of one receipt with its logit numbers (L,) and observed values (L, m) in float32.

    Raises:
        StoreError: the observations are not those that the sidecar speaks of.
    """
    rows = read_part(store, receipt.observations, OBSERVATIONS)
    start = 0
    for model in from_table(read_part(store, receipt.models, PROBED_MODELS), ProbedModel):
        own = rows.slice(start, model.logits)
        start += model.logits
        values = from_rows(own)
        fits = own.num_rows == model.logits and values.shape == (model.logits, len(model.probes))
        if not fits or own["repo"].unique().to_pylist() != [model.repo]:
            raise StoreError(
                f"{store.path(receipt.observations.path)} does not hold {model.repo} as recorded"
            )
        yield model, own["logit"].to_numpy(), values


def part_bytes(tables: Sequence[pa.Table], schema: pa.Schema) -> bytes:
    """Tables (whole models each) as one Parquet file: zstd, byte-stream split for values, no dictionary on them.

    Smaller than Parquet's defaults by a tenth on logits (PLATFORM, Parquet); probe numbers are delta-packed.
    """
    sink = pa.BufferOutputStream()
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 1}
    if schema is OBSERVATIONS:
        options |= {
            "use_dictionary": ["repo", "sha"],
            "use_byte_stream_split": ["values.list.element"],
            "write_statistics": False,
        }
    if schema is WEIGHTS:
        options |= {"use_dictionary": ["repo", "sha", "tensor", "dtype"], "write_statistics": False}
    if schema is PROBED_MODELS:
        options |= {
            "use_dictionary": ["library", "architecture", "recipe", "dtype", "device", "head"],
            "column_encoding": {"probes.list.element": "DELTA_BINARY_PACKED"},
        }
    with pq.ParquetWriter(sink, schema, **options) as writer:
        for group in row_groups(tables):
            writer.write_table(pa.concat_tables(group).cast(schema))
    return bytes(sink.getvalue())


def row_groups(tables: Sequence[pa.Table]) -> Iterator[list[pa.Table]]:
    """Neighbouring tables in groups of at least 400 rows each (the last may be smaller)."""
    group: list[pa.Table] = []
    count = 0
    for table in tables:
        group.append(table)
        count += table.num_rows
        if count >= _ROWS_PER_GROUP:
            yield group
            group, count = [], 0
    if group:
        yield group


def _order(result: Spooled) -> tuple[str, str]:
    table = result.models if result.models.num_rows else result.failures
    return (table["repo"][0].as_py(), table["sha"][0].as_py())


def _receipt(content: dict[str, Any]) -> Receipt:
    try:
        return Receipt(
            **{
                **content,
                "observations": Part(**content["observations"]),
                "models": Part(**content["models"]),
                "failures": Part(**content["failures"]),
                "weights": Part(**content["weights"]) if content.get("weights") else None,
            }
        )
    except (KeyError, TypeError) as error:
        raise StoreError(f"a receipt is damaged: {error!r}") from error

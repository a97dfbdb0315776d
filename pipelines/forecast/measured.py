"""Models that were run, as measurements: from the ledger of a configuration, or from the nearest thing to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.probe.timeline import Run, busy_phases, read_runs
from probelog.arrays import Floats, values_of
from probelog.errors import UsageError
from probelog.kinds.kind import Kind
from probelog.kinds.registry import CLASSIFIER
from probelog.models.preprocessing import Recipe
from probelog.storage.ledger import (
    LEDGER_VERSION,
    Contents,
    Counts,
    Ledger,
    Receipt,
    key_numbers,
    open_failures,
)
from probelog.storage.parquet_parts import read_part
from probelog.storage.store import Store
from probelog.storage.versions import check_version

# Enough to know what a model costs; more would take long to fit.
_MOST_MODELS = 1000
_READERS = 16
_COLUMNS = ["repo", "sha", "architecture", "parameters", "recipe", "device", "bytes", "seconds_download"]


@dataclass(frozen=True)
class Measured:
    """What a ledger says of n of its models, and of itself.

    Attributes:
        ledger: where it was read.
        source: for the reader: which ledger this is.
        own: whether it is the one that the plan's models will be added to.
        made_with: the settings of its results.
        receipts: of the sealed batches, without their ``originals``; ``receipt_bytes``: of their own objects, and
            ``listed_bytes`` of what these say of each model.
        counts: of all of them together.
        sealed: keys of the items that are through.
        failures: that still stand (``FAILURES``).
        runs: of the stage.
        models: some of the columns of its rows of models, a row for each of the n models.
    """

    ledger: Ledger
    source: str
    own: bool
    made_with: Mapping[str, Any]
    receipts: Sequence[Receipt]
    receipt_bytes: int
    listed_bytes: int
    counts: Counts
    sealed: npt.NDArray[np.uint64]
    failures: pa.Table
    runs: Sequence[Run]
    models: pa.Table

    def __len__(self) -> int:
        return int(self.models.num_rows)

    def numbers(self, column: str) -> Floats:
        """A column of the models, (n,), NaN where there is no value; of a column of lists their lengths."""
        values = self.models[column]
        if pa.types.is_list(values.type):
            values = pc.list_value_length(values)
        numbers: Floats = pc.cast(values, pa.float64()).to_numpy()
        return numbers

    def texts(self, column: str) -> list[str]:
        """A column of the models, (n,)."""
        return values_of(self.models[column], str)

    @property
    def busy(self) -> tuple[str, ...]:
        """The parts of a model's time in which a worker is busy with it."""
        return busy_phases(self.ledger.contents)

    @property
    def busy_seconds(self) -> Floats:
        """Of a worker with each model, (n,)."""
        seconds: Floats = np.sum([self.numbers(f"seconds_{part}") for part in self.busy], axis=0)
        return seconds

    @property
    def passes(self) -> Floats:
        """How often each model was run forward, (n,): on probes, or in the steps of its samples."""
        return self.numbers(self.ledger.contents.inputs) * int(self.made_with.get("steps", 1))

    @property
    def values(self) -> int:
        """Number of values in a row: of a logit, those on the probes that its model saw."""
        seen: float = self.made_with.get("fraction", 1.0) * self.made_with.get("probes", 1)
        return max(1, round(seen))

    @property
    def devices(self) -> dict[str, int]:
        """How many models were run where."""
        return dict(Counter(self.texts("device")))

    @property
    def prepared_bytes(self) -> int:
        """Of one probe on a node's disk, prepared in every way that some model needs; generators need none.

        A way that a single measured model needs stands for another one that none of them does: the first-order
        jackknife of the number of ways (Burnham and Overton, Biometrika 65, 1978).
        """
        models: Counter[str] = Counter()
        image_bytes = {}
        recipes = self.texts("recipe") if "recipe" in self.models.column_names else []
        for recipe in map(Recipe.from_json, recipes):
            models[recipe.geometry_key] += 1
            image_bytes[recipe.geometry_key] = int(np.prod(recipe.shape)) * np.dtype(recipe.dtype).itemsize
        return sum(size * (2 if models[key] == 1 else 1) for key, size in image_bytes.items())

    def part_bytes(self, kind: str) -> int:
        """Bytes of all parts of a kind."""
        parts = [getattr(receipt, kind) for receipt in self.receipts]
        return sum(part.size for part in parts if part is not None)


def find_measured(
    store: Store, own_key: str | None, like: str | None, kind: Kind = CLASSIFIER
) -> Measured | None:
    """Measurements for a plan: of this configuration, else of the store's largest other ledger, else of ``like``.

    Raises:
        UsageError: ``like`` holds no measured model.
    """
    if own_key is not None and (
        measured := _read(
            Ledger(store, f"{kind.ledgers}/{own_key}", kind.contents), "this configuration", True
        )
    ):
        return measured
    other = _largest(store, kind, "another ledger of this store")
    if other is not None or like is None:
        return other
    measured = _largest(Store(like), kind, like)
    if measured is None:
        raise UsageError(f"{like} holds no measured models: name a store in which {kind.name}s were run")
    return measured


def _largest(store: Store, kind: Kind, source: str) -> Measured | None:
    ledgers = [Ledger(store, folder, kind.contents) for folder in store.folders(kind.ledgers)]
    measured = [_read(ledger, source, False) for ledger in ledgers]
    return max(filter(None, measured), key=lambda one: one.counts.indexed, default=None)


def _read(ledger: Ledger, source: str, own: bool) -> Measured | None:
    """None where no model is indexed."""
    sizes = ledger.store.sizes(ledger.paths.receipts)
    receipts, listed_bytes = [], 0
    for receipt in ledger.each_receipt([PurePosixPath(name).stem for name in sizes]):
        # With quotation marks, commas, brackets, line breaks and indents.
        listed_bytes += sum(len(item) + 6 for item in receipt.items)
        listed_bytes += sum(
            len(identity) + len(repo) + len(sha) + 26 for identity, (repo, sha) in receipt.originals.items()
        )
        receipts.append(replace(receipt, originals={}))
    receipts.sort(key=lambda receipt: receipt.name)
    counts = sum((receipt.counts for receipt in receipts), Counts())
    if not counts.indexed:
        return None
    path = ledger.paths.manifest
    manifest = ledger.store.read_json(path)
    check_version(manifest, LEDGER_VERSION, ledger.store.path(path), "ledger")
    sealed = key_numbers(item for receipt in receipts for item in receipt.items)
    return Measured(
        ledger=ledger,
        source=source,
        own=own,
        made_with=manifest,
        receipts=receipts,
        receipt_bytes=sum(sizes.values()),
        listed_bytes=listed_bytes,
        counts=counts,
        sealed=sealed,
        failures=open_failures(ledger.failure_rows(receipts), sealed),
        runs=read_runs(ledger),
        models=_models(ledger, receipts),
    )


def _models(ledger: Ledger, receipts: Sequence[Receipt]) -> pa.Table:
    """Rows of models, of whole batches evenly out of all."""
    columns = _columns(ledger.contents)
    full = [receipt for receipt in receipts if receipt.models.rows]
    rows = sum(receipt.models.rows for receipt in full)
    step = max(1, -(-rows // _MOST_MODELS))
    with ThreadPoolExecutor(_READERS) as pool:
        return pa.concat_tables(
            pool.map(
                lambda receipt: read_part(
                    ledger.store, receipt.models, ledger.contents.models_schema, columns
                ),
                full[::step],
            )
        )


def _columns(contents: Contents) -> list[str]:
    wanted = [
        *_COLUMNS,
        contents.counted,
        contents.inputs,
        *(f"seconds_{part}" for part in busy_phases(contents)),
    ]
    return [name for name in contents.models_schema.names if name in wanted]

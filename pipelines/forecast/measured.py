"""Models that were probed, as measurements: from the ledger of a configuration, or from the nearest thing to it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.probe.timeline import Run, read_runs
from probelog.arrays import Column, values_of
from probelog.errors import UsageError
from probelog.storage.encoding import short_key
from probelog.storage.ledger import LEDGER_VERSION, Counts, Ledger, Receipt, key_numbers, open_failures
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import PROBED_MODELS
from probelog.storage.store import Store
from probelog.storage.versions import check_version

#: A model's time is measured in these parts.
PARTS = ("download", "load", "preprocess", "forward")
# Enough to know what a model costs; more would take long to fit.
_MOST_MODELS = 1000
_COLUMNS = [
    "repo", "sha", "logits", "probes", "architecture", "parameters", "recipe", "device", "bytes",
    *(f"seconds_{part}" for part in PARTS),
]  # fmt: skip

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """What a ledger says of n of its models, and of itself.

    Attributes:
        ledger: where it was read.
        source: for the reader: which ledger this is.
        own: whether it is the one that the plan's models will be added to.
        probes: in its probe set; ``fraction``: that each model saw.
        receipts: of the sealed batches; ``receipt_bytes``: of their own objects, by name.
        counts: of all of them together.
        failures: that still stand (``FAILURES``).
        runs: of the probe stage.
        repos, shas: (n,) names.
        architectures: (n,) names.
        parameters, bytes, logits, seen: (n,); ``seen`` counts probes.
        image_bytes: of one prepared image, by each way in which some model wants its probes.
        seconds: by part, each (n,).
        devices: how many models were run where.
    """

    ledger: Ledger
    source: str
    own: bool
    probes: int
    fraction: float
    receipts: Sequence[Receipt]
    receipt_bytes: dict[str, int]
    counts: Counts
    failures: pa.Table
    runs: Sequence[Run]
    repos: list[str]
    shas: list[str]
    architectures: npt.NDArray[np.object_]
    parameters: Floats
    bytes: Floats
    logits: Floats
    seen: Floats
    image_bytes: list[int]
    seconds: dict[str, Floats]
    devices: dict[str, int]

    def __len__(self) -> int:
        return len(self.repos)

    @property
    def sealed(self) -> npt.NDArray[np.uint64]:
        """Keys of the items that are through."""
        return key_numbers(item for receipt in self.receipts for item in receipt.items)


def find_measured(store: Store, own_key: str | None, like: str | None) -> Measured | None:
    """Measurements for a plan: of this configuration, else of the store's largest other ledger, else of ``like``.

    Raises:
        UsageError: ``like`` holds no measured model.
    """
    if own_key is not None and (
        measured := _read(Ledger(store, f"observations/{own_key}"), "this configuration", True)
    ):
        return measured
    other = _largest(store, "another ledger of this store")
    if other is not None or like is None:
        return other
    measured = _largest(Store(like), like)
    if measured is None:
        raise UsageError(f"{like} holds no measured models: name a store in which models were probed")
    return measured


def _largest(store: Store, source: str) -> Measured | None:
    folders = {
        name.rsplit("/", 2)[0] for name in store.names("observations", suffix=".json") if "/receipts/" in name
    }
    best: tuple[int, Ledger] | None = None
    for folder in sorted(folders):
        ledger = Ledger(store, folder)
        receipts = ledger.receipts()
        indexed = sum(counts.indexed for counts in ledger.counts(receipts))
        if indexed and (best is None or indexed > best[0]):
            best = indexed, ledger
    return None if best is None else _read(best[1], source, False)


def _read(ledger: Ledger, source: str, own: bool) -> Measured | None:
    """None where no model is indexed."""
    receipts = ledger.receipts()
    counts = sum(ledger.counts(receipts), Counts())
    if not counts.indexed:
        return None
    path = f"{ledger.folder}/manifest.json"
    manifest = ledger.store.read_json(path)
    check_version(manifest.get("version", 1), LEDGER_VERSION, ledger.store.path(path), "ledger")
    sealed = key_numbers(item for receipt in receipts for item in receipt.items)
    table = _models(ledger, receipts)
    recipes = values_of(table["recipe"], str)
    return Measured(
        ledger=ledger,
        source=source,
        own=own,
        probes=int(manifest["probes"]),
        fraction=float(manifest["fraction"]),
        receipts=receipts,
        receipt_bytes={
            name.rsplit("/", 1)[1].removesuffix(".json"): size
            for name, size in ledger.store.sizes(f"{ledger.folder}/receipts").items()
        },
        counts=counts,
        failures=open_failures(ledger.failure_rows(receipts), sealed),
        runs=read_runs(ledger),
        repos=values_of(table["repo"], str),
        shas=values_of(table["sha"], str),
        architectures=np.array(table["architecture"].to_pylist(), object),
        parameters=_numbers(table["parameters"]),
        bytes=_numbers(table["bytes"]),
        logits=_numbers(table["logits"]),
        seen=_numbers(pc.list_value_length(table["probes"])),
        image_bytes=[
            _image_bytes(recipe) for recipe in {_geometry_key(one): one for one in recipes}.values()
        ],
        seconds={part: _numbers(table[f"seconds_{part}"]) for part in PARTS},
        devices=dict(Counter(values_of(table["device"], str))),
    )


def _models(ledger: Ledger, receipts: Sequence[Receipt]) -> pa.Table:
    """Sidecar rows, of whole batches evenly out of all."""
    full = [receipt for receipt in receipts if receipt.models.rows]
    rows = sum(receipt.models.rows for receipt in full)
    step = max(1, -(-rows // _MOST_MODELS))
    return pa.concat_tables(
        read_part(ledger.store, receipt.models, PROBED_MODELS, _COLUMNS) for receipt in full[::step]
    )


def _numbers(column: Column) -> Floats:
    """NaN where there is none."""
    numbers: Floats = pc.cast(column, pa.float64()).to_numpy()
    return numbers


def _geometry_key(recipe: str) -> str:
    """Equal for recipes that share preprocessed probes: all but what happens after (gain, offset)."""
    facts = json.loads(recipe)
    return short_key(
        json.dumps({name: facts[name] for name in sorted({*facts} - {"gain", "offset", "declared"})})
    )


def _image_bytes(recipe: str) -> int:
    facts = json.loads(recipe)
    return int(np.prod(facts["input"])) * (4 if facts["gain"] is None else 1)

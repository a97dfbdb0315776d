"""``probelog-index plan``: measure if asked to, then forecast what is left and the whole."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.runtime.session import session
from pipelines.crawl.stage import Catalogue, hub_endpoint
from pipelines.forecast.estimates import Estimate, Left
from pipelines.forecast.known import Known, stratified
from pipelines.forecast.measured import Measured, find_measured
from pipelines.forecast.predict import Settings, StoreRates, predict
from pipelines.job.job import Job
from pipelines.probe.plan import COLUMNS, first_keys, make_plan
from pipelines.probe.probe_set import ready_probes
from pipelines.probe.stage import probe
from pipelines.probe.timeline import BUSY
from probelog.arrays import values_of
from probelog.errors import FailureReason, UsageError
from probelog.hub.rate_limit import hub_account
from probelog.index.generation import Generation
from probelog.index.pointer import POINTER, Pointer
from probelog.probes.probe_set import ProbeSet, find_probe_set
from probelog.storage.parquet_parts import count_rows
from probelog.storage.schemas import CATALOGUE, FAILURES
from probelog.storage.store import Store

_HOUR = 3600.0
# Failures that the catalogue may foretell, for ledgers whose models this catalogue does not list.
_FORETOLD = {
    FailureReason.GATED, FailureReason.DISABLED, FailureReason.UNSAFE_FORMAT, FailureReason.NOT_FOUND,
    FailureReason.MALFORMED_ROW, FailureReason.TOO_LARGE,
}  # fmt: skip


@dataclass(frozen=True)
class Basis:
    """What a forecast rests on: which ledger, how many of its models, on which devices, and what to mind."""

    source: str
    ledger: str
    models: int
    failures: int
    runs: int
    devices: dict[str, int]
    probes: int
    fraction: float
    notes: list[str]


@dataclass(frozen=True)
class Done:
    """What the ledger holds already. ``store_bytes`` are those of its own sealed parts."""

    models: int
    failed: dict[str, int]
    bytes: int
    file_requests: int
    busy_hours: float
    logits: int
    store_bytes: int


@dataclass(frozen=True)
class Forecast:
    """What a full run takes: what is done, what is left, and both together."""

    catalogue: int
    basis: Basis
    done: Done
    left: Left
    whole: dict[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def run_plan(
    job: Job,
    *,
    measure: int | None = None,
    like: str | None = None,
    workers: int | None = None,
    price: float | None = None,
) -> Forecast:
    """Forecast the rest of a job whose crawl is done.

    Args:
        job: the job.
        measure: probe so many models first, into the job's own ledger.
        like: a store to learn from where this one holds no measured model.
        workers: how many there will be; by default as configured, as measured, or as this machine holds.
        price: of a worker hour, or of a GPU hour where workers have GPUs.

    Raises:
        UsageError: there is no finished crawl, the crawl lists nothing, or nothing was measured.
    """
    endpoint = hub_endpoint()
    catalogue = Catalogue.open(job, endpoint)
    if not count_rows(catalogue.receipt["rows"]):
        raise UsageError(f"{endpoint} lists no model that meets the filters: there is nothing to plan")
    table = catalogue.table([name for name in CATALOGUE.names if name != "tags"])
    config = job.config
    has_token = bool(os.environ.get("HF_TOKEN"))
    known = Known.of(
        table, has_token=has_token, allow_pickle=config.allow_pickle, max_bytes=config.filters.max_bytes
    )
    if measure is not None:
        chosen = stratified(known, values_of(table["repo"], str), measure, config.seed)
        probe_set: ProbeSet | None = _measure(job, table.select(COLUMNS), chosen, endpoint)
    else:
        probe_set = find_probe_set(config.probes, config.probe_count, config.seed, job.store)
    own_key = None if probe_set is None else job.observations_key(probe_set.hash)
    measured = find_measured(job.store, own_key, like)
    if measured is None:
        raise UsageError(
            "no model was measured yet, so there is nothing to fit a forecast on: measure some of the catalogue with "
            "--measure 16 (they are probed for good, nothing is done twice), or learn from another store with --like"
        )
    keys = first_keys(table)
    nothing = FAILURES.empty_table()
    sealed = measured.sealed if measured.own else np.zeros(0, np.uint64)
    failures = measured.failures if measured.own else nothing
    remaining = np.zeros(len(known), bool)
    remaining[make_plan(table, keys, sealed, failures, config.batch_models, False).rows] = True
    probes = probe_set.count if probe_set is not None else config.probe_count or measured.probes
    settings = Settings(
        probes=probes,
        seen=max(1, round(config.fraction * probes)),
        workers=workers or config.workers,
        machine_workers=max(1, int((os.cpu_count() or 1) / config.cpus_per_worker)),
        in_flight=config.in_flight,
        gpus_per_worker=config.gpus_per_worker,
        cache_bytes=config.cache_bytes,
        probe_copy_bytes=_probe_copy(job.store, probe_set),
        account=hub_account(endpoint, with_token=has_token),
        price=price,
    )
    rows = {
        name: row
        for row, name in enumerate(
            zip(values_of(table["repo"], str), values_of(table["sha"], str), strict=True)
        )
    }
    places = [rows.get(name, -1) for name in zip(measured.repos, measured.shas, strict=True)]
    joined = known.at(np.array(places, np.int64))
    unforetold = _unforetold(measured, known, rows)
    forecast = predict(known.chosen(remaining), measured, unforetold, joined, _rates(measured), settings)
    done = _done(measured, known, keys)
    return Forecast(
        catalogue=len(known),
        basis=Basis(
            source=measured.source,
            ledger=measured.ledger.folder.rsplit("/", 1)[1],
            models=len(measured),
            failures=sum(unforetold.values()),
            runs=len(measured.runs),
            devices=measured.devices,
            probes=measured.probes,
            fraction=measured.fraction,
            notes=_notes(measured, settings, forecast, probe_set),
        ),
        done=done,
        left=forecast,
        whole={
            "models indexed": forecast.indexed + done.models,
            "download bytes": forecast.bytes + done.bytes,
            "file requests": forecast.file_requests + done.file_requests,
            "busy hours": forecast.busy_hours + done.busy_hours,
            "logits": forecast.logits + done.logits,
        },
    )


def _measure(job: Job, table: pa.Table, chosen: npt.NDArray[np.bool_], endpoint: str) -> ProbeSet:
    """Probe some rows of the catalogue, as `run_probe` does; what is done already is not done again."""
    from probelog.encoders.torch_encoder import load_encoder

    probe_set = ready_probes(job, load_encoder(job.config.encoder))
    with session(job.config.ray_address):
        probe(job, table, probe_set, endpoint, retry_failed=False, only=chosen)
    return probe_set


def _unforetold(measured: Measured, known: Known, rows: dict[tuple[str, str], int]) -> Counter[str]:
    """Measured failures by reason, without those of models that the catalogue says cannot be indexed."""
    found: Counter[str] = Counter()
    failures = measured.failures
    for repo, sha, reason in zip(
        *(failures[name].to_pylist() for name in ("repo", "sha", "reason")), strict=True
    ):
        row = rows.get((repo, sha))
        if (known.reasons[row] is None) if row is not None else reason not in _FORETOLD:
            found[reason] += 1
    return found


def _done(measured: Measured, known: Known, keys: npt.NDArray[np.uint64]) -> Done:
    if not measured.own:
        return Done(0, {}, 0, 0, 0.0, 0, 0)
    counts = measured.counts
    through = np.isin(keys, measured.sealed)
    parts = [
        part
        for receipt in measured.receipts
        for part in (receipt.observations, receipt.models, receipt.weights, receipt.failures)
        if part is not None
    ]
    return Done(
        models=counts.indexed,
        failed=counts.failures,
        bytes=counts.bytes,
        file_requests=int(known.files[through].sum()),
        busy_hours=sum(counts.seconds.get(part, 0.0) for part in BUSY) / _HOUR,
        logits=counts.logits,
        store_bytes=sum(part.size for part in parts) + sum(measured.receipt_bytes.values()),
    )


def _probe_copy(store: Store, probe_set: ProbeSet | None) -> int:
    """Bytes of the probe set that each node copies; none where the store is a folder."""
    if store.is_local or probe_set is None:
        return 0
    return sum(store.sizes(f"probes/{probe_set.hash[:16]}").values())


def _rates(measured: Measured) -> StoreRates:
    """Bytes a logit and a model of what the measured ledger became: a completion, and the live index."""
    store, key = measured.ledger.store, measured.ledger.folder.rsplit("/", 1)[1]
    descriptors = None
    for name in store.names("completion", suffix="/receipt.json"):
        content = store.read_json(name)
        if content["observations"] == key and content["logits"]:
            descriptors = sum(part["size"] for part in content["parts"].values()) / content["logits"]
    index = store.child("index")
    data = index.read_or_none(POINTER)
    if data is None:
        return StoreRates(descriptors)
    live = Pointer.from_bytes(data, index.path(POINTER))
    settings = Generation(index, live).settings
    if settings.observations != key:
        return StoreRates(descriptors)
    held: Counter[str] = Counter()
    # An update leaves most of what readers see to its base.
    for generation in {live.generation, live.base} - {None}:
        for name, size in index.sizes(f"generations/{generation}").items():
            held[name.split("/")[2].removesuffix(".lance")] += size
    logits, models = held.pop("logits", 0), held.pop("models", 0)
    return StoreRates(
        descriptors, logits / settings.logits, models / settings.models, float(sum(held.values()))
    )


def _notes(measured: Measured, settings: Settings, left: Left, probe_set: ProbeSet | None) -> list[str]:
    """What a reader of the numbers must mind."""
    notes = []
    if not measured.own:
        notes.append(
            f"measured in {measured.source}, not with this configuration: --measure N would be closer"
        )
    if not measured.runs:
        notes.append(
            "no run recorded its wall time: parts of the work are taken not to overlap, and workers to start at once"
        )
    elif settings.workers is not None and all(run.workers != settings.workers for run in measured.runs):
        seen = sorted({run.workers for run in measured.runs})
        notes.append(
            f"the overlap of work was measured with {' and '.join(map(str, seen))} workers, not {settings.workers}"
        )
    devices = {device.split(":")[0] for device in measured.devices}
    wanted = "cuda" if settings.gpus_per_worker > 0 else "cpu"
    if devices - {wanted}:
        notes.append(
            f"measured on {' and '.join(sorted(devices))}, to be run on {wanted}: the hours will differ"
        )
    if probe_set is None:
        notes.append("the probe set is not made yet: its size is taken as configured")
    if left.indexed.low is None:
        notes.append("fewer than three models were measured: no intervals")
    if guessed := left.sizes["number of parameters"] + left.sizes["nothing"]:
        notes.append(f"the download size of {guessed:,} models is estimated from the measured ones")
    if "descriptors" not in left.store_bytes:
        notes.append(
            "store bytes are those of the observations alone: descriptors and index were not measured yet"
        )
    elif "index" not in left.store_bytes:
        notes.append("store bytes are without the index: none of the measured models was published")
    return notes

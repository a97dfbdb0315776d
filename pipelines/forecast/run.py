"""``probelog-index plan``: measure if asked to, then forecast what is left and the whole."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.crawl.stage import Catalogue, hub_endpoint
from pipelines.forecast.estimates import Basis, Done, Forecast, Left
from pipelines.forecast.known import Known, stratified
from pipelines.forecast.measured import Measured, find_measured
from pipelines.forecast.predict import Settings, predict
from pipelines.job.job import Job
from pipelines.probe.plan import COLUMNS, first_keys, make_plan
from pipelines.probe.probe_set import ready_probes
from pipelines.probe.stage import probe
from pipelines.probe.timeline import BUSY
from pipelines.publish.release import LiveIndex
from probelog.arrays import values_of
from probelog.errors import FailureReason, UsageError
from probelog.hub.rate_limit import hub_account
from probelog.probes.probe_set import ProbeSet, find_probe_set
from probelog.storage.layout import COMPLETIONS, INDEX, RECEIPT, GenerationFolder, ProbeSetFolder
from probelog.storage.parquet_parts import count_rows
from probelog.storage.schemas import CATALOGUE, FAILURES
from probelog.storage.store import Store

_HOUR = 3600.0
# Failures that the catalogue may foretell, for ledgers whose models this catalogue does not list.
_FORETOLD = {
    FailureReason.GATED, FailureReason.DISABLED, FailureReason.UNSAFE_FORMAT, FailureReason.NOT_FOUND,
    FailureReason.MALFORMED_ROW, FailureReason.TOO_LARGE,
}  # fmt: skip


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
    remaining = np.zeros(len(known), bool)
    sealed = measured.sealed if measured.own else np.zeros(0, np.uint64)
    failures = measured.failures if measured.own else FAILURES.empty_table()
    remaining[make_plan(table, keys, sealed, failures, config.batch_models, False).rows] = True
    settings = Settings(
        config=config,
        probes=probe_set.count if probe_set is not None else config.probe_count or measured.probes,
        workers=workers or config.workers,
        probe_copy_bytes=_probe_copy(job.store, probe_set),
        account=hub_account(endpoint, with_token=has_token),
        price=price,
    )
    names = zip(values_of(table["repo"], str), values_of(table["sha"], str), strict=True)
    failed_versions = zip(
        values_of(measured.failures["repo"], str), values_of(measured.failures["sha"], str), strict=True
    )
    asked = {*measured.versions, *failed_versions}
    rows = {name: row for row, name in enumerate(names) if name in asked}
    places = [rows.get(name, -1) for name in measured.versions]
    failed = _unpredicted_failures(measured, known, rows)
    left = predict(
        known, remaining, measured, np.array(places, np.int64), failed, _store_rates(measured), settings
    )
    done = _done(measured, known, keys)
    return Forecast(
        catalogue=len(known),
        basis=Basis(
            source=measured.source,
            ledger=measured.ledger.paths.key,
            models=len(measured),
            failures=sum(failed.values()),
            runs=len(measured.runs),
            devices=measured.devices,
            probes=measured.probes,
            fraction=measured.fraction,
            notes=_notes(measured, settings, left, probe_set),
        ),
        done=done,
        left=left,
        whole={
            "models indexed": left.indexed + done.models,
            "download bytes": left.bytes + done.bytes,
            "file requests": left.file_requests + done.file_requests,
            "busy hours": left.busy_hours + done.busy_hours,
            "logits": left.logits + done.logits,
        },
    )


def _measure(job: Job, table: pa.Table, chosen: npt.NDArray[np.bool_], endpoint: str) -> ProbeSet:
    """Probe some rows of the catalogue, as `run_probe` does; what is done already is not done again."""
    from probelog.encoders.torch_encoder import deferred_encoder

    probe_set = ready_probes(job, deferred_encoder(job.config.encoder))
    probe(job, table, probe_set, endpoint, retry_failed=False, only=chosen)
    return probe_set


def _unpredicted_failures(measured: Measured, known: Known, rows: dict[tuple[str, str], int]) -> Counter[str]:
    """Measured failures by reason, without those of models that the catalogue says cannot be indexed."""
    counts: Counter[str] = Counter()
    failures = measured.failures
    for repo, sha, reason in zip(
        *(failures[name].to_pylist() for name in ("repo", "sha", "reason")), strict=True
    ):
        row = rows.get((repo, sha))
        if (known.reasons[row] is None) if row is not None else reason not in _FORETOLD:
            counts[reason] += 1
    return counts


def _done(measured: Measured, known: Known, keys: npt.NDArray[np.uint64]) -> Done:
    if not measured.own:
        return Done(0, {}, 0, 0, 0.0, 0, 0)
    counts = measured.counts
    parts = sum(map(measured.part_bytes, ("observations", "models", "weights", "failures")))
    return Done(
        models=counts.indexed,
        failed=counts.failures,
        bytes=counts.bytes,
        file_requests=int(known.files[np.isin(keys, measured.sealed)].sum()),
        busy_hours=sum(counts.seconds.get(part, 0.0) for part in BUSY) / _HOUR,
        logits=counts.logits,
        store_bytes=parts + measured.receipt_bytes,
    )


def _probe_copy(store: Store, probe_set: ProbeSet | None) -> int:
    """Bytes of the probe set that each node copies; none where the store is a folder."""
    if store.is_local or probe_set is None:
        return 0
    return sum(store.sizes(ProbeSetFolder.of(probe_set.hash).path).values())


def _store_rates(measured: Measured) -> dict[str, float]:
    """Bytes a logit of what the measured ledger became: a completion's descriptors, and the live index's tables of
    logits and models.
    """
    store, key = measured.ledger.store, measured.ledger.paths.key
    rates = {}
    for _, content in store.records(COMPLETIONS, RECEIPT):
        if content["observations"] == key and content["logits"]:
            rates["descriptors"] = sum(part["size"] for part in content["parts"].values()) / content["logits"]
    live = LiveIndex.open(store.child(INDEX))
    if live is not None and live.generation.settings.observations == key:
        # An update leaves most of what readers see to its base.
        names = [live.pointer.generation, *([live.pointer.base] if live.pointer.base is not None else [])]
        sizes = [
            sum(live.generation.index.sizes(GenerationFolder.of(name).table(table)).values())
            for name in names
            for table in ("logits", "models")
        ]
        rates["index"] = sum(sizes) / live.generation.settings.logits
    return rates


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
    kind_of_device = settings.config.device
    if devices - {kind_of_device}:
        notes.append(
            f"measured on {' and '.join(sorted(devices))}, to be run on {kind_of_device}: the hours will differ"
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

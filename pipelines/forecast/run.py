"""``probelog-index plan``: measure if asked to, then forecast what is left and the whole."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.crawl.stage import Catalogue, first_of_each, hub_endpoint
from pipelines.forecast.estimates import Basis, Done, Forecast, Left
from pipelines.forecast.known import COLUMNS as KNOWN_COLUMNS
from pipelines.forecast.known import Known, stratified
from pipelines.forecast.measured import Measured, find_measured
from pipelines.forecast.predict import Settings, predict
from pipelines.job.job import Job
from pipelines.probe.plan import COLUMNS, first_keys, places, untried
from pipelines.probe.probe_set import ready_probes
from pipelines.probe.stage import probe
from pipelines.publish.release import LiveIndex
from pipelines.sample.stage import listed_generators, sample, samples_here
from probelog.arrays import values_of
from probelog.encoders.torch_encoder import deferred_encoder
from probelog.errors import FailureReason, UsageError
from probelog.hub.rate_limit import hub_account
from probelog.kinds.kind import Kind
from probelog.kinds.registry import CLASSIFIER, GENERATOR
from probelog.probes.probe_set import ProbeSet, find_probe_set
from probelog.storage.layout import COMPLETIONS, INDEX, RECEIPT, GenerationFolder, ProbeSetFolder
from probelog.storage.parquet_parts import count_rows
from probelog.storage.schemas import FAILURES
from probelog.storage.store import Store

_HOUR = 3600.0
# Failures that the catalogue may foretell, for ledgers whose models this catalogue does not list.
_FORETOLD = {
    FailureReason.GATED, FailureReason.DISABLED, FailureReason.UNSAFE_FORMAT, FailureReason.NOT_FOUND,
    FailureReason.MALFORMED_ROW, FailureReason.TOO_LARGE,
}  # fmt: skip


@dataclass(frozen=True)
class _Listed:
    """The models of a kind that a job lists.

    Attributes:
        kind: of the models.
        known: what their catalogue tells of each, and
        keys: their first attempts' keys.
        table: reads some columns of the catalogue.
    """

    kind: Kind
    known: Known
    keys: npt.NDArray[np.uint64]
    table: Callable[[Sequence[str]], pa.Table]

    @classmethod
    def of(
        cls,
        job: Job,
        kind: Kind,
        catalogue: Iterable[pa.Table],
        table: Callable[[Sequence[str]], pa.Table],
        max_bytes: int,
    ) -> _Listed:
        """From the parts of a catalogue (``KNOWN_COLUMNS``), of which one is in memory at a time."""
        has_token, allow_pickle = bool(os.environ.get("HF_TOKEN")), job.config.allow_pickle
        parts = []
        for part in catalogue:
            known = Known.of(part, kind, has_token=has_token, allow_pickle=allow_pickle, max_bytes=max_bytes)
            parts.append((known, first_keys(part), part["repo"]))
        known_parts, keys, repos = zip(*parts, strict=True)
        newest = first_of_each(repos)
        return cls(kind, Known.joined(known_parts).chosen(newest), np.concatenate(keys)[newest], table)

    def chosen(self, table: pa.Table, count: int, seed: int) -> npt.NDArray[np.bool_]:
        """Mask of some rows of the catalogue to measure."""
        return stratified(self.known, values_of(table["repo"], str), count, seed)


@dataclass(frozen=True)
class _Asked:
    """Of `run_plan`."""

    endpoint: str
    like: str | None
    workers: int | None
    price: float | None


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
        measure: run so many models of each kind first, into the job's own ledgers.
        like: a store to learn from where this one holds no measured model.
        workers: how many there will be; by default as configured, as measured, or as this machine holds.
        price: of a worker hour, or of a GPU hour where workers have GPUs.

    Raises:
        UsageError: there is no finished crawl, the crawl lists nothing, or nothing was measured.
    """
    endpoint, config = hub_endpoint(), job.config
    classifiers, generators = _classifiers(job, endpoint), _generators(job, endpoint)
    if classifiers is None and generators is None:
        raise UsageError(f"{endpoint} lists no model that meets the filters: there is nothing to plan")
    if measure is not None:
        probe_set: ProbeSet | None = _measure(job, classifiers, generators, measure, endpoint)
    else:
        probe_set = find_probe_set(config.probes, config.probe_count, config.seed, job.store)
    asked = _Asked(endpoint, like, workers, price)
    forecasts: list[Forecast] = []
    if classifiers is not None:
        own_key = None if probe_set is None else job.observations_key(probe_set.hash)
        forecasts.append(_forecast(job, classifiers, own_key, probe_set, asked))
    if generators is not None:
        samples = samples_here(job)
        own_key = None if samples is None else samples.paths.key
        forecasts.append(_forecast(job, generators, own_key, None, asked))
    return forecasts[0] if len(forecasts) == 1 else replace(forecasts[0], generators=forecasts[1])


def _classifiers(job: Job, endpoint: str) -> _Listed | None:
    """None where none are listed."""
    catalogue = Catalogue.open(job, endpoint)
    if not count_rows(catalogue.receipt["rows"]):
        return None
    table = catalogue.table
    return _Listed.of(job, CLASSIFIER, catalogue.parts(KNOWN_COLUMNS), table, job.config.filters.max_bytes)


def _generators(job: Job, endpoint: str) -> _Listed | None:
    """None where the job wants none, or none are listed."""
    generators = job.config.generators
    if not generators.enabled:
        return None
    table = listed_generators(job, endpoint, [*{*COLUMNS, *KNOWN_COLUMNS}])
    if not table.num_rows:
        return None
    return _Listed.of(job, GENERATOR, [table], table.select, generators.filters.max_bytes)


def _measure(
    job: Job, classifiers: _Listed | None, generators: _Listed | None, count: int, endpoint: str
) -> ProbeSet:
    """Run some models of each kind, as `run_probe` and `run_sample` do; what is done already is not done again."""
    encoder, seed = deferred_encoder(job.config.encoder), job.config.seed
    probe_set = ready_probes(job, encoder)
    if classifiers is not None:
        table = classifiers.table(COLUMNS)
        probe(job, table, probe_set, endpoint, False, classifiers.chosen(table, count, seed))
    if generators is not None:
        table = generators.table(COLUMNS)
        sample(job, table, encoder, endpoint, False, generators.chosen(table, count, seed))
    return probe_set


def _forecast(
    job: Job, listed: _Listed, own_key: str | None, probe_set: ProbeSet | None, asked: _Asked
) -> Forecast:
    """Of one kind; ``own_key``: of the ledger that its models are added to, where that is known."""
    kind, known, keys = listed.kind, listed.known, listed.keys
    measured = find_measured(job.store, own_key, asked.like, kind)
    if measured is None:
        raise UsageError(
            f"no {kind.name} was measured yet, so there is nothing to fit a forecast on: measure some of the catalogue with "
            "--measure 16 (they stay indexed, nothing is done twice), or learn from another store with --like"
        )
    sealed = measured.sealed if measured.own else np.zeros(0, np.uint64)
    failures = measured.failures if measured.own else FAILURES.empty_table()
    first_attempts, retries, _ = untried(keys, sealed, failures, False)
    remaining = first_attempts | retries
    settings = _settings(job, measured, probe_set, asked)
    failed = _unpredicted_failures(measured, known, places(keys, first_keys(measured.failures)))
    at, rates = places(keys, first_keys(measured.models)), _store_rates(measured, kind)
    left = predict(known, remaining, measured, at, failed, rates, settings)
    done = _done(measured, known, keys)
    notes = _notes(measured, settings, left)
    if kind is CLASSIFIER and probe_set is None:
        notes.append("the probe set is not made yet: its size is taken as configured")
    if kind is GENERATOR:
        bases = pc.count_distinct(
            listed.table(["base_model"]).filter(pa.array(remaining))["base_model"]
        ).as_py()
        if bases:
            notes.append(f"the bases of adapters are downloaded besides, {bases:,} at the most")
    return Forecast(
        catalogue=len(known),
        basis=Basis(
            source=measured.source,
            ledger=measured.ledger.paths.key,
            models=len(measured),
            failures=sum(failed.values()),
            runs=len(measured.runs),
            devices=measured.devices,
            probes=measured.made_with.get("probes"),
            fraction=measured.made_with.get("fraction"),
            notes=notes,
        ),
        done=done,
        left=left,
        whole={
            "models indexed": left.indexed + done.models,
            "download bytes": left.bytes + done.bytes,
            "file requests": left.file_requests + done.file_requests,
            "busy hours": left.busy_hours + done.busy_hours,
            kind.contents.counted: left.logits + done.logits,
        },
    )


def _settings(job: Job, measured: Measured, probe_set: ProbeSet | None, asked: _Asked) -> Settings:
    config, generators = job.config, job.config.generators
    made = measured.made_with
    probes = config.probe_count if probe_set is None else probe_set.count
    probes = probes or int(made.get("probes", 0))
    seen = max(1, round(config.fraction * probes))
    classifiers = measured.ledger.contents is CLASSIFIER.contents
    if not classifiers:
        # Not every generator makes as many samples as are asked for.
        made_of_asked = measured.counts.logits / measured.counts.indexed / made["samples"]
        seen = max(1, round(generators.samples * made_of_asked * generators.steps))
    return Settings(
        config=config,
        passes=seen,
        values=seen if classifiers else 1,
        probes=probes if classifiers else 0,
        workers=asked.workers or config.workers,
        probe_copy_bytes=_probe_copy(job.store, probe_set),
        account=hub_account(asked.endpoint, with_token=bool(os.environ.get("HF_TOKEN"))),
        price=asked.price,
    )


def _unpredicted_failures(measured: Measured, known: Known, rows: npt.NDArray[np.int64]) -> Counter[str]:
    """Measured failures by reason, without those of models that the catalogue says cannot be indexed.

    ``rows``: of each failure in the catalogue; -1 where it does not list the model.
    """
    reasons = measured.failures["reason"]
    by_name = pc.is_in(reasons, pa.array([reason.value for reason in _FORETOLD])).to_numpy()
    foretold = np.where(rows < 0, by_name, known.doomed[rows])
    return Counter(values_of(reasons.filter(pa.array(~foretold)), str))


def _done(measured: Measured, known: Known, keys: npt.NDArray[np.uint64]) -> Done:
    if not measured.own:
        return Done(0, {}, 0, 0, 0.0, 0, 0)
    counts = measured.counts
    parts = sum(map(measured.part_bytes, ("rows", "models", "weights", "failures")))
    return Done(
        models=counts.indexed,
        failed=counts.failures,
        bytes=counts.bytes,
        file_requests=int(known.files[np.isin(keys, measured.sealed)].sum()),
        busy_hours=sum(counts.seconds.get(part, 0.0) for part in measured.busy) / _HOUR,
        logits=counts.logits,
        store_bytes=parts + measured.receipt_bytes,
    )


def _probe_copy(store: Store, probe_set: ProbeSet | None) -> int:
    """Bytes of the probe set that each node copies; none where the store is a folder."""
    if store.is_local or probe_set is None:
        return 0
    return sum(store.sizes(ProbeSetFolder.of(probe_set.hash).path).values())


def _store_rates(measured: Measured, kind: Kind) -> dict[str, float]:
    """Bytes a row of what the measured ledger became: a completion's descriptors, and the live index's tables of the kind."""
    store, key = measured.ledger.store, measured.ledger.paths.key
    rates = {}
    for _, content in store.records(COMPLETIONS, RECEIPT):
        if content["observations"] == key and content["logits"]:
            rates["descriptors"] = sum(part["size"] for part in content["parts"].values()) / content["logits"]
    live = LiveIndex.open(store.child(INDEX))
    if live is None:
        return rates
    settings = live.generation.settings
    generators = settings.generators
    rows = {settings.observations: settings.logits} if kind is CLASSIFIER else {}
    if kind is GENERATOR and generators is not None:
        rows = {generators.ledger: measured.counts.logits}
    if rows.get(key):
        # An update leaves most of what readers see to its base.
        names = [live.pointer.generation, *([live.pointer.base] if live.pointer.base is not None else [])]
        sizes = [
            sum(live.generation.index.sizes(GenerationFolder.of(name).table(table)).values())
            for name in names
            for table in kind.tables
        ]
        rates["index"] = sum(sizes) / rows[key]
    return rates


def _notes(measured: Measured, settings: Settings, left: Left) -> list[str]:
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
    if left.indexed.low is None:
        notes.append("fewer than three models were measured: no intervals")
    if guessed := left.sizes["number of parameters"] + left.sizes["nothing"]:
        notes.append(f"the download size of {guessed:,} models is estimated from the measured ones")
    wanted = settings.config.generators
    made = [measured.made_with.get(name) for name in ("samples", "steps")]
    if measured.ledger.contents is GENERATOR.contents and made != [wanted.samples, wanted.steps]:
        notes.append(
            f"measured with {made[0]} samples of {made[1]} steps, not {wanted.samples} of {wanted.steps}"
        )
    classifiers = measured.ledger.contents is CLASSIFIER.contents
    if classifiers and "descriptors" not in left.store_bytes:
        notes.append(
            "store bytes are those of the observations alone: descriptors and index were not measured yet"
        )
    elif "index" not in left.store_bytes:
        notes.append("store bytes are without the index: none of the measured models was published")
    return notes

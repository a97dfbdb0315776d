"""The probe stage: run every model of the catalogue on a random subset of the probes."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.probing.coordinator import CoordinatorHandle
from cluster.probing.prober import ProberSpec, probers
from cluster.probing.worker import Workers
from pipelines.job.job import Job
from pipelines.probe.run import StageResult, run_stage
from probelog import logs
from probelog.hub.client import endpoint_with_login
from probelog.kinds.registry import CLASSIFIER
from probelog.probes.probe_set import ProbeSet
from probelog.storage.layout import LedgerFolder
from probelog.storage.ledger import Ledger


def probe(
    job: Job,
    table: pa.Table,
    probe_set: ProbeSet,
    endpoint: str,
    retry_failed: bool,
    only: npt.NDArray[np.bool_] | None = None,
    key: str | None = None,
) -> StageResult:
    """Probe the models that the ledger does not hold yet (`pipelines.probe.run.run_stage`).

    Args:
        job: configuration and store.
        table: the catalogue.
        probe_set: the probes.
        endpoint: the Hub's address.
        retry_failed: also retry failures that a retry is not expected to cure.
        only: mask of the table's rows to probe now; all by default.
        key: of the ledger; by default that of all models with the job's probes, fraction and seed.

    Raises:
        StoreError: the store refused for longer than ``store_retry_seconds``. A later run resumes.
    """
    config = job.config
    key = job.observations_key(probe_set.hash) if key is None else key
    ledger = Ledger(job.store, LedgerFolder.of(key).path)
    settings = {
        "probe_set": probe_set.hash,
        "probes": probe_set.count,
        "fraction": config.fraction,
        "seed": config.seed,
    }
    workers_of = partial(_workers, _spec(job, ledger, probe_set, endpoint))
    return run_stage(job, CLASSIFIER, ledger, settings, table, endpoint, workers_of, retry_failed, only)


def _workers(spec: ProberSpec, coordinator: CoordinatorHandle) -> Workers:
    return probers(spec, coordinator)


def _spec(job: Job, ledger: Ledger, probe_set: ProbeSet, endpoint: str) -> ProberSpec:
    config = job.config
    return ProberSpec(
        store=job.store.uri,
        folder=ledger.folder,
        probe_set=probe_set.hash,
        fraction=config.fraction,
        seed=config.seed,
        endpoint=endpoint_with_login(endpoint),
        probes=probe_set.count,
        max_bytes=config.filters.max_bytes,
        max_params=config.filters.max_params,
        settings=config,
        log_level=logs.current(),
    )

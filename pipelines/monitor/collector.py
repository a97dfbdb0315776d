"""The state of a store as metrics for Prometheus: how old the index is, what the gate said, how the last runs ended.

They are read from the store, not from a running job, so that they are there between the runs, and when no run starts.
``METRICS`` lists them all; `docs/operators/monitoring.md` says what to do with them.
"""

from __future__ import annotations

import datetime as dt
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pipelines.job.figures import SUCCEEDED
from pipelines.probe.summary import Summary
from pipelines.publish.release import LiveIndex
from pipelines.quality.report import last_report
from probelog.errors import StoreError
from probelog.index.settings import GenerationSettings
from probelog.kinds.registry import KINDS
from probelog.storage import layout
from probelog.storage.ledger import Ledger
from probelog.storage.store import Store

# As `pipelines.inspect.status`: a driver that has been silent for so long is gone.
_STALE_SECONDS = 120.0

METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "probelog_store_readable": ("1 if the last look at the store succeeded.", ()),
    "probelog_store_read_seconds": ("How long that look took.", ()),
    "probelog_store_disk_free_bytes": ("Free where the store is a folder of this machine.", ()),
    "probelog_generation_info": ("1 for the live generation.", ("generation", "base")),
    "probelog_generation_published_seconds": ("When the live generation went live, since 1970.", ()),
    "probelog_generation_listed_seconds": ("When the Hub was last listed in full for it, since 1970.", ()),
    "probelog_index_models": ("Classifiers of the live generation.", ()),
    "probelog_index_generators": ("Generators of the live generation.", ()),
    "probelog_index_logits": ("Logits of the live generation, those of copies counted.", ()),
    "probelog_index_rows": ("Rows of its table of logits.", ()),
    "probelog_index_added": ("Models that nightly runs added to its base.", ()),
    "probelog_index_removed": ("Models that nightly runs removed from its base.", ()),
    "probelog_index_held": ("1 while an operator holds the live generation.", ()),
    "probelog_completion_rmse": ("Held-out error of the completion.", ()),
    "probelog_completion_top_rmse": ("Held-out error on the largest values.", ()),
    "probelog_drift": ("Relative change since the base was published.", ("kind",)),
    "probelog_drift_share": ("Share of logits added since.", ()),
    "probelog_gate_seconds": ("When the quality gate last judged, since 1970.", ()),
    "probelog_gate_passed": ("1 if its last verdict was that all limits are kept.", ()),
    "probelog_gate_refused": ("1 if its last candidate was not published.", ()),
    "probelog_gate_value": ("A measure of its last candidate, a share.", ("measure",)),
    "probelog_gate_worse": ("How much worse the measure has become at the least.", ("measure",)),
    "probelog_gate_limit": ("How much worse it may become.", ("measure",)),
    "probelog_ledger_planned": ("Models that a ledger is for.", ("ledger", "stage")),
    "probelog_ledger_indexed": ("Models of it that are indexed.", ("ledger", "stage")),
    "probelog_ledger_failed": ("Models of it that failed.", ("ledger", "stage", "reason")),
    "probelog_ledger_left": ("Models of it that are left.", ("ledger", "stage")),
    "probelog_ledger_running": ("1 while a driver works on it.", ("ledger", "stage")),
    "probelog_run_started_seconds": ("When the last run of a command started, since 1970.", ("command",)),
    "probelog_run_updated_seconds": ("When it last said something.", ("command",)),
    "probelog_run_succeeded_seconds": ("When a run of the command last succeeded.", ("command",)),
    "probelog_run_outcome": ("1 for how the last run ended.", ("command", "outcome")),
    "probelog_run_succeeded": ("1 if the last run succeeded, 0 if it did not or has not yet.", ("command",)),
    "probelog_run_stage_seconds": ("What its stages took.", ("command", "stage")),
    "probelog_run_models": ("Models by what it did with them.", ("command", "what")),
    "probelog_run_hub_requests": ("What it asked of the Hub.", ("command", "kind")),
    "probelog_run_hub_throttled": ('How often the Hub said "too many requests".', ("command",)),
    "probelog_run_hub_wait_seconds": ("How long it waited for the Hub, over all threads.", ("command",)),
    "probelog_run_disk_free_bytes": ("The least that was free below its scratch folder.", ("command",)),
}  # fmt: skip

Add = Callable[..., None]


class StoreCollector(Collector):
    """Looks at a store at most every ``seconds``, however often it is asked.

    Args:
        store: to look at.
        seconds: between two looks.
    """

    def __init__(self, store: Store, seconds: float = 60.0) -> None:
        self._store = store
        self._seconds = seconds
        self._read = float("-inf")
        self._families: list[GaugeMetricFamily] = []
        self._settings: dict[str, GenerationSettings] = {}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The present metrics."""
        if time.monotonic() - self._read >= self._seconds:
            self._families = self._look()
            self._read = time.monotonic()
        yield from self._families

    def _look(self) -> list[GaugeMetricFamily]:
        families = {
            name: GaugeMetricFamily(name, about, labels=labels) for name, (about, labels) in METRICS.items()
        }

        def add(name: str, value: float | bool | None, *labels: str) -> None:
            if value is not None:
                families[name].add_metric(labels, float(value))

        begun = time.monotonic()
        readable = True
        # What fails leaves the others: a damaged report must not hide the age of the index.
        for part in (self._index, self._gate, self._ledgers, self._runs, self._disk):
            try:
                part(add)
            except (StoreError, KeyError, TypeError, ValueError, AttributeError):
                readable = False
        add("probelog_store_readable", readable)
        add("probelog_store_read_seconds", time.monotonic() - begun)
        return [family for family in families.values() if family.samples]

    def _index(self, add: Add) -> None:
        live = LiveIndex.open(self._store.child(layout.INDEX))
        if live is None:
            return
        pointer = live.pointer
        add("probelog_generation_info", 1, pointer.generation, pointer.base or "")
        add("probelog_generation_published_seconds", _seconds(pointer.published))
        add("probelog_index_held", pointer.held is not None)
        if pointer.generation not in self._settings:
            self._settings = {pointer.generation: live.generation.settings}
        settings = self._settings[pointer.generation]
        add("probelog_generation_listed_seconds", _seconds(settings.listed))
        add("probelog_index_models", settings.models)
        generators = settings.generators
        add("probelog_index_generators", 0 if generators is None else generators.models)
        add("probelog_index_logits", settings.logits)
        add("probelog_index_rows", settings.rows)
        add("probelog_index_added", settings.added or 0)
        add("probelog_index_removed", settings.gone or 0)
        add("probelog_completion_rmse", settings.held_out_rmse)
        add("probelog_completion_top_rmse", settings.held_out_top_rmse)
        drift: Mapping[str, Any] = settings.drift or {}
        for kind in ("held_out", "temperature", "background"):
            add("probelog_drift", abs(drift.get(kind, 0.0)), kind)
        add("probelog_drift_share", drift.get("share", 0.0))

    def _gate(self, add: Add) -> None:
        report = last_report(self._store)
        if report is None:
            return
        add("probelog_gate_seconds", _seconds(report["at"]))
        add("probelog_gate_passed", report["passed"])
        add("probelog_gate_refused", report["refused"])
        for measure in report["measures"]:
            for name in ("value", "worse", "limit"):
                add(f"probelog_gate_{name}", measure[name], measure["name"])

    def _ledgers(self, add: Add) -> None:
        """From the sums alone: receipts are many, and a driver adds to the sums every ten seconds."""
        records = [
            (kind.stage, Ledger(self._store, folder, kind.contents), manifest)
            for kind in KINDS
            for folder, manifest in self._store.records(kind.ledgers, layout.MANIFEST)
        ]
        for stage, ledger, manifest in records:
            summary = Summary.stored(ledger)
            counts, labels = summary.counts, (ledger.paths.key, stage)
            failed = counts.failures
            running = summary.running
            add("probelog_ledger_planned", manifest["planned"], *labels)
            add("probelog_ledger_indexed", counts.indexed, *labels)
            for reason, count in failed.items():
                add("probelog_ledger_failed", count, *labels, reason)
            left = max(0, manifest["planned"] - counts.indexed - sum(failed.values()))
            add("probelog_ledger_left", left if running is None else running.left, *labels)
            alive = running is not None and time.time() - running.at < _STALE_SECONDS
            add("probelog_ledger_running", alive, *labels)

    def _runs(self, add: Add) -> None:
        for name in self._store.names(layout.RUNS, suffix=".json"):
            run = self._store.read_json(name)
            command = run["command"]
            add("probelog_run_started_seconds", _seconds(run["started"]), command)
            add("probelog_run_updated_seconds", _seconds(run["updated"]), command)
            if run["succeeded"] is not None:
                add("probelog_run_succeeded_seconds", _seconds(run["succeeded"]), command)
            add("probelog_run_outcome", 1, command, run["outcome"])
            add("probelog_run_succeeded", run["outcome"] == SUCCEEDED, command)
            for stage, seconds in run["stages"].items():
                add("probelog_run_stage_seconds", seconds, command, stage)
            for what, count in run["counts"].items():
                add("probelog_run_models", count, command, what)
            for kind in ("api", "file"):
                add("probelog_run_hub_requests", run["hub"][kind], command, kind)
            add("probelog_run_hub_throttled", run["hub"]["throttled"], command)
            add("probelog_run_hub_wait_seconds", run["hub"]["wait_seconds"], command)
            add("probelog_run_disk_free_bytes", run["disk_free_bytes"], command)

    def _disk(self, add: Add) -> None:
        if self._store.is_local:
            add("probelog_store_disk_free_bytes", shutil.disk_usage(self._store.root).free)


def _seconds(text: str) -> float:
    return dt.datetime.fromisoformat(text).timestamp()

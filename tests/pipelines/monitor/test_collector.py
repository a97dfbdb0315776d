"""What the exporter says of a store, as Prometheus reads it."""

from __future__ import annotations

import io
import socket
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipelines.config.model import Config
from pipelines.job.figures import recorded
from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.monitor.collector import METRICS, StoreCollector
from pipelines.monitor.serve import metrics_text, serve_metrics
from pipelines.probe.summary import Running, Summary
from pipelines.quality.measure import Measure
from pipelines.quality.report import Verdict, write_report
from probelog.storage.layout import LedgerFolder, sample_ledger
from probelog.storage.ledger import Ledger
from probelog.storage.store import Store
from tests.probelog.storage.test_ledger import fail, spool
from tests.support.worlds.small_index import MODELS_OF_ALL_SORTS, build

Values = dict[tuple[str, ...], float]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with something of everything."""
    folder = tmp_path_factory.mktemp("store")
    store = Store(folder)
    drift = {"held_out": 0.02, "temperature": -0.3, "background": 0.1, "share": 0.04}
    settings = {"drift": drift, "added": 3, "gone": 1, "held_out_rmse": 0.61}
    build(store.child("index"), "second", images=False, settings=settings)
    measures = [
        Measure("lost answers", "A sentence.", 0.1, 0.05, 0.04, 0.02, 50),
        Measure("models gone", "A sentence.", None, None, None, 0.05, 0, "not judged"),
    ]
    write_report(store, Verdict("third", "second", True, measures, "2026-01-02T03:04:05+00:00", 1.0))
    ledger = Ledger(store, "observations/key")
    store.write_json(ledger.paths.manifest, {"planned": 10, "version": 1})
    ledger.seal([spool(ledger, "a/1"), spool(ledger, "a/2"), fail(ledger, "a/3")])
    Summary.covering(ledger, ledger.receipts()).write(ledger, Running.now(7, None, None), now=True)
    store.write_json(LedgerFolder(sample_ledger("samples")).manifest, {"planned": 4, "version": 1})
    content = {"store": str(folder), "probes": "unused", "scratch": str(folder / "scratch")}
    job = Job.of(Config.model_validate(content), Report(io.StringIO()))
    with recorded(job, "nightly"):
        with job.figures.stage("publish"):
            pass
        job.figures.counts["added"] = 5
    return store


def values(text: str) -> dict[str, Values]:
    """Values by metric and labels."""
    return {
        family.name: {tuple(sample.labels.values()): sample.value for sample in family.samples}
        for family in text_string_to_metric_families(text)
    }


def test_everything_that_is_listed_is_said_of_a_full_store(store: Store) -> None:
    found = values(metrics_text(store.uri))
    assert found.keys() == METRICS.keys()
    assert found["probelog_store_readable"] == {(): 1}
    assert found["probelog_generation_info"] == {("second", ""): 1} or found["probelog_generation_info"] == {
        ("", "second"): 1
    }
    assert time.time() - found["probelog_generation_published_seconds"][()] < 3600
    assert found["probelog_index_models"] == {(): len(MODELS_OF_ALL_SORTS)}
    assert (found["probelog_index_added"], found["probelog_index_removed"]) == ({(): 3}, {(): 1})
    assert found["probelog_index_held"] == {(): 0}
    assert found["probelog_completion_rmse"] == {(): 0.61}
    assert found["probelog_drift"] == {("held_out",): 0.02, ("temperature",): 0.3, ("background",): 0.1}
    assert (found["probelog_gate_passed"], found["probelog_gate_refused"]) == ({(): 0}, {(): 1})
    assert found["probelog_gate_worse"] == {("lost answers",): 0.04}
    assert found["probelog_gate_limit"] == {("lost answers",): 0.02, ("models gone",): 0.05}
    assert found["probelog_index_generators"] == {(): 0}
    probed, sampled = ("key", "probe"), ("samples", "sample")
    assert found["probelog_ledger_indexed"] == {probed: 2, sampled: 0}
    assert found["probelog_ledger_failed"] == {("key", "timeout", "probe"): 1}
    assert found["probelog_ledger_left"] == {probed: 7, sampled: 4}
    assert found["probelog_ledger_running"] == {probed: 1, sampled: 0}
    assert found["probelog_run_succeeded"] == {("nightly",): 1}
    assert found["probelog_run_outcome"] == {("nightly", "succeeded"): 1}
    assert found["probelog_run_stage_seconds"].keys() == {("nightly", "publish")}
    assert found["probelog_run_models"] == {("nightly", "added"): 5}
    assert found["probelog_run_hub_requests"].keys() == {("nightly", "api"), ("nightly", "file")}


def test_an_empty_store_is_readable_and_has_no_index(tmp_path: Path) -> None:
    found = values(metrics_text(str(tmp_path)))
    assert found["probelog_store_readable"] == {(): 1}
    assert not [name for name in found if not name.startswith("probelog_store_")]


def test_what_is_damaged_hides_nothing_else(store: Store) -> None:
    report = Path(store.path("quality/third.json"))
    whole = report.read_bytes()
    report.write_bytes(whole[:-20])
    try:
        found = values(metrics_text(store.uri))
    finally:
        report.write_bytes(whole)
    assert found["probelog_store_readable"] == {(): 0}
    assert "probelog_gate_passed" not in found
    assert {"probelog_index_models", "probelog_ledger_left", "probelog_run_succeeded"} <= found.keys()


def test_a_store_is_looked_at_once_however_often_it_is_asked(store: Store) -> None:
    looks = []

    class Watched(Store):
        def names(self, folder: str, suffix: str = "") -> list[str]:
            looks.append(folder)
            return super().names(folder, suffix)

    collector = StoreCollector(Watched(store.uri), 1000.0)
    first, second = (list(collector.collect()) for _ in range(2))
    assert first == second
    assert looks.count("runs") == 1


def test_it_is_served(store: Store) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threading.Thread(target=serve_metrics, args=(store.uri, "127.0.0.1", port, 60.0), daemon=True).start()
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                assert values(answer.read().decode()).keys() == METRICS.keys()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)

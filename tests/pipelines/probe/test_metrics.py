"""What a run tells Prometheus, as Prometheus would read it."""

from __future__ import annotations

import re
import time
import urllib.request

import pytest
import ray

from cluster.probing.results import ItemReport
from pipelines.probe.metrics import COUNTERS, GAUGES, HISTOGRAMS, Metrics
from probelog.hub.usage import HubUsage
from tests.support.worlds.tiny_world import MODELS, Indexed

pytestmark = pytest.mark.usefixtures("local_ray")

INDEXED = ItemReport(
    seconds={"download": 1.0, "forward": 2.0},
    bytes=1000,
    rows=10,
    parameters=5,
    hub=HubUsage(api=1, file=2, throttled=1, wait_seconds=0.5),
)


def scrape() -> str:
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=30) as answer:
        return str(answer.read().decode())


def test_every_metric_is_exported_under_its_name() -> None:
    metrics, of_generators = Metrics("logits"), Metrics("samples")
    metrics.add(INDEXED, 3.0)
    of_generators.add(INDEXED, 3.0)
    metrics.add(ItemReport(copies_checked=False, seconds={"download": 1.0}), 1.0)
    metrics.add(ItemReport(copy_of="a/b", seconds={"download": 1.0}), 1.0)
    metrics.add(ItemReport(reason="too-large"), 0.0)
    of_generators.publish(remaining=8, workers=2, in_flight=4, models_an_hour=None, eta_seconds=None)
    metrics.publish(remaining=7, workers=2, in_flight=4, models_an_hour=60.0, eta_seconds=90.0)
    names = {f"ray_{name}" for name in (*COUNTERS, *GAUGES, *(f"{name}_bucket" for name in HISTOGRAMS))}
    deadline = time.monotonic() + 90
    left = r"^ray_probelog_items_left\{.*\} 7(?:\.0)?$"  # an earlier run's gauge, on the same Ray, says something else
    while (missing := names - set(re.findall(r"^(\w+)\{", text := scrape(), re.MULTILINE))) or not re.search(
        left, text, re.MULTILINE
    ):
        assert time.monotonic() < deadline, f"not exported: {sorted(missing)}, or not yet as they are"
        time.sleep(1)
    value = {
        result: float(number)
        for labels, number in re.findall(r"^ray_probelog_items_total\{(.*)\} (\S+)$", text, re.MULTILINE)
        for result in re.findall(r'result="([^"]*)"', labels)
    }
    assert value.keys() >= {"indexed", "copy", "too-large"}


def test_a_run_is_exported(indexed: Indexed) -> None:
    """The driver of the run is this process."""
    pattern = r'^ray_probelog_items_total\{.*result="(?:indexed|copy)".*\} (\S+)$'
    deadline = time.monotonic() + 90
    while sum(map(float, re.findall(pattern, scrape(), re.MULTILINE))) < len(MODELS):
        assert time.monotonic() < deadline
        time.sleep(1)

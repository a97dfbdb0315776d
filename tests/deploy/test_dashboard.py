"""The Grafana dashboard asks for metrics that exist, and for all of them."""

from __future__ import annotations

import json
import re

from pipelines.probe.metrics import COUNTERS, GAUGES, HISTOGRAMS
from tests.support.paths import CHECKOUT

DASHBOARD = CHECKOUT / "deploy/grafana/probelog.json"


def test_it_shows_every_metric_and_no_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    # Ray puts its name before every metric; Prometheus keeps a histogram as buckets.
    exported = {f"ray_{name}" for name in (*COUNTERS, *GAUGES, *(f"{name}_bucket" for name in HISTOGRAMS))}
    assert set(re.findall(r"ray_\w+", asked)) == exported


def test_its_source_is_the_operators_choice() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["schemaVersion"] >= 39
    assert "datasource" in [variable["name"] for variable in dashboard["templating"]["list"]]
    sources = [
        part["datasource"]["uid"] for panel in dashboard["panels"] for part in (panel, *panel["targets"])
    ]
    assert set(sources) == {"${datasource}"}
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)

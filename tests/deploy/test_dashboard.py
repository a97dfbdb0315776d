"""The Grafana dashboards ask for metrics that exist, and for all of them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from pipelines.monitor.collector import METRICS
from pipelines.probe.metrics import COUNTERS, GAUGES, HISTOGRAMS
from tests.support.paths import CHECKOUT

# Ray puts its name before every metric; Prometheus keeps a histogram as buckets.
EXPORTED = {
    "probelog": {f"ray_{name}" for name in (*COUNTERS, *GAUGES, *(f"{name}_bucket" for name in HISTOGRAMS))},
    "probelog-index": {*METRICS},
}


def dashboard(name: str) -> Any:
    return json.loads((CHECKOUT / f"deploy/grafana/{name}.json").read_text())


@pytest.mark.parametrize("name", EXPORTED)
def test_it_shows_every_metric_and_no_other(name: str) -> None:
    asked = " ".join(target["expr"] for panel in dashboard(name)["panels"] for target in panel["targets"])
    assert set(re.findall(r"\b(?:ray_)?probelog_\w+", asked)) == EXPORTED[name]


@pytest.mark.parametrize("name", EXPORTED)
def test_its_source_is_the_operators_choice(name: str) -> None:
    found = dashboard(name)
    assert found["uid"] == name
    assert found["schemaVersion"] >= 39
    assert "datasource" in [variable["name"] for variable in found["templating"]["list"]]
    sources = [part["datasource"]["uid"] for panel in found["panels"] for part in (panel, *panel["targets"])]
    assert set(sources) == {"${datasource}"}
    numbers = [panel["id"] for panel in found["panels"]]
    assert len(set(numbers)) == len(numbers)

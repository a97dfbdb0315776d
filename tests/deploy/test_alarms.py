"""The alarms on recorded series: each comes when it should and stays away when it should, also where series vanish."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.config.model import Nightly
from pipelines.monitor.collector import METRICS
from tests.support.paths import CHECKOUT

RECORDED = CHECKOUT / "tests/deploy/alarms.yaml"


def rules() -> list[dict[str, Any]]:
    """All rules of the manifest."""
    _, manifest = yaml.safe_load_all((CHECKOUT / "deploy/kuberay/monitoring.yaml").read_text())
    return [rule for group in manifest["spec"]["groups"] for rule in group["rules"]]


def test_promtool_finds_them_right(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool (Debian's package prometheus) is not here: the alarms were not tested")
    _, manifest = yaml.safe_load_all((CHECKOUT / "deploy/kuberay/monitoring.yaml").read_text())
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": manifest["spec"]["groups"]}))
    shutil.copy(RECORDED, tmp_path)
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", RECORDED.name]):
        done = subprocess.run([promtool, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_has_a_series_that_raises_it_and_one_that_does_not() -> None:
    cases = [
        case for test in yaml.safe_load(RECORDED.read_text())["tests"] for case in test["alert_rule_test"]
    ]
    raised = {case["alertname"] for case in cases if case.get("exp_alerts")}
    silent = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    assert raised == silent == {rule["alert"] for rule in rules()}


def test_they_ask_for_what_the_exporter_has() -> None:
    asked = {name for rule in rules() for name in re.findall(r"(?<!ray_)\bprobelog_\w+", rule["expr"])}
    assert asked <= METRICS.keys()
    (due,) = (rule["expr"] for rule in rules() if rule["alert"] == "FullRunDue")
    assert due == f"max(probelog_drift) > {Nightly().max_drift:g}"

"""The benchmark of probing runs, and its numbers are of the right kind."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from tests.benchmarks import probing


@pytest.mark.acceptance
def test_the_quick_mode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "")
    monkeypatch.setattr(
        sys, "argv", ["probing", "--set", "realistic", "--quick", "--json", "--out", str(tmp_path)]
    )
    probing.main()
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["models"], found["failed"], found["probes"]) == (2, 0, 20)
    assert min(found["start_wall"], found["ours_wall"]) > 0
    assert found["ours_cpu"] > found["pure_cpu"] * 0.3
    assert found["seconds_forward"] > 0
    assert found["a_wall"] == pytest.approx(found["ours_wall"] / found["pure_wall"], rel=0.01)
    (row,) = csv.DictReader((tmp_path / "probing.csv").open())
    assert float(row["ours_wall"]) == found["ours_wall"]
    (result,) = [probing.Result(**found)]
    assert "(a) ours / pure" in "\n".join(probing.table([result]))

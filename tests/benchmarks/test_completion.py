"""The benchmark of the completion runs at the size of a toy, and goes on where it was."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from tests.benchmarks import completion


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, str]:
    out = folder / "completion.csv"
    sizes = ["--sizes", "300", "--probes", "80", "--share", "0.5", "--rank", "4"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setattr(
        sys,
        "argv",
        ["completion", *sizes, *options, "--store", str(folder / "store"), "--out", str(out)],
    )
    completion.main()
    with out.open(newline="") as stream:
        return {f"{row['part']}, {row['figure']}": row["value"] for row in csv.DictReader(stream)}


def test_growth_at_the_size_of_a_toy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured(tmp_path, monkeypatch, "--part", "growth", "--memory", "1")
    assert int(found["growth, logits"]) >= 300
    assert float(found["growth, rows in memory, MB"]) == 0
    needed, done = (
        float(found[f"growth, operations that {name}, GFLOP per million logits"])
        for name in ("the formulas need", "are done")
    )
    assert 0 < needed < done
    capsys.readouterr()
    assert measured(tmp_path, monkeypatch, "--part", "growth") == found
    assert "is there already" in capsys.readouterr().out


@pytest.mark.acceptance
def test_rivals_at_the_size_of_a_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(tmp_path, monkeypatch, "--part", "rivals", "--rival-logits", "300", "--limit", "10")
    assert 0 < float(found["rivals, ours, held-out RMSE"]) < 1.2
    assert float(found["rivals, ours, CPU s"]) > 0
    for name in ("SoftImpute in NumPy", "iterative SVD in NumPy"):
        assert 0 < float(found[f"rivals, {name}, held-out RMSE"]) < 1.5

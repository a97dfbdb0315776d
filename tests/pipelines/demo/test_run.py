"""The demo end to end, as a newcomer runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import probelog
from tests.support.paths import CHECKOUT


@pytest.mark.timeout(600)
@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.acceptance)])
def test_the_demo_indexes_its_hub_and_answers(quick: bool, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RAY_"))}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "demo", "--out", str(out), *["--quick"] * quick],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    told = done.stderr
    assert done.returncode == 0, told[-3000:]
    assert "\x1b" not in told

    def number(pattern: str) -> float:
        found = re.search(pattern, told)
        assert found is not None, pattern
        return float(found.group(1))

    share, chance = number(r"came first for (\d+)%"), number(r"by chance: ([\d.]+)%")
    assert share > 20 * chance
    assert number(r"among the first five: (\d+)%") > share
    if quick:
        assert "with all probes" not in told
    else:
        assert number(r"with all probes: (\d+)%") > 30 * chance
    for reason in (
        "gated",
        "config-mismatch",
        "unsafe-path",
        "non-finite",
        "unsafe-format",
        "remote-code",
        "corrupt-weights",
    ):
        assert reason in told
    assert "right" in told

    index = probelog.open_index(out / "store")
    assert index.models >= 24
    assert index.settings["fraction"] < 1
    assert len(index.search(text="dog", k=5)) == 5
    labels = [logit.label for logit in index.show("unsafe/terminal-escapes").logits]
    assert "red" in labels[0]
    assert not any("\x1b" in label or "\n" in label for label in labels)
    assert sorted(path.name for path in out.iterdir()) == ["store", "store-all-probes"][: 2 - quick]
    assert not [path for path in tmp_path.rglob("*") if "owned" in path.name.lower()]

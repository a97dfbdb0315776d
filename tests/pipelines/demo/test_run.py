"""The demo: a few of its models within this process, and all of it end to end as a newcomer runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import probelog
from pipelines.demo import run as demo
from pipelines.hubserver import running
from probelog.probes.probe_set import ProbeSet
from probelog.storage.ledger import Ledger, observed_models
from probelog.storage.store import Store
from tests.support.paths import CHECKOUT
from tests.support.processes.operator_command import operator
from tests.support.worlds import tiny_encoders

SOUND = ("cinder/umber-v1", "emberfield/reed-v1", "foxglove/sorrel-small", "unsafe/terminal-escapes")
REFUSED = {"unsafe/pickle-only": "unsafe-format", "closed/gated-classifier": "gated"}


def small_world(folder: Path) -> Path:
    """The demo's world with a few of its models, names and probes, and an encoder of random weights."""
    whole = demo.WORLD
    for repo in (*SOUND, *REFUSED):
        shutil.copytree(whole / "hub" / repo, folder / "hub" / repo)
    listing = json.loads((whole / "hub/hub.json").read_text())
    kept = [row for row in listing if row["id"] in (*SOUND, *REFUSED)]
    (folder / "hub/hub.json").write_text(json.dumps(kept))
    truth = json.loads((whole / "truth.json").read_text())
    models = {repo: truth["models"][repo] for repo in SOUND}
    known = [set(classes) for model in models.values() for classes in model["logits"]]
    concepts = {
        name: classes
        for name, classes in truth["concepts"].items()
        if any(logit <= set(classes) for logit in known)
    }
    (folder / "truth.json").write_text(json.dumps(truth | {"models": models, "concepts": concepts}))
    (folder / "concepts.txt").write_text("\n".join(concepts) + "\n")
    pq.write_table(pq.read_table(whole / "probes.parquet").slice(0, 120), folder / "probes.parquet")
    (folder / "encoder").symlink_to(tiny_encoders.folder("clip"))
    return folder


@pytest.mark.acceptance
def test_a_few_models_of_the_demo(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        monkeypatch.setenv(name, "")  # the demo sets them for its process
    monkeypatch.setattr(demo, "WORLD", small_world(tmp_path / "world"))
    out = tmp_path / "demo"
    ended = operator("demo", "--out", out, "--quick")
    assert ended.status == 0, ended.err
    for repo, reason in REFUSED.items():
        assert re.search(rf"{repo} +{reason} ", ended.err)
    for said in ("with 25% of the probes a model", "by chance:", "right", "wrong"):
        assert said in ended.err
    assert f"where {demo.ASKED_MODEL} is from" in ended.err
    assert "\x1b" not in ended.err
    index = probelog.open_index(out / "store")
    assert (index.models, index.settings["fraction"]) == (len(SOUND), demo.FRACTION)
    assert [path.name for path in out.iterdir()] == ["store"]
    again = operator("demo", "--out", out, "--quick")
    assert again.status == 0, again.err
    assert "is already live" in again.err
    assert "with all probes" not in again.err


def test_without_its_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "WORLD", tmp_path / "none")
    ended = operator("demo", "--out", tmp_path / "demo")
    assert ended.status == 1
    assert "python -m pipelines.demo.builder --out" in ended.err


# Runs programs, each with an empty namespace, and prints what the last line of each says.
RUN = """
import contextlib, io, json, sys
for code in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "snippet", "exec"), {})
    print(out.getvalue().splitlines()[-1])
"""


def check_snippets(store_uri: Path, tmp_path: Path) -> None:
    """The code of a logit of every architecture of the demo gives what was observed, from the served hub."""
    store = Store(store_uri)
    index = probelog.open_index(store_uri)
    ledger = Ledger(store, f"observations/{index.settings['observations']}")
    probe_set = ProbeSet.open(store, index.settings["probe_set"])
    programs, observed, kinds = [], [], set()
    for receipt in ledger.receipts():
        for model, logits, values in observed_models(store, receipt):
            if (kind := (model.library, model.architecture, model.head)) in kinds:
                continue
            kinds.add(kind)
            picture = tmp_path / f"{len(programs)}.png"
            probe_set.image(model.probes[0]).save(picture)
            row = int(np.argmax(np.ptp(values, axis=1)))
            programs.append(index.snippet(model.repo, int(logits[row]), image=str(picture)))
            observed.append((model.repo, float(values[row, 0]), float(values[row].std())))
    assert len(kinds) >= 5, "transformers with two heads, and several architectures of timm"
    with running(demo.WORLD / "hub") as endpoint:
        done = subprocess.run(
            [sys.executable, "-c", RUN],
            input=json.dumps(programs),
            env={
                **os.environ,
                "HF_ENDPOINT": endpoint,
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_OFFLINE": "0",
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    for (repo, value, spread), line in zip(observed, done.stdout.splitlines(), strict=True):
        # Observations are rounded to half precision.
        assert float(line) == pytest.approx(value, abs=2e-3 * spread + 1e-3 * abs(value)), repo


@pytest.mark.acceptance
def test_the_demo_indexes_its_hub_and_answers(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RAY_"))}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "demo", "--out", str(out)],
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
    assert "right  foxglove/best-classifier-final: copy" in told
    assert re.search(r"which models make 'umbrella'\?[^\n]*\n    1\. right", told)

    index = probelog.open_index(out / "store")
    assert index.models >= 24
    assert index.settings["fraction"] < 1
    assert len(index.search(text="dog", k=5)) == 5
    labels = [logit.label for logit in index.show("unsafe/terminal-escapes").logits]
    assert "red" in labels[0]
    assert not any("\x1b" in label or "\n" in label for label in labels)
    check_snippets(out / "store", tmp_path)
    assert sorted(path.name for path in out.iterdir()) == ["store", "store-all-probes"]
    assert not [path for path in tmp_path.rglob("*") if "owned" in path.name.lower()]

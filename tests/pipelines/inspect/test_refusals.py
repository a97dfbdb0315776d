"""What commands refuse before they begin: each row of docs/operators/refusals.md is what a real command printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from probelog.hub.client import Retry
from probelog.storage.layout import LEASE
from tests.support.hub.faults import answer, faulty
from tests.support.hub.hostile import write_json
from tests.support.processes.operator_command import operator
from tests.support.refusals import COMMANDS, assert_on_page
from tests.support.worlds import tiny_encoders
from tests.support.worlds.tiny_world import write_probes

EVERY = " ".join(COMMANDS)
LISTING, RUNNING = "crawl sample full", "probe sample nightly full"
ENCODING, PROBING = "probe sample complete publish nightly full", "probe complete publish full"
INVALID = {
    "content-type": "application/json",
    "x-error-message": "Invalid credentials in Authorization header",
}


@dataclass(frozen=True)
class Case:
    """A line of the page: what is wrong, the keys that make it so, who refuses it; ``after`` another command."""

    what: str
    commands: str
    keys: dict[str, Any] = field(default_factory=dict)
    after: str = ""


NO_HUB, NO_TOKEN, NO_LIBRARY = "the Hub does not answer", "the Hub does not know the token", "no diffusers, where generators are wanted"  # fmt: skip
CASES = [
    Case("a key that does not exist", EVERY, {"probe_cuont": 7}),
    Case("a value that a key cannot have", EVERY, {"fraction": 7}),
    Case("a store that cannot be written", EVERY.replace(" nightly", ""), {"store": "HERE/a-file/store"}),
    Case("a store that cannot be read", "nightly", {"store": "HERE/a-file/store"}),
    Case(NO_HUB, LISTING),
    Case(NO_TOKEN, LISTING),
    Case("a task that the Hub does not have", LISTING, {"filters.pipeline_tag": "image-clasification"}),
    Case("a licence that the Hub does not have", LISTING, {"filters.licence": ["apache2"]}),
    Case("a task for trees alone that the Hub does not have", "trees full", {"trees.tasks": ["text-generatoin"]}),
    Case("a list of repositories that is not there", LISTING + " trees publish nightly", {"filters.list": "HERE/none.txt"}),
    Case("a list for trees alone that is not there", LISTING + " trees publish nightly", {"trees.list": "HERE/none.txt"}),
    Case("a list of galleries that is not there", LISTING + " trees publish nightly", {"generators.galleries": "HERE/none.txt"}),
    Case("an encoder that is no folder", ENCODING, {"encoder": "HERE/none"}),
    Case("an encoder without safetensors", ENCODING, {"encoder": "HERE/pickled"}),
    Case("an encoder that the Hub does not have or open", "sample full", {"encoder": "bob/none"}),
    Case("a source of probes that is not there", PROBING, {"probes": "HERE/none"}),
    Case("a source of probes without an image", PROBING, {"probes": "HERE/empty"}),
    Case("more probes than there are", PROBING, {"probe_count": 8}),
    Case("GPUs that this machine does not have", RUNNING, {"gpus_per_worker": 64}),
    Case("CPUs that this machine does not have", RUNNING, {"cpus_per_worker": 100_000}),
    Case("a part of a second GPU", RUNNING, {"gpus_per_worker": 1.5}),
    Case("a module that is not there", RUNNING, {"preload": ["no_such_module"]}),
    Case("a scratch folder that cannot be written", RUNNING + " trees", {"scratch": "HERE/a-file"}),
    Case(NO_LIBRARY, "sample nightly full"),
    Case("a background that is not there", "sample publish nightly full", {"background": "HERE/none.txt"}),
    Case("canaries that are not there", "publish nightly full", {"quality.canaries": "HERE/none.txt"}),
    Case("a canary of another form", "publish nightly full", {"quality.canaries": ["cat\tanna/pets#"]}),
    Case("generators are not switched on", "sample", {"generators.enabled": False}),
    Case("trees are switched off", "trees", {"trees.enabled": False}),
    Case("nothing was listed with these filters", "probe trees publish"),
    Case("nothing was probed with these settings", "complete trees publish", {"generators.enabled": False}, "crawl"),
    Case("nothing was published", "nightly"),
]  # fmt: skip


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Hub with a classifier and without `bob/none`, and the files of a job beside it."""
    (tmp_path / "hub/anna/pets").mkdir(parents=True)
    write_json(tmp_path / "hub/anna/pets", "config.json", {"architecture": "resnet18", "num_classes": 2})
    (tmp_path / "hub/anna/pets/model.safetensors").write_bytes(b"")
    write_probes(tmp_path / "probes/a.parquet", 7, side=8)
    for folder in ("empty", "pickled"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pickled/config.json").write_text("{}")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "a-file").write_text("")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(Retry, "wait", lambda retry, failures: 0.01)
    with faulty(tmp_path / "hub") as (address, hub):
        monkeypatch.setenv("HF_ENDPOINT", address)
        hub.spoil("/spoilt/api/models", answer(401, INVALID))
        yield address


def written(folder: Path) -> dict[str, int]:
    """When every file was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def printed(here: Path, endpoint: str, command: str) -> tuple[str, int]:
    """What a command that refuses prints last, on one line, and its status."""
    ended = operator(command, "--config", here / "job.toml")
    said = " ".join(line.strip() for line in ended.err.strip().splitlines()).rpartition("probelog-index: ")[2]
    return said.replace(endpoint, "http://hub.example"), ended.status


@pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])
def test_before_anything_is_done(
    case: Case, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {
        "store": f"{tmp_path}/store",
        "probes": f"{tmp_path}/probes",
        "encoder": str(tiny_encoders.folder("clip")),
        "background": f"{tmp_path}/names.txt",
        "generators.enabled": True,
        "generators.filters.pipeline_tag": "text-to-image",
        "probe_count": 7,
        "top_r": 7,
        **case.keys,
    }
    lines = (f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    (tmp_path / "job.toml").write_text("".join(lines).replace("HERE", str(tmp_path)))
    if case.after:
        assert operator(case.after, "--config", tmp_path / "job.toml").status == 0
    if case.what == NO_HUB:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    elif case.what == NO_TOKEN:
        monkeypatch.setenv("HF_ENDPOINT", f"{endpoint}/spoilt")
    elif case.what == NO_LIBRARY:
        monkeypatch.setitem(sys.modules, "diffusers", None)  # as where it is not installed
    before = written(tmp_path)
    ((said, status),) = {printed(tmp_path, endpoint, command) for command in case.commands.split()}
    assert_on_page(case.what, said, status, case.commands, tmp_path)
    after = written(tmp_path)
    assert before == {name: time for name, time in after.items() if Path(LEASE).name not in name}

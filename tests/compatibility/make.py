"""Keep a small store with an index, as this version writes them: ``python -m tests.compatibility.make``.

To be run once for each release that changes a format, from the commit that is tagged; the folder that it makes,
``kept/VERSION``, is committed. Tests then read it with every later version. What a released version wrote is never
made again: to make a test pass by that would break the promise of the release policy. (Before the release of
``__version__`` its folder is removed and made again with every change of a format.) The folder of the version before
the last may go.

What is kept is the state after a full run and one nightly run on a hub of five models, one of which fails: so there
are receipts, a copy, a failure, a nightly record, and an update beside its base. Beside the store lie what a resumed
run needs (encoder, probes, names, configuration, the hub's listing) and what this version answers. (Where a later client
scores differently, its scores and confidences are written into ``expected.json``; which hits there are, and all else, stay.)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import probelog
from probelog.storage.layout import LEASE
from probelog.storage.store import Store
from tests.support.paths import CHECKOUT
from tests.support.worlds import tiny_encoders, tiny_world

KEPT = Path(__file__).parent / "kept"
# Part of the key of the catalogue: runs that are resumed must name the same, and need not reach it.
ENDPOINT = "http://127.0.0.1:8731"
WORDS = ["dog", "a tent"]
_LISTING = [
    {
        "id": "ada/resnet",
        "library": "transformers",
        "license": "mit",
        "createdAt": "2024-05-01T00:00:00.000Z",
    },
    {
        "id": "ada/resnet-again",
        "library": "transformers",
        "license": "apache-2.0",
        "base_model": "ada/resnet",
    },
    {"id": "bob/one-logit", "library": "timm", "license": "mit", "downloads": 5},
    {"id": "bob/broken", "library": "timm", "license": "mit"},
]
_NEW = {"id": "cleo/new", "library": "timm", "license": "mit", "downloads": 7}


def main() -> None:
    """Make the folder of this version."""
    target = KEPT / probelog.__version__
    if target.exists():
        sys.exit(f"{target} is there already: see the first lines of this program")
    # A path of its own would otherwise be written into the index, as the encoder's and the probes' address.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        root = Path(folder)
        _write_inputs(root)
        with _hub(root / "hub"):
            _list(root / "hub", _LISTING)
            _operator(root, "full")
            tiny_world.timm_model(root / "hub/cleo/new", "test_resnet", 2, 5)
            _list(root / "hub", [*_LISTING, _NEW])
            _operator(root, "nightly")
        store = Store("store")
        store.write_json(LEASE, store.read_json(LEASE) | {"holder": "process 1 on somewhere"})
        shutil.move(root / "hub/hub.json", root / "hub.json")
        (root / "expected.json").write_text(json.dumps(answers(root / "store"), indent=1) + "\n")
        for name in ("hub", "scratch"):
            shutil.rmtree(root / name)
        _check_private(root)
        shutil.copytree(root, target, ignore=shutil.ignore_patterns(".tmp-*"))
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {size:,} bytes")


def answers(store: Path) -> dict[str, Any]:
    """What an analyst gets from an index: all kinds of questions, as JSON has them."""
    index = probelog.open_index(store)
    given = {
        "size": [index.models, index.logits],
        "show": [asdict(index.show(repo)) for repo in ("ada/resnet-again", "cleo/new")],
        "text": [[asdict(hit) for hit in index.search(word, k=4)] for word in WORDS],
        "logit": [asdict(hit) for hit in index.search(like="bob/one-logit#0", k=4)],
        "model": [asdict(hit) for hit in index.models_like("ada/resnet", k=4)],
        "filter": [
            asdict(hit) for hit in index.search(WORDS[0], where="licence = 'mit' AND downloads > 6", k=4)
        ],
    }
    found: dict[str, Any] = json.loads(json.dumps(given, default=lambda time: time.isoformat()))
    return found


def _write_inputs(root: Path) -> None:
    hub = root / "hub"
    tiny_world.transformers_model(
        hub / "ada/resnet",
        "ResNetForImageClassification",
        3,
        1,
        ["dog", "cat", "owl"],
        depths=[1, 1],
        hidden_sizes=[8, 8],
        embedding_size=8,
        layer_type="basic",
    )
    again = shutil.copytree(hub / "ada/resnet", hub / "ada/resnet-again") / "config.json"
    again.write_text(json.dumps(json.loads(again.read_text()) | {"_name_or_path": "ada/older"}))
    tiny_world.timm_model(hub / "bob/one-logit", "test_resnet", 1, 4)
    shutil.copytree(hub / "bob/one-logit", hub / "bob/broken")
    os.truncate(hub / "bob/broken/model.safetensors", 1000)
    tiny_encoders.clip(root / "encoder")
    tiny_world.write_probes(root / "probes.parquet", 24, side=24)
    date_probes(root)
    (root / "names.txt").write_text("\n".join(tiny_world.CONCEPTS) + "\n")
    (root / "job.toml").write_text(
        """store = "store"
probes = "probes.parquet"
probe_count = 24
encoder = "encoder"
background = "names.txt"
scratch = "scratch"
fraction = 0.75
top_r = 8
rank = 2
regularisation = 0.1
workers = 1
batch_models = 2

[quality]
enforce = false

[nightly]
max_drift = 100.0
rebuild_share = 1.0
"""
    )


def date_probes(root: Path) -> None:
    """Give the probes' file the date by which a probe set knows its source again; no checkout keeps one."""
    os.utime(root / "probes.parquet", (1, 1))


def _list(hub: Path, entries: list[dict[str, Any]]) -> None:
    listed = [
        {"sha": f"{number:040x}", "lastModified": f"2025-0{number}-01T00:00:00.000Z"}
        | {"pipeline_tag": "image-classification"}
        | entry
        for number, entry in enumerate(entries, start=1)
    ]
    (hub / "hub.json").write_text(json.dumps(listed, indent=1) + "\n")


@contextlib.contextmanager
def _hub(folder: Path) -> Iterator[None]:
    port = ENDPOINT.rsplit(":", 1)[1]
    with subprocess.Popen(
        [sys.executable, "-m", "pipelines", "hub", str(folder), "--port", port], env=_environment()
    ) as process:
        try:
            yield
        finally:
            process.terminate()


def _operator(root: Path, command: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pipelines", command, "--config", "job.toml"],
        cwd=root,
        env=_environment(),
        check=True,
    )


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(CHECKOUT), "HF_ENDPOINT": ENDPOINT, "RAY_AUTH_MODE": "disabled"}


def _check_private(root: Path) -> None:
    """Nothing that is kept says on which machine it was made."""
    private = [
        text.encode() for text in (str(root), str(CHECKOUT), f"on {os.uname().nodename}", str(Path.home()))
    ]
    for file in root.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            for text in private:
                assert text not in data, f"{file} says {text!r}"


if __name__ == "__main__":
    main()

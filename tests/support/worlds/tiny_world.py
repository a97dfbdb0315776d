"""A world small enough to index in seconds: classifiers of random weights, probes, an encoder, names and a truth.

Nothing here recognises anything; every number that the pipeline makes of it can be computed again by hand.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config.model import Config
from pipelines.full import FullRun, run_full
from pipelines.job.job import Job
from pipelines.job.progress import Report
from tests.support.hub.faults import FaultyHub, faulty
from tests.support.hub.hostile import write_json
from tests.support.worlds import tiny_encoders

PROBES = 90
CONCEPTS = [
    "dog", "cat", "siberian husky", "chair", "mid-century chair", "jack-o'-lantern", "café", "golden retriever",
    "umbrella", "guitar", "airplane", "mushroom", "boat", "tree", "bread", "clock", "bridge", "owl", "spoon",
    "train", "tent", "violin", "lamp", "horse",
]  # fmt: skip

# Everything that must be indexed: how many logits each model has, and how many of them are constant.
MODELS: dict[str, tuple[int, int]] = {
    "ada/resnet": (3, 0),
    "ada/resnet-again": (3, 0),  # the same weights
    "ada/convnext-shards": (4, 1),  # several files, one dead logit
    "bob/many-labels": (5, 0),  # sigmoid head
    "bob/one-logit": (1, 0),
    "cleo/timm-half": (3, 0),  # float16
    "cleo/timm-bfloat": (4, 0),
    "timm-without-owner": (2, 0),
}
# Logits of the index: dead ones are dropped, a one-logit head counts twice.
LOGITS = sum(logits - dead + (logits == 1) for logits, dead in MODELS.values())

_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]}
_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@dataclass(frozen=True)
class TinyWorld:
    """Where its pieces lie."""

    root: Path
    encoder: Path = field(default_factory=lambda: tiny_encoders.folder("clip"))

    @property
    def hub(self) -> Path:
        return self.root / "hub"

    @property
    def probes(self) -> Path:
        return self.root / "probes.parquet"

    @property
    def concepts(self) -> Path:
        return self.root / "concepts.txt"

    @property
    def scratch(self) -> Path:
        return self.root / "scratch"

    @property
    def truth(self) -> Path:
        return self.root / "truth.json"

    def settings(self, store: object, **changes: Any) -> dict[str, Any]:
        """Keys of a configuration for this world; ``changes`` on top, None takes a key away."""
        keys = {
            "store": str(store),
            "probes": str(self.probes),
            "probe_count": PROBES,
            "encoder": str(self.encoder),
            "background": str(self.concepts),
            "fraction": 1.0,
            "top_r": 12,
            "rank": 4,
            "regularisation": 0.1,
            "workers": 2,
            "batch_models": 3,
            "scratch": str(self.scratch),
        } | changes
        return {key: value for key, value in keys.items() if value is not None}

    def config(self, store: object, **changes: Any) -> Config:
        return Config.model_validate(self.settings(store, **changes))

    def config_file(self, file: Path, store: object, **changes: Any) -> Path:
        """The same as a TOML file. JSON's strings, numbers, lists and booleans are TOML's."""
        settings = self.settings(store, **changes)
        tables = {key: value for key, value in settings.items() if isinstance(value, dict)}
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if key not in tables]
        for name, table in tables.items():
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
        file.write_text("\n".join(lines) + "\n")
        return file

    def copy_hub(self, folder: Path) -> Path:
        """A copy of the hub, to break things in."""
        shutil.copytree(self.hub, folder)
        return folder


def make_tiny_world(root: Path) -> TinyWorld:
    """Write the whole world below a folder."""
    world = TinyWorld(root)
    hub = world.hub
    convolutions = _STAGES | {"embedding_size": 8, "layer_type": "basic"}
    transformers_model(
        hub / "ada/resnet", "ResNetForImageClassification", 3, 1, ["dog", "cat", "owl"], **convolutions
    )
    shutil.copytree(hub / "ada/resnet", hub / "ada/resnet-again")
    transformers_model(
        hub / "ada/convnext-shards", "ConvNextForImageClassification", 4, 2, dead=1, shards="20KB", **_STAGES
    )
    transformers_model(
        hub / "bob/many-labels",
        "ViTForImageClassification",
        5,
        3,
        ["boat", "tree", "bread", "clock", "bridge"],
        problem_type="multi_label_classification",
        image_size=32,
        patch_size=8,
        **_VIT,
    )
    transformers_model(hub / "bob/one-logit", "ResNetForImageClassification", 1, 4, ["tent"], **convolutions)
    timm_model(hub / "cleo/timm-half", "test_resnet", 3, 5, "float16")
    timm_model(hub / "cleo/timm-bfloat", "test_convnext", 4, 6, "bfloat16")
    timm_model(hub / "timm-without-owner", "test_efficientnet", 2, 7)
    listing = [
        {"id": repo, "downloads": 10 * i, "likes": i, "license": ["mit", "apache-2.0"][i % 2],
         "lastModified": f"2025-01-{10 + i}T00:00:00.000Z"}
        for i, repo in enumerate(MODELS)
    ]  # fmt: skip
    write_json(hub, "hub.json", listing)
    write_probes(world.probes, PROBES)
    world.concepts.write_text("# names\n" + "\n".join(CONCEPTS) + "\n")
    write_json(root, "truth.json", truth())
    return world


@dataclass(frozen=True)
class Indexed:
    """The world after a full run: its hub on loopback (which counts requests), the store, and what was done."""

    world: TinyWorld
    endpoint: str
    hub: FaultyHub
    store: Path
    run: FullRun

    def job(self, store: Path | None = None, **changes: Any) -> Job:
        """A job like the one that was run. Its Hub is the one in ``HF_ENDPOINT``."""
        return Job.of(self.world.config(store or self.store, **changes), Report(io.StringIO()))

    @property
    def probe_set(self) -> str:
        """Hash of the probe set."""
        (manifest,) = self.store.glob("probes/*/manifest.json")
        return str(json.loads(manifest.read_text())["hash"])

    def copy_store(self, folder: Path, *without: str) -> Path:
        """The store once more, to be changed; ``without`` some of its top folders."""
        shutil.copytree(self.store, folder, ignore=lambda at, _: without if Path(at) == self.store else ())
        return folder


@contextlib.contextmanager
def index_tiny_world(world: TinyWorld, store: Path) -> Iterator[Indexed]:
    """Serve the world and run the whole pipeline over it; needs a running Ray session."""
    with faulty(world.hub) as (endpoint, hub), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", endpoint)
        run = run_full(Job.of(world.config(store), Report(io.StringIO())))
        patch.undo()
        yield Indexed(world, endpoint, hub, store, run)


def truth() -> dict[str, Any]:
    """A truth for ``pipelines.evaluate``: logit i of model j means class i + j, and two concepts are groups."""
    concepts = {name: [i] for i, name in enumerate(CONCEPTS[:10])} | {"animal": [0, 1, 2], "seat": [3, 4]}
    models = {
        repo: {"kind": "copy" if repo.endswith("again") else "", "logits": [[i + j] for i in range(logits)]}
        for j, (repo, (logits, _)) in enumerate(MODELS.items())
    }
    return {"classes": [[name] for name in CONCEPTS], "concepts": concepts, "models": models}


def transformers_model(
    folder: Path,
    architecture: str,
    logits: int,
    seed: int,
    labels: list[str] | None = None,
    dead: int | None = None,
    shards: str = "1GB",
    **config: Any,
) -> None:
    """A repository of a transformers model; ``dead`` names a logit that never changes."""
    import torch
    import transformers

    cls = getattr(transformers, architecture)
    torch.manual_seed(seed)
    names = dict(enumerate(labels)) if labels else {i: f"LABEL_{i}" for i in range(logits)}
    model = cls(cls.config_class(**config, num_labels=logits, id2label=names)).eval()
    _stir(model)
    if dead is not None:
        with torch.no_grad():
            model.classifier.weight[dead] = 0
    model.save_pretrained(folder, max_shard_size=shards)
    size = {"height": 32, "width": 32}
    write_json(
        folder, "preprocessor_config.json", {"image_processor_type": "ViTImageProcessor", "size": size}
    )


def timm_model(folder: Path, architecture: str, logits: int, seed: int, dtype: str = "float32") -> None:
    """A repository of a timm model in a stored type."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    model = timm.create_model(architecture, num_classes=logits).eval()
    _stir(model)
    kind = getattr(torch, dtype)
    save_file(
        {name: value.to(kind) for name, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    pretrained = {"input_size": [3, 32, 32], "crop_pct": 1.0, "num_classes": logits}
    write_json(
        folder,
        "config.json",
        {"architecture": architecture, "num_classes": logits, "pretrained_cfg": pretrained},
    )


def write_probes(file: Path, count: int, side: int = 48) -> None:
    """Photographs of nothing, in Parquet as the Hub stores images."""
    images = []
    for seed in range(count):
        sink = io.BytesIO()
        tiny_encoders.photo(side, side, seed).save(sink, "PNG")
        images.append({"bytes": sink.getvalue(), "path": f"{seed:03}.png"})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images}), file)


def standardised(rows: np.ndarray) -> np.ndarray:
    """Every row with mean 0 and standard deviation 1 (docs/method.md, notation)."""
    return (rows - rows.mean(axis=1, keepdims=True)) / rows.std(axis=1, keepdims=True)


def _stir(model: Any) -> None:
    """Fresh models often give every image the same logits."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))

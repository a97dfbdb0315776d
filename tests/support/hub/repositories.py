"""Folders of tiny repositories to serve, and a Hub library that neither reads tokens nor calls home."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Write = Callable[..., Path]

VIT = {"architectures": ["ViTForImageClassification"], "model_type": "vit"}
TIMM = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 8, 8]}}


@pytest.fixture(autouse=True)
def _quiet_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)


@pytest.fixture
def write_repository(tmp_path: Path) -> Write:
    """Writes a repository below ``tmp_path/hub``: config, weights (float32 values), and further files by name."""

    def write(
        name: str, config: object = VIT, values: int | None = 100, files: dict[str, bytes] | None = None
    ) -> Path:
        from safetensors.numpy import save_file

        folder = tmp_path / "hub" / name
        folder.mkdir(parents=True)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        if values is not None:
            save_file({"w": np.arange(values, dtype=np.float32)}, folder / "model.safetensors")
        for path, data in (files or {}).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        return folder

    return write


@pytest.fixture
def write_listing(tmp_path: Path) -> Callable[[object], Path]:
    """Writes ``hub.json`` and returns the Hub's folder."""

    def write(entries: object) -> Path:
        root = tmp_path / "hub"
        root.mkdir(exist_ok=True)
        (root / "hub.json").write_text(entries if isinstance(entries, str) else json.dumps(entries))
        return root

    return write

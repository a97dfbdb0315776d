"""What tells two downloads apart, whatever their models' processes say."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from probelog.models.content import NAMES_AND_LABELS, content_digest

CONFIG = {"model_type": "resnet", "hidden_sizes": [8, 16], "id2label": {"0": "cat"}}


def downloaded(folder: Path, config: object = CONFIG, weights: bytes = b"weights", **others: bytes) -> str:
    folder.mkdir(exist_ok=True)
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    files = {"config.json": text, "model.safetensors": weights, **others}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return content_digest(folder, {name: hashlib.sha256(data).hexdigest() for name, data in files.items()})


@pytest.mark.parametrize("key", sorted(NAMES_AND_LABELS))
def test_names_and_labels_make_no_difference(key: str, tmp_path: Path) -> None:
    """A re-upload has its own; so has it another order of keys and another layout."""
    changed = dict(reversed(CONFIG.items())) | {key: {"0": "something else"}}
    first = downloaded(tmp_path / "a", {name: CONFIG[name] for name in CONFIG if name != key})
    assert downloaded(tmp_path / "b", json.dumps(changed, indent=4).encode()) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": b"weightS"},
        {"config": CONFIG | {"hidden_sizes": [16, 8]}},
        {"config": CONFIG | {"problem_type": "regression"}},
        {"preprocessor_config.json": b"{}"},
        {"config": b"{"},
        {"config": b"[" * 100_000},
    ],
    ids=["weights", "sizes", "head", "processor", "no JSON", "deep"],
)
def test_everything_else_does(changes: dict[str, Any], tmp_path: Path) -> None:
    assert downloaded(tmp_path / "a") != downloaded(tmp_path / "b", **changes)


def test_what_cannot_be_read_is_compared_by_its_bytes(tmp_path: Path) -> None:
    assert downloaded(tmp_path / "a", b"{") == downloaded(tmp_path / "b", b"{")
    assert downloaded(tmp_path / "a", b"{") != downloaded(tmp_path / "b", b"{{")

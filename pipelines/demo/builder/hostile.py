"""Untrusted repositories as people upload them: broken, unsafe or not classifiers at all. Every one is a few kilobytes.

None of the bytes written here runs anything by itself; the pickle would create a file if somebody unpickled it,
which is how a test notices that somebody did.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

PICKLE_VICTIM = "/tmp/probelog-demo-pickle-was-executed"  # noqa: S108 - the file's very presence is the alarm

_TINY = {
    "architectures": ["ResNetForImageClassification"], "model_type": "resnet", "num_channels": 3, "embedding_size": 4,
    "hidden_sizes": [4, 4], "depths": [1, 1], "layer_type": "basic", "dtype": "float32",
    "id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0, "dog": 1},
}  # fmt: skip


def evil_pickle() -> bytes:
    """A pickle, put together by hand, that opens ``PICKLE_VICTIM`` for writing when it is loaded."""
    out = pickle.PROTO + bytes([2])
    out += pickle.GLOBAL + b"io\nopen\n" + pickle.MARK
    for text in (PICKLE_VICTIM, "w"):
        data = text.encode()
        out += pickle.BINUNICODE + struct.pack("<I", len(data)) + data
    return out + pickle.TUPLE + pickle.REDUCE + pickle.STOP


def _config(folder: Path, **changes: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**_TINY, **changes}, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _weights(folder: Path, fill: float | None = None) -> None:
    """Real weights of the tiny network; all of them ``fill`` where given."""
    import torch
    from safetensors.torch import save_file
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    tensors = ResNetForImageClassification(ResNetConfig.from_dict(_TINY)).state_dict()
    if fill is not None:
        tensors = {
            name: torch.full_like(value, fill) if value.is_floating_point() else value
            for name, value in tensors.items()
        }
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")


def _pickle_only(folder: Path) -> None:
    _config(folder)
    (folder / "pytorch_model.bin").write_bytes(evil_pickle())


def _truncated(folder: Path) -> None:
    _config(folder)
    _weights(folder)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) * 2 // 3])


def _giant(folder: Path) -> None:
    _config(folder, hidden_sizes=[10**9, 10**9], embedding_size=10**9)
    _weights(folder)


def _not_a_number(folder: Path) -> None:
    _config(folder)
    _weights(folder, float("nan"))


def _climbs_out(folder: Path) -> None:
    _config(folder)
    index = {"metadata": {"total_size": 8}, "weight_map": {"classifier.1.weight": "../../evil.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _gated(folder: Path) -> None:
    _config(folder)
    _weights(folder)


def _remote_code(folder: Path) -> None:
    _config(folder, model_type="their-own", auto_map={
        "AutoConfig": "configuration.TheirConfig", "AutoModelForImageClassification": "modeling.TheirModel",
    })  # fmt: skip
    (folder / "modeling.py").write_text(
        'raise RuntimeError("this repository\'s code was imported; it must never be")\n', encoding="utf-8"
    )
    (folder / "configuration.py").write_text(
        'raise RuntimeError("this repository\'s code was imported; it must never be")\n', encoding="utf-8"
    )
    _weights(folder)


def _no_head(folder: Path) -> None:
    import torch
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=64,
        patch_size=32,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)


REPOSITORIES: dict[str, Callable[[Path], None]] = {
    "unsafe/pickle-only": _pickle_only,
    "unsafe/truncated-weights": _truncated,
    "unsafe/billion-units": _giant,
    "unsafe/not-a-number": _not_a_number,
    "unsafe/climbs-out": _climbs_out,
    "unsafe/remote-code": _remote_code,
    "closed/gated-classifier": _gated,
    "closed/features-only": _no_head,
}

NASTY_LABELS = (
    "\x1b[31mred\x1b[0m", "line one\nline two", "\x1b]0;new window title\x07", "tab\there", "back\x08space",
    "\u202eright to left", "nul\x00byte", "<script>alert(1)</script>", "' OR 1=1 --", "\r\x1b[2Kgone",
)  # fmt: skip


def write(hub: Path) -> list[str]:
    """Write every broken or hostile repository below ``hub``; returns their names."""
    for repo, make in REPOSITORIES.items():
        make(hub / repo)
    return list(REPOSITORIES)


def hub_row(repo: str) -> dict[str, Any]:
    """What the Hub's listing says about such a repository beyond the usual."""
    if repo == "closed/gated-classifier":
        return {"gated": "manual"}
    if repo == "closed/features-only":
        return {"pipeline_tag": "image-feature-extraction"}
    return {}

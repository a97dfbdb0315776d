"""Repositories as an attacker, or a broken upload, would make them: each builder fills a folder.

`REPOSITORIES` names them all with the reason they must be refused for; None means they must load, harmlessly.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from probelog.errors import FailureReason

Build = Callable[[Path], None]


def vit_config(**changes: Any) -> dict[str, Any]:
    """A tiny ViT classifier of three classes."""
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 8,
        "num_channels": 3,
        "id2label": {"0": "cat", "1": "dog", "2": "husky"},
    } | changes


def vit(folder: Path, **changes: Any) -> None:
    """A sound ViT repository, with the configuration changed afterwards."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**vit_config())).save_pretrained(folder)
    write_json(folder, "config.json", vit_config(**changes))
    write_json(folder, "preprocessor_config.json", vit_processor())


def vit_processor(**changes: Any) -> dict[str, Any]:
    """The processor that belongs to it."""
    return {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}} | changes


def timm_config(**changes: Any) -> dict[str, Any]:
    """A tiny timm classifier of three classes."""
    return {
        "architecture": "test_resnet",
        "num_classes": 3,
        "label_names": ["cat", "dog", "husky"],
        "pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 1.0, "num_classes": 3},
    } | changes


def timm_repository(folder: Path, **changes: Any) -> None:
    """A sound timm repository of ``test_resnet``, with the configuration changed afterwards."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), folder / "model.safetensors")
    write_json(folder, "config.json", timm_config(**changes))


def write_json(folder: Path, name: str, value: object) -> None:
    """A JSON file, with escapes for whatever UTF-8 cannot hold."""
    (folder / name).write_text(json.dumps(value))


def write_safetensors(path: Path, header: object, body: bytes = b"", length: int | None = None) -> None:
    """A safetensors file with any header; ``length`` lies about the header's size."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    """One tensor's description."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _with_file(name: str, content: bytes | str) -> Build:
    def build(folder: Path) -> None:
        vit(folder)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return build


def _with_header(header: object, body: bytes = b"", length: int | None = None) -> Build:
    def build(folder: Path) -> None:
        vit(folder)
        write_safetensors(folder / "model.safetensors", header, body, length)

    return build


def _header_in(encoding: str) -> Build:
    """A sound model whose weights have their header in another encoding."""

    def build(folder: Path) -> None:
        vit(folder)
        path = folder / "model.safetensors"
        data = path.read_bytes()
        start = 8 + struct.unpack("<Q", data[:8])[0]
        write_safetensors(path, data[8:start].decode().encode(encoding), data[start:])

    return build


def _configured(**changes: Any) -> Build:
    return lambda folder: vit(folder, **changes)


def _timm_configured(**changes: Any) -> Build:
    return lambda folder: timm_repository(folder, **changes)


def million_labels(folder: Path) -> None:
    """Made when it is asked for: every process that imports this module would make them."""
    vit(folder, id2label={str(i): "x" for i in range(10**6)})


def _processed(**changes: Any) -> Build:
    def build(folder: Path) -> None:
        vit(folder)
        write_json(folder, "preprocessor_config.json", vit_processor(**changes))

    return build


def truncated(folder: Path) -> None:
    """The download stopped half way."""
    vit(folder)
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def trailing(folder: Path) -> None:
    """Bytes that the header does not account for."""
    vit(folder)
    with open(folder / "model.safetensors", "ab") as stream:
        stream.write(b"\0" * 64)


def poisoned(value: float) -> Build:
    """One weight that is not a finite number."""

    def build(folder: Path) -> None:
        vit(folder)
        from safetensors.numpy import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        tensors["classifier.weight"] = tensors["classifier.weight"].copy()
        tensors["classifier.weight"][1, 2] = value
        save_file(tensors, folder / "model.safetensors")

    return build


def reweighted(
    change: Callable[[Any], Any], name: str = "classifier.weight", build: Build | None = None
) -> Build:
    """One tensor replaced by what ``change`` makes of it; a shape or a type of its own is kept."""

    def made(folder: Path) -> None:
        (build or vit)(folder)
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / "model.safetensors")

    return made


def crowded(folder: Path) -> None:
    """Beside the model's own, 60,000 tensors of one byte each: small to download, long to read one by one."""
    vit(folder)
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    extra = {f"x{i}": entry([1], len(body) + i, len(body) + i + 1, "U8") for i in range(60_000)}
    write_safetensors(folder / "model.safetensors", header | extra, body + bytes(len(extra)))


def _typed(dtype: str) -> Callable[[Any], Any]:
    import torch

    return lambda tensor: tensor.to(getattr(torch, dtype))


def headless(folder: Path) -> None:
    """The classifier's weights are missing: the library would make up random ones."""
    vit(folder)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "classifier" not in k}, folder / "model.safetensors")


def renamed_head(folder: Path) -> None:
    """As many numbers as the model has, but those of its classifier bear another name."""
    vit(folder)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["other.weight"] = tensors.pop("classifier.weight")
    save_file(tensors, folder / "model.safetensors")


def sharded(names: dict[str, str]) -> Build:
    """An index whose weight_map is given."""

    def build(folder: Path) -> None:
        vit(folder)
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        write_json(folder, "model.safetensors.index.json", {"metadata": {}, "weight_map": names})

    return build


class WritesAFile:
    """Unpickled, this makes a file: the harmless stand-in for anything a pickle can do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def trap(folder: Path) -> Path:
    """The file that appears beside the folder if uploaded code ran."""
    return folder.parent / f"{folder.name}-was-run"


def pickled(folder: Path) -> None:
    """Weights only as a pickle, and a hostile one."""
    vit(folder)
    (folder / "model.safetensors").unlink()
    import torch

    torch.save({"classifier.weight": WritesAFile(trap(folder))}, folder / "pytorch_model.bin")


def pickled_beside(folder: Path) -> None:
    """Sound safetensors, with pickles and code all around that nobody may open."""
    vit(
        folder, auto_map={"AutoModelForImageClassification": "modeling.Trap"}, transformers_weights="trap.bin"
    )
    import torch

    for name in ("pytorch_model.bin", "trap.bin", "training_args.bin", "adapter_model.bin"):
        torch.save({"x": WritesAFile(trap(folder))}, folder / name)
    (folder / ".metadata").write_bytes(pickle.dumps(WritesAFile(trap(folder))))  # of a distributed checkpoint
    code = f"from pathlib import Path\nPath({str(trap(folder))!r}).touch()\n"
    for name in ("modeling.py", "configuration.py", "sitecustomize.py"):
        (folder / name).write_text(code)
    write_json(
        folder, "adapter_config.json", {"base_model_name_or_path": "somebody/else", "peft_type": "LORA"}
    )


def linked(name: str, inside: bool = False) -> Build:
    """One file is a link, to a file outside of the repository or (harmlessly) inside."""

    def build(folder: Path) -> None:
        vit(folder)
        target = (folder if inside else folder.parent) / f"elsewhere-{folder.name}"
        (folder / name).rename(target)
        (folder / name).symlink_to(target)

    return build


def pipe(folder: Path) -> None:
    """A named pipe for a configuration: whoever opens it waits for ever."""
    vit(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def _big_index(folder: Path) -> None:
    vit(folder)
    (folder / "model.safetensors").unlink()
    write_json(folder, "model.safetensors.index.json", {"weight_map": ["model.safetensors"]})


_CORRUPT_CONFIG = FailureReason.CORRUPT_CONFIG
_CORRUPT_WEIGHTS = FailureReason.CORRUPT_WEIGHTS
_MISMATCH = FailureReason.CONFIG_MISMATCH
_TOO_LARGE = FailureReason.TOO_LARGE
_UNSUPPORTED = FailureReason.UNSUPPORTED
_FOUR = np.ones(4, np.float32).tobytes()

REPOSITORIES: dict[str, tuple[Build, FailureReason | None]] = {
    # weights
    "truncated": (truncated, _CORRUPT_WEIGHTS),
    "trailing-bytes": (trailing, _CORRUPT_WEIGHTS),
    "empty-weights": (_with_file("model.safetensors", b""), _CORRUPT_WEIGHTS),
    "header-2-to-60": (_with_header({}, length=1 << 60), _CORRUPT_WEIGHTS),
    "header-100k-brackets": (_with_header(b"[" * 100_000), _CORRUPT_WEIGHTS),
    "header-list": (_with_header([]), _CORRUPT_WEIGHTS),
    "header-utf-16": (_header_in("utf-16"), _CORRUPT_WEIGHTS),
    "header-bom": (_header_in("utf-8-sig"), _CORRUPT_WEIGHTS),
    "overlapping": (_with_header({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, _FOUR), _CORRUPT_WEIGHTS),
    "gap": (_with_header({"a": entry([2], 0, 8), "b": entry([1], 12, 16)}, _FOUR), _CORRUPT_WEIGHTS),
    "negative-offsets": (_with_header({"a": entry([4], -16, 0)}, _FOUR), _CORRUPT_WEIGHTS),
    "wrong-shape": (_with_header({"a": entry([5], 0, 16)}, _FOUR), _CORRUPT_WEIGHTS),
    "huge-shape": (_with_header({"a": entry([1 << 62] * 1000, 0, 16)}, _FOUR), _CORRUPT_WEIGHTS),
    "negative-shape": (_with_header({"a": entry([-2, -2], 0, 16)}, _FOUR), _CORRUPT_WEIGHTS),
    "fractional-shape": (
        _with_header({"a": {**entry([], 0, 16), "shape": [2.0, 2.0]}}, _FOUR),
        _CORRUPT_WEIGHTS,
    ),
    "many-dimensions": (_with_header({"a": entry([1 << 60] * 300_000, 0, 16)}, _FOUR), _CORRUPT_WEIGHTS),
    "unknown-dtype": (_with_header({"a": entry([4], 0, 16, "F99")}, _FOUR), _CORRUPT_WEIGHTS),
    "nan": (poisoned(float("nan")), FailureReason.NON_FINITE),
    "infinite": (poisoned(float("-inf")), FailureReason.NON_FINITE),
    "beyond-float32": (reweighted(lambda tensor: tensor.double() * 1e300), FailureReason.NON_FINITE),
    "complex-weights": (reweighted(lambda tensor: tensor + 1j), _UNSUPPORTED),
    "double-weights": (reweighted(lambda tensor: tensor.double()), None),
    "float8-weights": (reweighted(lambda tensor: _typed("float8_e4m3fn")(tensor)), None),
    "whole-weights": (reweighted(lambda tensor: (tensor * 100).int()), None),
    "sixty-thousand-tensors": (crowded, _TOO_LARGE),
    "headless": (headless, _MISMATCH),
    "renamed-head": (renamed_head, _MISMATCH),
    "climbing-shard": (sharded({"a": "../model-00001-of-00001.safetensors"}), FailureReason.UNSAFE_PATH),
    "absolute-shard": (sharded({"a": "/etc/passwd"}), FailureReason.UNSAFE_PATH),
    "pickle-shard": (sharded({"a": "pytorch_model.bin"}), FailureReason.UNSAFE_PATH),
    "missing-shard": (sharded({"a": "model-00009-of-00009.safetensors"}), _CORRUPT_WEIGHTS),
    "misplaced-tensor": (sharded({"no.such": "model-00001-of-00001.safetensors"}), _CORRUPT_WEIGHTS),
    "index-of-another-kind": (_big_index, _CORRUPT_WEIGHTS),
    "pickled": (pickled, FailureReason.UNSAFE_FORMAT),
    "pickled-beside": (pickled_beside, None),
    # files
    "linked-weights": (linked("model.safetensors"), FailureReason.UNSAFE_PATH),
    "linked-config": (linked("config.json"), FailureReason.UNSAFE_PATH),
    "linked-processor": (linked("preprocessor_config.json"), FailureReason.UNSAFE_PATH),
    "linked-inside": (linked("model.safetensors", inside=True), None),
    "pipe": (pipe, FailureReason.UNSAFE_PATH),
    # configuration
    "config-list": (_with_file("config.json", "[]"), _CORRUPT_CONFIG),
    "config-empty": (_with_file("config.json", ""), _CORRUPT_CONFIG),
    "config-brackets": (_with_file("config.json", "[" * 100_000), _CORRUPT_CONFIG),
    "config-nested": (_with_file("config.json", '{"a":' * 60 + "1" + "}" * 60), _CORRUPT_CONFIG),
    "config-nested-100k": (
        _with_file("config.json", '{"a":' * 100_000 + "1" + "}" * 100_000),
        _CORRUPT_CONFIG,
    ),
    "config-huge": (_with_file("config.json", '{"a": "' + "x" * (17 << 20) + '"}'), _CORRUPT_CONFIG),
    "config-twice": (
        _with_file("config.json", '{"model_type": "vit", "model_type": "vit"}'),
        _CORRUPT_CONFIG,
    ),
    "config-not-utf8": (_with_file("config.json", b'{"model_type": "\xff\xfe"}'), _CORRUPT_CONFIG),
    "config-nan": (_configured(layer_norm_eps=float("nan")), _CORRUPT_CONFIG),
    "config-long-number": (
        _with_file("config.json", '{"hidden_size": ' + "9" * 10_000 + "}"),
        _CORRUPT_CONFIG,
    ),
    "type-number": (_configured(model_type=7), _CORRUPT_CONFIG),
    "billion-units": (_configured(hidden_size=10**9), _MISMATCH),
    "many-units": (_configured(hidden_size=60_000, intermediate_size=60_000), _MISMATCH),
    "billion-layers": (_configured(num_hidden_layers=10**9), _MISMATCH),
    "thousand-layers": (_configured(num_hidden_layers=1000), _MISMATCH),
    "negative-layers": (_configured(num_hidden_layers=-1), _CORRUPT_CONFIG),
    "negative-units": (_configured(hidden_size=-16), _CORRUPT_CONFIG),
    "billion-pixels": (_configured(image_size=10**9), _MISMATCH),
    "many-pixels": (_configured(image_size=60_000), _TOO_LARGE),
    "zero-patch": (_configured(patch_size=0), _CORRUPT_CONFIG),
    "zero-heads": (_configured(num_attention_heads=0), _CORRUPT_CONFIG),
    "words-for-numbers": (_configured(hidden_size="many"), _CORRUPT_CONFIG),
    "unknown-activation": (_configured(hidden_act="../../trap"), _CORRUPT_CONFIG),
    "million-labels": (million_labels, _TOO_LARGE),
    "billion-labels": (_configured(id2label=None, num_labels=10**9), _TOO_LARGE),
    "no-labels": (_configured(id2label=None, num_labels=0), FailureReason.NOT_A_CLASSIFIER),
    "negative-labels": (_configured(id2label=None, num_labels=-3), _CORRUPT_CONFIG),
    "four-labels": (_configured(id2label={str(i): "x" for i in range(4)}), _MISMATCH),
    "label-words": (_configured(id2label={"cat": 0, "dog": 1, "husky": 2}), _CORRUPT_CONFIG),
    "label-list": (_configured(id2label=["cat", "dog", "husky"]), _CORRUPT_CONFIG),
    "label-holes": (_configured(id2label={"-1": "x", "0": "cat", "99": "y"}), None),
    "label-escapes": (_configured(id2label={"0": "\x1b[31mcat\ud800", "1": "a" * 2**20, "2": None}), None),
    "grey": (_configured(num_channels=1), _UNSUPPORTED),
    "quantised": (_configured(quantization_config={"quant_method": "gptq", "bits": 4}), _UNSUPPORTED),
    "kernel-repository": (
        _configured(attn_implementation="evil/kernel", _attn_implementation_internal="evil/kernel:1"),
        None,
    ),
    "strange-keys": (
        _configured(
            to_dict=1,
            forward="x",
            fusion_config={"patch_embeddings": True},
            dtype="load",
            _name_or_path="e/k",
        ),
        None,
    ),
    "remote-code": (
        _configured(model_type="own", architectures=["Own"], auto_map={"AutoModel": "e/k--m.Own"}),
        FailureReason.REMOTE_CODE,
    ),
    "remote-architecture": (
        _configured(architectures=["OwnForImageClassification"], auto_map={"AutoModel": "m.Own"}),
        FailureReason.REMOTE_CODE,
    ),
    "backbone": (_configured(architectures=["ViTModel"]), FailureReason.NOT_A_CLASSIFIER),
    "language-model": (
        _configured(model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        FailureReason.NOT_A_CLASSIFIER,
    ),
    "unknown-type": (
        _configured(model_type="new", architectures=["NewForImageClassification"]),
        _UNSUPPORTED,
    ),
    # preprocessing
    "resize-100000": (_processed(size={"height": 100_000, "width": 100_000}), _TOO_LARGE),
    "crop-100000": (_processed(do_center_crop=True, crop_size=100_000), _TOO_LARGE),
    "negative-size": (_processed(size={"height": -1, "width": 16}), _CORRUPT_CONFIG),
    "zero-deviation": (_processed(image_std=[1, 0, 1]), _CORRUPT_CONFIG),
    "processor-400-digits": (_processed(image_mean=[10**400, 0, 0]), _CORRUPT_CONFIG),
    "foreign-processor": (_processed(image_processor_type="os.system"), _CORRUPT_CONFIG),
    "other-class": (_processed(image_processor_type="AutoModel"), _UNSUPPORTED),
    "processor-auto-map": (_processed(auto_map={"AutoImageProcessor": "modeling.Trap"}), None),
    # timm
    "timm-hub": (_timm_configured(architecture="hf-hub:timm/resnet18"), _UNSUPPORTED),
    "timm-folder": (_timm_configured(architecture="local-dir:/tmp"), _UNSUPPORTED),
    "timm-unknown": (_timm_configured(architecture="no_such_net"), _UNSUPPORTED),
    "timm-number": (_timm_configured(architecture=7), _CORRUPT_CONFIG),
    "timm-checkpoint-path": (_timm_configured(model_args={"checkpoint_path": "/etc/passwd"}), _UNSUPPORTED),
    "timm-pretrained": (_timm_configured(model_args={"pretrained": True}), _UNSUPPORTED),
    "timm-odd-value": (_timm_configured(model_args={"act_layer": "a.b.c"}), _UNSUPPORTED),
    "timm-odd-word": (_timm_configured(model_args={"stem_type": "../a.b"}), _UNSUPPORTED),
    "timm-features": (_timm_configured(model_args={"features_only": True}), _UNSUPPORTED),
    "timm-kernel": (_timm_configured(model_args={"attn_layer": "evil/kernel"}), _UNSUPPORTED),
    "timm-billion-layers": (_timm_configured(model_args={"layers": [10**9, 1, 1, 1]}), _MISMATCH),
    "timm-thousand-layers": (_timm_configured(model_args={"layers": [1000, 1, 1, 1]}), _MISMATCH),
    "timm-nested-value": (_timm_configured(model_args={"layers": [[1], [1], [1], [1]]}), _UNSUPPORTED),
    "timm-negative-classes": (_timm_configured(num_classes=-3), _CORRUPT_CONFIG),
    "timm-million-channels": (_timm_configured(model_args={"in_chans": 10**6}), _UNSUPPORTED),
    "timm-million-labels": (_timm_configured(label_names=["\x1b[31mx"] * 10**6), None),
    "timm-headless": (_timm_configured(num_classes=0), FailureReason.NOT_A_CLASSIFIER),
    "timm-other-head": (_timm_configured(num_classes=5), _MISMATCH),
    "timm-two-heads": (_timm_configured(model_args={"num_classes": 4}), _MISMATCH),
    "timm-billion-classes": (_timm_configured(num_classes=10**9), _TOO_LARGE),
    "timm-other-net": (_timm_configured(architecture="test_convnext"), _MISMATCH),
    "timm-resize": (
        _timm_configured(pretrained_cfg={"input_size": [3, 100_000, 100_000], "num_classes": 3}),
        _TOO_LARGE,
    ),
    "timm-crop": (_timm_configured(pretrained_cfg={"crop_pct": 1e-9, "num_classes": 3}), _CORRUPT_CONFIG),
    "timm-cfg-list": (_timm_configured(pretrained_cfg=[]), _CORRUPT_CONFIG),
    "timm-sources": (
        _timm_configured(
            pretrained_cfg={
                "input_size": [3, 32, 32],
                "num_classes": 3,
                "url": "http://127.0.0.1:9/x.pth",
                "file": "/etc/passwd",
                "hf_hub_id": "evil/net",
                "custom_load": True,
            }
        ),
        None,
    ),
    # what only running the model shows
    "overflow": (reweighted(lambda tensor: tensor * 0 + 3e38), FailureReason.NON_FINITE),
    "zero-head": (reweighted(lambda tensor: tensor * 0), FailureReason.CONSTANT),
    "negative-pixels": (_configured(image_size=-16), _MISMATCH),
    "timm-negative-variance": (
        reweighted(lambda tensor: -tensor - 1, "bn1.running_var", timm_repository),
        FailureReason.NON_FINITE,
    ),
}

#: These load; `probelog.inference.observe.observe` refuses them.
FOUND_BY_RUNNING = frozenset({"overflow", "zero-head", "negative-pixels", "timm-negative-variance"})

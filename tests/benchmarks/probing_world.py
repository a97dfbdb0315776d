"""What `tests/benchmarks/probing.py` measures on: hubs of classifiers, and probes as JPEG files and as Parquet."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.conftest import BENCH
from tests.support.hub.hostile import write_json
from tests.support.worlds import tiny_encoders

JPEG_QUALITY = 90
_TIMM = ("resnet18", "resnet50", "vit_small_patch16_224", "mobilenetv3_large_100", "convnext_tiny")
_MEAN_STD = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_VIT_SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
}
# Architecture, arguments of its configuration, and what its preprocessor_config.json says.
_TRANSFORMERS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    (
        "ResNetForImageClassification",
        {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"},
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0.875},
    ),
    (
        "ResNetForImageClassification",
        {},
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0.875},
    ),
    (
        "ViTForImageClassification",
        _VIT_SMALL,
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}},
    ),
    (
        "MobileNetV2ForImageClassification",
        {},
        {
            "image_processor_type": "MobileNetV2ImageProcessor",
            "size": {"shortest_edge": 256},
            "crop_size": {"height": 224, "width": 224},
        },
    ),
    (
        "ConvNextForImageClassification",
        {},
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0.875},
    ),
)


@dataclass(frozen=True)
class World:
    """One set: a hub, its probes twice (as people keep them and as ours are read), and an encoder."""

    name: str
    hub: Path
    files: Path
    parquet: Path
    count: int
    encoder: Path
    note: str


def realistic(folder: Path, jpegs: Path | None, models: int, probes: int) -> World:
    """Models of random weights at 224 pixels in both layouts, and photographs as probes."""
    hub = folder / "hub"
    for number in range(models):
        _write_model(hub, number)
    files, note = folder / "jpeg", ""
    files.mkdir(parents=True)
    for number, data in zip(range(probes), _photographs(jpegs, probes), strict=False):
        (files / f"{number:04}.jpg").write_bytes(data)
    found = len(list(jpegs.glob("*.jpg"))) if jpegs is not None else 0
    if not found:
        note = "photographs are synthetic"
    elif found < probes:
        note = f"{found} photographs, the other {probes - found} are their mirror images"
    return World("realistic", hub, files, _packed(files, folder), probes, _encoder(), note)


def tiny(folder: Path, hub: Path, source: Path, probes: int) -> World:
    """The bench hub of 64-pixel classifiers, with its own probes."""
    files = folder / "jpeg"
    files.mkdir(parents=True)
    for number, image in enumerate(pq.read_table(source)["image"].to_pylist()[:probes]):
        (files / f"{number:05}.jpg").write_bytes(image["bytes"])
    return World("tiny", hub, files, _packed(files, folder), probes, _encoder(), "")


def smallest(folder: Path, models: int) -> Path:
    """A hub whose models take no time, to measure what starting the workers takes."""
    from tests.support.worlds.tiny_world import timm_model

    for number in range(models):
        timm_model(folder / f"start/model-{number}", "test_resnet", 3, number)
    return folder


def repositories(hub: Path) -> list[str]:
    """Owner and name of every repository in a folder."""
    return sorted(str(config.parent.relative_to(hub)) for config in hub.glob("*/*/config.json"))


def _write_model(hub: Path, number: int) -> None:
    import torch

    torch.manual_seed(number)
    kinds = len(_TIMM) + len(_TRANSFORMERS)
    logits = 3 + (7 * number) % 37
    kind, again = number % kinds, number // kinds
    if kind % 2:
        architecture, arguments, processor = _TRANSFORMERS[kind // 2]
        name = f"{architecture.removesuffix('ForImageClassification').lower()}-{kind}-{again}"
        _write_transformers(
            hub / "transformers" / name, architecture, arguments, processor | _MEAN_STD, logits
        )
    else:
        architecture = _TIMM[kind // 2]
        _write_timm(hub / "timm" / f"{architecture}-{again}", architecture, logits)


def _write_transformers(
    folder: Path, architecture: str, arguments: dict[str, Any], processor: dict[str, Any], logits: int
) -> None:
    import transformers

    made = getattr(transformers, architecture)
    model = made(made.config_class(**arguments, num_labels=logits)).eval()
    _stir(model)
    model.save_pretrained(folder)
    write_json(folder, "preprocessor_config.json", processor)


def _write_timm(folder: Path, architecture: str, logits: int) -> None:
    import timm
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model = timm.create_model(architecture, num_classes=logits).eval()
    _stir(model)
    save_file(model.state_dict(), folder / "model.safetensors")
    wanted = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "pool_size", "first_conv",
              "classifier")  # fmt: skip
    known = {key: model.pretrained_cfg[key] for key in wanted if model.pretrained_cfg.get(key) is not None}
    write_json(
        folder,
        "config.json",
        {
            "architecture": architecture,
            "num_classes": logits,
            "pretrained_cfg": known | {"num_classes": logits},
        },
    )


def _stir(model: Any) -> None:
    """Some fresh models give every image the same logits."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.01 * torch.randn_like(parameter))


def _photographs(jpegs: Path | None, count: int) -> Iterator[bytes]:
    """JPEG files: those of a folder, then their mirror images; synthetic ones where there is no folder."""
    found = sorted(jpegs.glob("*.jpg")) if jpegs is not None else []
    for file in found[:count]:
        yield file.read_bytes()
    for file in found:
        with Image.open(file) as image:
            yield _jpeg(image.convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    if not found:
        for seed in range(count):
            rng = np.random.default_rng(seed)
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((427, 320), Image.Resampling.BICUBIC), np.float32)
            grain = rng.normal(0, 8, smooth.shape)
            yield _jpeg(Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)))


def _jpeg(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=JPEG_QUALITY)
    return sink.getvalue()


def _packed(files: Path, folder: Path) -> Path:
    """The same files in Parquet, as the Hub stores images."""
    target = folder / "probes.parquet"
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(files.iterdir())]
    pq.write_table(pa.table({"image": images}), target)
    return target


def _encoder() -> Path:
    """Any encoder will do, probing does not depend on it: the bench's where it is, else one of random weights."""
    return BENCH / "encoder" if (BENCH / "encoder").is_dir() else tiny_encoders.folder("clip")

"""timm's architectures with random weights, saved as timm saves them and as the Hub holds older and wrapped ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conformance.compare import RUN, Answer, Outcome, calibrated, compare

#: Larger architectures differ from smaller ones in numbers alone.
MOST_PARAMETERS = 40_000_000

#: The smallest architecture of each module of timm.
ONE_OF_EACH = (
    "test_vit", "test_byobnet", "halonet_h1", "poolformerv2_s12", "cait_xxs24_224", "coat_tiny", "test_coatnet",
    "convit_tiny", "convmixer_768_32", "test_convnext", "cpubone_nano", "crossvit_tiny_240", "cs3darknet_focus_s",
    "csatv2", "cspnext_tiny", "davit_tiny", "deit_tiny_patch16_224", "densenet121", "dla46x_c", "test_nfnet", "dpn48b",
    "ese_vovnet19b_slim_dw", "test_resnet", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0",
    "test_efficientnet", "efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "vit_tiny_patch16_dinov3_qkvb",
    "fasternet_t0", "fastvit_t8", "mobilenetv3_small_050", "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_050",
    "gmlp_ti16_224", "hardcorenas_b", "hgnetv2_b0", "hiera_tiny_224", "hrnet_w18_small",
    "iformer_t", "inception_next_atto", "inception_v3", "lcnetv2_small", "legacy_seresnet18", "legacy_xception",
    "levit_128s", "lowformer_b0", "test_mambaout", "mobilevit_xxs", "mvitv2_tiny", "nest_tiny", "nextvit_small",
    "pit_ti_224", "pvt_v2_b0", "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m1", "res2next50", "resnest14d",
    "resnetv2_18", "rexnet_100", "selecsls42", "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s050",
    "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224",
    "test_vit_relpos", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small", "visformer_tiny",
    "vit_tiny_r_s16_p8_224", "vitamin_small_224", "volo_d1_224", "xception41p", "xcit_nano_12_p8_224", "fbnetc_100",
)  # fmt: skip
#: Modules of timm whose architectures are all larger, or take pictures of 1,024 pixels (hieradet_sam2; with ``--all``).
LARGE = (
    "beit", "deepseek_vit", "gemma4_vit", "hieradet_sam2", "inception_resnet_v2", "inception_v4", "mobilenetv5", "naflexvit", "nasnet",
    "pnasnet", "qwen3_vit", "vision_transformer_sam", "vgg",
)  # fmt: skip

Change = Callable[[dict[str, Any]], object]


def module_of(name: str) -> str:
    """The module of timm that registers an architecture."""
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def parameters(name: str) -> int:
    """How many parameters an architecture has."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name, num_classes=5).parameters())


def trained(name: str, size: int | None = None, **arguments: Any) -> Any:
    """A model of five classes with random weights, and batch statistics as its layers meet them."""
    torch.manual_seed(0)
    model = timm.create_model(name, **({"num_classes": 5} | arguments))
    channels, *edges = model.pretrained_cfg["input_size"]
    channels = arguments.get("in_chans", channels)
    return calibrated(model, torch.randn(2, channels, *(edges if size is None else (size, size))), 0.02)


def saved(model: Any, folder: Path, change: Change = lambda config: None) -> Path:
    """The model as timm saves it, with its configuration changed afterwards."""
    try:
        timm.models.save_for_hf(model, folder, safe_serialization=True)
    except (
        RuntimeError
    ):  # safetensors refuses tensors that share memory; the Hub's copies of these have each by itself
        timm.models.save_for_hf(model, folder, safe_serialization=False)
        (folder / "pytorch_model.bin").unlink()
        save_file(
            {key: value.clone() for key, value in model.state_dict().items()}, folder / "model.safetensors"
        )
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_wrapper(config: dict[str, Any]) -> None:
    """What transformers adds to a repository that is made for its wrapper."""
    config.setdefault("model_args", {}).pop("num_classes", None)  # the wrapper gives it itself
    config |= {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]}


def as_of_2022(config: dict[str, Any]) -> None:
    """One flat object, as exports before 2023 are."""
    flat = config.pop("pretrained_cfg") | {"num_classes": config["num_classes"]}
    architecture = config["architecture"]
    config.clear()
    config |= flat | {"architecture": architecture}


def half(folder: Path) -> None:
    """Store the weights as bfloat16."""
    tensors = load_file(folder / "model.safetensors")
    halved = {key: value.bfloat16() if value.is_floating_point() else value for key, value in tensors.items()}
    save_file(halved, folder / "model.safetensors")


def by_timm(folder: Path, images: Sequence[Image.Image], run: Sequence[int] | None = None) -> Answer:
    """As a user of timm runs the repository."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    pixels = torch.stack([transform(image) for image in images])
    return list(pixels), model(pixels if run is None else pixels[run])


def by_transformers(folder: Path, images: Sequence[Image.Image], run: Sequence[int] | None = None) -> Answer:
    """As a user of transformers runs it, through its wrapper."""
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(list(images), return_tensors="pt")["pixel_values"]
    return list(pixels), model(pixel_values=pixels if run is None else pixels[run]).logits


def outcomes(name: str, folder: Path) -> Iterator[Outcome]:
    """One architecture in every layout."""
    model = trained(name)
    layouts: dict[str, tuple[Change, Callable[[Path, Sequence[Image.Image]], Answer]]] = {
        "as saved": (lambda config: None, by_timm),
        "bfloat16, wrapper": (as_wrapper, by_transformers),
        "of 2022": (as_of_2022, by_timm),
    }
    for number, (layout, (change, theirs)) in enumerate(layouts.items()):
        place = saved(model, folder / str(number), change)
        if "bfloat16" in layout:
            half(place)
        # Forward passes are half of what this takes; the other layouts hold the same architecture.
        run = RUN if layout == "as saved" else RUN[:1]
        yield compare("timm", name, layout, place, partial(theirs, place), run)
        (place / "model.safetensors").unlink()

"""Every image-classification class of transformers, tiny, saved as the library saves it and as the Hub holds older ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from tests.conformance.compare import Answer, Outcome, calibrated, compare

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {"image_size": 32, "patch_size": 8}
VISION = {"vision_config": VIT | IMAGE, "text_config": VIT | {"vocab_size": 99}, "projection_dim": 8}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}

PERCEIVER = {
    "image_size": 32, "num_latents": 4, "d_latents": 16, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 1,
    "num_self_attention_heads": 2, "num_cross_attention_heads": 1,
}  # fmt: skip
LEVIT = {
    "image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
}  # fmt: skip

TINY: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": VIT | IMAGE,
    "DeiTForImageClassification": VIT | IMAGE,
    "DeiTForImageClassificationWithTeacher": VIT | IMAGE,
    "BeitForImageClassification": VIT | IMAGE | {"use_relative_position_bias": True},
    "Data2VecVisionForImageClassification": VIT | IMAGE,
    "Dinov2ForImageClassification": VIT | IMAGE,
    "Dinov2WithRegistersForImageClassification": VIT | IMAGE,
    "ViTMSNForImageClassification": VIT | IMAGE,
    "IJepaForImageClassification": VIT | IMAGE,
    "CLIPForImageClassification": VISION,
    "SiglipForImageClassification": VISION,
    "ResNetForImageClassification": STAGES | {"embedding_size": 8, "layer_type": "basic"},
    "RegNetForImageClassification": STAGES | {"embedding_size": 8, "groups_width": 4},
    "BitForImageClassification": STAGES | {"embedding_size": 8, "num_groups": 4},
    "ConvNextForImageClassification": STAGES,
    "ConvNextV2ForImageClassification": STAGES,
    "FocalNetForImageClassification": {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3], "hidden_sizes": [8, 16]},
    "SwinForImageClassification": SWIN,
    "Swinv2ForImageClassification": SWIN,
    "MobileNetV1ForImageClassification": {"depth_multiplier": 0.25, "min_depth": 4},
    "MobileNetV2ForImageClassification": {"depth_multiplier": 0.25, "finegrained_output": False},
    "EfficientNetForImageClassification": {
        "width_coefficient": 0.25, "depth_coefficient": 0.25, "image_size": 32, "hidden_dim": 320, "in_channels": [16, 16],
        "out_channels": [16, 16], "strides": [1, 2], "kernel_sizes": [3, 3], "num_block_repeats": [1, 1],
        "expand_ratios": [1, 2], "depthwise_padding": [],
    },
    "LevitForImageClassification": LEVIT,
    "CvtForImageClassification": {"embed_dim": [8, 16, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "PoolFormerForImageClassification": STAGES,
    "SegformerForImageClassification": STAGES | {"num_attention_heads": [1, 1, 2, 2]},
    "PvtForImageClassification": STAGES | {"image_size": 64, "num_attention_heads": [1, 1, 2, 2]},
    "MobileViTForImageClassification": {
        "image_size": 64, "hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "num_attention_heads": 2,
    },
    "PerceiverForImageClassificationLearned": PERCEIVER,
    "PerceiverForImageClassificationFourier": PERCEIVER,
    "PerceiverForImageClassificationConvProcessing": PERCEIVER,
    "DonutSwinForImageClassification": SWIN,
    "HGNetV2ForImageClassification": {
        "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "stem_channels": [3, 4, 8],
        "stage_in_channels": [8, 8, 8, 16], "stage_mid_channels": [4, 4, 8, 8], "stage_out_channels": [8, 8, 16, 16],
        "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "HieraForImageClassification": {
        "image_size": [64, 64], "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "masked_unit_size": [8, 8],
    },
    "LevitForImageClassificationWithTeacher": LEVIT,
    "MetaClip2ForImageClassification": VISION,
    "MobileViTV2ForImageClassification": {
        "image_size": 64, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1], "base_attn_unit_dims": [32, 32, 32],
    },
    "PPLCNetForImageClassification": {"scale": 0.25, "class_expand": 32},
    "PvtV2ForImageClassification": STAGES | {"image_size": 64, "num_attention_heads": [1, 1, 2, 2]},
    "SwiftFormerForImageClassification": {"depths": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16]},
    "TextNetForImageClassification": {
        "image_size": [64, 64], "stem_out_channels": 8, "hidden_sizes": [8, 8, 8, 16, 16],
        "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3]], [[3, 3]], [[3, 3]]], "conv_layer_strides": [[2], [2], [2], [2]],
    },
}  # fmt: skip
#: Classes that are refused, and why (docs/operators/troubleshooting.md): what they take is no picture of one size.
REFUSED = {
    "DinatForImageClassification": "needs the package natten",
    "ImageGPTForImageClassification": "takes a sequence of colour clusters",
    "ShieldGemma2ForImageClassification": "takes a prompt beside the picture",
    "Siglip2ForImageClassification": "takes patches, a mask and the shape of each picture",
}
#: transformers' wrapper around timm is compared with timm's architectures.
WRAPPER = "TimmWrapperForImageClassification"


def classes() -> dict[str, str]:
    """Every class that the installed transformers maps to image classification, with its model type."""
    mapped = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items()
    return {name: kind for kind, names in mapped for name in ([names] if isinstance(names, str) else names)}


def make(architecture: str, **changes: Any) -> Any:
    """A model with random weights and random batch statistics, of three classes."""
    cls = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{"num_labels": 3} | TINY[architecture] | changes))
    return calibrated(model, torch.randn(2, 3, *[edge(architecture) or 64] * 2), 0.1)


def edge(architecture: str) -> int | None:
    """The size of a tiny model's pictures in pixels; None where it takes any."""
    vision = TINY[architecture].get("vision_config", {})
    size = TINY[architecture].get("image_size", vision.get("image_size"))
    return size[0] if isinstance(size, list) else size


def processor(architecture: str, backend: str = "pil") -> Any:
    """The image processor that belongs to a tiny model: the model type's own, or ViT's, at the model's size."""
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(classes()[architecture], IMAGE_PROCESSOR_MAPPING_NAMES["vit"])
    made = getattr(transformers, names.get(backend) or names["torchvision"])
    pixels = edge(architecture)
    if pixels is None:
        return made()
    sizes = {key: getattr(made, key, None) for key in ("size", "crop_size")}
    return made(
        **{key: dict.fromkeys(value, pixels) for key, value in sizes.items() if isinstance(value, dict)}
    )


def by_transformers(folder: Path, images: Sequence[Image.Image], run: Sequence[int] | None = None) -> Answer:
    """As a user of transformers runs the repository, one picture at a time."""
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    prepare = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = [prepare(image, return_tensors="np")["pixel_values"][0] for image in images]
    output = model(torch.stack([torch.tensor(pixels[number]) for number in run or range(len(pixels))]))
    return pixels, getattr(output, "logits", getattr(output, "last_hidden_state", None))


def as_feature_extractor(folder: Path) -> None:
    """Rewrite the processor's settings as they were written before there were image processors."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    name = settings.pop("image_processor_type").removesuffix("Pil").removesuffix("Fast")
    settings["feature_extractor_type"] = name.replace("ImageProcessor", "FeatureExtractor")
    for key in ("size", "crop_size"):
        edges = set((settings.get(key) or {}).values()) - {None}
        if len(edges) == 1:
            settings[key] = edges.pop()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def outcomes(architecture: str, folder: Path) -> Iterator[Outcome]:
    """One class in every layout."""

    def outcome(layout: str, place: Path) -> Outcome:
        return compare("transformers", architecture, layout, place, partial(by_transformers, place))

    if architecture in REFUSED:
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": classes()[architecture], "architectures": [architecture], "num_labels": 3}
        (folder / "config.json").write_text(json.dumps(config))
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
        yield outcome("as saved", folder)
        return
    model = make(architecture)
    model.save_pretrained(folder / "saved")
    processor(architecture).save_pretrained(folder / "saved")
    yield outcome("as saved", folder / "saved")
    model.to(torch.bfloat16).save_pretrained(folder / "hub", max_shard_size="20KB")
    processor(architecture).save_pretrained(folder / "hub")
    as_feature_extractor(folder / "hub")
    yield outcome("bfloat16, sharded, feature extractor", folder / "hub")

"""The split preprocessing gives what each model's own processor gives, on pictures of every odd kind."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data as timm_data
import torch
import transformers
from PIL import Image

from probelog.errors import FailureReason, ItemFailure
from probelog.models.preprocessing import Recipe, as_rgb, timm_recipe, transformers_recipe
from tests.support.hub.hostile import write_json


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    # Smooth with some noise: pure noise hides differences of resampling in its own randomness.
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 7 + c) + np.cos(y / (5 + c)) for c in range(3)], -1)
    values = np.clip(127 + 50 * waves + rng.normal(0, 20, waves.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(values).convert(mode)


def turned() -> Image.Image:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    picture(60, 40).save(buffer, "JPEG", exif=exif)
    return Image.open(buffer)


def transparent_palette() -> Image.Image:
    image = picture(50, 40, "P")
    image.info["transparency"] = 0
    return image


PICTURES = {
    "landscape": picture(97, 61),
    "portrait": picture(40, 133),
    "small": picture(5, 7),
    "large": picture(641, 480),
    "one-pixel-wide": picture(1, 40),
    "one-pixel": picture(1, 1),
    "grey": picture(70, 50, "L"),
    "alpha": picture(50, 70, "RGBA"),
    "palette": picture(64, 64, "P"),
    "transparent-palette": transparent_palette(),
    "cmyk": picture(30, 50, "CMYK"),
    "black-and-white": picture(30, 50, "1"),
    "grey-alpha": picture(30, 50, "LA"),
    "turned": turned(),
}

# Class name, settings, whether it can be split.
PROCESSORS: list[tuple[str, dict[str, Any], bool]] = [
    ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}, True),
    ("ViTImageProcessor", {"size": {"height": 30, "width": 40}, "resample": 3, "do_normalize": False}, True),
    ("ViTImageProcessor", {"size": 32, "do_rescale": False, "do_normalize": False}, True),
    ("ViTFeatureExtractor", {"size": 32}, True),
    ("ViTImageProcessorFast", {"size": {"height": 32, "width": 32}}, True),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 48}, "crop_pct": 0.875}, True),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}, True),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}, True),
    ("CLIPImageProcessor", {"size": 32, "crop_size": 32}, True),
    ("BeitImageProcessor", {"size": {"height": 40, "width": 40}, "do_center_crop": True, "crop_size": 32}, True),
    ("DeiTImageProcessor", {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}}, True),
    ("EfficientNetImageProcessor", {"size": {"height": 32, "width": 32}, "include_top": True}, True),
    ("EfficientNetImageProcessor", {"size": {"height": 32, "width": 32}, "rescale_offset": True}, True),
    ("MobileNetV1ImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, True),
    ("MobileNetV2ImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": {"height": 50, "width": 50}}, True),
    ("LevitImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}, True),
    ("PoolFormerImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}, True),
    ("SegformerImageProcessor", {"size": {"height": 32, "width": 32}}, True),
    ("BitImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}, True),
    ("SiglipImageProcessor", {"size": {"height": 32, "width": 32}}, True),
    ("MobileViTImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, True),
    ("PvtImageProcessor", {"size": {"height": 32, "width": 32}}, True),
    ("DonutImageProcessor", {"size": {"height": 40, "width": 30}}, True),
    # Pads after normalising.
    ("ViTImageProcessor", {"size": 32, "do_pad": True, "pad_size": {"height": 40, "width": 36}}, False),
]  # fmt: skip


def load(folder: Path, name: str, settings: dict[str, Any], model_type: str = "vit") -> Recipe:
    write_json(folder, "preprocessor_config.json", {"image_processor_type": name} | settings)
    return transformers_recipe(folder, model_type, None, 2048)


def finished(recipe: Recipe, images: list[Image.Image]) -> np.ndarray:
    return recipe.normalise(torch.from_numpy(recipe.geometry(images))).numpy()


@pytest.mark.parametrize(("name", "settings", "split"), PROCESSORS)
def test_equals_the_processor_itself(
    name: str, settings: dict[str, Any], split: bool, tmp_path: Path
) -> None:
    recipe = load(tmp_path, name, settings)
    assert (recipe.dtype == "uint8") is split
    assert recipe.declared
    base = name.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    own = getattr(transformers, f"{base}Pil")(**settings)
    for kind, image in PICTURES.items():
        expected = own(transformers.image_utils.load_image(image), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(finished(recipe, [image])[0], expected, atol=1e-5, rtol=1e-5, err_msg=kind)


# Every model type of transformers that classifies images with a processor of fixed output size.
MODEL_TYPES = [
    "beit", "bit", "clip", "convnext", "convnextv2", "cvt", "data2vec-vision", "deit", "dinat", "dinov2",
    "efficientnet", "focalnet", "hiera", "ijepa", "levit", "metaclip_2", "mobilenet_v1", "mobilenet_v2",
    "mobilevit", "mobilevitv2", "perceiver", "poolformer", "pvt", "pvt_v2", "regnet", "resnet", "segformer",
    "siglip", "swiftformer", "swin", "swinv2", "vit", "vit_msn",
]  # fmt: skip
ODD = (
    "landscape",
    "portrait",
    "small",
    "one-pixel",
    "grey",
    "transparent-palette",
    "black-and-white",
    "turned",
)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_equals_what_the_library_itself_would_load(model_type: str, tmp_path: Path) -> None:
    """Within a grey level, on the processor that the library saves for a model type and loads for it again."""
    names = transformers.models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES[model_type]
    getattr(transformers, names["pil"])().save_pretrained(tmp_path)
    write_json(tmp_path, "config.json", {"model_type": model_type})
    own = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    recipe = transformers_recipe(tmp_path, model_type, None, 2048)
    assert recipe.processor == names["pil"]
    assert recipe.gain is not None
    for kind in ODD:
        seen = transformers.image_utils.load_image(PICTURES[kind])
        if recipe.square:
            edge = min(seen.size)
            left, top = (seen.size[0] - edge) // 2, (seen.size[1] - edge) // 2
            seen = seen.crop((left, top, left + edge, top + edge))
        expected = own(seen, return_tensors="np")["pixel_values"][0]
        level = 1.001 * max(recipe.gain)
        np.testing.assert_allclose(finished(recipe, [PICTURES[kind]])[0], expected, atol=level, err_msg=kind)


TIMM: list[dict[str, Any]] = [
    {"input_size": [3, 32, 32]},
    {"input_size": [3, 32, 32], "crop_pct": 0.95, "interpolation": "bicubic", "crop_mode": "squash"},
    {"input_size": [3, 32, 48], "crop_pct": 0.8, "interpolation": "bilinear", "crop_mode": "border"},
    {"input_size": [3, 32, 32], "crop_pct": 1.0, "interpolation": "nearest"},
    {"input_size": [3, 32, 32], "crop_pct": 0.9, "interpolation": "box"},
    {"input_size": [3, 32, 32], "crop_pct": 0.9, "interpolation": "hamming"},
    {"input_size": [3, 32, 32], "crop_pct": 1.0, "interpolation": "bilinear"},
    {"input_size": [3, 32, 48], "crop_pct": 0.9, "interpolation": "lanczos"},
    {"input_size": [3, 32, 32], "crop_mode": "squash", "interpolation": "nearest"},
    {"input_size": [3, 32, 32], "crop_mode": "border", "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.5, 0.2]},
    {"input_size": [1, 28, 28], "mean": [0.13], "std": [0.3]},
    {},
]


@pytest.mark.parametrize("cfg", TIMM)
def test_equals_the_transform_of_timm(cfg: dict[str, Any]) -> None:
    recipe = timm_recipe(cfg, 2048)
    data = timm_data.resolve_data_config(pretrained_cfg=cfg or {"tag": "none"})
    transform = timm_data.create_transform(**data, is_training=False)
    for kind, image in PICTURES.items():
        seen = as_rgb(image).convert("L") if recipe.channels == 1 else as_rgb(image)
        expected = transform(seen).numpy()
        np.testing.assert_allclose(finished(recipe, [image])[0], expected, atol=1e-5, rtol=1e-5, err_msg=kind)


def test_random_interpolation_is_bilinear() -> None:
    sure = timm_recipe({"input_size": [3, 32, 32], "interpolation": "bilinear"}, 64)
    assert timm_recipe({"input_size": [3, 32, 32], "interpolation": "random"}, 64) == sure


@pytest.mark.parametrize(
    ("cfg", "reason"),
    [
        ({"input_size": [3, 100_000, 10]}, FailureReason.TOO_LARGE),
        ({"input_size": [3, 0, 10]}, FailureReason.CORRUPT_CONFIG),
        ({"input_size": 224}, FailureReason.CORRUPT_CONFIG),
        ({"input_size": [5, 32, 32]}, FailureReason.UNSUPPORTED),
        ({"std": [1, 0, 1]}, FailureReason.CORRUPT_CONFIG),
        ({"mean": "abc"}, FailureReason.CORRUPT_CONFIG),
        ({"crop_pct": "0.9"}, FailureReason.CORRUPT_CONFIG),
        ({"interpolation": ["x"]}, FailureReason.CORRUPT_CONFIG),
        ({"crop_mode": "__import__"}, FailureReason.CORRUPT_CONFIG),
    ],
)
def test_timm_values_without_meaning(cfg: dict[str, Any], reason: FailureReason) -> None:
    with pytest.raises(ItemFailure) as failure:
        timm_recipe(cfg, 2048)
    assert failure.value.reason is reason


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"size": {"shortest_edge": 100_000}}, FailureReason.TOO_LARGE),
        ({"size": "large"}, FailureReason.CORRUPT_CONFIG),
        ({"size": {"wrong": 3}}, FailureReason.CORRUPT_CONFIG),
        ({"size": {}}, FailureReason.CORRUPT_CONFIG),
        ({"image_mean": 0.5}, None),
        ({"image_mean": [0.5, 0.5]}, FailureReason.CORRUPT_CONFIG),
        ({"image_std": [0, 0, 0]}, FailureReason.CORRUPT_CONFIG),
        ({"resample": 99}, FailureReason.CORRUPT_CONFIG),
        ({"rescale_factor": "x"}, FailureReason.CORRUPT_CONFIG),
        ({"do_resize": {"a": 1}}, FailureReason.CORRUPT_CONFIG),
        ({"do_resize": False}, FailureReason.UNSUPPORTED),
    ],
)
def test_processor_values_without_meaning(
    settings: dict[str, Any], reason: FailureReason | None, tmp_path: Path
) -> None:
    if reason is None:
        assert load(tmp_path, "ViTImageProcessor", settings).channels == 3
        return
    with pytest.raises(ItemFailure) as failure:
        load(tmp_path, "ViTImageProcessor", settings)
    assert failure.value.reason is reason


def test_sizes_that_follow_the_image_are_made_square_first(tmp_path: Path) -> None:
    recipe = load(tmp_path, "ViTImageProcessor", {"size": {"shortest_edge": 32}})
    assert recipe.square
    assert recipe.geometry([PICTURES["portrait"], PICTURES["landscape"]]).shape == (2, 3, 32, 32)


def test_undeclared_processor_is_the_model_types_default_at_the_models_size(tmp_path: Path) -> None:
    recipe = transformers_recipe(tmp_path, "vit", 48, 2048)
    assert not recipe.declared
    assert recipe.processor == "ViTImageProcessorPil"
    assert recipe.shape == (3, 48, 48)
    assert transformers_recipe(tmp_path, "pvt", None, 2048).shape == (3, 224, 224)
    assert json.loads(recipe.to_json())["declared"] is False
    fits = transformers_recipe(tmp_path, "deit", 224, 2048)
    assert json.loads(fits.settings)["size"] == {"height": 256, "width": 256}  # the default, with its crop


def test_processor_inside_a_processor_config(tmp_path: Path) -> None:
    inner = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "crop_size": 40}
    write_json(
        tmp_path, "processor_config.json", {"image_processor": inner, "processor_class": "CLIPProcessor"}
    )
    recipe = transformers_recipe(tmp_path, "clip", None, 2048)
    assert recipe.declared
    assert recipe.shape == (3, 40, 40)


def test_keys(tmp_path: Path) -> None:
    size = {"height": 32, "width": 32}
    base = load(tmp_path, "ViTImageProcessor", {"size": size})
    again = load(tmp_path, "ViTImageProcessorFast", {"size": 32, "image_mean": [0.5, 0.5, 0.5]})
    other = load(tmp_path, "ViTImageProcessor", {"size": size, "image_mean": [0.1, 0.2, 0.3]})
    larger = load(tmp_path, "ViTImageProcessor", {"size": 40})
    assert base.key == again.key
    assert base.key != other.key
    assert base.geometry_key == other.geometry_key != larger.geometry_key
    assert len(base.key) == 16
    border = [timm_recipe({"crop_mode": "border", "mean": [m] * 3}, 999) for m in (0.1, 0.9)]
    assert border[0].geometry_key != border[1].geometry_key


def test_recipe_travels(tmp_path: Path) -> None:
    for recipe in (
        load(tmp_path, "CLIPImageProcessor", {"size": 32, "crop_size": 32}),
        timm_recipe({}, 999),
    ):
        pixels = recipe.geometry([PICTURES["grey"]])
        copy = pickle.loads(pickle.dumps(recipe))
        assert copy == recipe == Recipe.from_json(recipe.to_json())
        assert (copy.geometry([PICTURES["grey"]]) == pixels).all()


def test_very_long_strips_lose_their_ends() -> None:
    assert as_rgb(Image.new("L", (2, 100_000))).size == (2, 128)
    assert as_rgb(Image.new("RGB", (64, 1))).size == (64, 1)


def beside(folder: Path, **backend: Any) -> list[np.ndarray]:
    """What the library's own loader makes of some pictures."""
    own = transformers.AutoImageProcessor.from_pretrained(folder, **backend)
    seen = [transformers.image_utils.load_image(PICTURES[kind]) for kind in ODD]
    return [own(image, return_tensors="np")["pixel_values"][0] for image in seen]


def check(folder: Path, expected: list[np.ndarray], model_type: str = "vit") -> Recipe:
    """Within a grey level of what is expected."""
    recipe = transformers_recipe(folder, model_type, None, 2048)
    assert recipe.gain is not None
    for kind, pixels in zip(ODD, expected, strict=True):
        made = finished(recipe, [PICTURES[kind]])[0]
        np.testing.assert_allclose(made, pixels, atol=1.001 * max(recipe.gain), err_msg=kind)
    return recipe


VIT_32 = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}


def test_the_nested_processor_counts_before_the_older_file(tmp_path: Path) -> None:
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    write_json(tmp_path, "config.json", {"model_type": "vit"})
    write_json(tmp_path, "preprocessor_config.json", VIT_32 | imagenet)
    write_json(tmp_path, "processor_config.json", {"image_processor": VIT_32 | half, "processor_class": "X"})
    recipe = check(tmp_path, beside(tmp_path, backend="pil"))
    assert recipe.gain == pytest.approx([2 / 255] * 3, rel=1e-5)
    for older in ({"processor_class": "X"}, {"image_processor": None}):
        write_json(tmp_path, "processor_config.json", older)
        assert check(tmp_path, beside(tmp_path, backend="pil")).gain != recipe.gain
    write_json(tmp_path, "processor_config.json", {"image_processor": "ViTImageProcessor"})
    with pytest.raises(ItemFailure, match="not an object"):
        transformers_recipe(tmp_path, "vit", None, 2048)


def test_a_class_that_only_the_older_key_names(tmp_path: Path) -> None:
    older = {"image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor"}
    write_json(tmp_path, "config.json", {"model_type": "vit"})
    write_json(tmp_path, "preprocessor_config.json", VIT_32 | older)
    assert check(tmp_path, beside(tmp_path, backend="pil")).processor == "ViTImageProcessorPil"


@pytest.mark.parametrize(
    "nulls", [{"do_normalize": None}, {"do_rescale": None, "do_normalize": None}, {"do_convert_rgb": None}]
)
def test_a_null_stands_in_place_of_the_default(nulls: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path, "config.json", {"model_type": "vit"})
    write_json(tmp_path, "preprocessor_config.json", VIT_32 | nulls)
    check(tmp_path, beside(tmp_path, backend="pil"))


@pytest.mark.parametrize(
    ("written", "number"),
    [("bicubic", 3), ("BICUBIC", 3), ("bilinear", 2), ("lanczos", 1), ("nearest", 0), (2.0, 2), (3.0, 3)],
)
def test_filters_as_words_and_as_floating_point(written: object, number: int, tmp_path: Path) -> None:
    recipe = load(tmp_path, "ViTImageProcessor", VIT_32 | {"resample": written})
    assert recipe.key == load(tmp_path, "ViTImageProcessor", VIT_32 | {"resample": number}).key


@pytest.mark.parametrize("written", ["cubic", 2.5, float("nan"), True, [2], None])
def test_filters_without_meaning(written: object, tmp_path: Path) -> None:
    with pytest.raises(ItemFailure) as failure:
        load(tmp_path, "ViTImageProcessor", VIT_32 | {"resample": written})
    assert failure.value.reason is FailureReason.CORRUPT_CONFIG


@pytest.mark.parametrize(
    "settings",
    [
        {"resize_short": 128, "crop_size": 112},
        {"resize_short": None},
        {"resize_short": None, "do_center_crop": False},
    ],
)
def test_pp_lcnet_resizes_by_the_short_edge(settings: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path, "config.json", {"model_type": "pp_lcnet"})
    write_json(
        tmp_path, "preprocessor_config.json", {"image_processor_type": "PPLCNetImageProcessor"} | settings
    )
    check(tmp_path, beside(tmp_path), "pp_lcnet")


def test_settings_that_are_not_read_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path, "config.json", {"model_type": "dinov2"})
    dpt = {"image_processor_type": "DPTImageProcessor", "size": {"height": 40, "width": 40}}
    write_json(tmp_path, "preprocessor_config.json", dpt | {"ensure_multiple_of": 14})
    assert check(tmp_path, beside(tmp_path, backend="pil"), "dinov2").shape == (3, 42, 42)
    gemma = {"size": {"height": 40, "width": 40}, "pan_and_scan_min_crop_size": 99}
    with pytest.raises(ItemFailure, match="pan_and_scan_min_crop_size = 99") as failure:
        load(tmp_path, "Gemma3ImageProcessor", gemma)
    assert failure.value.reason is FailureReason.UNSUPPORTED

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
from hypothesis import given, settings
from hypothesis import strategies as st
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


def check_travels(recipe: Recipe) -> None:
    """Another process makes the same pixels, and the same input of the model from them."""
    copy = Recipe.from_json(recipe.to_json())
    assert copy == recipe == pickle.loads(pickle.dumps(recipe))
    assert copy.geometry_key == recipe.geometry_key
    images = [PICTURES["portrait"], PICTURES["grey"]]
    pixels = recipe.geometry(images)
    assert copy.geometry(images).tobytes() == pixels.tobytes()
    assert copy.normalise(torch.from_numpy(pixels)).equal(recipe.normalise(torch.from_numpy(pixels)))


@pytest.mark.parametrize(("name", "settings"), [(name, given) for name, given, _ in PROCESSORS])
def test_recipes_of_transformers_travel(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    check_travels(load(tmp_path, name, settings))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_recipes_of_defaults_travel(model_type: str, tmp_path: Path) -> None:
    recipe = transformers_recipe(tmp_path, model_type, 48, 2048)
    assert Recipe.from_json(recipe.to_json()) == recipe


NUMBERS = st.one_of(st.integers(-3, 3), st.floats(-1e300, 1e300), st.booleans())


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "input_size": st.tuples(st.sampled_from([1, 3]), st.integers(1, 40), st.integers(1, 40)),
            "crop_pct": st.one_of(st.just(1), st.floats(0.2, 4.5)),
            "interpolation": st.sampled_from(["random", "bilinear", "bicubic", "nearest", "lanczos"]),
            "crop_mode": st.sampled_from(["center", "squash", "border"]),
            "mean": st.one_of(NUMBERS, st.lists(NUMBERS, min_size=3, max_size=3)),
            "std": st.one_of(NUMBERS, st.lists(NUMBERS, min_size=3, max_size=3)),
        },
    )
)
def test_recipes_of_timm_travel(cfg: dict[str, Any]) -> None:
    try:
        recipe = timm_recipe(cfg, 2048)
    except ItemFailure:
        return
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_recipes_of_timm_make_the_same_pixels_elsewhere() -> None:
    for cfg in TIMM:
        check_travels(timm_recipe(cfg, 2048))


def test_what_is_no_finite_number_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ItemFailure, match="finite") as failure:
        timm_recipe({"std": [5e-324, 1, 1]}, 2048)
    assert failure.value.reason is FailureReason.CORRUPT_CONFIG
    with np.errstate(all="ignore"), pytest.raises(ItemFailure, match="finite"):
        load(tmp_path, "ViTImageProcessor", {"size": 32, "rescale_factor": 1e308})


# What another process says is a recipe

VIT = (
    '{"declared": true, "gain": [0.1, 0.2, 0.3], "input": [3, 32, 32], "library": "transformers", '
    '"offset": [-1.0, 0.0, 1.0], "processor": "ViTImageProcessorPil", "settings": {"do_resize": true, '
    '"image_mean": [0.5, 0.5, 0.5], "resample": 2, "size": {"height": 32, "width": 32}}, "square": false}'
)
BOTH = (VIT, timm_recipe({"input_size": [3, 32, 32]}, 2048).to_json())


def refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a recipe of preprocessing: ") as refusal:
        Recipe.from_json(text)
    assert type(refusal.value) is ValueError
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 1500


def test_the_examples_are_recipes() -> None:
    assert [Recipe.from_json(text).to_json() for text in BOTH] == list(BOTH)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"height": 32,', '"height": 32,  '),
        ('"declared": true', '"declared": 1'),
        ('"declared": true', '"declared": true, "declared": true'),
        ('"square": false', '"square": false, "_run": null'),
        ('"square": false', '"square": 0'),
        ("[3, 32, 32]", "[3, 4096, 32]"),
        ("[3, 32, 32]", "[1, 32, 32]"),
        ("[3, 32, 32]", "[3, 32, true]"),
        ("[3, 32, 32]", "[3, 32, 32.0]"),
        ("[3, 32, 32]", "[3, 0, 32]"),
        ("[3, 32, 32]", f"[3, {'9' * 400}, 32]"),
        ("[3, 32, 32]", "[3, 32]"),
        ("0.1, 0.2, 0.3", "0.1, 0.2"),
        ("0.1, 0.2, 0.3", "1, 0.2, 0.3"),
        ("0.1, 0.2, 0.3", "NaN, 0.2, 0.3"),
        ("0.1, 0.2, 0.3", "Infinity, 0.2, 0.3"),
        ("0.1, 0.2, 0.3", "1e999, 0.2, 0.3"),
        ("[0.1, 0.2, 0.3]", "null"),
        ("0.5, 0.5, 0.5", "NaN, 0.5, 0.5"),
        ("0.5, 0.5, 0.5", f"{'9' * 400}, 0.5, 0.5"),
        ("0.5, 0.5, 0.5", f"{'9' * 5000}, 0.5, 0.5"),
        ('"resample": 2', '"resample": 6'),
        ('"resample": 2', '"resample": 2, "rm": 1'),
        ('"resample": 2', '"resample": 2, "size_divisor": 1000000'),
        ('"do_resize": true', '"do_resize": "yes"'),
        ('{"height": 32, "width": 32}', '{"height": {"width": 32}, "width": 32}'),
        ('{"height": 32, "width": 32}', '{"height": 32, "path": 32}'),
        ('{"height": 32, "width": 32}', '{"height": 99999, "width": 32}'),
        ('{"height": 32, "width": 32}', "32"),
        ('"ViTImageProcessorPil"', '"os.system"'),
        ('"ViTImageProcessorPil"', '"X\\u001b]0;x\\u0007"'),
        ('"ViTImageProcessorPil"', f'"{"X" * 81}"'),
        ('"ViTImageProcessorPil"', '["ViTImageProcessorPil"]'),
        ('"library": "transformers"', '"library": "timm"'),
        ('"library": "transformers"', '"library": "pickle"'),
        ('"library": "transformers"', '"library": ["timm"]'),
    ],
)
def test_odd_recipes_are_refused(old: str, new: str) -> None:
    assert VIT.count(old) == 1
    refused(VIT.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"gain": [0.01', '"gain": [0.02'),
        ("timm.data.create_transform", "timm.data.create_loader"),
        ('"square": false', '"square": true'),
        ('"input": [3, 32', '"input": [3, 33'),
        ('"center"', '"random"'),
        ('"bilinear"', '"random"'),
        ('"crop_pct"', '"color_jitter": 1, "crop_pct"'),
        ('"crop_pct": 0.875', '"crop_pct": 0.0001'),
        ('"crop_pct": 0.875', '"crop_pct": 1'),
    ],
)
def test_odd_recipes_of_timm_are_refused(old: str, new: str) -> None:
    text = BOTH[1].replace('"bicubic"', '"bilinear"')
    assert Recipe.from_json(text).to_json() == text
    assert text.count(old) == 1
    refused(text.replace(old, new))


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", "3", "NaN", "[" * 15_000, '{"a":' * 3000, "[" * 10**6]
)
def test_what_is_no_recipe_at_all_is_refused(text: str) -> None:
    refused(text)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.integers(-(10**400), 10**400)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["height", "width", "x"]), inner, max_size=3),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(BOTH), st.data())
def test_a_changed_recipe_is_refused_or_one_that_could_have_been_written(
    text: str, data: st.DataObject
) -> None:
    facts = json.loads(text)
    where = facts
    while True:  # to any place in it
        key = data.draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
        if not (isinstance(where[key], dict | list) and where[key] and data.draw(st.booleans())):
            break
        where = where[key]
    where[key] = data.draw(VALUES)
    changed = json.dumps(facts, sort_keys=True)
    try:
        recipe = Recipe.from_json(changed)
    except ValueError:
        refused(changed)
    else:
        assert recipe.to_json() == changed
        assert max(recipe.shape) <= 2048
        assert len(recipe.geometry_key) == 64


@given(st.text())
def test_any_text_is_refused(text: str) -> None:
    refused(text)


def test_no_class_is_made_that_is_no_image_processor() -> None:
    for name in ("Trainer", "AutoImageProcessor", "BaseImageProcessorFast", "PreTrainedModel"):
        recipe = Recipe.from_json(VIT.replace("ViTImageProcessorPil", name))
        with pytest.raises(ItemFailure, match="no image processor") as failure:
            recipe.geometry([PICTURES["grey"]])
        assert failure.value.reason is FailureReason.UNSUPPORTED


def test_recipes_share_pixels_only_where_they_are_the_same(tmp_path: Path) -> None:
    """This processor pads with the mean: a part of the arithmetic of others is a part of its geometry."""
    made = [
        load(tmp_path, "DeepseekVLImageProcessor", {"size": 32, "image_mean": [mean] * 3})
        for mean in (0.1, 0.9)
    ]
    pixels = [recipe.geometry([PICTURES["landscape"]]) for recipe in made]
    assert (pixels[0] != pixels[1]).any()
    assert made[0].geometry_key != made[1].geometry_key
    # Neither does one that another process put together so.
    names = [
        VIT.replace("ViTImageProcessorPil", "DeepseekVLImageProcessorPil").replace("0.5", m)
        for m in ("0.1", "0.9")
    ]
    others = [Recipe.from_json(text) for text in names]
    assert others[0].geometry_key == others[1].geometry_key
    assert (others[0].geometry([PICTURES["landscape"]]) == others[1].geometry([PICTURES["landscape"]])).all()


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
    [("bicubic", 3), ("bilinear", 2), ("lanczos", 1), ("nearest", 0), ("BICUBIC", 2), (2.0, 2), (3.0, 2)],
)
def test_filters_as_words_and_as_floating_point(written: object, number: int, tmp_path: Path) -> None:
    write_json(tmp_path, "config.json", {"model_type": "vit"})
    recipe = load(tmp_path, "ViTImageProcessor", VIT_32 | {"resample": written})
    assert recipe.key == load(tmp_path, "ViTImageProcessor", VIT_32 | {"resample": number}).key
    if not (isinstance(written, str) and written.islower()):  # the Pillow backend alone runs these
        load(tmp_path, "ViTImageProcessor", VIT_32 | {"resample": written})
        assert check(tmp_path, beside(tmp_path, backend="pil")).key == recipe.key


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

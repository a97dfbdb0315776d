"""The image processors of transformers: which class a repository means, what its settings are, and how it is split.

Only the library's own classes are made, with settings that were checked one by one.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from probelog.errors import FailureReason, ItemFailure
from probelog.weights.repository import read_json, walk

#: How much larger than the model's input an image may be made on the way to it (before a crop).
MAX_ENLARGED = 4
CLASS_NAME = re.compile(r"[A-Za-z0-9_]{1,80}")
SIZES = ("size", "crop_size", "pad_size")
SETTINGS = (
    *SIZES, "do_resize", "resample", "do_center_crop", "do_pad", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "default_to_square", "crop_pct", "rescale_offset", "include_top",
    "do_flip_channel_order", "size_divisor", "do_thumbnail", "do_align_long_axis", "resize_short",
    "ensure_multiple_of", "keep_aspect_ratio",
)  # fmt: skip
# What does not change the pixels of one picture. Any other setting is refused unless it is the class's default.
_HARMLESS = frozenset({
    "do_convert_rgb", "data_format", "input_data_format", "device", "return_tensors", "disable_grouping",
    "image_seq_length", "do_reduce_labels", "ignore_index", "num_labels", "format", "do_convert_annotations",
})  # fmt: skip
# The words that the library's default backend takes for a filter, as Pillow's numbers.
_FILTERS = {
    "nearest": 0, "nearest-exact": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5,
}  # fmt: skip
NO_ARITHMETIC = {"do_rescale": False, "do_normalize": False, "include_top": False}
_NO_GEOMETRY = {"do_resize": False, "do_center_crop": False, "do_pad": False, "do_thumbnail": False}
ARITHMETIC_KEYS = (
    "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "rescale_offset", "include_top",
)  # fmt: skip


def central_square(image: Image.Image) -> Image.Image:
    """What is left of a picture without the ends of its longer side."""
    edge = min(image.size)
    left, top = (image.size[0] - edge) // 2, (image.size[1] - edge) // 2
    return image.crop((left, top, left + edge, top + edge))


def corrupt(detail: str) -> ItemFailure:
    """The failure of a configuration that cannot be meant."""
    return ItemFailure(FailureReason.CORRUPT_CONFIG, detail)


def check_edge(name: str, value: object, limit: int) -> None:
    """Refuse what is no number of pixels (CORRUPT_CONFIG), or above the limit (TOO_LARGE)."""
    if type(value) is not int or value <= 0:
        raise corrupt(f"{name} = {str(value)[:40]} is not a size in pixels")
    if value > limit:
        raise ItemFailure(FailureReason.TOO_LARGE, f"{name} = {value} pixels; the limit is {limit}")


def numbers(name: str, value: object, count: int) -> tuple[float, ...]:
    """So many finite numbers, of a list or of one number for all; CORRUPT_CONFIG otherwise."""
    items: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if len(items) == 1:
        items = items * count
    if len(items) != count or not all(isinstance(i, int | float) and math.isfinite(i) for i in items):
        raise corrupt(f"{name} = {str(value)[:60]} is not {count} numbers")
    return tuple(float(item) for item in items)


def declared_processor(folder: Path) -> dict[str, Any] | None:
    """The processor's settings: nested in the newer file, or else the older file (as the library reads them)."""
    nested = (read_json(folder, "processor_config.json", 1 << 20) or {}).get("image_processor")
    if nested is None:
        return read_json(folder, "preprocessor_config.json", 1 << 20)
    if not isinstance(nested, dict):
        raise corrupt("image_processor in processor_config.json is not an object")
    return nested


def processor_class(declared: Mapping[str, Any] | None, model_type: str) -> str:
    """The name of a processor class of the library: the PIL backend's where there is one."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    known = _processor_classes()
    default = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type, {})
    default_name = default.get("pil") or default.get("torchvision")
    name: object = default_name
    if declared is not None:
        name = declared.get("image_processor_type") or declared.get("feature_extractor_type") or default_name
        if not isinstance(name, str) or not CLASS_NAME.fullmatch(name):
            raise corrupt("the image processor's configuration names no class")
        name = name.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
        name = f"{name}Pil" if f"{name}Pil" in known else name
    if name is None or name not in known:
        raise ItemFailure(
            FailureReason.UNSUPPORTED,
            f"no image processor of transformers for {model_type}: {str(name)[:80]}",
        )
    return str(name)


@functools.cache
def _processor_classes() -> frozenset[str]:
    """The names of the library's own."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    return frozenset(
        name for backends in IMAGE_PROCESSOR_MAPPING_NAMES.values() for name in backends.values() if name
    )


def resampling_filter(value: object) -> object:
    """A resampling filter as Pillow's number, where it is written as a word or as 2.0.

    The library's default backend takes a word for the filter that it names. It refuses upper case and floating point;
    the Pillow backend runs them, and takes all that is no whole number for bilinear.
    """
    if isinstance(value, str):
        known = value.lower() in _FILTERS
        return _FILTERS.get(value, _FILTERS["bilinear"] if known else value)
    return _FILTERS["bilinear"] if isinstance(value, float) and value.is_integer() else value


def check_other_settings(name: str, declared: Mapping[str, Any]) -> None:
    """Refuse settings that the class would follow and that are not read here, unless they change nothing."""
    from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

    made = get_image_processor_class_from_name(name)
    others = (
        set(getattr(getattr(made, "valid_kwargs", None), "__annotations__", {})) - _HARMLESS - set(SETTINGS)
    )
    for key in sorted(others & declared.keys()):
        if declared[key] != getattr(made, key, None):
            raise ItemFailure(FailureReason.UNSUPPORTED, f"{name} with {key} = {str(declared[key])[:60]}")


def check_settings(settings: Mapping[str, Any], max_size: int) -> None:
    """Refuse settings of types or sizes that no processor has; edges are at most ``max_size`` pixels."""
    for key, value in settings.items():
        if value is not None:
            _CHECKS.get(key, _check_switch)(key, value, max_size)


def _check_sizes(key: str, value: object, max_size: int) -> None:
    if isinstance(value, dict) and any(isinstance(edge, dict | list) for edge in value.values()):
        raise corrupt(f"{key} = {str(value)[:60]} is not made of edges")
    for name, edge in walk(value, key):
        if edge is not None:
            check_edge(name, edge, max_size * (MAX_ENLARGED if name == "longest_edge" else 1))


def _check_channels(key: str, value: object, _: int) -> None:
    if min(map(abs, numbers(key, value, 3))) == 0 and key == "image_std":
        raise corrupt(f"{key} = {value}")


def _check_number(key: str, value: object, _: int) -> None:
    numbers(key, value, 1)


def _check_crop(key: str, value: object, _: int) -> None:
    if not 1 / MAX_ENLARGED <= numbers(key, value, 1)[0] <= MAX_ENLARGED:
        raise corrupt(f"{key} = {value}")


def _check_filter(key: str, value: object, _: int) -> None:
    if type(value) is not int or not 0 <= value <= max(_FILTERS.values()):
        raise corrupt(f"{key} = {str(value)[:40]}")


def _check_switch(key: str, value: object, _: int) -> None:
    if not isinstance(value, bool):
        raise corrupt(f"{key} = {str(value)[:40]} is neither true nor false")


_CHECKS: dict[str, Callable[[str, object, int], None]] = {
    **dict.fromkeys(SIZES, _check_sizes),
    **dict.fromkeys(("image_mean", "image_std"), _check_channels),
    **dict.fromkeys(("size_divisor", "resize_short", "ensure_multiple_of"), check_edge),
    "rescale_factor": _check_number,
    "crop_pct": _check_crop,
    "resample": _check_filter,
}


def settings_for_size(name: str, image_size: int) -> dict[str, Any]:
    """Settings with which a class makes pictures of the model's own size, where its defaults make others."""
    text = settings_in_effect(name, "{}")
    if split_processor(name, text)[0][1:] == (image_size, image_size):
        return {}  # the default fits; its own relation of resize to crop stays
    defaults = json.loads(text)
    return {
        key: dict.fromkeys(defaults[key], image_size)
        for key in ("size", "crop_size")
        if isinstance(defaults.get(key), dict)
    }


def settings_in_effect(name: str, settings: str) -> str:
    """The settings that a processor really has, with the class's own defaults filled in, as canonical JSON."""
    made = _make_processor(name, json.loads(settings))
    found_settings: dict[str, Any] = {}
    for key in SETTINGS:
        value: Any = getattr(made, key, None)
        if value is None:
            if getattr(type(made), key, None) is not None:
                found_settings[key] = None  # in place of the class's default
            continue
        if key in SIZES:
            value = {edge: pixels for edge, pixels in dict(value).items() if pixels is not None}
        found_settings[key] = int(value) if key == "resample" else value
    try:
        return json.dumps(found_settings, sort_keys=True)
    except TypeError:
        raise ItemFailure(
            FailureReason.UNSUPPORTED, f"{name} has settings that are not plain values"
        ) from None


def _make_processor(name: str, settings: Mapping[str, Any]) -> Callable[..., Mapping[str, Any]]:
    from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

    if name not in _processor_classes():  # the library would look among all of its classes
        raise ItemFailure(FailureReason.UNSUPPORTED, f"no image processor of transformers: {name[:80]}")
    made = get_image_processor_class_from_name(name)
    known = getattr(getattr(made, "valid_kwargs", None), "__annotations__", {})
    try:
        made_processor: Callable[..., Mapping[str, Any]] = made(
            **{key: value for key, value in settings.items() if key in known}
        )
        return made_processor
    except Exception as error:  # a library's constructor given untrusted values raises anything
        raise corrupt(f"{name} cannot be made: {str(error)[:300]}") from error


def processor(name: str, settings: Mapping[str, Any]) -> Callable[[Image.Image], npt.NDArray[Any]]:
    """The library's own processor of these settings: a picture to (3, height, width)."""
    made = _make_processor(name, settings)

    def run(image: Image.Image) -> npt.NDArray[Any]:
        try:
            # One at a time: some processors pad to the largest of a batch.
            return np.asarray(made(images=image, return_tensors="np")["pixel_values"][0])
        except Exception as error:  # settings that contradict each other only show on an image
            raise corrupt(f"{name} fails on an image: {str(error)[:300]}") from error

    return run


@functools.lru_cache(maxsize=64)
def split_processor(
    name: str, settings: str
) -> tuple[tuple[int, int, int], tuple[float, ...] | None, tuple[float, ...] | None, bool]:
    """Output shape, gain and offset (None where the processor must run whole), and whether to crop to a square."""
    given = json.loads(settings)
    whole = processor(name, given)
    images = _trial_images()
    square = False
    expected = [whole(image) for image in images]
    if len({item.shape for item in expected}) > 1:
        square = True
        images = [central_square(image) for image in images]
        expected = [whole(image) for image in images]
        if len({item.shape for item in expected}) > 1:
            raise ItemFailure(FailureReason.UNSUPPORTED, f"{name} gives every image another size")
    if expected[0].ndim != 3:
        raise ItemFailure(
            FailureReason.UNSUPPORTED, f"{name} gives {expected[0].ndim} dimensions, no picture"
        )
    shape = expected[0].shape
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), (16, 16, 3))
    try:
        grey = processor(name, given | _NO_GEOMETRY)(Image.fromarray(ramp.copy())).astype(np.float64)
        bare = {key: value for key, value in given.items() if key not in ARITHMETIC_KEYS} | NO_ARITHMETIC
        pixels = [processor(name, bare)(image) for image in images]
    except ItemFailure:
        return shape, None, None, square
    if grey.shape != (3, 16, 16) or any(item.dtype != np.uint8 or item.shape != shape for item in pixels):
        return shape, None, None, square
    table = grey.reshape(3, 256)
    offset, gain = table[:, 0], (table[:, 255] - table[:, 0]) / 255
    tolerance = 2e-6 * max(1.0, float(np.abs(table).max()))
    for item, reference in zip(pixels, expected, strict=True):
        with np.errstate(invalid="ignore"):  # a gain that is not finite makes no recipe
            made = item * gain[:, None, None] + offset[:, None, None]
        if np.abs(made - reference).max() > tolerance:
            return shape, None, None, square
    return shape, tuple(gain.tolist()), tuple(offset.tolist()), square


def _trial_images() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    sizes = [(97, 61), (61, 97), (240, 320), (16, 16)]
    return [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]

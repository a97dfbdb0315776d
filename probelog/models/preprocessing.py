"""A model's own preprocessing, split in two: geometry on the CPU (uint8, cacheable), arithmetic on the device.

Models of different repositories often share the geometry (resize to 256, crop 224) and differ in mean and
standard deviation. Geometry is the costly part: a node computes it once per geometry and caches it as uint8; the
rest is one multiplication and one addition per pixel, which the device does.

Both parts are the library's own code or derived from it. For transformers the geometry is the model's processor
with rescaling and normalisation switched off, and the arithmetic is *measured*: all 256 grey values are sent
through the processor with its geometry switched off. The split is then tried against the whole processor on a few
images; where it does not give the same numbers (padding after normalisation, say), the processor runs whole.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from probelog.encoders.decoding import upright
from probelog.errors import FailureReason, ItemFailure
from probelog.models.config import LoadLimits
from probelog.storage.encoding import digest, short_key
from probelog.weights.repository import read_json, walk

if TYPE_CHECKING:
    import torch

#: How much larger than the model's input an image may be made on the way to it (before a crop).
_MAX_ENLARGED = 4
_MAX_ASPECT = 64
#: Characters of the longest recipe; usual ones have less than a thousand.
_MAX_JSON = 20_000

_CLASS_NAME = re.compile(r"[A-Za-z0-9_]{1,80}")
_SIZES = ("size", "crop_size", "pad_size")
_EDGES = frozenset({
    "height", "width", "shortest_edge", "longest_edge", "max_height", "max_width", "min_pixels", "max_pixels",
})  # fmt: skip
_SETTINGS = (
    *_SIZES, "do_resize", "resample", "do_center_crop", "do_pad", "do_rescale", "rescale_factor", "do_normalize",
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
_NO_ARITHMETIC = {"do_rescale": False, "do_normalize": False, "include_top": False}
_NO_GEOMETRY = {"do_resize": False, "do_center_crop": False, "do_pad": False, "do_thumbnail": False}
_ARITHMETIC_KEYS = (
    "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "rescale_offset", "include_top",
)  # fmt: skip
_RECIPE_KEYS = frozenset({
    "library", "processor", "settings", "declared", "input", "gain", "offset", "square",
})  # fmt: skip
_TIMM_KEYS = frozenset({"input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"})
_TIMM_FILTERS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_TIMM_CROPS = ("center", "squash", "border")


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture as every model is to see it: turned as its EXIF tag says, and RGB.

    The same steps, in the same order, as ``transformers.image_utils.load_image``. Strips more than 64 times as
    long as wide lose their ends: resized by their short edge they would take gigabytes.
    """
    image = upright(image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    width, height = image.size
    longest = _MAX_ASPECT * min(width, height)
    if max(width, height) > longest:
        left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
        image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
    return image


@dataclass(frozen=True)
class Recipe:
    """How images become a model's input.

    ``settings`` is a JSON object with everything the geometry and the arithmetic depend on. ``declared`` says
    whether the repository stated it; otherwise it is the default of the model type. ``gain`` and ``offset`` (one
    number a channel) make the float input from the uint8 geometry: ``x * gain + offset``; both are None where the
    processor cannot be split and `geometry` gives the finished float32. ``square``: images are first cropped to
    their central square, because the processor would give every image another size and a batch needs one.
    """

    library: str
    processor: str
    settings: str
    declared: bool
    channels: int
    height: int
    width: int
    gain: tuple[float, ...] | None
    offset: tuple[float, ...] | None
    square: bool = False
    _run: Callable[[Image.Image], npt.NDArray[Any]] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (*(self.gain or ()), *(self.offset or ())))):
            raise _corrupt(f"{self.processor} makes pixels that are not finite numbers")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}  # the library's objects are made again where they are needed

    @property
    def dtype(self) -> str:
        """What `geometry` gives: uint8, or float32 where the processor runs whole."""
        return "float32" if self.gain is None else "uint8"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        return self.channels, self.height, self.width

    @property
    def key(self) -> str:
        """A stable 16-digit hash of the whole recipe."""
        return short_key(self.to_json())

    @property
    def geometry_key(self) -> str:
        """A stable hash of all that `geometry` depends on: equal for recipes that may share cached pixels.

        Of full length: who can choose a recipe must not be able to find one that takes another one's pixels' place.
        """
        parts = [
            self.library,
            self.processor,
            self._geometry_settings(),
            *self.shape,
            self.square,
            self.dtype,
        ]
        return digest(json.dumps(parts).encode())

    def to_json(self) -> str:
        """The recipe for the record, as canonical JSON."""
        facts = {
            "library": self.library,
            "processor": self.processor,
            "settings": json.loads(self.settings),
            "declared": self.declared,
            "input": list(self.shape),
            "gain": self.gain,
            "offset": self.offset,
            "square": self.square,
        }
        return json.dumps(facts, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, max_size: int = LoadLimits().max_image_size) -> Recipe:
        """What ``to_json`` wrote, checked as what an untrusted process says: every value is one that
        `timm_recipe` or `transformers_recipe` would have let pass, and the text is the canonical one.

        No library is loaded for it. Whether transformers has such a processor shows before `geometry` first
        uses it; whether ``gain`` and ``offset`` are the processor's own is not checked: no pixel depends on them.

        Raises:
            ValueError: anything else, in one line.
        """
        try:
            recipe = _recipe_of(text, max_size)
        except (ItemFailure, ValueError, OverflowError, RecursionError) as error:
            detail = str(error)[:200].encode("unicode_escape").decode()
            raise ValueError(f"not a recipe of preprocessing: {detail}") from None
        return recipe

    def geometry(self, images: Sequence[Image.Image]) -> npt.NDArray[Any]:
        """Images of any size and mode as (n, C, H, W) uint8, or float32 where the processor runs whole.

        Raises:
            ItemFailure: UNSUPPORTED where an image does not come out at the recipe's size.
        """
        batch = np.empty((len(images), *self.shape), self.dtype)
        for row, image in zip(batch, images, strict=True):
            row[:] = self._one(as_rgb(image))
        return batch

    def normalise(self, batch: torch.Tensor) -> torch.Tensor:
        """What the model takes, (n, C, H, W) float32 on the batch's device, from a tensor of `geometry`."""
        import torch

        if self.gain is None or self.offset is None:
            return batch.float()
        gain = torch.tensor(self.gain, dtype=torch.float32, device=batch.device).view(1, -1, 1, 1)
        offset = torch.tensor(self.offset, dtype=torch.float32, device=batch.device).view(1, -1, 1, 1)
        # In place, and in two steps: twice as fast as torch.addcmul, and memory new to a process costs more.
        values = batch.to(torch.float32, copy=True)
        return values.mul_(gain).add_(offset)

    def _one(self, image: Image.Image) -> npt.NDArray[Any]:
        if self._run is None:
            object.__setattr__(self, "_run", self._make())
        assert self._run is not None
        pixels = self._run(_central_square(image) if self.square else image)
        if pixels.shape != self.shape:
            raise ItemFailure(
                FailureReason.UNSUPPORTED,
                f"{self.processor} makes {list(pixels.shape)} of an image of {image.size[0]}x{image.size[1]}, "
                f"not {list(self.shape)}",
            )
        return pixels

    def _make(self) -> Callable[[Image.Image], npt.NDArray[Any]]:
        # Only what `geometry_key` covers: the same pixels from whichever recipe they are made for.
        settings = json.loads(self._geometry_settings())
        if self.library == "timm":
            return _timm_geometry(settings)
        return _processor(self.processor, settings | (_NO_ARITHMETIC if self.gain is not None else {}))

    def _geometry_settings(self) -> str:
        settings = json.loads(self.settings)
        if self.gain is None:
            return self.settings
        unused: tuple[str, ...] = _ARITHMETIC_KEYS
        if self.library == "timm":
            unused = (
                ("std",) if settings["crop_mode"] == "border" else ("mean", "std")
            )  # borders take the mean
        return json.dumps(
            {key: value for key, value in settings.items() if key not in unused}, sort_keys=True
        )


def _recipe_of(text: str, max_size: int) -> Recipe:
    """See `Recipe.from_json`."""
    if len(text) > _MAX_JSON:
        raise ValueError(f"{len(text)} characters")
    facts = json.loads(text)
    if not isinstance(facts, dict) or facts.keys() != _RECIPE_KEYS:
        raise ValueError("other keys than a recipe's")
    settings, declared = facts["settings"], facts["declared"]
    if not isinstance(settings, dict) or not isinstance(declared, bool):
        raise ValueError("settings or declared of another type")
    if facts["library"] == "timm":
        if settings.keys() != _TIMM_KEYS:
            raise ValueError("other settings than timm's")
        recipe = _timm_recipe(_timm_settings(settings, max_size), declared)
    else:
        recipe = _transformers_recipe_of(facts, max_size)
    if recipe.to_json() != text:
        raise ValueError("not as a recipe is written")
    return recipe


def _transformers_recipe_of(facts: Mapping[str, Any], max_size: int) -> Recipe:
    name, settings, square = facts["processor"], facts["settings"], facts["square"]
    if not isinstance(name, str) or not _CLASS_NAME.fullmatch(name) or not isinstance(square, bool):
        raise ValueError("processor or square of another type")
    if not settings.keys() <= set(_SETTINGS):
        raise ValueError("other settings than a processor's")
    for key in _SIZES:
        if (size := settings.get(key)) is not None and not (
            isinstance(size, dict)
            and size.keys() <= _EDGES
            and {type(edge) for edge in size.values()} <= {int}
        ):
            raise ValueError(f"{key} is not made of edges")
    _check_settings(settings, max_size)
    shape = facts["input"]
    if not isinstance(shape, list) or len(shape) != 3 or shape[0] != 3:
        raise ValueError("input is not RGB")
    for edge in shape:
        _check_edge("input", edge, max_size)
    gain, offset = (_channel_numbers(key, facts[key]) for key in ("gain", "offset"))
    if (gain is None) is not (offset is None):
        raise ValueError("gain without offset or offset without gain")
    text = json.dumps(settings, sort_keys=True)
    channels, height, width = shape
    return Recipe(
        "transformers", name, text, facts["declared"], channels, height, width, gain, offset, square
    )


def _channel_numbers(name: str, value: object) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or [type(item) for item in value] != [float] * 3:
        raise ValueError(f"{name} is not a number a channel")
    return tuple(value)


def _central_square(image: Image.Image) -> Image.Image:
    edge = min(image.size)
    left, top = (image.size[0] - edge) // 2, (image.size[1] - edge) // 2
    return image.crop((left, top, left + edge, top + edge))


def _corrupt(detail: str) -> ItemFailure:
    return ItemFailure(FailureReason.CORRUPT_CONFIG, detail)


def _check_edge(name: str, value: object, limit: int) -> None:
    if type(value) is not int or value <= 0:
        raise _corrupt(f"{name} = {str(value)[:40]} is not a size in pixels")
    if value > limit:
        raise ItemFailure(FailureReason.TOO_LARGE, f"{name} = {value} pixels; the limit is {limit}")


def _numbers(name: str, value: object, count: int) -> tuple[float, ...]:
    items: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if len(items) == 1:
        items = items * count
    if len(items) != count or not all(isinstance(i, int | float) and math.isfinite(i) for i in items):
        raise _corrupt(f"{name} = {str(value)[:60]} is not {count} numbers")
    return tuple(float(item) for item in items)


# timm


def timm_recipe(pretrained_cfg: Mapping[str, Any], max_size: int) -> Recipe:
    """The evaluation transform of ``timm.data.create_transform`` for a ``pretrained_cfg``.

    Raises:
        ItemFailure: CORRUPT_CONFIG for values without meaning, TOO_LARGE for sizes above ``max_size`` pixels,
            UNSUPPORTED for inputs that are neither RGB nor grey.
    """
    from timm.data import resolve_data_config

    data: dict[str, Any] = resolve_data_config(
        pretrained_cfg=dict(pretrained_cfg) or {"input_size": (3, 224, 224)}
    )
    declared = "input_size" in pretrained_cfg
    if data["interpolation"] == "random":
        data["interpolation"] = "bilinear"
    return _timm_recipe(_timm_settings(data, max_size), declared)


def _timm_settings(data: Mapping[str, Any], max_size: int) -> dict[str, Any]:
    """The settings that the transform depends on, checked."""
    size = data["input_size"]
    if not isinstance(size, list | tuple) or len(size) != 3:
        raise _corrupt(f"input_size = {str(size)[:60]} is not channels, height and width")
    channels = size[0]
    if channels not in (1, 3) or type(channels) is not int:
        raise ItemFailure(
            FailureReason.UNSUPPORTED, f"the model takes {str(channels)[:20]} channels, not RGB or grey"
        )
    for name, edge in zip(("height", "width"), size[1:], strict=True):
        _check_edge(f"input {name}", edge, max_size)
    (crop_pct,) = _numbers("crop_pct", data["crop_pct"], 1)
    if not 1 / _MAX_ENLARGED <= crop_pct <= _MAX_ENLARGED:
        raise _corrupt(f"crop_pct = {crop_pct}")
    mean, std = _numbers("mean", data["mean"], channels), _numbers("std", data["std"], channels)
    if min(std) <= 0:
        raise _corrupt(f"std = {std}")
    for name, known in (("interpolation", _TIMM_FILTERS), ("crop_mode", _TIMM_CROPS)):
        if data[name] not in known:
            raise _corrupt(f"{name} = {str(data[name])[:40]!r}")
    return {
        "input_size": [channels, *size[1:]],
        "interpolation": data["interpolation"],
        "crop_pct": crop_pct,
        "crop_mode": data["crop_mode"],
        "mean": mean,
        "std": std,
    }


def _timm_recipe(settings: Mapping[str, Any], declared: bool) -> Recipe:
    mean, std = settings["mean"], settings["std"]
    channels, height, width = settings["input_size"]
    return Recipe(
        library="timm",
        processor="timm.data.create_transform",
        settings=json.dumps(settings, sort_keys=True),
        declared=declared,
        channels=channels,
        height=height,
        width=width,
        gain=tuple(1 / (255 * s) for s in std),
        offset=tuple(-m / s for m, s in zip(mean, std, strict=True)),
    )


def _timm_geometry(settings: Mapping[str, Any]) -> Callable[[Image.Image], npt.NDArray[Any]]:
    from timm.data import create_transform

    transform = create_transform(**settings, is_training=False, normalize=False)
    mode = "L" if settings["input_size"][0] == 1 else "RGB"
    return lambda image: np.asarray(transform(image.convert(mode)).numpy())


# transformers


def transformers_recipe(folder: Path, model_type: str, image_size: int | None, max_size: int) -> Recipe:
    """The image processor that a repository declares, or the default one of its model type.

    The PIL backend is pinned where the class has one: it is the one that published results were made with, and the
    torchvision backend resamples differently. Where nothing is declared, the default takes the model's own
    ``image_size``.

    Raises:
        ItemFailure: UNSUPPORTED for a class that is not the library's own and for outputs that are no picture,
            CORRUPT_CONFIG, TOO_LARGE for sizes above ``max_size`` pixels.
    """
    declared = _declared_processor(folder)
    name = _processor_class(declared, model_type)
    # A null is a setting too: the library takes it in place of the class's default.
    settings = {key: declared[key] for key in _SETTINGS if declared and key in declared}
    if "resample" in settings:
        settings["resample"] = _filter(settings["resample"])
    _check_settings(settings, max_size)
    _check_others(name, declared or {})
    if declared is None and image_size is not None:
        _check_edge("image_size", image_size, max_size)
        settings = _sized_for(name, image_size)
    text = _effective(name, json.dumps(settings, sort_keys=True))
    _check_settings(json.loads(text), max_size)
    shape, gain, offset, square = _split(name, text)
    if shape[0] != 3 or max(shape[1:]) > max_size:
        raise ItemFailure(
            FailureReason.UNSUPPORTED, f"{name} gives {list(shape)}, no RGB picture within {max_size}"
        )
    return Recipe("transformers", name, text, declared is not None, *shape, gain, offset, square)


def _declared_processor(folder: Path) -> dict[str, Any] | None:
    """The processor's settings: nested in the newer file, or else the older file (as the library reads them)."""
    nested = (read_json(folder, "processor_config.json", 1 << 20) or {}).get("image_processor")
    if nested is None:
        return read_json(folder, "preprocessor_config.json", 1 << 20)
    if not isinstance(nested, dict):
        raise _corrupt("image_processor in processor_config.json is not an object")
    return nested


def _processor_class(declared: Mapping[str, Any] | None, model_type: str) -> str:
    """The name of a processor class of the library: the PIL backend's where there is one."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    known = _processor_classes()
    default = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type, {})
    default_name = default.get("pil") or default.get("torchvision")
    name: object = default_name
    if declared is not None:
        name = declared.get("image_processor_type") or declared.get("feature_extractor_type") or default_name
        if not isinstance(name, str) or not _CLASS_NAME.fullmatch(name):
            raise _corrupt("the image processor's configuration names no class")
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


def _filter(value: object) -> object:
    """A resampling filter as Pillow's number, where it is written as a word or as 2.0."""
    if isinstance(value, str):
        return _FILTERS.get(value.lower(), value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_others(name: str, declared: Mapping[str, Any]) -> None:
    """Refuse settings that the class would follow and that are not read here, unless they change nothing."""
    from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

    made = get_image_processor_class_from_name(name)
    others = (
        set(getattr(getattr(made, "valid_kwargs", None), "__annotations__", {})) - _HARMLESS - set(_SETTINGS)
    )
    for key in sorted(others & declared.keys()):
        if declared[key] != getattr(made, key, None):
            raise ItemFailure(FailureReason.UNSUPPORTED, f"{name} with {key} = {str(declared[key])[:60]}")


def _check_settings(settings: Mapping[str, Any], max_size: int) -> None:
    for key, value in settings.items():
        if value is not None:
            _CHECKS.get(key, _check_switch)(key, value, max_size)


def _check_sizes(key: str, value: object, max_size: int) -> None:
    if isinstance(value, dict) and any(isinstance(edge, dict | list) for edge in value.values()):
        raise _corrupt(f"{key} = {str(value)[:60]} is not made of edges")
    for name, edge in walk(value, key):
        if edge is not None:
            _check_edge(name, edge, max_size * (_MAX_ENLARGED if name == "longest_edge" else 1))


def _check_channels(key: str, value: object, _: int) -> None:
    if min(map(abs, _numbers(key, value, 3))) == 0 and key == "image_std":
        raise _corrupt(f"{key} = {value}")


def _check_number(key: str, value: object, _: int) -> None:
    _numbers(key, value, 1)


def _check_crop(key: str, value: object, _: int) -> None:
    if not 1 / _MAX_ENLARGED <= _numbers(key, value, 1)[0] <= _MAX_ENLARGED:
        raise _corrupt(f"{key} = {value}")


def _check_filter(key: str, value: object, _: int) -> None:
    if type(value) is not int or not 0 <= value <= max(_FILTERS.values()):
        raise _corrupt(f"{key} = {str(value)[:40]}")


def _check_switch(key: str, value: object, _: int) -> None:
    if not isinstance(value, bool):
        raise _corrupt(f"{key} = {str(value)[:40]} is neither true nor false")


_CHECKS: dict[str, Callable[[str, object, int], None]] = {
    **dict.fromkeys(_SIZES, _check_sizes),
    **dict.fromkeys(("image_mean", "image_std"), _check_channels),
    **dict.fromkeys(("size_divisor", "resize_short", "ensure_multiple_of"), _check_edge),
    "rescale_factor": _check_number,
    "crop_pct": _check_crop,
    "resample": _check_filter,
}


def _sized_for(name: str, image_size: int) -> dict[str, Any]:
    text = _effective(name, "{}")
    if _split(name, text)[0][1:] == (image_size, image_size):
        return {}  # the default fits; its own relation of resize to crop stays
    defaults = json.loads(text)
    return {
        key: dict.fromkeys(defaults[key], image_size)
        for key in ("size", "crop_size")
        if isinstance(defaults.get(key), dict)
    }


def _effective(name: str, settings: str) -> str:
    """The settings that a processor really has, with the class's own defaults filled in, as canonical JSON."""
    made = _make_processor(name, json.loads(settings))
    settings_in_effect: dict[str, Any] = {}
    for key in _SETTINGS:
        value: Any = getattr(made, key, None)
        if value is None:
            if getattr(type(made), key, None) is not None:
                settings_in_effect[key] = None  # in place of the class's default
            continue
        if key in _SIZES:
            value = {edge: pixels for edge, pixels in dict(value).items() if pixels is not None}
        settings_in_effect[key] = int(value) if key == "resample" else value
    try:
        return json.dumps(settings_in_effect, sort_keys=True)
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
        processor: Callable[..., Mapping[str, Any]] = made(
            **{key: value for key, value in settings.items() if key in known}
        )
        return processor
    except Exception as error:  # a library's constructor given untrusted values raises anything
        raise _corrupt(f"{name} cannot be made: {str(error)[:300]}") from error


def _processor(name: str, settings: Mapping[str, Any]) -> Callable[[Image.Image], npt.NDArray[Any]]:
    made = _make_processor(name, settings)

    def run(image: Image.Image) -> npt.NDArray[Any]:
        try:
            # One at a time: some processors pad to the largest of a batch.
            return np.asarray(made(images=image, return_tensors="np")["pixel_values"][0])
        except Exception as error:  # settings that contradict each other only show on an image
            raise _corrupt(f"{name} fails on an image: {str(error)[:300]}") from error

    return run


@functools.lru_cache(maxsize=64)
def _split(
    name: str, settings: str
) -> tuple[tuple[int, int, int], tuple[float, ...] | None, tuple[float, ...] | None, bool]:
    """Output shape, gain and offset (None where the processor must run whole), and whether to crop to a square."""
    given = json.loads(settings)
    whole = _processor(name, given)
    images = _trial_images()
    square = False
    expected = [whole(image) for image in images]
    if len({item.shape for item in expected}) > 1:
        square = True
        images = [_central_square(image) for image in images]
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
        grey = _processor(name, given | _NO_GEOMETRY)(Image.fromarray(ramp.copy())).astype(np.float64)
        bare = {key: value for key, value in given.items() if key not in _ARITHMETIC_KEYS} | _NO_ARITHMETIC
        pixels = [_processor(name, bare)(image) for image in images]
    except ItemFailure:
        return shape, None, None, square
    if grey.shape != (3, 16, 16) or any(item.dtype != np.uint8 or item.shape != shape for item in pixels):
        return shape, None, None, square
    table = grey.reshape(3, 256)
    offset, gain = table[:, 0], (table[:, 255] - table[:, 0]) / 255
    tolerance = 2e-6 * max(1.0, float(np.abs(table).max()))
    for item, reference in zip(pixels, expected, strict=True):
        made = item * gain[:, None, None] + offset[:, None, None]
        if np.abs(made - reference).max() > tolerance:
            return shape, None, None, square
    return shape, tuple(gain.tolist()), tuple(offset.tolist()), square


def _trial_images() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    sizes = [(97, 61), (61, 97), (240, 320), (16, 16)]
    return [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]

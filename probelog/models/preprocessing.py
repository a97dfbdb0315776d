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

import json
import math
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
from probelog.models.processors import (
    ARITHMETIC_KEYS,
    CLASS_NAME,
    MAX_ENLARGED,
    NO_ARITHMETIC,
    SETTINGS,
    SIZES,
    central_square,
    check_edge,
    check_other_settings,
    check_settings,
    corrupt,
    declared_processor,
    numbers,
    processor,
    processor_class,
    resampling_filter,
    settings_for_size,
    settings_in_effect,
    split_processor,
)
from probelog.storage.encoding import digest, short_key

if TYPE_CHECKING:
    import torch

_MAX_ASPECT = 64
#: Characters of the longest recipe; usual ones have less than a thousand.
_MAX_JSON = 20_000

_EDGES = frozenset({
    "height", "width", "shortest_edge", "longest_edge", "max_height", "max_width", "min_pixels", "max_pixels",
})  # fmt: skip
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
            raise corrupt(f"{self.processor} makes pixels that are not finite numbers")

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
        pixels = self._run(central_square(image) if self.square else image)
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
        return processor(self.processor, settings | (NO_ARITHMETIC if self.gain is not None else {}))

    def _geometry_settings(self) -> str:
        settings = json.loads(self.settings)
        if self.gain is None:
            return self.settings
        unused: tuple[str, ...] = ARITHMETIC_KEYS
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
    if not isinstance(name, str) or not CLASS_NAME.fullmatch(name) or not isinstance(square, bool):
        raise ValueError("processor or square of another type")
    if not settings.keys() <= set(SETTINGS):
        raise ValueError("other settings than a processor's")
    for key in SIZES:
        if (size := settings.get(key)) is not None and not (
            isinstance(size, dict)
            and size.keys() <= _EDGES
            and {type(edge) for edge in size.values()} <= {int}
        ):
            raise ValueError(f"{key} is not made of edges")
    check_settings(settings, max_size)
    shape = facts["input"]
    if not isinstance(shape, list) or len(shape) != 3 or shape[0] != 3:
        raise ValueError("input is not RGB")
    for edge in shape:
        check_edge("input", edge, max_size)
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
        raise corrupt(f"input_size = {str(size)[:60]} is not channels, height and width")
    channels = size[0]
    if channels not in (1, 3) or type(channels) is not int:
        raise ItemFailure(
            FailureReason.UNSUPPORTED, f"the model takes {str(channels)[:20]} channels, not RGB or grey"
        )
    for name, edge in zip(("height", "width"), size[1:], strict=True):
        check_edge(f"input {name}", edge, max_size)
    (crop_pct,) = numbers("crop_pct", data["crop_pct"], 1)
    if not 1 / MAX_ENLARGED <= crop_pct <= MAX_ENLARGED:
        raise corrupt(f"crop_pct = {crop_pct}")
    mean, std = numbers("mean", data["mean"], channels), numbers("std", data["std"], channels)
    if min(std) <= 0:
        raise corrupt(f"std = {std}")
    for name, known in (("interpolation", _TIMM_FILTERS), ("crop_mode", _TIMM_CROPS)):
        if data[name] not in known:
            raise corrupt(f"{name} = {str(data[name])[:40]!r}")
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
    declared = declared_processor(folder)
    name = processor_class(declared, model_type)
    # A null is a setting too: the library takes it in place of the class's default.
    settings = {key: declared[key] for key in SETTINGS if declared and key in declared}
    if "resample" in settings:
        settings["resample"] = resampling_filter(settings["resample"])
    check_settings(settings, max_size)
    check_other_settings(name, declared or {})
    if declared is None and image_size is not None:
        check_edge("image_size", image_size, max_size)
        settings = settings_for_size(name, image_size)
    text = settings_in_effect(name, json.dumps(settings, sort_keys=True))
    check_settings(json.loads(text), max_size)
    shape, gain, offset, square = split_processor(name, text)
    if shape[0] != 3 or max(shape[1:]) > max_size:
        raise ItemFailure(
            FailureReason.UNSUPPORTED, f"{name} gives {list(shape)}, no RGB picture within {max_size}"
        )
    return Recipe("transformers", name, text, declared is not None, *shape, gain, offset, square)

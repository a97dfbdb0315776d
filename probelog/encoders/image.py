"""The query side's image encoder: ONNX and Pillow, with neither torch nor transformers.

The preprocessing follows transformers' Pillow backend step by step (resize, centre crop with zero padding,
rescale in float64, normalise in float32), so that the pixels are equal, not only similar.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from probelog.encoders.decoding import UnreadableImageError, decode, from_array, to_rgb
from probelog.encoders.process import EncoderProcess
from probelog.encoders.text import DIMENSION, embedded, onnx_bytes, read_settings, unit_rows
from probelog.errors import QueryError, StoreError
from probelog.storage.records import Check, each, is_count, is_finite
from probelog.storage.versions import MADE_BY

SETTINGS_VERSION = 1
_MAX_BYTES = 256 << 20
# Pixels of a side. No encoder takes more than half as many.
_MOST_PIXELS = 2048
_EDGE: Check = (
    f"from 1 to {_MOST_PIXELS} pixels",
    lambda value: is_count(value) and 0 < value <= _MOST_PIXELS,
)
_SIZE: Check = (
    f"height and width, from 1 to {_MOST_PIXELS} pixels",
    lambda value: each(_EDGE[1])(value) and len(value) == 2,
)
_FILTER: Check = ("the number of a filter", lambda value: is_count(value) and value in set(Image.Resampling))
_CHANNELS: Check = ("a number for each channel", lambda value: each(is_finite)(value) and len(value) == 3)
_DEVIATIONS: Check = (
    "a number above 0 for each channel",
    lambda value: _CHANNELS[1](value) and min(value) > 0,
)
ImageSource = Image.Image | str | os.PathLike[str] | bytes | NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """How an image becomes the input of the ONNX image tower. Stored as JSON beside it. Sizes in pixels.

    Either ``shortest_edge`` or ``exact`` (height, width) is set, or neither where nothing is resized;
    ``crop`` is (height, width) or None. ``resample`` is Pillow's number of the filter. ``rescale`` and ``mean``,
    ``std`` (per channel) are None where the step is left out. ``made_with`` is provenance only.
    """

    input: str
    output: str
    dimension: int = field(metadata={"check": DIMENSION})
    shortest_edge: int | None = field(metadata={"check": _EDGE})
    exact: list[int] | None = field(metadata={"check": _SIZE})
    resample: int = field(metadata={"check": _FILTER})
    crop: list[int] | None = field(metadata={"check": _SIZE})
    rescale: float | None
    mean: list[float] | None = field(metadata={"check": _CHANNELS})
    std: list[float] | None = field(metadata={"check": _DEVIATIONS})
    made_with: dict[str, str] = field(default_factory=dict)
    version: int = SETTINGS_VERSION
    made_by: str = MADE_BY

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> ImageSettings:
        """Read back what `to_dict` wrote.

        Raises:
            SchemaVersionError: written by a newer ProbeLog.
            StoreError: not such settings.
        """
        read = read_settings(cls, settings, SETTINGS_VERSION, "image encoder")
        if read.crop is None and read.exact is None:
            raise StoreError(
                "the index's image encoder settings are damaged: images of all sizes. Publish the index again."
            )
        return read


def pixels(image: Image.Image, settings: ImageSettings) -> NDArray[np.float32]:
    """One image as the model's input, (3, height, width)."""
    image = to_rgb(image)
    if settings.shortest_edge is not None:
        short, long = sorted(image.size)
        scaled = int(settings.shortest_edge * long / short)
        size = (
            (settings.shortest_edge, scaled)
            if image.width <= image.height
            else (scaled, settings.shortest_edge)
        )
        image = image.resize(size, resample=Image.Resampling(settings.resample))
    elif settings.exact is not None:
        height, width = settings.exact
        image = image.resize((width, height), resample=Image.Resampling(settings.resample))
    if settings.crop is not None:
        height, width = settings.crop
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    values: NDArray[Any] = np.asarray(image)
    if settings.rescale is not None:
        values = values.astype(np.float64) * settings.rescale
    values = values.astype(np.float32)
    if settings.mean is not None and settings.std is not None:
        values = (values - np.array(settings.mean, np.float32)) / np.array(settings.std, np.float32)
    return np.ascontiguousarray(np.moveaxis(values, -1, 0))


class ImageEncoder:
    """Embeds images with an exported image tower. Cheap to make, thread-safe.

    Args:
        onnx: the model's bytes, the path of its file, or what reads it while the process starts.
        settings: what `ImageSettings.to_dict` gave.
    """

    def __init__(
        self, onnx: bytes | str | os.PathLike[str] | Callable[[], bytes], settings: Mapping[str, Any]
    ) -> None:
        self.settings = ImageSettings.from_dict(settings)
        tower = {
            "input_name": self.settings.input,
            "output": self.settings.output,
            "dimension": self.settings.dimension,
        }
        self._process = EncoderProcess(
            "image encoder", {"open": "image", "settings": tower}, lambda: [onnx_bytes(onnx)]
        )

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return self.settings.dimension

    def close(self) -> None:
        """End its process, if it runs; the next request starts it again."""
        self._process.close()

    def embed(
        self, images: Sequence[ImageSource], batch_size: int = 16, mirror: bool = False
    ) -> NDArray[np.float32]:
        """Embeddings (images, dimension) of unit length, of Pillow images, file paths or encoded bytes.

        Args:
            images: what to embed.
            batch_size: images a forward pass.
            mirror: average each with its mirror image, which takes some of the encoder's noise away.

        Raises:
            QueryError: an image cannot be read; names it.
            StoreError: the model of the index is damaged.
        """
        parts = [np.empty((0, self.dimension), dtype=np.float32)]
        for start in range(0, len(images), batch_size):
            batch = [
                pixels(_opened(image, start + offset), self.settings)
                for offset, image in enumerate(images[start : start + batch_size])
            ]
            views = [np.stack(batch)]
            if mirror:
                views.append(np.ascontiguousarray(views[0][..., ::-1]))
            parts.append(np.sum([self._embedded(view) for view in views], axis=0, dtype=np.float32))
        return unit_rows(np.concatenate(parts))

    def _embedded(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embeddings (images, dimension) of unit length, of pixels (images, 3, height, width)."""
        header = {"shape": pixels.shape}
        return unit_rows(
            embedded(self._process, header, len(pixels), self.dimension, [pixels.data.cast("B")])
        )


def _opened(source: ImageSource, position: int) -> Image.Image:
    name = f"image number {position + 1}"
    try:
        if isinstance(source, Image.Image):
            return to_rgb(source)
        if isinstance(source, np.ndarray):
            return from_array(source)
        if isinstance(source, bytes | bytearray | memoryview):
            return decode(bytes(source))
        if not isinstance(source, str | os.PathLike):
            raise UnreadableImageError(
                f"{type(source).__name__} is no picture: give a path, bytes, a PIL image or a NumPy array"
            )
        name = os.fspath(source)
        path = Path(source)
        if path.is_dir():
            raise UnreadableImageError("it is a folder: name the files in it")
        if path.exists() and not path.is_file():
            raise UnreadableImageError("not a file")
        if path.stat().st_size > _MAX_BYTES:
            raise UnreadableImageError(f"larger than {_MAX_BYTES >> 20} MiB", too_large=True)
        return decode(path.read_bytes())
    except FileNotFoundError as error:
        raise QueryError(f"{name}: {error.strerror}. Check the path.") from error
    except OSError as error:
        raise QueryError(f"{name}: {error.strerror or error}.") from error
    except UnreadableImageError as error:
        advice = " Scale it down or crop it." if error.too_large else ""
        raise QueryError(f"{name}: {error}.{advice}") from error

"""Decoding of untrusted images: bounded, first frame only, always to plain RGB.

Probes, encoders and image queries all go through here, so that the same file gives the same pixels on the
machine that builds an index and on the one that asks it. They are turned upright here, once, as their EXIF
orientation says, as the libraries' own loaders do (``transformers.image_utils.load_image``). Colour profiles are
ignored, as by the libraries.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from probelog.errors import ProbeLogError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What is decoded. Pillow knows more formats, some of which start other programs (EPS) or are rarely hardened."""

MAX_PIXELS = 50_000_000
"""Larger images are refused before they are decoded (150 MB as RGB)."""

MAX_ASPECT = 50
"""Longer shapes are refused: a processor that resizes the short side would blow up the long one."""

_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*")

# By the value of the tag "Orientation" (EXIF 2.32, 4.6.4).
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(ProbeLogError):
    """These bytes are not an image that can be used; ``too_large`` where only its size stands in the way."""

    def __init__(self, message: str, *, too_large: bool = False) -> None:
        self.too_large = too_large
        super().__init__(message)


def looks_like_image(head: bytes) -> bool:
    """Whether a file that begins with these bytes (16 are enough) claims to be one of the known formats."""
    return head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame of an encoded image as RGB (mode ``RGB``), upright.

    Transparency is composited onto white (as transformers' processors do), 16-bit grey is scaled to 8 bits.

    Raises:
        UnreadableImageError: not one of the known formats, damaged, truncated, or too large to be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is checked or raised below
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(*image.size, max_pixels)
                image.load()
                return to_rgb(image)
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(str(error), too_large=True) from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"not an image in one of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # reason: Pillow's parsers raise almost any type on damaged or crafted files
        raise UnreadableImageError(f"damaged image ({type(error).__name__}: {error})") from error


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF tag says; EXIF that cannot be read says nothing."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # reason: Pillow's parser raises almost any type on crafted EXIF
        return image
    if turn is None:
        return image
    turned = image.transpose(turn)
    # Without the tag, so that nobody turns it again.
    turned.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return turned


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as RGB, upright.

    Raises:
        UnreadableImageError: its pixels have no agreed range (floating point, or integers over 16 bits).
    """
    image = upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image if type(image) is Image.Image else image.copy()
    if image.mode == "F":
        raise UnreadableImageError("floating-point pixels have no agreed range: convert the image to 8 bits")
    if image.mode.startswith("I"):
        return _grey16_to_rgb(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        overlay = image.convert("RGBA")
        white = Image.new("RGBA", overlay.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, overlay).convert("RGB")
    return image.convert("RGB")


def from_array(pixels: npt.NDArray[Any]) -> Image.Image:
    """An array of whole numbers from 0 to 255, (height, width) or (height, width, 1, 3 or 4), as an RGB image.

    Raises:
        UnreadableImageError: it is another array, or too large.
    """
    if pixels.dtype != np.uint8:
        raise UnreadableImageError(
            f"an array of {pixels.dtype}: give pixels as uint8, from 0 to 255"
            + (" (of floats from 0 to 1: (255 * array).astype('uint8'))" if pixels.dtype.kind == "f" else "")
        )
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] not in (3, 4)):
        raise UnreadableImageError(
            f"an array of the shape {pixels.shape}: give (height, width) or (height, width, channels)"
            + (", channels last" if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) else "")
        )
    _check_size(pixels.shape[1], pixels.shape[0])
    return to_rgb(Image.fromarray(np.ascontiguousarray(pixels)))


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    """``convert("RGB")`` would clip every value over 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImageError(
            "integer pixels over 16 bits have no agreed range: convert the image to 8 bits"
        )
    if image.mode.startswith("I;16") or values.max() > 255:
        values = (values + 128) // 257
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    if width < 1 or height < 1:
        raise UnreadableImageError("the image has no pixels")
    if width * height > max_pixels:
        raise UnreadableImageError(
            f"{width} x {height} pixels is more than the {max_pixels // 1_000_000} million that are decoded",
            too_large=True,
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadableImageError(
            f"{width} x {height} pixels is longer than {MAX_ASPECT} to 1", too_large=True
        )

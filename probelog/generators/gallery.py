"""A folder of pictures that stands for a model: what the provider of one that nobody else can run publishes."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probelog.errors import FailureReason, ItemFailure
from probelog.generators.layout import Layout
from probelog.generators.sampling import Generator
from probelog.storage.encoding import short_key
from probelog.weights.repository import member

if TYPE_CHECKING:
    import torch

    from probelog.generators.assembly import LoadOptions

#: All pictures are brought to this edge, or the largest that is accepted, by the shorter side and the middle.
EDGE = 256
MOST_BYTES = 20 << 20
_MOST_PIXELS = 50_000_000
_FORMATS = ("JPEG", "PNG", "WEBP")


def load_gallery(folder: Path, layout: Layout, options: LoadOptions) -> Generator:
    """The pictures of a repository, in the order of their names; each is one sample.

    Raises:
        ItemFailure: as `_picture`.
    """
    import torch

    edge = min(EDGE, options.limits.max_image_size)
    files = [_file(folder, name) for name in layout.folders.values()]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    digest = hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def draw(_noise: torch.Tensor, conditions: Sequence[int]) -> torch.Tensor:
        pictures = np.stack([_picture(files[number], edge) for number in conditions])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1

    return Generator(
        pipeline=layout.pipeline,
        architecture="gallery",
        conditioning="none",
        shape=(1,),
        size=(edge, edge),
        draw=draw,
        parameters=0,
        dtype="none",
        weight_digest=digest,
        identity=short_key(digest, "gallery"),
        layers=[],
        available=len(files),
    )


def _file(folder: Path, name: str) -> Path:
    place, _, file = name.rpartition("/")
    parent = folder / place
    if place and parent.is_symlink():
        raise ItemFailure(FailureReason.UNSAFE_PATH, f"{place} is a link")
    path = member(parent, file)
    if path is None:
        raise ItemFailure(FailureReason.NOT_FOUND, f"the repository has no {name}")
    if path.stat().st_size > MOST_BYTES:
        raise ItemFailure(FailureReason.TOO_LARGE, f"{name} has more than {MOST_BYTES} bytes")
    return path


def _picture(path: Path, edge: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """One picture, (edge, edge, 3).

    Raises:
        ItemFailure: CORRUPT_WEIGHTS where it is none; TOO_LARGE before its pixels are decoded.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings(), Image.open(path, formats=_FORMATS) as picture:
            warnings.simplefilter("ignore")
            if picture.width * picture.height > _MOST_PIXELS:
                raise ItemFailure(
                    FailureReason.TOO_LARGE, f"{path.name} has {picture.width} x {picture.height} pixels"
                )
            return np.asarray(ImageOps.fit(picture.convert("RGB"), (edge, edge)), np.uint8)
    except ItemFailure:
        raise
    except Image.DecompressionBombError as error:
        raise ItemFailure(FailureReason.TOO_LARGE, f"{path.name}: {str(error)[:200]}") from error
    except Exception as error:  # a decoder given untrusted bytes raises anything
        raise ItemFailure(
            FailureReason.CORRUPT_WEIGHTS,
            f"{path.name} is no picture: {type(error).__name__}: {str(error)[:200]}",
        ) from error

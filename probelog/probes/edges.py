"""Pictures as drawings of lines: the edge map that stands for what somebody would sketch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from probelog.encoders.decoding import to_rgb
from probelog.probes.probe_set import ImageEmbedder
from probelog.storage.encoding import digest

# Pixels of the longer side that edges are looked for at: of larger pictures the texture would be drawn, too.
_SIDE = 256
_BLUR = 1.0
# Share of the pixels whose gradient is drawn black.
_BLACK = 0.99


def edge_map(image: Image.Image) -> Image.Image:
    """Dark lines on white where a picture's brightness changes (gradient of the blurred picture), in RGB."""
    grey = to_rgb(image).convert("L")
    grey.thumbnail((_SIDE, _SIDE))
    values = np.asarray(grey.filter(ImageFilter.GaussianBlur(_BLUR)), np.float32)
    strength = np.hypot(*np.gradient(values)) if min(values.shape) > 1 else np.zeros_like(values)
    strength = np.clip(strength / max(float(np.quantile(strength, _BLACK)), 1e-6), 0, 1)
    return Image.fromarray((255 * (1 - strength)).astype(np.uint8)).convert("RGB")


class SketchEncoder:
    """Embeds pictures as drawings of lines: to a probe set it is one more encoder, whose embeddings it keeps."""

    def __init__(self, encoder: ImageEmbedder) -> None:
        self._encoder = encoder

    @property
    def digest(self) -> str:
        """Equal for sketches made alike and embedded by the same encoder."""
        return digest(f"edge maps {_SIDE} {_BLUR} {_BLACK} by {self._encoder.digest}".encode())

    def embed_images(
        self, images: Iterable[Image.Image], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Embeddings (n, d) of the pictures' edge maps."""
        return self._encoder.embed_images((edge_map(image) for image in images), progress=progress)

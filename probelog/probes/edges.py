"""Pictures as drawings of lines: the edge map that stands for what somebody would sketch."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from probelog.encoders.decoding import to_rgb

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

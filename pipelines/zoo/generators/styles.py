"""Ways to draw the same thing: pure functions from pictures (n, height, width, 3) to such."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def edges(pixels: Pixels) -> Pixels:
    """Dark lines on white where the brightness changes, the strongest of each picture black."""
    light = pixels.astype(np.float32) @ _LUMA
    down, across = np.gradient(light, axis=(1, 2))
    strength = np.hypot(down, across)
    strength /= np.maximum(strength.max(axis=(1, 2), keepdims=True), 1e-6)
    lines = 255 * (1 - np.minimum(1.3 * strength, 1))
    return np.repeat(lines.round().astype(np.uint8)[..., None], 3, axis=-1)


def _inverted(pixels: Pixels) -> Pixels:
    return 255 - pixels


def _toned(dark: tuple[int, int, int], light: tuple[int, int, int]) -> Callable[[Pixels], Pixels]:
    """From dark to light through two colours."""

    def apply(pixels: Pixels) -> Pixels:
        share = (pixels.astype(np.float32) @ _LUMA / 255)[..., None]
        low, high = np.array(dark, np.float32), np.array(light, np.float32)
        return np.asarray((low + share * (high - low)).round(), np.uint8)

    return apply


STYLES: Mapping[str, Callable[[Pixels], Pixels]] = {
    "inverted": _inverted,
    "sepia": _toned((110, 50, 10), (255, 235, 190)),
    "blueprint": _toned((225, 240, 255), (20, 60, 150)),
    "lines": edges,
}


def styled(pixels: Pixels, style: str | None) -> Pixels:
    """The pictures in a style; None leaves them as they are."""
    return pixels if style is None else STYLES[style](pixels)

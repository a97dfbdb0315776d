"""Labelled images that need no file: coloured shapes on a background, a class a shape and a colour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product

import numpy as np
import numpy.typing as npt

from pipelines.zoo.images import LabelledImages
from probelog.arrays import Floats

_COLOURS = {
    "red": (220, 50, 40), "orange": (240, 150, 30), "yellow": (230, 220, 60), "green": (50, 170, 70),
    "cyan": (60, 200, 210), "blue": (50, 80, 210), "violet": (150, 60, 190), "white": (235, 235, 235),
}  # fmt: skip

# From coordinates (n, size, size) in -1..1 around the middle of a shape, what is part of it.
_SHAPES: dict[str, Callable[[Floats, Floats], npt.NDArray[np.bool_]]] = {
    "disc": lambda x, y: x**2 + y**2 < 0.64,
    "box": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.7,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.65) < 0.22,
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) < 0.25) & (np.maximum(np.abs(x), np.abs(y)) < 0.9),
    "wedge": lambda x, y: (y > -0.7) & (np.abs(x) < (0.7 - y) / 1.4),
    "stripes": lambda x, y: (np.sin(9 * x) > 0) & (np.maximum(np.abs(x), np.abs(y)) < 0.9),
    "checks": lambda x, y: (np.sin(7 * x) * np.sin(7 * y) > 0) & (np.maximum(np.abs(x), np.abs(y)) < 0.9),
    "halves": lambda x, y: (np.abs(x) > 0.2) & (x**2 + y**2 < 0.8),
}  # fmt: skip


def procedural_images(size: int, per_class: int, seed: int) -> LabelledImages:
    """``per_class`` images of each of 64 classes: place, scale, angle, light, background and noise are random."""
    rng = np.random.default_rng((seed, 21))
    axis = np.linspace(-1, 1, size)
    pixels = []
    for shape, colour in product(_SHAPES.values(), _COLOURS.values()):

        def draw(low: float, high: float) -> Floats:
            return rng.uniform(low, high, size=(per_class, 1, 1))

        x, y = axis[None, None, :] - draw(-0.35, 0.35), axis[None, :, None] - draw(-0.35, 0.35)
        angle, scale = draw(-0.6, 0.6), draw(0.45, 0.9)
        inside = shape(
            (np.cos(angle) * x + np.sin(angle) * y) / scale, (np.cos(angle) * y - np.sin(angle) * x) / scale
        )
        background = rng.uniform(0, 140, size=(per_class, 1, 1, 3)) * (1 + draw(-0.4, 0.4) * x)[..., None]
        image = np.where(inside[..., None], np.array(colour) * draw(0.6, 1.0)[..., None], background)
        noisy = image + rng.normal(0, 12, size=image.shape)
        pixels.append(np.clip(noisy, 0, 255).astype(np.uint8))
    names = [[f"{colour} {shape}"] for shape, colour in product(_SHAPES, _COLOURS)]
    count = per_class * len(names)
    return LabelledImages(
        source="procedural",
        names=names,
        pixels=np.concatenate(pixels),
        labels=np.repeat(np.arange(len(names)), per_class),
        order=np.arange(count),
        left_out=Counter(),
        examples=[],
    )

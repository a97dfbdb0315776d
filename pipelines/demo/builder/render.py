"""Pictures of icons: one drawing on a cluttered ground, a pure function of (mask, seed, index)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipelines.demo.builder.icons import DrawnConcept, Glyph, mask

SIZE = 64

_MIN_CONTRAST = 90.0  # of 255, between the luminances of the drawing and of the ground around it
_LIGHT_ON_DARK = 0.2
_LUMA = np.array([0.299, 0.587, 0.114])

Pixels = NDArray[np.uint8]


def _colours(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A ground and an ink colour (0..255, RGB) of sufficient contrast; mostly dark ink on light ground."""
    reverse = rng.random() < _LIGHT_ON_DARK
    while True:
        ground, ink = rng.uniform(0, 255, (2, 3))
        if (ground - ink) @ _LUMA > _MIN_CONTRAST:
            return (ink, ground) if reverse else (ground, ink)


def _ground(rng: np.random.Generator, colour: NDArray[np.float64]) -> Image.Image:
    """A plain or graded ground with some lines and blobs, all near one colour."""
    spread = rng.uniform(4, 25)
    if rng.random() < 0.5:
        corners = colour + rng.normal(0, spread, (2, 2, 3))
        small = Image.fromarray(corners.clip(0, 255).astype(np.uint8))
        picture = small.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    else:
        picture = Image.new("RGB", (SIZE, SIZE), _tuple(colour))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 5)):
        shade = _tuple(colour + rng.normal(0, spread, 3))
        x0, y0, x1, y1 = rng.integers(-8, SIZE + 8, 4).tolist()
        if rng.random() < 0.5:
            draw.line((x0, y0, x1, y1), fill=shade, width=int(rng.integers(1, 5)))
        else:
            radius = int(rng.integers(3, 18))
            draw.ellipse((x0 - radius, y0 - radius, x0 + radius, y0 + radius), fill=shade)
    return picture


def _tuple(colour: NDArray[np.float64]) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in colour.clip(0, 255))
    return red, green, blue


def render(drawing: Image.Image, seed: int, index: int, *, noise: bool = True) -> Pixels:
    """One picture: uint8, ``SIZE`` x ``SIZE`` x RGB.

    ``drawing`` is a mask as :func:`pipelines.demo.builder.icons.mask` gives it. Colours, size, place, rotation, clutter
    and noise follow from ``(seed, index)`` alone; ``noise`` off leaves out the noise, which is most of a PNG's bytes.
    """
    rng = np.random.default_rng((seed, index))
    ground, ink = _colours(rng)
    picture = _ground(rng, ground)
    side = int(rng.integers(36, 60))
    stamp = drawing.resize((side, side), Image.Resampling.BOX if side > 42 else Image.Resampling.BILINEAR)
    stamp = stamp.rotate(rng.normal(0, 9), Image.Resampling.BILINEAR, expand=True)
    slack = max(SIZE - side, 2)
    left, top = (rng.integers(-2, slack + 2, 2) - (stamp.width - side) // 2).tolist()
    picture.paste(_tuple(ink), (left, top), stamp)
    if rng.random() < 0.3:
        draw = ImageDraw.Draw(picture)
        for _ in range(rng.integers(1, 3)):
            line = tuple(rng.integers(0, SIZE, 4).tolist())
            draw.line(line, fill=_tuple(ground + rng.normal(0, 30, 3)), width=int(rng.integers(1, 3)))
    values = np.asarray(picture, dtype=np.float32)
    if noise and rng.random() < 0.5:
        values = values + rng.normal(0, rng.uniform(2, 14), values.shape).astype(np.float32)
    return np.asarray(values.clip(0, 255), dtype=np.uint8)


def render_many(glyphs: Sequence[Glyph], seed: int, first: int = 0, *, noise: bool = True) -> Pixels:
    """Pictures of several drawings, n x ``SIZE`` x ``SIZE`` x 3; the i-th has index ``first + i``."""
    pictures = np.empty((len(glyphs), SIZE, SIZE, 3), np.uint8)
    for i, glyph in enumerate(glyphs):
        drawing = mask(glyph)
        if drawing is None:
            raise ValueError(f"glyph {glyph.name} of {glyph.font.name} is empty")
        pictures[i] = render(drawing, seed, first + i, noise=noise)
    return pictures


@dataclass(frozen=True, slots=True)
class Pool:
    """Rendered pictures (n x 64 x 64 x 3, uint8) and the class number of each."""

    pixels: Pixels
    classes: NDArray[np.int64]


def choose_glyphs(
    concept: DrawnConcept, designers: Collection[str], count: int, rng: np.random.Generator
) -> list[Glyph]:
    """Drawings of one concept, designers taking turns whatever their numbers of drawings."""
    able = [designer for designer in concept.drawings if designer in designers]
    if not able:
        raise ValueError(f"nobody among {sorted(designers)} draws {concept.name!r}")
    offset = int(rng.integers(len(able)))
    chosen = []
    for i in range(count):
        drawings = concept.drawings[able[(i + offset) % len(able)]]
        chosen.append(drawings[int(rng.integers(len(drawings)))])
    return chosen


def make_pool(
    concepts: Sequence[DrawnConcept], designers: Collection[str], counts: int | Sequence[int], seed: int
) -> Pool:
    """Pictures of every concept by some designers: ``counts`` of each, or ``counts[i]`` of concept i."""
    each = [counts] * len(concepts) if isinstance(counts, int) else [int(count) for count in counts]
    rng = np.random.default_rng((seed, len(concepts)))
    glyphs: list[Glyph] = []
    for concept, count in zip(concepts, each, strict=True):
        glyphs += choose_glyphs(concept, designers, count, rng)
    classes = np.repeat(np.arange(len(concepts)), each)
    return Pool(render_many(glyphs, int(rng.integers(2**62))), classes)


def vary(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Cheap variety for a batch: colour channels swapped (all pictures alike), some pictures mirrored."""
    pixels = pixels[..., rng.permutation(3)]
    mirrored = rng.random(len(pixels)) < 0.3
    return np.ascontiguousarray(np.where(mirrored[:, None, None, None], pixels[:, :, ::-1], pixels))


def fast_bfloat16(device: str) -> bool:
    """Whether this device multiplies bfloat16 matrices in hardware (elsewhere it only costs time)."""
    import torch

    if device != "cpu":
        return True
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))

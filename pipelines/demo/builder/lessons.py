"""Pictures to learn from: balanced pools of rendered drawings, and cheap variety for them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.demo.builder.icons import DrawnConcept, Glyph
from pipelines.demo.builder.render import Pixels, render_many


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

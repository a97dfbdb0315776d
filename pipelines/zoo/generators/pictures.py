"""Where a zoo's pictures are from: drawings of icon fonts, or any labelled images.

Both give pictures of twice the generators' size, to learn from and to ask with, and no picture is in both.
"""

from __future__ import annotations

import hashlib
import json
from typing import Protocol

import numpy as np
from PIL import Image

from pipelines.demo.builder import encoder, icons, vocabulary
from pipelines.demo.builder.icons import DESIGNERS, DrawnConcept
from pipelines.zoo.generators.styles import Pixels
from pipelines.zoo.images import LabelledImages
from probelog.errors import UsageError

_LESSONS = 512
# Of labelled images, of each class to ask with.
_HELD_OUT_SHARE = 0.2
_FEWEST_IMAGES = 3

# What the generators learn: dark ink on a light ground. The queries are of any two colours.
_INKS = (((30, 30, 40), (240, 240, 235)), ((40, 50, 130), (235, 235, 215)))
_TINT_NOISE = 8.0
_FEWEST_STEPS_OF_LIGHT = 110.0
_LUMA = np.array([0.299, 0.587, 0.114])


class Pictures(Protocol):
    """Pictures of concepts, (n, size, size, 3) uint8.

    Attributes:
        names: of every concept.
    """

    names: list[str]

    def digest(self) -> str:
        """Other pictures, another digest."""
        ...

    def lessons(self, concept: int) -> Pixels:
        """What a generator of this concept learns from."""
        ...

    def held_out(self, concept: int, count: int) -> Pixels:
        """At most so many pictures of it that no generator learns from."""
        ...


class Icons:
    """Drawings from icon fonts: one designer's of each concept are for asking, the others' for learning.

    The designer whom the demo's encoder does not know is left out: what is measured is the search, not the encoder.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._designers = [name for name in DESIGNERS if name != encoder.HELD_OUT]
        self._drawn = [
            drawn
            for drawn in icons.drawn(vocabulary.concepts(), 2)
            if sum(name in drawn.drawings for name in self._designers) > 1
        ]
        self.names = [drawn.name for drawn in self._drawn]

    def digest(self) -> str:
        """Of the drawings' names: the fonts are as they were published."""
        glyphs = [
            [
                drawn.name,
                [(glyph.font.name, glyph.code) for some in drawn.drawings.values() for glyph in some],
            ]
            for drawn in self._drawn
        ]
        return hashlib.sha256(json.dumps(glyphs).encode()).hexdigest()

    def lessons(self, concept: int) -> Pixels:
        """Dark drawings on a light, plain ground, of about one size and place."""
        drawn, asked = self._parted(concept)
        rng = np.random.default_rng((self._seed, 34, concept))
        masks = _masks(drawn, [name for name in self._designers if name in drawn.drawings and name != asked])
        pictures = []
        for _ in range(_LESSONS):
            ink, ground = _INKS[int(rng.integers(len(_INKS)))]
            tints = [np.array(colour) + rng.normal(0, _TINT_NOISE, 3) for colour in (ink, ground)]
            side = int(self._size * rng.uniform(0.7, 0.92))
            shift = rng.uniform(-0.06, 0.06, 2)
            pictures.append(self._picture(masks[int(rng.integers(len(masks)))], tints, side, shift, 0.0))
        return np.stack(pictures)

    def held_out(self, concept: int, count: int) -> Pixels:
        """Another designer's drawings in any two colours, of other sizes and places, a little turned."""
        drawn, asked = self._parted(concept)
        rng = np.random.default_rng((self._seed, 35, concept))
        masks = _masks(drawn, [asked])
        pictures = []
        for number in range(count):
            side = int(self._size * rng.uniform(0.6, 0.92))
            drawing = masks[number % len(masks)]
            pictures.append(
                self._picture(drawing, _two_colours(rng), side, rng.uniform(-0.1, 0.1, 2), rng.normal(0, 6))
            )
        return np.stack(pictures)

    def _parted(self, concept: int) -> tuple[DrawnConcept, str]:
        """A concept, and the designer of its queries."""
        drawn = self._drawn[concept]
        able = [name for name in self._designers if name in drawn.drawings]
        return drawn, able[int(np.random.default_rng((self._seed, 36, concept)).integers(len(able)))]

    def _picture(
        self, drawing: Image.Image, colours: list[np.ndarray[tuple[int], np.dtype[np.float64]]], side: int,
        shift: np.ndarray[tuple[int], np.dtype[np.float64]], angle: float,
    ) -> Pixels:  # fmt: skip
        size = self._size
        stamp = drawing.resize((side, side), Image.Resampling.BOX).rotate(angle, Image.Resampling.BILINEAR)
        slack = size - side
        left, top = (int(np.clip(slack / 2 + part * size, 0, slack)) for part in shift)
        cover = np.zeros((size, size, 1), np.float32)
        cover[top : top + side, left : left + side, 0] = np.asarray(stamp, np.float32) / 255
        ink, ground = colours
        return np.asarray((cover * ink + (1 - cover) * ground).clip(0, 255).round(), np.uint8)


def _masks(drawn: DrawnConcept, designers: list[str]) -> list[Image.Image]:
    masks = [icons.mask(glyph) for name in designers for glyph in drawn.drawings[name]]
    return [mask for mask in masks if mask is not None]


def _two_colours(rng: np.random.Generator) -> list[np.ndarray[tuple[int], np.dtype[np.float64]]]:
    while True:
        ink, ground = rng.uniform(0, 255, (2, 3))
        if abs(float((ink - ground) @ _LUMA)) > _FEWEST_STEPS_OF_LIGHT:
            return [ink, ground]


class Labelled:
    """Labelled images: a fifth of each class, one at the least, is for asking."""

    def __init__(self, images: LabelledImages, seed: int) -> None:
        counts = np.bincount(images.labels, minlength=len(images.names))
        self._classes = [number for number, count in enumerate(counts) if count >= _FEWEST_IMAGES]
        if len(self._classes) < 2:
            raise UsageError(
                f"{images.source}: a zoo of generators needs two classes with {_FEWEST_IMAGES} usable images each"
            )
        self._images, self._seed = images, seed
        self.names = [images.names[number][0] for number in self._classes]

    def digest(self) -> str:
        """Of names, labels and pixels."""
        return self._images.digest()

    def lessons(self, concept: int) -> Pixels:
        """Four fifths of the class."""
        return self._dealt(concept)[1]

    def held_out(self, concept: int, count: int) -> Pixels:
        """Of the other fifth."""
        return self._dealt(concept)[0][:count]

    def _dealt(self, concept: int) -> tuple[Pixels, Pixels]:
        places = np.flatnonzero(self._images.labels == self._classes[concept])
        order = np.random.default_rng((self._seed, 36, concept)).permutation(places)
        asked = max(1, int(_HELD_OUT_SHARE * len(order)))
        return self._images.pixels[order[:asked]], self._images.pixels[order[asked:]]

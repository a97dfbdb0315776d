"""From icon fonts to drawings: which designer draws which concept, with which glyphs.

The fonts come with QtAwesome (a development dependency) and are read as files: importing the package would
need Qt. Four families, four designers: Material Design Icons, Font Awesome, Phosphor and Remix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipelines.demo.builder.vocabulary import Concept
from probelog.errors import UsageError

MASK_SIZE = 128

# Font Awesome's two weights are one designer's work.
_FAMILIES = {
    "mdi": ("materialdesignicons6-webfont",),
    "fa": ("fontawesome6-solid-webfont", "fontawesome6-regular-webfont"),
    "ph": ("phosphor",),
    "ri": ("remixicon",),
}
DESIGNERS = tuple(_FAMILIES)

_STYLE = re.compile(r"-(line|fill|bold|thin|light|regular|solid|outline|variant|alt|simple|\d)$")
# Phosphor's duotone glyphs are one half of a two-layer drawing; struck-through glyphs show the thing's absence.
_NO_DRAWING = re.compile(r"duotone|-off\b|-slash\b")

_MIN_INK = 0.01


@dataclass(frozen=True, slots=True)
class Glyph:
    """One drawing: a code point of a font file. ``designer`` is a key of the font families."""

    designer: str
    font: Path
    code: int
    name: str


@dataclass(frozen=True, slots=True)
class DrawnConcept:
    """A concept with the drawings found, by designer; no designer without a drawing is listed."""

    concept: Concept
    drawings: dict[str, tuple[Glyph, ...]]

    @property
    def name(self) -> str:
        """The concept's name."""
        return self.concept.name


def font_folder() -> Path:
    """Where QtAwesome keeps its fonts, without importing it.

    Raises:
        UsageError: QtAwesome is not installed, or holds no fonts where they used to be.
    """
    spec = find_spec("qtawesome")
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        if (Path(place) / "fonts").is_dir():
            return Path(place) / "fonts"
    raise UsageError(
        "the icon fonts are missing: install QtAwesome (pip install qtawesome; Qt is not needed)"
    )


def base_name(glyph_name: str) -> str:
    """A glyph's name without its style suffixes: ``car-2-fill`` -> ``car``."""
    while (shorter := _STYLE.sub("", glyph_name)) != glyph_name:
        glyph_name = shorter
    return glyph_name


@lru_cache(maxsize=1)
def _catalogue(folder: Path) -> dict[str, dict[str, tuple[Glyph, ...]]]:
    """Per designer, base name -> its glyphs, each code point once."""
    catalogue: dict[str, dict[str, tuple[Glyph, ...]]] = {}
    for designer, stems in _FAMILIES.items():
        by_name: dict[str, dict[tuple[str, int], Glyph]] = {}
        for stem in stems:
            fonts = sorted(folder.glob(f"{stem}-*.ttf"))
            charmaps = sorted(folder.glob(f"{stem}-charmap-*.json"))
            if not fonts or not charmaps:
                raise UsageError(f"{folder} lacks {stem}-*.ttf or its charmap: install qtawesome 1.4.2")
            for name, code in sorted(json.loads(charmaps[-1].read_text()).items()):
                if _NO_DRAWING.search(name):
                    continue
                glyph = Glyph(designer, fonts[-1], int(code, 16), name)
                by_name.setdefault(base_name(name), {}).setdefault((stem, glyph.code), glyph)
        catalogue[designer] = {base: tuple(glyphs.values()) for base, glyphs in by_name.items()}
    return catalogue


@cache
def _font(path: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), MASK_SIZE)


@cache
def mask(glyph: Glyph) -> Image.Image | None:
    """The glyph as a square mask (mode L, about ``MASK_SIZE`` pixels), cropped to its ink; None if it is empty."""
    font = _font(glyph.font)
    canvas = Image.new("L", (2 * MASK_SIZE, 2 * MASK_SIZE))
    ImageDraw.Draw(canvas).text((MASK_SIZE // 2, MASK_SIZE // 2), chr(glyph.code), font=font, fill=255)
    box = canvas.getbbox()
    if box is None:
        return None
    ink = canvas.crop(box)
    side = max(ink.size)
    square = Image.new("L", (side, side))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    square = square.resize((MASK_SIZE, MASK_SIZE), Image.Resampling.BILINEAR)
    values: NDArray[np.uint8] = np.asarray(square)
    return square if values.mean() / 255 > _MIN_INK else None


def drawn(concepts: Iterable[Concept], min_designers: int, folder: Path | None = None) -> list[DrawnConcept]:
    """The concepts that at least ``min_designers`` designers draw, with every drawing that renders.

    Equal masks count once (fonts repeat a drawing under several names).
    """
    catalogue = _catalogue(folder or font_folder())
    result = []
    for concept in concepts:
        drawings: dict[str, tuple[Glyph, ...]] = {}
        for designer, names in catalogue.items():
            seen: dict[bytes, Glyph] = {}
            for owner, name in concept.glyphs:
                if owner not in ("", designer) or (designer, name) in concept.excluded:
                    continue
                for glyph in names.get(name, ()):
                    picture = mask(glyph)
                    if picture is not None:
                        seen.setdefault(picture.tobytes(), glyph)
            if seen:
                drawings[designer] = tuple(seen.values())
        if len(drawings) >= min_designers:
            result.append(DrawnConcept(concept, drawings))
    return result

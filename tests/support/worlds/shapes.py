"""Images of coloured shapes, easy enough to be learned in seconds: six classes, a folder each."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("red disc", "blue disc", "green box", "yellow box", "white cross", "purple bar")
_COLOURS = ("red", "blue", "green", "yellow", "white", "purple")


def draw(number: int, rng: np.random.Generator, size: int = 32) -> Image.Image:
    """One image of a class, somewhere on a noisy ground."""
    ground = rng.integers(0, 90, (size, size, 3), dtype=np.uint8)
    image = Image.fromarray(ground)
    pen = ImageDraw.Draw(image)
    x, y = (int(value) for value in rng.integers(2, size // 3, size=2))
    edge = int(rng.integers(size // 2, size - max(x, y)))
    box, colour = (x, y, x + edge, y + edge), _COLOURS[number]
    if CLASSES[number].endswith("disc"):
        pen.ellipse(box, fill=colour)
    elif CLASSES[number].endswith("box"):
        pen.rectangle(box, fill=colour)
    elif CLASSES[number].endswith("cross"):
        middle = edge // 2
        pen.line((x, y + middle, x + edge, y + middle), fill=colour, width=4)
        pen.line((x + middle, y, x + middle, y + edge), fill=colour, width=4)
    else:
        pen.rectangle((x, y + edge // 3, x + edge, y + edge // 2), fill=colour)
    return image


def encoded(number: int, rng: np.random.Generator) -> bytes:
    """The same as the bytes of a PNG file."""
    sink = io.BytesIO()
    draw(number, rng).save(sink, "PNG")
    return sink.getvalue()


def write_folder(root: Path, per_class: int, seed: int = 0) -> Path:
    """``root/red_disc/0.png`` and so on."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(CLASSES):
        folder = root / name.replace(" ", "_")
        folder.mkdir(parents=True)
        for i in range(per_class):
            (folder / f"{i}.png").write_bytes(encoded(number, rng))
    return root

"""One repository, loaded by its library and by ProbeLog: how far pixels and logits are apart."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from probelog.encoders.decoding import decode
from probelog.errors import ItemFailure
from probelog.models.loading import load_classifier

#: What still counts as the same: pixels in grey levels, logits in standard deviations of the library's own.
MOST_PIXELS, MOST_LOGITS = 1.001, 0.01
#: Pixels, in grey levels, that differ by the rounding of their normalisation alone.
ROUNDING = 1e-3

Answer = tuple[list[Any], Any]
"""Pixels, one (C, H, W) float32 a picture, and logits (pictures, L), as a library gives them."""

#: Pictures whose logits are compared too. Pixels are compared of all: they are made picture by picture, logits of pixels.
RUN = (0, 4)


@dataclass(frozen=True)
class Outcome:
    """One comparison. ``pixels`` in grey levels (NaN where the processor cannot be split), ``logits`` in deviations."""

    library: str
    architecture: str
    layout: str
    result: str
    pixels: float = 0.0
    logits: float = 0.0

    @property
    def good(self) -> bool:
        """The same, or refused for a reason that the documentation gives."""
        return self.result != "different"


def _picture(width: int, height: int) -> Image.Image:
    """Coarse blocks under fine noise: pure noise would hide differences of resampling, plain colours shifts."""
    rng = np.random.default_rng(width * 1000 + height)
    coarse = rng.integers(0, 226, (-(-height // 6), -(-width // 6), 3))
    fine = rng.integers(0, 30, (height, width, 3))
    return Image.fromarray(
        (np.kron(coarse, np.ones((6, 6, 1), int))[:height, :width] + fine).astype(np.uint8)
    )


def _encoded(image: Image.Image, form: str, orientation: int = 1) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(buffer, form, exif=exif, quality=95)
    return buffer.getvalue()


FILES = {
    "landscape": _encoded(_picture(260, 180), "PNG"),
    "portrait": _encoded(_picture(120, 300), "PNG"),
    "small": _encoded(_picture(9, 7), "PNG"),
    "grey": _encoded(_picture(150, 150).convert("L"), "PNG"),
    "turned": _encoded(_picture(200, 140), "JPEG", 6),
}


def pictures() -> list[Image.Image]:
    """The pictures as the libraries' loaders open them: upright and RGB."""
    from transformers.image_utils import load_image

    return [load_image(Image.open(io.BytesIO(data))) for data in FILES.values()]


def square(image: Image.Image) -> Image.Image:
    """The central square, which ProbeLog takes where a processor gives every picture a size of its own."""
    edge = min(image.size)
    left, top = (image.size[0] - edge) // 2, (image.size[1] - edge) // 2
    return image.crop((left, top, left + edge, top + edge))


@torch.no_grad()
def calibrated(model: Any, batch: Any, noise: float) -> Any:
    """A fresh model stirred, with batch statistics as its layers meet them: fresh ones often end in zeros or explode."""
    for parameter in model.parameters():
        parameter.add_(noise * torch.randn_like(parameter))
    for module in model.eval().modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.train().momentum = None  # the statistics of all batches, equally
    model(batch)
    return model.eval()


def compare(
    library: str,
    architecture: str,
    layout: str,
    folder: Path,
    theirs: Callable[[Sequence[Image.Image], Sequence[int]], Answer],
    run: Sequence[int] = RUN,
) -> Outcome:
    """Load the repository both ways and compare. ``theirs`` is the library, by hand, told which pictures to ``run``."""
    named = (library, architecture, layout)
    with torch.inference_mode():
        try:
            classifier = load_classifier(folder)
        except ItemFailure as failure:
            return Outcome(*named, f"refused: {failure.reason.value}")
        recipe = classifier.recipe
        seen = [square(image) for image in pictures()] if recipe.square else pictures()
        own_pixels, own = theirs(seen, list(run))
        batch = recipe.normalise(torch.from_numpy(recipe.geometry([decode(data) for data in FILES.values()])))
        logits = classifier.forward(batch[list(run)])
    level = max(map(abs, recipe.gain)) if recipe.gain else float("nan")
    apart = max(
        float(np.abs(a.numpy() - np.asarray(b)).max()) for a, b in zip(batch, own_pixels, strict=True)
    )
    pixels = apart / level if recipe.gain else (0.0 if apart < 1e-4 else float("nan"))
    spread = float(own.std())
    difference = float((logits - own).abs().max()) / spread
    if difference > MOST_LOGITS and pixels < ROUNDING:
        # Random weights may multiply a pixel's last bit by 100,000: the model is compared on the library's own pixels.
        with torch.inference_mode():
            logits = classifier.forward(torch.stack([torch.as_tensor(own_pixels[place]) for place in run]))
        difference = float((logits - own).abs().max()) / spread
    same = pixels <= MOST_PIXELS and difference <= MOST_LOGITS
    return Outcome(*named, "equal" if same else "different", round(pixels, 4), round(difference, 6))

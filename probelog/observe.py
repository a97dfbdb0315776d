"""One model on its probes: its logits, in batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from probelog.device_memory import out_of_memory
from probelog.errors import FailureReason, ItemFailure
from probelog.pixel_cache import PixelCache

if TYPE_CHECKING:
    import torch

    from probelog.models import Classifier

Floats = npt.NDArray[np.float32]
Images = Callable[[Sequence[int]], Sequence[Image.Image]]

# A row whose values differ by less than rounding could explain says nothing about the images.
_CONSTANT = 1e-6


def observe(
    classifier: Classifier,
    images: Images,
    indices: Sequence[int],
    *,
    batch_size: int = 64,
    device: str | None = None,
    cache: PixelCache | None = None,
) -> Floats:
    """The logits of a model on some probes: (L, m) float32, columns in the order of ``indices``.

    ``images`` gives probes by index. With a cache, the geometry of all probes is computed once per node; where it
    does not fit, only the probes needed are preprocessed. A batch that does not fit into memory is halved, and the
    smaller size kept. The result does not depend on the batch size beyond float32 rounding.

    Raises:
        ItemFailure: OUT_OF_MEMORY where a single image does not fit, CONFIG_MISMATCH where the model fails on its
            declared input or gives anything but L numbers an image, NON_FINITE, CONSTANT where no logit depends
            on the image.
    """
    recipe = classifier.recipe
    device = device or classifier.device
    classifier.module.to(device)
    pixels = cache.pixels(recipe, images) if cache is not None else None
    chosen = np.asarray(indices, dtype=np.int64)
    result = np.empty((classifier.logits, len(chosen)), np.float32)
    start = 0
    while start < len(chosen):
        part = chosen[start : start + batch_size]
        batch = recipe.geometry(images([int(i) for i in part])) if pixels is None else pixels[part]
        logits, batch_size = _forward(classifier, batch, batch_size, device)
        result[:, start : start + len(part)] = logits.T
        start += len(part)
    if not np.isfinite(result).all():
        bad = np.flatnonzero(~np.isfinite(result).all(axis=1))
        raise ItemFailure(
            FailureReason.NON_FINITE, f"{len(bad)} logits are NaN or infinite, {bad[0]} the first"
        )
    if len(chosen) > 1 and (np.ptp(result, axis=1) <= _CONSTANT * np.abs(result).max(axis=1)).all():
        raise ItemFailure(
            FailureReason.CONSTANT, f"all {len(result)} logits are the same on all {len(chosen)} probes"
        )
    return result


def _forward(
    classifier: Classifier, batch: npt.NDArray[Any], step: int, device: str
) -> tuple[npt.NDArray[np.float32], int]:
    """Logits of a batch, (b, L), taken ``step`` images at a time or fewer, and the step that memory allowed."""
    parts: list[npt.NDArray[np.float32]] = []
    start = 0
    while start < len(batch):
        logits = _attempt(classifier, batch[start : start + step], device)
        if logits is not None:
            parts.append(logits)
            start += step
        elif step == 1:
            raise ItemFailure(
                FailureReason.OUT_OF_MEMORY, f"{classifier.architecture}: one image does not fit"
            )
        else:
            step = (min(step, len(batch)) + 1) // 2
    return np.concatenate(parts), step


def _attempt(classifier: Classifier, pixels: npt.NDArray[Any], device: str) -> npt.NDArray[np.float32] | None:
    """Logits (b, L), or None where memory ran out."""
    import torch

    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            batch: torch.Tensor = torch.from_numpy(np.ascontiguousarray(pixels)).to(device)
            logits = classifier.forward(classifier.recipe.normalise(batch))
            return logits.cpu().numpy()
    except ItemFailure:
        raise
    except Exception as error:  # a model that does not fit its declared input fails in any of its layers
        if not out_of_memory(error):
            raise ItemFailure(
                FailureReason.CONFIG_MISMATCH,
                f"{classifier.architecture} fails on its declared input {list(classifier.recipe.shape)}: "
                f"{type(error).__name__}: {str(error)[:300]}",
            ) from error
    # Outside the handler: the traceback would keep the activations alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None

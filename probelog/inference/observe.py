"""One model on its probes: its logits, in batches, as fast as the device allows without changing an answer."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from probelog.errors import FailureReason, ItemFailure
from probelog.inference.execution_plan import WORTH, ExecutionPlan, Plans, Variant
from probelog.inference.folding import Folding, has_norms, pairs_seen
from probelog.inference.pixel_cache import CachedPixels, Images
from probelog.models import memory
from probelog.models.memory import PeakMemory, out_of_memory

if TYPE_CHECKING:
    import torch

    from probelog.models.loading import Classifier

Floats = npt.NDArray[np.float32]

# A row whose values differ by less than rounding could explain says nothing about the images.
_CONSTANT = 1e-6

# Images that a variant must get right before it is used, and by how much their logits may differ from those of the
# plain float32 pass: largest difference over the logits' standard deviation.
_CHECKED = {"float32": 4, "bfloat16": 16, "float16": 16}
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}
# Images a batch on a CPU while variants are tried: the slower one is not to see many. On a GPU small batches tell nothing.
_TRIED_WITH = 64
# Batch normalisations are folded for so many probes or more, if that leaves the logits of so many images as they are:
# largest difference over the logits' standard deviation. (Rounding alone makes about a millionth.)
_FOLDED_FROM = 32
_FOLDED_CHECKED = 4  # as many as a first batch: libraries prepare for every batch size anew
_FOLDED_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Observation:
    """What a model said: ``values`` (L, m) float32, and how it was run.

    ``batch_size`` is the largest batch that was run, ``precision`` the type that matrices were multiplied in
    (float32, bfloat16 or float16), ``layout`` that of images in memory. ``seconds_preprocess`` is the time until
    pixels lay ready, ``seconds_forward`` that from pixels to logits.
    """

    values: Floats = field(repr=False)
    batch_size: int
    precision: str
    layout: str
    seconds_preprocess: float
    seconds_forward: float


def observe(
    classifier: Classifier,
    images: Images,
    indices: Sequence[int],
    *,
    plans: Plans | None = None,
    device: str | None = None,
    cached: CachedPixels | None = None,
) -> Observation:
    """The logits of a model on some probes, columns in the order of ``indices``.

    ``images`` gives probes by index. ``cached`` has the pixels of these probes as this model's recipe makes them;
    without it they are made from the images. ``plans`` bounds batch size, memory and precision, and remembers
    what was learnt about the architecture; pass the same one for every model of a process.

    A batch that does not fit into memory is halved, and the smaller size remembered. The values depend on batch
    size and layout no more than by float32 rounding: a layout is used only where the logits agree within a
    thousandth of their standard deviation, and batch normalisations are folded into convolutions only where this
    model's own logits stay within a ten thousandth. Lower precision, where ``plans`` allows it, is checked on this
    model's own first images: where a logit differs from float32 by more than a twentieth of its standard deviation,
    the model is run in float32.

    Raises:
        ItemFailure: OUT_OF_MEMORY where a single image does not fit, CONFIG_MISMATCH where the model fails on its
            declared input or gives anything but L numbers an image, NON_FINITE, CONSTANT where no logit depends
            on the image, INTERNAL where the pixels in ``cached`` changed after they were written.
    """
    device = device or classifier.device
    classifier.module.to(device)
    chosen = np.asarray(indices, dtype=np.int64)
    run = _Run(classifier, device, plans or Plans())
    pixels = _Pixels(classifier, images, chosen, cached)
    begun = time.perf_counter()
    values = run.all(pixels)
    seconds = time.perf_counter() - begun - pixels.seconds
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        raise ItemFailure(
            FailureReason.NON_FINITE, f"{len(bad)} logits are NaN or infinite, {bad[0]} the first"
        )
    if len(chosen) > 1 and (np.ptp(values, axis=1) <= _CONSTANT * np.abs(values).max(axis=1)).all():
        raise ItemFailure(
            FailureReason.CONSTANT, f"all {len(values)} logits are the same on all {len(chosen)} probes"
        )
    return Observation(
        values=values,
        batch_size=run.largest,
        precision=run.variant.precision,
        layout=run.variant.layout,
        seconds_preprocess=pixels.seconds,
        seconds_forward=seconds,
    )


class _Pixels:
    """The probes that one model sees, after its geometry, in the order asked for."""

    def __init__(
        self,
        classifier: Classifier,
        images: Images,
        chosen: npt.NDArray[np.int64],
        cached: CachedPixels | None,
    ) -> None:
        self._recipe, self._images, self._chosen, self._cached = classifier.recipe, images, chosen, cached
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._chosen)

    def batch(self, start: int, size: int) -> npt.NDArray[Any]:
        """(b, C, H, W) of the probes from a place in the order on."""
        begun = time.perf_counter()
        part = self._chosen[start : start + size].tolist()
        if self._cached is not None:
            pixels = self._cached.rows(part)
        else:
            pixels = self._recipe.geometry(self._images(part))
        self.seconds += time.perf_counter() - begun
        return pixels


class _Run:
    """One model going through its probes, while what is known of its kind gets better.

    Variants are tried on the model's own batches: one to warm up, one that is timed, then the same with the variant.
    """

    def __init__(self, classifier: Classifier, device: str, plans: Plans) -> None:
        self._classifier, self._device, self._plans = classifier, device, plans
        self._clock = (
            time.thread_time if device.startswith("cpu") else time.perf_counter
        )  # blind to other programs
        self.plan: ExecutionPlan = plans.plan(classifier, device)
        self.variant = Variant()
        self.largest = 0
        self._pace: float | None = None  # seconds an image of the last batch, None for one that says nothing
        self._best: float | None = None  # the pace of the plan's variant
        self._warm = False
        self._trying = False

    def all(self, pixels: _Pixels) -> Floats:
        """The logits of all probes, (L, m)."""
        result = np.empty((self._classifier.logits, len(pixels)), np.float32)
        start = 0
        while start < len(pixels):
            size = self._size()
            batch = pixels.batch(start, size)
            if start == 0:
                self._begin(batch, len(pixels))
            logits = self._run(batch, size)
            result[:, start : start + len(batch)] = logits.T
            start += len(batch)
            if start < len(pixels):
                self._improve(batch, logits)
        if self._trying:  # the probes ended in the middle of a trial
            self._switch(self.plan.variant)
        self._plans.remember(self._classifier, self._device, self.plan)
        return result

    def _size(self) -> int:
        """Of the next batch."""
        tries = self.plan.measured and self.plan.untried and self._device.startswith("cpu")
        return min(self.plan.batch_size, _TRIED_WITH) if tries else self.plan.batch_size

    def _run(self, batch: npt.NDArray[Any], size: int) -> Floats:
        """Logits of a batch that was to hold ``size`` images, (b, L); learns its need of memory and its pace."""
        memory = None if self.plan.measured else PeakMemory(self._device)
        begun = self._clock()
        logits, step = _forward(self._classifier, batch, size, self._device, self.variant)
        seconds = self._clock() - begun
        self.largest = max(self.largest, min(step, len(batch)))
        whole = step == size == len(batch)
        self._pace = seconds / len(batch) if self._warm and whole else None
        self._warm = True
        if step < size:
            self.plan = replace(self.plan, batch_size=step, measured=True)
        elif memory is not None:
            self.plan = self._plans.sized(
                self.plan, memory.grown() / len(batch), self._classifier, self._device
            )
            self._warm = False
        return logits

    def _fold(self, few: npt.NDArray[Any]) -> None:
        """Fold batch normalisations into convolutions, unless that gives other logits for a few images."""
        module = self._classifier.module
        if not has_norms(module):
            return
        exact: list[Floats] = []
        pairs = pairs_seen(module, lambda: exact.append(self._logits(few)))
        if not pairs:
            return
        folding = Folding(pairs)
        try:
            away = np.abs(self._logits(few) - exact[0]).max()
        except ItemFailure:  # where the model ran before
            away = np.inf
        # Two images can be alike for one logit, hardly for all.
        spread = np.sqrt(np.square(exact[0] - exact[0].mean(axis=0)).mean())
        if not away <= _FOLDED_TOLERANCE * max(spread, _CONSTANT * np.abs(exact[0]).max()):
            folding.undo()

    def _logits(self, few: npt.NDArray[Any]) -> Floats:
        return _forward(self._classifier, few, len(few), self._device, self.variant)[0]

    def _begin(self, batch: npt.NDArray[Any], count: int) -> None:
        """Take over what was learnt from other models of this kind. Lower precision must suit this model too."""
        variant = self.plan.variant
        self._switch(replace(variant, precision="float32"))
        if count >= _FOLDED_FROM:
            self._fold(batch[:_FOLDED_CHECKED])
        if variant.precision != "float32":
            few = batch[: _CHECKED[variant.precision]]
            self._try(variant, few, self._logits(few))

    def _improve(self, batch: npt.NDArray[Any], logits: Floats) -> None:
        """Choose how the next batch is run, now that this one was."""
        if self._pace is None or not self.plan.untried:
            return
        if self._trying:
            assert self._best is not None
            if self._pace < WORTH * self._best:
                self.plan, self._best = replace(self.plan, variant=self.variant), self._pace
            else:
                self._switch(self.plan.variant)
            self.plan, self._trying = replace(self.plan, untried=self.plan.untried[1:]), False
        else:
            self._best = self._pace
            if self._try(self.plan.untried[0], batch, logits):
                self._trying = True
            else:
                self.plan = replace(self.plan, untried=self.plan.untried[1:])

    def _try(self, variant: Variant, batch: npt.NDArray[Any], exact: Floats) -> bool:
        """Switch to a variant, unless it gives other logits than the plain pass gave for this batch."""
        previous, count = self.variant, min(len(batch), _CHECKED[variant.precision])
        self._switch(variant)
        logits = self._logits(batch[:count])
        spread = np.maximum(exact.std(axis=0), _CONSTANT * np.abs(exact).max(axis=0))
        if np.all(np.abs(logits - exact[:count]) <= _TOLERANCE[variant.precision] * spread):
            return True
        self._switch(previous)
        return False

    def _switch(self, variant: Variant) -> None:
        if variant.layout != self.variant.layout:
            self._classifier.module.to(memory_format=_memory_format(variant))
        self.variant, self._warm = variant, False


def _forward(
    classifier: Classifier, batch: npt.NDArray[Any], step: int, device: str, variant: Variant
) -> tuple[Floats, int]:
    """Logits of a batch, (b, L), taken ``step`` images at a time or fewer, and the step that memory allowed."""
    parts: list[Floats] = []
    start = 0
    while start < len(batch):
        logits = _attempt(classifier, batch[start : start + step], device, variant)
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


def _attempt(
    classifier: Classifier, pixels: npt.NDArray[Any], device: str, variant: Variant
) -> Floats | None:
    """Logits (b, L), or None where memory ran out."""
    import torch

    try:
        with torch.inference_mode(), warnings.catch_warnings(), _precision(device, variant):
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            batch: torch.Tensor = torch.from_numpy(np.ascontiguousarray(pixels)).to(device)
            batch = classifier.recipe.normalise(batch)
            if variant.layout == "channels_last":  # after it: arithmetic by channel is slow in that layout
                batch = batch.contiguous(memory_format=torch.channels_last)
            logits = classifier.forward(batch)
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
    memory.keep_nothing()
    return None


def _precision(device: str, variant: Variant) -> contextlib.AbstractContextManager[object]:
    import torch

    if variant.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, getattr(torch, variant.precision))


def _memory_format(variant: Variant) -> torch.memory_format:
    import torch

    return torch.channels_last if variant.layout == "channels_last" else torch.contiguous_format

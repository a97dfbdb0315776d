"""A generator that is ready to run, and the samples that it makes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from probelog.errors import FailureReason, ItemFailure
from probelog.generators import seeds
from probelog.models import memory
from probelog.models.memory import PeakMemory, out_of_memory
from probelog.weights.reader import LayerFacts

if TYPE_CHECKING:
    import torch

Pixels = npt.NDArray[np.uint8]
#: Makes pictures (B, C, H, W), -1 to 1, of starting noise and of a condition for each: a class or an index of the prompts.
Draw = Callable[["torch.Tensor", Sequence[int]], "torch.Tensor"]

# The first batch of a process whose memory is bounded: small, to measure what a sample takes.
_FIRST_BATCH = 4
# Of the free memory that a batch may take: measurements are not exact.
_MEMORY_SHARE = 0.8
# A shorter type must be so much faster, and make so nearly the same of the first samples: mean distance of a pixel's values, in
# units of how far those of different samples are apart.
_WORTH, _TOLERANCE = 0.95, 0.1


@dataclass(frozen=True)
class Samples:
    """Pictures that a generator made, (m, H, W, 3).

    Attributes:
        pixels: of the model.
        base: of an adapter's base, from the same noise and the same prompts.
        prompts: for each sample the index of its prompt.
        classes: for each sample its class.
        batch_size: how many were made at once.
        precision: what matrices were multiplied in.
    """

    pixels: Pixels = field(repr=False)
    base: Pixels | None = field(default=None, repr=False)
    prompts: list[int] | None = None
    classes: list[int] | None = None
    batch_size: int = 1
    precision: str = "float32"


@dataclass
class Generator:
    """A model that is ready to run, and what is known about it.

    Attributes:
        pipeline: one of `probelog.generators.layout.KINDS`.
        architecture: the class of the network that makes the picture.
        conditioning: ``none``, ``class`` or ``text``.
        shape: of the noise that one sample starts from.
        size: of a picture, height and width.
        draw: makes pictures.
        draw_base: likewise without the adapter.
        classes: how many there are.
        class_names: as declared; may be fewer or none.
        prompts: those that are used, in order.
        trigger_words: that the repository declares.
        modules: the networks, by role.
        available: how many samples there are at all; None for a model that can make any number.
        identity: equal for models that make the same pictures.
    """

    pipeline: str
    architecture: str
    conditioning: str
    shape: tuple[int, ...]
    size: tuple[int, int]
    draw: Draw = field(repr=False)
    parameters: int
    dtype: str
    weight_digest: str
    identity: str
    layers: list[LayerFacts] = field(repr=False)
    draw_base: Draw | None = field(default=None, repr=False)
    classes: int = 0
    class_names: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    trigger_words: list[str] = field(default_factory=list)
    modules: Mapping[str, torch.nn.Module] = field(default_factory=dict, repr=False)
    available: int | None = None
    device: str = "cpu"

    def conditions(self, seed: int, numbers: Sequence[int]) -> list[int]:
        """For each sample its class, the index of its prompt, or the picture of a gallery; 0 where there is nothing."""
        if self.available is not None:
            return list(numbers)
        if self.conditioning == "class":
            return seeds.classes(seed, self.architecture, self.classes, numbers)
        return [number % max(1, len(self.prompts)) for number in numbers]


class Sampler:
    """Samples one generator, in batches that fit."""

    def __init__(
        self,
        generator: Generator,
        *,
        seed: int,
        batch_size: int,
        memory_bytes: int | None = None,
        lower: str | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """``batch_size`` is the largest, ``memory_bytes`` this process's share of the device's memory, ``lower`` a shorter
        type (bfloat16, float16) to multiply matrices in, if that makes the first samples faster, by a ``clock``, and
        nearly the same.
        """
        self._generator, self._seed = generator, seed
        self._most, self._memory_bytes = batch_size, memory_bytes
        self._measured = memory.free_memory(generator.device, memory_bytes) is None
        self._batch_size = batch_size if self._measured else min(_FIRST_BATCH, batch_size)
        # A gallery's pictures are only read.
        self._precision, self._untried = "float32", None if generator.available is not None else lower
        # A CPU's is blind to other programs.
        self._clock = clock or (time.thread_time if generator.device == "cpu" else time.perf_counter)

    def sample(self, numbers: Sequence[int], *, base: bool = True) -> Samples:
        """The samples of these numbers, each the same whatever others are asked for with it.

        ``base``: of an adapter, its base's as well.

        Raises:
            ItemFailure: NON_FINITE, CONSTANT (every picture is of one colour), CONFIG_MISMATCH (the parts do not fit
                together), OUT_OF_MEMORY (a single one does not fit).
        """
        made = self._generator
        if made.available is not None and max(numbers) >= made.available:
            raise ItemFailure(FailureReason.NOT_FOUND, f"there are {made.available} samples and no more")
        pixels = self._drawn(made.draw, numbers)
        others = self._drawn(made.draw_base, numbers) if base and made.draw_base is not None else None
        conditions = made.conditions(self._seed, numbers)
        if all(int(picture.max()) - int(picture.min()) <= 1 for picture in pixels):
            raise ItemFailure(FailureReason.CONSTANT, f"all of {len(pixels)} samples are of one colour")
        return Samples(
            pixels,
            others,
            conditions if made.conditioning == "text" else None,
            conditions if made.conditioning == "class" else None,
            self._batch_size,
            self._precision,
        )

    def _drawn(self, draw: Draw, numbers: Sequence[int]) -> Pixels:
        pictures: list[Pixels] = []
        while len(pictures) < len(numbers):
            some = numbers[len(pictures) : len(pictures) + self._batch_size]
            try:
                pictures += self._batch(draw, some) if self._untried is None else self._first(draw, some)
            except Exception as error:  # a foreign network given foreign settings raises anything
                if self._precision != "float32" and not out_of_memory(error):
                    self._precision = "float32"  # later samples may overflow where the first ones did not
                    continue
                if isinstance(error, ItemFailure):
                    raise
                if not out_of_memory(error):
                    raise ItemFailure(
                        FailureReason.CONFIG_MISMATCH,
                        f"{self._generator.architecture} cannot run as described: {type(error).__name__}: "
                        f"{str(error)[:300]}",
                    ) from error
                if self._batch_size == 1:
                    raise ItemFailure(
                        FailureReason.OUT_OF_MEMORY, f"one sample: {str(error)[:300]}"
                    ) from error
                self._measured, self._batch_size = True, self._batch_size // 2
        return np.stack(pictures)

    def _first(self, draw: Draw, numbers: Sequence[int]) -> list[Pixels]:
        """The first samples, by which it is decided in what precision all are made."""
        few, rest = numbers[:_FIRST_BATCH], numbers[_FIRST_BATCH:]
        self._batch(draw, few[:1])  # libraries load what they need when it is first used
        exact, slow = self._timed(draw, few)
        self._precision, self._untried = str(self._untried), None
        try:
            tried, fast = self._timed(draw, few)
        except (ItemFailure, RuntimeError):  # some networks overflow, and for some there is no kernel
            tried, fast = [], slow
        if fast >= _WORTH * slow or not alike(exact, tried):
            self._precision, tried = "float32", exact
        return tried + (self._batch(draw, rest) if rest else [])

    def _timed(self, draw: Draw, numbers: Sequence[int]) -> tuple[list[Pixels], float]:
        begun = self._clock()
        pictures = self._batch(draw, numbers)
        return pictures, self._clock() - begun

    def _batch(self, draw: Draw, numbers: Sequence[int]) -> list[Pixels]:
        import torch

        made = self._generator
        peak = None if self._measured else PeakMemory(made.device)
        noise = np.stack([seeds.noise(self._seed, made.architecture, one, made.shape) for one in numbers])
        shorter: AbstractContextManager[object] = nullcontext()
        if self._precision != "float32":
            shorter = torch.autocast(torch.device(made.device).type, getattr(torch, self._precision))
        with torch.inference_mode(), shorter:
            drawn = draw(torch.from_numpy(noise).to(made.device), made.conditions(self._seed, numbers))
            pictures = as_pixels(drawn)
        if pictures[0].shape[:2] != made.size:
            raise ItemFailure(
                FailureReason.CONFIG_MISMATCH,
                f"pictures of {pictures[0].shape[:2]} pixels where {made.size} are described",
            )
        if peak is not None:
            self._fit(peak.grown() / len(numbers))
        return pictures

    def _fit(self, bytes_a_sample: float) -> None:
        """The largest batch that fits, a power of two."""
        self._measured, self._batch_size = True, self._most
        free = memory.free_memory(self._generator.device, self._memory_bytes)
        if free is not None and bytes_a_sample > 0:
            fits = max(1, int(_MEMORY_SHARE * free / bytes_a_sample))
            self._batch_size = min(self._most, 1 << (fits.bit_length() - 1))


def alike(exact: Sequence[Pixels], tried: Sequence[Pixels]) -> bool:
    """Whether pictures are nearly the same, for how far different ones are apart."""
    one, other = np.stack(exact).astype(np.float32), np.stack(tried).astype(np.float32)
    apart = np.abs(one - one.mean(axis=0)).mean() if len(one) > 1 else one.std()
    return bool(np.abs(one - other).mean() <= _TOLERANCE * apart)


def as_pixels(drawn: torch.Tensor) -> list[Pixels]:
    """Pictures (B, C, H, W), -1 to 1, as bytes (H, W, 3).

    Raises:
        ItemFailure: NON_FINITE, CONFIG_MISMATCH where it is no picture.
    """
    if drawn.ndim != 4 or drawn.shape[1] not in (1, 3):
        raise ItemFailure(FailureReason.CONFIG_MISMATCH, f"{list(drawn.shape)} is no batch of pictures")
    if not bool(drawn.isfinite().all()):
        raise ItemFailure(FailureReason.NON_FINITE, "a sample holds NaN or infinite numbers")
    scaled: Any = ((drawn.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    pixels = scaled.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    return list(np.ascontiguousarray(pixels))

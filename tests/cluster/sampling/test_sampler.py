"""How many samples a worker has a generator make: some, and more where one half of them shows something else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.probing.worker import Clock
from cluster.runtime.settings import WorkerSettings
from cluster.sampling.sampler import Sampler, SamplerSpec
from probelog.sandbox.generators import LoadedGenerator, SampledImages

NAMES = np.eye(12, 16, dtype=np.float32)


class Encoder:
    """Pictures show the name whose number their first pixel is."""

    def embed_images(self, pictures: Iterator[Image.Image]) -> np.ndarray[Any, Any]:
        return np.stack([NAMES[np.asarray(picture)[0, 0, 0]] for picture in pictures])


class Process:
    """A generator whose samples show the numbers that it is given, over and over; each takes a second of its time."""

    def __init__(self, shows: Sequence[int], clock: Clock) -> None:
        self.asked = list[list[int]]()
        self._shows, self._clock = shows, clock

    def sample(self, numbers: Sequence[int], timeout: float, *, base: bool) -> SampledImages:
        self.asked.append(list(numbers))
        self._clock.used += len(numbers)
        self._clock.seconds["sample"] = self._clock.used
        shown = np.array([self._shows[number % len(self._shows)] for number in numbers], np.uint8)
        return SampledImages(np.broadcast_to(shown[:, None, None, None], (len(numbers), 4, 4, 3)))


class Alone(Sampler):
    """A worker without a coordinator."""

    def __init__(self, spec: SamplerSpec) -> None:
        self._spec, self._encoder = spec, Encoder()  # type: ignore[assignment]

    @contextlib.contextmanager
    def _computes(self, process: Any, clock: Clock) -> Iterator[None]:
        yield


NEVER = [0] * 8 + [1, 2, 3, 4, 5, 6] * 10


@pytest.mark.parametrize(
    ("shows", "most", "available", "seconds", "expected"),
    [
        ([3], 64, None, 1e6, 16),
        ([0] * 8 + [1, 2, 3, 4] * 2, 64, None, 1e6, 16),
        ([0] * 8 + [1, 2, 3, 4, 5, 6, 1, 2] + [0] * 48, 64, None, 1e6, 32),
        (NEVER, 64, None, 1e6, 64),
        (NEVER, 40, None, 1e6, 40),
        (NEVER, 4, None, 1e6, 16),
        (NEVER, 64, 20, 1e6, 20),
        (NEVER, 64, 5, 1e6, 5),
        (NEVER, 64, None, 45.0, 16),
    ],
)
def test_more_samples_where_the_halves_disagree(
    shows: list[int], most: int, available: int | None, seconds: float, expected: int
) -> None:
    spec = SamplerSpec(
        store="", folder="", endpoint="", max_bytes=1, max_params=1, settings=WorkerSettings(), encoder="",
        encoder_digest="", samples=16, max_samples=most, names=NAMES, steps=1, seed=0, prompts=(), max_image_size=4,
    )  # fmt: skip
    clock = Clock(seconds)
    process = Process(shows, clock)
    loaded = LoadedGenerator({}, None, (4, 4), available=available)
    samples = Alone(spec)._sample(process, loaded, clock, with_base=False)  # type: ignore[arg-type]
    assert [number for numbers in process.asked for number in numbers] == [*range(expected)]
    assert len(samples.features) == expected
    assert len(samples.thumbnails) == min(12, expected)

"""What a sample starts from: pure functions of the set's seed, the architecture and the sample's number.

Models of one architecture start from the same noise, so that what differs between their samples is the models. Nothing of a
repository has a say in it beyond the name of a class on the list and the shape of what is sampled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def noise(seed: int, architecture: str, number: int, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Standard normal numbers."""
    return _random(seed, architecture, number).standard_normal(tuple(shape), np.float32)


def classes(seed: int, architecture: str, count: int, numbers: Sequence[int]) -> list[int]:
    """The class of each sample: in a random order of all ``count``, over and over."""
    order = _random(seed, architecture, "classes").permutation(count)
    return [int(order[number % count]) for number in numbers]


def _random(*what: int | str) -> np.random.Generator:
    digest = hashlib.sha256(json.dumps(what).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))

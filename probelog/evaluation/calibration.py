"""Hubness calibration, the same for every method that has it (arXiv 2502.09619, second version)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from probelog.arrays import Floats, Ints
from probelog.completion import scoring

# How many of the nearest background concepts count. The paper does not publish its choice.
NEAREST = 20


def calibrated(
    distances: Floats, to_background: Floats, excluded: Sequence[Ints], k: int = NEAREST
) -> Floats:
    """Scores (C, L) ``h(l, c) - d(l, c)``, ``h`` the mean of the k smallest distances to background concepts.

    A query's excluded background concepts do not count for it; where none is left, ``h`` is 0.

    Args:
        distances: (L, C), of one model's logits to the queries.
        to_background: (L, B), of the same logits to the background.
        excluded: for each query the numbers of its excluded background concepts.
        k: how many of the nearest count.
    """
    spare = max((len(numbers) for numbers in excluded), default=0)
    nearest = scoring.nearest_background(to_background, k + spare)
    offsets = [scoring.calibration_offsets(nearest, k, numbers) for numbers in excluded]
    return np.reshape(offsets, distances.T.shape) - distances.T

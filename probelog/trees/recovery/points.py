"""Models as points: all sketches of a model in one row, each layer in units of its mean length in the component."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats, Ints
from probelog.trees.families.family import Family

_BLOCK = 2**20


class Points:
    """The points of a family's models.

    ``component`` (n,) says which of them are compared with each other, ``counted`` (n,) whose lengths make the mean.
    """

    def __init__(self, family: Family, component: Ints, counted: npt.NDArray[np.bool_]) -> None:
        self._family = family
        names, self._component = np.unique(component, return_inverse=True)
        layers = len(family.layers)
        total = np.zeros((len(names), layers))
        step = max(_BLOCK // max(family.statistics.shape[1], 1), 1)
        for begin in range(0, len(family), step):
            sketches = family.sketches[begin : begin + step].astype(np.float64)
            lengths = np.sqrt(np.einsum("nlk,nlk->nl", sketches, sketches))
            counts = counted[begin : begin + step]
            np.add.at(total, self._component[begin : begin + step][counts], lengths[counts])
        mean = total / np.maximum(np.bincount(self._component[counted], minlength=len(names)), 1)[:, None]
        self._scales = np.divide(1, mean, out=np.zeros_like(mean), where=mean > 0)

    def of(self, models: Ints) -> Floats:
        """(m, L * 32)."""
        sketches = self._family.sketches[models].astype(np.float64)
        sketches *= self._scales[self._component[models]][:, :, None]
        return sketches.reshape(len(models), sketches.shape[1] * sketches.shape[2])

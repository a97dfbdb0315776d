"""How sketches become pictures in the encoder's space: ridge regression from the probes' edge maps to the probes.

Encoders know drawings of lines less well than pictures, and place them elsewhere. What a linear map can set right is learned
from pairs that every index has: the embedding of a probe's edge map, and of the probe. No model is part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probelog.arrays import Floats
from probelog.ranking.samples.description import Float32s, unit

# Penalty in units of the mean squared length of the centred sketches.
RIDGE = 0.01


@dataclass(frozen=True, eq=False)
class SketchMap:
    """``x -> picture``: from the embedding of a sketch to that of the picture it stands for.

    Attributes:
        sketches: (d,) mean embedding of the sketches.
        pictures: (d,) mean embedding of the pictures.
        matrix: (d, d).
        length: mean distance of the pictures from their mean, which the regression shrinks.
    """

    sketches: Float32s
    pictures: Float32s
    matrix: Float32s
    length: float

    @classmethod
    def fit(cls, sketches: Floats, pictures: Floats, ridge: float = RIDGE) -> SketchMap:
        """Fit to n pairs of unit embeddings (n, d)."""
        drawn, shown = (np.asarray(item, np.float64) for item in (sketches, pictures))
        centres = drawn.mean(axis=0), shown.mean(axis=0)
        drawn, shown = drawn - centres[0], shown - centres[1]
        system = drawn.T @ drawn
        penalty = ridge * max(float(np.trace(system)), 1e-12)
        matrix = np.linalg.solve(system + penalty * np.eye(len(system)), drawn.T @ shown)
        before, after, single = (np.asarray(item, np.float32) for item in (*centres, matrix))
        return cls(before, after, single, float(np.linalg.norm(shown, axis=1).mean()))

    @classmethod
    def from_array(cls, array: Floats) -> SketchMap:
        """The map from ``array``'s matrix (d + 3, d)."""
        rows = np.asarray(array, np.float32)
        return cls(rows[0], rows[1], rows[3:], float(rows[2, 0]))

    def array(self) -> Float32s:
        """Means, length and matrix as one matrix (d + 3, d), for storing."""
        return np.concatenate(
            [[self.sketches, self.pictures, np.full_like(self.pictures, self.length)], self.matrix]
        )

    def pictures_of(self, sketches: Floats) -> Float32s:
        """Unit embeddings (s, d) of what sketches (s, d) stand for."""
        shown = unit((np.asarray(sketches, np.float32) - self.sketches) @ self.matrix)
        return np.asarray(unit(self.length * shown + self.pictures), np.float32)

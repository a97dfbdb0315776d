"""Descriptions of generators: mean, low-rank plus diagonal covariance, and features of what they made.

A *feature* is the encoder's embedding of one sample, of length 1. Everything here is a plain statistic of features, in
the encoder's space or in coordinates of a basis of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats, Ints

Float32s = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

# Principal directions of a model's covariance that are kept; the rest of the variance is kept by coordinate.
RANK = 8


class Moments(NamedTuple):
    """Mean and covariance of one model's features: ``axes^T diag(variances) axes + diag(diagonal)``.

    Attributes:
        mean: (d,).
        axes: (k, d) orthonormal, or zero where there are fewer.
        variances: (k,) along them.
        diagonal: (d,) what they leave of each coordinate's variance.
    """

    mean: Float32s
    axes: Float32s
    variances: Float32s
    diagonal: Float32s

    @classmethod
    def of(cls, features: Floats, rank: int = RANK) -> Moments:
        """Moments of the features (m, d) of one model, m at least 1."""
        rows = np.asarray(features, np.float64)
        mean = rows.mean(axis=0)
        centred = rows - mean
        _, lengths, directions = np.linalg.svd(centred, full_matrices=False)
        kept = min(rank, int(np.count_nonzero(lengths > 1e-9 * max(1.0, float(lengths.max(initial=0))))))
        axes, variances = np.zeros((rank, rows.shape[1])), np.zeros(rank)
        axes[:kept], variances[:kept] = directions[:kept], np.square(lengths[:kept]) / len(rows)
        diagonal = np.maximum(np.square(centred).mean(axis=0) - variances @ np.square(axes), 0.0)
        return cls(*(part.astype(np.float32) for part in (mean, axes, variances, diagonal)))


@dataclass(frozen=True, eq=False)
class Descriptions:
    """N described generators.

    Attributes:
        means: (N, d).
        axes: (N, k, d), as of ``Moments``.
        variances: (N, k).
        diagonal: (N, d).
        features: (F, d) of all models beneath each other, those of one model beside each other.
        counts: (N,) numbers of features; the sum is F.
    """

    means: Float32s
    axes: Float32s
    variances: Float32s
    diagonal: Float32s
    features: Float32s
    counts: Ints

    @classmethod
    def of(cls, features: Iterable[Floats], rank: int = RANK) -> Descriptions:
        """Describe models by their features, (m, d) each."""
        rows = [np.asarray(item, np.float32) for item in features]
        return cls.joined([Moments.of(item, rank) for item in rows], rows)

    @classmethod
    def joined(cls, moments: Sequence[Moments], features: Sequence[Float32s]) -> Descriptions:
        """From one or more models' moments, and the features (m, d) of each that are kept."""
        means, axes, variances, diagonal = (np.stack(parts) for parts in zip(*moments, strict=True))
        counts = np.array([len(rows) for rows in features], np.int64)
        return cls(means, axes, variances, diagonal, np.concatenate(features), counts)

    def __len__(self) -> int:
        return len(self.means)

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """(N,) number of each model's first feature."""
        return np.asarray(np.cumsum(self.counts) - self.counts, np.int64)

    def at(self, places: Ints) -> Descriptions:
        """Those at some positions, in their order."""
        starts, counts = self.starts[places], self.counts[places]
        ends = np.cumsum(counts)
        rows = np.arange(int(counts.sum())) + np.repeat(starts - (ends - counts), counts)
        return Descriptions(
            self.means[places],
            self.axes[places],
            self.variances[places],
            self.diagonal[places],
            self.features[rows],
            counts,
        )

    def transformed(self, matrix: Floats) -> Descriptions:
        """Models described by their features, each times a matrix (d, e), scaled to length 1."""
        moved = unit(self.features @ np.asarray(matrix, np.float32))
        return Descriptions.of(np.split(moved, np.cumsum(self.counts)[:-1]), self.axes.shape[1])


class Difference(NamedTuple):
    """How what an adapter makes differs from what its base makes of the same seeds and prompts (CARLoS, CVPR 2026).

    Attributes:
        direction: (d,) of the mean difference, of length 1; zeros where there is none.
        strength: length of the mean difference.
        consistency: mean cosine of each sample's difference to the direction, from -1 to 1.
    """

    direction: Float32s
    strength: float
    consistency: float

    @classmethod
    def of(cls, features: Floats, base: Floats) -> Difference:
        """Of an adapter's features (m, d) and its base's (m, d), sample by sample."""
        differences = np.asarray(features, np.float64) - np.asarray(base, np.float64)
        mean = differences.mean(axis=0)
        direction = unit(mean[None])[0]
        return cls(
            direction.astype(np.float32),
            float(np.linalg.norm(mean)),
            float((unit(differences) @ direction).mean()),
        )


def unit(rows: Floats) -> Floats:
    """Rows (n, d) scaled to length 1; rows of zeros remain."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1.0), rows.dtype)

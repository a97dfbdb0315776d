"""Encoding of directions in the index: coordinates in an orthonormal basis, the most informative ones more exactly.

The score ``s(l, c) = b w_l.w_c - o_l`` (``probelog.ranking.matched_heads``) is linear in the query, so that the logits that score
best are those of largest inner product of ``[w_l, -o_l / b]`` and ``[w_c, 1]`` (maximum inner-product search). A
rotation changes no inner product, and a few dozen coordinates of a good one hold nearly all of each: those along the
principal components of the stored directions *and* of the queries. The logits' principal components alone (PCA) are
not enough, for logits differ little where the names of concepts differ; so the basis holds the eigenvectors of the sum
of the two covariances, each divided by its trace.

The first coordinates are float16. The others are small: a byte each (symmetric linear quantisation; Jacob et al. 2018,
section 2.1, with a zero point of 0), by a scale of each direction's own. Together they give scores to some
thousandths. A vector index over the first ones, less their mean, which ranks no logit before another, and the offset
as one more, finds the logits worth scoring (``probelog.index.shortlist``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats
from probelog.ranking.matched_heads import Background

# Coordinates in float16. With the offset they make 64 numbers; RaBitQ (IVF_RQ) would fill up any to a power of two.
PRECISE = 63
# Bytes of an encoded direction; of an encoder with more dimensions the least informative coordinates are left out.
BYTES = 448
_SCALE_BYTES = 4
_LARGEST = 127
# LanceDB's IVF_RQ requires a multiple of it.
_STEP = 8

Float32s = npt.NDArray[np.float32]


class EncodedDirections(NamedTuple):
    """N encoded directions.

    Attributes:
        precise: (N, s) the first coordinates.
        rest: (N, p - s) the other coordinates, in units of ``scales``.
        scales: (N,) step of each direction's ``rest``.
    """

    precise: npt.NDArray[np.float16]
    rest: npt.NDArray[np.int8]
    scales: Float32s


@dataclass(frozen=True, eq=False)
class Basis:
    """An orthonormal basis of the encoder's space, and the encoding of directions in it.

    Attributes:
        axes: (p, d) orthonormal, the most informative first; p = d, or as many as ``BYTES`` allow.
        centre: (d,) mean direction of the sample it was fitted on.
        middle: mean offset of that sample.
        sharpness: inverse temperature ``b`` of the scores.
    """

    axes: Float32s
    centre: Float32s
    middle: float
    sharpness: float

    @classmethod
    def fit(cls, directions: Floats, background: Background) -> Basis:
        """Fit to the directions of a sample of the logits (S, d), with the background's as a sample of the queries.

        Measured on a million synthetic logits with 63 coordinates: a list of 500 holds .99 of the exact ten for names
        that the background lacks; with the logits' own principal components (48) .57.
        """
        sample = np.asarray(directions, np.float64)
        _, vectors = np.linalg.eigh(
            normalised_covariance(sample) + normalised_covariance(background.directions)
        )  # ascending
        axes = vectors[:, ::-1].T[: BYTES - PRECISE - _SCALE_BYTES]
        offsets = background.offsets(sample)
        return cls(
            np.ascontiguousarray(axes, np.float32),
            sample.mean(axis=0).astype(np.float32),
            float(offsets.mean()),
            background.sharpness,
        )

    @classmethod
    def from_array(cls, array: Floats, middle: float, sharpness: float) -> Basis:
        """The basis from ``array``'s matrix (1 + p, d)."""
        rows = np.asarray(array, np.float32)
        return cls(rows[1:], rows[0], middle, sharpness)

    def array(self) -> Float32s:
        """Centre and axes as one matrix (1 + p, d), for storing."""
        return np.concatenate([self.centre[None], self.axes])

    @property
    def precise(self) -> int:
        """Number of coordinates that are stored as float16."""
        return min(PRECISE, len(self.axes))

    @property
    def width(self) -> int:
        """Length w of the vectors of the vector index: precise coordinates and offset, padded to a multiple of 8."""
        return -(-(self.precise + 1) // _STEP) * _STEP

    def coordinates(self, directions: Floats) -> Float32s:
        """Coordinates (N, p) of directions (N, d), or (p,) of one (d,)."""
        return np.asarray(np.asarray(directions, np.float32) @ self.axes.T)

    def directions(self, coordinates: Float32s) -> Float32s:
        """Directions (N, d) from coordinates (N, p)."""
        return np.asarray(coordinates @ self.axes)

    def encode(self, directions: Floats) -> EncodedDirections:
        """Encode directions (N, d). They must be finite, which the publisher's checks ensure."""
        coordinates = self.coordinates(directions)
        rest = coordinates[:, self.precise :]
        largest = np.abs(rest).max(axis=1, initial=0.0)
        scales = np.where(largest > 0, largest, 1.0).astype(np.float32) / np.float32(_LARGEST)
        return EncodedDirections(
            coordinates[:, : self.precise].astype(np.float16),
            np.rint(rest / scales[:, None]).astype(np.int8),
            scales,
        )

    def decode(self, encoded: EncodedDirections) -> Float32s:
        """Coordinates (N, p) of the encoded directions, normalised to unit length; not finite where these are not."""
        out = np.empty((len(encoded.scales), len(self.axes)), np.float32)
        out[:, : self.precise] = encoded.precise
        np.multiply(encoded.rest, encoded.scales[:, None], out=out[:, self.precise :], dtype=np.float32)
        lengths = np.sqrt(np.einsum("nd,nd->n", out, out))
        # A direction of zeros has no length.
        out /= np.where(lengths == 0, np.float32(1.0), lengths)[:, None]
        out[~np.isfinite(lengths)] = np.nan
        return out

    def vectors(self, coordinates: Float32s, offsets: Floats) -> npt.NDArray[np.float16]:
        """Vectors (N, w) for the vector index, from logits' coordinates (N, p) and offsets (N,)."""
        out = np.zeros((len(coordinates), self.width), np.float16)
        out[:, : self.precise] = coordinates[:, : self.precise] - self.axes[: self.precise] @ self.centre
        out[:, self.precise] = (self.middle - np.asarray(offsets)) / self.sharpness
        return out

    def query(self, coordinates: Float32s) -> Float32s:
        """Vector (w,) to search the vector index with, from a query's coordinates (p,)."""
        out = np.zeros(self.width, np.float32)
        out[: self.precise] = coordinates[: self.precise]
        out[self.precise] = 1.0
        return out


def normalised_covariance(rows: Floats) -> npt.NDArray[np.float64]:
    """Covariance (d, d) of rows (N, d), scaled to trace 1; zeros where the rows do not vary."""
    if not len(rows):
        return np.zeros((rows.shape[1], rows.shape[1]))
    centred = np.asarray(rows, np.float64) - np.mean(rows, axis=0)
    spread = centred.T @ centred
    return np.asarray(spread / max(float(np.trace(spread)), 1e-12))

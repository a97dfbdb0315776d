"""Encoding of descriptions: coordinates in a basis of the encoder's space, mostly a byte each.

The basis holds the eigenvectors of the summed second moments of features, names and probes, each divided by its trace:
inner products of samples with queries are what it has to keep. With as many coordinates as the encoder has dimensions it
keeps all of them. Features and axes are small integers by a scale of each vector's own (symmetric linear quantisation).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats
from probelog.ranking.samples.description import RANK, Descriptions, Difference, Float32s, Moments
from probelog.ranking.samples.matched import Offsets

# Coordinates of a description: 64 features of 256 bytes each are 16 KB.
MOST_COORDINATES = 256
# Features of a model that are kept; mean and covariance are those of all.
KEPT_FEATURES = 64
_LARGEST = 127


def fit_axes(*rows: Floats) -> Float32s:
    """Orthonormal axes (p, d), the most informative first, from samples (n, d) of whatever is multiplied."""
    width = rows[0].shape[1]
    total = np.zeros((width, width))
    for item in rows:
        second = np.asarray(item, np.float64).T @ np.asarray(item, np.float64)
        total += second / max(float(np.trace(second)), 1e-12)
    _, vectors = np.linalg.eigh(total)  # ascending
    return np.ascontiguousarray(vectors[:, ::-1].T[:MOST_COORDINATES], np.float32)


def description_type(coordinates: int) -> np.dtype[np.void]:
    """One model's description as a value of fixed size.

    ``count`` features are kept; ``difference`` is an adapter's direction away from its base, zeros without one;
    ``offsets`` are those of ``matched.Offsets``, and a 0 that was once another of them.
    """
    return np.dtype(
        [
            ("count", "<u2"),
            ("offsets", "<f4", 3),  # three as in indexes of older versions, and for their clients
            ("mean", "<f2", coordinates),
            ("difference", "<f2", coordinates),
            ("diagonal", "<f2", coordinates),
            ("variances", "<f4", RANK),
            ("axis_scales", "<f4", RANK),
            ("feature_scales", "<f4", KEPT_FEATURES),
            ("axes", np.int8, (RANK, coordinates)),
            ("features", np.int8, (KEPT_FEATURES, coordinates)),
        ]
    )


@dataclass(frozen=True, eq=False)
class StoredDescriptions:
    """Decoded descriptions of N models, in coordinates.

    Attributes:
        described: the descriptions.
        offsets: what the models score for anything.
        differences: (N, p) directions of adapters, zeros for others.
    """

    described: Descriptions
    offsets: Offsets
    differences: Float32s

    def at(self, places: npt.NDArray[np.integer]) -> StoredDescriptions:
        """Those at some positions."""
        offsets = Offsets(*(item[places] for item in self.offsets))
        return StoredDescriptions(self.described.at(places), offsets, self.differences[places])


def encode(features: Floats, difference: Difference | None, axes: Float32s) -> npt.NDArray[np.void]:
    """Describe one model by its features (m, d): a value (1,) of ``description_type``, whose offsets are still 0."""
    rows = np.asarray(features, np.float32) @ axes.T
    moments, kept = Moments.of(rows), rows[:KEPT_FEATURES]
    out = np.zeros(1, description_type(len(axes)))
    out["count"] = len(kept)
    out["mean"], out["diagonal"], out["variances"] = moments.mean, moments.diagonal, moments.variances
    if difference is not None:
        out["difference"] = axes @ difference.direction
    out["axes"][0], out["axis_scales"] = quantised(moments.axes)
    out["features"][0, : len(kept)], out["feature_scales"][0, : len(kept)] = quantised(kept)
    return out


def set_offsets(stored: npt.NDArray[np.void], offsets: Offsets) -> None:
    """Put the offsets of N models into their descriptions (N,)."""
    stored["offsets"][:, : len(offsets)] = np.stack(offsets, axis=1)


def decode(stored: npt.NDArray[np.void]) -> StoredDescriptions:
    """Descriptions from their values (N,).

    Raises:
        ValueError: a value is none that a description has.
    """
    counts = stored["count"].astype(np.int64)
    if len(counts) and not (counts.min() > 0 and counts.max() <= KEPT_FEATURES):
        raise ValueError("a description has no samples, or too many")
    kept = np.arange(KEPT_FEATURES) < counts[:, None]
    floats = ("offsets", "mean", "difference", "diagonal", "variances", "axis_scales", "feature_scales")
    if not all(np.isfinite(stored[name]).all() for name in floats):
        raise ValueError("a description holds numbers that are not finite")
    if min(stored["diagonal"].min(initial=0), stored["variances"].min(initial=0)) < 0:
        raise ValueError("a description holds a variance below 0")
    features = stored["features"].astype(np.float32)
    features *= stored["feature_scales"][..., None]
    described = Descriptions(
        stored["mean"].astype(np.float32),
        stored["axes"] * stored["axis_scales"][..., None],
        stored["variances"].astype(np.float32),
        stored["diagonal"].astype(np.float32),
        # Where all have as many as can be, which is usual, they need no copy.
        features.reshape(-1, features.shape[-1]) if kept.all() else features[kept],
        counts,
    )
    offsets = Offsets(*stored["offsets"].astype(np.float64).T[:2])
    return StoredDescriptions(described, offsets, stored["difference"].astype(np.float32))


def quantised(rows: Float32s) -> tuple[npt.NDArray[np.int8], Float32s]:
    """Rows (n, p) as small integers, and the scale (n,) of each."""
    largest = np.abs(rows).max(axis=1, initial=0.0)
    scales = np.where(largest > 0, largest, 1.0).astype(np.float32) / np.float32(_LARGEST)
    return np.rint(rows / scales[:, None]).astype(np.int8), scales

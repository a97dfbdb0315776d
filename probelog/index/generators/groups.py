"""Groups of alike samples: what the vector index of many generators is over.

A generator of several concepts is near none of them by the mean of its samples. So the samples of each are sorted into at
most ``MOST`` groups, and a generator is found by any of them: a group with the share p of the samples, mean direction g and
mean embedding h scores as a generator would that makes just these means (``probelog.ranking.samples.matched``),

``b w.g + log p - o(g)``, of a text ``+ a q.h + log p - o(h)``.

What the means score for anything, o, is lower than what the samples do, as is what they score for the query: offsets of the
samples would favour generators of one thing alone. With ``h = centre + l g`` in place of h, l the probes' root mean square
distance from their centre, but for what the anchors' mean m says of h, that is an inner product of two vectors, one of the
query and one of the group (maximum inner-product search). The vectors hold some dozen coordinates, along the principal
components of the directions of samples and of those of queries, as for logits (``probelog.index.basis``), and two numbers
for what is in no direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.arrays import Floats
from probelog.index.basis import normalised_covariance
from probelog.ranking.samples.description import Descriptions, Float32s, unit
from probelog.ranking.samples.matched import Asked, SampleSpace, log_mean

MOST = 4
# With two numbers more they make 64: RaBitQ (IVF_RQ) would fill up any to a power of two.
GROUP_COORDINATES = 62
_WIDTH = 64
_ROUNDS = 3

GROUPS = pa.schema([("row", pa.int32()), ("vector", pa.list_(pa.float16(), _WIDTH))])


@dataclass(frozen=True, eq=False)
class GroupSpace:
    """Makes the vectors of groups and of queries; all in coordinates of descriptions.

    Attributes:
        space: what queries are scored with.
        axes: (g, p) orthonormal.
        length: ``l``.
    """

    space: SampleSpace
    axes: Float32s
    length: float

    @classmethod
    def fit(cls, space: SampleSpace, features: Floats, length: float) -> GroupSpace:
        """Fit the axes to features (F, p) of all generators, and to the background's names as queries."""
        directions = unit(np.asarray(features, np.float32) - space.centre)
        axes = normalised_covariance(directions)
        if len(space.names):
            asked = cls(space, np.eye(len(axes), dtype=np.float32), length)
            named = zip(space.directions, space.names, strict=True)
            queries = [asked._towards(Asked(way, name, np.empty(0, np.int64), True)) for way, name in named]
            axes = axes + normalised_covariance(np.stack(queries))
        vectors = np.linalg.eigh(axes)[1]  # ascending
        return cls(space, np.ascontiguousarray(vectors[:, ::-1].T[:GROUP_COORDINATES], np.float32), length)

    def query(self, asked: Asked) -> Float32s:
        """Vector (w,) of one expert of a query."""
        out = np.zeros(_WIDTH, np.float32)
        out[: len(self.axes)] = self.axes @ self._towards(asked)
        out[-2:] = 1.0, asked.is_text
        return out

    def vectors(self, described: Descriptions) -> tuple[npt.NDArray[np.int64], Float32s]:
        """The groups of N generators: (G,) numbers of their generators, and their vectors (G, w)."""
        space, counts = self.space, np.asarray(described.counts, np.int64)
        there = np.arange(counts.max()) < counts[:, None]
        embeddings = np.zeros((*there.shape, described.features.shape[1]), np.float32)
        embeddings[there] = described.features
        directions = np.zeros_like(embeddings)
        directions[there] = unit(described.features - space.centre)
        members = _members(directions @ self.axes.T, there)
        sizes = members.sum(axis=1)  # (N, MOST)
        owners, numbers = np.nonzero(sizes)
        g, h = (
            (members.transpose(0, 2, 1) @ rows)[owners, numbers] / sizes[owners, numbers, None]
            for rows in (directions, embeddings)
        )
        share = np.log(sizes[owners, numbers] / counts[owners])
        out = np.zeros((len(owners), _WIDTH), np.float32)
        out[:, : len(self.axes)] = g @ self.axes.T
        out[:, -2] = share - log_mean(space.direction_sharpness * (space.directions @ g.T))
        scored = log_mean(space.embedding_sharpness * (space.names @ h.T))
        out[:, -1] = share - scored + space.embedding_sharpness * (h @ self._name)
        out[:, -2:] /= space.direction_sharpness
        return owners, out

    def _towards(self, asked: Asked) -> Float32s:
        """What is linear in a sample's direction: ``w``, of a text ``w + a l (q - m) / b``."""
        space = self.space
        if asked.embedding is None or not asked.is_text:
            return np.asarray(asked.direction, np.float32)
        weight = space.embedding_sharpness * self.length / space.direction_sharpness
        return np.asarray(asked.direction + weight * (asked.embedding - self._name), np.float32)

    @property
    def _name(self) -> Float32s:
        """``m``, (p,)."""
        names = self.space.names
        return np.asarray(names.mean(axis=0) if len(names) else np.zeros_like(self.space.centre), np.float32)


def _members(directions: Float32s, there: npt.NDArray[np.bool_]) -> Float32s:
    """Sort samples (N, m, g), of which some are ``there`` (N, m), into groups: 1 for members, (N, m, MOST).

    By k-means on the sphere (Dhillon and Modha 2001), from samples that are far from each other.
    """
    models = np.arange(len(directions))
    lengths = np.linalg.norm(directions, axis=2, keepdims=True)
    directions = np.asarray(directions / np.where(lengths > 0, lengths, 1.0), np.float32)
    centres = [directions.sum(axis=1)]
    nearest = np.full(there.shape, -np.inf, np.float32)
    for _ in range(MOST):
        alike = (directions @ centres[-1][..., None])[..., 0]
        nearest = np.maximum(nearest, alike)
        centres.append(directions[models, np.where(there, nearest, np.inf).argmin(axis=1)])
    ways = np.stack(centres[1:], axis=1)
    for turn in range(_ROUNDS):
        chosen = (directions @ ways.transpose(0, 2, 1)).argmax(axis=2)
        members = (chosen[..., None] == np.arange(MOST)) & there[..., None]
        if turn < _ROUNDS - 1:
            sums = members.astype(np.float32).transpose(0, 2, 1) @ directions
            lengths = np.linalg.norm(sums, axis=2, keepdims=True)
            ways = np.asarray(np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), ways), np.float32)
    return np.asarray(members, np.float32)

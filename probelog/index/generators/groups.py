"""Groups of alike samples: what the vector index of many generators is over.

A generator of several concepts is near none of them by the mean of its samples. So the samples of each are sorted into at
most ``MOST`` groups, and a generator is found by any of them. A group with the share p of the samples, mean direction g and
mean embedding h scores as its generator would if all samples were the means of their groups
(``probelog.ranking.samples.matched``),

``b w.g + log p - o``, of a text ``+ a q.h + log p - o'``,

``o = log mean over background c of sum over the generator's groups k of p_k exp(b w_c.g_k)``, and o' likewise of names and
embeddings. (What the samples themselves score for anything is more, as is what they score for the query.) The concept that the
group scores highest for is left out of its o: whoever asks for it by name leaves it out, and without that all that make it
would score alike, ``log B``.

With ``h = centre + l g`` in place of h, l the probes' root mean square
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
from probelog.ranking.samples.description import Descriptions, Float32s, Float64, unit
from probelog.ranking.samples.matched import Asked, SampleSpace, log_mean

MOST = 6
# With two numbers more they make 64: RaBitQ (IVF_RQ) would fill up any to a power of two.
GROUP_COORDINATES = 62
_WIDTH = 64
_ROUNDS = 3
# Partitions of the vector index at most: for more LanceDB divides a few large clusters again and again, and a concept's groups lie
# in many of them (320,000 groups, 16 partitions searched: 0.78 of the best fifty with 400, 0.97 with 256).
_PARTITIONS = 256
# Of a number in the vector index: the fifty groups of a million generators' list hold 0.95 of the best fifty, with 5 bits 0.87, in
# the same time.
GROUP_BITS = 7
# What a group more must add to the mean likeness of samples and their group's first one.
_LEAST = 0.05

GROUPS = pa.schema([("row", pa.int32()), ("vector", pa.list_(pa.float16(), _WIDTH))])


def partitions(groups: int) -> int:
    """Number of partitions of a vector index over so many groups."""
    return max(1, min(_PARTITIONS, groups // _PARTITIONS))


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
        out[:, -2] = share - _anything(space.direction_sharpness * (space.directions @ g.T), share, owners)
        scored = _anything(space.embedding_sharpness * (space.names @ h.T), share, owners)
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


def _anything(evidence: Float32s, share: Float64, owners: npt.NDArray[np.int64]) -> Float64:
    """``o`` (G,) of groups of sorted ``owners`` (G,) from what they score for the background, (B, G), and ``log p`` (G,)."""
    count, groups = evidence.shape
    if count < 2:
        return np.zeros(groups)
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    places = np.repeat(np.arange(len(starts)), np.diff(starts, append=groups))
    weighted = evidence + share
    top = np.maximum.reduceat(weighted, starts, axis=1)
    whole = top + np.log(np.add.reduceat(np.exp(weighted - top[:, places]), starts, axis=1))
    others = whole[:, places]
    others[evidence.argmax(axis=0), np.arange(groups)] = -np.inf
    return np.asarray(log_mean(others) + np.log(count / (count - 1)))


def _members(directions: Float32s, there: npt.NDArray[np.bool_]) -> Float32s:
    """Sort samples (N, m, g), of which some are ``there`` (N, m), into groups: 1 for members, (N, m, MOST).

    By k-means on the sphere (Dhillon and Modha 2001). It begins with the samples that all are most alike to, one after the
    other (the greedy algorithm for facility location: Nemhauser, Wolsey and Fisher 1978): samples that are far from
    each other would be outliers, and leave the concepts in one group.
    """
    models = np.arange(len(directions))
    lengths = np.linalg.norm(directions, axis=2, keepdims=True)
    directions = np.asarray(directions / np.where(lengths > 0, lengths, 1.0), np.float32)
    alike = np.maximum(directions @ directions.transpose(0, 2, 1), 0.0)
    nearest = np.zeros(there.shape, np.float32)
    firsts, used = [], []
    for number in range(MOST):
        gains = np.maximum(alike - nearest[:, None], 0.0).sum(axis=2)
        chosen = gains.argmax(axis=1)
        used.append((gains[models, chosen] >= _LEAST * there.sum(axis=1)) | (number == 0))
        firsts.append(directions[models, chosen])
        nearest = np.maximum(nearest, alike[models, chosen])
    ways, is_used = np.stack(firsts, axis=1), np.stack(used, axis=1)
    for turn in range(_ROUNDS):
        likeness = np.where(is_used[:, None], directions @ ways.transpose(0, 2, 1), -np.inf)
        members = (likeness.argmax(axis=2)[..., None] == np.arange(MOST)) & there[..., None]
        if turn < _ROUNDS - 1:
            sums = members.astype(np.float32).transpose(0, 2, 1) @ directions
            lengths = np.linalg.norm(sums, axis=2, keepdims=True)
            ways = np.asarray(np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), ways), np.float32)
    return np.asarray(members, np.float32)

"""Descriptors, distances and calibration: the mathematics of ProbeLog, arrays in, arrays out.

Notation as in the papers: n probes, N logits, C concepts; ``z`` is a row standardised over all n probes.
Version 1 is arXiv 2502.09619 (query-side truncation); version 2 truncates on the gallery's side and calibrates
against background concepts. Distances are ranked ascending.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Float64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer]

# Rows whose standard deviation is this small beside their largest magnitude carry rounding noise, not a concept.
CONSTANT_FLOOR = 1e-5

# Bounds the float64 working copy of a scan: 4,096 logits x 50 probes x 64 concepts is about 100 MB.
_SCAN_ELEMENTS = 12_000_000


class TopPairs(NamedTuple):
    """The r largest entries of each row: ``probes`` (N, r) int32 and ``values`` (N, r) float32, descending."""

    probes: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]


def standardise(rows: Floats) -> Float64:
    """``z(v) = (v - mean(v)) / std(v)`` for every row of a (N, n) matrix, in float64.

    Raises:
        ValueError: a row is constant, so that it has no descriptor (drop it first: ``is_constant``).
    """
    rows = np.atleast_2d(np.asarray(rows, np.float64))
    if is_constant(rows).any():
        raise ValueError("a constant row has no standardised form")
    return np.asarray((rows - rows.mean(axis=1, keepdims=True)) / rows.std(axis=1, keepdims=True))


def is_constant(rows: Floats) -> npt.NDArray[np.bool_]:
    """Which rows of a (N, n) matrix are constant up to rounding: (N,) booleans."""
    rows = np.atleast_2d(np.asarray(rows, np.float64))
    return np.asarray(rows.std(axis=1) <= CONSTANT_FLOOR * np.abs(rows).max(axis=1, initial=0.0))


def text_descriptors(probe_embeddings: Floats, query_embeddings: Floats) -> Float64:
    """Standardised similarities of every query to every probe: (C, n) from (n, d) and (C, d) unit vectors.

    ``v_c[i] = <E_img(x_i), E(c)>``, then ``z(v_c)``. Works for texts and for (mean) image embeddings alike.
    """
    return standardise(np.asarray(query_embeddings, np.float64) @ np.asarray(probe_embeddings, np.float64).T)


def top_pairs(z: Floats, r: int) -> TopPairs:
    """The r largest entries of each row of ``z`` (N, n); equal values keep the lower probe number."""
    rows, width = z.shape
    r = min(r, width)
    # Selecting the r largest first takes a tenth of the time that sorting everything does.
    if 0 < r < width:
        least = np.partition(z, width - r, axis=1)[:, width - r, None]
        chosen = z >= least
        for row in np.flatnonzero(chosen.sum(axis=1) > r):
            equal = np.flatnonzero(z[row] == least[row])
            chosen[row, equal[r - np.count_nonzero(z[row] > least[row]) :]] = False
        probes = np.nonzero(chosen)[1].reshape(rows, r)
    else:
        probes = np.broadcast_to(np.arange(r), (rows, r))
    values = np.take_along_axis(z, probes, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return TopPairs(
        np.take_along_axis(probes, order, axis=1).astype(np.int32),
        np.take_along_axis(values, order, axis=1).astype(np.float32),
    )


def truncated_distances(pairs: TopPairs, z_queries: Floats) -> Float64:
    """Version 2's distance ``d(l, c) = || (z_l - z_c) restricted to A_l ||`` for all pairs: (N, C).

    Args:
        pairs: the gallery logits' largest entries; ``A_l`` are their probes.
        z_queries: (C, n) standardised queries.
    """
    logits, r = pairs.probes.shape
    concepts = len(z_queries)
    columns = np.ascontiguousarray(np.asarray(z_queries, np.float64).T)
    out = np.empty((logits, concepts))
    step = max(1, _SCAN_ELEMENTS // max(1, r * concepts))
    for start in range(0, logits, step):
        stop = min(start + step, logits)
        difference = columns[pairs.probes[start:stop]]
        difference -= pairs.values[start:stop, :, None].astype(np.float64)
        out[start:stop] = np.sqrt(np.einsum("lrc,lrc->lc", difference, difference))
    return out


def query_side_distances(gallery_columns: Floats, query_values: Floats) -> Float64:
    """Version 1's distance of one query to every gallery logit: (N,).

    Args:
        gallery_columns: (k, N), the gallery's standardised values on the k probes where the query is largest.
        query_values: (k,), the query's own values there.
    """
    difference = np.asarray(gallery_columns, np.float64) - np.asarray(query_values, np.float64)[:, None]
    return np.asarray(np.sqrt(np.einsum("kn,kn->n", difference, difference)))


class NearestBackground(NamedTuple):
    """The background concepts nearest to each logit: ``names`` (N, s) int32 and ``distances`` (N, s), ascending."""

    names: npt.NDArray[np.int32]
    distances: npt.NDArray[np.float32]


def nearest_background(distances: Floats, keep: int) -> NearestBackground:
    """The ``keep`` smallest entries of each row of a (N, B) matrix of distances to background concepts."""
    order = np.argsort(distances, axis=1, kind="stable")[:, : min(keep, distances.shape[1])]
    return NearestBackground(
        order.astype(np.int32), np.take_along_axis(np.asarray(distances), order, axis=1).astype(np.float32)
    )


def calibration_offsets(nearest: NearestBackground, k: int, excluded: Ints | None = None) -> Float64:
    """Version 2's offset ``mean of the k smallest d(l, c_b)`` per logit: (N,).

    Args:
        nearest: at least k entries a row, and one more for every background concept that a query may exclude.
        k: how many of the nearest count.
        excluded: numbers of background concepts to leave out, because the query is one of them (a background
            that holds the query cancels it).
    """
    distances = nearest.distances.astype(np.float64)
    if not distances.shape[1]:
        return np.zeros(len(distances))
    if excluded is None or not len(excluded):
        return np.asarray(distances[:, :k].mean(axis=1))
    allowed = ~np.isin(nearest.names, excluded)
    counted = allowed & (np.cumsum(allowed, axis=1) <= k)
    count = np.maximum(counted.sum(axis=1), 1)
    return np.asarray(np.where(counted, distances, 0.0).sum(axis=1) / count)

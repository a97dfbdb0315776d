"""Distances between the models of a family, from sketches.

Of layer l with sketches a and b the *ratio* is ||a - b||^2 / (||a||^2 + ||b||^2): 0 for equal layers, 1 for
independent ones. Layers that are zero in one of the two count for nothing. A pair's distance is the mean ratio over its
layers, which no other model enters: another model in the table changes no distance.
"""

from __future__ import annotations

import numpy as np

from probelog.arrays import Floats

#: Models this far apart or further are independent: related ones lie below 0.2, independent ones above 0.7.
RELATED = 0.35


def squared_distances(sketches: Floats) -> Floats:
    """(n, n) mean ratios of the squared distances between models, of ``sketches`` (n, L, 32); 1 without any layer.

    For some hundred models; of two that are nearly equal `layer_ratios` is more exact.
    """
    n = len(sketches)
    total, counted = np.zeros((n, n)), np.zeros((n, n))
    for layer in np.moveaxis(sketches, 1, 0).astype(np.float64):
        squares = np.einsum("nk,nk->n", layer, layer)
        sums = squares[:, None] + squares[None, :]
        both = (squares[:, None] > 0) & (squares[None, :] > 0)
        distances = np.maximum(sums - 2 * (layer @ layer.T), 0)
        total += np.divide(distances, sums, out=np.zeros((n, n)), where=both)
        counted += both
    result = np.divide(total, counted, out=np.ones((n, n)), where=counted > 0)
    np.fill_diagonal(result, 0)
    return np.asarray((result + result.T) / 2)


def layer_ratios(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """(m, L) ratios of the layers of m pairs with sketches (m, L, 32), and the squared distances.

    For a layer that is zero in one of the two NaN, and a distance of 0.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    squares_a, squares_b = np.einsum("mlk,mlk->ml", a, a), np.einsum("mlk,mlk->ml", b, b)
    both = (squares_a > 0) & (squares_b > 0)
    b -= a
    differences = np.where(both, np.einsum("mlk,mlk->ml", b, b), 0)
    ratios = np.full(differences.shape, np.nan)
    np.divide(differences, squares_a + squares_b, out=ratios, where=both)
    return ratios, differences

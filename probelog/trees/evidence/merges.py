"""Merged models: weights by least squares that sum to one, from sketches, which are linear in the weights.

A merge is m = sum of a_i p_i with sum of a_i = 1. With the nearest parent p_0 as the origin the constraint goes away:
m - p_0 = sum over i > 0 of a_i (p_i - p_0), ordinary least squares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats

# The squared residual of a merge over the squared distance of its nearest parent; of other models it is above a
# tenth, because what training adds lies outside of the space that some other models span.
_LARGEST_RESIDUAL = 0.06
_SMALLEST_WEIGHT = 0.03
# A parent without which the residual grows by less is none: it bends a straight line towards a merge along an arc.
_AS_GOOD = 1.3
# The bound for many models is a little less exact than the residual.
_LARGEST_BOUND = 0.09
_RIDGE = 1e-6


@dataclass(frozen=True, slots=True)
class Merge:
    """Parents by their position among the candidates, their weights, and the residual over the nearest's distance."""

    parents: tuple[int, ...]
    weights: tuple[float, ...]
    residual: float


def find_merge(model: Floats, candidates: Floats) -> Merge | None:
    """The merge of two or more of ``candidates`` (k, d) that ``model`` (d,) is, or None.

    From all candidates the one with the smallest weight is left out until every weight is positive and counts, and
    then as long as it does not explain much of what the others leave.
    """
    if len(candidates) < 2:
        return None
    nearest = float(((candidates - model) ** 2).sum(axis=1).min())
    parents = list(range(len(candidates)))
    best: Merge | None = None
    while len(parents) > 1 and nearest > 0:
        weights = _weights(model, candidates[parents])
        least = int(weights.argmin())
        if weights[least] >= _SMALLEST_WEIGHT:
            residual = float(((model - weights @ candidates[parents]) ** 2).sum()) / nearest
            if residual > (_LARGEST_RESIDUAL if best is None else _AS_GOOD * best.residual):
                break
            best = Merge(tuple(parents), tuple(float(weight) for weight in weights), residual)
        del parents[least]
    return best


def may_be_merges(models: Floats, candidates: Floats, there: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(b,) whether `find_merge` is worth asking, for models (b, d) and their candidates (b, k, d).

    ``there`` (b, k) are real candidates. With V = candidates - model and G = V V' the smallest residual of weights
    that sum to one, whatever their sign, is 1 / (1' G^-1 1): no choice of candidates has a smaller one.
    """
    differences = candidates - models[:, None]
    lengths = np.sqrt((differences**2).sum(axis=2))
    there = there & (lengths > 0)
    inverse = np.divide(1, lengths, out=np.zeros_like(lengths), where=there)
    gram = np.einsum("bid,bjd->bij", differences, differences, optimize=True)
    gram *= inverse[:, :, None] * inverse[:, None, :]
    diagonal = np.arange(gram.shape[1])
    gram[:, diagonal, diagonal] = 1 + _RIDGE
    bound = 1 / np.maximum(
        (inverse * np.linalg.solve(gram, inverse[:, :, None])[:, :, 0]).sum(axis=1), 1e-300
    )
    nearest = np.where(there, lengths, np.inf).min(axis=1) ** 2
    return np.asarray((there.sum(axis=1) >= 2) & (bound <= _LARGEST_BOUND * nearest))


def _weights(model: Floats, parents: Floats) -> Floats:
    """(k,) weights that sum to one, by least squares."""
    origin = parents[0]
    solution = np.linalg.lstsq((parents[1:] - origin).T, model - origin, rcond=1e-6)[0]
    return np.array([1 - solution.sum(), *solution])

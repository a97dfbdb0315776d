"""Parents that were never uploaded or were deleted: their children look like each other's parents.

What two children add to a parent p has nothing to do with each other: the cosine between c - p and any other
neighbour's difference from p is about 0. Where p is a sibling of c under an unseen parent u, both differences hold
-(p - u), and the cosine is |p - u|^2 / (|c - p| |o - p|) for a neighbour o.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats

# Two fine-tunings of one model have this cosine, because they have data and a loss in common.
_TRAINING_COSINE = 0.07


def latent_name(family: str, statistics: bytes) -> str:
    """The name of an unseen parent, from its family's key and the statistics of the oldest of its known children.

    Models that come later do not change it, nor does another name of that child. No repository is called so.
    """
    return "latent:" + hashlib.blake2b(family.encode() + statistics, digest_size=6).hexdigest()


def unseen_shares(
    parent: Floats, children: Floats, others: Floats, excluded: npt.NDArray[np.bool_]
) -> tuple[Floats, Floats]:
    """The parts of squared edges that lie between ``parent`` and an unseen parent, and their standard errors.

    For ``children`` (m, d), from ``others`` (k, d), models that do not come from the child: those are ``excluded``
    (m, k). Each estimates <c - p, o - p> / |c - p|^2; the mean is weighted by the inverse of their variances, which
    grow with |o - p|^2. The error is that of the best one: they have much of their way to ``parent`` in common. NaN
    without any other model, and for a child that is equal to the parent.
    """
    edges, differences = children - parent, others - parent
    lengths, squares = (edges**2).sum(axis=1), (differences**2).sum(axis=1)
    counted = (squares > 0) & ~excluded & (lengths > 0)[:, None]
    weights = np.divide(1, squares, out=np.zeros(counted.shape), where=counted)
    total = weights.sum(axis=1)
    known = total > 0
    products = (weights * (edges @ differences.T)).sum(axis=1)
    shares, errors = np.full(len(edges), np.nan), np.full(len(edges), np.nan)
    shares[known] = products[known] / total[known] / lengths[known]
    nearest = np.where(counted, squares, np.inf)[known].min(axis=1, initial=np.inf)
    errors[known] = _errors(nearest / lengths[known], edges.shape[1])
    return shares, errors


def step_shares(grandparents: Floats, parents: Floats, children: Floats) -> tuple[Floats, Floats]:
    """(m,) shares of the steps from grandparents to parents (m, d) that children show, and their standard errors.

    1 for a child of the parent, 0 for one of the grandparent: <c - g, p - g> / |p - g|^2. Two independent vectors
    have a cosine of about d^(-1/2) in d numbers.
    """
    steps, wholes = parents - grandparents, children - grandparents
    squares = (steps**2).sum(axis=1)
    there = squares > 0
    shares = np.divide((wholes * steps).sum(axis=1), squares, out=np.zeros(len(steps)), where=there)
    ratios = np.divide((wholes**2).sum(axis=1), squares, out=np.full(len(steps), np.inf), where=there)
    return shares, _errors(ratios, steps.shape[1])


def _errors(square_ratios: Floats, numbers: int) -> Floats:
    return np.asarray(np.sqrt(square_ratios * (1 / numbers + _TRAINING_COSINE**2)))

"""CLIP-Dissect (Oikarinen & Weng 2023): pointwise mutual information of a logit's top probes and a concept.

``P[i, c] = softmax over the concept set of a cos(x_i, c)``. The concept set of a query is the query and the
background without what the query excludes. From the log likelihood L(l, c) of a logit's top probes the score is
``L(l, c) - lam (logsumexp over the logits l' of L(l', c) - log N)``. The second term is the same for all logits, so
it changes which concept suits a logit best, but not which logits suit a concept.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats
from probelog.completion import scoring
from probelog.evaluation.gallery import Concepts, Gallery

Float64 = npt.NDArray[np.float64]

# CLIP-Dissect's constant below logarithms.
_FLOOR = 1e-7


def wpmi(gallery: Gallery, concepts: Concepts, top: int = 28, a: float = 2.0, lam: float = 0.6) -> Floats:
    """WPMI: ``L(l, c) = sum over the logit's top 28 probes of log(P[i, c] + 1e-7)``; (C, N) scores.

    Where a model saw few probes, ``top_count`` of them are used.
    """
    chances = concept_probabilities(gallery.embeddings, concepts, a)
    return mutual_information(_likelihoods(gallery, np.log(chances + _FLOOR), None, top), lam)


def soft_wpmi(
    gallery: Gallery,
    concepts: Concepts,
    top: int = 100,
    a: float = 10.0,
    lam: float = 1.0,
    p_first: float = 0.998,
    p_last: float = 0.97,
) -> Floats:
    """SoftWPMI: ``L = sum over t = 0..99 of log(1 + p_t (P[i_t, c] - 1) + 1e-7)``; (C, N) scores.

    ``i_t`` are the logit's top 100 probes in order, ``p_t = 0.998 - 0.028 t / 100`` the chance that probe t counts.
    Where a model saw few probes, ``top_count`` of them are used and ``p_t`` falls over those.
    """
    chances = concept_probabilities(gallery.embeddings, concepts, a)
    return mutual_information(_likelihoods(gallery, chances, (p_first, p_last), top), lam)


def top_count(seen: int, top: int) -> int:
    """How many of its top probes speak for a logit whose model saw ``seen`` probes: at most a tenth of them.

    Probes further down do not show the concept and would outvote those that do; with far fewer, single probes
    decide. Anything from a twentieth to a quarter ranks about as well.
    """
    return min(top, max(1, seen // 10))


def concept_probabilities(embeddings: Floats, concepts: Concepts, a: float) -> Float64:
    """``P[i, c]`` of each query within its own concept set: (C, n)."""
    embeddings = np.asarray(embeddings, np.float64)
    weights = np.exp(a * (np.asarray(concepts.queries, np.float64) @ embeddings.T))
    others = np.exp(a * (np.asarray(concepts.background, np.float64) @ embeddings.T))
    counted = np.ones((len(weights), len(others)))
    for row, excluded in zip(counted, concepts.excluded, strict=True):
        row[np.asarray(excluded, np.intp)] = 0.0
    return np.asarray(weights / (weights + counted @ others))


def _likelihoods(gallery: Gallery, terms: Float64, soft: tuple[float, float] | None, top: int) -> Float64:
    """L(l, c): (C, N), sums over each logit's top probes.

    Sums of fewer than ``top`` terms are scaled up to as many, or models that saw fewer probes would be likelier.

    Args:
        gallery: the logits.
        terms: (C, n), what a probe adds to a concept; with ``soft`` the probability that makes the addend.
        soft: the first p_t and the one after the last.
        top: how many terms.
    """
    likelihoods = []
    for model in gallery.models:
        count = top_count(len(model.probes), top)
        pairs = scoring.top_pairs(model.values, count)
        total = np.zeros((len(terms), len(model.values)))
        for t in range(count):
            term = terms[:, model.probes[pairs.probes[:, t]]]
            if soft is not None:
                p = soft[0] + (soft[1] - soft[0]) * t / count
                term = np.log(1.0 + p * (term - 1.0) + _FLOOR)
            total += term
        likelihoods.append(total * (top / count))
    return np.concatenate(likelihoods, axis=1)


def mutual_information(likelihoods: Float64, lam: float) -> Float64:
    """``L(l, c) - lam (logsumexp over l' of L(l', c) - log N)`` of a (C, N) matrix L."""
    largest = likelihoods.max(axis=1, keepdims=True)
    prior = largest + np.log(np.exp(likelihoods - largest).mean(axis=1, keepdims=True))
    return np.asarray(likelihoods - lam * prior)

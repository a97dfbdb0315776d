"""Matched heads once more, as literally as the formulas stand: loops, least squares, no shared code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SHARPNESS, RIDGE, IMAGE_SHARE = 1.5, 0.005, 0.5
NOISE, PLAIN, CONCEPT_WEIGHT, FEEDBACK = 50, 140, 7, 60


def responses(values: Array, head: str) -> Array:
    """Roots of probabilities: (L, m)."""
    logits, probes = values.shape
    out = np.empty((logits, probes))
    totals = [math.log(sum(math.exp(values[j, i]) for j in range(logits))) for i in range(probes)]
    nothing = sum(totals) / probes
    for i in range(probes):
        for j in range(logits):
            x = values[j, i]
            if head == "softmax":
                p = math.exp(x) / (math.exp(totals[i]) + math.exp(nothing))
            else:
                p = 1 / (1 + math.exp(-x))
            out[j, i] = math.sqrt(p)
    return out


def z(row: Array) -> Array:
    return (row - row.mean()) / row.std()


def ridge(target: Array, embeddings: Array, seen: Sequence[int] | None = None) -> Array:
    """One unit direction, by least squares on rows appended for the penalty."""
    centre = embeddings.mean(axis=0)
    length = np.mean([(e - centre) @ (e - centre) for e in embeddings])
    rows = embeddings - centre if seen is None else (embeddings - centre)[list(seen)]
    d = embeddings.shape[1]
    penalty = math.sqrt(RIDGE * len(rows) * length) * np.eye(d)
    w = np.linalg.lstsq(np.vstack([rows, penalty]), np.concatenate([target, np.zeros(d)]), rcond=None)[0]
    return w / np.linalg.norm(w)


def model_directions(values: Array, head: str, embeddings: Array, seen: Sequence[int] | None = None) -> Array:
    count = len(embeddings) if seen is None else len(seen)
    share, directions = min(1.0, (PLAIN / count) ** 2), []
    for root, logit in zip(responses(values, head), values, strict=True):
        plain = logit - values.mean(axis=0) if head == "softmax" and len(values) > 1 else logit
        target = z(root) + share * z(plain)
        directions.append(filtered(ridge(z(target), embeddings, seen), embeddings, count))
    return np.array(directions)


def filtered(w: Array, embeddings: Array, seen: int) -> Array:
    """A direction with less of the components that are noisy after so many probes."""
    centred = embeddings - embeddings.mean(axis=0)
    variances, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    length = float(np.mean([e @ e for e in centred]))
    noise = [max(v, 0.0) / (max(v, 0.0) + RIDGE * length) ** 2 for v in variances]
    out = sum(
        (axes[:, j] @ w) / (1 + NOISE / seen * noise[j] / np.mean(noise)) * axes[:, j] for j in range(len(w))
    )
    return np.asarray(out / np.linalg.norm(out))


def text_sharpness(embeddings: Array, background: Array) -> float:
    return SHARPNESS / float(np.mean([np.std([e @ t for t in background]) for e in embeddings]))


def text_direction(text: Array, embeddings: Array, background: Array, excluded: Sequence[int] = ()) -> Array:
    a = text_sharpness(embeddings, background)
    rivals = [t for i, t in enumerate(background) if i not in excluded] or list(background)
    target = []
    for e in embeddings:
        own = math.exp(a * (e @ text))
        target.append(math.sqrt(own / (own + sum(math.exp(a * (e @ t)) for t in rivals))))
    return ridge(z(np.array(target)), embeddings)


def background_directions(embeddings: Array, background: Array) -> Array:
    return np.array([text_direction(t, embeddings, background, [i]) for i, t in enumerate(background)])


def image_direction(images: Array, embeddings: Array, background: Array) -> Array:
    a, named = text_sharpness(embeddings, background), background_directions(embeddings, background)
    centre = embeddings.mean(axis=0)
    spread = np.mean([np.std([(e - centre) @ w for w in named]) for e in embeddings])
    evidence = [sum(a * (x @ t) + (x - centre) @ w / spread for x in images) for t, w in zip(background, named, strict=True)]  # fmt: skip
    weights = np.exp(np.array(evidence) - max(evidence))
    names = (weights / weights.sum()) @ named
    direct = np.mean([x - centre for x in images], axis=0)
    w = names / np.linalg.norm(names) + IMAGE_SHARE * direct / np.linalg.norm(direct)
    return w / np.linalg.norm(w)


def sharpness(directions: Array, named: Array) -> float:
    return SHARPNESS / float(np.mean([np.std([w @ c for c in named]) for w in directions]))


def offset(w: Array, named: Array, b: float, excluded: Sequence[int] = ()) -> float:
    rest = [math.exp(b * (w @ c)) for i, c in enumerate(named) if i not in excluded]
    return math.log(sum(rest) / len(rest))


def score(w: Array, query: Array, named: Array, b: float, excluded: Sequence[int] = ()) -> float:
    return b * float(w @ query) - offset(w, named, b, excluded)


def with_feedback(
    query: Array,
    gallery: Array,
    owners: Sequence[int],
    named: Array,
    b: float,
    excluded: Sequence[int] = (),
) -> Array:
    """A concept's direction, moved towards its best logits, the first of each model."""
    scores = [score(w, query, named, b, excluded) for w in gallery]
    rivals = len([i for i in range(len(named)) if i not in excluded])
    best = sorted(range(len(gallery)), key=lambda i: -scores[i])[:FEEDBACK]
    best = [i for place, i in enumerate(best) if owners[i] not in [owners[j] for j in best[:place]]]
    sure = {i: math.exp(scores[i]) / (math.exp(scores[i]) + rivals) for i in best}
    moved = CONCEPT_WEIGHT * query
    for i in best:
        moved = moved + sure[i] * min(1.0, CONCEPT_WEIGHT / sum(sure.values())) * gallery[i]
    return moved / np.linalg.norm(moved)

"""A hub of any number of logits whose directions are made as real ones are: by the method's own fit.

Real models' responses (all probes, from a store that was probed with fraction = 1) are resampled and perturbed:

- A synthetic logit mixes the standardised responses of two logits of the hub, ``a`` of one and ``1 - a`` of the
  other with ``a`` uniform in [1/2, 1]: it recognises mostly what the first one does.
- Each response is taken at a random sharpness, ``p^(g/2)`` with g one of 0.7, 1 and 1.4 in place of ``sqrt(p)``:
  models differ in how sure they are.
- The mixture is fitted as the product fits it, on a random quarter of the probes that its model alone has seen: the
  noise of a fit is the real process's own. Subsets come from a pool that is drawn anew for every batch. The ridge is
  linear, so that the mixture of two fits on one subset is the fit of the mixture.
- Models have 2 to 1,000 logits (log-uniform); one in twenty repeats the model before it (the same weights).

What of the real hub this keeps is printed by ``likeness``: the spectrum of the directions, the distribution of the
best score and of its lead over the tenth, and how unevenly logits are among the ten best (k-occurrence).
On the bench's hub, real and synthetic at the same 1,608 logits: participation ratio of the spectrum 17.5 and 18.2,
components that hold nine tenths of the variance 48 and 49, best score of a name 4.9 and 4.6, its lead over the tenth
2.1 and 1.8, offsets' spread 0.66 and 0.59, skew 2.1 and 1.9 over 40 names. All synthetic logits descend from the same
real ones, so that a large hub is harder than a real one of its size: hundreds of logits say nearly the same, and the
tenth and eleventh answers of a million differ by 0.004 in score (median).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.benchmark.probed import ProbedHub
from probelog.ranking import matched_heads
from probelog.ranking.matched_heads import HeadSpace
from probelog.storage.schemas import Head

Float32s = npt.NDArray[np.float32]

SHARE = 0.25  # of the probes that a model sees
SHARPNESSES = (0.7, 1.0, 1.4)
BATCH = 50_000  # logits made at once
POOL = 16  # subsets of probes in one batch
COPIES = 1 / 20
SMALLEST, LARGEST = 2, 1000


class Layout(NamedTuple):
    """Models beside each other: how many logits each has, and which repeat the one before them (the same weights)."""

    sizes: npt.NDArray[np.int64]
    copies: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Models:
    """Whole models: ``directions`` (L, d) unit vectors of their logits."""

    directions: Float32s
    layout: Layout


class Synthesis:
    """Draws models after a probed hub."""

    def __init__(self, hub: ProbedHub) -> None:
        self.space: HeadSpace = hub.generation.space
        embeddings = np.asarray(hub.generation.probe_embeddings, np.float64)
        self._centred = embeddings - embeddings.mean(axis=0)
        self._spread = float(np.square(self._centred).sum(axis=1).mean())
        # (g, N, n) responses of all real logits on all probes
        self._responses = np.stack(
            [np.concatenate([_responses(m.values, m.head, g) for m in hub.observed]) for g in SHARPNESSES]
        )

    @property
    def real(self) -> int:
        """Number of real logits."""
        return int(self._responses.shape[1])

    def real_directions(self, seed: int = 0) -> Float32s:
        """The real logits, each fitted on a quarter of the probes of its own: (N, d)."""
        rng = np.random.default_rng(seed)
        middle = SHARPNESSES.index(1.0)
        parts = [
            self._fits(rng, middle, rows)
            for rows in np.array_split(np.arange(self.real), max(1, self.real // 12))
        ]
        return np.concatenate(parts)

    def _fits(self, rng: np.random.Generator, sharpness: int, rows: npt.NDArray[np.int64]) -> Float32s:
        probes = self._subset(rng)
        return _unit(_standardise(self._responses[sharpness, rows][:, probes]) @ self._operator(probes))

    def _subset(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        n = len(self._centred)
        return rng.choice(n, round(SHARE * n), replace=False)

    def _operator(self, probes: npt.NDArray[np.int64]) -> Float32s:
        """The ridge of ``probelog.ranking.matched_heads`` on some probes as a matrix: (m, d)."""
        seen = self._centred[probes]
        m, d = seen.shape
        penalty = matched_heads.RIDGE * m * self._spread
        return np.linalg.solve(seen.T @ seen + penalty * np.eye(d), seen.T).T.astype(np.float32)

    def batches(self, logits: int, seed: int) -> Iterator[Models]:
        """Models with ``logits`` logits altogether; the same for the same arguments."""
        for number, layout in enumerate(layouts(logits, seed)):
            yield self._batch(np.random.default_rng([seed, number, 1]), layout)

    def _batch(self, rng: np.random.Generator, layout: Layout) -> Models:
        pool = [self._subset(rng) for _ in range(POOL)]
        sizes, logits = layout.sizes, int(layout.sizes.sum())
        number = np.repeat(np.arange(len(sizes)), sizes)
        subset = rng.integers(POOL, size=len(sizes))[number]
        first, second = rng.integers(self.real, size=(2, logits))
        sharp = rng.integers(len(SHARPNESSES), size=(2, logits))
        share = rng.uniform(0.5, 1.0, size=(logits, 1)).astype(np.float32)
        out = np.empty((logits, self._centred.shape[1]), np.float32)
        for which, probes in enumerate(pool):
            operator = self._operator(probes)
            fits = np.stack([_standardise(responses[:, probes]) @ operator for responses in self._responses])
            rows = np.flatnonzero(subset == which)
            out[rows] = share[rows] * fits[sharp[0, rows], first[rows]]
            out[rows] += (1 - share[rows]) * fits[sharp[1, rows], second[rows]]
        starts = np.cumsum([0, *sizes])
        for model in np.flatnonzero(layout.copies):
            start, size = starts[model], sizes[model]
            out[start : start + size] = out[start - size : start]
        return Models(_unit(out), layout)


def layouts(logits: int, seed: int) -> Iterator[Layout]:
    """The models of each batch."""
    number = 0
    while logits > 0:
        rng = np.random.default_rng([seed, number, 0])
        left = min(BATCH, logits)
        logits, number = logits - left, number + 1
        sizes: list[int] = []
        copies: list[bool] = []
        while left > 0:
            copy = bool(sizes) and not copies[-1] and sizes[-1] <= left and rng.random() < COPIES
            size = sizes[-1] if copy else int(np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST + 1))))
            sizes.append(min(size, left))
            copies.append(copy)
            left -= sizes[-1]
        yield Layout(np.asarray(sizes, np.int64), np.asarray(copies, bool))


def likeness(
    directions: Float32s, background: npt.NDArray[Any], queries: npt.NDArray[Any]
) -> dict[str, float]:
    """What a gallery of directions (N, d) is like, for queries (C, d); for comparison at equal N.

    ``dims``: the participation ratio of the spectrum. ``dims 90``: principal components that hold nine tenths of the
    variance. ``best`` and ``lead``: medians over queries of the best score and of its lead over the tenth, in
    log-odds. ``offsets``: standard deviation of the offsets. ``skew``: of the number of queries that have a logit
    among their ten best (k-occurrence).
    """
    centred = directions - directions.mean(axis=0)
    spectrum = np.linalg.eigvalsh(np.cov(centred.T.astype(np.float64)))[::-1]
    b = matched_heads.sharpness(directions, background)
    offsets = matched_heads.offsets(directions, background, b)
    scores = b * (directions @ queries.T.astype(np.float32)).T - offsets
    top = np.argsort(-scores, axis=1)[:, :10]
    best = np.take_along_axis(scores, top, axis=1)
    occurrences = np.bincount(top.reshape(-1), minlength=len(directions)).astype(np.float64)
    deviation = occurrences - occurrences.mean()
    return {
        "dims": float(spectrum.sum() ** 2 / np.square(spectrum).sum()),
        "dims 90": float(np.searchsorted(np.cumsum(spectrum) / spectrum.sum(), 0.9) + 1),
        "best": float(np.median(best[:, 0])),
        "lead": float(np.median(best[:, 0] - best[:, 9])),
        "offsets": float(offsets.std()),
        "skew": float((deviation**3).mean() / (deviation**2).mean() ** 1.5),
    }


def _responses(values: npt.NDArray[Any], head: Head, sharpness: float) -> Float32s:
    return np.power(matched_heads.probabilities(values, head), 0.5 * sharpness).astype(np.float32)


def _standardise(rows: Float32s) -> Float32s:
    rows = rows - rows.mean(axis=1, keepdims=True)
    deviation = rows.std(axis=1, keepdims=True)
    return np.asarray(rows / np.where(deviation > 1e-9, deviation, 1), np.float32)


def _unit(rows: Float32s) -> Float32s:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(length > 0, length, 1), np.float32)

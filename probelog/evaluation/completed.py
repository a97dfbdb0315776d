"""Completion before the search: what models did not see is filled in, or other models' observations are used.

Each completion takes a gallery to a gallery; version 2 then searches the completed rows. Rows are standardised by
their observed mean and deviation before anything is filled in, and what was observed stays as it is. Completed rows are
made model by model when they are read: they take n values a logit, and are too many to hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import overload

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats
from probelog.completion import scoring
from probelog.completion.als import (
    Block,
    Bools,
    Float32,
    HeldOutError,
    SumsOverModels,
    column_step,
    complete_rows,
    held_out_error,
    held_positions,
    initial_columns,
    row_step,
)
from probelog.evaluation.gallery import Concepts, Gallery
from probelog.evaluation.ridge import Ridge
from probelog.evaluation.truncated import TOP, second_version
from probelog.ranking.matched_heads import Observed
from probelog.storage.schemas import Head

Float64 = npt.NDArray[np.float64]

# What the held-out choices choose from: rank and regularisation of the factorisation, regularisation of the ridge.
RANKS = (4, 16, 64)
REGULARISATIONS = (0.03, 0.1)
RIDGE_REGULARISATIONS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SWEEPS = 8
HELD_SHARE = 0.1
# Models that the ridge's regularisation is chosen on, spread evenly over the gallery.
_CHOOSE_ON = 64


def second_version_als(gallery: Gallery, concepts: Concepts) -> Floats:
    """Version 2 on rows completed by ALS: (C, N) scores."""
    return second_version(complete_by_als(gallery), concepts)


def second_version_als_text_rows(gallery: Gallery, concepts: Concepts) -> Floats:
    """Version 2 on rows completed by ALS with the background's descriptors as further rows: (C, N) scores."""
    return second_version(complete_by_als(gallery, concepts.background), concepts)


def second_version_ridge(gallery: Gallery, concepts: Concepts) -> Floats:
    """Version 2 on rows completed from the probes' embeddings: (C, N) scores."""
    return second_version(complete_by_ridge(gallery), concepts)


def second_version_ridge_als(gallery: Gallery, concepts: Concepts) -> Floats:
    """Version 2 on rows completed from the probes' embeddings and by ALS on what they leave: (C, N) scores."""
    return second_version(complete_by_ridge_and_als(gallery), concepts)


def second_version_centred(gallery: Gallery, concepts: Concepts) -> Floats:
    """Version 2 on softmax logits without their per-probe constant: (C, N) scores."""
    return second_version(centred(gallery), concepts)


def complete_by_als(gallery: Gallery, texts: Floats | None = None) -> Gallery:
    """Fill rows by masked ALS over all logits; rank and regularisation by their error on held-out entries.

    Args:
        gallery: what was observed.
        texts: (B, d) unit vectors whose standardised similarities to all probes (``scoring.text_descriptors``)
            are further, fully observed rows of the factorisation.
    """
    if _is_complete(gallery):
        return gallery
    whole = []
    if texts is not None and len(texts):
        descriptors = scoring.text_descriptors(gallery.embeddings, texts).astype(np.float32)
        whole = [Block(np.arange(len(gallery.embeddings), dtype=np.int32), descriptors)]
    columns, lam = _fit_columns(_blocks(gallery), whole, len(gallery.embeddings))
    return _filled(gallery, lambda block: complete_rows(block, row_step(block, columns, lam), columns))


def complete_by_ridge(gallery: Gallery) -> Gallery:
    """Fill rows from the probes' embeddings: ``z_l[i] ~ w_l . (e_i - mean e)``, ``w_l`` the logit's ridge direction.

    One regularisation for all, with the smallest leave-one-out error.
    """
    if _is_complete(gallery):
        return gallery
    fit = Ridge(gallery.embeddings, _ridge_regularisation(gallery))
    return _filled(
        gallery,
        lambda block: complete_rows(block, fit.directions(block.probes, block.values), fit.centred),
    )


def complete_by_ridge_and_als(gallery: Gallery) -> Gallery:
    """Fill rows from the probes' embeddings, and what those leave unexplained by masked ALS over all logits.

    The ridge's residuals on its own training entries are too small to learn from: ALS is fitted to the
    leave-one-out residuals, which are like those on unobserved probes.
    """
    if _is_complete(gallery):
        return gallery
    fit = Ridge(gallery.embeddings, _ridge_regularisation(gallery))

    def residual(block: Block) -> Block:
        return Block(block.probes, fit.left_out_errors(block.probes, block.values).astype(np.float32))

    columns, lam = _fit_columns([residual(block) for block in _blocks(gallery)], [], len(gallery.embeddings))

    def rows(block: Block) -> Floats:
        directions, shared = (
            fit.directions(block.probes, block.values),
            row_step(residual(block), columns, lam),
        )
        return complete_rows(block, np.hstack([directions, shared]), np.hstack([fit.centred, columns]))

    return _filled(gallery, rows)


def centred(gallery: Gallery) -> Gallery:
    """Subtract from softmax heads the mean logit of each probe, which their probabilities do not depend on.

    Only where three logits or more vary: two centred logits are each other's negatives. A row that would become
    constant stays as it is.
    """

    def without_mean(model: Observed) -> Observed:
        if model.head != Head.SOFTMAX or len(model.values) < 3:
            return model
        values = model.values - model.values.mean(axis=0)
        return model._replace(
            values=np.where(scoring.is_constant(values)[:, None], model.values, values),
        )

    return replace(gallery, models=_Made(gallery.models, without_mean))


def share_observations(gallery: Gallery, groups: Sequence[Sequence[int]]) -> Gallery:
    """Let models with the same weights share their observations: each gets the union of its group's.

    Where several saw a probe, a model keeps its own value, and takes that of the first one that saw it otherwise.

    Args:
        gallery: the observations.
        groups: the model numbers of each group; a model is in one group at most. Their rows correspond.

    Raises:
        ValueError: the models of a group do not have the same number of rows, or a model is in two groups.
    """
    models = list(gallery.models)
    members = [number for group in groups for number in group]
    if len(set(members)) < len(members):
        raise ValueError("a model shares its observations within one group only")
    for group in groups:
        own = [gallery.models[number] for number in group]
        if len({len(model.values) for model in own}) > 1:
            raise ValueError(
                f"the models {list(group)} have different numbers of logits: not the same weights"
            )
        for number in group:
            models[number] = _union(gallery.models[number], own)
    return replace(gallery, models=models)


def _union(model: Observed, others: Sequence[Observed]) -> Observed:
    probes = np.concatenate([model.probes, *(other.probes for other in others)])
    values = np.concatenate([model.values, *(other.values for other in others)], axis=1)
    union, first = np.unique(probes, return_index=True)
    return model._replace(probes=union, values=values[:, first])


class _Made(Sequence[Observed]):
    """Models that are made from others when they are read."""

    def __init__(self, models: Sequence[Observed], make: Callable[[Observed], Observed]) -> None:
        self._models, self._make = models, make

    def __len__(self) -> int:
        return len(self._models)

    @overload
    def __getitem__(self, number: int) -> Observed: ...

    @overload
    def __getitem__(self, number: slice) -> _Made: ...

    def __getitem__(self, number: int | slice) -> Observed | _Made:
        if isinstance(number, slice):
            return _Made(self._models[number], self._make)
        return self._make(self._models[number])


def _is_complete(gallery: Gallery) -> bool:
    return all(len(model.probes) == len(gallery.embeddings) for model in gallery.models)


def _filled(gallery: Gallery, rows: Callable[[Block], Floats]) -> Gallery:
    """The gallery with whole rows (L, n), made by ``rows`` from a model's standardised observations."""
    every = np.arange(len(gallery.embeddings))

    def whole(model: Observed) -> Observed:
        if len(model.probes) == len(every):
            return model
        return Observed(model.head, every, rows(_block(model)))

    return replace(gallery, models=_Made(gallery.models, whole))


def _block(model: Observed) -> Block:
    return Block(model.probes.astype(np.int32), scoring.standardise(model.values).astype(np.float32))


def _blocks(gallery: Gallery) -> list[Block]:
    return [_block(model) for model in gallery.models]


def _fit_columns(blocks: Sequence[Block], whole: Sequence[Block], probes: int) -> tuple[Float32, float]:
    """Columns V (n, k) and regularisation: the pair of rank and regularisation with the least held-out error.

    A larger rank is tried as long as the one before it gained. Entries of ``whole`` blocks are not held out.
    """
    rng = np.random.default_rng(0)
    seen = np.bincount(np.concatenate([block.probes for block in blocks]), minlength=probes)
    held = [held_positions(seen[block.probes] < len(blocks), HELD_SHARE, rng) for block in blocks]
    training = [*zip(blocks, (~out for out in held), strict=True), *((block, None) for block in whole)]

    def error(rank: int, lam: float) -> float:
        columns = _sweeps(training, probes, rank, lam)
        total = HeldOutError(0.0, 0, 0.0, 0)
        for block, out in zip(blocks, held, strict=True):
            factors = row_step(block, columns, lam, ~out)
            total += held_out_error(block, out, factors, columns, min(1.0, TOP / probes))
        return total.squared

    best = (np.inf, RANKS[0], REGULARISATIONS[0])
    for rank in RANKS:
        smallest = min((error(rank, lam), rank, lam) for lam in REGULARISATIONS)
        if smallest >= best:
            break
        best = smallest
    _, rank, lam = best
    return _sweeps([(block, None) for block in [*blocks, *whole]], probes, rank, lam), lam


def _sweeps(blocks: Sequence[tuple[Block, Bools | None]], probes: int, rank: int, lam: float) -> Float32:
    columns = initial_columns(probes, rank, seed=0)
    for _ in range(SWEEPS):
        sums = SumsOverModels(probes, rank)
        for block, training in blocks:
            sums.add(block, row_step(block, columns, lam, training), training)
        columns = column_step(sums.total(), lam)
    return columns


def _ridge_regularisation(gallery: Gallery) -> float:
    """The ridge regularisation with the smallest leave-one-out error on some of the models."""
    step = -(-len(gallery.models) // _CHOOSE_ON)
    blocks = [_block(model) for model in gallery.models[::step]]

    def error(lam: float) -> float:
        fit = Ridge(gallery.embeddings, lam)
        return sum(
            float(np.square(fit.left_out_errors(block.probes, block.values)).sum()) for block in blocks
        )

    return min(RIDGE_REGULARISATIONS, key=error)

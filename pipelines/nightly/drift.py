"""Drift of an index from the data that its completion and its calibration were fitted on.

A nightly run folds new models in with the columns, the background's statistics and the temperature of the last full
run. The more the hub changes, the more these differ from those that a full run would fit. Each nightly run measures:

- *held-out error*: a tenth of each new model's observations is predicted from the others with the published columns
  (docs/method.md, section 5). Columns predict models that they were not fitted on with a larger error.
- *temperature*: ``b`` (`probelog.ranking.matched_heads.sharpness`) of the present index against the published one.
- *background*: shift of the background concepts' mean scores over the index, in their standard deviations
  (`probelog.ranking.confidence.ColumnStatistics`): confidences depend on them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.complete.descriptors import Descriptors, same_logits
from pipelines.complete.record import CompletionRecord
from probelog.arrays import Ints
from probelog.completion.als import (
    Float32,
    HeldOutError,
    held_out_error,
    held_positions,
    row_step,
    standardised,
)
from probelog.index.generation import Generation
from probelog.probes.probe_set import common_probes
from probelog.ranking import matched_heads
from probelog.ranking.confidence import ColumnStatistics
from probelog.storage.encoding import digest
from probelog.storage.ledger import observed_models

_HELD_OUT_SHARE = 0.1
# Number of new models that are predicted: enough for a mean.
_MODELS = 200


@dataclass(frozen=True)
class Drift:
    """Relative changes since the base was published; 0 is none.

    Attributes:
        models: number of new models whose observations were predicted.
        held_out_rmse: root mean square error of these predictions, in standard deviations; None without any.
        fitted_rmse: held-out error of the completion when it was fitted.
        held_out: ``held_out_rmse / fitted_rmse - 1``.
        temperature: relative change of ``b``.
        background: root mean square of the shifts of the background's mean scores, in standard deviations.
        logits: number of logits that were added since, those of copies counted once.
        share: these logits' share of all.
    """

    models: int
    held_out_rmse: float | None
    fitted_rmse: float
    held_out: float
    temperature: float
    background: float
    logits: int
    share: float

    def largest(self) -> tuple[str, float]:
        """Name and amount of the largest change. A smaller held-out error than the fit's does not count as drift."""
        changes = {
            "held-out error": self.held_out,
            "temperature": abs(self.temperature),
            "background": self.background,
        }
        name = max(changes, key=lambda key: changes[key])
        return name, changes[name]

    def facts(self) -> dict[str, Any]:
        """For the generation's settings."""
        return asdict(self)


def measure_drift(
    base: Generation, descriptors: Descriptors, completed: CompletionRecord, columns: Float32, top_r: int
) -> Drift:
    """Measure the drift of the base and the models that nightly runs have added to it.

    Args:
        base: the whole generation that is live, or that the live one is an update of.
        descriptors: of the added models.
        completed: completion of the base.
        columns: V (n, k) of that completion.
        top_r: number of a row's largest entries for the error of the top.

    Raises:
        StoreError: descriptors or observations cannot be read.
    """
    made = base.settings
    common = common_probes(made.probe_set, made.seed, made.fraction, made.probes)
    error, models = _held_out_error(descriptors, completed.regularisation, columns, top_r, common)
    rmse = error.rmse if error.entries else None
    if not base.size:
        # Nothing was fitted that the added logits could be compared with.
        logits = len(_coordinates(base, descriptors))
        return Drift(models, rmse, completed.rmse, 0.0, 0.0, 0.0, logits=logits, share=float(logits > 0))
    background, b = base.background_coordinates, base.sharpness
    base_logits = base.sample if base.large else base.all_logits
    added = _coordinates(base, descriptors)
    # The same share of the added logits as the sample is of the base.
    drawn = np.random.default_rng(0).random(len(added)) < len(base_logits) / max(1, base.size)
    current = np.concatenate([base_logits.coordinates, added[drawn]])
    compared = matched_heads.Background(background.astype(np.float64), b)
    old = ColumnStatistics.of(base_logits.coordinates, background, base_logits.offsets, b)
    new = ColumnStatistics.of(
        current, background, np.concatenate([base_logits.offsets, compared.offsets(added[drawn])]), b
    )
    shifts = (new.means - old.means) / np.maximum(old.stds, 1e-12)
    temperature = matched_heads.sharpness(current, background) / matched_heads.sharpness(
        base_logits.coordinates, background
    )
    return Drift(
        models=models,
        held_out_rmse=rmse,
        fitted_rmse=completed.rmse,
        held_out=0.0 if rmse is None or not completed.rmse > 0 else rmse / completed.rmse - 1,
        temperature=temperature - 1,
        background=float(np.sqrt(np.mean(np.square(shifts)))) if len(shifts) else 0.0,
        logits=len(added),
        share=len(added) / max(1, len(added) + base.size),
    )


def _held_out_error(
    descriptors: Descriptors, regularisation: float, columns: Float32, top_r: int, common: Ints
) -> tuple[HeldOutError, int]:
    """Error of predicting held-out observations of the new models, and the number of models that were predicted."""
    error, models = HeldOutError(0.0, 0, 0.0, 0), 0
    for receipt in descriptors.receipts:
        for facts, _, values in observed_models(descriptors.store, receipt):
            block = standardised(np.asarray(facts.probes, np.int32), values).block
            if facts.copy_of_repo is not None or len(block.probes) < 2 or not len(block.values):
                continue
            if models == _MODELS:
                return error, models
            seed = int(digest(f"{facts.repo}@{facts.sha}".encode())[:16], 16)
            own = ~np.isin(block.probes, common)
            held_out = held_positions(own, _HELD_OUT_SHARE, np.random.default_rng(seed))
            factors = row_step(block, columns, regularisation, ~held_out)
            error += held_out_error(block, held_out, factors, columns, min(1.0, top_r / len(columns)))
            models += 1
    return error, models


def _coordinates(base: Generation, descriptors: Descriptors) -> Float32:
    """Coordinates (D, p) of the added logits in the base's basis, those of copies once."""
    identities: set[str] = set()
    coordinates = [np.empty((0, len(base.basis.axes)), np.float32)]
    for described in descriptors.stream(keep=True):  # to be written next
        if same_logits(described.model) not in identities:
            identities.add(same_logits(described.model))
            coordinates.append(base.basis.coordinates(described.directions))
    return np.concatenate(coordinates)

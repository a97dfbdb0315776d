"""How far an index has moved from what its completion and its calibration were fitted on.

A nightly run folds new models in with the columns, the background's statistics and the temperature of the last full
run. That is exact for what a full run would leave as it is, and drifts as the hub changes. Measured by each nightly run:

- *held-out error*: a tenth of each new model's observations is predicted from the others with the published columns
  (docs/method.md, section 5). Columns that do not know the new models predict them worse than those that they were fitted on.
- *temperature*: ``b`` (`probelog.ranking.matched_heads.sharpness`) over the index as it is now against the published one.
- *background*: how much the background concepts' mean scores over the index have moved, in their standard deviations
  (`probelog.ranking.confidence.ColumnStatistics`): what confidences rest on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.complete.descriptors import Descriptors, same_logits
from pipelines.complete.record import CompletionRecord
from probelog.completion.als import (
    Float32,
    HeldOutError,
    held_out_error,
    held_positions,
    row_step,
    standardised,
)
from probelog.index.generation import Generation
from probelog.ranking import matched_heads
from probelog.ranking.confidence import ColumnStatistics
from probelog.storage.encoding import digest
from probelog.storage.ledger import observed_models

_HELD_SHARE = 0.1
# New models that are predicted: enough for a mean, however many are new.
_MODELS = 200


@dataclass(frozen=True)
class Drift:
    """Relative changes since the base was published; 0 is none.

    Attributes:
        models: new ones whose observations were predicted.
        held_out_rmse: of these predictions; None without any.
        fitted_rmse: held-out error of the completion when it was fitted.
        held_out: ``held_out_rmse / fitted_rmse - 1``.
        temperature: relative change of ``b``.
        background: root mean square of the shifts of the background's mean scores, in standard deviations.
        logits: added since, copies once; ``share``: theirs of all.
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
        """The change that is largest, and its name. Models that are predicted better than usual are no harm."""
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
    """Compare what nightly runs have added with the base.

    Args:
        base: the whole generation that is live, or that the live one is an update of.
        descriptors: of the models that were added since.
        completed: the base's completion.
        columns: V (n, k) of it.
        top_r: entries that count as a row's top.
    """
    error, models = _prediction(descriptors, completed.regularisation, columns, top_r)
    rmse = error.rmse if error.entries else None
    background, b = base.background_coordinates, base.sharpness
    before = base.sample if base.large else base.all_logits
    added = _coordinates(base, descriptors)
    # Of what was added as large a share as the sample is of the base.
    drawn = np.random.default_rng(0).random(len(added)) < len(before) / max(1, base.size)
    after = np.concatenate([before.coordinates, added[drawn]])
    compared = matched_heads.Background(background.astype(np.float64), b)
    old = ColumnStatistics.of(before.coordinates, background, before.offsets, b)
    new = ColumnStatistics.of(
        after, background, np.concatenate([before.offsets, compared.offsets(added[drawn])]), b
    )
    shifts = (new.means - old.means) / np.maximum(old.stds, 1e-12)
    temperature = matched_heads.sharpness(after, background) / matched_heads.sharpness(
        before.coordinates, background
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


def _prediction(
    descriptors: Descriptors, lam: float, columns: Float32, top_r: int
) -> tuple[HeldOutError, int]:
    """Error of predicting a part of the new models' observations, and how many models were predicted."""
    error, models = HeldOutError(0.0, 0, 0.0, 0), 0
    for receipt in descriptors.receipts:
        for facts, _, values in observed_models(descriptors.store, receipt):
            block = standardised(np.asarray(facts.probes, np.int32), values).block
            if facts.copy_of_repo is not None or len(block.probes) < 2 or not len(block.values):
                continue
            if models == _MODELS:
                return error, models
            seed = int(digest(f"{facts.repo}@{facts.sha}".encode())[:16], 16)
            held = held_positions(len(block.probes), _HELD_SHARE, np.random.default_rng(seed))
            factors = row_step(block, columns, lam, ~held)
            error += held_out_error(block, held, factors, columns, min(1.0, top_r / len(columns)))
            models += 1
    return error, models


def _coordinates(base: Generation, descriptors: Descriptors) -> Float32:
    """Coordinates (D, p) of the added logits, in the base's basis; copies once."""
    seen: set[str] = set()
    found = [np.empty((0, len(base.basis.axes)), np.float32)]
    for described in descriptors.stream(keep=True):  # to be written next
        if same_logits(described.model) not in seen:
            seen.add(same_logits(described.model))
            found.append(base.basis.coordinates(described.directions))
    return np.concatenate(found)

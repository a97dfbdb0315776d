"""How far an index has moved from what its completion and its calibration were fitted on.

A nightly run folds new models in with the columns, the background's statistics and the temperature of the last full
run. That is exact for what a full run would leave as it is, and drifts as the hub changes. Measured each night:

- *held-out error*: a tenth of each new model's observations is predicted from the others with the published columns
  (METHOD section 5). Columns that do not know the new models predict them worse than those that they were fitted on.
- *temperature*: ``b`` (`probelog.matching.sharpness`) over the index as it is now against the published one.
- *background*: how much the background concepts' mean scores over the index have moved, in their standard deviations
  (`probelog.confidence.ColumnStatistics`): what confidences rest on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from pipelines.complete import Completed
from probelog import matching
from probelog.completion import (
    Float32,
    HeldOutError,
    held_out_error,
    held_positions,
    row_step,
    standardised,
)
from probelog.confidence import ColumnStatistics
from probelog.generation import Generation
from probelog.ledger import Receipt, observed_models
from probelog.storage import Store, digest

_HELD_SHARE = 0.1
# New models that are predicted: enough for a mean, however large the night.
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
        share: of the logits that came since.
    """

    models: int
    held_out_rmse: float | None
    fitted_rmse: float
    held_out: float
    temperature: float
    background: float
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

    def facts(self) -> dict[str, object]:
        """For the generation's settings."""
        return asdict(self)


def measure_drift(
    store: Store,
    receipts: Iterable[Receipt],
    completed: Completed,
    columns: Float32,
    top_r: int,
    updated: Generation,
    base: Generation,
) -> Drift:
    """Compare an update with its base.

    Args:
        store: holds the observations.
        receipts: of the models that came.
        completed: the base's completion.
        columns: V (n, k) of it.
        top_r: entries that count as a row's top.
        updated: the update.
        base: its base.
    """
    error, models = HeldOutError(0.0, 0, 0.0, 0), 0
    for receipt in receipts:
        if models >= _MODELS:
            break
        for facts, _, values in observed_models(store, receipt):
            block = standardised(np.asarray(facts.probes, np.int32), values).block
            if facts.copy_of_repo is not None or len(block.probes) < 2 or not len(block.values):
                continue
            seed = int(digest(f"{facts.repo}@{facts.sha}".encode())[:16], 16)
            held = held_positions(len(block.probes), _HELD_SHARE, np.random.default_rng(seed))
            factors = row_step(block, columns, completed.regularisation, ~held)
            error += held_out_error(block, held, factors, columns, min(1.0, top_r / len(columns)))
            models += 1
    rmse = error.rmse if error.entries else None
    before, after = (
        generation.sample if generation.large else generation.whole for generation in (base, updated)
    )
    background = base.background_coordinates
    old, new = (
        ColumnStatistics.of(logits.coordinates, background, logits.offsets, base.sharpness)
        for logits in (before, after)
    )
    shifts = (new.means - old.means) / np.maximum(old.stds, 1e-12)
    temperatures = [matching.sharpness(logits.coordinates, background) for logits in (before, after)]
    return Drift(
        models=models,
        held_out_rmse=rmse,
        fitted_rmse=completed.rmse,
        held_out=0.0 if rmse is None or not completed.rmse > 0 else rmse / completed.rmse - 1,
        temperature=temperatures[1] / temperatures[0] - 1,
        background=float(np.sqrt(np.mean(np.square(shifts)))) if len(shifts) else 0.0,
        share=len(updated.recent) / max(1, updated.size),
    )

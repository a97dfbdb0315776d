"""Decides whether to publish nothing, an update of the base, or a whole generation."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.complete.record import read_columns
from pipelines.config.model import Nightly
from pipelines.job.job import Job
from pipelines.nightly.drift import Drift, measure_drift
from pipelines.nightly.update import ChangesSinceBase, source_of_update
from pipelines.publish.generators import SampledGenerators, carried_over
from probelog.index.shortlist import EXACT_LOGITS

_FIRST_CLASSIFIERS = (
    "the index held generators alone, and its completion and its background were fitted on no classifier"
)


@dataclass(frozen=True)
class Decision:
    """The decision to publish.

    Attributes:
        rebuild: whether to publish a whole generation; otherwise an update.
        drift: of the index from the data that the base was fitted on.
        refit_due: why a full run is due; None where it is not.
    """

    rebuild: bool
    drift: Drift
    refit_due: str | None


def decide(job: Job, changes: ChangesSinceBase, sampled: SampledGenerators | None = None) -> Decision | None:
    """Compare the changes with the live generation and measure drift; None where there is nothing to publish.

    ``sampled``: all generators; none: they stay as they are.
    """
    start, pointer = changes.start, changes.start.live.pointer
    unchanged = changes.empty and carried_over(start.base, sampled)
    if source_of_update(changes, sampled) == pointer.source or (unchanged and pointer.base is None):
        return None
    columns = read_columns(job.store, start.completion)
    drift = measure_drift(start.base, changes.descriptors, start.completion, columns, job.config.top_r)
    # A reader scores all logits of an update itself for every query.
    rebuild = drift.share > job.config.nightly.rebuild_share or drift.logits > EXACT_LOGITS
    if drift.logits and not start.base.size:
        return Decision(rebuild, drift, _FIRST_CLASSIFIERS)
    return Decision(rebuild, drift, _refit_due(drift, job.config.nightly))


def _refit_due(drift: Drift, nightly: Nightly) -> str | None:
    """Why the completion and the calibration should be fitted again; None where they need not."""
    name, largest = drift.largest()
    if largest > nightly.max_drift:
        return f"the {name} has moved by {largest:.1%} since the last one, more than nightly.max_drift ({nightly.max_drift:.1%})"
    return None

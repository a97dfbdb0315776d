"""What is to be published: nothing, an update of the base, or a whole generation."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.complete.record import read_columns
from pipelines.config.model import Nightly
from pipelines.job.job import Job
from pipelines.nightly.drift import Drift, measure_drift
from pipelines.nightly.update import ChangesSinceBase
from probelog.index.shortlist import EXACT_LOGITS


@dataclass(frozen=True)
class Decision:
    """That something is to be published, and how.

    Attributes:
        rebuild: as a whole generation; otherwise as an update.
        drift: how far the index is from what the base was fitted on.
        refit_due: why a full run is due, if it is.
    """

    rebuild: bool
    drift: Drift
    refit_due: str | None


def decide(job: Job, changes: ChangesSinceBase) -> Decision | None:
    """Compare the changes with what is live and with what the base was fitted on; None where nothing is new."""
    start, pointer = changes.start, changes.start.live.pointer
    if changes.source == pointer.source or (changes.empty and pointer.base is None):
        return None
    columns = read_columns(job.store, start.completion)
    drift = measure_drift(start.base, changes.descriptors, start.completion, columns, job.config.top_r)
    # A reader scores all of an update's own logits for every question.
    rebuild = drift.share > job.config.nightly.rebuild_share or drift.logits > EXACT_LOGITS
    return Decision(rebuild, drift, _refit_due(drift, job.config.nightly))


def _refit_due(drift: Drift, nightly: Nightly) -> str | None:
    """Why the completion and the calibration should be fitted again, if they should."""
    name, largest = drift.largest()
    if largest > nightly.max_drift:
        return f"the {name} has moved by {largest:.1%} since the last one, more than nightly.max_drift ({nightly.max_drift:.1%})"
    return None

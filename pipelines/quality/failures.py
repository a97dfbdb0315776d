"""Shares of the models that failed, by reason, compared with those of the last run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.quality.measure import Measure, least_rise
from probelog.index.settings import GenerationSettings

# Uploaders add models in batches: three broken ones of one uploader do not mean a broken run. With fewer models than
# this the rates are not judged.
LEAST_MODELS = 20


@dataclass(frozen=True)
class FailureCounts:
    """Counts of a run's models.

    Attributes:
        models: number of models that were tried.
        failures: number of these that failed, by reason.
    """

    models: int
    failures: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, indexed: int, failures: Mapping[str, int]) -> FailureCounts:
        """Counts of a run that indexed so many models, and failed at others."""
        return cls(indexed + sum(failures.values()), dict(failures))

    @classmethod
    def of_settings(cls, settings: GenerationSettings) -> FailureCounts:
        """Counts of the run that made a generation, from its settings."""
        return cls(**settings.run)

    def to_dict(self) -> dict[str, Any]:
        """For a generation's settings."""
        return asdict(self)

    def share(self, reason: str | None = None) -> float | None:
        """Share of the models that failed, for any reason or for one; None where none was tried."""
        return self.count(reason) / self.models if self.models else None

    def count(self, reason: str | None = None) -> int:
        """Number of models that failed, for any reason or for one."""
        return sum(self.failures.values()) if reason is None else self.failures.get(reason, 0)


def failure_measures(run: FailureCounts, last: FailureCounts | None, limit: float) -> list[Measure]:
    """Measures of all failures together and of each reason, most frequent first.

    Args:
        run: counts of this run.
        last: counts of the run that made the live generation; None without one.
        limit: of the rise of each share.
    """
    reasons = sorted(
        {*run.failures, *(last.failures if last is not None else ())},
        key=lambda reason: (-run.count(reason), reason),
    )
    return [_measure(run, last, limit, reason) for reason in (None, *reasons)]


def _measure(run: FailureCounts, last: FailureCounts | None, limit: float, reason: str | None) -> Measure:
    worse, note = None, ""
    if last is None or not last.models:
        note = "no run to compare with"
    elif run.models < LEAST_MODELS:
        note = f"not judged: {run.models} models were tried, {LEAST_MODELS} are needed"
    else:
        worse = least_rise(run.count(reason), run.models, last.count(reason), last.models)
    examples = []
    if last is not None and run.models and last.models:
        examples = [
            f"{run.count(reason):,} of {run.models:,} models, {last.count(reason):,} of {last.models:,} in the last run"
        ]
    return Measure(
        name="failed models" if reason is None else f"failed: {reason}",
        meaning="Share of the models tried that failed"
        + ("" if reason is None else f" with {reason}")
        + ", and by how much it rose over the last run's at the least.",
        value=run.share(reason),
        before=None if last is None else last.share(reason),
        worse=worse,
        limit=limit,
        counted=run.models,
        note=note,
        examples=examples,
    )

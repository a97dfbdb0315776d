"""Shares of the models that failed, by reason, beside those of the last run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.quality.measure import Measure, least_rise
from probelog.index.settings import GenerationSettings

# Models come in batches: three broken ones of one uploader say nothing about the night. Only many of many do.
LEAST_MODELS = 20


@dataclass(frozen=True)
class FailureCounts:
    """What a run's models came to.

    Attributes:
        models: how many were tried.
        failures: how many of these failed, by reason.
    """

    models: int
    failures: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of_settings(cls, settings: GenerationSettings) -> FailureCounts:
        """That of the run which made a generation, from its settings."""
        return cls(**settings.run)

    def to_dict(self) -> dict[str, Any]:
        """For a generation's settings."""
        return asdict(self)

    def share(self, reason: str | None = None) -> float | None:
        """Share of the models that failed, of all or of one reason; None where none was tried."""
        return self.count(reason) / self.models if self.models else None

    def count(self, reason: str | None = None) -> int:
        """How many failed, of all or of one reason."""
        return sum(self.failures.values()) if reason is None else self.failures.get(reason, 0)


def failure_measures(run: FailureCounts, last: FailureCounts | None, limit: float) -> list[Measure]:
    """All failures together, and each reason's, most frequent first."""
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

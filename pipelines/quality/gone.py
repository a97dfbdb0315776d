"""Models that left: answers that went with them are no fault of the index, unless too many go at once."""

from __future__ import annotations

from pipelines.quality.canaries import EXAMPLES
from pipelines.quality.intervals import wilson
from pipelines.quality.measure import Measure
from pipelines.quality.samples import rows_of, sampled_models
from probelog.index.generation import Generation

_MODELS = 400


def gone_measure(candidate: Generation, live: Generation | None, limit: float) -> Measure:
    """Share of the live generation's repositories that the candidate lacks."""
    value = worse = None
    note, gone, count = "", [], 0
    if live is None:
        note = "there is no live generation to compare with"
    else:
        repos = [model.repo for model in sampled_models(live, _MODELS)]
        there = {row.repo for row in rows_of(candidate, repos)}
        gone, count = [repo for repo in repos if repo not in there], len(repos)
        if count:
            value, worse = len(gone) / count, wilson(len(gone), count)[0]
    return Measure(
        name="models gone",
        meaning="Share of the live generation's repositories that the candidate lacks; and the least that it can be, "
        "seen from a sample.",
        value=value,
        before=None,
        worse=worse,
        limit=limit,
        counted=count,
        note=note,
        examples=gone[:EXAMPLES],
    )

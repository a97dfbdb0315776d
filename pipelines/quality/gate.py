"""Runs the quality gate: measures a candidate, writes its report, and refuses it if a limit is exceeded."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Sequence

from pipelines.config.model import Quality
from pipelines.job.background import HUB
from pipelines.quality.agreement import declared_measures, named_measures
from pipelines.quality.canaries import (
    Canary,
    background_canaries,
    known_answers,
    lost_answers,
    read_canaries,
    removed_measure,
)
from pipelines.quality.failures import FailureCounts, failure_measures
from pipelines.quality.generators import GENERATORS, removed_generators
from pipelines.quality.measure import Measure
from pipelines.quality.report import Verdict, write_report
from pipelines.quality.samples import Version, added_versions
from probelog.errors import QualityError, StoreError
from probelog.index.generation import Generation
from probelog.storage.store import Store

# Every full run makes a hub's background anew: where it keeps so large a share of the names, answers should stay.
_SAME_NAMES = 0.9
# Settings that determine how logits are described and queried. Where one of these changed, answers should change.
_METHOD = ("encoder_digest", "prompts", "probe_set", "fraction", "seed", "method")


def run_quality_gate(
    store: Store,
    candidate: Generation,
    live: Generation | None,
    run: FailureCounts,
    last: FailureCounts | None,
    quality: Quality,
    added: Sequence[Version] | None = None,
) -> Verdict:
    """Measure a candidate and write its report; returns only if it may be published.

    Args:
        store: gets the report.
        candidate: built, checked, and not live.
        live: the live generation; None before the first publish.
        run: counts of this run's models and failures.
        last: counts of the run that made the live generation (`FailureCounts.of_settings`), where known.
        quality: the limits.
        added: (repo, sha) of the models that the candidate holds and the live generation does not, where the
            publisher knows them; otherwise both are compared.

    Raises:
        QualityError: it exceeds a limit, and limits are enforced.
        StoreError: one of the two cannot be read. If it is the live one and limits are not enforced, the candidate is
            measured alone instead.
    """
    started, note = time.monotonic(), ""
    try:
        measures = measure(candidate, live, run, last, quality, added)
    except StoreError as error:
        if live is None or quality.enforce:
            raise
        note = f"The live generation {live.pointer.generation} could not be compared with: {error}"
        live = None
        measures = measure(candidate, None, run, last, quality, added)
    verdict = Verdict(
        generation=candidate.pointer.generation,
        live=None if live is None else live.pointer.generation,
        enforced=quality.enforce,
        measures=measures,
        at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 2),
        note=note,
    )
    page = write_report(store, verdict)
    if verdict.refused:
        raise QualityError(_format(verdict, store.path(page)))
    return verdict


def measure(
    candidate: Generation,
    live: Generation | None,
    run: FailureCounts,
    last: FailureCounts | None,
    quality: Quality,
    added: Sequence[Version] | None = None,
) -> list[Measure]:
    """All measures, in the order of the report; arguments as for `run_quality_gate`."""
    operator_canaries = read_canaries(quality.canaries)
    canaries = [*operator_canaries, *background_canaries(candidate.background, quality.background_canaries)]
    if added is None:
        added = [] if live is None else added_versions(candidate, live)
    unlike = "" if live is None else ", ".join(changed_settings(candidate, live))
    return [
        lost_answers(candidate, live, canaries, quality.max_lost, unlike),
        *_lost_generators(candidate, live, canaries, quality.max_lost, unlike),
        known_answers(candidate, live, operator_canaries, quality.max_known_missed),
        *declared_measures(candidate, live, quality.max_agreement_fall),
        *named_measures(candidate, live, added, quality.max_agreement_fall, quality.max_new_agreement_fall),
        removed_measure(candidate, live, quality.max_gone),
        *removed_generators(candidate, live, quality.max_gone),
        *failure_measures(run, last, quality.max_failure_rise),
    ]


def _lost_generators(
    candidate: Generation, live: Generation | None, canaries: Sequence[Canary], limit: float, unlike: str
) -> list[Measure]:
    """As of classifiers, where both have generators."""
    if live is None:
        return []
    before, after = live.settings.generators, candidate.settings.generators
    if before is None or after is None:
        return []
    if before.ledger != after.ledger:
        unlike = ", ".join([*([unlike] if unlike else []), "samples"])
    return [lost_answers(candidate, live, canaries, limit, unlike, GENERATORS)]


def changed_settings(candidate: Generation, live: Generation) -> list[str]:
    """Names of the settings that differ and explain different answers."""
    changed = [name for name in _METHOD if getattr(candidate.settings, name) != getattr(live.settings, name)]
    return changed + (["background"] if _other_background(candidate, live) else [])


def _other_background(candidate: Generation, live: Generation) -> bool:
    if candidate.settings.background_source == live.settings.background_source == HUB:
        names, before = {*candidate.background}, {*live.background}
        return len(names & before) < _SAME_NAMES * len(names | before)
    return candidate.background != live.background


def _format(verdict: Verdict, page: str) -> str:
    lines = [f"generation {verdict.generation} was not published: it exceeds the limits of the quality gate"]
    for item in verdict.failed:
        share = "" if item.value is None else f"{item.value:.1%}"
        live_value = "" if item.before is None else f" (before: {item.before:.1%})"
        lines.append(
            f"  - {item.name}: {share}{live_value}, worse by at least {item.worse:.1%}, limit {item.limit:.1%}"
        )
        lines += [f"      {example}" for example in item.examples[:2]]
    lines.append(f"The report is {page}")
    lines.append("The live generation stays live. To publish this one anyway: --set quality.enforce=false")
    return "\n".join(lines)

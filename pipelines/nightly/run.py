"""The nightly run: probes models that are new or changed on the Hub since the last one and adds them to the live index.

1. One run at a time: a lease in the store.
2. *List*: the Hub's listing, newest first, down to a watermark.
3. *Reconcile*: every few days the whole listing is compared with the index, to find models that were removed, renamed
   or gated.
4. *Probe* the new commits, in a separate ledger (`pipelines.nightly.record`).
5. *Describe* them with the published columns.
6. *Decide* (`pipelines.nightly.decision`): without changes nothing is published. Otherwise an update of the live
   generation's base holds all changes since the base, the added models attached to their trees
   (`pipelines.trees.nightly`); beyond ``nightly.rebuild_share`` a whole generation is built.
7. *Publish*: checks, the quality gate, and one swap of the pointer.

If the run is killed, the next one resumes where it was. When the index has drifted too far from the data that its
completion was fitted on, the run says that a full run is due.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.runtime.session import shared_session
from pipelines.inspect.config_check import refuse_early
from pipelines.job.figures import recorded
from pipelines.job.job import Job
from pipelines.job.lease import hold_lease
from pipelines.nightly.changes import list_changes, reconcile_changes, save_changes
from pipelines.nightly.decision import decide
from pipelines.nightly.drift import Drift
from pipelines.nightly.probing import describe_changes, probe_changes
from pipelines.nightly.rebuild import publish_rebuilt
from pipelines.nightly.start import open_start
from pipelines.nightly.update import changes_since_base, publish_update
from pipelines.publish.generators import SampledGenerators
from pipelines.publish.release import PublishResult
from pipelines.sample.stage import sample_changes, sampled_generators
from pipelines.trees.nightly import attach_changes
from probelog.encoders.torch_encoder import found_encoder
from probelog.storage.layout import LEASE
from probelog.storage.schemas import Failure


@dataclass(frozen=True)
class NightlyRun:
    """Result of a nightly run.

    Attributes:
        published: the live generation.
        tried: number of repositories with a new commit, those that failed before and were tried again included.
        added: number of these that the index did not hold before.
        removed: number of the base's models that are no longer in the index.
        failures: of the models that were added since the base and could not be probed.
        drift: None where nothing was published.
        refit_due: why a full run is due, if it is.
    """

    published: PublishResult
    tried: int
    added: int
    removed: int
    failures: Sequence[Failure]
    drift: Drift | None
    refit_due: str | None

    @property
    def failed_share(self) -> float:
        """Share of the models tried since the base that failed."""
        return len(self.failures) / self.tried if self.tried else 0.0


def run_nightly(job: Job) -> NightlyRun:
    """One nightly run.

    Raises:
        UsageError: nothing was published yet, or with other settings.
        LeaseHeldError: another nightly run is at work.
        TooManyRemovedError: the Hub lacks more of the index than ``nightly.max_removed_share`` allows.
        HubError: the Hub refuses or does not answer.
        HeldError: an operator holds the live generation; what was probed is kept, and published after the release.
        QualityError: the new generation fails the quality gate; the live one stays live.
        StoreError: the store refuses, or is damaged.
    """
    refuse_early(job.config, "nightly", ask_hub=False)
    nightly = job.config.nightly
    stage = job.figures.stage
    with (
        hold_lease(job.store, LEASE, seconds=nightly.lease_seconds, wait=nightly.lease_wait) as lease,
        recorded(job, "nightly"),
    ):
        start = open_start(job)
        # Found before hours of probing.
        encoder = found_encoder(job.config.encoder) if job.config.generators.enabled else None
        with stage("list"):
            hub = list_changes(job, start)
        with stage("reconcile"):
            hub = reconcile_changes(job, start, hub)
        hub = save_changes(job, start, hub)
        with shared_session():
            with stage("probe"):
                probed = probe_changes(job, start, hub.to_index)
            with stage("complete"):
                described = describe_changes(job, start, probed)
            sampled: SampledGenerators | None = None
            if encoder is not None:
                with stage("sample"):
                    sample_changes(job, start.endpoint, encoder)
                sampled = sampled_generators(job, start.endpoint, encoder)
        changes = changes_since_base(job, start, hub, probed, described)
        added = changes.missing_in(start.live.generation)
        decision = decide(job, changes, sampled)
        result = NightlyRun(
            published=start.live.unchanged(),
            tried=len(changes.rows),
            added=len(added),
            removed=len(changes.removed),
            failures=probed.ledger.failures,
            drift=None if decision is None else decision.drift,
            refit_due=None if decision is None else decision.refit_due,
        )
        job.figures.counts |= {name: getattr(result, name) for name in ("tried", "added", "removed")}
        job.figures.counts["failed"] = len(result.failures)
        if decision is not None and decision.rebuild:
            with stage("publish"):
                result = replace(
                    result, published=publish_rebuilt(job, changes, probed.run, lease.check, sampled)
                )
        elif decision is not None:
            with stage("trees"):
                trees = attach_changes(
                    job, start.base, changes.for_trees(sampled), changes.removed_repos(sampled)
                )
            with stage("publish"):
                published = publish_update(
                    job, changes, probed.run, decision.drift, added, lease.check, trees, sampled
                )
            result = replace(result, published=published)
    _report(job, result, len(changes.descriptors.models))
    return result


def _report(job: Job, result: NightlyRun, since_base: int) -> None:
    if result.drift is None:
        job.report.say(f"nightly: nothing new; generation {result.published.pointer.generation} stays live")
        return
    name, largest = result.drift.largest()
    job.report.say(
        f"nightly: {result.added:,} models added by this run; since the last full run {since_base:,} added, "
        f"{result.removed:,} removed, drift {largest:.1%} ({name})"
    )
    if result.refit_due is not None:
        job.report.say(f"nightly: a full run is due: {result.refit_due}")

"""The nightly run: what is new or changed on the Hub since the last one is probed and merged into the live index.

1. One run at a time: a lease in the store.
2. *List*: the Hub's listing, newest first, down to a watermark.
3. *Reconcile*: every some days the whole listing is compared with the index, to find what was removed, renamed or gated.
4. *Probe* the new commits, in a ledger of their own (`pipelines.nightly.record`).
5. *Describe* them with the published columns.
6. *Decide* (`pipelines.nightly.decision`): with nothing new, nothing is published. Otherwise an update of the live
   generation's base holds all changes since the base; when these are much of the index, it is rebuilt as a whole.
7. *Publish*: checks, the quality gate, and one swap of the pointer.

Killed at any moment, the next run goes on where this one was. When the index has drifted from what its completion was
fitted on, the run says that a full one is due.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.job.job import Job
from pipelines.job.lease import hold_lease
from pipelines.nightly.changes import list_changes, reconcile_changes, save_changes
from pipelines.nightly.decision import decide
from pipelines.nightly.drift import Drift
from pipelines.nightly.probing import describe_changes, probe_changes
from pipelines.nightly.rebuild import publish_rebuilt
from pipelines.nightly.start import open_start
from pipelines.nightly.update import changes_since_base, publish_update
from pipelines.publish.release import PublishResult
from probelog.storage.schemas import Failure

LEASE = "nightly/lease.json"


@dataclass(frozen=True)
class NightlyRun:
    """What a nightly run did.

    Attributes:
        published: what is live now.
        tried: repositories with a new commit, this run's and those that failed before and were tried again.
        added: of those, what the index did not hold before.
        gone: repositories that have disappeared from answers since the base was published.
        failures: of the models that were added since the base and could not be probed.
        drift: None where nothing was published.
        refit_due: why a full run is due, if it is.
    """

    published: PublishResult
    tried: int
    added: int
    gone: int
    failures: Sequence[Failure]
    drift: Drift | None
    refit_due: str | None

    @property
    def failed_share(self) -> float:
        """Share of the models that were tried since the base and failed."""
        return len(self.failures) / self.tried if self.tried else 0.0


def run_nightly(job: Job) -> NightlyRun:
    """One nightly run.

    Raises:
        UsageError: nothing was published yet, or with other settings.
        LeaseHeldError: another nightly run is at work.
        TooManyGoneError, HubError: the Hub does not answer as it must.
        QualityError: what was added is worse than the quality gate allows; what was live stays live.
        StoreError: the store refuses, or is damaged.
    """
    nightly = job.config.nightly
    with hold_lease(job.store, LEASE, seconds=nightly.lease_seconds, wait=nightly.lease_wait) as lease:
        start = open_start(job)
        hub = list_changes(job, start)
        hub = reconcile_changes(job, start, hub)
        hub = save_changes(job, start, hub)
        # A Ray that was started to probe is there to describe, too.
        with contextlib.ExitStack() as ray:
            probed = probe_changes(job, start, hub.to_index, ray)
            described = describe_changes(job, start, probed)
        changes = changes_since_base(job, start, hub, probed, described)
        added = changes.missing_in(start.live.generation)
        decision = decide(job, changes)
        if decision is None:
            published = start.live.unchanged()
        elif decision.rebuild:
            published = publish_rebuilt(job, changes, probed.run, lease.check)
        else:
            published = publish_update(job, changes, probed.run, decision.drift, added, lease.check)
    done = NightlyRun(
        published=published,
        tried=len(changes.rows),
        added=len(added),
        gone=len(changes.removed),
        failures=probed.ledger.failures,
        drift=None if decision is None else decision.drift,
        refit_due=None if decision is None else decision.refit_due,
    )
    _report(job, done, len(changes.descriptors.models))
    return done


def _report(job: Job, done: NightlyRun, since_base: int) -> None:
    if done.drift is None:
        job.report.say(f"nightly: nothing new; generation {done.published.pointer.generation} stays live")
        return
    name, largest = done.drift.largest()
    job.report.say(
        f"nightly: {done.added:,} models added tonight; since the last full run {since_base:,} added, "
        f"{done.gone:,} gone, drift {largest:.1%} ({name})"
    )
    if done.refit_due is not None:
        job.report.say(f"nightly: a full run is due: {done.refit_due}")

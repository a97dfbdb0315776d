"""The nightly run: what is new or changed on the Hub since the last one is probed and merged into the live index.

1. One night at a time: a lease in the store.
2. The Hub's listing, newest first, down to a watermark. Every some days the whole listing is compared with the index
   instead, to find what was removed, renamed or gated.
3. New commits are probed, in a ledger of their own (`pipelines.nightly.record`).
4. They are folded in with the published columns, and compared with the published background.
5. An update of the live generation's base holds all that came since the base, and says what is gone.
6. Checks, the quality gate, and one swap of the pointer.

Nothing new: nothing is published. Killed at any moment, the next run goes on where this one was. When much of the index
has come by night, it is built anew as a whole; when it has drifted from what its completion was fitted on, the run says
that a full one is due.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from cluster.runtime.session import session
from cluster.runtime.warm_up import preloaded_libraries
from pipelines.complete.descriptors import Descriptors
from pipelines.complete.record import CompletionRecord, completed, joined, read_columns
from pipelines.complete.stage import fold_in
from pipelines.config.model import Nightly
from pipelines.crawl.changes import listed_since
from pipelines.crawl.reconcile import reconcile
from pipelines.crawl.stage import hub_endpoint
from pipelines.job.background import background_names
from pipelines.job.job import Job
from pipelines.job.lease import Lease, hold_lease
from pipelines.nightly.drift import Drift, measure_drift
from pipelines.nightly.record import NightFiles, NightRecord
from pipelines.nightly.update import NightWork, publish_update
from pipelines.probe.stage import ProbeResult, anything_left, probe
from pipelines.publish.release import PublishResult
from pipelines.publish.stage import ListingSnapshot, publish
from pipelines.quality.failures import FailureCounts
from pipelines.quality.samples import Version
from probelog.encoders.torch_encoder import load_encoder
from probelog.errors import IndexNotFoundError, StoreError, UsageError
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer, read_pointer
from probelog.index.shortlist import EXACT_LOGITS
from probelog.probes.probe_set import ProbeSet
from probelog.storage.encoding import from_npy
from probelog.storage.ledger import Counts, Ledger, item_key, key_numbers
from probelog.storage.schemas import CATALOGUE, CatalogueRow, Failure, ProbedModel, to_table

LEASE = "nightly/lease.json"
# What the catalogue says of a model and the index keeps.
_LISTED = [
    "repo",
    "sha",
    "pipeline_tag",
    "licence",
    "tags",
    "downloads",
    "likes",
    "last_modified",
    "base_model",
]


@dataclass(frozen=True)
class NightlyRun:
    """What a nightly run did.

    Attributes:
        published: what is live now.
        tried: repositories with a new commit, this run's and those that failed before and were tried again.
        added: of those, what the index did not hold before.
        gone: repositories that have disappeared from answers since the base was published.
        failures: of the models that came since the base and could not be probed.
        drift: None where nothing was published.
        refit_due: why a full run is due, if it is.
    """

    published: PublishResult
    tried: int
    added: int
    gone: int
    failures: Sequence[Failure]
    drift: Drift | None = None
    refit_due: str | None = None

    @property
    def failed_share(self) -> float:
        """Share of the models that were tried since the base and failed."""
        return len(self.failures) / self.tried if self.tried else 0.0


def run_nightly(job: Job) -> NightlyRun:
    """One night.

    Raises:
        UsageError: nothing was published yet, or with other settings.
        LeaseHeldError: another night is at work.
        TooManyGoneError, HubError: the Hub does not answer as it must.
        QualityError: what came is worse than the quality gate allows; what was live stays live.
        StoreError: the store refuses, or is damaged.
    """
    nightly = job.config.nightly
    with hold_lease(job.store, LEASE, seconds=nightly.lease_seconds, wait=nightly.lease_wait) as lease:
        return _Night(job, lease).run()


class _Night:
    """One run, with the lease held."""

    def __init__(self, job: Job, lease: Lease) -> None:
        self._job, self._lease = job, lease
        self._index = job.store.child("index")
        try:
            self._live = read_pointer(self._index)[0]
        except IndexNotFoundError:
            raise UsageError(
                f"{job.store.uri} has no published index yet that a night could add to: run `probelog-index full` first"
            ) from None
        base = self._live.base or self._live.generation
        self._base = Generation(self._index, Pointer(base, "", ""))
        _same_settings(job, self._base)
        self._probe_set = ProbeSet.open(job.store, str(self._base.settings["probe_set"]))
        self._files = NightFiles(job.store, job.observations_key(self._probe_set.hash), base)
        self._endpoint = hub_endpoint()

        self._now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        self._failed = _Failed(from_npy(self._base.meta("failed.npy")))

    def run(self) -> NightlyRun:
        record, rows = self._looked_around()
        with contextlib.ExitStack() as held:
            # A Ray that was started to probe is there to describe, too.
            probed, fresh = self._probed(rows, held)
            described = self._described(probed)
        models = {(row.repo, row.sha): row for row in rows}
        descriptors = Descriptors(
            self._job.store,
            [receipt for receipt in probed.receipts if receipt.name in described.parts],
            described.parts,
            [
                model
                for model in self._files.ledger.models(probed.receipts)
                if (model.repo, model.sha) in models
            ],
        )
        gone = self._gone(record, rows, descriptors.models, probed.failures)
        work = NightWork(self._base, descriptors, models, gone, described.key, record.watermark, self._now)
        return self._published(work, record, probed, described, fresh)

    # What is new

    def _looked_around(self) -> tuple[NightRecord, list[CatalogueRow]]:
        """The record, and the catalogue of all that came since the base, with what this night's listing adds."""
        job, settings = self._job, self._base.settings
        record = self._files.read() or NightRecord(
            self._files.base, settings["watermark"], str(settings["listed"])
        )
        rows = {row.repo: row for row in self._files.rows(record)}
        removed = dict(record.removed)
        now = dt.datetime.fromisoformat(self._now)
        watermark = None if record.watermark is None else dt.datetime.fromisoformat(record.watermark)
        found = listed_since(job, self._endpoint, watermark, self._failed)
        if found.watermark is not None:
            record = replace(record, watermark=found.watermark.isoformat())
        for row in found.rows:
            rows[row.repo] = row
            if not (row.gated or row.disabled):  # what is gated stays listed
                removed.pop(row.repo, None)  # it is there again
        age = now - dt.datetime.fromisoformat(record.reconciled)
        if age >= dt.timedelta(days=job.config.nightly.reconcile_days):
            compared = reconcile(job, self._endpoint, self._versions(rows), self._failed)
            rows |= {row.repo: row for row in (*compared.changed, *compared.missed)}
            removed = {
                repo: {"reason": gone.reason.value, "detail": gone.detail}
                for repo, gone in compared.gone.items()
            }
            record = replace(record, reconciled=self._now)
        held = {repo: row["sha"] for repo, row in self._held(rows).items()}
        # A repository that is as the base holds it, again or still, is none that came.
        rows = {repo: row for repo, row in rows.items() if held.get(repo) != row.sha}
        record = self._files.write(replace(record, removed=removed), list(rows.values()))
        job.report.say(
            f"nightly: {len(rows):,} commits that the index of {self._base.settings['listed'][:10]} does not hold"
            + (f", {len(removed):,} repositories that it must not hold any more" if removed else "")
        )
        return record, [row for repo, row in rows.items() if repo not in removed]

    def _versions(self, rows: Mapping[str, CatalogueRow]) -> Iterator[Version]:
        """All that the index holds or is about to hold, whether it was thought to be gone or not."""
        table = self._base.models_table(["repo", "sha"])
        for repo, sha in zip(table["repo"].to_pylist(), table["sha"].to_pylist(), strict=True):
            if repo not in rows:
                yield repo, sha
        for row in rows.values():
            yield row.repo, row.sha

    def _held(self, repos: Iterable[str]) -> dict[str, dict[str, Any]]:
        """``id`` and ``sha`` of those of some repositories that the base holds."""
        return {row["repo"]: row for row in self._base.models_named("repo", repos, ["repo", "sha"])}

    # What it does

    def _probed(
        self, rows: Sequence[CatalogueRow], held: contextlib.ExitStack
    ) -> tuple[ProbeResult, FailureCounts]:
        """The ledger after this night's probing, and what became of what was tried in it.

        ``held`` keeps the Ray session, where one is needed.
        """
        job, files = self._job, self._files
        before = set(files.ledger.receipt_names())
        if not rows and not before:
            return ProbeResult(files.key, [], 0, []), FailureCounts(0)
        table = to_table(rows, CATALOGUE)
        with contextlib.ExitStack() as meanwhile:
            if anything_left(job, table, files.key):
                config = job.config
                warm = preloaded_libraries(config.ray_address, config.scratch, config.preload)
                meanwhile.enter_context(warm)
                held.enter_context(session(config.ray_address))
            probed = probe(job, table, self._probe_set, self._endpoint, False, key=files.key)
        files.enter_in_main(receipt.name for receipt in probed.receipts)
        fresh = [receipt for receipt in probed.receipts if receipt.name not in before]
        counts = sum(files.ledger.counts(fresh, earlier=probed.receipts), Counts())
        tried = counts.indexed + sum(counts.failed.values())
        return probed, FailureCounts(tried, dict(counts.failed))

    def _described(self, probed: ProbeResult) -> CompletionRecord:
        """Descriptors of all that was probed by night, with the base's columns."""
        key = f"{self._fitted.key}-{self._files.base}"
        embeddings = self._base.probe_embeddings
        return fold_in(self._job, self._fitted, key, self._files.key, probed.receipts, embeddings)

    @cached_property
    def _fitted(self) -> CompletionRecord:
        """The base's completion."""
        store, key = self._job.store, str(self._base.settings["completion"])
        done = completed(store, key)
        if done is None:
            raise StoreError(
                f"{store.path('completion')}/{key}, which the live index was made from, is gone: run "
                "`probelog-index full`"
            )
        return done

    def _gone(
        self,
        record: NightRecord,
        rows: Sequence[CatalogueRow],
        models: Sequence[ProbedModel],
        failures: Sequence[Failure],
    ) -> dict[str, int]:
        """The base's models that do not count any more: their numbers, by repository."""
        # A new commit that may still be probed some other night leaves the old one where it is.
        replaced = {model.repo for model in models}
        replaced |= {failure.repo for failure in failures if not failure.retryable}
        wanted = {*record.removed, *(row.repo for row in rows if row.repo in replaced)}
        return {repo: int(row["id"]) for repo, row in self._held(wanted).items()}

    # What readers see of it

    def _published(
        self,
        work: NightWork,
        record: NightRecord,
        probed: ProbeResult,
        described: CompletionRecord,
        fresh: FailureCounts,
    ) -> NightlyRun:
        job, live = self._job, self._live
        opened = Generation(self._index, live)
        came = {(model.repo, model.sha) for model in work.descriptors.models}
        there = {
            (row["repo"], row["sha"])
            for row in opened.models_named("repo", {repo for repo, _ in came}, ["repo", "sha"])
        }
        done = NightlyRun(
            PublishResult(live, False, opened.settings["models"], opened.settings["logits"]),
            tried=len(work.rows),
            added=len(came - there),
            gone=len(work.gone),
            failures=probed.failures,
        )
        if work.source == live.source or (work.empty and live.base is None):
            job.report.say(f"nightly: nothing new; generation {live.generation} stays live")
            return done
        columns = read_columns(job.store, self._fitted)
        drift = measure_drift(self._base, work.descriptors, self._fitted, columns, job.config.top_r)
        if self._needs_rebuild(drift):
            published = self._rebuilt(work, record, described, fresh)
        else:
            published = publish_update(job, live, work, fresh, drift, sorted(came - there), self._lease.check)
        due = _refit_due(drift, job.config.nightly)
        job.report.say(
            f"nightly: {done.added:,} models added tonight; since the last full run {len(came):,} added, "
            f"{done.gone:,} gone, drift {drift.largest()[1]:.1%} ({drift.largest()[0]})"
        )
        if due is not None:
            job.report.say(f"nightly: a full run is due: {due}")
        return replace(done, published=published, drift=drift, refit_due=due)

    def _needs_rebuild(self, drift: Drift) -> bool:
        """Whether so much came that an update would cost readers more than a whole generation."""
        # A reader scores all of an update's own logits for every question.
        return drift.share > self._job.config.nightly.rebuild_share or drift.logits > EXACT_LOGITS

    def _rebuilt(
        self, work: NightWork, record: NightRecord, described: CompletionRecord, fresh: FailureCounts
    ) -> PublishResult:
        """A whole generation of all that the index holds, with the columns as they are."""
        job, key = self._job, str(self._base.settings["observations"])
        job.report.say("nightly: much of the index has come by night: it is built anew as a whole")
        gone = set(work.gone.values())
        rows = [
            CatalogueRow(**{name: row[name] for name in _LISTED})
            for row in self._base.models_table(_LISTED).to_pylist()
            if row["id"] not in gone
        ]
        return publish(
            job,
            ListingSnapshot([*rows, *work.rows.values()], record.watermark, record.reconciled, work.at),
            self._probe_set,
            load_encoder(job.config.encoder),
            key,
            Ledger(job.store, f"observations/{key}").receipts(),
            joined(job.store, self._fitted, described, key),
            fresh,
            self._lease.check,
            night=work.at,
        )


class _Failed:
    """The models that the last full run tried and could not index, each at the commit it tried."""

    def __init__(self, keys: npt.NDArray[np.uint64]) -> None:
        self._keys = keys

    def __contains__(self, version: object) -> bool:
        repo, sha = cast("Version", version)
        (key,) = key_numbers([item_key(repo, sha)])
        place = int(np.searchsorted(self._keys, key))
        return place < len(self._keys) and bool(self._keys[place] == key)


def _refit_due(drift: Drift, nightly: Nightly) -> str | None:
    """Why the completion and the calibration should be fitted anew, if they should."""
    name, largest = drift.largest()
    if largest > nightly.max_drift:
        return f"the {name} has moved by {largest:.1%} since the last one, more than nightly.max_drift ({nightly.max_drift:.1%})"
    return None


def _same_settings(job: Job, base: Generation) -> None:
    """Refuse to add to an index what was made otherwise.

    Raises:
        UsageError: names everything that is different.
    """
    config, settings = job.config, base.settings
    different = []
    if job.observations_key(str(settings["probe_set"])) != settings["observations"]:
        different.append(
            f"fraction and seed are {config.fraction:g} and {config.seed}, the index's are {settings['fraction']:g} "
            f"and {settings['seed']}"
        )
    # The same encoder may lie in another folder now.
    if (
        config.encoder != settings["encoder"]
        and load_encoder(config.encoder).digest != settings["encoder_digest"]
    ):
        different.append(f"encoder is {config.encoder}, the index's is {settings['encoder']}")
    if config.prompts != settings["prompts"]:
        different.append(f"prompt is {config.prompts}, the index's is {settings['prompts']}")
    if background_names(config.background, config.background_count, config.seed) != base.background:
        different.append(f"background {config.background} is not the index's")
    if different:
        raise UsageError(
            f"the live index of {job.store.uri} was made with other settings: {'; '.join(different)}. Use its settings, "
            "or run `probelog-index full` with the new ones"
        )

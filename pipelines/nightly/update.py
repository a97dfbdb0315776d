"""An update: the models that nightly runs since the base have added and removed, as a generation beside the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from pipelines.complete.descriptors import Descriptors, DescriptorSummary, same_logits
from pipelines.complete.record import CompletionRecord
from pipelines.job.job import Job
from pipelines.nightly.changes import HubChanges
from pipelines.nightly.drift import Drift
from pipelines.nightly.probing import ProbedChanges
from pipelines.nightly.start import NightlyStart
from pipelines.publish.answers import ASKED_LOGITS
from pipelines.publish.checks import check_update
from pipelines.publish.expected import ExpectedTrees, ExpectedUpdate
from pipelines.publish.generators import SampledGenerators, carried_over, places_in, versions_in, write
from pipelines.publish.release import PublishResult, release_generation
from pipelines.publish.stage import model_table
from pipelines.quality.failures import FailureCounts
from pipelines.quality.samples import Version
from pipelines.trees.inputs import TreeInputs
from pipelines.trees.nightly import UpdateTrees
from probelog.encoders.torch_encoder import deferred_encoder
from probelog.index.generation import Generation
from probelog.index.settings import GenerationSettings
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.rows import write_edges
from probelog.publication.update import Changes, write_update
from probelog.storage.encoding import short_key
from probelog.storage.layout import INDEX
from probelog.storage.schemas import CatalogueRow
from probelog.storage.versions import MADE_BY


@dataclass(frozen=True)
class ChangesSinceBase:
    """All models that nightly runs since the base have added and removed.

    Attributes:
        start: of this run; it has the base.
        hub: changes on the Hub.
        described: completion of the added models.
        descriptors: of the added models.
        rows: rows of the catalogue, by repository and commit.
        removed: numbers of the base's models that are no longer valid, by repository.
    """

    start: NightlyStart
    hub: HubChanges
    described: CompletionRecord
    descriptors: Descriptors
    rows: dict[Version, CatalogueRow]
    removed: dict[str, int]

    @property
    def base(self) -> Generation:
        """The whole generation that these are changes of."""
        return self.start.base

    @property
    def source(self) -> str:
        """Key of the data that an update would be made from."""
        added = [f"{model.repo}@{model.sha}" for model in self.descriptors.models]
        removed = sorted(self.removed.values())
        return short_key("update", self.base.pointer.generation, *added, "gone", *removed)

    @property
    def empty(self) -> bool:
        """Whether an update would equal the base."""
        return not self.descriptors.models and not self.removed

    @cached_property
    def known(self) -> dict[str, int]:
        """Number of rows of the base's logits that added models share, by identity (`same_logits`)."""
        identities = {same_logits(model) for model in self.descriptors.models}
        rows = self.base.models_named("identity", identities, ["identity", "rows"])
        return {row["identity"]: int(row["rows"]) for row in rows}

    def missing_in(self, generation: Generation) -> list[Version]:
        """The added models that a generation does not hold, sorted."""
        added = {(model.repo, model.sha) for model in self.descriptors.models}
        rows = generation.models_named("repo", {repo for repo, _ in added}, ["repo", "sha"])
        return sorted(added - {(row["repo"], row["sha"]) for row in rows})

    def for_trees(self, sampled: SampledGenerators | None) -> TreeInputs:
        """The added models and generators, in the form of `pipelines.trees.nightly.attach_changes`."""
        found = self.descriptors
        models = TreeInputs(found.store, found.receipts, found.models, self.rows)
        if sampled is None:
            return models
        held = versions_in(self.base)
        added = {(model.repo, model.sha) for model in sampled.every} - held
        # A repository that is a classifier, too, has its place as that.
        both = {row["repo"] for row in self.base.models_named("repo", {repo for repo, _ in added}, ["repo"])}
        return models.with_generators(sampled, held | {version for version in added if version[0] in both})

    def removed_repos(self, sampled: SampledGenerators | None) -> set[str]:
        """Repositories whose models or generators of the base are no longer valid."""
        if sampled is None:
            return {*self.removed}
        kept = {(model.repo, model.sha) for model in sampled.models}
        return {*self.removed, *(repo for repo, _ in versions_in(self.base) - kept)}

    def for_writer(self, trees: UpdateTrees | None = None) -> Changes:
        """The changes in the form of `probelog.publication.update.write_update`."""
        models = self.descriptors.models
        facts = model_table(models, self.rows, {} if trees is None else trees.places)
        identities = [same_logits(model) for model in models]
        return Changes(facts, identities, np.asarray(sorted(self.removed.values()), np.int64))


def changes_since_base(
    job: Job, start: NightlyStart, hub: HubChanges, probed: ProbedChanges, described: CompletionRecord
) -> ChangesSinceBase:
    """Combine the Hub's changes with the results of probing and describing."""
    receipts = probed.ledger.receipts
    rows = {(row.repo, row.sha): row for row in hub.to_index}
    models = [model for model in start.files.ledger.models(receipts) if (model.repo, model.sha) in rows]
    # As long as a later run may still probe a new commit, the old one stays in the index.
    replaced = {model.repo for model in models}
    replaced |= {failure.repo for failure in probed.ledger.failures if not failure.retryable}
    removed = {*hub.record.removed, *(repo for repo, _ in rows if repo in replaced)}
    return ChangesSinceBase(
        start=start,
        hub=hub,
        described=described,
        descriptors=Descriptors(
            job.store,
            [receipt for receipt in receipts if receipt.name in described.parts],
            described.parts,
            models,
        ),
        rows=rows,
        removed={repo: int(row["id"]) for repo, row in start.rows_in_base(removed).items()},
    )


def source_of_update(changes: ChangesSinceBase, sampled: SampledGenerators | None) -> str:
    """Key of the data that an update would be made from, its generators included."""
    if sampled is None or carried_over(changes.base, sampled):
        return changes.source
    return short_key(changes.source, sampled.source)


def publish_update(
    job: Job,
    changes: ChangesSinceBase,
    run: FailureCounts,
    drift: Drift,
    added: Sequence[Version],
    allowed: Callable[[], None],
    trees: UpdateTrees | None = None,
    sampled: SampledGenerators | None = None,
) -> PublishResult:
    """Build an update, check it, and make it live.

    Args:
        job: configuration and store.
        changes: content of the update.
        run: counts of this run's models and failures.
        drift: of the update from the data that the base was fitted on.
        added: models that the live generation does not hold.
        allowed: raises if this run may not publish any more.
        trees: of the update; none: the base has none.
        sampled: all generators, which are written again where the base has others; none: the base's are left as they are.

    Raises:
        QualityError, StoreError, ConflictError: as `release_generation`.
    """
    index, base = job.store.child(INDEX), changes.base
    sampled = None if carried_over(base, sampled) else sampled
    models = changes.descriptors.models
    # Logits that the base holds already were observed on other probes there: their directions differ.
    noted = DescriptorSummary(len(models), ASKED_LOGITS, passed_over=changes.known)

    def build(name: str) -> GenerationSettings:
        job.report.line("publish: writing the changes")
        writer = GenerationWriter(index, name)
        batches = (described.batch() for described in noted.of(changes.descriptors.stream()))
        written = write_update(writer, base, changes.for_writer(trees), batches)
        if trees is not None:
            write_edges(writer, trees.edges)
        generators, meta_of_generators = base.settings.generators, dict[str, bytes]()
        if sampled is not None:
            encoder = deferred_encoder(job.config.encoder)
            places = {**places_in(base), **({} if trees is None else trees.places)}
            generators, meta_of_generators = write(
                writer, sampled, places, base.space, changes.start.probe_set, encoder
            )
        settings = replace(
            base.settings,
            **written.settings,
            generators=generators,
            made_by=MADE_BY,
            logits=written.logits,
            folded_in=changes.described.key,
            watermark=changes.hub.record.watermark,
            night=changes.start.at,
            run=run.to_dict(),
            added=len(changes.descriptors.models),
            gone=len(changes.removed),
            drift=drift.facts(),
            trees=None if trees is None else base.settings.trees,
            edges=None if trees is None else trees.edges.num_rows,
        )
        writer.write_meta({"settings": settings.to_bytes(), **written.meta, **meta_of_generators})
        writer.finish()
        return settings

    return release_generation(
        job,
        changes.start.live,
        source_of_update(changes, sampled),
        build,
        lambda generation: check_update(
            generation,
            ExpectedUpdate(
                base,
                models,
                noted,
                changes.known,
                changes.removed,
                None if trees is None else ExpectedTrees(trees.edges.num_rows, trees.places),
                sampled,
            ),
        ),
        run,
        base=base.pointer.generation,
        added=added,
        allowed=allowed,
    )

"""An update of the live index: what nights since the base have brought, published as a generation beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipelines.complete.descriptors import Descriptors, DescriptorSummary, same_logits
from pipelines.job.job import Job
from pipelines.nightly.drift import Drift
from pipelines.publish.answers import ASKED_LOGITS
from pipelines.publish.checks import check_update
from pipelines.publish.expected import ExpectedUpdate
from pipelines.publish.release import PublishResult, release_generation
from pipelines.publish.stage import model_table
from pipelines.quality.failures import FailureCounts
from pipelines.quality.samples import Version
from probelog import __version__
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.update import Changes, write_update
from probelog.storage.encoding import short_key
from probelog.storage.schemas import CatalogueRow


@dataclass(frozen=True)
class NightWork:
    """All that nights since the base have brought.

    Attributes:
        base: the whole generation.
        descriptors: of the models that came.
        rows: of the catalogue, by repository and commit.
        gone: the base's models that do not count any more: their numbers, by repository.
        folded_in: key of the completion that their descriptors are of.
        watermark: the newest change on the Hub that was seen.
        at: when this night looked (UTC, ISO 8601).
    """

    base: Generation
    descriptors: Descriptors
    rows: dict[Version, CatalogueRow]
    gone: dict[str, int]
    folded_in: str
    watermark: str | None
    at: str

    @property
    def source(self) -> str:
        """Key of what an update would be made from."""
        came = [f"{model.repo}@{model.sha}" for model in self.descriptors.models]
        gone = sorted(self.gone.values())
        return short_key("update", self.base.pointer.generation, *came, "gone", *gone)

    @property
    def empty(self) -> bool:
        """Whether the base is what an update would be."""
        return not self.descriptors.models and not self.gone

    @cached_property
    def known(self) -> dict[str, int]:
        """Rows of the base's logits that models which came share (`same_logits`), by what they share them by."""
        identities = {same_logits(model) for model in self.descriptors.models}
        rows = self.base.models_named("identity", identities, ["identity", "rows"])
        return {row["identity"]: int(row["rows"]) for row in rows}

    @cached_property
    def changes(self) -> Changes:
        """For the index's writer."""
        models = self.descriptors.models
        facts = model_table(models, self.rows)
        identities = [same_logits(model) for model in models]
        return Changes(facts, identities, np.asarray(sorted(self.gone.values()), np.int64))


def publish_update(
    job: Job,
    live: Pointer,
    work: NightWork,
    run: FailureCounts,
    drift: Drift,
    added: Sequence[Version],
    allowed: Callable[[], None],
) -> PublishResult:
    """Build an update, check it, and make it live.

    Args:
        job: what is asked for, and where it is kept.
        live: the pointer when this run began.
        work: what the update holds.
        run: what this run's models came to.
        drift: how far it is from what the base was fitted on.
        added: the models that the live generation does not hold.
        allowed: raises where this run may not publish any more.

    Raises:
        QualityError, StoreError, ConflictError: as `release_generation`.
    """
    index, base = job.store.child("index"), work.base
    models = work.descriptors.models
    # What the base holds of the same logits was seen on other probes: its directions are others.
    noted = DescriptorSummary(len(models), ASKED_LOGITS, passed_over=work.known)

    def build(name: str) -> dict[str, Any]:
        job.report.line("publish: writing what came")
        writer = GenerationWriter(index, name)
        batches = (described.batch() for described in noted.of(work.descriptors.stream()))
        written = write_update(writer, base, work.changes, batches)
        settings = {
            **base.settings,
            **written.settings,
            "made_by": f"probelog {__version__}",
            "logits": written.logits,
            "folded_in": work.folded_in,
            "watermark": work.watermark,
            "night": work.at,
            "run": run.to_dict(),
            "added": len(work.descriptors.models),
            "gone": len(work.gone),
            "drift": drift.facts(),
        }
        writer.write_meta({"settings": json.dumps(settings).encode(), **written.meta})
        writer.finish()
        return settings

    return release_generation(
        job,
        live,
        work.source,
        build,
        lambda generation: check_update(
            generation, ExpectedUpdate(base, models, noted, work.known, work.gone)
        ),
        run,
        base=base.pointer.generation,
        added=added,
        allowed=allowed,
    )

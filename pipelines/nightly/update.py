"""An update of the live index: what nights since the base have brought, published as a generation beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipelines.complete.descriptors import Descriptors, same_logits, some_logits
from pipelines.job.job import Job
from pipelines.nightly.drift import Drift
from pipelines.publish.checks import ASKED_LOGITS, COSINE
from pipelines.publish.release import PublishResult, release_generation
from pipelines.publish.stage import model_table
from pipelines.quality.failures import FailureCounts
from pipelines.quality.samples import Version
from probelog import __version__
from probelog.errors import QueryError, StoreError
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.rows import LogitBatch
from probelog.publication.update import Changes, write_update
from probelog.ranking import matched_heads
from probelog.search.client import Index
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

    def build(name: str) -> dict[str, Any]:
        job.report.line("publish: writing what came")
        writer = GenerationWriter(index, name)
        written = write_update(writer, base, work.changes, _batches(work.descriptors))
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
        lambda generation: _check(generation, work),
        run,
        base=base.pointer.generation,
        added=added,
        allowed=allowed,
    )


def _batches(descriptors: Descriptors) -> Iterator[LogitBatch]:
    return (described.batch() for described in descriptors.stream())


def _check(generation: Generation, work: NightWork) -> None:
    """What must be true of an update before readers see it. Its base was checked when it was published.

    1. It holds the models that came, each once, with as many logits as were described; and none that is gone.
    2. No NaN and no infinity.
    3. The client, opened on it, finds new logits by their own directions, with the scores of the formulas.

    Raises:
        StoreError: it does not hold or answer what it must; names every problem.
    """
    problems = [*_rows(generation, work), *_numbers(generation)]
    if not problems:
        problems = [*_answers(generation, work)]
    if problems:
        raise StoreError(
            f"generation {generation.pointer.generation} was not published: {'; '.join(problems)}"
        )


def _rows(generation: Generation, work: NightWork) -> Iterator[str]:
    models = work.descriptors.models
    described: dict[str, int] = {}
    for one in work.descriptors.stream():
        described.setdefault(same_logits(one.model), len(one.logits))
    found = {
        (row["repo"], row["sha"]): row["rows"]
        for row in generation.models_named("repo", {model.repo for model in models}, ["repo", "sha", "rows"])
    }
    for model in models:
        wanted = work.known.get(same_logits(model), described.get(same_logits(model), 0))
        rows = found.get((model.repo, model.sha))
        if rows != wanted:
            yield f"{model.repo} has {rows} rows of logits instead of {wanted}"
            break
    if len(found) != len(models):
        yield f"it holds {len(found)} of the repositories that came, instead of {len(models)}"
    came = {model.repo for model in models}
    lost = sorted(repo for repo in work.gone if repo not in came)
    if generation.models_named("repo", lost, ["repo"]):
        yield "it still holds models that are gone"
    counted = int(work.base.settings["models"]) - len(work.gone) + len(models)
    if generation.count_models("true") != counted:
        yield f"it holds {generation.count_models('true')} models instead of {counted}"


def _numbers(generation: Generation) -> Iterator[str]:
    recent = generation.recent
    if not (np.isfinite(recent.offsets).all() and np.isfinite(recent.coordinates).all()):
        bad = ~(np.isfinite(recent.offsets) & np.isfinite(recent.coordinates).all(axis=1))
        yield f"{int(bad.sum())} of its new logits hold values that are not finite"


def _answers(generation: Generation, work: NightWork) -> Iterator[str]:
    index = Index(generation.index, pinned=generation)
    elsewhere = Index(generation.index, pinned=generation)
    background = matched_heads.Background(work.base.space.background, work.base.sharpness)
    # What the base holds of the same logits was seen on other probes: its directions are others.
    own = (one for one in work.descriptors.stream() if same_logits(one.model) not in work.known)
    for described, place in some_logits(own, len(work.descriptors.models), ASKED_LOGITS):
        name = f"{described.model.repo}#{described.logits[place]}"
        try:
            hits = index.search(like=name, like_index=elsewhere, k=10)
        except QueryError as error:
            yield f"{name} cannot be asked for: {error}"
            continue
        itself = [hit for hit in hits if hit.distance < COSINE]
        if not itself:
            yield f"asked for the direction of {name} it does not find that logit"
            continue
        direction = described.directions[place].astype(np.float64)
        exact = generation.sharpness * float(direction @ direction)
        exact -= float(background.offsets(direction[None])[0])
        if not abs(itself[0].score - exact) < generation.sharpness * 4 * COSINE:
            yield f"asked for the direction of {name} it gives it the score {itself[0].score:.2f}, not {exact:.2f}"

"""Releases a generation: build, checks, quality gate, swap of the pointer, sweep."""

from __future__ import annotations

import contextlib
import datetime as dt
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.job.job import Job
from pipelines.publish.encoder import sweep_exports
from pipelines.publish.pieces import sweep_pieces
from pipelines.quality.failures import FailureCounts
from pipelines.quality.gate import run_quality_gate
from pipelines.quality.samples import Version
from pipelines.trees.sweep import sweep_trees
from probelog.errors import HeldError, IndexNotFoundError, SchemaVersionError, StoreError, UsageError
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer, read_pointer
from probelog.index.settings import GenerationSettings
from probelog.publication.lifecycle import discard, go_live, refuse_held, sweep
from probelog.storage.layout import INDEX
from probelog.storage.store import Store


@dataclass(frozen=True)
class PublishResult:
    """The live generation, and whether this run published it (``is_new``)."""

    pointer: Pointer
    is_new: bool
    models: int
    logits: int


@dataclass(frozen=True)
class LiveIndex:
    """The generation that readers use now, opened once for all stages of a publish.

    Attributes:
        pointer: of the index.
        opened: the generation; or why it cannot be read: then a new one is not compared with it.
    """

    pointer: Pointer
    opened: Generation | StoreError

    @classmethod
    def open(cls, index: Store) -> LiveIndex | None:
        """The live generation; None where nothing was published yet."""
        try:
            pointer = read_pointer(index)[0]
        except IndexNotFoundError:
            return None
        try:
            return cls(pointer, Generation(index, pointer))
        except StoreError as error:
            return cls(pointer, error)

    @property
    def generation(self) -> Generation:
        """The generation.

        Raises:
            StoreError: it cannot be read.
        """
        if isinstance(self.opened, StoreError):
            raise self.opened
        return self.opened

    def unchanged(self) -> PublishResult:
        """The result of a publish that changes nothing."""
        settings = self.generation.settings
        return PublishResult(self.pointer, False, settings.models, settings.logits)


def refuse_older_listing(finished: str, live: LiveIndex | None) -> None:
    """Refuse a listing that lacks models which nightly runs have added since.

    Args:
        finished: when its newest row was listed (UTC, ISO 8601).
        live: the live generation.

    Raises:
        UsageError: the listing is older than the last nightly run that the live generation holds; says what to do.
    """
    if live is None or isinstance(live.opened, StoreError):
        return  # a generation that cannot be read may be replaced by any
    last_nightly_run = live.generation.settings.night
    if last_nightly_run is not None and finished < last_nightly_run:
        raise UsageError(
            f"the catalogue is of {finished}, older than the nightly run of {last_nightly_run} whose models are live, and "
            "would drop them: list the Hub again first (--refresh, with full or crawl)"
        )


def say_if_held(job: Job) -> None:
    """Say before hours of work that an operator holds the live generation: what is probed is kept, not published."""
    index = job.store.child(INDEX)
    try:
        refuse_held(index, read_pointer(index)[0])
    except HeldError as error:
        job.report.say(f"{error}; what this run probes is kept")
    except IndexNotFoundError:
        pass


def release_generation(
    job: Job,
    live: LiveIndex | None,
    source: str,
    build: Callable[[str], GenerationSettings],
    check: Callable[[Generation], None],
    run: FailureCounts,
    base: str | None = None,
    added: Sequence[Version] | None = None,
    allowed: Callable[[], None] | None = None,
) -> PublishResult:
    """Build a generation, check it, and make it the live one; a generation that fails a step is deleted.

    Args:
        job: configuration and store.
        live: the live generation when this run began; None without any.
        source: key of the data that the generation is made from.
        build: writes a generation under a name; returns its settings.
        check: raises StoreError if the generation is wrong.
        run: counts of the models that were probed and of failures.
        base: the generation that it is an update of.
        added: models that the live generation does not hold, where that is known.
        allowed: raises if this run may not publish any more.

    Raises:
        HeldError: an operator holds the live generation; nothing is built.
        QualityError: it fails the quality gate (`pipelines.quality`).
        StoreError: it fails the checks, or the store refuses.
        ConflictError: somebody else published meanwhile.
    """
    index = job.store.child(INDEX)
    refuse_held(index, None if live is None else live.pointer)
    compared = _compared_with(job, live)
    # Two publishers that start in the same second must not write to the same place.
    name = f"{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
    try:
        settings = build(name)
        job.report.line("publish: checking")
        generation = Generation(index, Pointer(name, source, "", base=base))
        check(generation)
        _apply_quality_gate(job, generation, compared, run, added)
        if allowed is not None:
            allowed()
        pointer = go_live(
            index, name, source, expected_choice=[] if live is None else live.pointer.choice, base=base
        )
    except BaseException:
        # If it cannot be deleted now, a sweep does it later.
        with contextlib.suppress(StoreError):
            discard(index, name)
        raise
    try:
        sweep(index)
        sweep_exports(job.store, pointer)
        sweep_trees(job.store, pointer)
        sweep_pieces(job.store)
    except StoreError as error:
        job.report.say(f"publish: old generations were not removed, the next publish tries again: {error}")
    job.report.say(
        f"publish: generation {name} is live: {settings.models:,} models, {settings.logits:,} logits"
    )
    return PublishResult(pointer, True, settings.models, settings.logits)


def _compared_with(job: Job, live: LiveIndex | None) -> Generation | None:
    """The live generation, or None where there is none or it cannot be read.

    Raises:
        StoreError: it is damaged, and limits are enforced that need it.
    """
    if live is None or isinstance(live.opened, Generation):
        return None if live is None else live.generation
    error = live.opened
    if job.config.quality.enforce and not isinstance(error, SchemaVersionError):
        raise StoreError(
            f"{error}. Roll back, or publish without comparing: --set quality.enforce=false"
        ) from error
    job.report.say(f"publish: the new generation is not compared with the live one: {error}")
    return None


def _apply_quality_gate(
    job: Job,
    candidate: Generation,
    live: Generation | None,
    run: FailureCounts,
    added: Sequence[Version] | None,
) -> None:
    """Run the quality gate on a generation and report limits that are exceeded but not enforced.

    Raises:
        QualityError: a limit is exceeded and enforced.
    """
    job.report.line("publish: running the quality gate")
    last = None if live is None else FailureCounts.of_settings(live.settings)
    verdict = run_quality_gate(job.store, candidate, live, run, last, job.config.quality, added)
    if not verdict.passed:
        job.report.say(
            "publish: worse than its limits in "
            + ", ".join(measure.name for measure in verdict.failed)
            + "; published all the same, because quality.enforce is false"
        )

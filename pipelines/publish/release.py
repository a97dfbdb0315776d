"""From a generation that is built to one that readers see: checks, quality gate, swap of the pointer, sweep."""

from __future__ import annotations

import contextlib
import datetime as dt
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.job.job import Job
from pipelines.publish.encoder import sweep_exports
from pipelines.quality.failures import FailureCounts
from pipelines.quality.gate import run_quality_gate
from pipelines.quality.samples import Version
from probelog.errors import IndexNotFoundError, SchemaVersionError, StoreError
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer, read_pointer
from probelog.index.settings import GenerationSettings
from probelog.publication.lifecycle import discard, go_live, sweep
from probelog.storage.store import Store


@dataclass(frozen=True)
class PublishResult:
    """The generation that is live now, and whether this run made it."""

    pointer: Pointer
    fresh: bool
    models: int
    logits: int


@dataclass(frozen=True)
class LiveIndex:
    """What readers have now, opened once for whoever replaces it.

    Attributes:
        pointer: names it.
        opened: the generation; or why it cannot be read: then a new one is compared with no other.
    """

    pointer: Pointer
    opened: Generation | StoreError

    @classmethod
    def open(cls, index: Store) -> LiveIndex | None:
        """What is live; None where nothing was published yet."""
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
        """That it stays live."""
        settings = self.generation.settings
        return PublishResult(self.pointer, False, settings.models, settings.logits)


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
    """Build a generation, check it, and make it the live one; what fails on the way is removed.

    Args:
        job: what is asked for, and where it is kept.
        live: what was live when this run began; None where nothing was.
        source: key of what the generation is made from.
        build: writes a generation of a name; returns its settings.
        check: raises StoreError where a generation is not what it must be.
        run: what the models that were probed came to.
        base: the generation that it is an update of.
        added: the models that the live generation does not hold, where that is known.
        allowed: raises where this run may not publish any more.

    Raises:
        QualityError: it is worse than the live one allows (`pipelines.quality`).
        StoreError: it is not what it must be, or the store refuses.
        ConflictError: somebody else published meanwhile.
    """
    index = job.store.child("index")
    compared = _compared_with(job, live)
    # Two publishers that start in the same second must not write to the same place.
    name = f"{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
    try:
        settings = build(name)
        job.report.line("publish: checking")
        generation = Generation(index, Pointer(name, source, "", base=base))
        check(generation)
        _pass_gate(job, generation, compared, run, added)
        if allowed is not None:
            allowed()
        pointer = go_live(
            index, name, source, expected_choice=[] if live is None else live.pointer.choice, base=base
        )
    except BaseException:
        # What cannot be removed now is left to a sweep.
        with contextlib.suppress(OSError, StoreError):
            discard(index, name)
        raise
    try:
        sweep(index)
        sweep_exports(job.store, pointer)
    except (OSError, StoreError) as error:
        job.report.say(f"publish: old generations were not removed, the next publish tries again: {error}")
    job.report.say(
        f"publish: generation {name} is live: {settings.models:,} models, {settings.logits:,} logits"
    )
    return PublishResult(pointer, True, settings.models, settings.logits)


def _compared_with(job: Job, live: LiveIndex | None) -> Generation | None:
    """The live generation, where there is one that can be read.

    Raises:
        StoreError: it is damaged, and limits are enforced that cannot be told without it.
    """
    if live is None or isinstance(live.opened, Generation):
        return None if live is None else live.generation
    error = live.opened
    if job.config.quality.enforce and not isinstance(error, SchemaVersionError):
        raise StoreError(
            f"{error}. Roll back, or publish without comparing: --set quality.enforce=false"
        ) from error
    job.report.say(f"publish: the new generation is compared with no other: {error}")
    return None


def _pass_gate(
    job: Job,
    candidate: Generation,
    live: Generation | None,
    run: FailureCounts,
    added: Sequence[Version] | None,
) -> None:
    """Let the quality gate see a generation, beside the live one."""
    job.report.line("publish: asking canaries")
    last = None if live is None else FailureCounts.of_settings(live.settings)
    verdict = run_quality_gate(job.store, candidate, live, run, last, job.config.quality, added)
    if not verdict.passed:
        job.report.say(
            "publish: worse than its limits in "
            + ", ".join(measure.name for measure in verdict.failed)
            + "; published all the same, because quality.enforce is false"
        )

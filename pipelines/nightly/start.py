"""The start of a nightly run: the live index, opened once, and the data that belongs to it in the store."""

from __future__ import annotations

import datetime as dt
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pipelines.complete.record import CompletionRecord, completed
from pipelines.crawl.stage import hub_endpoint
from pipelines.job.background import HUB, background_names
from pipelines.job.job import Job
from pipelines.nightly.record import NightlyFiles
from pipelines.publish.release import LiveIndex
from pipelines.quality.samples import Version
from probelog.encoders.torch_encoder import deferred_encoder
from probelog.errors import StoreError, UsageError
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer
from probelog.probes.probe_set import ProbeSet
from probelog.storage.encoding import from_npy
from probelog.storage.layout import INDEX, CompletionFolder
from probelog.storage.ledger import item_key


@dataclass(frozen=True)
class NightlyStart:
    """The index that a nightly run adds to.

    Attributes:
        live: the live generation.
        base: the whole generation that is live, or that the live one is an update of.
        completion: of the base.
        probe_set: of the base.
        files: state of the nightly runs since the base.
        failed: models that the last full run could not index.
        endpoint: the Hub's address.
        at: when this run began (UTC, ISO 8601).
    """

    live: LiveIndex
    base: Generation
    completion: CompletionRecord
    probe_set: ProbeSet
    files: NightlyFiles
    failed: FailedVersions
    endpoint: str
    at: str

    def rows_in_base(self, repos: Iterable[str]) -> dict[str, dict[str, Any]]:
        """``id``, ``repo`` and ``sha`` of those of some repositories that the base holds, by repository."""
        return {row["repo"]: row for row in self.base.models_named("repo", repos, ["repo", "sha"])}


class FailedVersions:
    """The models that the last full run could not index, each at the commit that it tried.

    Args:
        keys: (F,) sorted keys of the models (`probelog.storage.ledger.key_numbers`).
    """

    def __init__(self, keys: npt.NDArray[np.uint64]) -> None:
        # Of its numbers Python makes one at a time.
        self._keys: Sequence[int] = memoryview(cast("Any", np.ascontiguousarray(keys)))

    def __contains__(self, version: object) -> bool:
        repo, sha = cast("Version", version)
        key = int(item_key(repo, sha), 16)
        place = bisect_left(self._keys, key)
        return place < len(self._keys) and self._keys[place] == key


def open_start(job: Job) -> NightlyStart:
    """Open the live generation, its base, and their data in the store.

    Raises:
        UsageError: nothing was published yet, or with other settings.
        StoreError: part of it is damaged or missing.
    """
    index = job.store.child(INDEX)
    live = LiveIndex.open(index)
    if live is None:
        raise UsageError(
            f"{job.store.uri} has no published index yet that a nightly run could add to: run `probelog-index full` first"
        )
    base_name = live.pointer.base
    base = live.generation if base_name is None else Generation(index, Pointer(base_name, "", ""))
    _same_settings(job, base)
    probe_set = ProbeSet.open(job.store, base.settings.probe_set)
    return NightlyStart(
        live=live,
        base=base,
        completion=_completion(job, base),
        probe_set=probe_set,
        files=NightlyFiles(job.store, job.observations_key(probe_set.hash), base.pointer.generation),
        failed=FailedVersions(from_npy(base.meta("failed.npy"))),
        endpoint=hub_endpoint(),
        at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    )


def _completion(job: Job, base: Generation) -> CompletionRecord:
    key = base.settings.completion
    completion = completed(job.store, key)
    if completion is None:
        raise StoreError(
            f"{job.store.path(CompletionFolder.of(key).path)}, which the live index was made from, is missing: run "
            "`probelog-index full`"
        )
    return completion


def _same_settings(job: Job, base: Generation) -> None:
    """Check that the configuration has the index's settings.

    Raises:
        UsageError: names every setting that differs.
    """
    config, settings = job.config, base.settings
    different = []
    if job.observations_key(settings.probe_set) != settings.observations:
        different.append(
            f"fraction and seed are {config.fraction:g} and {config.seed}, the index's are {settings.fraction:g} "
            f"and {settings.seed}"
        )
    # The same encoder may lie in another folder now.
    if (
        config.encoder != settings.encoder
        and deferred_encoder(config.encoder).digest != settings.encoder_digest
    ):
        different.append(f"encoder is {config.encoder}, the index's is {settings.encoder}")
    if config.prompts != settings.prompts:
        different.append(f"prompt is {config.prompts}, the index's is {settings.prompts}")
    # A background of the hub's names is made by full runs, and stays.
    if config.background == HUB:
        same_background = settings.background_source in (HUB, None)
    else:
        names = background_names(config.background, config.background_count, config.seed)
        same_background = names == base.background
    if not same_background:
        different.append(f"background {config.background} is not the index's")
    if different:
        raise UsageError(
            f"the live index of {job.store.uri} was made with other settings: {'; '.join(different)}. Use its settings, "
            "or run `probelog-index full` with the new ones"
        )

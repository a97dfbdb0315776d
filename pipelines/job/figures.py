"""The figures of a run, kept in the store for whoever watches: what its stages took, how it ended, what it asked of the Hub.

A nightly run lasts minutes, and nothing can be asked of it afterwards: ``runs/COMMAND.json`` holds the figures of the last
run of each command, and `pipelines.monitor` exports them between the runs too.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from cluster.runtime.scratch import scratch_folder
from probelog.errors import ProbeLogError, StoreError
from probelog.hub.usage import METER, HubUsage
from probelog.storage.layout import run_figures
from probelog.storage.versions import MADE_BY

if TYPE_CHECKING:
    from pipelines.job.job import Job

FIGURES_VERSION = 1
RUNNING, SUCCEEDED, INTERRUPTED = "running", "succeeded", "interrupted"

P = ParamSpec("P")
Result = TypeVar("Result")


@dataclass
class Figures:
    """What a run has come to so far.

    Attributes:
        stages: seconds by stage.
        counts: what a nightly run did: models by what became of them.
        hub: what its workers asked of the Hub; what this process asked is added when the figures are written.
        disk_free_bytes: the least that was free below the scratch folder of this machine at the end of a stage.
    """

    stages: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    hub: HubUsage = field(default_factory=HubUsage)
    disk_free_bytes: int | None = None
    _save: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time that a block takes as one stage's."""
        self._save()
        begun = time.monotonic()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.monotonic() - begun
            self._save()


@contextlib.contextmanager
def recorded(job: Job, command: str) -> Iterator[None]:
    """Keep the figures of a block as those of the last run of a command. A store that refuses them is no error.

    A run that is refused before its first stage leaves those of the last one: it may have named the wrong store.
    """
    figures, before = job.figures, METER.total
    name = run_figures(command)
    started = _now()
    succeeded, begun = None, False
    with contextlib.suppress(StoreError):
        succeeded = (job.store.read_json_or_none(name) or {}).get("succeeded")

    def save(outcome: str = RUNNING) -> None:
        nonlocal begun
        begun |= outcome in (RUNNING, SUCCEEDED)
        if not begun:
            return
        free = _free(job.config.scratch)
        known = [size for size in (figures.disk_free_bytes, free) if size is not None]
        figures.disk_free_bytes = min(known, default=None)
        content: dict[str, Any] = {
            "command": command,
            "started": started,
            "updated": _now(),
            "outcome": outcome,
            "succeeded": _now() if outcome == SUCCEEDED else succeeded,
            "stages": {stage: round(seconds, 3) for stage, seconds in figures.stages.items()},
            "counts": figures.counts,
            "hub": asdict(figures.hub + METER.total - before),
            "disk_free_bytes": figures.disk_free_bytes,
            "version": FIGURES_VERSION,
            "made_by": MADE_BY,
        }
        with contextlib.suppress(StoreError):
            job.store.write_json(name, content)

    figures._save = save
    try:
        yield
    except Exception as error:
        save(type(error).__name__)
        raise
    except BaseException:
        save(INTERRUPTED)
        raise
    else:
        save(SUCCEEDED)
    finally:
        figures._save = lambda: None


def recorded_as(
    command: str,
) -> Callable[[Callable[Concatenate[Job, P], Result]], Callable[Concatenate[Job, P], Result]]:
    """`recorded` around a function whose first argument is the job."""

    def decorate(function: Callable[Concatenate[Job, P], Result]) -> Callable[Concatenate[Job, P], Result]:
        @functools.wraps(function)
        def run(job: Job, /, *args: P.args, **named: P.kwargs) -> Result:
            with recorded(job, command):
                return function(job, *args, **named)

        return run

    return decorate


def _free(scratch: Path | None) -> int | None:
    try:
        return shutil.disk_usage(scratch_folder(scratch)).free
    except (OSError, ProbeLogError):
        return None


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")

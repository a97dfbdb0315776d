"""``probelog-index doctor``: which guards of the sandbox hold on this machine, and with a job's file whether all that the
job needs is there, by trying it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.runtime.scratch import scratch_folder
from pipelines.config.model import Config, load_config
from pipelines.inspect import reach
from probelog.errors import ProbeLogError
from probelog.sandbox.doctor.examine import Examination, examine

# In this order; what they need of each other is tried first.
_TRIES: dict[str, reach.Try] = {
    "hub": reach.hub_lists,
    "hub-file": reach.hub_sends,
    "hub-limits": reach.hub_limits,
    "store": reach.store_keeps,
    "clock": reach.store_clock,
    "probes": reach.probes_are_there,
    "encoder": reach.encoder_embeds,
    "disk": reach.disk_has_room,
    "ray": reach.ray_has_room,
    "gpu": reach.gpus_compute,
}


@dataclass(frozen=True)
class Need:
    """Something that the job needs: whether it ``works``, and what was seen, or what to do."""

    name: str
    works: bool
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """What was tried.

    Attributes:
        sandbox: the guards.
        needs: of the job; none where no file was named.
    """

    sandbox: Examination
    needs: list[Need] = field(default_factory=list)

    @property
    def well(self) -> bool:
        """Whether every guard holds that the promise rests on, and everything works that the job needs."""
        return self.sandbox.holds and all(need.works for need in self.needs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; ``needs`` only of a job."""
        return self.sandbox.to_dict() | (
            {"needs": [asdict(need) for need in self.needs]} if self.needs else {}
        )


def run_doctor(config: Path | None = None) -> Diagnosis:
    """Examine this machine as a worker of a job would find it, and what the job needs.

    Args:
        config: the job's file; without one the sandbox alone is tried, in a temporary folder and without a GPU.
    """
    if config is None:
        with tempfile.TemporaryDirectory(prefix="probelog-doctor-") as folder:
            return Diagnosis(examine(Path(folder)))
    job = load_config(config)
    return Diagnosis(examine(scratch_folder(job.scratch), job.device), try_needs(job))


def try_needs(config: Config) -> list[Need]:
    """Try everything that a job needs outside of its own process; this starts Ray, or connects to it."""
    wanted = {"generators": reach.generators_are_sampled} if config.generators.enabled else {}
    return [_tried(name, attempt, config) for name, attempt in (_TRIES | wanted).items()]


def _tried(name: str, attempt: reach.Try, config: Config) -> Need:
    try:
        return Need(name, True, attempt(config))
    except (ProbeLogError, OSError) as error:
        return Need(name, False, str(error))


def lines(examined: Examination) -> Iterator[str]:
    """The same for a person: one line a guard, and one more that says what to do where it does not hold."""
    facts = examined.facts
    user = "root" if facts["user"] == 0 else f"user {facts['user']}"
    yield (
        f"{facts['system']} {facts['kernel']} on {facts['machine']}, Landlock {facts['landlock'] or 'missing'}; "
        f"workers run as {user}, models as user {facts['model_user']}"
    )
    yield (
        f"scratch folder: {facts['scratch']} ({facts['scratch_file_system'] or 'unknown file system'}, user "
        f"{facts['scratch_owner']}, mode {facts['scratch_mode']}); preprocessed probes are "
        f"{'kept' if facts['file_locks'] else 'not kept: it has no locks of open files'}"
    )
    devices = ", ".join(facts["device_files"])
    yield f"devices: {devices or 'none'}; " + (
        "not used" if facts["device"] == "cpu" else "used: what their drivers need is open"
    )
    for finding in examined.findings:
        yield f"{finding.state:<14} {finding.guard:<18} {finding.means} ({finding.detail})"
        if finding.remedy:
            yield f"{'':<14} {'':<18} -> {'' if finding.needed else 'not needed; '}{finding.remedy}"
    missing = [each.guard for each in examined.findings if each.needed and each.state != "holds"]
    yield (
        f"does not hold: {', '.join(missing)}: a model could do more here than spoil its own result"
        if missing
        else "holds: a model can spoil its own result, and nothing else"
    )


def need_lines(needs: list[Need]) -> Iterator[str]:
    """The same of what the job needs."""
    for need in needs:
        yield f"{'works' if need.works else 'does not work':<14} {need.name:<18} {need.detail}"
    if missing := [need.name for need in needs if not need.works]:
        yield f"does not work: {', '.join(missing)}: mend it before the job is started"
    elif needs:
        yield "works: everything that the job needs"

"""``probelog-index doctor``: which guards of the sandbox hold on this machine, by trying them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from cluster.runtime.scratch import scratch_folder
from pipelines.config.model import load_config
from probelog.sandbox.doctor.examine import Examination, examine


def run_doctor(config: Path | None = None) -> Examination:
    """Examine this machine as a worker of a job would find it.

    Args:
        config: the job's file, for its scratch folder and whether its workers use a GPU; without one a temporary folder
            and no GPU.
    """
    if config is None:
        with tempfile.TemporaryDirectory(prefix="probelog-doctor-") as folder:
            return examine(Path(folder))
    job = load_config(config)
    return examine(scratch_folder(job.scratch), "cuda" if job.gpus_per_worker else "cpu")


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

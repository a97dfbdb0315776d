"""The probe stage's input: the probe set that a configuration names, made if the store does not have it."""

from __future__ import annotations

import time

from pipelines.job.job import Job
from probelog.encoders.torch_encoder import Encoder
from probelog.probes.probe_set import ProbeSet, make_probe_set

_QUIET_SECONDS = 5.0


def ready_probes(job: Job, encoder: Encoder) -> ProbeSet:
    """The job's probe set with its embeddings by the job's encoder.

    Raises:
        UsageError: the source is missing or holds too few usable images.
    """
    last = {"at": time.monotonic()}

    def progress(step: str, done: int, total: int | None) -> None:
        if time.monotonic() - last["at"] > _QUIET_SECONDS:
            last["at"] = time.monotonic()
            job.report.line(f"probes: {step} {done:,}" + (f" of {total:,}" if total else ""))

    config = job.config
    probe_set = make_probe_set(config.probes, config.probe_count, config.seed, job.store, encoder, progress)
    left_out = sum(probe_set.left_out_counts.values())
    reasons = ", ".join(f"{reason.value} {count}" for reason, count in probe_set.left_out_counts.items())
    job.report.say(
        f"probes: set {probe_set.hash[:16]} of {probe_set.count:,} images"
        + (f"; {left_out:,} left out ({reasons})" if left_out else "")
    )
    return probe_set

"""What ``probelog-index plan`` foretells of the bench hub beside what then happens.

    uv run python -m tests.benchmarks.forecast [--measure 16] [--workers 2] [--probes 4000] [--out forecast.csv]

Crawls the bench hub (77 models), measures some of it, keeps the forecast, probes the rest, and compares. Prints, and
with --out writes, a row for each quantity of the models that were left: foretold, the 80 % interval, happened, and
the error.

Seconds are wall time inside workers and follow whatever else the machine does: a quiet one tells.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipelines.config.model import Config
from pipelines.forecast.estimates import Estimate, Forecast
from pipelines.forecast.measured import Measured, find_measured
from pipelines.forecast.run import run_plan
from pipelines.full import run_crawl, run_probe
from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.probe.probe_set import ready_probes
from pipelines.probe.timeline import busy_phases
from probelog.encoders.torch_encoder import load_encoder
from probelog.storage.ledger import PROBED
from tests.support.hub.faults import faulty
from tests.support.paths import BENCH


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--probes", type=int, default=4000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not (BENCH / "hub").is_dir():
        sys.exit(f"there is no bench hub at {BENCH}: nothing was measured")
    with tempfile.TemporaryDirectory(prefix="probelog-bench-") as folder:
        rows = compare(Path(folder), given.measure, given.workers, given.probes)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if given.out is not None:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def compare(folder: Path, measure: int, workers: int, probes: int) -> list[dict[str, Any]]:
    """One row for each quantity."""
    from cluster.runtime.session import session

    config = Config.model_validate(
        {
            "store": str(folder / "store"),
            "probes": str(BENCH / "probes" / "other-classes.parquet"),
            "probe_count": probes,
            "encoder": str(BENCH / "encoder"),
            "background": str(BENCH / "concepts.txt"),
            "fraction": 0.25,
            "workers": workers,
            "scratch": str(folder / "scratch"),
        }
    )
    job = Job.of(config, Report(io.StringIO()))
    with faulty(BENCH / "hub") as (endpoint, hub), session("local", cpus=workers):
        os.environ["HF_ENDPOINT"] = endpoint
        run_crawl(job)
        ready_probes(job, load_encoder(config.encoder))
        plan = run_plan(job, measure=measure)
        before = _measured(job, plan)
        asked = len(hub.requests)
        begun = time.monotonic()
        run_probe(job)
        wall = time.monotonic() - begun
        after = _measured(job, plan)
        addresses = [request.address for request in hub.requests[asked:]]
    return _rows(plan, before, after, addresses, wall)


def _measured(job: Job, plan: Forecast) -> Measured:
    found = find_measured(job.store, plan.basis.ledger, None)
    assert found is not None
    return found


def _rows(
    plan: Forecast,
    before: Measured,
    after: Measured,
    addresses: list[str],
    wall: float,
) -> list[dict[str, Any]]:
    def grown(part: str) -> float:
        return after.counts.seconds[part] - before.counts.seconds[part]

    def held(measured: Measured, kind: str) -> float:
        if kind == "receipts":
            return float(measured.receipt_bytes)
        return float(measured.part_bytes(kind))

    left, run = plan.left, after.runs[-1]
    failed = sum(after.counts.failures.values()) - sum(before.counts.failures.values())
    found: list[tuple[str, Estimate, float]] = [
        ("models indexed", left.indexed, after.counts.indexed - before.counts.indexed),
        ("models failed", Estimate(sum(left.failures.values())), failed),
        ("download bytes", left.bytes, after.counts.bytes - before.counts.bytes),
        ("file requests", left.file_requests, sum("/resolve/" in address for address in addresses)),
        ("API requests", Estimate(left.api_requests), sum("/api/" in address for address in addresses)),
        ("logits", left.logits, after.counts.logits - before.counts.logits),
        *(
            (f"{kind} bytes", estimate, held(after, kind) - held(before, kind))
            for kind, estimate in left.store_bytes.items()
            if kind not in ("descriptors", "index")
        ),
        *((f"{part} seconds", left.seconds[part], grown(part)) for part in busy_phases(PROBED)),
        (
            "busy worker seconds",
            left.busy_hours.times(3600),
            sum(grown(part) for part in busy_phases(PROBED)),
        ),
        ("worker seconds", left.worker_hours.times(3600), run.workers * run.wall_seconds),
        ("stage seconds", left.wall.total, run.start_seconds + run.wall_seconds),
        ("command seconds", left.wall.total, wall),
    ]
    return [
        {
            "quantity": name,
            "measured_models": plan.basis.models,
            "left_models": left.models,
            "foretold": _short(estimate.value),
            "low": "" if estimate.low is None else _short(estimate.low),
            "high": "" if estimate.high is None else _short(estimate.high),
            "happened": _short(happened),
            "error_percent": round(100 * (estimate.value / happened - 1), 1) if happened else "",
        }
        for name, estimate, happened in found
    ]


def _short(value: float) -> float | int:
    return round(value) if abs(value) >= 1000 or value == round(value) else round(value, 2)


if __name__ == "__main__":
    main()

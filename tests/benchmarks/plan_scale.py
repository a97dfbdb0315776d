"""What it takes to look at a store as large as the Hub: seconds, processor seconds, memory and requests.

    python -m tests.benchmarks.plan_scale [--models 1000000] [--receipts 100000] [--bare] [--only NAME ...] [--csv FILE]

A process serves a store on S3 and a Hub's listing from its memory (`plan_scale_world`); each action runs in a fresh
process beside it. The server is a Python program on the same machine, so that many of the seconds are its own (``server_seconds`` of
processor time): ``cpu_seconds`` are those of the action alone. To each request a real store adds some 20 to 100 ms. With ``--bare`` the store is as
an earlier version left it: without the sums of the receipts and their bundles, which ``probe`` writes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.paths import CHECKOUT


def catalogue_table(job: Any) -> str:
    """Read the catalogue for probing."""
    from pipelines.crawl.stage import Catalogue, hub_endpoint
    from pipelines.probe.plan import COLUMNS

    return f"{Catalogue.open(job, hub_endpoint()).table(COLUMNS).num_rows} models"


def probe(job: Any) -> str:
    """The probe stage where nothing is left to do: all that it plans with."""
    from pipelines.crawl.stage import Catalogue, hub_endpoint
    from pipelines.probe.plan import COLUMNS
    from pipelines.probe.stage import probe
    from probelog.probes.probe_set import find_probe_set

    table = Catalogue.open(job, hub_endpoint()).table(COLUMNS)
    probe_set = find_probe_set(job.config.probes, job.config.probe_count, job.config.seed, job.store)
    assert probe_set is not None
    done = probe(job, table, probe_set, hub_endpoint(), False)
    return f"{done.models} models, {done.failed.num_rows} failures"


def first_probe(job: Any) -> str:
    """The plan of a first probe, which has everything to do."""
    from pipelines.crawl.stage import Catalogue, hub_endpoint
    from pipelines.probe.plan import COLUMNS, first_keys, make_plan
    from probelog.storage.schemas import FAILURES

    table = Catalogue.open(job, hub_endpoint()).table(COLUMNS)
    keys = first_keys(table)
    made = make_plan(table, keys, keys[:0], FAILURES.empty_table(), job.config.batch_models, False)
    return f"{len(made)} models in {len(made.starts) - 1} batches"


def status(job: Any) -> str:
    """``probelog-index status``."""
    from pipelines.inspect.status import status

    (ledger,) = status(job.store.uri).ledgers
    return f"{ledger.indexed} indexed, {sum(ledger.failed.values())} failed, {ledger.left} left"


def failures(job: Any) -> str:
    """``probelog-index failures --json``: all of them."""
    from pipelines.inspect.failures import list_failures

    return f"{sum(1 for _ in list_failures(job.store.uri).json_lines())} failures"


def explain(job: Any) -> str:
    """``probelog-index explain`` of one model, which failed: the parts of completed ones are not there."""
    from pipelines.inspect.explain import explain

    return f"{sum(1 for _ in explain(job.store.uri, 'owner-7/model-7').lines())} lines"


def plan(job: Any) -> str:
    """``probelog-index plan``."""
    from pipelines.forecast.run import run_plan

    forecast = run_plan(job)
    return f"{forecast.done.models} done, {forecast.left.models} left"


def nightly(job: Any) -> str:
    """``probelog-index nightly`` with nothing new."""
    from pipelines.nightly.run import run_nightly

    return f"{run_nightly(job).tried} tried"


def reconcile(job: Any) -> str:
    """The same, and the whole index compared with the whole Hub."""
    return nightly(job)


ACTIONS: dict[str, tuple[Callable[[Any], str], dict[str, Any]]] = {
    "status": (status, {}),
    "catalogue": (catalogue_table, {}),
    "first-probe": (first_probe, {}),
    "probe": (probe, {}),
    "failures": (failures, {}),
    "explain": (explain, {}),
    "plan": (plan, {}),
    "nightly": (nightly, {"nightly": {"reconcile_days": 1e5}}),
    "reconcile": (reconcile, {"nightly": {"reconcile_days": 1e-6}}),
}


def main() -> None:
    """Serve, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", type=int, default=1_000_000)
    parser.add_argument("--receipts", type=int, default=100_000)
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--only", nargs="*", choices=list(ACTIONS), default=list(ACTIONS))
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--action", choices=list(ACTIONS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.action is not None:
        act(given.action)
        return
    begun = time.monotonic()
    world = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.plan_scale_world", "--models", str(given.models), "--receipts", str(given.receipts), *["--bare"] * given.bare],
        cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert world.stdout is not None
        line = world.stdout.readline()
        if not line:
            raise SystemExit("the store could not be made")
        served = json.loads(line)
        print(f"made in {time.monotonic() - begun:.0f} s", flush=True)
        rows = [measured(name, served) for name in given.only]
    finally:
        world.kill()
        world.wait()
    if given.csv is not None:
        with given.csv.open("w", newline="") as sink:
            writer = csv.DictWriter(sink, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def measured(name: str, served: dict[str, Any]) -> dict[str, Any]:
    """One action in a process of its own."""
    before = requests(served["hub"])
    environment = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": served["s3"],
        "HF_ENDPOINT": served["hub"],
        "SCALE_CONFIG": json.dumps(served["config"]),
    }
    command = [sys.executable, "-m", "tests.benchmarks.plan_scale", "--action", name]
    done = subprocess.run(
        command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    after = requests(served["hub"])
    made = {kind: after[kind] - before.get(kind, 0) for kind in after}
    made["hub GET"] = made.get("hub GET", 0) - 1
    row = {
        "action": name,
        **{key: found[key] for key in ("seconds", "cpu_seconds", "peak_mb")},
        "server_seconds": round(made["seconds"], 1),
        "list": made.get("s3 LIST", 0),
        "get": made.get("s3 GET", 0) + made.get("s3 HEAD", 0),
        "put": made.get("s3 PUT", 0) + made.get("s3 DELETE", 0),
        "hub": made["hub GET"],
    }
    print(" ".join(f"{key}={value}" for key, value in row.items()), "|", found["result"], flush=True)
    return row


def requests(hub: str) -> dict[str, float]:
    """Requests that the servers have had so far, by kind, and the processor ``seconds`` that they took."""
    with urllib.request.urlopen(f"{hub}/requests") as answer:
        counts: dict[str, float] = json.load(answer)
    return counts


def act(name: str) -> None:
    """Run one action in this process; prints what it took."""
    import io

    from pipelines.config.model import Config
    from pipelines.job.job import Job
    from pipelines.job.progress import Report

    call, settings = ACTIONS[name]
    job = Job.of(
        Config.model_validate(json.loads(os.environ["SCALE_CONFIG"]) | settings), Report(io.StringIO())
    )
    begun, before = time.monotonic(), time.process_time()
    result = call(job)
    print(
        json.dumps(
            {
                "seconds": round(time.monotonic() - begun, 1),
                "cpu_seconds": round(time.process_time() - before, 1),
                "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
                "result": result,
            }
        )
    )


if __name__ == "__main__":
    main()

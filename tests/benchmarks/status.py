"""How long `probelog-index status` takes over a large ledger.

    python -m tests.benchmarks.status [--items 100000] [--batch 32]

Writes a ledger of so many items into a temporary folder: receipts of the size that the probe stage writes, with
their counts and originals, and their sums; the parts are not there, nobody reads them. Prints the time of the function
and of the whole command (a process of its own), with the sums and without them, and the memory and time that the
probe stage's plan for a catalogue of the same size takes.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.inspect.status import status
from pipelines.probe.plan import COLUMNS, first_keys, make_plan
from pipelines.probe.summary import Summary
from probelog.storage.encoding import short_key
from probelog.storage.ledger import (
    TIMED_PHASES,
    Counts,
    Ledger,
    Receipt,
    item_key,
    key_numbers,
    open_failures,
)
from probelog.storage.parquet_parts import Part
from probelog.storage.schemas import CATALOGUE, FAILURES, CatalogueRow, RepoFile, to_table
from probelog.storage.store import Store
from tests.support.paths import CHECKOUT

SHA = "a" * 40
FOLDER = "observations/0123456789abcdef"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=32)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ledger = write_ledger(Path(folder), given.items, given.batch)
        show("status, function, no sums", seconds(lambda: status(folder)))
        receipts = ledger.receipts()
        Summary.covering(ledger, receipts).write(ledger, now=True)
        show("status, function", min(seconds(lambda: status(folder)) for _ in range(3)))
        command = [sys.executable, "-m", "pipelines", "status", "--store", folder, "--json"]
        show("status, whole command", min(seconds(lambda: run(command)) for _ in range(3)))
        show(
            "status --help, whole command",
            min(seconds(lambda: run([*command[:3], "status", "--help"])) for _ in range(3)),
        )
        show("receipts read by the driver", seconds(ledger.receipts))
    table = catalogue(given.items)
    show("catalogue table, MB", table.nbytes / 1e6)
    before, begun = resident(), time.monotonic()
    keys = first_keys(table)
    none = key_numbers(())
    plan = make_plan(table, keys, none, open_failures(FAILURES.empty_table(), none), given.batch, False)
    show("plan, s", time.monotonic() - begun)
    show("plan, MB more than the table", resident() - before)
    begun = time.monotonic()
    made = sum(1 for _ in plan.items(np.arange(min(given.items, 20_000))))
    show("items made from the table, us each", 1e6 * (time.monotonic() - begun) / made)


def write_ledger(folder: Path, items: int, batch: int) -> Ledger:
    """A ledger of one synthetic run."""
    ledger = Ledger(Store(folder), FOLDER)
    manifest = {"probe_set": "p" * 64, "fraction": 0.25, "seed": 0, "planned": items}
    ledger.store.write_json(f"{FOLDER}/manifest.json", manifest)
    places = folder / FOLDER / "receipts"
    places.mkdir()
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    for number in range(0, items, batch):
        repos = [f"owner-{i % 977}/model-{i}" for i in range(number, min(number + batch, items))]
        keys = sorted(item_key(repo, SHA) for repo in repos)
        name = short_key(*keys)
        part = Part(f"{FOLDER}/models/{name}.parquet", len(repos), 100_000, "d" * 64)
        good = len(repos) - 4
        failed = {"too-large": 1, "timeout": 1, "unsafe-format": 2}
        counts = Counts(
            good, 2, 1000 * good, 10**8 * good, failed, {}, dict.fromkeys(TIMED_PHASES, 1.5 * good)
        )
        originals = {short_key(repo) * 4: [repo, SHA] for repo in repos[6:]}
        at = (start + dt.timedelta(seconds=number / 3)).isoformat(timespec="seconds")
        receipt = Receipt(name, keys, part, part, part, at, part, counts, originals)
        (places / f"{name}.json").write_text(json.dumps(receipt.to_json(), indent=1, sort_keys=True))
    return ledger


def catalogue(items: int) -> pa.Table:
    """Rows such as a crawl leaves, without labels and tags."""
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(19, 1.5, items).astype(np.int64).tolist()
    parts = []
    for start in range(0, items, 5000):
        rows = [
            CatalogueRow(
                f"owner-{i % 977}/model-{i}",
                SHA,
                "timm",
                architecture=f"resnet{i % 50}",
                files=[
                    RepoFile("config.json", 500),
                    RepoFile("preprocessor_config.json", 300),
                    RepoFile("model.safetensors", sizes[i], "e" * 64),
                ],
            )
            for i in range(start, min(start + 5000, items))
        ]
        parts.append(to_table(rows, CATALOGUE).select(COLUMNS))
    return pa.concat_tables(parts)


def run(command: list[str]) -> None:
    """A command, to its end."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=CHECKOUT)


def seconds(call) -> float:
    """How long a call takes."""
    begun = time.monotonic()
    call()
    return time.monotonic() - begun


def resident() -> float:
    """Resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def show(name: str, value: float) -> None:
    """One line."""
    print(f"{name:<36} {value:10.2f}", flush=True)


if __name__ == "__main__":
    main()

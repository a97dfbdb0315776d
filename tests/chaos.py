"""Kills at random moments: the probe stage with stub workers, compared with a run that nothing disturbed.

python -m tests.chaos --runs 100 [--first-seed 0] [--out FILE.jsonl]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from probelog.storage.ledger import Ledger, Receipt, item_key
from probelog.storage.schemas import FAILURES, OBSERVATIONS, PROBED_MODELS
from probelog.storage.store import Store
from tests.support.processes.operator_command import CHECKOUT, kill_tree
from tests.support.processes.ray_cluster import ray_cluster
from tests.support.processes.stub_prober import IN_FLIGHT, WORKERS, catalogue

MODELS = 60
_MOST_EVENTS = 6
_MEAN_SECONDS = 0.5  # between two events
_DEADLINE = 240.0


@dataclass
class Run:
    """What one run with kills came to.

    Attributes:
        kills: by kind: ``worker`` and ``driver`` (SIGKILL), ``terminated`` (SIGTERM to a worker).
        again: items that were begun more often than once.
        in_flight: how many that may be at most: what those who were killed had.
        given_up: models whose worker was killed too often; a rerun with ``retry_failed`` cured them.
        problems: what should not be; empty for a good run.
    """

    seed: int
    kills: dict[str, int] = field(default_factory=dict)
    again: int = 0
    in_flight: int = 0
    given_up: int = 0
    drivers: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class Drivers:
    """Drivers of the stub stage, each a process."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.processes.stub_prober"],
            cwd=CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, root: Path, failing: bool, retry_failed: bool = False) -> Driver:
        job = {
            "root": str(root), "address": self._address, "models": MODELS, "failing": failing,
            "retry_failed": retry_failed,
        }  # fmt: skip
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return Driver(self._read("pid"), lambda: self._read("status"))

    def _read(self, key: str) -> int:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            if line.startswith(f'{{"{key}"'):
                return int(json.loads(line)[key])
        raise AssertionError("the server of drivers has ended")

    def close(self) -> None:
        kill_tree(self._server)


class Driver:
    """One driver; ``status`` is what it ended with, None while it runs."""

    def __init__(self, pid: int, wait: Any) -> None:
        self.pid = pid
        self.status: int | None = None
        self._thread = threading.Thread(target=self._wait, args=(wait,), daemon=True)
        self._thread.start()

    def _wait(self, wait: Any) -> None:
        self.status = wait()

    def ended(self, seconds: float) -> bool:
        """Whether it has, within so many seconds."""
        self._thread.join(seconds)
        return self.status is not None


def chaos_run(seed: int, root: Path, drivers: Drivers, calm: Path) -> Run:
    """One run of the stage over the store below ``root``, with kills; ``calm`` is where the same went undisturbed."""
    rng = random.Random(seed)
    run, began = Run(seed), time.monotonic()
    failing = _failing(seed)
    events, kills = rng.randint(2, _MOST_EVENTS), Counter[str]()
    root.mkdir(parents=True)
    driver = drivers.start(root, failing)
    run.drivers = 1
    until = began + _DEADLINE
    while driver.status is None or driver.status == -signal.SIGKILL:
        if time.monotonic() > until:
            run.problems.append("not through in time")
            os.kill(driver.pid, signal.SIGKILL)
            driver.ended(10)
            return run
        if driver.status is not None:
            driver = drivers.start(root, failing)
            run.drivers += 1
        pause = rng.expovariate(1 / _MEAN_SECONDS)
        kind = rng.choices(["worker", "terminated", "driver"], [6, 4, 2])[0]
        early = kind == "driver" and rng.random() < 0.2
        while not early and events and _worker(root, rng) is None and not driver.ended(0.1):
            pass  # a driver's first seconds, mostly spent on starting workers, are hit by few
        if driver.ended(pause if events else 5.0) or not events:
            continue
        victim = driver.pid if kind == "driver" else _worker(root, rng)
        if victim is None:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGTERM if kind == "terminated" else signal.SIGKILL)
            kills[kind] += 1
            events -= 1
        if kind == "driver":
            driver.ended(10)
    # Once more for what a retry can cure, and for what lost its worker too often.
    statuses = [driver.status]
    state = _State.of(root)
    run.given_up = sum(reason == "crashed-worker" for reason in state.failures.values())
    if failing or run.given_up:
        for retry_failed in [False, *([True] if run.given_up else [])]:
            driver = drivers.start(root, failing, retry_failed)
            if not driver.ended(_DEADLINE):
                run.problems.append("a rerun does not end")
                os.kill(driver.pid, signal.SIGKILL)
                return run
            statuses.append(driver.status)
            run.drivers += 1
    if any(statuses):
        run.problems.append(f"drivers ended with {statuses}")
    run.kills = dict(kills)
    _compare(run, root, calm, failing)
    run.seconds = round(time.monotonic() - began, 1)
    return run


def _failing(seed: int) -> bool:
    """Whether some of the models of a run fail."""
    return seed % 3 == 0


def _worker(root: Path, rng: random.Random) -> int | None:
    """A stub worker of this run that is alive."""
    try:
        lines = (root / "runs.log").read_text().splitlines()
    except FileNotFoundError:
        return None
    ready = [int(line.split()[1]) for line in lines if line.startswith("ready")]
    alive = [pid for pid in dict.fromkeys(ready) if _is_stub(pid)]
    return rng.choice(alive) if alive else None


def _is_stub(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"StubProber" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@dataclass
class _State:
    """What a ledger holds, without times."""

    receipts: list[Receipt]
    observations: pa.Table
    models: list[dict[str, Any]]
    failures: dict[str, str]
    spooled: set[str]
    store: Store

    @classmethod
    def of(cls, root: Path) -> _State:
        store = Store(root / "store")
        (folder,) = (path.name for path in (root / "store/observations").iterdir())
        ledger = Ledger(store, f"observations/{folder}")
        receipts = ledger.receipts()

        def every(kind: str, schema: pa.Schema) -> pa.Table:
            tables = [store.read_table(getattr(receipt, kind).path).cast(schema) for receipt in receipts]
            return pa.concat_tables([schema.empty_table(), *tables])

        models = every("models", PROBED_MODELS)
        timed = [name for name in models.column_names if name.startswith("seconds_")]
        failures: dict[str, tuple[int, str]] = {}
        for row in every("failures", FAILURES).to_pylist():
            failures[row["repo"]] = max(failures.get(row["repo"], (0, "")), (row["attempts"], row["reason"]))
        sound = set(models["repo"].to_pylist())
        return cls(
            receipts,
            every("observations", OBSERVATIONS).sort_by([("repo", "ascending"), ("logit", "ascending")]),
            models.drop_columns(timed).sort_by("repo").to_pylist(),
            {repo: reason for repo, (_, reason) in failures.items() if repo not in sound},
            ledger.spooled(),
            store,
        )


def _compare(run: Run, root: Path, calm: Path, failing: bool) -> None:
    """Add to the run's problems what differs from the undisturbed one."""
    mine, other = _State.of(root), _State.of(calm)
    first = {
        item_key(repo, sha)
        for repo, sha in zip(
            *(catalogue(MODELS, failing)[name].to_pylist() for name in ("repo", "sha")), strict=True
        )
    }
    items = Counter(item for receipt in mine.receipts for item in receipt.items)
    check = {
        "an item is sealed twice": max(items.values()) == 1,
        "an item is missing": first <= items.keys(),
        "a model is indexed twice": len(mine.models) == len({model["repo"] for model in mine.models}),
        "observations differ": mine.observations.equals(other.observations),
        "models differ": mine.models == other.models,
        "failures differ": mine.failures == other.failures,
        "the spool is not empty": not mine.spooled,
    }
    if not run.given_up:
        # Batches of first attempts; those of retries depend on when the retry was.
        parts = [
            {
                receipt.name: (receipt.items, receipt.observations)
                for receipt in state.receipts
                if set(receipt.items) <= first
            }
            for state in (mine, other)
        ]
        check["parts are not the same bytes"] = parts[0] == parts[1]
    begun = Counter(
        line.split()[2] for line in (root / "runs.log").read_text().splitlines() if line.startswith("begin")
    )
    run.again = sum(begun.values()) - len(begun)
    run.in_flight = IN_FLIGHT * run.kills.get("worker", 0) + WORKERS * IN_FLIGHT * run.kills.get("driver", 0)
    check["more was probed again than was in flight"] = run.again <= run.in_flight
    run.problems += [problem for problem, holds in check.items() if not holds]


@contextlib.contextmanager
def chaos(root: Path) -> Iterator[Any]:
    """A cluster and the undisturbed runs; yields what makes a run from a seed."""
    # One more CPU than workers: a worker that drains holds its place while its successor starts.
    with ray_cluster(cpus=WORKERS + 1) as cluster:
        drivers = Drivers(cluster.address)
        try:
            calm = {failing: root / f"calm-{failing}" for failing in (False, True)}
            for failing, folder in calm.items():
                folder.mkdir(parents=True)
                for _ in range(1 + failing):
                    driver = drivers.start(folder, failing)
                    assert driver.ended(_DEADLINE)
                    assert driver.status == 0
            yield lambda seed: chaos_run(seed, root / f"run-{seed}", drivers, calm[_failing(seed)])
        finally:
            drivers.close()


def main() -> None:
    """Run many and print a line for each."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--runs", type=int, default=100)
    arguments.add_argument("--first-seed", type=int, default=0)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as root, chaos(Path(root)) as make:
        for seed in range(given.first_seed, given.first_seed + given.runs):
            line = json.dumps(asdict(make(seed)))
            print(line, flush=True)
            if given.out:
                with given.out.open("a") as sink:
                    sink.write(line + "\n")


if __name__ == "__main__":
    main()

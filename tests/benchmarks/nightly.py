"""Nightly runs: do their models rank as in a full run, and what does a night cost?

    uv run python -m tests.benchmarks.nightly equality --truth FILE \
        --hub DIR --probes SOURCE --encoder DIR --background FILE
    uv run --with psutil python -m tests.benchmarks.nightly cost \
        --hub DIR --probes SOURCE --encoder DIR --background FILE

``equality`` serves the oldest four fifths of a hub, indexes them, serves the rest in some nights, and evaluates what is
live then beside a full run over everything with the same settings. Copies of a model may come before or after it.

``cost`` makes a synthetic index of every size (``synthetic_logits``) around the oldest models of the hub, serves the
newest (50 by default), and takes the time and the largest memory of one night's process tree. The models are the same
at every size, and so is what it takes to probe them; what grows is due to the index.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.paths import CHECKOUT

SIZES = (10_000, 100_000, 1_000_000)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["equality", "cost"])
    for name in ("hub", "probes", "encoder", "background"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--probe-count", type=int, default=4000)
    parser.add_argument("--fraction", type=float, default=1.0)
    parser.add_argument("--truth")
    parser.add_argument("--nights", type=int, default=2, help="In how many nights the newest fifth comes.")
    parser.add_argument("--new", type=int, default=50, help="Models of the night whose cost is measured.")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--scratch", help="Folder to work in; kept. By default one that is removed.")
    parser.add_argument("--csv", help="By default docs/benchmark/nightly-PART.csv.")
    given = parser.parse_args()
    given.csv = given.csv or str(CHECKOUT / f"docs/benchmark/nightly-{given.part}.csv")
    with _folder(given.scratch) as folder:
        if given.part == "equality":
            equality(given, folder)
        else:
            cost(given, folder)


@contextmanager
def _folder(scratch: str | None) -> Iterator[Path]:
    if scratch is not None:
        Path(scratch).mkdir(parents=True, exist_ok=True)
        yield Path(scratch)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


class GrowingHub:
    """A copy of a hub that serves only some of its repositories, oldest first."""

    def __init__(self, source: str, folder: Path) -> None:
        self._source, self.folder = Path(source), folder
        listed = json.loads((self._source / "hub.json").read_text())
        self.entries = sorted(listed, key=lambda entry: (entry["lastModified"], entry["id"]))
        for entry in self.entries:
            if not (folder / entry["id"]).exists():
                shutil.copytree(self._source / entry["id"], folder / entry["id"])

    def show(self, count: int) -> None:
        """Serve the oldest so many; the others are set aside."""
        for number, entry in enumerate(self.entries):
            there, aside = self.folder / entry["id"], self.folder.parent / "aside" / entry["id"]
            origin, target = (aside, there) if number < count else (there, aside)
            if origin.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(origin, target)
        (self.folder / "hub.json").write_text(json.dumps(self.entries[:count]))

    @contextmanager
    def served(self) -> Iterator[str]:
        """Its address, for as long as the block runs."""
        command = [sys.executable, "-m", "pipelines", "hub", str(self.folder), "--port", "0"]
        server = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if "http://" in line:
                    yield "http://" + line.split("http://")[1].split()[0].rstrip("/,.")
                    break
        finally:
            server.kill()


def _configuration(given: argparse.Namespace, store: Path) -> Path:
    settings = {
        "store": str(store),
        "probes": given.probes,
        "probe_count": given.probe_count,
        "encoder": given.encoder,
        "background": given.background,
        "fraction": given.fraction,
    }
    store.mkdir(parents=True, exist_ok=True)
    file = store.parent / f"{store.name}.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    return file


def _run(endpoint: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "pipelines", *arguments]
    done = subprocess.run(
        command, cwd=CHECKOUT, env={**os.environ, "HF_ENDPOINT": endpoint}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def equality(given: argparse.Namespace, folder: Path) -> None:
    """Full run on four fifths and nights for the rest, against one full run on all."""
    hub = GrowingHub(given.hub, folder / "hub")
    total = len(hub.entries)
    first = total * 4 // 5
    with hub.served() as endpoint:
        hub.show(first)
        by_night = _configuration(given, folder / "nightly")
        _run(endpoint, "full", "--config", str(by_night))
        for night in range(1, given.nights + 1):
            hub.show(first + (total - first) * night // given.nights)
            told = _run(endpoint, "nightly", "--config", str(by_night))
            print("\n".join(line for line in told.splitlines() if line.startswith(("nightly", "publish"))))
        at_once = _configuration(given, folder / "full")
        _run(endpoint, "full", "--config", str(at_once))
    _write(Path(given.csv), evaluated(given, folder), ["index", "fraction"])


def evaluated(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """How well both indexes answer."""
    rows = []
    for name in ("nightly", "full"):
        found = json.loads(
            _run("", "evaluate", "--index", str(folder / name), "--truth", given.truth, "--json")
        )
        method = found["methods"][0]
        rows.append(
            {
                "index": name,
                "fraction": given.fraction,
                "models": found["models"],
                "logits": found["logits"],
                "single_top1": round(method["single"]["top1"], 4),
                "single_top5": round(method["single"]["top5"], 4),
                "groups_top1": round(method["groups"]["top1"], 4),
                "map": round(method["every"]["average_precision"], 4),
            }
        )
    return rows


def _write(file: Path, rows: Sequence[dict[str, Any]], key: Sequence[str]) -> None:
    """Write rows in the place of those of the same key."""
    fresh = [{name: str(value) for name, value in row.items()} for row in rows]
    there = list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []
    replaced = {tuple(row[name] for name in key) for row in fresh}
    kept = [row for row in there if tuple(row[name] for name in key) not in replaced]
    with file.open("w", newline="") as sink:
        writer = csv.DictWriter(sink, list(fresh[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *fresh])
    print(file.read_text())


def cost(given: argparse.Namespace, folder: Path) -> None:
    """One night's time and memory, for indexes of several sizes."""
    hub = GrowingHub(given.hub, folder / "hub")
    total = len(hub.entries)
    rows = []
    with hub.served() as endpoint:
        hub.show(total - given.new)
        _run(endpoint, "full", "--config", str(_configuration(given, folder / "real")))
        for size in given.sizes:
            hub.show(total - given.new)
            store = folder / str(size)
            file = _configuration(given, store)
            _blown_up(folder / "real", store, size)
            print(f"{size:,} logits: an index of {_bytes(store / 'index') / 1e6:,.0f} MB", flush=True)
            # The newest model served lies above the watermark less the overlap, and the made-up index lacks it.
            _measured(endpoint, file)
            before = _bytes(store / "index")
            empty = _measured(endpoint, file)
            hub.show(total)
            night = _measured(endpoint, file)
            rows.append(
                {
                    "logits": size,
                    "new_models": given.new,
                    "index_mb": round(before / 1e6, 1),
                    "added_mb": round((_bytes(store / "index") - before) / 1e6, 1),
                    "nothing_new_seconds": empty["seconds"],
                    "nothing_new_cpu_seconds": empty["cpu"],
                    "seconds": night["seconds"],
                    "cpu_seconds": night["cpu"],
                    "of_it_probing": night["probing"],
                    "peak_mb": night["peak_mb"],
                }
            )
            print(rows[-1], flush=True)
            if given.scratch is None:
                shutil.rmtree(store)
    _write(Path(given.csv), rows, ["logits"])


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _blown_up(real: Path, store: Path, size: int) -> None:
    """A store like a real one, but for an index of so many logits."""
    from tests.benchmarks.search import made

    shutil.copytree(real, store, ignore=shutil.ignore_patterns("index"), dirs_exist_ok=True)
    wanted = argparse.Namespace(store=str(real), questions=10, pictures=None)
    for row in made(wanted, size, store):
        print(row, flush=True)


def _measured(endpoint: str, file: Path) -> dict[str, float]:
    """Seconds, processor seconds (with those of workers) and largest proportional memory of one nightly run."""
    import psutil

    started = time.monotonic()
    command = [sys.executable, "-m", "pipelines", "nightly", "--config", str(file)]
    environment = {**os.environ, "HF_ENDPOINT": endpoint}
    run = subprocess.Popen(
        command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    root = psutil.Process(run.pid)
    peak, cpu, probing = 0, {}, [0.0, 0.0]
    while run.poll() is None:
        now = time.monotonic() - started
        try:
            tree = [root, *root.children(recursive=True)]
        except psutil.Error:
            break
        held = 0
        for process in tree:
            try:
                held += process.memory_full_info().pss
                times = process.cpu_times()
                cpu[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:
                continue
        if len(tree) > 3:  # Ray is there
            probing = [probing[0] or now, now]
        peak = max(peak, held)
        time.sleep(0.5)
    seconds = time.monotonic() - started
    told = run.stdout.read().decode() if run.stdout is not None else ""
    if run.returncode:
        raise SystemExit(told)
    print("\n".join(line for line in told.splitlines() if line.startswith(("nightly", "publish"))))
    return {
        "seconds": round(seconds, 1),
        "cpu": round(sum(cpu.values()), 1),
        "probing": round(probing[1] - probing[0], 1),
        "peak_mb": round(peak / 1e6),
    }


if __name__ == "__main__":
    main()

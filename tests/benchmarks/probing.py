"""What probing costs over the bare forward passes, and how much faster it is than the loop that people write.

    uv run python -m tests.benchmarks.probing [--set realistic|tiny|both] [--quick] [--json] [--out FOLDER]
        [--jpeg DIR] [--workers 2] [--loop-models N] [--auto] [--rounds 3]

Two sets of models: ``realistic`` (random weights at 224 pixels in both libraries' layouts, 400 photographs) and
``tiny`` (the bench hub beside the checkout: 77 models of 64 pixels, 4,000 probes). On each:

(a) the wall time of the probe stage, as `full` runs it (Ray is up, the probes are made and the crawl is done, model
    libraries were imported meanwhile, models come over HTTP from a hub in a process of its own), over that of the pure
    forward passes of the same models on the same probes, as their libraries make them, from tensors in memory, in as
    many processes of one thread and at the same batch size;
(b) models per hour over those of the plain loop (each model from its folder by its own library, every probe decoded
    and preprocessed for every model, all of torch's threads).

Other programs on the machine disturb wall times: the same ratios are given in processor seconds. What starting the
workers costs is measured by itself, with models that take no time, and (a) is given with it and without.

The machine's own speed changes from minute to minute. With --rounds 3 our part is measured before the passes, between
them and the loop, and after the loop; the round of median wall time counts.

With --auto our part is measured once more with ``precision = "auto"``: 16 bits where the processor multiplies them at
speed and a model's logits bear it, beside the same passes and the same loop, which compute in 32 bits.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from probelog.storage.schemas import ProbedModel
from tests.benchmarks import probing_world
from tests.benchmarks.probing_world import World
from tests.conftest import BENCH
from tests.support.paths import CHECKOUT

FRACTION = 1 / 3
# What people write; ours chooses its own, which the passes alone take over.
LOOP_BATCH_SIZE = 64
TARGETS = {"realistic": (1.15, 3.0), "tiny": (1.5, 8.0)}
STAGES = ("download", "load", "preprocess", "forward")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Result:
    """One row of the table. Times are in seconds; ``seconds_*`` are sums over models from their sidecar rows."""

    set: str
    precision: str
    lower: int  # models that were run in 16 bits
    models: int
    run: int
    failed: int
    probes: int
    a_wall: float
    a_wall_without_start: float
    a_cpu: float
    b_wall: float
    b_cpu: float
    ours_wall: float
    ours_wall_rounds: str
    ours_cpu: float
    start_wall: float
    start_cpu: float
    pure_wall: float
    pure_cpu: float
    pure_one_process_wall: float
    loop_models: int
    loop_wall: float
    loop_cpu: float
    models_per_hour: float
    loop_models_per_hour: float
    seconds_download: float
    seconds_load: float
    seconds_preprocess: float
    seconds_forward: float
    workers: int
    note: str


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=["realistic", "tiny", "both"], default="both")
    parser.add_argument("--quick", action="store_true", help="2 models and 20 probes: does it run at all?")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for probing.csv")
    parser.add_argument("--jpeg", type=Path, default=BENCH / "jpeg", help="folder of photographs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--models", type=int, default=20, help="how many realistic ones")
    parser.add_argument("--loop-models", type=int, help="run the plain loop on so many models only")
    parser.add_argument("--auto", action="store_true", help="measure 16 bits too")
    parser.add_argument("--rounds", type=int, choices=[1, 2, 3], default=1, help="measure our part so often")
    given = parser.parse_args()
    results: list[Result] = []
    precisions = ["float32", "auto"] if given.auto else ["float32"]
    with tempfile.TemporaryDirectory(prefix="probelog-bench-") as folder:
        if given.set != "tiny":
            models, probes = (2, 20) if given.quick else (given.models, 400)
            jpegs = given.jpeg if given.jpeg.is_dir() else None
            world = probing_world.realistic(Path(folder) / "realistic", jpegs, models, probes)
            results += measure(world, given.workers, given.loop_models, precisions, given.rounds)
        if given.set != "realistic":
            if not (BENCH / "hub").is_dir():
                print(f"the set `tiny` was NOT measured: there is no bench hub at {BENCH}", file=sys.stderr)
            else:
                source = BENCH / "probes" / "other-classes.parquet"
                world = probing_world.tiny(
                    Path(folder) / "tiny", BENCH / "hub", source, 60 if given.quick else 4000
                )
                loop_models = given.loop_models or (2 if given.quick else 11)
                results += measure(world, given.workers, loop_models, precisions, given.rounds)
    if given.out is not None and results:
        given.out.mkdir(parents=True, exist_ok=True)
        with (given.out / "probing.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(results[0])))
            writer.writeheader()
            writer.writerows(asdict(result) for result in results)
    if given.json:
        print(json.dumps([asdict(result) for result in results]))
    else:
        for line in table(results):
            print(line)


def measure(
    world: World, workers: int, loop_models: int | None, precisions: Sequence[str], rounds: int
) -> list[Result]:
    """Everything about one set: a result for each precision of ours."""
    from cluster.runtime.session import session

    # Ray's workers give way to other programs by default; what they are compared with does not.
    os.environ.setdefault("RAY_worker_niceness", "0")
    root = world.hub.parent if world.name == "realistic" else world.files.parent
    ours: dict[str, list[Ours]] = {precision: [] for precision in precisions}

    def measure_ours() -> None:
        for precision, found in ours.items():
            found.append(_probed(world, world.hub, root / f"{precision}-{len(found)}", workers, precision))
            print(
                f"{world.name}: probed {len(found[-1].models)} models in {found[-1].wall:.0f} s ({precision})",
                file=sys.stderr,
            )

    with session("local", cpus=workers):
        start = _probed(world, probing_world.smallest(root / "start-hub", workers), root / "start", workers)
        measure_ours()
    first = ours[precisions[0]][0]
    passes = _in_own_process(
        "pure",
        {
            "store": str(root / f"{precisions[0]}-0" / "store"),
            "probe_set": first.probe_set,
            "processes": workers,
            "models": [
                {
                    "folder": str(world.hub / model.repo),
                    "probes": model.probes,
                    "batch_size": model.batch_size,
                }
                for model in first.models
                if model.copy_of_repo is None
            ],
        },
    )
    print(f"{world.name}: passes alone {passes['wall']:.0f} s", file=sys.stderr)
    if rounds > 1:
        with session("local", cpus=workers):
            measure_ours()
    every = probing_world.repositories(world.hub)
    some = every if loop_models is None else every[:: max(1, len(every) // loop_models)][:loop_models]
    plain = _in_own_process(
        "loop",
        {
            "files": str(world.files),
            "batch_size": LOOP_BATCH_SIZE,
            "folders": [str(world.hub / repo) for repo in some],
        },
    )
    print(f"{world.name}: plain loop {plain['wall']:.0f} s", file=sys.stderr)
    if rounds > 2:
        with session("local", cpus=workers):
            measure_ours()
    return [
        _result(world, workers, precision, found, start, passes, {**plain, "models": len(some)})
        for precision, found in ours.items()
    ]


def _result(
    world: World,
    workers: int,
    precision: str,
    rounds: Sequence[Ours],
    start: Ours,
    passes: dict[str, Any],
    plain: dict[str, Any],
) -> Result:
    ours = sorted(rounds, key=lambda one: one.wall)[len(rounds) // 2]
    models, looped = ours.models, plain["models"]
    run = [model for model in models if model.copy_of_repo is None]
    ours_rate, loop_rate = 3600 * len(models) / ours.wall, 3600 * looped / plain["wall"]
    stages = {name: sum(getattr(model, f"seconds_{name}") for model in models) for name in STAGES}
    result = Result(
        set=world.name,
        precision=precision,
        lower=sum(model.precision != "float32" for model in run),
        models=len(models),
        run=len(run),
        failed=ours.failed,
        probes=world.count,
        a_wall=ours.wall / passes["wall"],
        a_wall_without_start=(ours.wall - start.wall) / passes["wall"],
        a_cpu=(ours.cpu - start.cpu) / passes["cpu"],
        b_wall=ours_rate / loop_rate,
        b_cpu=(plain["cpu"] / looped) / (ours.cpu / len(models)),
        ours_wall=ours.wall,
        ours_wall_rounds=" ".join(f"{one.wall:.1f}" for one in rounds),
        ours_cpu=ours.cpu,
        start_wall=start.wall,
        start_cpu=start.cpu,
        pure_wall=passes["wall"],
        pure_cpu=passes["cpu"],
        pure_one_process_wall=passes["one_process_wall"],
        loop_models=looped,
        loop_wall=plain["wall"],
        loop_cpu=plain["cpu"],
        models_per_hour=ours_rate,
        loop_models_per_hour=loop_rate,
        seconds_download=stages["download"],
        seconds_load=stages["load"],
        seconds_preprocess=stages["preprocess"],
        seconds_forward=stages["forward"],
        workers=workers,
        note=world.note,
    )
    return Result(
        **{
            key: round(value, 3) if isinstance(value, float) else value
            for key, value in asdict(result).items()
        }
    )


def table(results: Sequence[Result]) -> Iterator[str]:
    """The results for a reader."""
    for found in results:
        most, least = TARGETS[found.set]
        yield (
            f"{found.set}: {found.models} models indexed ({found.run} run, {found.failed} failed), "
            f"{found.probes:,} probes, each model sees 1/3; {found.workers} workers of 1 thread; precision "
            f"{found.precision}, {found.lower} models in 16 bits" + (f"; {found.note}" if found.note else "")
        )
        yield (
            f"  (a) ours / pure forward passes: wall {found.a_wall:.2f}, without the workers' start "
            f"{found.a_wall_without_start:.2f}, processor time {found.a_cpu:.2f}   (wanted: at most {most})"
        )
        yield (
            f"  (b) models per hour, ours / plain loop: wall {found.b_wall:.1f}, processor time "
            f"{found.b_cpu:.1f}   (wanted: at least {least:g})"
        )
        yield f"  {'seconds':<34}{'wall':>9}{'processor':>11}"
        rows = [
            (f"probe stage ({found.ours_wall_rounds})", found.ours_wall, found.ours_cpu),
            ("  of these: starting the workers", found.start_wall, found.start_cpu),
            ("pure forward passes", found.pure_wall, found.pure_cpu),
            (f"plain loop, {found.loop_models} models", found.loop_wall, found.loop_cpu),
        ]
        for name, wall, cpu in rows:
            yield f"  {name:<34}{wall:9.1f}{cpu:11.1f}"
        yield f"  {'pure, 1 process, all threads':<34}{found.pure_one_process_wall:9.1f}"
        spent = ", ".join(f"{name} {getattr(found, f'seconds_{name}'):.1f}" for name in STAGES)
        yield f"  workers' seconds (sum over models): {spent}"
        yield f"  models per hour: ours {found.models_per_hour:,.0f}, plain loop {found.loop_models_per_hour:,.0f}"


@dataclass(frozen=True)
class Ours:
    """The probe stage on a hub: what it found, its wall time, and the processor time of this process and Ray."""

    models: list[ProbedModel]
    failed: int
    probe_set: str
    wall: float
    cpu: float


def _probed(world: World, hub: Path, folder: Path, workers: int, precision: str = "float32") -> Ours:
    """Probe a hub into a folder of its own."""
    from cluster.runtime.warm_up import preloaded_libraries
    from pipelines.config.model import Config
    from pipelines.full import run_crawl
    from pipelines.job.job import Job
    from pipelines.job.progress import Report
    from pipelines.probe.plan import COLUMNS
    from pipelines.probe.probe_set import ready_probes
    from pipelines.probe.stage import probe
    from probelog.encoders.torch_encoder import load_encoder
    from probelog.storage.ledger import Ledger

    store = folder / "store"
    store.mkdir(parents=True)
    background = folder / "background.txt"
    background.write_text("dog\ncat\n")
    config = Config.model_validate(
        {
            "store": str(store),
            "probes": str(world.parquet),
            "probe_count": world.count,
            "encoder": str(world.encoder),
            "background": str(background),
            "fraction": FRACTION,
            "workers": workers,
            "top_r": min(50, world.count),
            "scratch": str(folder / "scratch"),
            "precision": precision,
        }
    )
    job = Job.of(config, Report(io.StringIO()))
    with _served(hub) as (endpoint, server), preloaded_libraries(None, config.scratch):
        os.environ["HF_ENDPOINT"] = endpoint
        probe_set = ready_probes(job, load_encoder(config.encoder))
        table = run_crawl(job).table(COLUMNS)
        with ProcessorTime(os.getpid(), without=server, folder=folder) as used:
            begun = time.perf_counter()
            done = probe(job, table, probe_set, endpoint, retry_failed=False)
            wall = time.perf_counter() - begun
    models = Ledger(job.store, f"observations/{done.key}").models(done.receipts)
    return Ours(models, len(done.failures), probe_set.hash, wall, used.seconds)


@contextlib.contextmanager
def _served(hub: Path) -> Iterator[tuple[str, int]]:
    """``probelog-index hub`` in a process of its own: its address and process id."""
    command = [sys.executable, "-m", "pipelines", "hub", str(hub), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("export HF_ENDPOINT="):
                    yield line.strip().partition("=")[2], process.pid
                    break
            else:
                raise SystemExit(f"the hub of {hub} did not start")
        finally:
            process.terminate()


def _in_own_process(what: str, spec: dict[str, Any]) -> dict[str, Any]:
    """One of the functions of `tests.benchmarks.forward_passes`, with nothing of this process in its way."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(spec, file)
        file.flush()
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.forward_passes", what, file.name],
            env=environment,
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class ProcessorTime:
    """Processor seconds that a process and all its descendants use while the block runs, those that end included, and
    the servers of model processes that work below ``folder``.
    """

    _EVERY = 0.2

    def __init__(self, pid: int, without: int | None, folder: Path) -> None:
        self._root, self._without, self._folder = pid, without, folder
        self._before: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._below_servers: set[int] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def seconds(self) -> float:
        # Not process by process: the time of one that has ended below a fork server is its server's now.
        return sum(self._last.values()) - sum(self._before.values())

    def __enter__(self) -> ProcessorTime:
        self._look()
        self._before = dict(self._last)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(self._EVERY):
            self._look()

    def _look(self) -> None:
        servers = _fork_servers(self._folder)
        below_servers: set[int] = set()
        waiting = [self._root, *servers]
        while waiting:
            pid = waiting.pop()
            with contextlib.suppress(OSError):  # ended between two looks
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                # A fork server takes the status of its processes, and with it their time, however short they lived.
                counted = fields[11:15] if pid in servers else fields[11:13]
                self._last[pid] = sum(map(int, counted)) / _TICKS
                for task in Path(f"/proc/{pid}/task").iterdir():
                    children = [int(child) for child in (task / "children").read_text().split()]
                    waiting += children
                    if pid in servers:
                        below_servers.update(children)
            waiting = [pid for pid in waiting if pid != self._without]
        for pid in self._below_servers - below_servers:
            self._last.pop(pid, None)
        self._below_servers = below_servers


def _fork_servers(folder: Path) -> list[int]:
    """The servers of model processes below a folder: nobody's children, so that Ray does not end them with an actor."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes()
            if b"fork_server/bootstrap.py" in command and os.fsencode(folder) in command:
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                parents[int(process.name)] = int(fields[1])
    # What a server forks has its command line.
    return [pid for pid, parent in parents.items() if parent not in parents]


if __name__ == "__main__":
    main()

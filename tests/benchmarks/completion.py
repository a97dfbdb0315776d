"""The completion at the size of a hub: how it grows, what others take for the same work, and what shards gain.

    uv run --with cmfrec --with threadpoolctl python -m tests.benchmarks.completion [--part growth|rivals|shards]
        [--sizes 100000 500000 1000000 3000000] [--probes 4000] [--share 0.125] [--rank 32] [--memory BYTES]
        [--rival-logits 5000] [--limit SECONDS] [--shard-logits 500000] [--store DIR] [--out FILE.csv] [--again]

The observations are made up (`tests.benchmarks.completion_world`) and written once to ``--store``, a gigabyte for a
million logits; a store that is there is used again. All but ``shards`` runs in one process of one thread.

growth  One shard of each size: seconds a sweep beside the floating-point operations that it takes, at the speed of a
        plain matrix product in the same process, and beside the time to read the Parquet parts; memory.
rivals  The same standardised entries, nine tenths of each model's probes for training, to the same error on the
        rest (within one per cent of ours): SoftImpute (Mazumder et al. 2010) and the iterative SVD (Troyanskaya et
        al. 2001) in NumPy, cmfrec's masked ALS with exact solutions and with conjugate gradients. Who does not get
        there in time, or at all, is noted with the error that was reached.
shards  Sweeps of 1, 2 and 4 shards on Ray.

Seconds are of the wall clock; "CPU" ones, of the process, suffer less from other programs on the machine. With
--out, what the file holds of the same part and size is not measured again, unless --again is given.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from cluster.completion.driver import Completion
from cluster.completion.fit import Fit
from cluster.completion.shard import Loaded, Shard, ShardSpec
from cluster.runtime.settings import WorkerSettings
from probelog.completion.als import (
    Block,
    HeldOutError,
    SumsOverModels,
    column_step,
    held_out_error,
    held_positions,
    initial_columns,
    row_step,
    standardised,
    working_bytes,
)
from probelog.storage.ledger import Receipt, observed_models
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import OBSERVATIONS, PROBED_MODELS
from probelog.storage.store import Store
from tests.benchmarks.completion_world import make

LAMBDA = 0.03
SWEEPS = 5
PARTS = ("growth", "rivals", "shards")
COLUMNS = ["part", "logits", "probes", "share", "rank", "figure", "value"]
_CLOSE = 1.01
_HELD = 0.1


@dataclass(frozen=True)
class Setting:
    """What is measured at one size."""

    store: str
    logits: int
    probes: int
    share: float
    rank: int
    memory: int
    limit: float

    def receipts(self) -> list[Receipt]:
        """The parts, made where they are not there yet."""
        return make(Store(self.store), self.logits, self.probes, self.share)

    def fit(self, **changes: Any) -> Fit:
        """A fit of this size."""
        given = {"rank": self.rank, "regularisation": LAMBDA, "seed": 0, "top_share": 50 / self.probes}
        return Fit(self.probes, **(given | changes))


Figures = list[tuple[str, str]]


def main() -> None:
    """Measure what was asked for, and print or write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="by default all")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 500_000, 1_000_000, 3_000_000])
    parser.add_argument("--probes", type=int, default=4000)
    parser.add_argument("--share", type=float, default=0.125)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--memory", type=int, default=2_000_000_000, help="completion_memory of a shard")
    parser.add_argument("--rival-logits", type=int, default=5000)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for each rival")
    parser.add_argument("--shard-logits", type=int, default=500_000)
    parser.add_argument("--store", default=str(Path(tempfile.gettempdir(), "probelog-completion-benchmark")))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    # Read by the libraries of linear algebra when a process loads them: the measuring ones are yet to start.
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    sizes = {"growth": given.sizes, "rivals": [given.rival_logits], "shards": [given.shard_logits]}
    rows = _read(given.out)
    for part in given.part or PARTS:
        for logits in sizes[part]:
            setting = Setting(
                given.store, logits, given.probes, given.share, given.rank, given.memory, given.limit
            )
            key = [part, *map(str, (logits, given.probes, given.share, given.rank))]
            if any(row[: len(key)] == key for row in rows) and not given.again:
                print(f"{part} at {logits:,} logits is there already")
                continue
            rows = [row for row in rows if row[: len(key)] != key]
            # A process each: the peak memory of one would count as that of the next.
            with get_context("spawn").Pool(1) as pool:
                figures = pool.apply(_MEASURES[part], (setting,))
            for name, value in figures:
                print(f"{part:<7} {logits:>9,}  {name:<56} {value}", flush=True)
            rows += [[*key, name, value] for name, value in figures]
            _write(given.out, rows)


def _read(file: Path | None) -> list[list[str]]:
    if file is None or not file.exists():
        return []
    with file.open(newline="") as stream:
        return list(csv.reader(stream))[1:]


def _write(file: Path | None, rows: list[list[str]]) -> None:
    if file is not None:
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([COLUMNS, *rows])


# Growth


def growth(setting: Setting) -> Figures:
    """One shard."""
    receipts = setting.receipts()
    store, fit = Store(setting.store), setting.fit()
    started = _resident()
    speed = _product_speed()
    read, read_cpu = _timed(lambda: _read_parts(store, receipts))
    working = working_bytes(setting.probes, setting.rank)
    spec = ShardSpec(setting.store, 0, WorkerSettings(completion_memory=setting.memory), working)
    shard = Shard(spec)
    held: list[Loaded] = []
    load, load_cpu = _timed(lambda: held.append(shard.load(receipts)))
    (loaded,) = held
    columns = initial_columns(setting.probes, setting.rank, 0)
    rows, solves = [], []
    for _ in range(SWEEPS):
        began, began_cpu = time.perf_counter(), time.process_time()
        sums = shard.sums(columns, fit, held_out=False)
        rows.append((time.perf_counter() - began, time.process_time() - began_cpu))
        began = time.perf_counter()
        columns = column_step(sums.columns, LAMBDA)
        solves.append(time.perf_counter() - began)
    wall, cpu = (statistics.median(times) for times in zip(*rows, strict=True))
    million = loaded.logits / 1e6
    needed, done = _operations(loaded.models, loaded.logits, setting)
    size = sum(receipt.observations.size for receipt in receipts)
    return [
        ("models", str(loaded.models)),
        ("logits", str(loaded.logits)),
        ("sweep, s per million logits", f"{wall / million:.2f}"),
        ("sweep, CPU s per million logits", f"{cpu / million:.2f}"),
        ("column step, s a sweep", f"{statistics.median(solves):.3f}"),
        ("operations that the formulas need, GFLOP per million logits", f"{needed / million / 1e9:.4g}"),
        ("operations that are done, GFLOP per million logits", f"{done / million / 1e9:.4g}"),
        ("speed of those that are done, GFLOP/s of CPU", f"{done / cpu / 1e9:.1f}"),
        ("speed of a plain float32 product, GFLOP/s of CPU", f"{speed / 1e9:.1f}"),
        ("sweep over the time that needed operations take at that speed", f"{cpu * speed / needed:.2f}"),
        ("Parquet parts, bytes a logit", f"{size / loaded.logits:.0f}"),
        ("entries at 16 bits, bytes a logit", f"{2 * setting.share * setting.probes:.0f}"),
        ("reading the Parquet parts, s per million logits", f"{read / million:.2f}"),
        ("reading the Parquet parts, CPU s per million logits", f"{read_cpu / million:.2f}"),
        ("reading, standardising and keeping them, s per million logits", f"{load / million:.2f}"),
        ("reading, standardising and keeping them, CPU s per million logits", f"{load_cpu / million:.2f}"),
        ("sweep over reading the Parquet parts", f"{cpu / read_cpu:.2f}"),
        ("completion_memory, MB", f"{setting.memory / 1e6:.0f}"),
        ("rows in memory, MB", f"{loaded.in_memory / 1e6:.0f}"),
        ("rows on disk, MB", f"{loaded.on_disk / 1e6:.0f}"),
        ("memory of the process before, MB", f"{started / 1e6:.0f}"),
        ("peak memory of the process, MB", f"{_peak() / 1e6:.0f}"),
    ]


def _operations(models: int, logits: int, setting: Setting) -> tuple[float, float]:
    """Floating-point operations of one sweep: by the formulas, and as they are done.

    The formulas add a model's Gram matrix for each probe that it saw; the product with the mask, for every probe.
    """
    n, k = setting.probes, setting.rank
    m = round(setting.share * n)
    packed = k * (k + 1) / 2
    shared = logits * (2 * m * k + 2 * k * k + 2 * m * k + k * k) + models * (m * k * k + k**3 / 3)
    solve = n * (k**3 / 3 + 2 * k * k)
    return shared + solve + models * m * packed, shared + solve + models * 2 * n * packed


def _product_speed() -> float:
    """Operations a CPU second of a float32 matrix product that fits into the cache."""
    matrix = np.random.default_rng(0).random((1024, 1024), np.float32)
    matrix @ matrix
    _, cpu = _timed(lambda: [matrix @ matrix for _ in range(20)])
    return 20 * 2 * 1024**3 / cpu


def _read_parts(store: Store, receipts: list[Receipt]) -> None:
    for receipt in receipts:
        read_part(store, receipt.observations, OBSERVATIONS)
        read_part(store, receipt.models, PROBED_MODELS)


# Rivals


@dataclass(frozen=True)
class _Problem:
    """Standardised entries: blocks, which of their probes are held out, and both as dense matrices (N, n)."""

    blocks: list[Block]
    held: list[np.ndarray]
    probes: int
    setting: Setting

    def dense(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values, and where the training and the held-out entries are."""
        height = sum(len(block.values) for block in self.blocks)
        values = np.zeros((height, self.probes), np.float32)
        training, held = np.zeros((2, height, self.probes), bool)
        start = 0
        for block, out in zip(self.blocks, self.held, strict=True):
            rows = slice(start, start + len(block.values))
            values[rows, block.probes] = block.values
            training[rows, block.probes[~out]] = True
            held[rows, block.probes[out]] = True
            start = rows.stop
        return values, training, held


#: How far one got: CPU seconds since its start, and the error on the held-out entries.
Trace = Iterator[tuple[float, float]]


def rivals(setting: Setting) -> Figures:
    """CPU seconds to our held-out error."""
    rng = np.random.default_rng(0)
    blocks = [
        standardised(np.asarray(facts.probes, np.int32), values).block
        for receipt in setting.receipts()
        for facts, _, values in observed_models(Store(setting.store), receipt)
    ]
    total = np.cumsum([len(block.values) for block in blocks])
    blocks = blocks[: int(np.searchsorted(total, setting.logits)) + 1]
    held = [held_positions(np.ones(len(block.probes), bool), _HELD, rng) for block in blocks]
    problem = _Problem(blocks, held, setting.probes, setting)
    ours = list(_ours(problem))
    best = min(error for _, error in ours)
    target = _CLOSE * best
    seconds = next(at for at, error in ours if error <= target)
    figures = [
        ("logits", str(sum(len(block.values) for block in blocks))),
        ("ours, held-out RMSE", f"{best:.4f}"),
        ("ours, CPU s", f"{seconds:.3f}"),
    ]
    others: dict[str, Callable[[_Problem], Trace]] = {
        "cmfrec, exact": lambda problem: _cmfrec(problem, conjugate=False),
        "cmfrec, conjugate gradients": lambda problem: _cmfrec(problem, conjugate=True),
        "SoftImpute in NumPy": _soft_impute,
        "iterative SVD in NumPy": _iterative_svd,
    }
    for name, rival in others.items():
        try:
            taken, reached = _until(rival(problem), target, setting.limit)
        except ImportError as error:
            figures.append((f"{name}, CPU s", f"not installed ({error.name})"))
            continue
        got_there = reached <= target
        figures += [
            (f"{name}, held-out RMSE", f"{reached:.4f}"),
            (f"{name}, CPU s", f"{taken:.1f}" if got_there else f"not reached in {taken:.0f}"),
            (f"{name}, times ours", f"{'' if got_there else '> '}{taken / seconds:.0f}"),
        ]
    return figures


def _until(trace: Trace, target: float, limit: float) -> tuple[float, float]:
    """Seconds and error when a rival reached the target, or gave up, or ran out of time (then its best error)."""
    best, taken = float("inf"), 0.0
    for taken, error in trace:
        best = min(best, error)
        if error <= target:
            return taken, error
        if taken > limit:
            break
    return taken, best


def _ours(problem: _Problem) -> Trace:
    rank = problem.setting.rank
    columns = initial_columns(problem.probes, rank, 0)
    taken, last = 0.0, float("inf")
    for _ in range(50):
        began = time.process_time()
        sums = SumsOverModels(problem.probes, rank)
        for block, held in zip(problem.blocks, problem.held, strict=True):
            sums.add(block, row_step(block, columns, LAMBDA, ~held), ~held)
        columns = column_step(sums.total(), LAMBDA)
        taken += time.process_time() - began
        error = HeldOutError(0.0, 0, 0.0, 0)
        for block, held in zip(problem.blocks, problem.held, strict=True):
            error += held_out_error(block, held, row_step(block, columns, LAMBDA, ~held), columns, 0.1)
        yield taken, error.rmse
        if error.rmse > last * (1 - 1e-3):
            return
        last = min(last, error.rmse)


def _cmfrec(problem: _Problem, conjugate: bool) -> Trace:
    """cmfrec has no hook for its iterations: fits of 1, 2, 4, ... of them, each with the time of that fit alone.

    Its exact solutions overflow in float32 here; in float64 they are right.
    """
    import cmfrec
    import scipy.sparse

    values, training, held = problem.dense()
    given = scipy.sparse.coo_array((values[training], np.nonzero(training)), shape=values.shape)
    given = scipy.sparse.coo_matrix(given)
    iterations = 1
    while iterations <= 64:
        model = cmfrec.CMF(
            k=problem.setting.rank,
            lambda_=LAMBDA,
            scale_lam=True,
            method="als",
            use_cg=conjugate,
            niter=iterations,
            user_bias=False,
            item_bias=False,
            center=False,
            use_float=conjugate,
            precompute_for_predictions=False,
            finalize_chol=False,
            nthreads=1,
            verbose=False,
            random_state=0,
        )
        _, taken = _timed(lambda model=model: model.fit(given))
        yield taken, _rmse(values, model.A_ @ model.B_.T, held)
        iterations *= 2


def _soft_impute(problem: _Problem) -> Trace:
    """A path of falling thresholds, each from the solution of the one before, as its authors recommend."""
    values, training, held = problem.dense()
    completed, taken, threshold = np.zeros_like(values), 0.0, None
    last = best = float("inf")
    while best <= last or threshold is None:
        last, best = best, float("inf")
        for _ in range(10):
            began = time.process_time()
            u, s, vt = np.linalg.svd(np.where(training, values, completed), full_matrices=False)
            if threshold is None:
                threshold = float(s[0]) / 2
            s = np.maximum(s - threshold, 0)
            rank = int(np.count_nonzero(s))
            before, completed = completed, (u[:, :rank] * s[:rank]) @ vt[:rank]
            taken += time.process_time() - began
            error = _rmse(values, completed, held)
            best = min(best, error)
            yield taken, error
            if np.linalg.norm(completed - before) <= 1e-2 * np.linalg.norm(completed):
                break
        assert threshold is not None
        threshold /= 2**0.5


def _iterative_svd(problem: _Problem) -> Trace:
    """The best rank out of some, in the iteration where it is best."""
    values, training, held = problem.dense()
    taken = 0.0
    for rank in (problem.setting.rank // 4, problem.setting.rank // 2, problem.setting.rank):
        completed, last = np.zeros_like(values), float("inf")
        for _ in range(100):
            began = time.process_time()
            u, s, vt = np.linalg.svd(np.where(training, values, completed), full_matrices=False)
            completed = (u[:, :rank] * s[:rank]) @ vt[:rank]
            taken += time.process_time() - began
            error = _rmse(values, completed, held)
            yield taken, error
            if error > last * (1 - 1e-3):
                break
            last = error


def _rmse(values: np.ndarray, found: np.ndarray, held: np.ndarray) -> float:
    return float(np.sqrt(np.square(found[held] - values[held]).mean(dtype=np.float64)))


# Shards


def shards(setting: Setting) -> Figures:
    """Sweeps on Ray; the first, which starts workers for the additions, is left out."""
    from cluster.runtime.session import session

    receipts = setting.receipts()
    store = Store(setting.store)
    figures: Figures = []
    first, reference = 0.0, None
    for count in (1, 2, 4):
        with session("local", cpus=4):
            spec = ShardSpec(setting.store, 0, WorkerSettings(completion_memory=setting.memory))
            began = time.perf_counter()
            completion = Completion(store, receipts, count, spec)
            loading = time.perf_counter() - began
            ends: list[float] = []
            fitted = completion.fit(
                setting.fit(sweeps=SWEEPS),
                held_out=False,
                progress=lambda *_, ends=ends: ends.append(time.perf_counter()),
            )
            logits = completion.loaded.logits
            completion.close()
        sweep = statistics.median(np.diff(ends).tolist())
        first = first or sweep
        figures += [
            (f"{count} shards, loading, s per million logits", f"{loading / logits * 1e6:.2f}"),
            (f"{count} shards, sweep, s per million logits", f"{sweep / logits * 1e6:.2f}"),
            (f"{count} shards, times one shard's speed", f"{first / sweep:.2f}"),
        ]
        if reference is None:
            reference = fitted.columns
        else:
            difference = float(np.abs(fitted.columns - reference).max())
            figures.append((f"{count} shards, largest difference of V", f"{difference:.1e}"))
    return [*figures, ("cores", str(os.cpu_count())), ("load of the machine", f"{os.getloadavg()[1]:.1f}")]


def _timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the wall clock and of this process."""
    began, began_cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began, time.process_time() - began_cpu


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


_MEASURES = {"growth": growth, "rivals": rivals, "shards": shards}

if __name__ == "__main__":
    main()

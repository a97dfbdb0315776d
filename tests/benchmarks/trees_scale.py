"""Model trees of many models: seconds, memory, and how many parents are found, on statistics drawn as true trees.

    uv run python -m tests.benchmarks.trees_scale [--models 10000] [--folder DIR] [--memory 1024] [--processes 2]

The families have sizes as on a Hub: the largest a tenth of all models (100,000 at most), the k-th a k-th of that. Each
has trees of all sizes, with parents that are popular because they are. No weights are made: a child's sketches are its
parent's and a step in a random direction, which is what a sketch of a trained child looks like, and its moments grow
accordingly. Rows go through parquet parts of mixed architectures, as the ledger has them.

partition    rows to families on disk
recover      all families, the largest first, each in one process
top-1        children that got their parent, of those that have one (not of the copies among equal models)
memory       the most anonymous memory of any process; files that are mapped are not counted
newcomer     what one costs in the largest family, with its state loaded; and how many got the parents of the whole
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from probelog.arrays import ArrowArray, Floats, Ints
from probelog.storage.schemas import WEIGHTS
from probelog.trees.edges import Edge, edge_table, edges_of
from probelog.trees.families.family import ModelFacts
from probelog.trees.families.partition import Partition, partition
from probelog.trees.recovery.attach import Attachment
from probelog.trees.recovery.recover import recover_family
from tests.support.processes.processes import megabytes_of

_LAYERS = 24
_WIDTH = 64
_PARTS = 64
_LARGEST = 100_000
_KINDS = ("fine-tune", "head-only", "copy", "quantised", "recast")
_SHARES = (0.72, 0.12, 0.08, 0.04, 0.04)
# Rounding to 8 bits and to bfloat16, as parts of a matrix's norm.
_ROUNDED = {"quantised": 7e-3, "recast": 1.7e-3}
_BUFFERED = 64


@dataclass(frozen=True)
class Drawn:
    """The models of one family in order of their times: parents (-1 for a root), kinds, and the statistics."""

    parents: Ints
    kinds: Ints
    sketches: Floats
    grown: Floats
    norms: Floats
    heads: Floats
    classes: Ints


def sizes(models: int) -> list[int]:
    """Of families: the largest a tenth of all, the k-th a k-th of it."""
    largest = max(min(models // 10, _LARGEST), 1)
    result: list[int] = []
    left = models
    while left:
        result.append(min(max(largest // (len(result) + 1), 1), left))
        left -= result[-1]
    return result


def draw(number: int, models: int) -> Drawn:
    """A family: a third of the models are independent or small trees, the others come from a few popular ones."""
    random = np.random.default_rng(number)
    parents, kinds = np.full(models, -1), np.zeros(models, np.int64)
    roots = [0]
    bases: dict[int, list[int]] = {0: [0]}
    drawn = random.choice(len(_KINDS), models, p=_SHARES)
    for model in range(1, models):
        if random.random() < 0.05:
            roots.append(model)
            bases[model] = [model]
            continue
        # Early roots are popular; half of a tree's children come from its root.
        root = roots[int(len(roots) * random.random() ** 4)]
        known = bases[root]
        parents[model] = root if random.random() < 0.5 else known[int(len(known) * random.random())]
        kinds[model] = drawn[model]
        if kinds[model] <= 1:
            known.append(model)
    size = 10 ** random.uniform(-1.6, -0.7, models)
    for kind, part in _ROUNDED.items():
        size[kinds == _KINDS.index(kind)] = part
    size[(kinds == 1) | (kinds == 2)] = 0
    sketches = np.empty((models, _LAYERS, 32), np.float32)
    grown = np.exp(0.05 * random.standard_normal((models, _LAYERS)))  # of roots; moments of no two are equal
    norms = 0.1 * np.exp(0.05 * random.standard_normal((models, _LAYERS)))
    heads = random.standard_normal((models, 36)).astype(np.float32)
    classes = np.where(parents < 0, 1000, random.integers(2, 200, models))
    for model, parent in enumerate(parents.tolist()):
        step = random.standard_normal((_LAYERS, 32), np.float32)
        if parent < 0:
            sketches[model] = step
            continue
        layer = size[model] * np.exp(0.2 * random.standard_normal(_LAYERS))
        sketches[model] = sketches[parent] + step * layer[:, None].astype(np.float32)
        trained = kinds[model] == 0
        grown[model] = grown[parent] * (1 + (layer**2 if trained else 0))
        norms[model] = norms[parent] * (1 + (layer if trained else 0))
        if kinds[model] > 1:
            heads[model] = heads[parent] * (1 + (size[model] * 0.5 if kinds[model] > 2 else 0))
            classes[model] = classes[parent]
    return Drawn(parents, kinds, sketches, grown, norms, heads, classes)


def repo(family: int, model: int) -> str:
    """The name of a model; names are in no order of times."""
    mixed = (model * 2654435761 + family * 40503) % 2**32
    return f"owner{mixed:08x}/f{family}-m{model}"


def rows(family: int, drawn: Drawn, models: Ints) -> pa.Table:
    """Rows of the ``weights`` table of some of a family's models."""
    m = len(models)
    matrices = [f"blocks.{layer:02d}.mlp.weight" for layer in range(_LAYERS)]
    norms = [f"blocks.{layer:02d}.norm.weight" for layer in range(_LAYERS)]
    names = [*matrices, *norms, "head.weight"]
    tensors = len(names)
    width = _WIDTH + family  # every family has an architecture of its own
    grown = drawn.grown[models]
    std = np.ones((m, tensors), np.float32)
    std[:, :_LAYERS] = np.sqrt(grown)
    std[:, _LAYERS : 2 * _LAYERS] = drawn.norms[models]
    mean = np.zeros((m, tensors), np.float32)
    mean[:, _LAYERS : 2 * _LAYERS] = 1
    mean[:, -1] = drawn.heads[models, 0]
    shape = np.empty((m, tensors, 2), np.int64)
    shape[:] = width
    shape[:, -1, 0] = drawn.classes[models]
    lengths = np.array([2] * _LAYERS + [1] * _LAYERS + [2])
    flat = shape[np.broadcast_to(np.arange(2) < lengths[:, None], shape.shape)]
    sketched = np.array([32] * _LAYERS + [0] * _LAYERS + [32])
    sketches = np.concatenate([drawn.sketches[models].reshape(m, -1), drawn.heads[models, 4:]], axis=1)
    dtype = np.where(drawn.kinds[models] == _KINDS.index("recast"), "bfloat16", "float32")

    def lists(values: ArrowArray, each: Ints) -> ArrowArray:
        ends = np.cumsum(np.tile(each, m))
        return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]), pa.int32()), values)

    sketch = lists(pa.array(np.ascontiguousarray(sketches).reshape(-1)), sketched)
    there = pa.array(np.tile(sketched > 0, m))
    return pa.table(
        {
            "repo": pa.array(np.repeat([repo(family, int(model)) for model in models], tensors)),
            "sha": pa.array(np.repeat("0" * 40, m * tensors)),
            "tensor": pa.array(names * m),
            "dtype": pa.array(np.repeat(dtype, tensors)),
            "shape": lists(pa.array(flat), lengths),
            "mean": pa.array(mean.reshape(-1)),
            "std": pa.array(std.reshape(-1)),
            "kurtosis": pa.array(np.full(m * tensors, 3, np.float32)),
            "sketch": pa.compute.if_else(there, sketch, pa.scalar(None, sketch.type)),
        },
        schema=WEIGHTS,
    )


def write(models: int, folder: Path) -> None:
    """Parts of mixed families, and the truth: parents and kinds of each family."""
    folder.mkdir(parents=True)
    writers = [pq.ParquetWriter(folder / f"part-{n:04d}.parquet", WEIGHTS) for n in range(_PARTS)]
    waiting: list[list[pa.Table]] = [[] for _ in range(_PARTS)]
    for family, count in enumerate(sizes(models)):
        drawn = draw(family, count)
        np.savez(folder / f"truth-{family}.npz", parents=drawn.parents, kinds=drawn.kinds)
        part = np.random.default_rng(family).integers(0, _PARTS, count)
        for number in np.unique(part).tolist():
            chosen = np.flatnonzero(part == number)
            for begin in range(0, len(chosen), 2000):
                waiting[number].append(rows(family, drawn, chosen[begin : begin + 2000]))
            if len(waiting[number]) >= _BUFFERED or count > 5000:
                writers[number].write_table(pa.concat_tables(waiting[number]))
                waiting[number] = []
    for writer, tables in zip(writers, waiting, strict=True):
        if tables:
            writer.write_table(pa.concat_tables(tables))
        writer.close()


def batches(folder: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of all parts."""
    for part in sorted(folder.glob("part-*.parquet")):
        yield from pq.ParquetFile(part).iter_batches(columns=columns, batch_size=2**16)


@dataclass(frozen=True)
class Recovered:
    """One family: its size, what recovery took, and how many children have and got their parent."""

    models: int
    seconds: float
    children: int
    right: int
    edges: int
    anonymous_mb: float


class PeakMemory:
    """The most anonymous memory of this process while it is watched, in MB."""

    def __enter__(self) -> PeakMemory:
        self.peak = megabytes_of("self", "RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, megabytes_of("self", "RssAnon"))


def facts_of(family: int, models: int) -> dict[str, ModelFacts]:
    """The times of a family's models: the order in which they were drawn."""
    return {repo(family, model): ModelFacts(float(model)) for model in range(models)}


def recovered(folder: Path, source: Path, key: str, memory_mb: int) -> Recovered:
    """The recovery of one family, measured."""
    family = Partition(folder).family(key)
    number = int(family.repos[0].split("/f")[1].split("-")[0])
    facts = facts_of(number, len(family))
    begun = time.perf_counter()
    with PeakMemory() as memory:
        edges = recover_family(family, facts, memory_mb=memory_mb, least_probability=0)
    seconds = time.perf_counter() - begun
    if number == 0:
        pq.write_table(edge_table(edges), folder / "edges.parquet")
    children, right = judged(source, number, edges)
    return Recovered(len(family), seconds, children, right, len(edges), memory.peak)


def judged(source: Path, number: int, edges: Iterable[Edge]) -> tuple[int, int]:
    """How many models have a parent, and how many got it."""
    with np.load(source / f"truth-{number}.npz") as truth:
        parents = truth["parents"].tolist()
    got = {(edge.child, edge.parent) for edge in edges if not edge.latent}
    right = sum(
        (repo(number, child), repo(number, parent)) in got
        for child, parent in enumerate(parents)
        if parent >= 0
    )
    return sum(parent >= 0 for parent in parents), right


def newcomers(
    folder: Path, source: Path, key: str, memory_mb: int, count: int = 50
) -> tuple[float, int, int]:
    """Milliseconds of a newcomer in the largest family, and how many of the newest get the edges of the whole."""
    family = Partition(folder).family(key)
    facts = facts_of(0, len(family))
    with np.load(source / "truth-0.npz") as truth:
        parents = truth["parents"].tolist()
    whole = edges_of(pq.read_table(folder / "edges.parquet"))
    place = {name: at for at, name in enumerate(family.repos)}
    newest = [repo(0, m) for m in range(len(family) - 1, -1, -1) if parents[m] >= 0][:count]
    names = set(newest)
    base = family.take(np.setdiff1d(np.arange(len(family)), [place[name] for name in newest]))
    known = [edge for edge in whole if edge.child not in names]
    expected = {name: {e.parent for e in whole if e.child == name and not e.latent} for name in newest}
    loaded = Attachment(base, known, facts, memory_mb=memory_mb, least_probability=0)
    seconds, same = 0.0, 0
    for name in newest:
        one = family.take(np.array([place[name]]))
        begun = time.perf_counter()
        edges = loaded.attach(one)
        seconds += time.perf_counter() - begun
        same += {edge.parent for edge in edges if not edge.latent} == expected[name]
    return seconds / len(newest) * 1000, same, len(newest)


def measure(models: int, folder: Path, memory_mb: int, processes: int) -> dict[str, object]:
    """All figures of one number of models."""
    source, families = folder / f"parts-{models}", folder / f"families-{models}"
    if not source.exists():
        maker = multiprocessing.get_context("spawn").Process(target=write, args=(models, source))
        maker.start()
        maker.join()
    begun = time.perf_counter()
    with PeakMemory() as memory:
        parts = partition(lambda columns: batches(source, columns), families, memory_mb=memory_mb)
    partitioned = time.perf_counter() - begun
    begun = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    several = [key for key in parts.keys if parts.models(key) > 1]
    with ProcessPoolExecutor(processes, context) as pool:
        waiting = [pool.submit(recovered, families, source, key, memory_mb // processes) for key in several]
        results = [one.result() for one in waiting]
    recovery = time.perf_counter() - begun
    children, right = sum(one.children for one in results), sum(one.right for one in results)
    milliseconds, attached, new = newcomers(families, source, parts.keys[0], memory_mb)
    return {
        "models": models,
        "families": len(parts),
        "largest": parts.models(parts.keys[0]),
        "partition s": round(partitioned),
        "recover s": round(recovery),
        "largest s": round(max(one.seconds for one in results)),
        "top-1 %": round(100 * right / max(children, 1), 1),
        "partition MB": round(memory.peak),
        "recover MB": round(max(one.anonymous_mb for one in results)),
        "newcomer ms": round(milliseconds, 1),
        "newcomers same": f"{attached}/{new}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line for each number of models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=int, nargs="+", default=[10_000])
    parser.add_argument("--folder", type=Path, help="keeps the parts between runs")
    parser.add_argument("--memory", type=int, default=1024)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as temporary:
        for models in options.models:
            row = measure(models, options.folder or Path(temporary), options.memory, options.processes)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

"""Publishing a large index, and verifying its store, alone and with workers on Ray: seconds, processor seconds, memory.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.publish_scale [--logits N] [--workers N ...]

Models with made-up descriptors (directions of 512 numbers near names that the encoder knows; heads in the sizes of the Hub's,
one model in twenty is a copy) are published by the product's own stage, against 1,000 names: by one process, and with
so many workers, each time from nothing; then the store is read again by ``verify``, alone or shared in the same way. The tables
of all must be equal, byte for byte, and nothing may be damaged.
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import io
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.runtime.session import session
from pipelines.complete.record import CompletionRecord, write_record
from pipelines.config.model import Config
from pipelines.inspect import verify as verifying
from pipelines.inspect.verify import Verified, verify
from pipelines.job.background import IMAGENET_21K, background_names
from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.publish.stage import ListingSnapshot, publish
from pipelines.quality.failures import FailureCounts
from probelog.encoders.torch_encoder import load_encoder
from probelog.index.schema import connect
from probelog.probes.probe_set import ProbeSet, make_probe_set
from probelog.ranking.matched_heads import HeadSpace
from probelog.ranking.names import name_vectors
from probelog.storage.encoding import digest
from probelog.storage.layout import LedgerFolder
from probelog.storage.ledger import LEDGER_VERSION, Counts, Receipt
from probelog.storage.parquet_parts import Part, part_bytes
from probelog.storage.schemas import (
    DESCRIPTORS,
    FAILURES,
    OBSERVATIONS,
    PROBED_MODELS,
    WEIGHTS,
    CatalogueRow,
    to_table,
)
from probelog.storage.store import Store
from tests.benchmarks.completion_world import HEADS, MODELS_A_PART
from tests.support.paths import BENCH
from tests.support.processes.processes import command_of, descends_from, megabytes_of
from tests.support.worlds.probed_models import probed_model
from tests.support.worlds.tiny_world import write_probes

PROBES, TOP_R, NAMES = 200, 10, 1000
COPIES = 1 / 20
# Dimensions in which logits differ from names: real ones differ in few, and the index's basis holds some 380.
SPREAD = 64
SEED = 7
AT = dt.datetime(2026, 1, 1, tzinfo=dt.UTC).isoformat()
# What the stage says when it comes to the next part of its work.
PARTS = {
    "publish: writing tables": "rows and vector index",
    "publish: fitting the confidence of hits": "confidence, list of files",
    "publish: checking": "checks",
    "publish: running the quality gate": "quality gate",
}
_TICKS = os.sysconf("SC_CLK_TCK")


class CachedEncoder:
    """An encoder that embeds every text once: all publishes here ask for the same ones."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._known: dict[str, np.ndarray] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known |= dict(zip(new, self._encoder.embed_texts(new), strict=True))
        return np.stack([self._known[text] for text in texts])


class World:
    """A store with a completion of so many logits, and what a publish is called with."""

    def __init__(self, folder: Path, encoder: CachedEncoder, logits: int) -> None:
        folder.mkdir()
        self.store, self.encoder = Store(folder / "store"), encoder
        write_probes(folder / "probes.parquet", PROBES)
        self.probe_set: ProbeSet = make_probe_set(
            str(folder / "probes.parquet"), None, 0, self.store, encoder
        )
        vectors = name_vectors(
            encoder.embed_texts, ["a photo of a {}"], background_names(IMAGENET_21K, NAMES, 0)
        )
        self._names = HeadSpace(self.probe_set.embeddings(encoder.digest), vectors).background
        self.receipts: list[Receipt] = []
        self.parts: dict[str, Part] = {}
        self.listed: list[CatalogueRow] = []
        self._before: pa.Table | None = None
        while sum(part.rows for part in self.parts.values()) < logits:
            self._add(len(self.receipts))
        self.logits = sum(part.rows for part in self.parts.values())
        self.completed = CompletionRecord(
            "made-up", 3, 0.1, 0.5, 0.75, len(self.listed), self.logits, 0, self.parts
        )
        write_record(self.store, self.completed, {}, "made-up")
        ledger = LedgerFolder.of("made-up")
        self.store.write_json(ledger.manifest, {"version": LEDGER_VERSION})
        for receipt in self.receipts:  # without observations, which nobody reads here
            counts = replace(receipt.counts, logits=0)
            self.store.write_json(ledger.receipt(receipt.name), replace(receipt, counts=counts).to_json())

    def _add(self, number: int) -> None:
        """One batch of models."""
        random = np.random.default_rng([SEED, number])
        sizes = random.choice(
            list(HEADS), MODELS_A_PART, p=np.array(list(HEADS.values())) / sum(HEADS.values())
        )
        models, tables = [], []
        for index, size in enumerate(sizes.tolist()):
            repo, sha = f"owner-{number:06}/model-{index:02}", f"{number * MODELS_A_PART + index:040x}"
            weights, table = sha, _descriptors(random, self._names, size)
            if tables and random.random() < COPIES:
                table, weights = tables[-1].drop_columns(["repo", "sha"]), models[-1].weight_digest
            count = table.num_rows
            tables.append(
                table.append_column("repo", pa.array([repo] * count)).append_column(
                    "sha", pa.array([sha] * count)
                )
            )
            labels = [f"class {i}" for i in range(count)]
            probes = list(range(0, PROBES, 4))
            models.append(
                probed_model(repo, sha=sha, logits=count, labels=labels, probes=probes, weight_digest=weights)
            )
            self.listed.append(CatalogueRow(repo, sha))
        name = f"part-{number:06}"
        tables = [table.select(DESCRIPTORS.names).cast(DESCRIPTORS) for table in tables]
        self.parts[name] = self._written(f"completion/made-up/descriptors/{name}", tables, DESCRIPTORS)
        rows = self.parts[name].rows
        empty = {
            kind: self._written(f"observations/made-up/{kind}/{name}", [], schema)
            for kind, schema in (("rows", OBSERVATIONS), ("failures", FAILURES), ("weights", WEIGHTS))
        }
        self.receipts.append(
            Receipt(
                name=name,
                items=[f"{number * MODELS_A_PART + index:016x}" for index in range(MODELS_A_PART)],
                models=self._written(
                    f"observations/made-up/models/{name}", [to_table(models, PROBED_MODELS)], PROBED_MODELS
                ),
                counts=Counts(indexed=MODELS_A_PART, logits=rows),
                originals={},
                at=AT,
                **empty,
            )
        )

    def _written(self, path: str, tables: list[pa.Table], schema: pa.Schema) -> Part:
        data = part_bytes(tables, schema)
        self.store.write(f"{path}.parquet", data)
        return Part(f"{path}.parquet", sum(table.num_rows for table in tables), len(data), digest(data))

    def publish(self, spread: bool, report: Report) -> str:
        """Publish everything, as a first generation; returns its name."""
        self.store.delete_folder("index")
        content = {
            "store": str(self.store.root),
            "probes": "unused",
            "top_r": TOP_R,
            "background": IMAGENET_21K,
            "background_count": NAMES,
            "quality": {"enforce": False},
            "spread_logits": 1 if spread else 10 * self.logits,
        }
        done = publish(
            Job.of(Config.model_validate(content), report),
            ListingSnapshot(self.listed, None, AT, AT),
            self.probe_set,
            self.encoder,  # type: ignore[arg-type]
            "made-up",
            self.receipts,
            self.completed,
            FailureCounts(len(self.listed), {}),
        )
        return done.pointer.generation


def _descriptors(random: np.random.Generator, names: np.ndarray, size: int) -> pa.Table:
    """Those of one model's logits, each near a name."""
    axes = np.linalg.qr(np.random.default_rng(SEED).standard_normal((names.shape[1], SPREAD)))[0]
    noise = random.standard_normal((size, SPREAD)) @ axes.T
    directions = names[random.integers(len(names), size=size)] + 0.5 * noise / np.sqrt(SPREAD)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    numbers = random.permuted(np.tile(np.arange(PROBES), (size, 1)), axis=1)
    values = -np.sort(-random.standard_normal((size, PROBES)), axis=1)
    ends = {
        "top": (numbers[:, :TOP_R], values[:, :TOP_R]),
        "weakest": (numbers[:, -6:][:, ::-1], values[:, -6:][:, ::-1]),
    }
    columns: dict[str, Any] = {name: np.zeros(size) for name in ("mean", "std", "z_mean", "z_std")}
    columns |= {f"{end}_probes": _lists(probes, np.int32) for end, (probes, _) in ends.items()}
    columns |= {f"{end}_values": _lists(found, np.float16) for end, (_, found) in ends.items()}
    columns |= {
        name: pa.nulls(size, DESCRIPTORS.field(name).type)
        for name in ("bottom_probes", "bottom_values", "opposite_direction")
    }
    return pa.table(
        {
            **columns,
            "logit": np.arange(size),
            "observed": np.full(size, PROBES // 4),
            "factor": _lists(np.zeros((size, 3)), np.float16),
            "direction": _lists(directions, np.float16),
        }
    )


def _lists(matrix: np.ndarray, kind: type) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(matrix, kind).reshape(-1))
    return pa.ListArray.from_arrays(np.arange(0, flat.offset + len(flat) + 1, matrix.shape[1]), flat)


def read_again(world: World, spread: bool) -> Verified:
    """``verify`` of the world's store, shared by the workers of the present session or alone."""
    # The store is small: it would be read by one machine, and sent to the workers in a few portions.
    verifying._SPREAD_BYTES, verifying._CHECKS_AT_ONCE = 0, 8
    found = verify(world.store.uri, Report(io.StringIO()), "auto" if spread else "local")
    assert not found.damaged
    assert not found.missing
    return found


class Timed(Report):
    """Notes when the stage comes to each part of its work."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.times: list[tuple[str, float]] = []

    def line(self, text: str) -> None:
        if text in PARTS:
            self.times.append((PARTS[text], time.perf_counter()))

    def parts(self, begun: float, ended: float) -> dict[str, float]:
        """Seconds of each part."""
        marks = [("before", begun), *self.times, ("", ended)]
        return {name: after - at for (name, at), (_, after) in pairwise(marks)}


@dataclass
class Watched:
    """Processor seconds and the largest memory of the tasks' processes, by process.

    Attributes:
        seconds: of each.
        peaks: of each, in MB.
        own: the most that this process had for itself, in MB: without pages that it shares, as those of Ray's object store.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    peaks: dict[int, int] = field(default_factory=dict)
    own: int = 0
    _end: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watched:
        self._begin = dict(_workers())
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._end.wait(0.5)
            self.own = max(self.own, int(megabytes_of("self", "RssAnon")))
            for process, (seconds, peak) in _workers():
                self.seconds[process] = seconds - self._begin.get(process, (0.0, 0))[0]
                self.peaks[process] = peak


def _workers() -> Iterator[tuple[int, tuple[float, int]]]:
    """The workers of this process's Ray: processor seconds and peak memory in MB."""
    for path in Path("/proc").glob("[0-9]*"):
        number = int(path.name)
        if not command_of(number).startswith("ray::") or not descends_from(number, os.getpid()):
            continue
        try:
            fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
            peak = int(megabytes_of(number, "VmHWM"))
        except OSError:
            continue
        yield number, ((int(fields[11]) + int(fields[12])) / _TICKS, peak)


def measure(world: World, workers: int) -> tuple[dict[str, Any], str]:
    """One publish: a row of the table, and a digest of the tables that it wrote."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory counts from now on
    before = int(megabytes_of("self", "RssAnon"))
    starting = time.perf_counter()
    with session("local", cpus=workers) if workers else nullcontext():
        begun, processor = time.perf_counter(), time.process_time()
        with Watched() as watched:
            report = Timed()
            generation = world.publish(workers > 0, report)
        ended = time.perf_counter()
        row = {
            "workers": workers or "none",
            "s": ended - begun,
            **report.parts(begun, ended),
            "starting Ray": begun - starting,
            "driver CPU s": time.process_time() - processor,
            "workers CPU s": sum(watched.seconds.values()),
            "driver peak MB": int(megabytes_of("self", "VmHWM")),
            "driver's own MB": watched.own,
            "of these before": before,
            "worker peak MB": max(watched.peaks.values(), default=0),
        }
        begun, processor = time.perf_counter(), time.process_time()
        with Watched() as watched:
            found = read_again(world, workers > 0)
        row |= {
            "verify: s": time.perf_counter() - begun,
            "verify: MB": found.bytes / 1e6,
            "verify: driver CPU s": time.process_time() - processor,
            "verify: workers CPU s": sum(watched.seconds.values()),
        }
    return row, _digest(world.store, generation)


def _digest(store: Store, generation: str) -> str:
    """Of the rows of the tables that depend on the descriptors, in their order."""
    found = hashlib.sha256()
    connection = connect(store.child("index"), generation)
    for name in ("logits", "models"):
        table = connection.open_table(name).to_arrow().combine_chunks()
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        found.update(sink.getbuffer())
    return found.hexdigest()


def main() -> None:
    """Make the world, publish it in every way, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--logits", type=int, default=100_000)
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[0, 2, 4], help="0: one process without Ray"
    )
    parser.add_argument("--encoder", type=Path, default=BENCH / "encoder")
    given = parser.parse_args()
    if not given.encoder.exists():
        raise SystemExit(f"there is no encoder at {given.encoder}: say --encoder FOLDER")
    with tempfile.TemporaryDirectory(prefix="publish-") as folder:
        encoder = CachedEncoder(load_encoder(str(given.encoder)))
        # What is done once whatever the size does not count: imports, the exported encoder, embeddings of the names.
        small = World(Path(folder, "small"), encoder, 1000)
        small.publish(False, Timed())
        world = World(Path(folder, "large"), encoder, given.logits)
        for name in small.store.names("encoders"):
            world.store.write(name, small.store.read(name))
        print(f"{world.logits:,} logits of {len(world.listed):,} models in {len(world.receipts):,} batches")
        digests, rows = set(), []
        for workers in given.workers:
            row, found = measure(world, workers)
            digests.add(found)
            rows.append(row)
            print(f"workers {row['workers']}: {row['s']:.1f} s, verify {row['verify: s']:.1f} s", flush=True)
        print()
        for name in rows[0]:
            cells = [f"{row[name]:.1f}" if isinstance(row[name], float) else str(row[name]) for row in rows]
            print(f"| {name} | {' | '.join(cells)} |" + f"\n|---{'|---' * len(cells)}|" * (name == "workers"))
        print("tables equal, byte for byte" if len(digests) == 1 else "TABLES DIFFER")


if __name__ == "__main__":
    main()

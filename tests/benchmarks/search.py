"""Search in large indexes: recall, milliseconds on one core, and bytes, beside faiss and a scan by NumPy.

    uv run --with faiss-cpu python tests/benchmarks/search.py --store URI [--pictures FILE] [--sizes N ...]

URI is a store that was indexed with ``fraction = 1`` (``probelog-index full``). After its logits a hub of every size is
made (``synthetic_logits`` says how, and what of the real one it keeps), written by the product's own writer
and asked by the product's own client in a process that has one core. What is right is known from the exact scores of
all float32 directions, computed while they are made. Copies of the same weights count once.

``client`` rows: whole questions, from the text to ten hits, second one onwards: names of the background's concepts,
single pictures (the embedding included), logits, and names with a filter that one model in ten meets. Names and pictures
are asked with feedback, as the client asks, and without it (``asked once``), in turns. With feedback, what is right is what the client
answers where both times all logits are scored, from their stored coordinates.
``shortlist`` rows: the names again, at several efforts; recall is the share of the exact ten within the list that is to
be re-ranked, milliseconds are those of getting the list: from LanceDB with all that is known of its logits, read from
the disk's cache; from faiss and NumPy their numbers alone, by the same vectors in memory. ``scan`` is the exact answer by one matrix product over all float32 directions in memory.
``disk`` rows: bytes a logit. ``index`` rows: seconds to write the logits, and the rest with the vector index (two cores
or what there is; making the directions is not counted).

Sizes that the CSV file holds already are left out; ``--again`` measures them anew.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from probelog.index.arrow import matrix_of, structured
from probelog.index.generation import Generation
from probelog.index.pointer import find_index, read_pointer
from probelog.index.schema import MODEL_FACTS, logit_facts, probes_schema
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.lifecycle import go_live
from probelog.publication.rows import LogitBatch, RowEncoder, write_tables
from probelog.ranking import matched_heads
from probelog.search.query import background_numbers, text_direction
from probelog.search.ranking import first_length
from probelog.storage.store import Store
from tests.support.paths import CHECKOUT

SIZES = (100_000, 1_000_000, 5_000_000)
PARTS = ("index", "disk", "client", "shortlist", "scan")
FIELDS = [
    "logits",
    "part",
    "name",
    "setting",
    "questions",
    "recall",
    "median_ms",
    "p95_ms",
    "seconds",
    "bytes",
]
K = 10
SEED = 7
FILTER = "downloads < 100"  # one model in ten
# Efforts: how long a list, in how many partitions (lists of faiss' IVF, breadth of its HNSW).
COUNTS = (100, 200, 400, 800)
PARTITIONS = (6, 12, 24, 48)
# A graph (HNSW) of more takes too long to build on one core.
LARGEST_GRAPH = 100_000
# Answers that score the same as the tenth are as right as that one; so many are known.
KNOWN = 30
_TIE = 1e-6

Row = dict[str, Any]
Hits = set[tuple[int, int]]
Floats = npt.NDArray[np.floating[Any]]
Report = Callable[..., None]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True, help="indexed with fraction = 1")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--questions", type=int, default=100, help="of every kind")
    parser.add_argument("--pictures", type=Path, help="Parquet file with a column of images to ask with")
    parser.add_argument("--scratch", type=Path, help="folder for the indexes, which are kept there")
    parser.add_argument("--csv", type=Path, default=CHECKOUT / "docs" / "benchmark" / "search.csv")
    parser.add_argument("--plot", type=Path, default=CHECKOUT / "docs" / "benchmark" / "search-recall.png")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="that the client gets")
    parser.add_argument("--again", action="store_true", help="measure sizes that the CSV file holds, too")
    parser.add_argument("--kept", action="store_true", help="ask the indexes that --scratch holds once more")
    parser.add_argument("--only", choices=["client", "shortlist"], help="ask nothing else")
    parser.add_argument("--ask", choices=["client", "shortlist"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.ask:
        {"client": ask_client, "shortlist": ask_shortlist}[given.ask](given.scratch)
        return
    rows = read_rows(given.csv)
    with tempfile.TemporaryDirectory(prefix="search-") as temporary:
        for size in given.sizes:
            if not (given.again or given.kept) and any(row["logits"] == str(size) for row in rows):
                print(f"{size:,} logits: in {given.csv} already")
                continue
            folder = (given.scratch or Path(temporary)) / str(size)
            measured = [*measure(given, size, folder)]
            parts = {str(row["part"]) for row in measured}
            rows = [row for row in rows if row["logits"] != str(size) or row["part"] not in parts]
            rows += [{name: str(row.get(name, "")) for name in FIELDS} for row in measured]
            rows.sort(key=lambda row: (int(row["logits"]), PARTS.index(row["part"])))
            write_rows(given.csv, rows)
            if given.scratch is None:
                shutil.rmtree(folder)
    show(rows)
    plot(rows, given.plot)


def measure(given: argparse.Namespace, size: int, folder: Path) -> Iterator[Row]:
    """All rows of one size."""
    if not (given.kept and (folder / "questions.json").exists()):
        yield from made(given, size, folder)
    for what in (given.only,) if given.only else ("client", "shortlist"):
        command = [sys.executable, __file__, "--store", "-", "--ask", what, "--scratch", str(folder)]
        done = on_one_core(command, given.core)
        for line in done.splitlines():
            yield {"logits": size, **json.loads(line)}


def on_one_core(command: list[str], core: int) -> str:
    """What a process prints that never sees more than one core: no library may start threads for the others."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})  # of this thread, and of the process that it starts
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "RUST_LOG": "error"}
        )
    finally:
        os.sched_setaffinity(0, before)
    return done.stdout


# ---- the index and what is right


def made(given: argparse.Namespace, size: int, folder: Path) -> Iterator[Row]:
    """Write an index of some size and, beside it, questions with their exact answers; says what it took."""
    from pipelines.benchmark.probed import ProbedHub
    from tests.benchmarks.synthetic_logits import Synthesis, likeness

    hub = ProbedHub.open(given.store, lambda model: None)
    real = hub.generation
    synthesis = Synthesis(hub)
    random = np.random.default_rng(SEED)
    first = next(synthesis.batches(size, SEED)).directions
    space = real.space
    background = matched_heads.Background(
        space.background, matched_heads.sharpness(first[:8192], space.background)
    )
    questions = Questions(real, given.questions, given.pictures, first, random)
    names = questions.directions[: questions.names]
    for name, directions in (("real", synthesis.real_directions()), ("synthetic", first)):
        sample = directions[random.choice(len(directions), synthesis.real, replace=False)]
        found = ", ".join(
            f"{key} {value:.2f}" for key, value in likeness(sample, space.background, names).items()
        )
        print(f"{synthesis.real:,} {name} logits: {found}")

    facts = Facts(size)
    truth = Truth(questions, background, facts)
    index = Store(str(folder / "index"))
    writer = GenerationWriter(index, "synthetic")
    making, written_last = 0.0, 0.0

    def batches() -> Iterator[LogitBatch]:
        nonlocal making, written_last
        number = 0
        begun = time.perf_counter()
        for models in synthesis.batches(size, SEED):
            sizes = models.layout.sizes
            model = np.repeat(np.arange(number, number + len(sizes)), sizes)
            logit = np.concatenate([np.arange(count) for count in sizes])
            number += len(sizes)
            truth.add(model, logit, models.directions)
            probes = random.integers(len(real.probe_embeddings), size=(len(model), 8))
            making += time.perf_counter() - begun
            yield LogitBatch(model, logit, np.zeros(len(model), bool), models.directions, probes)
            begun = time.perf_counter()
        written_last = begun

    begun = time.perf_counter()
    sample = first[random.choice(len(first), min(len(first), 20_000), replace=False)]
    encoder = RowEncoder.fit(sample, background, len(real.probe_embeddings))
    written = write_tables(writer, batches(), facts.table(), encoder)
    done = time.perf_counter()
    write_rest(writer, real, written, background.sharpness)
    writer.finish()
    go_live(index, "synthetic", "synthetic_logits")
    truth.save(folder)
    streamed = written_last - begun - making
    yield {"logits": size, "part": "index", "name": "logits", "seconds": round(streamed, 1)}
    seconds = round(done - written_last, 1)
    yield {"logits": size, "part": "index", "name": "models and vector index", "seconds": seconds}
    yield from on_disk(Path(index.path("generations/synthetic")), size)


def write_rest(writer: GenerationWriter, real: Generation, written: Any, sharpness: float) -> None:
    """What does not grow with the index: probes, settings, encoders, from the real one."""
    schema = probes_schema(real.probe_embeddings.shape[1])
    writer.write("probes", schema, [real.probes(schema.names[1:]).select(schema.names).cast(schema)])
    settings = replace(
        real.settings,
        sharpness=sharpness,
        logits=written.logits,
        models=writer.open("models").count_rows(),
        **written.settings,
    )
    kept = [
        "background",
        "background_vectors.npy",
        "background_statistics.npy",
        "text_encoder.onnx",
        "tokenizer.json",
        "failed.npy",
    ]
    if real.settings.image_encoder is not None:
        kept.append("image_encoder.onnx")
    writer.write_meta(
        {"settings": settings.to_bytes(), **{key: real.meta(key) for key in kept}, **written.meta}
    )


class Facts:
    """The models of a synthetic hub: who repeats whom, and facts to filter by."""

    def __init__(self, logits: int) -> None:
        from tests.benchmarks.synthetic_logits import layouts

        layout = [*layouts(logits, SEED)]
        self.copies = np.concatenate([part.copies for part in layout])
        self.sizes = np.concatenate([part.sizes for part in layout])
        self.original = np.arange(len(self.copies)) - self.copies  # copies are never copied
        self.downloads = np.random.default_rng(SEED).integers(1000, size=len(self.copies))[self.original]

    def table(self) -> Any:
        """As the writer wants them."""
        import pyarrow as pa

        count = len(self.copies)
        given: dict[str, Any] = {
            "repo": [repository(number) for number in range(count)],
            "sha": ["0" * 40] * count,
            "library": ["timm"] * count,
            "pipeline_tag": ["image-classification"] * count,
            "architecture": ["resnet18"] * count,
            "head": ["softmax"] * count,
            "logits": self.sizes,
            "labels": [[f"LABEL_{i}" for i in range(size)] for size in self.sizes],
            "licence": ["mit"] * count,
            "tags": [["image-classification"]] * count,
            "downloads": self.downloads,
            "likes": [0] * count,
            "weight_digest": [f"{number:064x}" for number in self.original],
            "observed": [1000] * count,
        }
        fields = [item for item in MODEL_FACTS if item.name != "copies"]
        return pa.table(
            [
                pa.array(given[item.name], item.type) if item.name in given else pa.nulls(count, item.type)
                for item in fields
            ],
            schema=pa.schema(fields),
        )


def repository(model: int) -> str:
    """What a synthetic model is called."""
    return f"synthetic/model-{model:07d}"


class Questions:
    """Names, pictures and logits to ask for, and their directions."""

    def __init__(
        self,
        real: Generation,
        count: int,
        pictures: Path | None,
        first: npt.NDArray[np.float32],
        random: np.random.Generator,
    ) -> None:
        from tests.benchmarks.synthetic_logits import layouts

        chosen = random.permutation(len(real.background))[:count]
        self.asked: list[dict[str, Any]] = []
        directions, self.excluded = [], []
        for name in (real.background[i] for i in chosen):
            own = background_numbers(real, [name])
            directions.append(text_direction(real, [name], own))
            self.excluded.append(own)
            self.asked.append({"kind": "name", "text": name})
        self.names = len(self.asked)
        for number, data in enumerate(_pictures(pictures, count) if pictures else ()):
            directions.append(real.space.of_images(real.image_encoder.embed([data], mirror=True))[0])
            self.excluded.append(np.empty(0, np.int64))
            self.asked.append({"kind": "picture", "picture": number})
        self.pictures = _pictures(pictures, count) if pictures else []
        layout = next(layouts(len(first), SEED))
        owner = np.repeat(np.arange(len(layout.sizes)), layout.sizes)
        starts = np.cumsum([0, *layout.sizes])
        original = np.flatnonzero(~layout.copies[owner])
        for row in random.choice(original, count, replace=False):
            directions.append(first[row])
            self.excluded.append(np.empty(0, np.int64))
            self.asked.append(
                {"kind": "logit", "model": int(owner[row]), "logit": int(row - starts[owner[row]])}
            )
        for place in range(self.names):
            directions.append(directions[place])
            self.excluded.append(self.excluded[place])
            self.asked.append({**self.asked[place], "kind": "name, filtered"})
        self.directions = np.asarray(directions, np.float64)


def _pictures(file: Path, count: int) -> list[bytes]:
    import pyarrow.parquet as parquet

    column = parquet.read_table(file, columns=["image"])["image"]
    chosen = np.random.default_rng(SEED).permutation(len(column))[:count]
    return [column[int(i)].as_py()["bytes"] for i in chosen]


class Truth:
    """The ten best answers to every question, by the exact scores of whatever directions pass."""

    def __init__(self, questions: Questions, background: matched_heads.Background, facts: Facts) -> None:
        self._questions, self._background, self._facts = questions, background, facts
        count = len(questions.asked)
        self._scores = np.full((count, KNOWN), -np.inf)
        self._rows = np.zeros((count, KNOWN), np.int64)  # of the logits table: copies are not counted
        self._models = np.zeros((count, KNOWN), np.int64)
        self._logits = np.zeros((count, KNOWN), np.int64)
        self._passed = 0

    def add(self, model: npt.NDArray[np.int64], logit: npt.NDArray[np.int64], directions: Floats) -> None:
        """Some more logits: their models, places and directions."""
        new = np.flatnonzero(~self._facts.copies[model])
        model, logit, directions = model[new], logit[new], directions[new]
        allowed = self._facts.downloads[model] < 100
        b, rivals = self._background.sharpness, self._background.directions
        offsets = self._background.offsets(directions)
        everything = directions @ self._questions.directions.T.astype(np.float32)
        known = directions @ rivals.T.astype(np.float32)
        for number, asked in enumerate(self._questions.asked):
            own = matched_heads.without(offsets, known[:, self._questions.excluded[number]], b, len(rivals))
            scores = b * everything[:, number].astype(np.float64) - own
            if asked["kind"] == "logit":
                scores[(model == asked["model"]) & (logit == asked["logit"])] = -np.inf
            elif asked["kind"] == "name, filtered":
                scores[~allowed] = -np.inf
            best = np.argpartition(-scores, KNOWN)[:KNOWN] if len(scores) > KNOWN else np.arange(len(scores))
            merged = np.concatenate([self._scores[number], scores[best]])
            order = np.argsort(-merged)[:KNOWN]
            self._scores[number] = merged[order]
            for kept, found in (
                (self._rows, self._passed + best),
                (self._models, model[best]),
                (self._logits, logit[best]),
            ):
                kept[number] = np.concatenate([kept[number], found])[order]
        self._passed += len(model)

    def save(self, folder: Path) -> None:
        """For the processes that ask."""
        np.savez(
            folder / "truth.npz",
            right=self._scores >= self._scores[:, K - 1 : K] - _TIE,
            rows=self._rows,
            models=self._models,
            logits=self._logits,
            originals=self._facts.original,
            directions=self._questions.directions,
        )
        (folder / "questions.json").write_text(json.dumps(self._questions.asked))
        for number, data in enumerate(self._questions.pictures):
            (folder / f"picture-{number}").write_bytes(data)


def on_disk(generation: Path, size: int) -> Iterator[Row]:
    """Bytes a logit of every table, the vector index apart; probes and encoders do not grow."""

    def weigh(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    parts: dict[str, int] = {}
    for table in sorted(generation.glob("*.lance")):
        if table.stem in ("probes", "meta"):
            continue
        indexes = weigh(table / "_indices")
        parts[table.stem] = weigh(table) - indexes
        if indexes:
            parts[f"{table.stem}, index"] = indexes
    parts["all that grows"] = sum(parts.values())
    parts["everything"] = weigh(generation)
    for name, total in parts.items():
        yield {"logits": size, "part": "disk", "name": name, "bytes": round(total / size, 1)}


# ---- asking, in a process with one core


def ask_client(folder: Path) -> None:
    """The product's client: recall and milliseconds of whole questions."""
    import probelog
    from probelog.search import client

    truth = np.load(folder / "truth.npz")
    asked = json.loads((folder / "questions.json").read_text())
    index = probelog.open_index(folder / "index")
    original = truth["originals"]

    def arguments(question: dict[str, Any]) -> dict[str, Any]:
        if "picture" in question:
            return {"images": [(folder / f"picture-{question['picture']}").read_bytes()]}
        if "model" in question:
            return {"like": f"{repository(question['model'])}#{question['logit']}"}
        return {"text": question["text"], "where": FILTER if question["kind"] == "name, filtered" else None}

    def search(question: dict[str, Any]) -> tuple[float, Hits]:
        given = arguments(question)
        begun = time.perf_counter()
        hits = index.search(k=K, **given)
        took = time.perf_counter() - begun
        return took, {(int(original[int(hit.repo.rpartition("-")[2])]), hit.logit) for hit in hits}

    print(json.dumps({"part": "client", "name": "first", "median_ms": round(1000 * search(asked[0])[0], 1)}))
    for kind in dict.fromkeys(question["kind"] for question in asked):
        places = [i for i, question in enumerate(asked) if question["kind"] == kind]
        search(asked[places[-1]])
        once, twice = [], []
        for place in places:
            with mock.patch.object(client, "with_feedback", lambda generation, query: query):
                once.append(search(asked[place]))
            if kind != "logit":
                twice.append(search(asked[place]))
        exactly = []
        for place in places:
            as_good = truth["right"][place]
            models, logits = truth["models"][place][as_good], truth["logits"][place][as_good]
            exactly.append({*zip(models.tolist(), logits.tolist(), strict=True)})
        print(json.dumps(answered(kind if kind == "logit" else f"{kind}, asked once", once, exactly)))
        if twice:
            with every_logit_scored(index):
                exactly = [search(asked[place])[1] for place in places]
            print(json.dumps(answered(kind, twice, exactly)), flush=True)


def answered(name: str, answers: list[tuple[float, Hits]], right: list[Hits]) -> Row:
    """The row of some questions: recall is the share of the right hits, of which there may be more than ten."""
    recalls = [len(one & found) / K for one, (_, found) in zip(right, answers, strict=True)]
    return {"part": "client", "name": name, **figures([took for took, _ in answers], recalls)}


@contextmanager
def every_logit_scored(index: Any) -> Iterator[None]:
    """The client without a shortlist; the logits are held in memory."""
    from probelog.search import ranking

    blocks = [*index._generation.blocks()]
    with (
        mock.patch.object(ranking, "_shortlisted", return_value=False),
        mock.patch.object(Generation, "blocks", return_value=blocks),
    ):
        yield


def ask_shortlist(folder: Path) -> None:
    """The shortlist alone, by LanceDB and by others on the same vectors: recall against time."""
    truth = np.load(folder / "truth.npz")
    asked = json.loads((folder / "questions.json").read_text())
    index = find_index(str(folder / "index"))
    generation = Generation(index, read_pointer(index)[0])
    if not generation.large:
        return
    names = [i for i, question in enumerate(asked) if question["kind"] == "name"]
    coordinates = generation.basis.coordinates(truth["directions"][names])
    queries = np.stack([generation.basis.query(one) for one in coordinates])
    right = [truth["rows"][i][truth["right"][i]] for i in names]

    def curve(engine: str, setting: str, ask: Callable[[int], Any], seconds: float | None = None) -> None:
        times, recalls = [], []
        for place in range(-3, len(names)):  # the first three are thrown away
            begun = time.perf_counter()
            found = ask(max(place, 0))
            took = time.perf_counter() - begun
            if place >= 0:
                times.append(took)
                recalls.append(min(1.0, float(np.isin(right[place], found).sum()) / K))
        row = {"part": "shortlist", "name": engine, "setting": setting, **figures(times, recalls)}
        print(json.dumps(row if seconds is None else {**row, "seconds": round(seconds, 1)}), flush=True)

    first = first_length(generation.size)
    curve(
        "product",
        f"{first}, as the client asks first",
        lambda i: np.concatenate([part.rows for part in generation.shortlisted(coordinates[i], first)]),
    )
    table, kind = generation._tables.open("logits"), logit_facts(generation.basis, generation.settings.probes)
    for count in COUNTS:
        for partitions in PARTITIONS:

            def by_lance(i: int, count: int = count, partitions: int = partitions) -> Any:
                query = table.search(queries[i], vector_column_name="vector").distance_type("dot")
                found = query.nprobes(partitions).limit(count).select(["facts", "_distance"]).to_arrow()
                return structured(found["facts"], kind)["row"]

            curve("LanceDB", f"{count} of {partitions} partitions", by_lance)
    vectors = matrix_of(generation._tables.rows("logits", ["vector"])["vector"]).astype(np.float32)
    for count in COUNTS:
        curve(
            "NumPy",
            f"{count}",
            lambda i, count=count: np.argpartition(-(vectors @ queries[i]), count)[:count],
        )
    faiss_curves(vectors, queries, curve)
    exact_scan(generation, coordinates, curve)


def faiss_curves(vectors: npt.NDArray[np.float32], queries: npt.NDArray[np.float32], curve: Report) -> None:
    """What one would pick of faiss: an inverted file with whole vectors or product codes, and a graph."""
    try:
        import faiss
    except ImportError:
        print("faiss is not installed (uv run --with faiss-cpu): left out", file=sys.stderr)
        return
    n, width = vectors.shape
    lists = int(4 * np.sqrt(n))
    coarse = faiss.IndexFlatIP(width)
    training = vectors[np.random.default_rng(SEED).choice(n, min(n, 64 * lists), replace=False)]
    kinds: dict[str, Callable[[], Any]] = {
        "faiss IVF-Flat": lambda: faiss.IndexIVFFlat(coarse, width, lists, faiss.METRIC_INNER_PRODUCT),
        "faiss IVF-PQ": lambda: faiss.IndexIVFPQ(
            coarse, width, lists, width // 2, 8, faiss.METRIC_INNER_PRODUCT
        ),
    }
    if n <= LARGEST_GRAPH:
        kinds["faiss HNSW"] = lambda: faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
    for name, make in kinds.items():
        begun = time.perf_counter()
        index = make()
        index.train(training)
        index.add(vectors)
        built = time.perf_counter() - begun
        for count in COUNTS:
            for effort in PARTITIONS:
                if name == "faiss HNSW":
                    index.hnsw.efSearch = max(count, 10 * effort)
                    setting = f"{count}, ef {index.hnsw.efSearch}"
                else:
                    index.nprobe = effort
                    setting = f"{count} of {effort} lists"
                curve(name, setting, _searcher(index, queries, count), built)


def _searcher(index: Any, queries: npt.NDArray[np.float32], count: int) -> Callable[[int], Any]:
    return lambda i: index.search(queries[i : i + 1], count)[1][0]


def exact_scan(generation: Generation, coordinates: Floats, curve: Report) -> None:
    """One matrix product over all coordinates in memory, where they fit."""
    needed = 4 * coordinates.shape[1] * generation.size
    if needed > 0.6 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        print(f"{needed / 1e9:.0f} GB of coordinates do not fit: the exact scan is left out", file=sys.stderr)
        return
    everything = np.empty((generation.size, coordinates.shape[1]), np.float32)
    offsets = np.empty(generation.size, np.float32)
    at = 0
    for logits in generation.blocks():
        everything[at : at + len(logits.offsets)] = logits.coordinates
        offsets[at : at + len(logits.offsets)] = logits.offsets
        at += len(logits.offsets)
    queries = np.asarray(generation.sharpness * coordinates, np.float32)
    curve(
        "NumPy, all dimensions", f"{K}", lambda i: np.argpartition(offsets - everything @ queries[i], K)[:K]
    )


def figures(times: list[float], recalls: list[float]) -> Row:
    """Medians of what was measured."""
    return {
        "questions": len(times),
        "recall": round(statistics.fmean(recalls), 4),
        "median_ms": round(1000 * statistics.median(times), 2),
        "p95_ms": round(1000 * float(np.quantile(times, 0.95)), 2),
    }


# ---- tables and pictures


def read_rows(file: Path) -> list[dict[str, str]]:
    """What was measured before."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return [*csv.DictReader(lines)]


def write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    """All of it, in one file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def show(rows: list[dict[str, str]]) -> None:
    """The client's figures, those of the disk, and the growth from one size to the next."""
    sizes = sorted({int(row["logits"]) for row in rows})
    before: tuple[int, float] | None = None
    for size in sizes:
        print(f"\n{size:,} logits")
        for row in rows:
            if int(row["logits"]) != size or row["part"] == "shortlist":
                continue
            units = (
                ("recall", "recall@10"),
                ("median_ms", "ms"),
                ("p95_ms", "ms p95"),
                ("seconds", "s"),
                ("bytes", "B"),
            )
            print(
                f"  {row['part']:<8}{row['name']:<24}"
                + "  ".join(f"{row[k]} {unit}" for k, unit in units if row[k])
            )
            if row["part"] == "client" and row["name"] == "name":
                now = float(row["median_ms"])
                if before is not None:
                    print(f"  {size / before[0]:.0f} times the logits: {now / before[1]:.2f} times the time")
                before = (size, now)


def plot(rows: list[dict[str, str]], file: Path) -> None:
    """Recall of the shortlist against its time at the largest size, and the client's time against the size."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lists = [row for row in rows if row["part"] == "shortlist"]
    asked = [row for row in rows if row["part"] == "client" and row["name"] != "first"]
    if not lists or not asked:
        return
    largest = max(int(row["logits"]) for row in lists)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    lists = [row for row in lists if int(row["logits"]) == largest]
    for engine in dict.fromkeys(row["name"] for row in lists):
        points = sorted((float(r["median_ms"]), float(r["recall"])) for r in lists if r["name"] == engine)
        best = np.maximum.accumulate(
            [recall for _, recall in points]
        )  # what an effort of at most this reaches
        left.plot(
            [ms for ms, _ in points], best, marker="o", markersize=3, drawstyle="steps-post", label=engine
        )
    left.set(
        xscale="log",
        ylim=(0.5, 1.01),
        xlabel="ms a question, one core",
        ylabel="share of the exact ten in the list",
    )
    left.set_title(f"Shortlist, {largest:,} logits")
    left.axhline(0.97, color="grey", linewidth=0.5)
    left.legend(fontsize=7)
    for kind in dict.fromkeys(row["name"] for row in asked):
        points = sorted((int(r["logits"]), float(r["median_ms"])) for r in asked if r["name"] == kind)
        right.plot([n for n, _ in points], [ms for _, ms in points], marker="o", label=kind)
    right.axhline(25, color="grey", linewidth=0.5)
    right.set(xscale="log", ylim=(0, None), xlabel="logits", ylabel="median ms a question, one core")
    right.set_title("The client, second question onwards")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()

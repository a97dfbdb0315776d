"""Queries for generators in an index of many synthetic ones, on one core.

    OMP_NUM_THREADS=1 uv run python -m tests.benchmarks.generators [--models N] [--queries N] [--index DIR]

Each synthetic generator makes one of some thousand concepts, more or less well: 64 samples around its direction. The index
has a few classifiers beside them, and a small random encoder. Prints seconds and bytes a generator, the time of a query by
name (p50, p95; with the encoder's part alone), and the share of the exact first ten that the shortlist holds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from probelog.encoders.onnx_export import export_text_encoder
from probelog.encoders.torch_encoder import load_encoder
from probelog.index.basis import Basis
from probelog.index.generators.schema import GENERATOR_FACTS
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.generators import GeneratorSource, Sampled, write_generators
from probelog.ranking.matched_heads import HeadSpace
from probelog.ranking.samples.description import unit
from probelog.search.client import open_index
from probelog.search.generators.query import GeneratorQuery, asked, shortlist_direction
from probelog.storage.store import Store
from tests.support.worlds import small_index, tiny_encoders
from tests.support.worlds.small_index import WriteFurther

_CONCEPTS = 2000
_WIDTH = 512
_SAMPLES = 64
# Models whose samples are drawn; the others are these, moved a little, for drawing them all takes as long as writing them.
_EACH = 512
WORDS = ["cat", "chair", "lamp", "bus", "tree", "apple", "violin", "cup", "sea lion", "golden retriever"]


def source(models: int, space: HeadSpace) -> GeneratorSource:
    """Synthetic generators, of which each stream gives the same samples.

    What a sample shows moves it along the concept's direction and along its name; of most concepts both are random.
    """
    random = np.random.default_rng(0)
    width = space.centre.shape[0]
    concepts = unit(random.normal(size=(_CONCEPTS, width)))
    concepts[: len(space.background)] = unit(space.background + unit(space.texts - space.texts.mean(axis=0)))
    noise = random.normal(size=(_EACH, _SAMPLES, width)).astype(np.float32) / np.sqrt(width)

    def stream() -> Iterator[Sampled]:
        drawn = np.random.default_rng(1)
        for number in range(models):
            away = concepts[drawn.integers(_CONCEPTS)] + 0.3 * concepts[drawn.integers(_CONCEPTS)]
            rows = space.centre + 0.7 * away + drawn.uniform(0.3, 1.0) * noise[number % _EACH]
            yield Sampled(number, unit(rows.astype(np.float32)), None, ())

    names = [f"owner/generator-{n}" for n in range(models)]
    fixed: dict[str, object] = {
        "sha": "0" * 40,
        "pipeline": "DDPMPipeline",
        "architecture": "UNet2DModel",
        "conditioning": "none",
        "samples": _SAMPLES,
    }
    columns = {
        item.name: names if item.name == "repo" else [fixed.get(item.name)] * models
        for item in GENERATOR_FACTS
        if item.name not in ("copies", "pictures", "strength", "consistency")
    }
    facts = pa.table(
        {name: pa.array(values, GENERATOR_FACTS.field(name).type) for name, values in columns.items()}
    )
    return GeneratorSource(facts, names, stream, "f" * 16)


def further(models: int, told: dict[str, float]) -> WriteFurther:
    def write(
        writer: GenerationWriter, space: HeadSpace, probes: np.ndarray, basis: Basis
    ) -> tuple[dict[str, object], dict[str, bytes]]:
        started = time.perf_counter()
        settings, meta = write_generators(writer, source(models, space), space, probes, basis, None)
        told["written"] = time.perf_counter() - started
        return {"generators": settings}, meta

    return write


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--index", type=Path, help="where to keep it; by default nowhere")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="generators-") as scratch:
        store = Store(given.index or Path(scratch) / "index")
        told: dict[str, float] = {}
        if not store.names(""):
            files = export_text_encoder(
                load_encoder(str(tiny_encoders.clip(Path(scratch) / "encoder", _WIDTH)))
            )
            pairs = [f"{one} {other}" for one in WORDS for other in WORDS]
            small_index.build(
                store,
                files=files,
                images=False,
                probes=600,
                names=pairs,
                write_further=further(given.models, told),
            )
        size = sum(length for name, length in store.sizes("").items() if "samples.lance" in name)
        with open_index(store.uri) as index:
            generation = index._generation
            count = len(generation.generators)
            if told:
                print(
                    f"{count:,} generators written in {told['written']:.1f} s, {1000 * told['written'] / count:.2f} ms each"
                )
            print(f"{size / count / 1024:.1f} KB a generator")
            names = generation.background
            index.search("cat", kind="generator")
            times, alone = [], []
            for number in range(given.queries):
                name = names[number % len(names)]
                started = time.perf_counter()
                asked(generation, [name])
                embedded = time.perf_counter()
                index.search(name, kind="generator")
                alone.append(embedded - started)
                times.append(time.perf_counter() - embedded)
            cuts = statistics.quantiles(times, n=20)
            print(
                f"a query: p50 {1000 * statistics.median(times):.1f} ms, p95 {1000 * cuts[-1]:.1f} ms; "
                f"of it encoder and direction {1000 * statistics.median(alone):.1f} ms"
            )
            if count <= 20_000:
                print(f"share of the exact first ten: {recall(generation, names[:20]):.3f}")


def recall(generation: object, names: list[str]) -> float:
    """Share of the exact first ten that the first shortlist holds."""
    from probelog.index.generation import Generation
    from probelog.search.generators.ranking import FIRST

    assert isinstance(generation, Generation)
    generators, held = generation.generators, []
    for name in names:
        experts = asked(generation, [name])
        query = GeneratorQuery(experts, (), by_model=False)
        scores = np.concatenate(
            [
                query.scores(
                    generators,
                    generators.stored(np.arange(start, min(start + 2000, generators.settings.rows))),
                )[0]
                for start in range(0, generators.settings.rows, 2000)
            ]
        )
        exact = np.argsort(-scores)[:10]
        some = generators.shortlisted(
            generation.basis.coordinates(shortlist_direction(generation, experts[0])), FIRST
        )
        held.append(np.isin(exact, some).mean())
    return float(np.mean(held))


if __name__ == "__main__":
    main()

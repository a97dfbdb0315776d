"""Queries for generators in an index of many synthetic ones, on one core.

    OMP_NUM_THREADS=1 uv run python -m tests.benchmarks.generators [--generators N] [--queries N] [--exact N] [--index DIR]

Each synthetic generator makes one to six of some thousand concepts, more or less well: 64 samples around their directions. The
index has a few classifiers beside them, and a small random encoder. The descriptions are made up as such, without the principal
axes, which other methods use; tables and vector index are the product's. Prints seconds and bytes a generator, the time of a
query by name (p50, p95; with the encoder's part alone), how many of the first ten make what was asked for, and how they
compare with the first ten of all, scored without a shortlist.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.encoders.onnx_export import export_text_encoder
from probelog.encoders.torch_encoder import load_encoder
from probelog.index.arrow import fixed_binary
from probelog.index.generation import Generation
from probelog.index.generators.encoding import (
    decode,
    description_type,
    encode,
    fit_axes,
    quantised,
    set_offsets,
)
from probelog.index.generators.groups import GroupSpace
from probelog.index.generators.schema import GENERATOR_TABLE, SHOWN, GeneratorSettings, samples_schema
from probelog.index.generators.shown import packed
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.generators import write_groups
from probelog.ranking.matched_heads import HeadSpace
from probelog.ranking.samples.description import Descriptions, unit
from probelog.ranking.samples.matched import SampleSpace
from probelog.search.client import open_index
from probelog.search.generators.query import GeneratorQuery, asked
from probelog.search.generators.ranking import FIRST
from probelog.storage.encoding import npy
from probelog.storage.store import Store
from tests.support.worlds import small_index, tiny_encoders
from tests.support.worlds.small_index import PROMPT, WriteFurther

_CONCEPTS = 2000
_WIDTH = 256
_SAMPLES = 64
_MAKES = 6
# Of so many models noise is drawn; the others' is one of these, larger or smaller.
_DRAWN = 256
_AT_ONCE = 256
# Unrelated names have a cosine of one half then; of directions below this share of the largest little is made.
_COMMON, _SMALLEST = 5.0, 0.02
WORDS = ["cat", "bus", "cup", "dog", "hat", "jug", "owl", "pig", "sea", "van"]
Floats = npt.NDArray[np.float32]


def made(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many concepts each of some generators makes."""
    return 1 + numbers * 7 % 11 % _MAKES


def concepts_of(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Concepts (n, ``_MAKES``) of one block of generators, the same in every call; -1 for none."""
    drawn = np.random.default_rng([1, int(numbers[0])]).integers(_CONCEPTS, size=(len(numbers), _MAKES))
    return np.where(np.arange(_MAKES) < made(numbers)[:, None], drawn, -1)


class Synthetic:
    """Made-up generators. What a sample shows moves it along the concept's direction and along its name."""

    def __init__(self, space: HeadSpace, probes: Floats) -> None:
        random = np.random.default_rng(0)
        concepts = unit(random.normal(size=(_CONCEPTS, _WIDTH)))
        concepts[: len(space.background)] = unit(
            space.background + unit(space.texts - space.texts.mean(axis=0))
        )
        self._concepts, self._centre = concepts.astype(np.float32), space.centre.astype(np.float32)
        self._noise = random.normal(size=(_DRAWN, _SAMPLES, _WIDTH)).astype(np.float32) / np.sqrt(_WIDTH)
        features = np.concatenate(self._features(np.arange(1000))[:, ::3])
        plain = SampleSpace.fit(features, space.centre, space.background, space.texts, probes)
        self.axes = fit_axes(features, probes, space.texts)
        self.space = plain.projected(self.axes)
        self.finder = GroupSpace.fit(self.space, features @ self.axes.T, space.spread**0.5)
        # In coordinates from here on.
        self._concepts, self._centre, self._noise = (
            rows @ self.axes.T for rows in (self._concepts, self._centre, self._noise)
        )

    def described(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
        """Descriptions of some generators."""
        features = self._features(numbers)
        count, size, width = features.shape
        out = np.zeros(count, description_type(width))
        flat, scales = quantised(features.reshape(-1, width))
        out["count"], out["mean"], out["axis_scales"] = size, features.mean(axis=1), 1.0
        out["features"], out["feature_scales"] = flat.reshape(features.shape), scales.reshape(count, size)
        none = np.zeros((count, 1, width), np.float32)
        every = Descriptions(
            none[:, 0],
            none,
            none[:, 0, :1],
            none[:, 0],
            (out["features"] * out["feature_scales"][..., None]).reshape(-1, width),
            np.full(count, size),
        )
        set_offsets(out, self.space.offsets(every))
        return out

    def _features(self, numbers: npt.NDArray[np.int64]) -> Floats:
        """Samples (n, m, p) of some generators, the same in every call."""
        random = np.random.default_rng([2, int(numbers[0])])
        concepts = concepts_of(numbers)
        beside = random.integers(_CONCEPTS, size=len(numbers))
        turns = np.arange(_SAMPLES) % made(numbers)[:, None]
        shown = self._concepts[np.take_along_axis(concepts, turns, axis=1)]
        shown += np.float32(0.3) * self._concepts[beside][:, None]
        shown *= np.float32(0.7)
        spread = random.uniform(0.3, 1.0, size=(len(numbers), 1, 1)).astype(np.float32)
        shown += spread * self._noise[numbers % _DRAWN]
        shown += self._centre
        shown /= np.sqrt(np.einsum("nmd,nmd->nm", shown, shown))[..., None]
        return shown

    def samples(self, models: int, schema: pa.Schema) -> Iterator[pa.Table]:
        for first in range(0, models, _AT_ONCE):
            numbers = np.arange(first, min(first + _AT_ONCE, models))
            columns = {
                "row": pa.array(numbers, pa.int32()),
                "generator": pa.array(numbers, pa.int32()),
                "description": fixed_binary(self.described(numbers)),
                "thumbnails": pa.array([[]] * len(numbers), pa.list_(pa.binary())),
            }
            yield pa.table(columns, schema)


def facts(models: int) -> pa.Table:
    """The table of so many generators."""
    known: dict[str, Any] = {
        "id": np.arange(models),
        "row": np.arange(models),
        "repo": [f"owner/generator-{n}" for n in range(models)],
        "identity": [str(n) for n in range(models)],
        "sha": "0" * 40,
        "pipeline": "DDPMPipeline",
        "architecture": "UNet2DModel",
        "conditioning": "none",
        "samples": _SAMPLES,
        "copies": 1,
        "pictures": 0,
    }
    columns = {}
    for item in GENERATOR_TABLE:
        value = known.get(item.name)
        if isinstance(value, str | int):
            columns[item.name] = pa.repeat(pa.scalar(value, item.type), models)
        else:
            columns[item.name] = pa.nulls(models, item.type) if value is None else pa.array(value, item.type)
    return pa.table(columns, GENERATOR_TABLE)


def further(models: int, told: dict[str, float]) -> WriteFurther:
    def write(
        writer: GenerationWriter, space: HeadSpace, probes: Floats
    ) -> tuple[dict[str, object], dict[str, bytes]]:
        world = Synthetic(space, probes)
        width = len(world.axes)
        started = time.process_time()
        features = world._features(np.arange(_AT_ONCE))[:32]
        plain = np.concatenate([encode(rows, None, np.eye(width, dtype=np.float32)) for rows in features])
        set_offsets(plain, world.space.offsets(decode(plain).described))
        told["plain"] = (time.process_time() - started) / len(features)
        assert (plain["features"] == world.described(np.arange(_AT_ONCE))["features"][:32]).mean() > 0.99
        started = time.process_time()
        schema = samples_schema(description_type(width).itemsize)
        writer.write("samples", schema, world.samples(models, schema))
        table = facts(models)
        table = table.append_column(SHOWN, pa.array(packed(table), SHOWN.type))
        writer.write("generators", table.schema, [table])
        writer.index_columns("generators", "repo", "row")
        told["written"] = time.process_time() - started
        started = time.process_time()
        groups, found_by = write_groups(writer, world.finder, width)
        told["groups"], told["indexed"] = groups, time.process_time() - started
        settings = GeneratorSettings(
            models,
            models,
            "f" * 16,
            writer.name,
            world.space.direction_sharpness,
            world.space.embedding_sharpness,
            False,
            groups,
            euclidean=True,
            by_row=True,
        )
        return {"generators": settings}, {
            "sample_axes.npy": npy(world.axes),
            **found_by,
        }

    return write


def spread_out(folder: Path, names: Sequence[str]) -> Path:
    """Make a random CLIP tell names apart as a trained encoder does: for a random one all are alike.

    Its text tower's output is centred at names and whitened; ``_COMMON`` times of what they differ by they have in common.
    """
    import torch
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        tokens = tokenizer([PROMPT.format(name) for name in names], padding=True, return_tensors="pt")
        pooled = model.text_model(**tokens).pooler_output
        mean = pooled.mean(dim=0)
        _, sizes, ways = torch.linalg.svd(pooled - mean, full_matrices=False)
        # A norm leaves nothing in the last direction, in which all are the same.
        sizes, ways = sizes[:-1], ways[:-1]
        scales = len(names) ** 0.5 / sizes.clamp_min(_SMALLEST * sizes[0])
        whitened = ways.T @ torch.diag(scales) @ ways
        shared = torch.full_like(mean, len(mean) ** -0.5)
        model.text_model.final_layer_norm.bias += _COMMON * shared - mean
        turned = torch.linalg.qr(torch.randn(_WIDTH, len(mean), generator=torch.manual_seed(0)))[0]
        model.text_projection.weight.copy_(turned @ (whitened + torch.outer(shared, shared)))
        model.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generators", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--exact", type=int, default=10, help="queries that are answered exactly, too")
    parser.add_argument("--index", type=Path, help="where to keep it; by default nowhere")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="generators-") as scratch:
        store = Store(given.index or Path(scratch) / "index")
        told: dict[str, float] = {}
        if not store.names(""):
            names = [f"{one} {other}" for one in WORDS for other in WORDS]
            encoder = load_encoder(
                str(spread_out(tiny_encoders.clip(Path(scratch) / "encoder", _WIDTH), names))
            )
            small_index.build(
                store,
                files=export_text_encoder(encoder),
                images=False,
                probes=200,
                names=names,
                write_further=further(given.generators, told),
            )
            print(
                f"processor time: {told['written']:.0f} s for tables, {told['indexed']:.0f} s for {told['groups']:,.0f} "
                f"groups and the vector index; {1000 * told['plain']:.1f} ms a generator to describe it by its samples"
            )
        sizes = store.sizes("")
        with open_index(store.uri) as index:
            generation = index._generation
            count = len(generation.generators)
            for table in ("samples", "groups"):
                size = sum(length for name, length in sizes.items() if f"{table}.lance" in name)
                print(f"{size / count:,.0f} bytes of {table} a generator")
            ask(index, given.queries)
            if given.exact:
                print(*recall(generation, generation.background[: given.exact]), sep="\n")


def ask(index: Any, queries: int) -> None:
    """Time queries by name."""
    names = index._generation.background
    index.search("cat", kind="generator")
    times, used, alone = [], [], []
    for number in range(queries):
        name = names[number % len(names)]
        started = time.perf_counter()
        asked(index._generation, [name])
        embedded, begun = time.perf_counter(), time.process_time()
        index.search(name, kind="generator")
        alone.append(embedded - started)
        times.append(time.perf_counter() - embedded)
        used.append(time.process_time() - begun)
    print(
        f"a query: p50 {1000 * statistics.median(times):.1f} ms, p95 {1000 * statistics.quantiles(times, n=20)[-1]:.1f} ms, "
        f"{1000 * statistics.median(used):.1f} ms of processor time; of it encoder and direction "
        f"{1000 * statistics.median(alone):.1f} ms"
    )


def recall(generation: Generation, names: list[str]) -> list[str]:
    """How the first ten of a shortlist compare with those of all generators, a line for each length of it."""
    generators, rows = generation.generators, generation.generators.settings.rows
    queries = [GeneratorQuery(asked(generation, [name]), (), by_model=False) for name in names]
    scores = np.empty((len(names), rows))
    makes = np.empty((len(names), rows), bool)
    for start in range(0, rows, _AT_ONCE):
        numbers = np.arange(start, min(start + _AT_ONCE, rows))
        stored, concepts = generators.stored(numbers), concepts_of(numbers)
        for number, query in enumerate(queries):
            scores[number, numbers] = query.scores(generators, stored)[0]
            makes[number, numbers] = (concepts == number).any(axis=1)
    exact = np.argsort(-scores, axis=1)[:, :10]
    out = [
        f"all: {np.take_along_axis(makes, exact, axis=1).mean():.3f} of the first ten make what was asked for"
    ]
    for first in (FIRST // 2, FIRST, 2 * FIRST):
        held, right, lost = [], [], []
        for number, query in enumerate(queries):
            listed = generators.shortlisted(query.projected(generators)[0], first)
            best = listed[np.argsort(-scores[number, listed])][:10]
            held.append(np.isin(exact[number], listed).mean())
            right.append(makes[number, best].mean())
            lost.append(scores[number, exact[number]].mean() - scores[number, best].mean())
        out.append(
            f"the {first} nearest groups: {np.mean(right):.3f} of them; {np.mean(held):.3f} of the exact first ten, "
            f"whose scores are higher by {np.mean(lost):.2f} (of {scores.max(axis=1).mean():.0f})"
        )
    return out


if __name__ == "__main__":
    main()

"""Generators in a small index: samples drawn around the text embeddings of what each makes, without any model."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from probelog.index import shortlist
from probelog.index.generators.schema import GENERATOR_FACTS
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.generators import GeneratorSource, Sampled, write_generators
from probelog.ranking import matched_heads
from probelog.ranking.names import name_vectors
from probelog.ranking.samples.description import unit
from probelog.ranking.samples.sketches import SketchMap
from probelog.storage.store import Store
from probelog.trees.edges import Edge, Relation, edge_table
from tests.support.worlds import small_index, tiny_encoders
from tests.support.worlds.small_index import BACKGROUND, PROMPT, SmallIndex, text_encoder

Floats = npt.NDArray[np.floating]

# How far a sketch's embedding is from its picture's, in every coordinate.
SKETCHED = 0.3


@dataclass(frozen=True)
class Generator:
    """One generator to index. Those of equal ``identity`` make the same samples."""

    repo: str
    makes: tuple[str, ...]
    pipeline: str = "DDPMPipeline"
    conditioning: str = "none"
    base_repo: str | None = None
    identity: str | None = None
    licence: str | None = "mit"
    downloads: int | None = 10
    samples: int = 24
    pictures: int = 4
    trigger_words: tuple[str, ...] = ()

    @property
    def sha(self) -> str:
        return hashlib.sha1(self.repo.encode()).hexdigest()

    @property
    def key(self) -> str:
        return self.identity or f"samples of {self.repo}"


GENERATORS_OF_ALL_SORTS = (
    Generator("gina/cats", ("cat",)),
    Generator("gina/cats-copy", ("cat",), identity="samples of gina/cats", licence="apache-2.0"),
    Generator("hugo/violins", ("violin",), "DDIMPipeline", downloads=500),
    Generator("ines/zoo", ("sea_lion", "Golden Retriever"), samples=64, licence=None, downloads=None),
    Generator("jack/lamps", ("lamp",), "AutoencoderKL", samples=5, pictures=0),
    Generator(
        "kim/lora-umbrella", ("umbrella",), "lora", "text", "gina/cats", trigger_words=("umbr", "\x1b[31mred")
    ),
    Generator("leo/\x1b[31mred", ("bus",), "gallery", samples=1, licence="mit\x1b[2J"),
)


#: Where these come from: the adapter from its base.
EDGES_OF_ALL_SORTS = edge_table(
    [
        Edge(
            "kim/lora-umbrella",
            "gina/cats",
            Relation.LOW_RANK,
            1.0,
            declared=True,
            evidence={"was run on it": 1.0},
        ),
        Edge("gina/cats", "anna/pets", Relation.FINE_TUNED, 0.9),
    ]
)


def picture(repo: str, number: int) -> bytes:
    """One sample as a picture: WebP bytes, a plain colour that depends on repository and number."""
    colour = hashlib.sha1(f"{repo} {number}".encode()).digest()
    sink = io.BytesIO()
    Image.new("RGB", (16, 16), (colour[0], colour[1], colour[2])).save(sink, "WEBP")
    return sink.getvalue()


@dataclass(frozen=True, eq=False)
class Drawn:
    """Generators with their samples, as ``write_generators`` takes them."""

    generators: Sequence[Generator]
    features: dict[str, Floats]
    base: dict[str, Floats]

    @classmethod
    def around(
        cls,
        generators: Sequence[Generator],
        pictures_of: Callable[[str], Floats],
        noise: float,
        seed: int = 0,
    ) -> Drawn:
        """Draw the samples of each around the picture (d,) of what it makes, in turns."""
        features, base = {}, {}
        for generator in generators:
            if generator.key in features:
                continue
            random = np.random.default_rng([seed, *generator.key.encode()])
            shown = np.stack([pictures_of(name) for name in generator.makes])
            rows = shown[np.arange(generator.samples) % len(shown)]
            rows = unit(rows + random.normal(size=rows.shape) * noise / np.sqrt(rows.shape[1]))
            features[generator.key] = rows
            if generator.base_repo is not None:
                base[generator.key] = unit(rows - shown[0] + pictures_of("chair"))
        return cls(generators, features, base)

    def source(self) -> GeneratorSource:
        """What the writer reads."""

        def stream() -> Iterator[Sampled]:
            for number, item in enumerate(self.generators):
                pictures = [picture(item.repo, i) for i in range(item.pictures)]
                rows = self.features[item.key].astype(np.float16)
                yield Sampled(number, rows, self.base.get(item.key), pictures)

        facts = [
            {
                "repo": item.repo,
                "sha": item.sha,
                "pipeline": item.pipeline,
                "architecture": "UNet2DModel",
                "conditioning": item.conditioning,
                "image_size": 32,
                "parameters": 1_000_000,
                "base_repo": item.base_repo,
                "trigger_words": list(item.trigger_words),
                "prompts": [],
                "classes": [],
                "samples": item.samples,
                "steps": 25,
                "weight_digest": item.key,
                "licence": item.licence,
                "downloads": item.downloads,
                "tags": [],
                "parents": [],
                "licences": [] if item.licence is None else [item.licence],
                "root": item.base_repo or item.repo,
                "parent": item.base_repo,
                "depth": int(item.base_repo is not None),
            }
            for item in self.generators
        ]
        counted = ["copies", "pictures", "strength", "consistency"]
        table = pa.Table.from_pylist(facts, GENERATOR_FACTS).drop_columns(counted)
        return GeneratorSource(table, [item.key for item in self.generators], stream, "e" * 16)


@dataclass(frozen=True, eq=False)
class SmallGenerators:
    """An index with classifiers and generators, and what was written.

    Attributes:
        index: the index.
        drawn: the samples.
        pictures_of: embedding (d,) of a picture of a concept: a random encoder knows none, so it is made up from the
            concept's direction and its text.
    """

    index: SmallIndex
    drawn: Drawn
    pictures_of: Callable[[str], Floats]


def build(
    index: Store,
    generators: Sequence[Generator] = GENERATORS_OF_ALL_SORTS,
    sketches: bool = True,
    noise: float = 0.2,
    source: GeneratorSource | None = None,
    older: bool = False,
    **options: Any,
) -> SmallGenerators:
    """Write a small index (``small_index.build``) with generators beside its classifiers; of another source, if given.

    ``older``: with a vector index by inner product, as versions of before wrote it.
    """
    made: list[tuple[Drawn, Callable[[str], Floats]]] = []
    kind = options.get("kind", "siglip")
    files = options.get("files") or tiny_encoders.text_files(kind)

    def write_further(
        writer: GenerationWriter, space: matched_heads.HeadSpace, probes: Floats
    ) -> tuple[dict[str, Any], dict[str, bytes]]:
        encoder = text_encoder(files)
        names = [*options.get("names", BACKGROUND)]

        @functools.cache
        def pictures_of(name: str) -> Floats:
            text = name_vectors(encoder.embed, [PROMPT], [name])
            excluded = np.array([names.index(name)] if name in names else [], np.int64)
            direction = space.of_texts(text, [excluded])[0]
            return np.asarray(
                unit((space.centre + direction + unit(text - space.texts.mean(axis=0))[0])[None])[0]
            )

        drawn = Drawn.around(generators, pictures_of, noise)
        made.append((drawn, pictures_of))
        # Made-up sketches: the probes, all moved by the same.
        fitted = SketchMap.fit(unit(probes + SKETCHED), probes)
        settings, meta = write_generators(
            writer, source or drawn.source(), space, probes, fitted if sketches else None
        )
        if older and settings.groups is not None:
            shortlist.build(writer.open("groups"))
            settings = replace(settings, euclidean=None, by_row=None)
        return {"generators": settings}, meta

    small = small_index.build(index, write_further=write_further, **options)
    return SmallGenerators(small, *made[0])


def renamed(generators: Sequence[Generator], suffix: str) -> list[Generator]:
    """The same generators under other names, of other samples."""
    return [replace(item, repo=item.repo + suffix, identity=None) for item in generators]


def mean_direction(world: SmallGenerators, repo: str, centre: Floats) -> Floats:
    """Direction of the mean of one generator's samples, beside the probes' centre."""
    key = next(item.key for item in world.drawn.generators if item.repo == repo)
    away = world.drawn.features[key].mean(axis=0) - centre
    return np.asarray(away / np.linalg.norm(away), np.float64)

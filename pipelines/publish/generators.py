"""The generators of a generation: from the ledger of their samples to its tables, and the check of these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.arrays import Floats
from probelog.encoders.torch_encoder import Encoder
from probelog.errors import StoreError
from probelog.index.contents.generators import Generators
from probelog.index.generation import Generation
from probelog.index.generators.schema import GENERATOR_FACTS, SAMPLED_FACTS, GeneratorSettings
from probelog.probes.edges import SketchEncoder
from probelog.probes.probe_set import ProbeSet
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.generators import GeneratorSource, Sampled, write_generators
from probelog.ranking.matched_heads import HeadSpace
from probelog.ranking.samples.description import unit
from probelog.ranking.samples.sketches import SketchMap
from probelog.storage.encoding import short_key
from probelog.storage.ledger import Ledger, Receipt, rows_of_models
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import (
    GENERATORS,
    LISTED_FACTS,
    SAMPLES,
    TREE_FACTS,
    CatalogueRow,
    SampledModel,
    TreeFacts,
    from_table,
)
from probelog.storage.store import Store

# Counted when the tables are written.
_COUNTED = ("copies", "pictures", "strength", "consistency")
_MOST_PICTURES = 12
# Generators that are compared with their samples, by the cosine of their means.
_COMPARED = 50
_ALIKE = 0.98
# Descriptions that are read at a time.
_AT_ONCE = 1024
_UNKNOWN_PLACE = TreeFacts()


@dataclass(frozen=True, eq=False)
class SampledGenerators:
    """What is published of the generators: those of a ledger of samples that a catalogue lists.

    Attributes:
        store: that holds the ledger.
        key: of the ledger.
        receipts: of the ledger.
        rows: of the catalogue, by repository and commit.
    """

    store: Store
    key: str
    receipts: Sequence[Receipt]
    rows: Mapping[tuple[str, str], CatalogueRow]

    @classmethod
    def of(cls, ledger: Ledger, key: str, rows: Sequence[CatalogueRow]) -> SampledGenerators:
        """Those of a ledger and a catalogue."""
        receipts = ledger.receipts(originals=False)
        return cls(ledger.store, key, receipts, {(row.repo, row.sha): row for row in rows})

    @cached_property
    def every(self) -> list[SampledModel]:
        """All generators of the ledger, whether they are listed or not, without their pictures."""
        columns = [name for name in GENERATORS.names if name != "thumbnails"]
        found: dict[tuple[str, str], SampledModel] = {}
        for receipt in self.receipts:
            for model in from_table(read_part(self.store, receipt.models, GENERATORS, columns), SampledModel):
                found[model.repo, model.sha] = model
        return [found[version] for version in sorted(found)]

    @cached_property
    def models(self) -> list[SampledModel]:
        """The generators by number, without their pictures."""
        return [model for model in self.every if (model.repo, model.sha) in self.rows]

    @property
    def source(self) -> str:
        """Key of what is published of them."""
        facts = (str(asdict(self.rows[model.repo, model.sha])) for model in self.models)
        return short_key("generators", self.key, *(receipt.name for receipt in self.receipts), *facts)

    def sample_directions(self, count: int, centre: Floats) -> npt.NDArray[np.float32]:
        """Directions (S, d) of about ``count`` samples, of all generators alike, from the probes' mean (d,)."""
        each = max(1, count // len(self.models))
        return np.concatenate(
            [np.asarray(unit(unit(item.features[:each]) - centre), np.float32) for item in self.stream()]
        )

    def table(self, places: Mapping[str, TreeFacts]) -> pa.Table:
        """The facts of the generators, from sampling, the catalogue and their trees."""
        rows = []
        for model in self.models:
            listed = asdict(self.rows[model.repo, model.sha])
            rows.append(
                {
                    **{name: getattr(model, name) for name in SAMPLED_FACTS},
                    **{name: listed[name] for name in LISTED_FACTS},
                    **asdict(places.get(model.repo, _UNKNOWN_PLACE)),
                }
            )
        return pa.Table.from_pylist(rows, GENERATOR_FACTS).drop_columns(list(_COUNTED))

    def for_writer(self, places: Mapping[str, TreeFacts]) -> GeneratorSource:
        """The generators in the form of `probelog.publication.generators.write_generators`."""
        identities = [model.identity or f"{model.repo}@{model.sha}" for model in self.models]
        return GeneratorSource(self.table(places), identities, self.stream, self.key)

    def stream(self) -> Iterator[Sampled]:
        """The samples of every generator, a receipt's after the other.

        Raises:
            StoreError: a part is damaged, or does not hold what its receipt says.
        """
        numbers = {(model.repo, model.sha): number for number, model in enumerate(self.models)}
        for receipt in self.receipts:
            for model, rows in _sampled_models(self.store, receipt):
                number = numbers.get((model.repo, model.sha))
                if number is not None and rows.num_rows:
                    yield Sampled(
                        number,
                        _features(rows, "feature"),
                        _features(rows, "base_feature") if not rows["base_feature"].null_count else None,
                        model.thumbnails[:_MOST_PICTURES],
                    )


def _sampled_models(store: Store, receipt: Receipt) -> Iterator[tuple[SampledModel, pa.Table]]:
    """Every generator of one receipt with the rows of its samples."""
    if not receipt.models.rows:
        return
    models = from_table(read_part(store, receipt.models, GENERATORS), SampledModel)
    counts = [model.samples for model in models]
    yield from zip(models, rows_of_models(store, receipt, SAMPLES, models, counts), strict=True)


def _features(rows: pa.Table, column: str) -> npt.NDArray[np.float32]:
    lists: Any = rows[column].combine_chunks()
    values = np.asarray(lists.flatten().to_numpy(zero_copy_only=False), np.float32)
    if len(values) % rows.num_rows:
        raise StoreError("the features of a generator's samples are of several lengths: sample it again")
    return values.reshape(rows.num_rows, -1)


def write(
    writer: GenerationWriter,
    sampled: SampledGenerators,
    places: Mapping[str, TreeFacts],
    space: HeadSpace,
    probe_set: ProbeSet,
    encoder: Encoder,
) -> tuple[GeneratorSettings, dict[str, bytes]]:
    """Write the tables of the generators; returns what the settings say of them, and values for the ``meta`` table."""
    embeddings = probe_set.embeddings(encoder.digest)
    # Once for a probe set and an encoder: the set keeps it.
    sketches = SketchMap.fit(probe_set.add_embeddings(SketchEncoder(encoder)), embeddings)
    return write_generators(writer, sampled.for_writer(places), space, embeddings, sketches)


def carried_over(base: Generation, sampled: SampledGenerators | None) -> bool:
    """Whether an update may leave the generators where its base has them: nothing was added, removed or changed."""
    settings = base.settings.generators
    if sampled is None or not sampled.models:
        return True
    if settings is None or settings.ledger != sampled.key or settings.models != len(sampled.models):
        return False
    return versions_in(base) == {(model.repo, model.sha) for model in sampled.models}


def versions_in(generation: Generation) -> frozenset[tuple[str, str]]:
    """Repositories and commits of a generation's generators."""
    return frozenset() if generation.settings.generators is None else generation.generators.versions


def places_in(base: Generation) -> dict[str, TreeFacts]:
    """The places of a generation's generators in their trees, which updates keep."""
    if base.settings.generators is None:
        return {}
    return {row.pop("repo"): TreeFacts(**row) for row in _places(base)}


def _places(generation: Generation) -> list[dict[str, Any]]:
    columns = ["repo", *TREE_FACTS]
    return generation.generators.rows(columns).select(columns).to_pylist()


# Checks


def wrong_generators(generation: Generation, sampled: SampledGenerators | None) -> Iterator[str]:
    """What is wrong with a generation's generators: rows, numbers, and some descriptions beside their samples."""
    expected = [] if sampled is None else sampled.models
    if generation.settings.generators is None:
        if expected:
            yield f"it holds no generators instead of {len(expected)}"
        return
    generators = generation.generators
    rows = generators.rows(["repo", "sha", "row"])
    held = list(zip(rows["repo"].to_pylist(), rows["sha"].to_pylist(), strict=True))
    if held != [(model.repo, model.sha) for model in expected]:
        yield f"its {len(held)} generators are not the {len(expected)} that were sampled and listed"
        return
    # Reading refuses descriptions that are none.
    for start in range(0, generators.settings.rows, _AT_ONCE):
        generators.stored(np.arange(start, min(start + _AT_ONCE, generators.settings.rows)))
    assert sampled is not None
    numbers: list[Any] = rows["row"].to_pylist()
    yield from _unlike_samples(generators, sampled, numbers)


def _unlike_samples(generators: Generators, sampled: SampledGenerators, rows: Sequence[int]) -> Iterator[str]:
    """Generators whose description is not that of their samples, among a few that are drawn."""
    step = max(1, len(rows) // _COMPARED)
    for item in sampled.stream():
        if item.number % step:
            continue
        described = generators.stored(np.array([rows[item.number]])).described
        mean = generators.axes @ unit(np.asarray(item.features, np.float32)).mean(axis=0)
        if _cosine(described.means[0], mean) < _ALIKE:
            yield f"the description of {sampled.models[item.number].repo} is not that of its samples"
            return


def _cosine(one: Floats, other: Floats) -> float:
    return float(one @ other / max(float(np.linalg.norm(one) * np.linalg.norm(other)), 1e-12))

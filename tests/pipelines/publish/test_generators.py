"""From a ledger of samples to the tables of generators, and the checks of these; generators in the quality gate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.publish.generators import SampledGenerators, carried_over, wrong_generators
from pipelines.quality.canaries import Canary, known_answers, lost_answers, read_canaries
from pipelines.quality.generators import GENERATORS, finds_generator, removed_generators
from probelog.errors import StoreError, UsageError
from probelog.index.generation import Generation
from probelog.publication.generators import GeneratorSource
from probelog.storage.layout import sample_ledger
from probelog.storage.ledger import SAMPLED, ItemResult, Ledger, item_key
from probelog.storage.schemas import SAMPLES, CatalogueRow, SampledModel
from probelog.storage.store import Store
from tests.support.worlds import small_generators
from tests.support.worlds.small_generators import GENERATORS_OF_ALL_SORTS, Generator, SmallGenerators, picture


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallGenerators:
    return small_generators.build(Store(tmp_path_factory.mktemp("generators") / "index"))


def sampled(world: SmallGenerators, store: Store, batch: int = 3) -> SampledGenerators:
    """The generators of the small world as a ledger of samples, in batches, and a catalogue."""
    ledger = Ledger(store, sample_ledger("e" * 16), SAMPLED)
    items = []
    for item in GENERATORS_OF_ALL_SORTS:
        model = SampledModel(
            repo=item.repo,
            sha=item.sha,
            pipeline=item.pipeline,
            architecture="UNet2DModel",
            conditioning=item.conditioning,
            image_size=32,
            parameters=1_000_000,
            samples=item.samples,
            steps=25,
            encoder_digest="digest of tiny siglip",
            dtype="float32",
            device="cpu",
            weight_digest=item.key,
            base_repo=item.base_repo,
            trigger_words=list(item.trigger_words),
            identity=item.key,
            thumbnails=[picture(item.repo, i) for i in range(item.pictures)],
        )
        features = world.drawn.features[item.key].astype(np.float16)
        base = world.drawn.base.get(item.key)
        rows = {
            "repo": [item.repo] * item.samples,
            "sha": [item.sha] * item.samples,
            "number": range(item.samples),
            "prompt": [None] * item.samples,
            "class": [None] * item.samples,
            "feature": list(features),
            "base_feature": [None] * item.samples if base is None else list(base.astype(np.float16)),
        }
        table = pa.table({name: pa.array(values, SAMPLES.field(name).type) for name, values in rows.items()})
        ledger.spool(item_key(item.repo, item.sha), ItemResult.success(model, table.cast(SAMPLES)))
        items.append(item_key(item.repo, item.sha))
    for start in range(0, len(items), batch):
        ledger.seal(items[start : start + batch])
    rows_of = [
        CatalogueRow(repo=item.repo, sha=item.sha, licence=item.licence) for item in GENERATORS_OF_ALL_SORTS
    ]
    return SampledGenerators.of(ledger, "e" * 16, rows_of)


def built(world: SmallGenerators, source: GeneratorSource, folder: Path) -> Generation:
    small = small_generators.build(Store(folder / "index"), source=source)
    return Generation(small.index.store, small.index.pointer)


def test_a_ledger_becomes_the_tables(world: SmallGenerators, tmp_path: Path) -> None:
    found = sampled(world, Store(tmp_path / "store"))
    assert [model.repo for model in found.models] == sorted(item.repo for item in GENERATORS_OF_ALL_SORTS)
    generation = built(world, found.for_writer({}), tmp_path)
    assert list(wrong_generators(generation, found)) == []
    adapter = generation.generators.named("kim/lora-umbrella")
    assert adapter is not None
    assert adapter["consistency"] > 0.9
    assert generation.generators.pictures([adapter["row"]])[0] == [
        picture("kim/lora-umbrella", i) for i in range(4)
    ]
    assert carried_over(generation, found)
    assert carried_over(generation, None)


def test_a_generation_that_is_not_what_was_sampled_is_refused(world: SmallGenerators, tmp_path: Path) -> None:
    found = sampled(world, Store(tmp_path / "store"))
    whole = found.for_writer({})

    def wrong_samples():  # type: ignore[no-untyped-def]
        for item in whole.stream():
            yield item._replace(features=-item.features)

    generation = built(world, replace(whole, stream=wrong_samples), tmp_path / "wrong")
    assert "is not that of its samples" in next(wrong_generators(generation, found))
    rows = dict(list(found.rows.items())[1:])
    fewer = SampledGenerators(found.store, found.key, found.receipts, rows)
    assert "are not the 6 that were sampled" in next(wrong_generators(generation, fewer))
    assert not carried_over(generation, fewer)
    assert fewer.source != found.source
    without = replace(generation.settings, generators=None)
    object.__setattr__(generation, "settings", without)
    assert list(wrong_generators(generation, None)) == []
    assert "holds no generators" in next(wrong_generators(generation, found))
    assert not carried_over(generation, found)


def test_generators_without_samples_are_not_published(world: SmallGenerators, tmp_path: Path) -> None:
    whole = sampled(world, Store(tmp_path / "store")).for_writer({})
    with pytest.raises(StoreError, match="none of the generators has samples"):
        built(world, replace(whole, stream=list), tmp_path)


def test_canaries_that_a_generator_must_answer(world: SmallGenerators) -> None:
    generation = Generation(world.index.store, world.index.pointer)
    canaries = read_canaries(["violin\thugo/violins", "cat\tgina/cats-copy", "lamp\tnobody/lamps", "cup"])
    assert [canary.by_generator for canary in canaries] == [True, True, True, False]
    measured = known_answers(generation, None, canaries, 0.0)
    assert (measured.value, measured.counted) == (0.0, 2)
    assert "nobody/lamps" in measured.note
    assert finds_generator(generation, "", "hugo/violins") is False
    with pytest.raises(UsageError, match="or name<TAB>REPO, a generator"):
        read_canaries(["cat\tgina/cats#"])
    assert not Canary("cat", "anna/pets#cat").by_generator


def test_generators_that_are_gone_are_measured(world: SmallGenerators, tmp_path: Path) -> None:
    live = Generation(world.index.store, world.index.pointer)
    fewer = small_generators.build(Store(tmp_path / "index"), GENERATORS_OF_ALL_SORTS[:4])
    candidate = Generation(fewer.index.store, fewer.index.pointer)
    (measure,) = removed_generators(candidate, live, 0.1)
    assert measure.value == pytest.approx(3 / 7)
    assert "jack/lamps" in measure.examples
    assert removed_generators(live, live, 0.1)[0].value == 0
    # What is gone is counted there; of what stayed, nothing is lost.
    names = [Canary(name) for name in (*small_generators.BACKGROUND, "umbrella")]
    lost = lost_answers(candidate, live, names, 0.1, "", GENERATORS)
    assert (lost.name, lost.value, lost.counted) == ("lost generators", 0.0, 3 * len(names))
    assert lost_answers(live, live, names, 0.1, "", GENERATORS).worse == 0.0


def test_answers_that_generators_do_not_give_any_more_are_lost(tmp_path: Path) -> None:
    names = small_generators.BACKGROUND
    makes = {f"owner/{n}": (names[n % len(names)],) for n in range(3 * len(names))}
    repos = [*makes]
    mixed = dict(zip(repos, [makes[repo] for repo in (*repos[1:], repos[0])], strict=True))
    live, candidate = (
        Generation(small.index.store, small.index.pointer)
        for small in (
            small_generators.build(
                Store(tmp_path / folder),
                [Generator(repo, what, samples=3, pictures=0) for repo, what in made.items()],
            )
            for folder, made in (("live", makes), ("mixed", mixed))
        )
    )
    canaries = [Canary(name) for name in names]
    lost = lost_answers(candidate, live, canaries, 0.1, "", GENERATORS)
    assert lost.counted == 10 * len(names)
    assert lost.value is not None
    assert lost.value >= 0.3  # of each name its own three, at least
    assert lost.worse == lost.value
    assert "owner/" in lost.examples[0]
    assert "#" not in lost.examples[0]
    assert removed_generators(live, None, 0.1) == []

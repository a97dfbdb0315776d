"""The tables of generators: what is written is read back; what somebody else wrote is checked."""

from __future__ import annotations

import dataclasses
import shutil
from datetime import UTC, datetime
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from probelog.errors import QueryError, StoreError
from probelog.index.generation import Generation
from probelog.index.generators.encoding import KEPT_FEATURES, decode, description_type, encode, fit_axes
from probelog.index.generators.schema import GENERATOR_FACTS
from probelog.index.generators.shown import packed, unpacked
from probelog.index.pointer import Pointer
from probelog.index.schema import MODEL_FACTS
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.generators import write_generators
from probelog.publication.update import Changes, write_update
from probelog.ranking.samples.description import Descriptions, Difference, unit
from probelog.ranking.samples.methods import METHODS
from probelog.storage.store import Store
from tests.support.worlds import small_generators, small_index
from tests.support.worlds.small_generators import GENERATORS_OF_ALL_SORTS, SmallGenerators, picture


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallGenerators:
    return small_generators.build(Store(tmp_path_factory.mktemp("generators") / "index"))


def opened(world: SmallGenerators) -> Generation:
    return Generation(world.index.store, world.index.pointer)


def test_descriptions_keep_what_methods_need_in_25_kilobytes() -> None:
    random = np.random.default_rng(0)
    centres = unit(random.normal(size=(12, 512)))
    features = [unit(centre + 0.04 * random.normal(size=(70, 512))) for centre in centres]
    names = unit(centres + 0.02 * random.normal(size=centres.shape))
    axes = fit_axes(np.concatenate(features), names)
    assert axes.shape == (256, 512)
    assert axes @ axes.T == pytest.approx(np.eye(256), abs=1e-4)
    assert description_type(256).itemsize < 25_000
    stored = decode(np.concatenate([encode(rows, None, axes) for rows in features])).described
    assert stored.counts.tolist() == [KEPT_FEATURES] * 12
    exact = Descriptions.of(features)
    for name in ("first-moment", "best-k", "monte-carlo"):
        before, after = METHODS[name](exact, names), METHODS[name](stored, names @ axes.T)
        assert (after.argmax(axis=1) == before.argmax(axis=1)).all(), name
    assert stored.means @ axes == pytest.approx(exact.means, abs=0.02)


def test_a_difference_is_kept_as_a_direction() -> None:
    random = np.random.default_rng(1)
    base = unit(random.normal(size=(9, 16)))
    moved = Difference.of(unit(base + 0.5 * np.eye(16)[0]), base)
    stored = decode(encode(base, moved, np.eye(16, dtype=np.float32)))
    assert stored.differences[0] == pytest.approx(moved.direction, abs=1e-3)


def test_generators_are_read_back(world: SmallGenerators) -> None:
    generators = opened(world).generators
    assert len(generators) == len(GENERATORS_OF_ALL_SORTS)
    assert generators.repos == [item.repo for item in GENERATORS_OF_ALL_SORTS]
    assert generators.settings.rows == len(generators) - 1  # a copy shares its original's samples
    rows = generators.rows(["repo", "copies", "pictures", "strength", "consistency"]).to_pylist()
    assert [row["copies"] for row in rows[:3]] == [2, 2, 1]
    assert [row["row"] for row in rows[:3]] == [0, 0, 1]
    adapters = [row["repo"] for row in rows if row["strength"] is not None]
    assert adapters == ["kim/lora-umbrella"]
    assert rows[5]["consistency"] > 0.9
    assert generators.pictures([1, 0]) == [
        [picture("hugo/violins", i) for i in range(4)],
        [picture("gina/cats", i) for i in range(4)],
    ]
    exact = world.drawn.features
    for item, features in zip(GENERATORS_OF_ALL_SORTS, generators.features(), strict=True):
        assert features @ generators.axes == pytest.approx(exact[item.key], abs=0.01)
    named = generators.named("hugo/violins")
    assert named is not None
    assert named["pipeline"] == "DDIMPipeline"
    assert generators.named("hugo/nothing\x00") is None
    assert generators.count("licence = 'mit'") == 4


def test_an_index_without_generators_says_so(tmp_path: Path) -> None:
    small = small_index.build(Store(tmp_path / "index"))
    with pytest.raises(QueryError, match="this index holds no generators"):
        _ = Generation(small.store, small.pointer).generators


@pytest.mark.parametrize(
    ("table", "column", "value", "message"),
    [
        ("samples", "description", "NULL", "a row has no description"),
        ("samples", "generator", "99", "a generator that the index does not have"),
        ("generators", "shown", "arrow_cast('[1]', 'Binary')", "facts are no object"),
        ("generators", "shown", "arrow_cast('{\"repo\": 3}', 'Binary')", "facts are none"),
        ("generators", "shown", "arrow_cast('{}', 'Binary')", "a row has no repo"),
        ("generators", "row", "99", "samples that the index does not have"),
        ("generators", "copies", "-1", "copies below 0"),
        ("generators", "pipeline", "NULL", "a row has no pipeline"),
    ],
)
def test_damaged_tables_are_refused(
    world: SmallGenerators, table: str, column: str, value: str, message: str, tmp_path: Path
) -> None:
    source = Path(world.index.store.root)
    shutil.copytree(source, tmp_path / "index")
    folder = tmp_path / "index" / "generations" / world.index.pointer.generation
    lancedb.connect(str(folder)).open_table(table).update(where="true", values_sql={column: value})
    generators = Generation(Store(tmp_path / "index"), world.index.pointer).generators
    with pytest.raises(StoreError, match=message):
        _ = generators.all, generators.rows(["copies", "pipeline"]), generators.shown([0, 1])


def test_facts_are_shown_as_the_table_has_them(world: SmallGenerators, tmp_path: Path) -> None:
    generators = opened(world).generators
    numbers = [3, 0, 5]
    facts = generators.numbered(numbers, GENERATOR_FACTS.names)
    assert generators.shown(numbers) == facts
    # As an index of before, which has no such column.
    shutil.copytree(Path(world.index.store.root), tmp_path / "index")
    folder = tmp_path / "index" / "generations" / world.index.pointer.generation
    lancedb.connect(str(folder)).open_table("generators").drop_columns(["shown"])
    older = Generation(Store(tmp_path / "index"), world.index.pointer).generators
    assert older.shown(numbers) == facts
    assert older.named("hugo/violins") == generators.named("hugo/violins")


def test_facts_of_all_types_are_packed() -> None:
    facts = pa.Table.from_pylist(
        [
            {
                "repo": "a/b",
                "strength": 0.1,
                "last_modified": datetime(2026, 1, 2, 3, 4, 5, 678000, UTC),
                "parents": [{"repo": "c/d", "relation": "adapter", "source": None}],
                "tags": ["umbrella", "é\u202e"],
                "parameters": 2**40,
            },
            {"repo": "e/f", "tags": []},
        ],
        schema=GENERATOR_FACTS,
    )
    assert unpacked([*packed(facts)]).equals(facts)
    for damaged in (None, b"\xff", b"[" * 100_000, b"1", b'{"samples": "x"}', b'{"samples": 1e400}'):
        with pytest.raises(ValueError, match=r"."):
            unpacked([damaged])


def test_descriptions_that_are_none_are_refused() -> None:
    stored = encode(unit(np.random.default_rng(0).normal(size=(3, 8))), None, np.eye(8, dtype=np.float32))
    for name, value in (
        ("count", 0),
        ("count", 65),
        ("mean", np.nan),
        ("variances", -1.0),
        ("offsets", np.inf),
    ):
        wrong = stored.copy()
        wrong[name] = value
        with pytest.raises(ValueError, match="a description"):
            decode(wrong)


def test_settings_name_where_the_tables_lie(world: SmallGenerators, tmp_path: Path) -> None:
    generation = opened(world)
    assert generation.settings.generators is not None
    elsewhere = dataclasses.replace(generation.settings.generators, generation="another")
    object.__setattr__(generation.settings, "generators", elsewhere)
    with pytest.raises(StoreError, match="lie in another generation"):
        _ = generation.generators


def test_an_update_reads_its_base_s_generators_or_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path / "index")
    world = small_generators.build(store)
    base = Generation(store, world.index.pointer)
    none = Changes(pa.table({item.name: pa.array([], item.type) for item in MODEL_FACTS}).drop_columns(["copies"]), [], np.array([0]))  # fmt: skip
    fewer = small_generators.Drawn(GENERATORS_OF_ALL_SORTS[2:], world.drawn.features, world.drawn.base)
    for name, own in (("carried", False), ("rewritten", True)):
        writer = GenerationWriter(store, name)
        written = write_update(writer, base, none, [])
        generators, meta = base.settings.generators, dict[str, bytes]()
        if own:
            probes = base.probe_embeddings
            generators, meta = write_generators(writer, fewer.source(), base.space, probes, None)
        settings = dataclasses.replace(
            base.settings, **written.settings, logits=written.logits, generators=generators
        )
        writer.write_meta({"settings": settings.to_bytes(), **written.meta, **meta})
        writer.finish()
        update = Generation(store, Pointer(name, "s", "p", base=world.index.pointer.generation))
        assert update.generators.repos == (base.generators.repos[2:] if own else base.generators.repos)
        assert (update.generators.sketch_map is None) == own
        assert update.generators.rows(["repo"], "pipeline = 'lora'")["repo"].to_pylist() == [
            "kim/lora-umbrella"
        ]
        assert np.isfinite(update.generators.all.offsets.names).all()

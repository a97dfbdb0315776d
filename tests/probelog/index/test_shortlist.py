"""The shortlist on a real vector index: what it holds, and how much of the index it looks at."""

from __future__ import annotations

from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from lancedb.query import AsyncVectorQuery
from lancedb.table import AsyncTable

from probelog.index import shortlist
from probelog.index.arrow import fixed_lists
from probelog.index.generation import Generation
from probelog.index.waiting import wait
from probelog.storage.store import Store
from tests.probelog.index.test_generation import BASE, unit, whole


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Generation:
    """Some 1,500 logits, and the vector index over them."""
    models = [*BASE, *((f"x/many-{number}", 300, f"x{number}") for number in range(5))]
    return whole(Store(tmp_path_factory.mktemp("large")), models, exact=1)


def looked_up(generation: Generation, query: np.ndarray, count: int, effort: int = 1) -> list[int]:
    column = shortlist.look_up(generation._base.open_for_search("logits"), query, count, effort)
    facts = np.frombuffer(b"".join(column.to_pylist()), generation._facts)
    return [int(row) for row in facts["row"]]


@pytest.mark.parametrize("seed", range(5))
def test_a_shortlist_holds_the_largest_products(large: Generation, seed: int) -> None:
    coordinates = large.basis.coordinates(unit(100 + seed, 1))[0]
    query = large.basis.query(coordinates)
    logits = large.all_logits
    products = large.basis.vectors(logits.coordinates, logits.offsets).astype(float) @ query
    found = looked_up(large, query, 100)
    assert len(found) == len(set(found)) == 100
    best = logits.rows[np.argsort(-products)[:10]]
    assert len({*best.tolist()} & {*found}) >= 9
    everything = looked_up(large, query, 10_000, effort=1000)
    assert sorted(everything) == logits.rows.tolist()


@pytest.mark.parametrize("distance", ["dot", "l2"])
def test_vectors_of_unequal_lengths(tmp_path: Path, distance: shortlist.Distance) -> None:
    """By either distance the best are those of largest product, not those that are near."""
    random = np.random.default_rng(0)
    vectors = (random.normal(size=(3000, 64)) * random.uniform(0.2, 1.0, size=(3000, 1))).astype(np.float16)
    rows = {"row": pa.array(range(3000), pa.int32()), "vector": fixed_lists(vectors, pa.float16())}
    table = lancedb.connect(tmp_path).create_table("groups", pa.table(rows))
    shortlist.build(table, distance, partitions=8)

    async def opened() -> AsyncTable:
        return await (await lancedb.connect_async(tmp_path)).open_table("groups")

    searched = wait(opened())
    for query in random.normal(size=(10, 64)):
        found = shortlist.look_up(
            searched, query.astype(np.float32), 60, column="row", distance=distance
        ).to_pylist()
        best = np.argsort(-(vectors.astype(float) @ query))[:20]
        assert len({*best.tolist()} & {*found}) >= 18


def test_more_effort_looks_at_more_of_the_index(large: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    query = large.basis.query(large.basis.coordinates(unit(4, 1))[0])
    real, asked = AsyncVectorQuery.nprobes, list[int]()

    def nprobes(self: object, partitions: int) -> object:
        asked.append(partitions)
        return real(self, partitions)

    monkeypatch.setattr(AsyncVectorQuery, "nprobes", nprobes)
    for effort in (1, 2, 4):
        looked_up(large, query, 5, effort)
    shortlist.look_up(large._base.open_for_search("logits"), query, 5)
    assert asked == [64, 128, 256, 64]


def test_a_large_index_has_a_vector_index(large: Generation) -> None:
    """Without one LanceDB answers too, by looking at every row."""
    (found,) = large._base.open("logits").list_indices()
    assert (list(found.columns), found.index_type) == (["vector"], "IvfRq")

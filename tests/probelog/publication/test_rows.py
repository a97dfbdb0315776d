"""Which rows of logits are whose while an index is written, and the sample of them that a large one keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from probelog.index.generation import Generation
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.rows import Numbering, RowEncoder, _Sample, same_weights, write_tables
from probelog.ranking import matched_heads
from probelog.ranking.matched_heads import Background
from probelog.storage.store import Store
from tests.probelog.index.test_generation import BASE, NAMES, batches, unit, whole
from tests.support.worlds.small_index import Model, build, model_facts


def test_the_first_with_a_key_is_the_number_of_all_with_it() -> None:
    assert same_weights([None, "a", "b", "a", None, "", "b"]).tolist() == [0, 1, 2, 1, 4, 5, 2]
    assert same_weights([]).tolist() == []


def test_of_models_with_the_same_weights_the_first_described_is_kept() -> None:
    numbering = Numbering(np.array([0, 1, 0, 3], np.int32))
    assert numbering.take(np.array([0, 0, 1])).tolist() == [0, 1, 2]
    assert numbering.take(np.array([1, 2, 2, 3])).tolist() == [0, 3]
    assert (numbering.rows, numbering.logits) == (5, 2 + 2 + 2 + 1)
    first, rows = numbering.places
    assert (first.tolist(), rows.tolist()) == ([0, 2, 0, 4], [2, 2, 2, 1])
    copy_first = Numbering(np.array([0, 0], np.int32))
    assert copy_first.take(np.array([1, 1])).tolist() == [0, 1]
    assert copy_first.take(np.array([0, 0, 0])).tolist() == []
    assert (copy_first.rows, copy_first.logits) == (2, 4)


def test_a_models_logits_must_follow_each_other() -> None:
    numbering = Numbering(np.array([0, 1], np.int32))
    numbering.take(np.array([0, 1]))
    with pytest.raises(ValueError, match="the logits of model 0 do not follow each other"):
        numbering.take(np.array([0]))


def test_models_are_written_with_their_copies_and_places() -> None:
    models = [
        Model("a/1", ("x", "y")),
        Model("a/2", ("x", "y"), weights="digest of a/1"),
        Model("a/3", ("z",)),
    ]
    numbering = Numbering(same_weights([model.digest for model in models]))
    numbering.take(np.array([0, 0, 1, 1, 2]))
    table = numbering.joined(model_facts(models), [model.digest for model in models])
    rows = table.select(["id", "weights", "copies", "first_row", "rows", "repo"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (0, 0, 2, 0, 2, "a/1"),
        (1, 0, 2, 0, 2, "a/2"),
        (2, 2, 1, 2, 1, "a/3"),
    ]
    assert table["identity"].to_pylist() == [model.digest for model in models]


@pytest.mark.parametrize("batch", [1, 30, 2000])
def test_a_sample_has_a_fixed_size_and_does_not_depend_on_the_batches(batch: int) -> None:
    kind = np.dtype([("row", "<u4")])
    sample = _Sample(70, np.empty(0, kind))
    rows = np.zeros(2000, kind)
    rows["row"] = np.arange(2000)
    for start in range(0, 2000, batch):
        sample.add(rows[start : start + batch])
        assert len(sample.rows) == min(70, start + batch)
    smallest = np.argsort(np.random.default_rng(0).random(2000))[:70]
    assert sorted(sample.rows["row"].tolist()) == sorted(smallest.tolist())


def test_offsets_are_those_of_the_directions_that_are_stored(tmp_path: Path) -> None:
    """A client has no others: what encoding loses must not count twice."""
    generation = whole(Store(tmp_path))
    logits, names = generation.all_logits, generation.basis.coordinates(unit(1, len(NAMES))).astype(float)
    stored = matched_heads.offsets(logits.coordinates.astype(float), names, generation.sharpness)
    given = np.concatenate([batch.directions for batch in batches(BASE) if batch.model[0] != 2])
    exact = matched_heads.offsets(generation.basis.coordinates(given), names, generation.sharpness)
    assert np.abs(exact - stored).max() > 1e-4
    np.testing.assert_allclose(logits.offsets, stored, atol=1e-6)


def test_an_index_without_logits_is_not_large(tmp_path: Path) -> None:
    directions = np.random.default_rng(0).standard_normal((9, 4))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    writer = GenerationWriter(Store(tmp_path), "empty")
    written = write_tables(
        writer,
        [],
        model_facts([]),
        RowEncoder.fit(directions, Background(directions[:5], 3.0), 3),
        exact_logits=0,
    )
    assert (written.logits, written.rows, written.settings["large"]) == (0, 0, False)
    assert "sample" not in written.meta


def test_from_so_many_logits_on_an_index_is_large(tmp_path: Path) -> None:
    models = [Model(f"a/{number}", ("x", "y")) for number in range(5)]
    for exact, large in ((11, False), (10, True)):
        store = Store(tmp_path / str(exact))
        built = build(store, models=models, images=False, exact_logits=exact)
        generation = Generation(store, built.pointer)
        assert (generation.size, generation.large) == (10, large)
        if large:
            assert sorted(generation.sample.rows.tolist()) == list(range(10))

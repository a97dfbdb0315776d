"""Directions in bytes, and the vectors of the shortlist: what they keep of a score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probelog.index.arrow import structured
from probelog.index.basis import BYTES, PRECISE, Basis
from probelog.index.schema import MODEL_FACTS, logit_facts
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.rows import LogitBatch, RowEncoder, same_weights, write_tables
from probelog.ranking import matched_heads
from probelog.ranking.matched_heads import Background
from probelog.storage.store import Store


def unit(seed: int, count: int, dimension: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dimension))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.integers(2, 100))
def test_directions_keep_their_length_and_nearly_their_place(seed: int, count: int, dimension: int) -> None:
    rows = unit(seed, count, dimension)
    basis = Basis.fit(rows, Background(unit(seed + 1, 5, dimension), 3.0))
    coordinates = basis.decode(basis.encode(rows))
    np.testing.assert_allclose(np.linalg.norm(coordinates, axis=1), 1, atol=1e-5)
    assert np.abs(basis.directions(coordinates) - rows).max() < 0.02
    np.testing.assert_allclose(
        basis.coordinates(rows) @ basis.coordinates(rows[0]), rows @ rows[0], atol=1e-5
    )


def test_a_direction_of_zeros_and_none_at_all() -> None:
    basis = Basis.fit(np.zeros((3, 4)), Background(np.zeros((0, 4)), 3.0))
    assert not basis.decode(basis.encode(np.zeros((1, 4)))).any()
    assert basis.decode(basis.encode(np.zeros((0, 4)))).shape == (0, 4)


def test_the_first_axes_are_those_along_which_logits_and_queries_differ() -> None:
    """What all have in common says nothing, and a few queries count as much as many logits."""
    random, common = np.random.default_rng(3), 5 * np.eye(6)[5]
    gallery = common + random.normal(size=(400, 6)) * [0.8, 0.5, 0, 0, 0, 0]
    queries = common + random.normal(size=(40, 6)) * [0, 0, 0.01, 0, 0, 0]
    basis = Basis.fit(gallery, Background(queries, 3.0))
    assert np.abs(basis.axes[:3]).argmax(axis=1).tolist() == [2, 0, 1]
    np.testing.assert_allclose(basis.centre, gallery.mean(axis=0), atol=1e-5)
    assert basis.middle == pytest.approx(Background(queries, 3.0).offsets(gallery).mean())


def test_a_basis_is_read_as_it_was_stored() -> None:
    basis = Basis.fit(unit(0, 30, 9), Background(unit(1, 5, 9), 3.0))
    read = Basis.from_array(basis.array(), basis.middle, basis.sharpness)
    np.testing.assert_array_equal(read.axes, basis.axes)
    np.testing.assert_array_equal(read.centre, basis.centre)
    assert (read.middle, read.sharpness) == (basis.middle, 3.0)


def kindred(seed: int, count: int, dimension: int) -> np.ndarray:
    """Unit vectors whose spectrum falls as that of real logits' directions does."""
    spectrum = np.arange(1, dimension + 1) ** -1.5
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(dimension, dimension)))[0]
    rows = np.random.default_rng(seed).normal(size=(count, dimension)) * spectrum @ turned
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("dimension", [24, 512, 768])
def test_scores_of_stored_directions_are_right_to_a_hundredth(dimension: int) -> None:
    gallery = kindred(1, 2000, dimension)
    background = Background(kindred(2, 200, dimension), 9.0)
    basis = Basis.fit(gallery[:1000], background)
    stored = basis.encode(gallery)
    assert sum(values[0].nbytes for values in stored) <= BYTES
    found, asked = basis.decode(stored), basis.coordinates(background.directions)
    scores = [
        9.0 * rows @ queries.T - matched_heads.offsets(rows, queries, 9.0)[:, None]
        for rows, queries in ((gallery, background.directions), (found, asked))
    ]
    assert np.abs(scores[0] - scores[1]).max() < 0.01


def test_a_shortlists_products_rank_as_scores_do() -> None:
    """With all dimensions kept the inner product is the score, up to a constant and the scale."""
    dimension, b = 20, 8.0
    gallery, query = unit(0, 500, dimension), unit(1, 1, dimension)[0]
    background = Background(unit(2, 30, dimension), b)
    offsets = background.offsets(gallery)
    learnt = Basis.fit(gallery, background)
    basis = Basis.from_array(learnt.array(), learnt.middle, b)
    vectors = basis.vectors(basis.coordinates(gallery), offsets)
    products = vectors.astype(float) @ basis.query(basis.coordinates(query))
    scores = b * gallery @ query - offsets
    assert vectors.shape[1] == basis.width == 24
    np.testing.assert_allclose(b * (products - products.mean()), scores - scores.mean(), atol=0.03)
    assert Basis.fit(unit(0, 500, 300), Background(unit(2, 30, 300), b)).width == PRECISE + 1


def test_the_first_model_stands_for_its_weights() -> None:
    assert same_weights(["a", None, "b", "a", None, "", "b"]).tolist() == [0, 1, 2, 0, 4, 5, 2]


SAMPLE = unit(9, 20, 8)


def facts(digests: list[str | None]) -> pa.Table:
    count = len(digests)
    columns = {field.name: pa.nulls(count, field.type) for field in MODEL_FACTS if field.name != "copies"}
    return pa.table({**columns, "weight_digest": pa.array(digests, pa.string())})


def batch(models: list[int], first: int = 0) -> LogitBatch:
    count = len(models)
    directions = unit(first, count, 8)
    return LogitBatch(
        np.array(models), np.arange(count), np.zeros(count, bool), directions, np.zeros((count, 3), int)
    )


def test_weights_are_written_once_however_they_are_batched(tmp_path: Path) -> None:
    writer = GenerationWriter(Store(tmp_path), "a")
    background = Background(unit(5, 4, 8), 3.0)
    batches = [batch([1, 1, 2]), batch([2, 3]), batch([3, 4])]
    written = write_tables(
        writer, batches, facts(["x", "x", "y", "x", None]), RowEncoder.fit(SAMPLE, background, 3)
    )
    assert (written.rows, written.logits) == (5, 2 + 2 + 2 + 2 + 1)
    kind = logit_facts(Basis.fit(SAMPLE, background), 3)
    logits = structured(writer.open("logits").to_arrow()["facts"], kind)
    assert logits["row"].tolist() == [0, 1, 2, 3, 4]
    assert logits["weights"].tolist() == [0, 0, 2, 2, 4]
    models = writer.open("models").to_arrow().select(["weights", "first_row", "rows", "copies"]).to_pydict()
    assert models == {
        "weights": [0, 0, 2, 0, 4],
        "first_row": [0, 0, 2, 0, 4],
        "rows": [2, 2, 2, 2, 1],
        "copies": [3, 3, 1, 3, 1],
    }


def test_a_models_logits_follow_each_other(tmp_path: Path) -> None:
    writer = GenerationWriter(Store(tmp_path), "a")
    batches = [batch([0, 1]), batch([0])]
    with pytest.raises(ValueError, match="logits of model 0 do not follow each other"):
        write_tables(
            writer, batches, facts([None, None]), RowEncoder.fit(SAMPLE, Background(unit(5, 4, 8), 3.0), 3)
        )

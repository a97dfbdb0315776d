"""Directions in bytes, and the vectors of the shortlist: what they keep of a score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probelog import matching, shortlist
from probelog.directions import quantised
from probelog.index import MODEL_FACTS, GenerationWriter
from probelog.index_writer import LogitBatch, same_weights, write_tables
from probelog.matching import Background
from probelog.shortlist import Projection
from probelog.storage import Store


def unit(seed: int, count: int, dimension: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dimension))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.integers(2, 100))
def test_directions_keep_their_length_and_nearly_their_place(seed: int, count: int, dimension: int) -> None:
    rows = unit(seed, count, dimension)
    found = quantised(rows).decoded()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert (np.abs(found - rows) <= np.abs(rows).max(axis=1, keepdims=True) / 127).all()


def test_a_direction_of_zeros_and_none_at_all() -> None:
    assert not quantised(np.zeros((1, 4))).decoded().any()
    assert quantised(np.zeros((0, 4))).decoded().shape == (0, 4)


def test_scores_of_stored_directions_are_right_to_a_hundredth() -> None:
    gallery, background, b = unit(0, 2000, 512), unit(1, 200, 512), 6.0
    stored = quantised(gallery).decoded()
    exact, found = (
        b * rows @ background.T - matching.offsets(rows, background, b)[:, None] for rows in (gallery, stored)
    )
    assert np.abs(exact - found).max() < 0.02
    assert (exact - found).std() < 0.005


def test_a_shortlists_products_rank_as_scores_do() -> None:
    """With all dimensions kept the inner product is the score, up to a constant and the scale."""
    dimension = 20
    gallery, query, b = unit(0, 500, dimension), unit(1, 1, dimension)[0], 8.0
    offsets = np.random.default_rng(2).normal(size=500)
    projection = Projection.learnt(gallery, offsets, b)
    again = Projection.from_arrays(projection.arrays(), projection.middle, b)
    products = again.of_logits(gallery, offsets).astype(float) @ again.of_query(query)
    scores = b * gallery @ query - offsets
    assert projection.width % 8 == 0
    np.testing.assert_allclose(b * (products - products.mean()), scores - scores.mean(), atol=0.03)
    wide = Projection.learnt(unit(0, 500, 300), offsets, b)
    assert wide.width == shortlist.WIDTH


def test_the_first_model_stands_for_its_weights() -> None:
    assert same_weights(["a", None, "b", "a", None, "", "b"]).tolist() == [0, 1, 2, 0, 4, 5, 2]


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
    written = write_tables(writer, batches, facts(["x", "x", "y", "x", None]), background, 3)
    assert (written.rows, written.logits) == (5, 2 + 2 + 2 + 2 + 1)
    logits = writer.open("logits").to_arrow()
    assert logits["id"].to_pylist() == [0, 1, 2, 3, 4]
    assert logits["weights"].to_pylist() == [0, 0, 2, 2, 4]
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
    with pytest.raises(RuntimeError, match="logits of model 0 do not follow each other"):
        write_tables(writer, batches, facts([None, None]), Background(unit(5, 4, 8), 3.0), 3)

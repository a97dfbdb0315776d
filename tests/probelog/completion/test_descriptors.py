"""Descriptors of models that are folded in, without Ray: compact, and precise enough for the search."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from probelog.completion.als import Float32, complete_rows, fold_in, initial_columns
from probelog.completion.descriptors import describe
from probelog.completion.scoring import standardise, top_pairs
from probelog.ranking.matched_heads import HeadSpace, Observed
from probelog.storage.parquet_parts import part_bytes
from probelog.storage.schemas import DESCRIPTORS, Head
from probelog.storage.versions import check_schema
from tests.probelog.storage.test_ledger import model

PROBES, DIMENSION, TOP = 200, 16, 10
LAM = 0.05


def world(head: Head, logits: int) -> tuple[list, Float32, HeadSpace]:
    rng = np.random.default_rng(3)
    embeddings = rng.standard_normal((PROBES, DIMENSION))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    seen = np.sort(rng.choice(PROBES, 60, replace=False))
    values = rng.standard_normal((logits, 4)) @ rng.standard_normal((4, 60)) * 3 + 1
    facts = dataclasses.replace(
        model("a/b", logits=logits), head=head, probes=seen.tolist(), labels=[""] * logits
    )
    observed = [(facts, np.arange(logits, dtype=np.int32), values.astype(np.float32))]
    return observed, initial_columns(PROBES, 4, seed=0), HeadSpace(embeddings, embeddings[:0])


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    return np.stack(column.to_numpy()).astype(float)


@pytest.mark.parametrize("head", [Head.SOFTMAX, Head.SIGMOID, Head.SINGLE])
def test_they_are_what_the_formulas_say(head: Head) -> None:
    observed, columns, space = world(head, 1 if head == Head.SINGLE else 7)
    (table,) = describe(observed, columns, space, LAM, TOP)
    ((facts, _, values),) = observed
    probes = np.asarray(facts.probes, np.int32)
    folded = fold_in(probes, values, columns, LAM)
    z = standardise(complete_rows(folded.block, folded.factors, columns))
    top = top_pairs(z, TOP)
    np.testing.assert_array_equal(matrix(table["top_probes"]), top.probes)
    np.testing.assert_allclose(matrix(table["top_values"]), top.values, rtol=1e-3)
    np.testing.assert_allclose(matrix(table["factor"]), folded.factors, rtol=1e-3, atol=1e-6)
    expected = space.of_model(Observed(head, probes, values))
    found = matrix(table["direction"])
    cosines = (found * expected).sum(axis=1)
    np.testing.assert_allclose(cosines, 1, atol=5e-4)
    if head == Head.SINGLE:
        lowest = top_pairs(-z, TOP)
        np.testing.assert_array_equal(matrix(table["bottom_probes"]), lowest.probes)
        np.testing.assert_allclose(matrix(table["bottom_values"]), -lowest.values, rtol=1e-3)
        opposite = space.of_model(Observed(head, probes, -values))
        np.testing.assert_allclose(matrix(table["opposite_direction"]), opposite, atol=1e-3)
    else:
        for name in ("bottom_probes", "bottom_values", "opposite_direction"):
            assert table[name].null_count == table.num_rows


def test_constant_logits_have_none() -> None:
    observed, columns, space = world(Head.SOFTMAX, 3)
    observed[0][2][1] = 5.0
    (table,) = describe(observed, columns, space, LAM, TOP)
    assert table["logit"].to_pylist() == [0, 2]
    observed[0][2][:] = 5.0
    assert describe(observed, columns, space, LAM, TOP) == []


def test_pieces_of_a_large_head_are_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    observed, columns, space = world(Head.SOFTMAX, 23)
    (whole,) = describe(observed, columns, space, LAM, TOP)
    monkeypatch.setattr("probelog.completion.descriptors._AT_ONCE", 5 * PROBES)
    (pieces,) = describe(observed, columns, space, LAM, TOP)
    assert pieces["top_probes"] == whole["top_probes"]
    assert pieces["direction"] == whole["direction"]
    np.testing.assert_allclose(pieces["z_std"].to_numpy(), whole["z_std"].to_numpy(), rtol=1e-6)


def test_a_part_of_descriptors_is_small_and_readable() -> None:
    observed, columns, space = world(Head.SOFTMAX, 500)
    data = part_bytes(describe(observed, columns, space, LAM, TOP), DESCRIPTORS)
    table = pq.read_table(pa.BufferReader(data))
    check_schema(table.schema, DESCRIPTORS, "here")
    least = 2 * (DIMENSION + 4 + TOP) + 1.2 * TOP + 16
    assert len(data) / 500 < 1.4 * least

"""What a model's process says of its tensors."""

from __future__ import annotations

from typing import Any

import pytest

from probelog.sandbox import answers
from probelog.sandbox.checks import AnswerError
from probelog.weights.reader import LayerFacts


def rows(*layers: list[Any]) -> list[dict[str, Any]]:
    said = list(layers)
    table = answers.weights("a/b", "0" * 40, said, b"")
    return list(table.to_pylist())


def test_a_counter_comes_through_as_it_is() -> None:
    said, sketches = answers.layers_to_json([LayerFacts("bn.num_batches_tracked", "int64", (), 1563.0)])
    (row,) = rows(*said)
    assert (row["mean"], row["std"], sketches) == (1563.0, None, b"")


@pytest.mark.parametrize(
    ("shape", "mean"), [([2], 3.0), ([], 0.5), ([], 1e20), ([], float("nan")), ([], "3"), ([0], 1.0)]
)
def test_whole_numbers_have_no_other_means(shape: list[int], mean: object) -> None:
    with pytest.raises(AnswerError, match=r"mean of whole numbers|statistics"):
        rows(["position_ids", "int64", shape, mean, None, None, False])

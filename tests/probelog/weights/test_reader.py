"""Facts of tensors that are no matrices of weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from probelog.weights.reader import Weights, layer_table
from probelog.weights.safetensors import WEIGHTS


def test_a_single_whole_number_is_kept_as_its_mean(tmp_path: Path) -> None:
    numbers = {
        "bn.num_batches_tracked": np.array(2**24 - 1, np.int64),
        "one_entry": np.array([-7], np.int32),
        "unsigned": np.array([[200]], np.uint8),
        "several": np.array([3, 4], np.int64),
        "truth": np.array(True),
        "scale": np.array(0.5, np.float32),
    }
    save_file(numbers, tmp_path / WEIGHTS)
    _, facts = Weights(tmp_path).read()
    rows = layer_table("a/b", "0" * 40, facts.layers).to_pylist()
    assert {row["tensor"]: (row["mean"], row["std"], row["kurtosis"], row["sketch"]) for row in rows} == {
        "bn.num_batches_tracked": (2**24 - 1, None, None, None),
        "one_entry": (-7, None, None, None),
        "unsigned": (200, None, None, None),
        "several": (None, None, None, None),
        "truth": (None, None, None, None),
        "scale": (0.5, 0, None, None),
    }


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.uint32, np.uint64])
def test_every_type_of_whole_numbers_has_its_value(tmp_path: Path, dtype: type) -> None:
    save_file({"counter": np.array(5, dtype)}, tmp_path / WEIGHTS)
    _, facts = Weights(tmp_path).read()
    assert [layer.mean for layer in facts.layers] == [5]

"""Which numbers of large weights are read, and the facts that these give."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from probelog.errors import FailureReason, ItemFailure
from probelog.weights import blocks
from probelog.weights.blocks import (
    LONGEST,
    SHORTEST,
    STRATA,
    Run,
    block_runs,
    blocks_of,
    chosen_tensors,
    facts_of_blocks,
    joined,
)
from probelog.weights.safetensors import ITEM_SIZES, TensorInfo
from probelog.weights.sketch import BLOCK, Summary, sketch_of_blocks

RANDOM = np.random.default_rng(0)


def info(name: str, shape: tuple[int, ...], dtype: str = "F32") -> TensorInfo:
    return TensorInfo(name, dtype, shape, 1000, 1000 + math.prod(shape) * ITEM_SIZES[dtype])


def facts(tensor: TensorInfo, values: np.ndarray) -> blocks.LayerFacts:
    data = values.tobytes()
    begin = tensor.begin
    parts = {block: data[run.begin - begin : run.end - begin] for block, run in block_runs(tensor).items()}
    return facts_of_blocks(tensor, parts)[0]


@pytest.mark.parametrize("elements", [0, 1, 8192, 8193, 70_000, 10**6, 5 * 10**7, 2**36])
def test_blocks_lie_apart_inside_the_tensor(elements: int) -> None:
    found = blocks_of((elements,))
    assert all(0 <= start < end <= elements for start, end in found)
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(found))
    length = sum(end - start for start, end in found)
    if elements <= STRATA * SHORTEST:
        assert length == elements
    else:
        assert STRATA * SHORTEST <= length <= STRATA * LONGEST
        assert length <= max(elements / 32, STRATA * SHORTEST)


def test_positions_depend_on_the_shape_alone() -> None:
    """Kept as they were first, for ever: facts in stores were read there."""
    assert blocks_of((1000, 1000)) == blocks_of((1000, 1000)) != blocks_of((10**6,))
    assert blocks_of((1000, 1000)) == [(292351, 307976), (558103, 573728)]
    bytes_of = {dtype: block_runs(info("a", (1000, 1000), dtype)) for dtype in ("F32", "BF16")}
    assert bytes_of["F32"].keys() == bytes_of["BF16"].keys()


@pytest.mark.parametrize("shape", [(3, 5), (64, 128)])
def test_a_small_tensor_has_the_facts_of_the_probing_pass(shape: tuple[int, ...]) -> None:
    values = RANDOM.normal(size=shape).astype(np.float32)
    summary = Summary()
    summary.begin(sketched=True)
    summary.add(torch.from_numpy(values.reshape(-1)))
    moments, sketch = summary.finish()
    found = facts(info("a", shape), values)
    assert found.sketch == pytest.approx(sketch, rel=1e-5, abs=1e-6)
    assert (found.mean, found.std) == pytest.approx((moments.mean, moments.std), rel=1e-5)
    assert found.kurtosis == pytest.approx(moments.kurtosis, rel=1e-4)


def test_blocks_of_a_whole_tensor_give_its_sketch() -> None:
    """Wherever they are cut, over the ends of the sketch's rows too."""
    values = RANDOM.normal(size=2 * BLOCK + 500).astype(np.float32)
    summary = Summary()
    summary.begin(sketched=True)
    for piece in torch.split(torch.from_numpy(values), BLOCK):
        summary.add(piece)
    whole = summary.finish()[1]
    cuts = [0, 7, BLOCK - 1, BLOCK + 3, len(values)]
    parts = [(a, values[a:b]) for a, b in itertools.pairwise(cuts)]
    assert sketch_of_blocks(parts, len(values)) == pytest.approx(whole, rel=1e-4, abs=1e-3)


def test_distances_from_blocks_are_those_of_whole_tensors() -> None:
    """Twenty layers: the mean of their ratios, of a child that is near and of a stranger."""
    # Of its own: what this finds must not depend on which tests ran before it.
    random = np.random.default_rng(11)
    shape = (300, 400)
    near, far = [], []
    for layer in range(20):
        tensor = info(f"layer.{layer}", shape)
        parent = random.normal(size=shape).astype(np.float32)
        child = parent + 0.1 * random.normal(size=shape).astype(np.float32)
        other = random.normal(size=shape).astype(np.float32)
        p, c, o = (facts(tensor, values).sketch for values in (parent, child, other))
        assert p is not None
        assert c is not None
        assert o is not None
        near.append(((p - c) ** 2).sum() / ((p**2).sum() + (c**2).sum()))
        far.append(((p - o) ** 2).sum() / ((p**2).sum() + (o**2).sum()))
    assert np.mean(near) == pytest.approx(0.01 / 2.01, rel=0.25)
    assert np.mean(far) == pytest.approx(1, rel=0.2)


def test_sketches_subtract() -> None:
    shape = (200, 200)
    tensor = info("a", shape)
    one, two = (RANDOM.normal(size=shape).astype(np.float32) for _ in range(2))
    difference = facts(tensor, one - two).sketch
    sketches = [facts(tensor, values).sketch for values in (one, two)]
    assert sketches[0] is not None
    assert sketches[1] is not None
    assert sketches[0] - sketches[1] == pytest.approx(difference, rel=1e-3, abs=1e-2)


@pytest.mark.parametrize("dtype", ["F64", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_other_types_are_read_at_the_same_places(dtype: str) -> None:
    shape = (100, 200)
    values = torch.from_numpy(RANDOM.normal(size=shape).astype(np.float32))
    kept = values.to(getattr(torch, blocks.TORCH_NAMES[dtype]))
    data = kept.view(torch.uint8).numpy()
    exact = facts(info("a", shape), kept.float().numpy())
    found = facts(info("a", shape, dtype), data)
    assert replace(found, dtype="float32") == exact
    assert found.sketch == pytest.approx(exact.sketch)


def test_counters_have_their_value_and_other_whole_numbers_nothing() -> None:
    assert facts(info("n", (), "I64"), np.array(1563, np.int64)).mean == 1563
    assert [tensor.name for tensor in chosen_tensors([info("ids", (512,), "I64")], 10**6)] == []
    layer, moments = facts_of_blocks(info("a", (9, 9)), {})
    assert (layer.mean, layer.sketch, moments.count) == (None, None, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_must_be_finite(value: float) -> None:
    with pytest.raises(ItemFailure, match=FailureReason.NON_FINITE):
        facts(info("a", (2, 2)), np.array([[0, 1], [value, 2]], np.float32))


def test_zeros_and_the_ends_of_float32_have_facts() -> None:
    assert facts(info("a", (90, 100)), np.zeros((90, 100), np.float32)).sketch == pytest.approx(np.zeros(32))
    huge = np.full((90, 100), 3e38, np.float32)
    assert facts(info("a", (90, 100)), huge).sketch is None


def test_fewer_tensors_are_read_of_a_model_that_has_too_many() -> None:
    model = [info(f"layers.{layer}.weight", (1000, 1000)) for layer in range(60)]
    model += [info(f"layers.{layer}.bias", (1000,)) for layer in range(60)]
    assert len(chosen_tensors(model, 10**8)) == 120
    some = chosen_tensors(model, 3_000_000)
    assert 60 < len(some) < 100
    assert sum(4 * (end - start) for tensor in some for start, end in blocks_of(tensor.shape)) < 3_000_000
    # Another head and another type: the same tensors, as far as they have them.
    other = [replace(tensor, dtype="BF16") for tensor in model[:-1]] + [info("head.weight", (1000, 7))]
    assert {tensor.name for tensor in chosen_tensors(other, 3_000_000)} - {"head.weight"} == {
        tensor.name for tensor in some
    } - {model[-1].name}
    many = [info(f"a.{number}", (10, 10)) for number in range(5000)]
    assert 0 < len(chosen_tensors(many, 10**9)) <= blocks.MOST_MATRICES
    assert chosen_tensors(model, 1) == []


def test_a_tensor_that_no_model_has_costs_nothing() -> None:
    with pytest.raises(ItemFailure, match=FailureReason.TOO_LARGE):
        chosen_tensors([info("a", (1 << 40, 1))], 10**9)


def test_neighbours_share_a_request() -> None:
    runs = [Run(50, 60), Run(0, 10), Run(10, 20), Run(25, 30)]
    assert joined(runs, 0) == [Run(0, 20), Run(25, 30), Run(50, 60)]
    assert joined(runs, 5) == [Run(0, 30), Run(50, 60)]
    assert joined([], 5) == []

"""Which numbers of large weights to read, and the facts of tensors of which only these are known.

Of every tensor the same positions are read wherever its shape is the same, so that sketches of two models subtract
(`probelog.weights.sketch.sketch_of_blocks`). Nothing about a tensor's blocks depends on its model or its type: a child
with a larger vocabulary, or in another type, is read at the same places. A small tensor is read whole; its facts are
those that the probing pass stores.

A larger tensor is cut into equal strata, with one block at a hashed position in each. From the blocks the mean square
of a difference is estimated; its error is that of sampling (numbers that lie side by side in a matrix change alike) on
top of the sketch's own, and falls with the number of tensors as that does.

A model with too many tensors for its bytes keeps those whose names hash below a share, a half, a quarter and so on:
two models of one family keep the same ones.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probelog.errors import FailureReason, ItemFailure
from probelog.weights.reader import TORCH_NAMES, WHOLE_NUMBERS, LayerFacts, as_tensor
from probelog.weights.safetensors import ITEM_SIZES, TensorInfo
from probelog.weights.sketch import WeightMoments, exact_moments, sketch_of_blocks

#: Part of what positions are hashed from: facts of different versions must not be compared.
VERSION = 1

#: Strata of a tensor, and numbers of a block: a part of the tensor, between two bounds.
STRATA = 2
SHORTEST, LONGEST, _PART = 4096, 16_384, 64

#: Matrices, and vectors and counters, that are read of a model; each costs a request or two.
MOST_MATRICES = MOST_VECTORS = 512

# Numbers of a tensor; signs are made for all rows of a sketch before the last one that is read.
_MOST_ELEMENTS = 1 << 36

# What a number counts for when it is budgeted, or its size where that is more: models in two types keep the same tensors.
_COUNTED_BYTES = 4
_VECTORS_SHARE = 0.125

Block = tuple[int, int]
"""First number of a flat tensor, and the number behind the last."""


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of a file that are read at once."""

    begin: int
    end: int


def blocks_of(shape: Sequence[int]) -> list[Block]:
    """Which numbers are read of a tensor."""
    elements = math.prod(shape)
    if elements <= STRATA * SHORTEST:
        return [(0, elements)] if elements else []
    length = min(max(elements // _PART, SHORTEST), LONGEST)
    blocks = []
    for stratum in range(STRATA):
        first, last = elements * stratum // STRATA, elements * (stratum + 1) // STRATA
        start = first + int(_fraction("block", stratum, *shape) * (last - first - length + 1))
        blocks.append((start, start + length))
    return blocks


def chosen_tensors(tensors: Iterable[TensorInfo], most_bytes: int) -> list[TensorInfo]:
    """The tensors of a model that are read, so that their blocks come to ``most_bytes`` with four bytes a number or more.

    Raises:
        ItemFailure: TOO_LARGE for a tensor of a size that no model has.
    """
    tensors = list(tensors)
    if largest := next((tensor for tensor in tensors if tensor.elements > _MOST_ELEMENTS), None):
        raise ItemFailure(
            FailureReason.TOO_LARGE, f"tensor {largest.name[:100]!r} has {largest.elements} numbers"
        )
    read = [tensor for tensor in tensors if _is_float(tensor) or is_counter(tensor)]
    matrices = [tensor for tensor in read if len(tensor.shape) > 1]
    vectors = [tensor for tensor in read if len(tensor.shape) <= 1]
    return [
        *_within(vectors, MOST_VECTORS, int(most_bytes * _VECTORS_SHARE)),
        *_within(matrices, MOST_MATRICES, int(most_bytes * (1 - _VECTORS_SHARE))),
    ]


def whole_layers(tensors: Iterable[TensorInfo], most_bytes: int) -> list[TensorInfo]:
    """Some matrices of a model, none larger than a quarter of the bytes; of two models that have them the same ones."""
    small = [tensor for tensor in tensors if _is_float(tensor) and len(tensor.shape) > 1]
    small = [tensor for tensor in small if 4 * _whole_cost(tensor) <= most_bytes]
    chosen, left = [], most_bytes
    for tensor in sorted(small, key=lambda tensor: _fraction("tensor", tensor.name, *tensor.shape)):
        left -= _whole_cost(tensor)
        if left < 0:
            break
        chosen.append(tensor)
    return chosen


def _whole_cost(tensor: TensorInfo) -> int:
    return max(_COUNTED_BYTES, ITEM_SIZES[tensor.dtype]) * tensor.elements


def numbers_of(tensor: TensorInfo, data: bytes) -> npt.NDArray[np.float32]:
    """Some numbers of a floating-point tensor, flat."""
    numbers: npt.NDArray[np.float32] = as_tensor(_writable(data), tensor.dtype).float().numpy()
    return numbers


def _within(tensors: Sequence[TensorInfo], most: int, most_bytes: int) -> list[TensorInfo]:
    kept = [(_fraction("tensor", tensor.name, *tensor.shape), _cost(tensor), tensor) for tensor in tensors]
    share = 1.0
    while len(kept) > most or sum(cost for _, cost, _ in kept) > most_bytes:
        share /= 2
        kept = [entry for entry in kept if entry[0] < share]
    return [tensor for *_, tensor in kept]


def _cost(tensor: TensorInfo) -> int:
    numbers = sum(end - start for start, end in blocks_of(tensor.shape))
    return max(_COUNTED_BYTES, ITEM_SIZES[tensor.dtype]) * numbers


def block_runs(tensor: TensorInfo) -> dict[Block, Run]:
    """The bytes of each of a tensor's blocks in its file."""
    size = ITEM_SIZES[tensor.dtype]
    return {
        (start, end): Run(tensor.begin + start * size, tensor.begin + end * size)
        for start, end in blocks_of(tensor.shape)
    }


def joined(runs: Iterable[Run], gap: int) -> list[Run]:
    """Runs of one file in its order; neighbours with at most ``gap`` bytes between them are one."""
    result: list[Run] = []
    for run in sorted(runs, key=lambda run: run.begin):
        if result and run.begin - result[-1].end <= gap:
            result[-1] = Run(result[-1].begin, max(result[-1].end, run.end))
        else:
            result.append(run)
    return result


def facts_of_blocks(tensor: TensorInfo, blocks: Mapping[Block, bytes]) -> tuple[LayerFacts, WeightMoments]:
    """The facts of a tensor by what was read of it, and the moments of these numbers.

    Raises:
        ItemFailure: NON_FINITE where a number is NaN or infinite.
    """
    dtype = TORCH_NAMES[tensor.dtype]
    if not _is_float(tensor) or not blocks:
        value = None
        if is_counter(tensor) and blocks:
            value = float(as_tensor(_writable(next(iter(blocks.values()))), tensor.dtype).item())
        return LayerFacts(tensor.name, dtype, tensor.shape, value), WeightMoments()
    values = {block: numbers_of(tensor, data) for block, data in blocks.items()}
    moments = WeightMoments()
    for numbers in values.values():
        moments = moments.merged(exact_moments(numbers))
    if not moments.finite:
        raise ItemFailure(
            FailureReason.NON_FINITE, f"tensor {tensor.name[:100]!r} holds NaN or infinite numbers"
        )
    sketch = None
    if len(tensor.shape) > 1:
        sketch = sketch_of_blocks(
            ((start, numbers) for (start, _), numbers in values.items()), tensor.elements
        )
    return (
        LayerFacts(tensor.name, dtype, tensor.shape, moments.mean, moments.std, moments.kurtosis, sketch),
        moments,
    )


def is_counter(tensor: TensorInfo) -> bool:
    """Whether it is a single whole number."""
    return TORCH_NAMES[tensor.dtype].startswith(WHOLE_NUMBERS) and tensor.elements == 1


def _is_float(tensor: TensorInfo) -> bool:
    return tensor.dtype.startswith(("F", "BF")) and tensor.elements > 0


def _writable(data: bytes) -> npt.NDArray[np.uint8]:
    # Its own memory, since torch warns of memory that it must not write to, and takes only what is aligned.
    return np.frombuffer(data, np.uint8).copy()


def _fraction(*what: object) -> float:
    """A number in [0, 1) that depends on nothing but the arguments."""
    text = " ".join(map(str, (f"probelog blocks {VERSION}", *what)))
    return int.from_bytes(hashlib.shake_256(text.encode()).digest(6), "big") / 2**48

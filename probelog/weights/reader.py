"""The weights of one model: known by their headers first, then read once.

While a piece of them is in the processor's cache, everything is done that looks at it: the digest, the check for NaN
and infinities, the moments of its tensor and, of matrices, the sketch (see `probelog.weights.sketch`).
"""

from __future__ import annotations

import heapq
import math
import pickle
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.errors import FailureReason, ItemFailure
from probelog.storage.schemas import WEIGHTS, clean_unicode
from probelog.weights.repository import member
from probelog.weights.safetensors import ITEM_SIZES, ContentDigest, read_headers, read_into, weight_files
from probelog.weights.safetensors import WEIGHTS as WEIGHT_FILE
from probelog.weights.sketch import BLOCK, Summary, WeightMoments

if TYPE_CHECKING:
    import torch

PICKLED_WEIGHTS = "pytorch_model.bin"

#: Facts are kept of so many tensors of a model, its largest; no architecture of the libraries comes near.
MAX_LAYERS = 5000
_MAX_NAME_CHARACTERS = 300

#: More are refused: a header can announce 200,000, and each costs some calls even where it holds a single number.
MAX_TENSORS = 50_000

#: How the names of such types begin.
WHOLE_NUMBERS = ("int", "uint")

# What torch aligns its own memory to; kernels may add up in another order where it is not.
_ALIGNMENT = 64

#: Types of safetensors as torch calls them.
TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One tensor of the weights: ``dtype`` as stored, statistics of its numbers as float32.

    ``mean``, ``std`` and ``kurtosis`` (Pearson's, 3 for a normal distribution) are None for whole numbers and
    booleans and for an empty tensor, ``kurtosis`` also where all numbers are equal. A single whole number is its own
    ``mean`` (float32 holds it exactly up to 2^24): counters such as ``num_batches_tracked`` tell a parent from its child.
    ``sketch``, (32,) float32, is there for floating-point tensors of two dimensions or more, flattened as (out, rest).
    """

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    mean: float | None = None
    std: float | None = None
    kurtosis: float | None = None
    sketch: npt.NDArray[np.float32] | None = field(default=None, repr=False, compare=False)


def layer_table(repo: str, sha: str, layers: Sequence[LayerFacts]) -> pa.Table:
    """Layers of one model as rows of the ``WEIGHTS`` schema. Names are untrusted: cut to 300 characters."""
    return pa.table(
        {
            "repo": [clean_unicode(repo)] * len(layers),
            "sha": [clean_unicode(sha)] * len(layers),
            "tensor": [clean_unicode(layer.tensor[:_MAX_NAME_CHARACTERS]) for layer in layers],
            "dtype": [layer.dtype for layer in layers],
            "shape": [list(layer.shape) for layer in layers],
            "mean": [layer.mean for layer in layers],
            "std": [layer.std for layer in layers],
            "kurtosis": [layer.kurtosis for layer in layers],
            "sketch": [layer.sketch for layer in layers],
        },
        schema=WEIGHTS,
    )


def largest_layers(layers: Iterable[LayerFacts]) -> list[LayerFacts]:
    """The largest ``MAX_LAYERS``, in order of name."""
    largest = heapq.nlargest(MAX_LAYERS, layers, key=lambda layer: math.prod(layer.shape))
    return sorted(largest, key=lambda layer: layer.tensor)


@dataclass(frozen=True, slots=True)
class WeightFacts:
    """What was learnt while the weights were read.

    ``mean`` and ``std`` are over all floating-point numbers; ``dtype`` is the one most of them are stored in.
    ``layers`` are the tensors in order of name, the largest ``MAX_LAYERS`` where there are more. ``seconds`` is
    what reading took, ``seconds_sketch`` the part of it for statistics and sketches.
    """

    digest: str
    mean: float
    std: float
    dtype: str
    layers: list[LayerFacts] = field(repr=False)
    seconds: float
    seconds_sketch: float


class Weights:
    """The weights of a repository, not yet read.

    ``shapes`` gives every tensor's shape by name. Cheap to make: only headers are read (for a pickle: the
    restricted unpickler runs, and storages stay on disk).

    Raises:
        ItemFailure: as `probelog.weights.safetensors.weight_files` and ``read_header``; TOO_LARGE for more than
            ``MAX_TENSORS`` tensors.
    """

    def __init__(
        self,
        folder: Path,
        *,
        allow_pickle: bool = False,
        name: str = WEIGHT_FILE,
        pickled: str = PICKLED_WEIGHTS,
    ) -> None:
        """``name`` and ``pickled``: what the files are called."""
        self._pickled: dict[str, torch.Tensor] = {}
        self._files: list[Path] = []
        try:
            self._files = weight_files(folder, name)
        except ItemFailure as failure:
            path = member(folder, pickled) if allow_pickle else None
            if failure.reason is not FailureReason.UNSAFE_FORMAT or path is None:
                raise
            self._pickled = _unpickle(path)
            self.shapes: Mapping[str, tuple[int, ...]] = {k: tuple(v.shape) for k, v in self._pickled.items()}
        else:
            self.shapes = {name: tensor.shape for name, (_, tensor) in read_headers(self._files).items()}
        if len(self.shapes) > MAX_TENSORS:
            raise ItemFailure(
                FailureReason.TOO_LARGE,
                f"{len(self.shapes)} tensors in the weights; the limit is {MAX_TENSORS}",
            )

    @property
    def elements(self) -> int:
        """Numbers in all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def read(self) -> tuple[dict[str, torch.Tensor], WeightFacts]:
        """Every tensor, in memory of its own and in its stored dtype, with the facts about them.

        Raises:
            ItemFailure: NON_FINITE where a number is NaN or infinite, UNSUPPORTED where it is complex,
                CORRUPT_WEIGHTS where a file is cut off meanwhile.
        """
        begun = time.perf_counter()
        digest, facts = ContentDigest(), TensorFacts()
        tensors = self._read_pickled(digest, facts) if self._pickled else self._read_files(digest, facts)
        return tensors, facts.result(digest.result(), time.perf_counter() - begun)

    def read_again(self) -> dict[str, torch.Tensor]:
        """Every tensor, as ``read``, of weights that were read and found sound before: nothing is learnt of them.

        Raises:
            ItemFailure: CORRUPT_WEIGHTS where a file is cut off meanwhile.
        """
        return self.read()[0] if self._pickled else self._read_files(None, None)

    def _read_files(self, digest: ContentDigest | None, facts: TensorFacts | None) -> dict[str, torch.Tensor]:
        headers = sorted(read_headers(self._files).items())
        rooms = _rooms([info.end - info.begin for _, (_, info) in headers])
        tensors = {}
        with ExitStack() as stack:
            opened: dict[Path, FileIO] = {}
            for (name, (path, info)), room in zip(headers, rooms, strict=True):
                if path not in opened:
                    stack.close()  # one file at a time: the uploader decides how many there are
                    opened = {path: stack.enter_context(open(path, "rb", buffering=0))}
                stored = as_tensor(room, info.dtype)
                pieces = read_into(opened[path], info, room.data, BLOCK * ITEM_SIZES[info.dtype])
                if digest is None or facts is None:
                    deque(pieces, maxlen=0)
                else:
                    digest.begin(name, info.dtype, info.shape)
                    facts.begin(name, TORCH_NAMES[info.dtype], info.shape)
                    for place, piece in enumerate(pieces):
                        digest.add(piece)
                        facts.add(stored[place * BLOCK : (place + 1) * BLOCK])
                    facts.finish()
                # Bytes other than 0 and 1 are not booleans, and what a kernel does with them is undefined.
                tensors[name] = (stored.ne(0) if info.dtype == "BOOL" else stored).reshape(info.shape)
        return tensors

    def _read_pickled(self, digest: ContentDigest, facts: TensorFacts) -> dict[str, torch.Tensor]:
        import torch

        tensors = {}
        for name in sorted(self._pickled):
            tensor = tensors[name] = self._pickled[name].clone()
            digest.begin(name, _STORED[_dtype_name(tensor)], tensor.shape)
            digest.add(_bytes_of(tensor))
            facts.begin(name, _dtype_name(tensor), tuple(tensor.shape))
            for piece in torch.split(tensor.reshape(-1), BLOCK):
                facts.add(piece)
            facts.finish()
        return tensors


_STORED = {torch_name: name for name, torch_name in TORCH_NAMES.items()}


def _rooms(sizes: Sequence[int]) -> Iterable[npt.NDArray[np.uint8]]:
    """Memory for tensors of these many bytes, in one piece.

    NumPy asks the kernel for huge pages: touching 100 MB for the first time takes 5 ms in place of 40.
    """
    places = [0]
    for size in sizes:
        places.append(places[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    memory = np.empty(places[-1] + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    for place, size in zip(places, sizes, strict=False):
        yield memory[start + place : start + place + size]


def as_tensor(room: npt.NDArray[np.uint8], dtype: str) -> torch.Tensor:
    """Bytes as the numbers of a safetensors type, in the same memory; booleans as bytes."""
    import torch

    flat = torch.from_numpy(room)
    return flat if dtype == "BOOL" else flat.view(getattr(torch, TORCH_NAMES[dtype]))


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes_of(tensor: torch.Tensor) -> bytes:
    import torch

    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


class TensorFacts:
    """Collects the facts of one tensor after the other, each handed over in pieces of ``BLOCK`` items."""

    def __init__(self) -> None:
        self._summary = Summary()
        self._all = WeightMoments()
        self._numbers: Counter[str] = Counter()
        self._layers: list[LayerFacts] = []
        self._seconds = 0.0

    def begin(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Open another tensor; ``dtype`` as torch calls it. Raises ItemFailure, UNSUPPORTED, for complex numbers."""
        self._name, self._dtype, self._shape = name, dtype, shape
        if dtype.startswith("complex"):  # the libraries would drop the imaginary parts without a word
            raise ItemFailure(FailureReason.UNSUPPORTED, f"tensor {name[:100]!r} holds complex numbers")
        self._counts = dtype.startswith(("float", "bfloat")) and math.prod(shape) > 0
        self._counter = dtype.startswith(WHOLE_NUMBERS) and math.prod(shape) == 1
        self._value: float | None = None
        if self._counts:
            self._summary.begin(sketched=len(shape) > 1)
            self._numbers[dtype] += math.prod(shape)

    def add(self, piece: torch.Tensor) -> None:
        """The tensor's next items, in their stored type."""
        if self._counter:
            self._value = float(piece.item())
        if not self._counts:
            return
        begun = time.perf_counter()
        # What lies beyond float32 (in float64 weights, unheard of) becomes infinite here, and is of no use.
        self._summary.add(piece.float())
        self._seconds += time.perf_counter() - begun

    def finish(self) -> None:
        """Close the tensor. Raises ItemFailure, NON_FINITE, where it holds NaN or infinite numbers."""
        begun = time.perf_counter()
        layer = LayerFacts(self._name, self._dtype, self._shape, self._value)
        if self._counts:
            moments, sketch = self._summary.finish()
            if not moments.finite:
                raise ItemFailure(
                    FailureReason.NON_FINITE, f"tensor {self._name[:100]!r} holds NaN or infinite numbers"
                )
            self._all = self._all.merged(moments)
            layer = LayerFacts(
                self._name, self._dtype, self._shape, moments.mean, moments.std, moments.kurtosis, sketch
            )
        self._layers.append(layer)
        self._seconds += time.perf_counter() - begun

    def result(self, digest: str, seconds: float) -> WeightFacts:
        """The facts of all tensors, with what only their reader knows."""
        dtype = self._numbers.most_common(1)[0][0] if self._numbers else "none"
        return WeightFacts(
            digest=digest,
            mean=self._all.mean,
            std=self._all.std,
            dtype=dtype,
            layers=largest_layers(self._layers),
            seconds=seconds,
            seconds_sketch=self._seconds,
        )


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    """A state dict out of a pickle, by the unpickler that knows only tensors and plain containers.

    Raises:
        ItemFailure: UNSAFE_FORMAT where the pickle asks for anything else, CORRUPT_WEIGHTS where it is damaged
            or is no mapping of names to ordinary tensors.
    """
    import torch

    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ItemFailure(FailureReason.UNSAFE_FORMAT, f"{path.name}: {str(error)[:300]}") from error
    except Exception as error:  # a damaged archive can raise nearly anything inside the foreign reader
        raise ItemFailure(FailureReason.CORRUPT_WEIGHTS, f"{path.name}: {str(error)[:300]}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise ItemFailure(FailureReason.CORRUPT_WEIGHTS, f"{path.name} is not a mapping of names to tensors")
    size = path.stat().st_size
    for name, tensor in state.items():
        plain = (
            isinstance(name, str)
            and type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and tensor.layout is torch.strided
            and _dtype_name(tensor) in _STORED
            # A view can claim any shape over one number; only what the file can hold is copied.
            and tensor.numel() * tensor.element_size() <= size
        )
        if not plain:
            raise ItemFailure(
                FailureReason.CORRUPT_WEIGHTS, f"{path.name}: {str(name)[:100]!r} is no ordinary tensor"
            )
    return {name: tensor.detach() for name, tensor in state.items()}

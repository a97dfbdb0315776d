"""The weights of one model: known by their headers first, then read once, with digest, statistics and checks."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probelog.errors import FailureReason, ItemFailure
from probelog.safetensors_file import (
    TensorInfo,
    read_headers,
    tensor_heading,
    weight_digest,
    weight_files,
)
from probelog.snapshot import member

if TYPE_CHECKING:
    import torch

PICKLED_WEIGHTS = "pytorch_model.bin"

_TORCH_NAMES = {
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
class WeightFacts:
    """What was learnt while the weights were read.

    ``mean`` and ``std`` are over all floating-point numbers; ``dtype`` is the one most of them are stored in.
    """

    digest: str
    mean: float
    std: float
    dtype: str


class Weights:
    """The weights of a repository, not yet read.

    ``shapes`` gives every tensor's shape by name. Cheap to make: only headers are read (for a pickle: the
    restricted unpickler runs, and storages stay on disk).

    Raises:
        ItemFailure: as `probelog.safetensors_file.weight_files` and ``read_header``.
    """

    def __init__(self, folder: Path, *, allow_pickle: bool = False) -> None:
        self._pickled: dict[str, torch.Tensor] = {}
        self._files: list[Path] = []
        try:
            self._files = weight_files(folder)
        except ItemFailure as failure:
            pickled = member(folder, PICKLED_WEIGHTS) if allow_pickle else None
            if failure.reason is not FailureReason.UNSAFE_FORMAT or pickled is None:
                raise
            self._pickled = _unpickle(pickled)
            self.shapes: Mapping[str, tuple[int, ...]] = {k: tuple(v.shape) for k, v in self._pickled.items()}
        else:
            self.shapes = {name: tensor.shape for name, (_, tensor) in read_headers(self._files).items()}

    @property
    def elements(self) -> int:
        """Numbers in all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def read(self) -> tuple[dict[str, torch.Tensor], WeightFacts]:
        """Every tensor, in memory of its own and in its stored dtype, with the facts about them.

        Raises:
            ItemFailure: NON_FINITE where a number is NaN or infinite.
        """
        statistics = _Statistics()
        if self._pickled:
            tensors = {name: self._pickled[name].clone() for name in sorted(self._pickled)}
            content = hashlib.sha256()
            for name, tensor in tensors.items():
                stored = _STORED[str(tensor.dtype).removeprefix("torch.")]
                content.update(tensor_heading(name, stored, tensor.shape))
                content.update(_bytes_of(tensor))
                statistics.add(name, tensor)
            return tensors, statistics.facts(content.hexdigest())
        tensors = {}

        def keep(info: TensorInfo, pieces: Iterator[bytes]) -> Iterator[bytes]:
            buffer = bytearray(info.end - info.begin)
            position = 0
            for piece in pieces:
                buffer[position : position + len(piece)] = piece
                position += len(piece)
                yield piece
            tensors[info.name] = _as_tensor(buffer, info)
            statistics.add(info.name, tensors[info.name])

        digest = weight_digest(self._files, keep)
        return tensors, statistics.facts(digest)


_STORED = {torch_name: name for name, torch_name in _TORCH_NAMES.items()}


def _as_tensor(buffer: bytearray, info: TensorInfo) -> torch.Tensor:
    import torch

    dtype = getattr(torch, _TORCH_NAMES[info.dtype])
    if not buffer:
        return torch.empty(info.shape, dtype=dtype)
    if info.dtype == "BOOL":
        # Bytes other than 0 and 1 are not booleans, and what a kernel does with them is undefined.
        return torch.frombuffer(buffer, dtype=torch.uint8).ne(0).reshape(info.shape)
    return torch.frombuffer(buffer, dtype=dtype).reshape(info.shape)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    import torch

    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


class _Statistics:
    """Sums over the floating-point tensors, in float64, a bounded slice at a time."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.squares = 0.0
        self.dtypes: Counter[str] = Counter()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        import torch

        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
            return
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        self.dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        for piece in torch.split(values.reshape(-1), 1 << 22):
            # A sum of squares in float64 is finite exactly when every term is: stored values end at 3e38,
            # or (float64 weights, unheard of) are beyond use as float32.
            exact = piece.to(torch.float32).to(torch.float64)
            self.total += float(exact.sum())
            squares = float(exact.square().sum())
            if not math.isfinite(squares):
                raise ItemFailure(
                    FailureReason.NON_FINITE, f"tensor {name[:100]!r} holds NaN or infinite numbers"
                )
            self.squares += squares
        self.count += values.numel()

    def facts(self, digest: str) -> WeightFacts:
        mean = self.total / max(self.count, 1)
        variance = max(self.squares / max(self.count, 1) - mean * mean, 0.0)
        dtype = self.dtypes.most_common(1)[0][0] if self.dtypes else "none"
        return WeightFacts(digest, mean, math.sqrt(variance), dtype)


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    """A state dict out of a pickle, by the unpickler that knows only tensors and plain containers.

    Raises:
        ItemFailure: UNSAFE_FORMAT where the pickle asks for anything else, CORRUPT_WEIGHTS where it is damaged
            or is no mapping of names to ordinary tensors.
    """
    import torch

    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ItemFailure(FailureReason.UNSAFE_FORMAT, f"{path.name}: {str(error)[:300]}") from error
    except Exception as error:  # a damaged archive can raise nearly anything inside the foreign reader
        raise ItemFailure(FailureReason.CORRUPT_WEIGHTS, f"{path.name}: {str(error)[:300]}") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found:
        raise ItemFailure(FailureReason.CORRUPT_WEIGHTS, f"{path.name} is not a mapping of names to tensors")
    size = path.stat().st_size
    for name, tensor in found.items():
        plain = (
            isinstance(name, str)
            and type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and tensor.layout is torch.strided
            and str(tensor.dtype).removeprefix("torch.") in _STORED
            # A view can claim any shape over one number; only what the file can hold is copied.
            and tensor.numel() * tensor.element_size() <= size
        )
        if not plain:
            raise ItemFailure(
                FailureReason.CORRUPT_WEIGHTS, f"{path.name}: {str(name)[:100]!r} is no ordinary tensor"
            )
    return {name: tensor.detach() for name, tensor in found.items()}

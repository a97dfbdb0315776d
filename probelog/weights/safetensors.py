"""Reading untrusted safetensors files: the header is checked whole before any byte is used.

The format (https://github.com/huggingface/safetensors#format): eight bytes of header length, little endian; a
JSON object that gives every tensor's dtype, shape and byte range; the bytes. Parsed here and not by the library,
because the header must be known before memory is spent and because the digest reads the bytes in any case.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from probelog.errors import FailureReason, ItemFailure
from probelog.storage.schemas import clean_unicode
from probelog.weights.repository import member, parse_object, read_json

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS}.index.json"

#: The format's own limit is 100 MB; as Python objects that would take a gigabyte, and a model with 10,000
#: tensors needs 2 MB.
MAX_HEADER_BYTES = 16_000_000

#: Before the header: its length.
PREFIX_BYTES = 8

ITEM_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
# Further types of the format (safetensors 0.7), most of them packed or scaled by another tensor.
_NOT_CONVERTED = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")

_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".tar", ".npz", ".joblib")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: where its bytes are, counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """How many numbers it holds; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What one safetensors file says it holds, checked against its size."""

    path: Path
    tensors: Mapping[str, TensorInfo]

    @property
    def elements(self) -> int:
        """Numbers in all tensors together."""
        return sum(tensor.elements for tensor in self.tensors.values())


def read_header(path: Path) -> Header:
    """The header of one file.

    Raises:
        ItemFailure: CORRUPT_WEIGHTS where the file is cut off or too long, or the header is not sound: unknown
            dtypes, shapes that do not fill their byte range, ranges that overlap or leave gaps.
    """
    size = path.stat().st_size
    with open(path, "rb") as stream:
        length = header_length(path, stream.read(PREFIX_BYTES), size)
        return parse_header(path, stream.read(length), size)


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a file says about itself, by name; untrusted, like the names.

    Raises:
        ItemFailure: as `read_header`.
    """
    read_header(path)
    with open(path, "rb") as stream:
        data = stream.read(int.from_bytes(stream.read(PREFIX_BYTES), "little"))
    return dict(json.loads(data).get("__metadata__") or {})


def header_length(path: Path, prefix: bytes, size: int, most: int = MAX_HEADER_BYTES) -> int:
    """Bytes of the header of a file of ``size`` bytes, from its first eight.

    Raises:
        ItemFailure: CORRUPT_WEIGHTS where the file cannot hold it, or it has more than ``most``.
    """
    length = int.from_bytes(prefix, "little")
    if len(prefix) < PREFIX_BYTES or length > size - PREFIX_BYTES:
        raise _corrupt(path, f"cut off: {size} bytes cannot hold the header of {length} that it announces")
    if length > most:
        raise _corrupt(path, f"a header of {length} bytes; {most} are accepted")
    return length


def parse_header(path: Path, data: bytes, size: int) -> Header:
    """The header of a file of ``size`` bytes; as `read_header`, whether or not the file is on this machine."""
    described = parse_object(data, f"the header of {path.name}", FailureReason.CORRUPT_WEIGHTS)
    metadata = described.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict)
        and all(isinstance(value, str) for value in metadata.values())
        and _is_unicode("".join([*metadata, *metadata.values()]))
    ):
        raise _corrupt(path, "its metadata are not texts by name")
    start = PREFIX_BYTES + len(data)
    tensors = [_tensor(path, name, entry, start) for name, entry in described.items()]
    position = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != position:
            raise _corrupt(path, f"tensor {tensor.name[:100]!r} overlaps another or leaves a gap before it")
        position = tensor.end
    if position != size:
        raise _corrupt(path, f"the header accounts for {position} bytes, the file has {size}")
    return Header(path, {tensor.name: tensor for tensor in tensors})


def _tensor(path: Path, name: str, entry: object, start: int) -> TensorInfo:
    label = f"tensor {name[:100]!r}"
    if not _is_unicode(name):
        raise _corrupt(path, f"{label} has a name that is no valid Unicode")
    if not isinstance(entry, dict):
        raise _corrupt(path, f"{label} lacks dtype, shape or data_offsets")
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _corrupt(path, f"{label} lacks dtype, shape or data_offsets") from None
    if dtype in _NOT_CONVERTED:
        raise ItemFailure(
            FailureReason.UNSUPPORTED, f"{path.name}: {label} is stored as {dtype}, which is not converted"
        )
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise _corrupt(path, f"{label} has the unknown dtype {str(dtype)[:40]!r}")
    if (
        not isinstance(shape, list)
        or not all(map(_is_size, shape))
        or not (_is_size(begin) and _is_size(end))
    ):
        raise _corrupt(path, f"{label}: its shape and offsets must be whole numbers of at least 0")
    # Checked before the product, so that a million dimensions of 10^18 cost nothing.
    if len(shape) > 16 or max(shape, default=0) > 1 << 48:
        raise _corrupt(path, f"{label} has an impossible shape")
    if math.prod(shape) * ITEM_SIZES[dtype] != end - begin:
        raise _corrupt(path, f"{label}: {dtype} of shape {shape} does not fill {end - begin} bytes")
    return TensorInfo(name, dtype, tuple(shape), start + begin, start + end)


def _is_unicode(text: str) -> bool:
    return clean_unicode(text) == text


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0


def _corrupt(path: Path, detail: str) -> ItemFailure:
    return ItemFailure(FailureReason.CORRUPT_WEIGHTS, f"{path.name}: {detail}")


def weight_files(folder: Path, name: str = WEIGHTS) -> list[Path]:
    """The safetensors files of a repository: the one of the name, or the shards that its index names.

    Raises:
        ItemFailure: UNSAFE_FORMAT where there are only pickles, NOT_FOUND where there are no weights at all,
            UNSAFE_PATH for a shard name that is not a plain file name, CORRUPT_WEIGHTS where the index and the
            shards disagree.
    """
    single = member(folder, name)
    if single is not None:
        return [single]
    index = read_json(folder, f"{name}.index.json")
    if index is None:
        pickles = sorted(path.name for path in folder.iterdir() if path.name.lower().endswith(_PICKLES))
        if pickles:
            raise ItemFailure(
                FailureReason.UNSAFE_FORMAT,
                f"the weights are only there as {pickles[0][:100]}, not as safetensors",
            )
        raise ItemFailure(FailureReason.NOT_FOUND, f"the repository has neither {name} nor {name}.index.json")
    files = []
    for shard, tensors in shards_of(index).items():
        path = member(folder, shard)
        if path is None:
            raise ItemFailure(FailureReason.CORRUPT_WEIGHTS, f"shard {shard} is missing")
        check_shard(read_header(path), tensors)
        files.append(path)
    return files


def shards_of(index: Mapping[str, object]) -> dict[str, set[str]]:
    """The shards that an index names, in order of their names, each with the tensors that it must hold.

    Raises:
        ItemFailure: CORRUPT_WEIGHTS where it is no index, UNSAFE_PATH for a name that is not a plain file name.
    """
    where = index.get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ItemFailure(FailureReason.CORRUPT_WEIGHTS, f"{WEIGHTS_INDEX} has no weight_map")
    shards: dict[str, set[str]] = {}
    for tensor, name in where.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ItemFailure(
                FailureReason.UNSAFE_PATH, f"{WEIGHTS_INDEX} names the shard {str(name)[:100]!r}"
            )
        shards.setdefault(name, set()).add(tensor)
    return dict(sorted(shards.items()))


def check_shard(header: Header, tensors: Set[str]) -> None:
    """Check that a shard holds the tensors that the index names.

    Raises:
        ItemFailure: CORRUPT_WEIGHTS where it does not.
    """
    absent = tensors - header.tensors.keys()
    if absent:
        raise ItemFailure(
            FailureReason.CORRUPT_WEIGHTS, f"shard {header.path.name} lacks the tensor {min(absent)[:100]!r}"
        )


def read_headers(files: Sequence[Path]) -> dict[str, tuple[Path, TensorInfo]]:
    """The tensors of several files together, by name, with the file that holds each.

    Raises:
        ItemFailure: CORRUPT_WEIGHTS as `read_header`, and where two files hold the same tensor.
    """
    return merged_headers(map(read_header, files))


def merged_headers(headers: Iterable[Header]) -> dict[str, tuple[Path, TensorInfo]]:
    """As `read_headers`, of headers that were read already."""
    tensors: dict[str, tuple[Path, TensorInfo]] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise _corrupt(header.path, f"tensor {name[:100]!r} is in {tensors[name][0].name} too")
            tensors[name] = header.path, tensor
    return tensors


def read_into(stream: FileIO, tensor: TensorInfo, room: memoryview, piece: int) -> Iterator[memoryview]:
    """Fill ``room`` with the bytes of one tensor, ``piece`` bytes at a time; yields what was filled last.

    Raises:
        ItemFailure: CORRUPT_WEIGHTS where the file ends early.
    """
    stream.seek(tensor.begin)
    for start in range(0, len(room), piece):
        part = room[start : start + piece]
        filled = 0
        while filled < len(part):
            count = stream.readinto(part[filled:])
            if not count:
                raise _corrupt(Path(str(stream.name)), f"cut off while tensor {tensor.name[:100]!r} was read")
            filled += count
        yield part


class ContentDigest:
    """SHA-256 of what weight files hold: the tensors in order of name, each with name, dtype, shape and bytes.

    Independent of sharding, metadata and the order inside the files; equal for re-uploads of the same weights.
    Whoever feeds it keeps to that order.
    """

    def __init__(self) -> None:
        self._content = hashlib.sha256()

    def begin(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """What goes before a tensor's bytes; their number follows from it. ``dtype`` as in safetensors."""
        self._content.update(json.dumps([name, dtype, list(shape)]).encode() + b"\n")

    def add(self, data: bytes | memoryview) -> None:
        """The next bytes of the tensor."""
        self._content.update(data)

    def result(self) -> str:
        """The digest, in hexadecimal."""
        return self._content.hexdigest()

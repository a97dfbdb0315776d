"""The weights of a repository on the Hub, of which a few parts are read: headers first, then the bytes of some tensors."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from probelog.errors import FailureReason, ItemFailure
from probelog.hub.client import HubClient, HubError
from probelog.hub.download import check_access
from probelog.hub.listing import item_failure, tree
from probelog.hub.ranges import ByteBudget, RemoteFile
from probelog.storage.schemas import CatalogueRow
from probelog.weights.blocks import Run, block_runs, chosen_tensors, facts_of_blocks, joined
from probelog.weights.reader import (
    MAX_TENSORS,
    TORCH_NAMES,
    LayerFacts,
    TensorFacts,
    as_tensor,
    largest_layers,
)
from probelog.weights.repository import parse_object
from probelog.weights.safetensors import (
    ITEM_SIZES,
    PREFIX_BYTES,
    Header,
    TensorInfo,
    check_shard,
    header_length,
    merged_headers,
    parse_header,
    shards_of,
)
from probelog.weights.sketch import BLOCK, WeightMoments

# A header of 10,000 tensors has 2 MB. As Python objects, JSON that is made to be costly takes eighty times its size.
_MOST_HEADER_BYTES = 2_000_000
_FIRST_READ = 32_768
_MOST_SHARDS = 1000
# Of weights that are read whole, in one request.
_AHEAD = 8_000_000
# So many bytes between two blocks cost less than another request does.
_GAP = 16_384
# Of the bytes of a model for blocks; the rest is for headers and for what lies between blocks.
_BLOCKS_SHARE = 0.75

# Where libraries keep the weights, in order of preference. Of a diffusion model, its largest network.
_PLACES = (
    ("", "model"),
    ("transformer/", "diffusion_pytorch_model"),
    ("unet/", "diffusion_pytorch_model"),
    ("prior/", "diffusion_pytorch_model"),
    ("", "diffusion_pytorch_model"),
    ("", "adapter_model"),
    ("", "pytorch_lora_weights"),
)
_ENDINGS = (
    ".safetensors",
    ".safetensors.index.json",
    ".fp16.safetensors",
    ".safetensors.index.fp16.json",
)
_PART = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


def weights_path(paths: Collection[str]) -> str:
    """The safetensors file of a repository that is read, or the index that names its shards.

    Raises:
        ItemFailure: UNSUPPORTED where there is none, or none of several stands out; NOT_FOUND without any files.
    """
    for folder, stem in _PLACES:
        for ending in _ENDINGS:
            if folder + stem + ending in paths:
                return folder + stem + ending
    at_root = [path for path in paths if path.endswith(".safetensors") and "/" not in path]
    if len(at_root) == 1 and not _PART.search(at_root[0]):
        return at_root[0]
    if at_root:
        raise ItemFailure(
            FailureReason.UNSUPPORTED,
            f"{len(at_root)} safetensors files without an index; none has a name that libraries load",
        )
    if not paths:
        raise ItemFailure(FailureReason.NOT_FOUND, "the repository holds no files")
    kinds = sorted({Path(path).suffix for path in paths if Path(path).suffix in _OTHER_FORMATS})
    has = f"the weights are only there as {', '.join(kinds)}" if kinds else "no weights"
    raise ItemFailure(FailureReason.UNSUPPORTED, f"{has}; only safetensors are read in parts")


_OTHER_FORMATS = {
    ".gguf",
    ".ggml",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".pkl",
    ".npz",
}


@dataclass(frozen=True)
class RemoteFacts:
    """What was read of one model's weights.

    Attributes:
        layers: facts of all tensors, the largest ``MAX_LAYERS`` where there are more; without statistics where nothing
            was read.
        mean, std: of all floating-point numbers that were read.
        digest: SHA-256 of all that was read, with names, types and shapes.
        elements: numbers in all tensors.
        size: bytes of the files.
        asked: bytes that were asked for, in
        requests: so many requests.
    """

    layers: list[LayerFacts]
    mean: float
    std: float
    digest: str
    elements: int
    size: int
    asked: int
    requests: int


class RemoteWeights:
    """The tensors of one repository, known by the headers of its files. For one thread.

    Args:
        client: of the Hub; may be shared by threads.
        row: the model; its files are asked of the Hub where the row names none.
        most_bytes: that may be asked for, headers included.
        check: called while bytes arrive, and while none do; what it raises ends the reading.

    Raises:
        ItemFailure: whatever is wrong with the repository or the Hub's answers.
    """

    def __init__(
        self,
        client: HubClient,
        row: CatalogueRow,
        most_bytes: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        check_access(row, has_token=client.has_token)
        self.budget = ByteBudget(most_bytes)
        self.row = row
        self._client, self._check = client, check
        try:
            listed = row.files or tree(client, row.repo, row.sha)
        except HubError as error:
            raise item_failure(error) from error
        self._sizes = {file.path: file.size for file in listed}
        self._files: dict[Path, RemoteFile] = {}
        headers = self._headers(weights_path(self._sizes))
        self.tensors: Mapping[str, tuple[Path, TensorInfo]] = merged_headers(headers)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size or 0 for file in self._files.values())

    def _headers(self, path: str) -> list[Header]:
        if not path.endswith(".json"):
            return [self._header(path)]
        file = self._file(path)
        index = file.read(0, _MOST_HEADER_BYTES)
        if len(index) < (file.size or 0):
            raise ItemFailure(FailureReason.TOO_LARGE, f"{path} has {file.size} bytes; {len(index)} are read")
        shards = shards_of(parse_object(index, path, FailureReason.CORRUPT_WEIGHTS))
        if len(shards) > _MOST_SHARDS:
            raise ItemFailure(FailureReason.TOO_LARGE, f"{path} names {len(shards)} shards")
        folder = path.rpartition("/")[0]
        headers, count = [], 0
        for name, tensors in shards.items():
            shard = f"{folder}/{name}" if folder else name
            if shard not in self._sizes:
                raise ItemFailure(FailureReason.CORRUPT_WEIGHTS, f"shard {name[:200]} is missing")
            header = self._header(shard)
            check_shard(header, tensors)
            headers.append(header)
            count += len(header.tensors)
            _check_count(count)
        return headers

    def _file(self, path: str) -> RemoteFile:
        row = self.row
        return RemoteFile(
            self._client, row.repo, row.sha, path, self.budget, self._sizes.get(path), self._check
        )

    def _header(self, path: str) -> Header:
        file = self._files[Path(path)] = self._file(path)
        first = file.read(0, _FIRST_READ)
        length = header_length(Path(path), first[:PREFIX_BYTES], file.size or 0, _MOST_HEADER_BYTES)
        end = PREFIX_BYTES + length
        data = first[PREFIX_BYTES:end]
        if len(data) < length:
            data += file.read(len(first), end)
        header = parse_header(Path(path), data, file.size or 0)
        _check_count(len(header.tensors))
        return header

    def read(self, runs: Iterable[tuple[Path, Run]]) -> dict[tuple[Path, Run], bytes]:
        """Some byte ranges of the files; close ones share a request where the budget allows."""
        by_file: dict[Path, list[Run]] = {}
        for path, run in runs:
            by_file.setdefault(path, []).append(run)
        gap = _GAP
        for gap in (_GAP, 0):
            cost = sum(run.end - run.begin for wanted in by_file.values() for run in joined(wanted, gap))
            if cost <= self.budget.left:
                break
        result = {}
        for path, wanted in by_file.items():
            waiting = sorted(set(wanted), key=lambda run: run.begin, reverse=True)
            for whole in joined(wanted, gap):
                data = self._files[path].read(whole.begin, whole.end)
                while waiting and waiting[-1].end <= whole.end:
                    run = waiting.pop()
                    result[path, run] = data[run.begin - whole.begin : run.end - whole.begin]
        return result

    def read_tensors(self, names: Iterable[str]) -> dict[str, bytes]:
        """The bytes of whole tensors, as stored.

        Raises:
            ItemFailure: TOO_LARGE where the budget does not reach, NOT_FOUND for a tensor that is not there.
        """
        runs = {}
        for name in names:
            if name not in self.tensors:
                raise ItemFailure(FailureReason.NOT_FOUND, f"there is no tensor {name[:100]!r}")
            path, tensor = self.tensors[name]
            runs[name] = path, Run(tensor.begin, tensor.end)
        data = self.read(run for run in runs.values() if run[1].end > run[1].begin)
        return {name: data.get(run, b"") for name, run in runs.items()}

    def sample(self) -> RemoteFacts:
        """The facts of all tensors by their blocks (`probelog.weights.blocks`).

        Raises:
            ItemFailure: whatever goes wrong; UNSUPPORTED where no matrix of floating-point numbers can be read.
        """
        tensors = [tensor for _, tensor in self.tensors.values()]
        chosen = chosen_tensors(tensors, min(int(self.budget.most * _BLOCKS_SHARE), self.budget.left))
        runs = {tensor.name: block_runs(tensor) for tensor in chosen}
        data = self.read(
            (self.tensors[name][0], run) for name, blocks in runs.items() for run in blocks.values()
        )
        digest, moments, layers = hashlib.sha256(), WeightMoments(), []
        for name in sorted(self.tensors):
            path, tensor = self.tensors[name]
            blocks = {block: data[path, run] for block, run in runs.get(name, {}).items()}
            facts, known = facts_of_blocks(tensor, blocks)
            moments = moments.merged(known)
            layers.append(facts)
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            for block in blocks.values():
                digest.update(block)
        if not any(layer.sketch is not None for layer in layers):
            raise _nothing_to_compare()
        return self._facts(largest_layers(layers), moments.mean, moments.std, digest.hexdigest())

    def read_whole(self) -> RemoteFacts:
        """The facts of all tensors by all their numbers: those that the probing pass stores of the same weights.

        Raises:
            ItemFailure: whatever goes wrong; TOO_LARGE where the budget does not reach, UNSUPPORTED as in `sample`.
        """
        size = sum(tensor.end - tensor.begin for _, tensor in self.tensors.values())
        if size > self.budget.left:
            raise ItemFailure(
                FailureReason.TOO_LARGE,
                f"{size} bytes of weights; trees.bytes_per_model leaves room for {self.budget.left}",
            )
        digest, facts = hashlib.sha256(), TensorFacts()
        for path, file in self._files.items():
            stream = _Stream(file)
            mine = [tensor for where, tensor in self.tensors.values() if where == path]
            for tensor in sorted(mine, key=lambda tensor: (tensor.begin, tensor.end)):
                facts.begin(tensor.name, TORCH_NAMES[tensor.dtype], tensor.shape)
                piece = BLOCK * ITEM_SIZES[tensor.dtype]
                for begin in range(tensor.begin, tensor.end, piece):
                    data = stream.read(begin, min(begin + piece, tensor.end))
                    digest.update(data)
                    facts.add(as_tensor(np.frombuffer(data, np.uint8).copy(), tensor.dtype))
                facts.finish()
        result = facts.result(digest.hexdigest(), 0.0)
        if not any(layer.sketch is not None for layer in result.layers):
            raise _nothing_to_compare()
        return self._facts(result.layers, result.mean, result.std, result.digest)

    def _facts(self, layers: list[LayerFacts], mean: float, std: float, digest: str) -> RemoteFacts:
        return RemoteFacts(
            layers=layers,
            mean=mean,
            std=std,
            digest=digest,
            elements=sum(tensor.elements for _, tensor in self.tensors.values()),
            size=self.size,
            asked=self.budget.asked,
            requests=self.budget.requests,
        )


class _Stream:
    """A file that is read from one end to the other, some megabytes at a time."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._begin, self._data = 0, b""

    def read(self, begin: int, end: int) -> bytes:
        """Bytes behind those that were read before."""
        held = self._data[begin - self._begin : end - self._begin]
        if len(held) < end - begin:
            at = begin + len(held)
            self._begin, self._data = at, self._file.read(at, max(end, at + _AHEAD))
            held += self._data[: end - at]
        return held


def _nothing_to_compare() -> ItemFailure:
    return ItemFailure(
        FailureReason.UNSUPPORTED,
        "no matrix of floating-point numbers was read, by which models are compared "
        "(whole numbers alone, or trees.bytes_per_model is too small)",
    )


def _check_count(tensors: int) -> None:
    if tensors > MAX_TENSORS:
        raise ItemFailure(
            FailureReason.TOO_LARGE, f"{tensors} tensors in the weights; the limit is {MAX_TENSORS}"
        )

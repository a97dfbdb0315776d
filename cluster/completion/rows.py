"""A shard's standardised rows between sweeps: 16 bits an entry, in memory up to a bound, the rest on local disk.

The entries are fixed-point numbers with a scale for each row. They are as fine as the float16 that logits are
stored as, and processors widen them to float32 some twenty times faster than NumPy widens float16, which would
otherwise cost more than the products that follow.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from probelog.completion.als import Block, Float32
from probelog.errors import UsageError

Scalar = TypeVar("Scalar", bound=np.generic)

# What is read from disk at a time. Large enough for a disk, small beside any memory.
_CHUNK_BYTES = 8_000_000
_LARGEST = np.iinfo(np.int16).max


class StoredModel(NamedTuple):
    """One model as it is kept: entries (L, m), of which each row has a scale (L,)."""

    key: int
    probes: npt.NDArray[np.int32]
    scale: Float32
    entries: npt.NDArray[np.int16]


class RowStore:
    """Models in the order in which they were added, to be walked through once a sweep.

    What exceeds ``memory`` bytes goes to a file without a name in ``folder``: the kernel removes it together with this
    process, however that ends.
    """

    def __init__(self, folder: Path, memory: int) -> None:
        self._folder, self._memory = folder, memory
        self._waiting: list[StoredModel] = []
        self._waiting_bytes = 0
        self._chunks: list[bytes | tuple[int, int]] = []
        self._descriptor: int | None = None
        self._largest_model = self._largest_chunk = 0
        self._buffer = np.empty(0, np.float32)
        self.in_memory = self.on_disk = 0

    def close(self) -> None:
        """Give memory and disk back."""
        self._chunks, self._waiting = [], []
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def add(self, key: int, block: Block) -> None:
        """Keep one model's rows, under a 64-bit number of its own."""
        scale = np.abs(block.values).max(axis=1) / np.float32(_LARGEST)
        entries = np.rint(block.values / np.where(scale > 0, scale, 1)[:, None]).astype(np.int16)
        self._append(StoredModel(key, block.probes, scale, entries))

    def copy(self, model: StoredModel) -> None:
        """Keep a model of another row store."""
        self._append(StoredModel(model.key, model.probes.copy(), model.scale.copy(), model.entries.copy()))

    def settle(self) -> None:
        """Put the models that wait for a full chunk where they belong."""
        if not self._waiting:
            return
        data = _packed(self._waiting)
        self._waiting, self._waiting_bytes = [], 0
        if self.in_memory + len(data) <= self._memory:
            self._chunks.append(data)
            self.in_memory += len(data)
            return
        self._write(data)
        self._chunks.append((self.on_disk, len(data)))
        self.on_disk += len(data)
        self._largest_chunk = max(self._largest_chunk, len(data))

    def models(self) -> Iterator[StoredModel]:
        """All models; each is valid until the next one is asked for."""
        self.settle()
        space = bytearray(self._largest_chunk)
        for chunk in self._chunks:
            yield from _unpacked(self._read(chunk, space))

    def widened(self, model: StoredModel) -> Block:
        """A model's observations in float32; valid until the next model is widened."""
        if self._buffer.size < self._largest_model:
            self._buffer = np.empty(self._largest_model, np.float32)
        rows = self._buffer[: model.entries.size].reshape(model.entries.shape)
        np.copyto(rows, model.entries)
        rows *= model.scale[:, None]
        return Block(model.probes, rows)

    def _append(self, model: StoredModel) -> None:
        self._waiting.append(model)
        self._waiting_bytes += model.entries.nbytes
        self._largest_model = max(self._largest_model, model.entries.size)
        if self._waiting_bytes >= _CHUNK_BYTES:
            self.settle()

    def _write(self, data: bytes) -> None:
        try:
            if self._descriptor is None:
                with tempfile.TemporaryFile(dir=self._folder) as file:
                    self._descriptor = os.dup(file.fileno())
            rest, place = memoryview(data), self.on_disk
            while rest:
                written = os.pwrite(self._descriptor, rest, place)
                rest, place = rest[written:], place + written
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UsageError(
                f"{self._folder} has no room for the rows that exceed `completion_memory`: set `scratch` to a larger "
                "disk, or allow more memory"
            ) from error

    def _read(self, chunk: bytes | tuple[int, int], space: bytearray) -> bytes | memoryview:
        if isinstance(chunk, bytes):
            return chunk
        assert self._descriptor is not None
        place, size = chunk
        view = memoryview(space)[:size]
        done = 0
        while done < size:
            read = os.preadv(self._descriptor, [view[done:]], place + done)
            if not read:
                raise OSError(errno.EIO, "a shard's rows on local disk are shorter than they were written")
            done += read
        return view


def _packed(models: list[StoredModel]) -> bytes:
    """Models as bytes: how many, their keys, heights and widths, then all scales, probes and entries."""
    shapes = np.array([model.entries.shape for model in models], np.int64).reshape(-1, 2)
    keys = np.array([model.key for model in models], np.uint64)
    return b"".join(
        [
            np.int64(len(models)).tobytes(),
            keys.tobytes(),
            shapes.tobytes(),
            *(model.scale.tobytes() for model in models),
            *(model.probes.tobytes() for model in models),
            *(model.entries.tobytes() for model in models),
        ]
    )


def _unpacked(data: bytes | memoryview) -> Iterator[StoredModel]:
    place = 0

    def section(count: int, kind: type[Scalar]) -> npt.NDArray[Scalar]:
        nonlocal place
        values = np.frombuffer(data, kind, count, place)
        place += values.nbytes
        return values

    count = int(section(1, np.int64)[0])
    keys = section(count, np.uint64).tolist()
    shapes = section(2 * count, np.int64).reshape(-1, 2).tolist()
    scales = section(sum(rows for rows, _ in shapes), np.float32)
    probes = section(sum(width for _, width in shapes), np.int32)
    entries = section(sum(rows * width for rows, width in shapes), np.int16)
    row = probe = entry = 0
    for key, (rows, width) in zip(keys, shapes, strict=True):
        size = rows * width
        yield StoredModel(
            key,
            probes[probe : probe + width],
            scales[row : row + rows],
            entries[entry : entry + size].reshape(rows, width),
        )
        row, probe, entry = row + rows, probe + width, entry + size

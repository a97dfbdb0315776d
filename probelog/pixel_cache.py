"""Preprocessed probes, kept once per node: a bounded folder of memory-mapped arrays shared by its workers."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from probelog.preprocess import Recipe
from probelog.storage import short_key

_CHUNK = 64
_HEADER_BYTES = 256  # room for the .npy header in the reckoning


class PixelCache:
    """All probes of one probe set, after the geometry of each recipe in use, as arrays on local disk.

    One file a geometry. The first worker that needs it builds it while others wait on a lock that the kernel
    releases should the builder die; it appears whole, by rename. When a new file would exceed ``max_bytes``, those
    unused for longest are removed; whoever has one mapped keeps it until done. Any number of processes and threads
    may share a folder, also with different probe sets.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int, *, probe_set: str, count: int) -> None:
        """``probe_set`` is the hash of the probe set, ``count`` the number of its images."""
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.probe_set = probe_set
        self.count = count

    def __repr__(self) -> str:
        return f"PixelCache({str(self.folder)!r}, {self.max_bytes}, probe_set={self.probe_set!r}, count={self.count})"

    def pixels(
        self, recipe: Recipe, images: Callable[[Sequence[int]], Sequence[Image.Image]]
    ) -> npt.NDArray[Any] | None:
        """The geometry of every probe, (count, C, H, W), read-only and memory-mapped.

        None where it would not fit into ``max_bytes``: compute what is needed instead. ``images`` gives
        probes by index and is only called where the array must be built.
        """
        shape = (self.count, *recipe.shape)
        size = int(np.prod(shape)) * np.dtype(recipe.dtype).itemsize + _HEADER_BYTES
        if size > self.max_bytes or self.count == 0:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        name = short_key(self.probe_set, self.count, recipe.geometry_key)
        target = self.folder / f"{name}.npy"
        with self._locked(name):
            # Held from the look to the mapping: what is mapped cannot be lost, and evictors skip what is locked.
            found = _open(target, shape, recipe.dtype)
            if found is None:
                if not self._make_room(size, name):
                    return None
                self._build(target, shape, recipe, images)
                found = _open(target, shape, recipe.dtype)
            os.utime(target)
        return found

    def _build(
        self,
        target: Path,
        shape: tuple[int, ...],
        recipe: Recipe,
        images: Callable[[Sequence[int]], Sequence[Image.Image]],
    ) -> None:
        partial = target.with_suffix(".partial")
        array: Any = np.lib.format.open_memmap(partial, mode="w+", dtype=recipe.dtype, shape=shape)
        try:
            for start in range(0, self.count, _CHUNK):
                indices = range(start, min(start + _CHUNK, self.count))
                array[start : indices.stop] = recipe.geometry(images(indices))
            array.flush()
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, size: int, name: str) -> bool:
        """Remove arrays, longest unused first, until ``size`` more bytes fit, and reserve them; False if they
        cannot be made to fit because others are building.
        """
        with self._locked("room"):
            files = [path for path in self.folder.iterdir() if path.suffix in (".npy", ".partial")]
            known = {path: status for path in files if (status := _status(path)) is not None}
            used = sum(status.st_size for status in known.values())
            for path in sorted(known, key=lambda path: known[path].st_mtime):
                if used + size <= self.max_bytes:
                    break
                with self._locked(path.stem, wait=False) as mine:
                    if mine:
                        path.unlink(missing_ok=True)
                        used -= known[path].st_size
            if used + size > self.max_bytes:
                return False
            with open(self.folder / f"{name}.partial", "wb") as stream:
                stream.truncate(size)
            return True

    @contextlib.contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        stream: IO[str]
        with open(self.folder / f"{name}.lock", "w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True


def _status(path: Path) -> os.stat_result | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat()
    return None


def _open(path: Path, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any] | None:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):  # absent, or damaged by a full disk: built again
        return None
    return array if array.shape == shape and array.dtype == dtype else None

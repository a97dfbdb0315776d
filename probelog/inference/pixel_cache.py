"""Preprocessed probes, kept once per node: a bounded folder of memory-mapped arrays that its workers fill together.

Each geometry has one file: a header, a byte a probe that says whether its pixels are there, and the pixels of all
probes. Nobody builds it: whoever needs probes that are not there adds those, so that the work done on a node is the
union of what its models need, and nothing twice. A worker claims what it adds by locking that probe's byte, with locks
that belong to an open file and that the kernel takes back when their holder dies (open file description locks,
fcntl(2), Linux); what others have claimed it leaves for last and waits for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import mmap
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from probelog.models.preprocessing import Recipe
from probelog.storage.encoding import short_key

_CLAIM = 16  # probes claimed at a time: few, so that workers meet at the last few only
_HEADER_BYTES = 512
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Without such locks (outside of Linux) there is no cache, and every model prepares its own probes.
_LOCKS = hasattr(fcntl, "F_OFD_SETLK")


class PixelCache:
    """Probes of one probe set, after the geometry of each recipe in use, as arrays on local disk.

    When a new array would exceed ``max_bytes`` (files count with their full size, though they take up disk only as
    they fill), those unused for longest are removed; whoever has one mapped keeps it until done. Any number of
    processes and threads may share a folder, also with different probe sets.

    A probe counts as there only after its pixels were written, so that a worker killed in the middle leaves nothing
    half done. What was on its way from memory to disk when the *machine* went down is lost; arrays made before the
    last boot are therefore never read.
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
        self, recipe: Recipe, images: Callable[[Sequence[int]], Sequence[Image.Image]], indices: Sequence[int]
    ) -> npt.NDArray[Any] | None:
        """The geometry of probes: (count, C, H, W), read-only and memory-mapped, to be indexed by probe number.

        Only the rows named in ``indices`` are sure to hold pixels. None where the array would not fit into
        ``max_bytes`` or the disk is full: compute what is needed instead. ``images`` gives probes by index and is
        called for those that nobody has added yet; what it raises passes, and what was added before stays.
        """
        if not _LOCKS or self.count == 0:
            return None
        layout = _Layout(self.count, recipe.shape, recipe.dtype)
        if layout.size > self.max_bytes:
            return None
        name = short_key(self.probe_set, self.count, recipe.geometry_key, _boot_id())
        try:
            with self._opened(name, layout) as stream:
                if stream is None:
                    return None
                _Filling(stream, layout, recipe, images).fill(sorted({int(index) for index in indices}))
                return layout.map(stream)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                # An array that does not fit must not hold what room there is: models have to be downloaded.
                (self.folder / f"{name}.pixels").unlink(missing_ok=True)
                return None
            raise

    @contextlib.contextmanager
    def _opened(self, name: str, layout: _Layout) -> Iterator[IO[bytes] | None]:
        """The array's file, made if need be; None where there is no room for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"{name}.pixels"
        stream = _open(target, layout)
        if stream is None:
            with self._alone():
                stream = _open(target, layout)  # another worker may have made it meanwhile
                if stream is None and self._make_room(layout.size, target):
                    layout.create(target)
                    stream = _open(target, layout)
        try:
            if stream is not None:
                os.utime(stream.fileno())  # used now
            yield stream
        finally:
            if stream is not None:
                stream.close()

    def _make_room(self, size: int, target: Path) -> bool:
        """Remove the target itself (it is damaged, if it is there), then arrays, longest unused first, until
        ``size`` more bytes fit; says whether they do, and whether the disk has room for them now.
        """
        target.unlink(missing_ok=True)
        known = {path: path.stat() for path in self.folder.iterdir() if path.suffix in (".pixels", ".new")}
        used = sum(status.st_size for status in known.values())
        for path in sorted(known, key=lambda path: (path.suffix, known[path].st_mtime_ns)):
            if path.suffix != ".new" and used + size <= self.max_bytes:
                break
            path.unlink()  # a file not yet renamed is one whose maker died: only one worker is here at a time
            used -= known[path].st_size
        return used + size <= self.max_bytes and size <= shutil.disk_usage(self.folder).free

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One worker at a time, for making and removing files."""
        with open(self.folder / "room.lock", "w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


class _Layout:
    """Where things are in an array's file."""

    def __init__(self, count: int, shape: tuple[int, int, int], dtype: str) -> None:
        self.count, self.shape, self.dtype = count, shape, dtype
        self.each = int(np.prod(shape)) * np.dtype(dtype).itemsize
        facts = json.dumps({"count": count, "shape": shape, "dtype": dtype, "version": 1})
        self.header = facts.encode().ljust(_HEADER_BYTES)
        ends = _HEADER_BYTES + count
        self.first = -(-ends // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self.size = self.first + count * self.each

    def create(self, target: Path) -> None:
        """An array without any probe; appears whole, by rename."""
        new = target.with_suffix(".new")
        with open(new, "wb") as stream:
            stream.write(self.header)
            stream.truncate(self.size)
        os.replace(new, target)

    def ready(self, stream: IO[bytes]) -> npt.NDArray[np.bool_]:
        """Which probes are there, (count,)."""
        return np.frombuffer(os.pread(stream.fileno(), self.count, _HEADER_BYTES), np.bool_)

    def write(self, stream: IO[bytes], index: int, pixels: npt.NDArray[Any]) -> None:
        """Add one probe. Written, not stored through a mapping: a full disk is an error then, not a signal."""
        data = memoryview(pixels.tobytes())
        at = self.first + index * self.each
        while data:
            written = os.pwrite(stream.fileno(), data, at)
            data, at = data[written:], at + written
        os.pwrite(stream.fileno(), b"\1", _HEADER_BYTES + index)

    def map(self, stream: IO[bytes]) -> npt.NDArray[Any]:
        """All probes, (count, C, H, W), read-only; it outlives the file's name."""
        return np.memmap(
            stream, np.dtype(self.dtype), mode="r", offset=self.first, shape=(self.count, *self.shape)
        )


class _Filling:
    """One worker adding the probes that it needs to an array."""

    def __init__(
        self,
        stream: IO[bytes],
        layout: _Layout,
        recipe: Recipe,
        images: Callable[[Sequence[int]], Sequence[Image.Image]],
    ) -> None:
        self._stream, self._layout, self._recipe, self._images = stream, layout, recipe, images

    def fill(self, indices: Sequence[int]) -> None:
        """Return when all of them are there."""
        ready = self._layout.ready(self._stream)
        missing = [index for index in indices if not ready[index]]
        claimed_by_others = []
        mine: list[int] = []
        for index in missing:
            if not self._claim(index, wait=False):
                claimed_by_others.append(index)
                continue
            mine.append(index)
            if len(mine) == _CLAIM:
                self._add(mine)
                mine = []
        self._add(mine)
        # Nothing is held while waiting for others, so that no two workers can wait for each other.
        for index in claimed_by_others:
            self._claim(index, wait=True)
            self._add([index])

    def _add(self, claimed: Sequence[int]) -> None:
        """Make and write the claimed probes that nobody added before they were claimed; give the claims back."""
        if not claimed:
            return
        ready = self._layout.ready(self._stream)
        lacking = [index for index in claimed if not ready[index]]
        if lacking:
            for index, row in zip(lacking, self._recipe.geometry(self._images(lacking)), strict=True):
                self._layout.write(self._stream, index, row)
        for index in claimed:
            self._lock(index, fcntl.F_UNLCK, wait=False)

    def _claim(self, index: int, *, wait: bool) -> bool:
        try:
            self._lock(index, fcntl.F_WRLCK, wait=wait)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def _lock(self, index: int, kind: int, *, wait: bool) -> None:
        # struct flock: type, whence (0: from the start), start, length, process (0 for this sort of lock).
        region = struct.pack("hhqqi0q", kind, 0, _HEADER_BYTES + index, 1, 0)
        fcntl.fcntl(self._stream, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, region)


def _open(path: Path, layout: _Layout) -> IO[bytes] | None:
    """A whole array's file; None where there is none, or another one under its name."""
    try:
        stream = open(path, "r+b", buffering=0)  # noqa: SIM115 - the caller closes it
    except FileNotFoundError:
        return None
    if os.fstat(stream.fileno()).st_size != layout.size or stream.read(_HEADER_BYTES) != layout.header:
        stream.close()
        return None
    return stream


@functools.cache
def _boot_id() -> str:
    """What changes when the machine starts again; where it cannot be told, every process is on its own."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return uuid.uuid4().hex

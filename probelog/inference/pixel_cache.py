"""Preprocessed probes, kept once per node: a bounded folder of arrays that trusted processes fill and models read.

Each geometry has one file: a header, a byte a probe that says whether its pixels are there, a digest a probe, and the
pixels of all probes. Nobody builds it: whoever needs probes that are not there adds those, so that the work done on a
node is the union of what its models need. A process claims what it adds by locking a byte that stands for the probe,
with locks that belong to an open file and that the kernel takes back when their holder dies (open file description
locks, fcntl(2), Linux); what others have claimed it leaves for last and waits for.

A claim only spares work: pixels made twice are the same pixels. So whoever holds claims and gets nothing done is not
waited for. The locks lie in a folder of their own (`locks_folder`).

A model's process can open the arrays for reading only. It reads them against the digests that a trusted process gave
it: pixels that changed after they were written are an error, never another answer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import mmap
import os
import shutil
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from probelog.errors import FailureReason, ItemFailure
from probelog.models.preprocessing import Recipe
from probelog.storage.encoding import short_key

#: Bytes of a probe's digest.
DIGEST_BYTES = 16

Images = Callable[[Sequence[int]], Sequence[Image.Image]]

# Probes claimed at a time: few, so that workers meet at the last few only, and of large ones no more than fit here.
_CLAIM, _CLAIM_BYTES = 16, 32 << 20
# So long nothing may be added by whoever holds a claim or the lock of the folder before this process goes on without.
_STALLED_SECONDS = 20.0
_POLL_SECONDS = 0.01
_HEADER_BYTES = 512
_VERSION = 2
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Without such locks (outside of Linux) there is no cache, and every model prepares its own probes.
_LOCKS = hasattr(fcntl, "F_OFD_SETLK")


class PixelCache:
    """Probes of one probe set, after the geometry of each recipe in use, as arrays on local disk.

    For trusted processes, which may write the folder and the one beside it that holds the locks. Models use
    `cached_pixels`.

    When a new array would exceed ``max_bytes`` (files count with their full size, though they take up disk only as
    they fill), those unused for longest are removed; whoever has one open keeps it until done. Any number of
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
        self._locks = locks_folder(self.folder)

    def __repr__(self) -> str:
        return f"PixelCache({str(self.folder)!r}, {self.max_bytes}, probe_set={self.probe_set!r}, count={self.count})"

    def prepare(self, recipe: Recipe, images: Images, indices: Sequence[int]) -> bytes | None:
        """Add the pixels of the probes named in ``indices`` that are not there; returns the digests of them all,
        `DIGEST_BYTES` each, in the order of ``indices``.

        None where the array would not fit into ``max_bytes`` or the disk is full: compute what is needed instead.
        ``images`` gives probes by index and is called for those that nobody has added yet; what it raises passes,
        and what was added before stays.
        """
        if not _LOCKS or self.count == 0:
            return None
        layout = _Layout(self.probe_set, self.count, recipe)
        if layout.size > self.max_bytes:
            return None
        target = self.folder / layout.name
        try:
            with self._opened(target, layout) as stream, self._lock_file("claims") as claims:
                if stream is None:
                    return None
                _Filling(stream, claims, layout, recipe, images).fill(sorted({int(i) for i in indices}))
                return layout.digests(stream)[np.asarray(indices, np.int64)].tobytes()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                # An array that does not fit must not hold what room there is: models have to be downloaded.
                target.unlink(missing_ok=True)
                return None
            raise

    @contextlib.contextmanager
    def _opened(self, target: Path, layout: _Layout) -> Iterator[IO[bytes] | None]:
        """The array's file, made if need be; None where there is no room for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._locks.mkdir(mode=0o700, exist_ok=True)
        stream = _open(target, "r+b", layout)
        if stream is None:
            with self._alone() as alone:
                stream = _open(target, "r+b", layout)  # another worker may have made it meanwhile
                if stream is None and alone and self._make_room(layout.size, target):
                    layout.create(target)
                    stream = _open(target, "r+b", layout)
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
    def _alone(self) -> Iterator[bool]:
        """One worker at a time, for making and removing files; False where another one does not come to an end."""
        with self._lock_file("room") as stream:
            until = time.monotonic() + _STALLED_SECONDS
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() > until:
                        yield False
                        return
                    time.sleep(_POLL_SECONDS)
                else:
                    yield True
                    return

    def _lock_file(self, name: str) -> IO[bytes]:
        return open(self._locks / name, "ab", buffering=0)


class CachedPixels:
    """The pixels of some probes in a file that trusted processes fill, read against their digests."""

    def __init__(
        self, stream: IO[bytes], path: Path, layout: _Layout, indices: Sequence[int], digests: bytes
    ) -> None:
        self._stream, self._path, self._layout = stream, path, layout
        each = DIGEST_BYTES
        if len(digests) != each * len(indices):
            raise ValueError(f"{len(digests)} bytes of digests for {len(indices)} probes")
        self._digests = {
            int(index): digests[at : at + each]
            for at, index in zip(range(0, len(digests), each), indices, strict=True)
        }

    def rows(self, indices: Sequence[int]) -> npt.NDArray[Any]:
        """The pixels of probes, (n, C, H, W): a copy, which is what was checked.

        Raises:
            ItemFailure: INTERNAL where they are not what their digests were made of.
        """
        layout = self._layout
        batch = np.empty((len(indices), *layout.shape), layout.dtype)
        for row, index in zip(batch.view(np.uint8).reshape(len(indices), -1), indices, strict=True):
            size = os.preadv(self._stream.fileno(), [row.data], layout.at(index))
            if size != layout.each or _digest(row.data) != self._digests[int(index)]:
                raise ItemFailure(
                    FailureReason.INTERNAL,
                    f"the preprocessed pixels of probe {index} in {self._path} changed after they were written: "
                    "remove that file and run again",
                )
        return batch


@contextlib.contextmanager
def cached_pixels(
    folder: str | os.PathLike[str],
    recipe: Recipe,
    indices: Sequence[int],
    digests: bytes | None,
    *,
    probe_set: str,
    count: int,
) -> Iterator[CachedPixels | None]:
    """What `PixelCache.prepare` put into a folder for these probes, of which it returned these digests.

    Nothing is made, locked, marked as used or removed. None where there are no digests, or where the file has been
    removed since: compute what is needed instead.
    """
    layout = _Layout(probe_set, count, recipe)
    path = Path(folder, layout.name)
    stream = None if digests is None else _open(path, "rb", layout)
    if stream is None or digests is None:
        yield None
        return
    with stream:
        # Made anew since, it need not hold these probes yet; what it holds once it keeps while it is open.
        complete = layout.ready(stream)[np.asarray(indices, np.int64)].all()
        yield CachedPixels(stream, path, layout, indices, digests) if complete else None


class _Layout:
    """Where things are in an array's file, and its name."""

    def __init__(self, probe_set: str, count: int, recipe: Recipe) -> None:
        self.count, self.shape, self.dtype = count, recipe.shape, recipe.dtype
        self.each = int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize
        facts = {
            "version": _VERSION,
            "probe_set": probe_set,
            "count": count,
            "geometry": recipe.geometry_key,
            "shape": self.shape,
            "dtype": self.dtype,
        }
        self.header = json.dumps(facts).encode().ljust(_HEADER_BYTES)
        self.name = f"{short_key(self.header, _boot_id())}.pixels"
        self._digests_at = len(self.header) + count
        ends = self._digests_at + count * DIGEST_BYTES
        self._first = -(-ends // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self.size = self._first + count * self.each

    def at(self, index: int) -> int:
        """Where the pixels of a probe begin."""
        return self._first + int(index) * self.each

    def create(self, target: Path) -> None:
        """An array without any probe; appears whole, by rename."""
        new = target.with_suffix(".new")
        with open(new, "wb") as stream:
            stream.write(self.header)
            stream.truncate(self.size)
        os.replace(new, target)

    def ready(self, stream: IO[bytes]) -> npt.NDArray[np.bool_]:
        """Which probes are there, (count,)."""
        return np.frombuffer(os.pread(stream.fileno(), self.count, len(self.header)), np.bool_)

    def digests(self, stream: IO[bytes]) -> npt.NDArray[np.uint8]:
        """Those of all probes, (count, DIGEST_BYTES); zeros for a probe that is not there."""
        data = os.pread(stream.fileno(), self.count * DIGEST_BYTES, self._digests_at)
        return np.frombuffer(data, np.uint8).reshape(self.count, DIGEST_BYTES)

    def write(self, stream: IO[bytes], index: int, pixels: npt.NDArray[Any]) -> None:
        """Add one probe. Written, not stored through a mapping: a full disk is an error then, not a signal."""
        data = pixels.tobytes()
        _write(stream, data, self.at(index))
        _write(stream, _digest(data), self._digests_at + index * DIGEST_BYTES)
        _write(stream, b"\1", len(self.header) + index)


class _Filling:
    """One process adding the probes that it needs to an array."""

    def __init__(
        self, stream: IO[bytes], claims: IO[bytes], layout: _Layout, recipe: Recipe, images: Images
    ) -> None:
        self._stream, self._claims, self._layout = stream, claims, layout
        self._recipe, self._images = recipe, images
        self._at_once = max(1, min(_CLAIM, _CLAIM_BYTES // layout.each))
        # A range of the lock file for each array. Two that fell together would wait for each other's claims, no more.
        self._first = int(layout.name[:8], 16) << 30

    def fill(self, indices: Sequence[int]) -> None:
        """Return when all of them are there."""
        until, stalled = time.monotonic() + _STALLED_SECONDS, False
        missing = self._missing(indices)
        while missing:
            part = missing[: self._at_once] if stalled else self._claim(missing)
            if part:
                self._add(part)
            else:  # nothing is held while waiting for others, so that no two can wait for each other
                time.sleep(_POLL_SECONDS)
            previous, missing = missing, self._missing(missing)
            if len(missing) < len(previous):
                until = time.monotonic() + _STALLED_SECONDS
            stalled = stalled or time.monotonic() > until

    def _missing(self, indices: Sequence[int]) -> list[int]:
        ready = self._layout.ready(self._stream)
        return [index for index in indices if not ready[index]]

    def _claim(self, missing: Sequence[int]) -> list[int]:
        """Some of them that nobody else has claimed."""
        claimed: list[int] = []
        for index in missing:
            if self._lock(index, fcntl.F_WRLCK):
                claimed.append(index)
                if len(claimed) == self._at_once:
                    break
        return claimed

    def _add(self, claimed: Sequence[int]) -> None:
        """Make and write those that nobody added before they were claimed; give the claims back."""
        missing = self._missing(claimed)
        if missing:
            for index, row in zip(missing, self._recipe.geometry(self._images(missing)), strict=True):
                self._layout.write(self._stream, index, row)
        for index in claimed:
            self._lock(index, fcntl.F_UNLCK)

    def _lock(self, index: int, kind: int) -> bool:
        # struct flock: type, whence (0: from the start), start, length, process (0 for this sort of lock).
        region = struct.pack("hhqqi0q", kind, 0, self._first + index, 1, 0)
        try:
            fcntl.fcntl(self._claims, fcntl.F_OFD_SETLK, region)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True


def _open(path: Path, mode: str, layout: _Layout) -> IO[bytes] | None:
    """A whole array's file; None where there is none, or another one under its name."""
    try:
        stream: IO[bytes] = open(path, mode, buffering=0)  # noqa: SIM115 - the caller closes it
    except FileNotFoundError:
        return None
    if os.fstat(stream.fileno()).st_size != layout.size or stream.read(len(layout.header)) != layout.header:
        stream.close()
        return None
    return stream


def _write(stream: IO[bytes], data: bytes, at: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(stream.fileno(), left, at)
        left, at = left[written:], at + written


def _digest(pixels: bytes | memoryview) -> bytes:
    # Half as fast again as BLAKE2 on processors with instructions for it, which all of the last years have.
    return hashlib.sha256(pixels).digest()[:DIGEST_BYTES]


def locks_folder(folder: Path) -> Path:
    """Where those who fill a cache's folder lock. Out of the reach of models: who may only read can lock too."""
    return folder.with_name(f"{folder.name}-locks")


@functools.cache
def _boot_id() -> str:
    """What changes when the machine starts again; where it cannot be told, every process is on its own."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return uuid.uuid4().hex

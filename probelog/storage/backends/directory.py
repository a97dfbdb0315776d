"""A directory of this machine, or of a file system that is mounted here.

No library's own writer will do: what a writer returned from must be on disk after a power failure, and a pointer must be
swapped by one writer alone.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs

from probelog.storage.backends.backend import TEMPORARY, ArrowBackend


class Directory(ArrowBackend):
    advice = "Check that folder and the disk that it lies on."

    def _open_filesystem(self) -> pafs.FileSystem:
        return pafs.LocalFileSystem()

    def read(self, name: str) -> bytes:
        return self._file(name).read_bytes()

    def time(self) -> dt.datetime:
        folder = Path(self.root)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=TEMPORARY) as probe:
            return dt.datetime.fromtimestamp(os.fstat(probe.fileno()).st_mtime, dt.UTC)

    def write(self, name: str, data: bytes) -> None:
        target = self._file(name)
        with _written_beside(target, data) as temporary:
            os.replace(temporary, target)

    def create(self, name: str, data: bytes) -> bool:
        target = self._file(name)
        with _written_beside(target, data) as temporary:
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
        return True

    def swap(self, name: str, data: bytes, expected: bytes | None) -> bool:
        import fcntl  # only where indexes are made, which takes POSIX: readers of one go without

        target = self._file(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_name(f"{TEMPORARY}{target.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (target.read_bytes() if target.exists() else None) != expected:
                return False
            self.write(name, data)
        return True

    def delete(self, name: str) -> None:
        self._file(name).unlink(missing_ok=True)

    def explain(self, error: Exception) -> tuple[str, str]:
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT):
            return str(error), "Make room there."
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return str(error), "Check who may read and write there."
        return super().explain(error)

    def _file(self, name: str) -> Path:
        return Path(self.key(name))


@contextlib.contextmanager
def _written_beside(target: Path, data: bytes) -> Iterator[Path]:
    """A temporary file next to the target, durable on disk; removed afterwards if it is still there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY}{target.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

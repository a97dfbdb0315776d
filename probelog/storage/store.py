"""Objects in a store: a directory or an object-store prefix, written whole or not at all.

Every write is one atomic step: on local disk a temporary file, fsync and rename; on an object store a single put of bytes
that were serialised in memory.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from probelog.errors import ConflictError, SchemaVersionError, StoreError, UsageError
from probelog.storage.backends.backend import Backend, Bucket, ObjectInfo, without_keys
from probelog.storage.backends.cloud import Azure, Google
from probelog.storage.backends.directory import Directory
from probelog.storage.backends.s3 import S3
from probelog.storage.checksummed_json import sealed_json, unsealed_json

_FIRST_WAIT, _LONGEST_WAIT = 0.25, 30.0
_CHUNK = 4 << 20
_READ, _WRITTEN, _DELETED, _TIMED = "read", "written", "deleted", "asked for the time"
# The kinds of object stores by their addresses' scheme.
_BUCKETS: dict[str, type[Bucket]] = {"s3": S3, "gs": Google, "az": Azure}

Result = TypeVar("Result")
_log = logging.getLogger(__name__)


def retry_with_backoff(call: Callable[[], Result], seconds: float) -> Result:
    """The result of a call that may be repeated, tried again while the store refuses.

    Waits grow from a quarter of a second to half a minute, each drawn from the upper half of its range, so that
    two hundred workers do not come back at once.

    Args:
        call: writes to (or reads from) a store; doing it twice must be doing it once.
        seconds: after so long without success the last error is raised.

    Raises:
        FileNotFoundError, ConflictError, SchemaVersionError: at once; waiting cures none of them.
        StoreError: when the time is over.
    """
    deadline = time.monotonic() + seconds
    wait = _FIRST_WAIT
    while True:
        try:
            return call()
        except (FileNotFoundError, ConflictError, SchemaVersionError):
            raise
        except StoreError as error:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise
            _log.warning("the store refused (%s); trying again for %.0f s more", error, remaining)
        time.sleep(min(remaining, random.uniform(0.5, 1.0) * wait))  # noqa: S311 - spreads load, guards nothing
        wait = min(2 * wait, _LONGEST_WAIT)


class Store:
    """A directory (``/data/store``, ``file:///data/store``) or an object-store prefix (``s3://bucket/prefix``,
    ``gs://bucket/prefix``, ``az://container/prefix``).

    Paths are relative to the store, with ``/`` between names. Credentials and endpoints of object stores come
    from the environment (``AWS_*``, ``GOOGLE_*``, ``AZURE_*``).
    Cheap to make and to pickle: connections open when first used.

    Where a disk or an object store fails, every operation raises a StoreError that names the object and what to check,
    with the library's own error as its cause; where there is no such object, reading it raises FileNotFoundError.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        text = os.fspath(uri)
        if not text.strip():
            raise UsageError("the store's address is empty: give a directory or s3://bucket/prefix")
        split = urlsplit(text)
        self.scheme = split.scheme if "://" in text else "file"
        kind = _BUCKETS.get(self.scheme)
        without_keys("the store's address", text, (kind or S3).keys)
        self._backend: Backend
        if self.scheme == "file":
            local = split.path if "://" in text else text
            self.root = Path(local).expanduser().absolute().as_posix()
            self.uri = self.root
            self._backend = Directory(self.root)
        elif kind is not None:
            if not split.netloc:
                raise UsageError(f"{text!r} names no bucket: write {self.scheme}://bucket/prefix")
            if split.query:
                raise UsageError(f"{text!r}: leave out the '?' and what follows it; keys go into {kind.keys}")
            self.root = (split.netloc + split.path).rstrip("/")
            self.uri = f"{self.scheme}://{self.root}"
            self._backend = kind(self.root)
        else:
            raise UsageError(
                f"{text!r}: the store must be a directory or an s3://, gs:// or az:// address, not {self.scheme}://"
            )

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.uri}

    def __setstate__(self, state: dict[str, str]) -> None:
        Store.__init__(self, state["uri"])

    @property
    def is_local(self) -> bool:
        """Whether the store is a directory of this machine (or of a file system that is mounted here)."""
        return self.scheme == "file"

    def child(self, name: str) -> Store:
        """The store that begins at a folder of this one."""
        return Store(f"{self.uri}/{name}")

    def path(self, name: str) -> str:
        """The full address of an object, for libraries that open it themselves.

        Raises:
            StoreError: the name is absolute or climbs out of the store.
        """
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise StoreError(f"{name!r} is not a path inside the store")
        return f"{self.uri}/{name}" if name else self.uri

    # Reading

    def read(self, name: str, most: int | None = None) -> bytes:
        """The bytes of one object, at most so many. Raises FileNotFoundError where there is none."""
        if most is None:
            with self._explained(name, _READ):
                return self._backend.read(self._checked(name))
        with self.open(name) as stream:
            if stream.size() > most:
                raise StoreError(f"{self.path(name)} has {stream.size()} bytes; at most {most} are read")
            return bytes(stream.read())

    def read_or_none(self, name: str, most: int | None = None) -> bytes | None:
        """The bytes of one object, at most so many, or None where there is none."""
        try:
            return self.read(name, most)
        except FileNotFoundError:
            return None

    def exists(self, name: str) -> bool:
        """Whether an object (not a folder) of this name is there."""
        return self._info(name) is not None

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Names of the objects below a folder, relative to the store, sorted; empty where there is no folder."""
        return sorted(name for name in self.sizes(folder) if name.endswith(suffix))

    def folders(self, folder: str) -> list[str]:
        """The folders directly below a folder, relative to the store, sorted; what is in them is not listed."""
        with self._explained(folder, _READ):
            return sorted(self._backend.folders(self._checked(folder)))

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of the objects below a folder, by name; empty where there is no folder."""
        with self._explained(folder, _READ):
            return self._backend.sizes(self._checked(folder))

    def measure(self, name: str) -> tuple[int, str]:
        """Size and SHA-256 of one object, read a few megabytes at a time. Raises FileNotFoundError as ``read``."""
        sha256, size = hashlib.sha256(), 0
        with self.open(name) as stream:
            while chunk := stream.read(_CHUNK):
                sha256.update(chunk)
                size += len(chunk)
        return size, sha256.hexdigest()

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[pa.NativeFile]:
        """One object for reading here and there, in ranges, within a block. Raises FileNotFoundError as ``read``.

        What fails in the block fails as reading the object does (StoreError), also where a library reads the stream.
        """
        with self._explained(name, _READ), self._backend.open(self._checked(name)) as stream:
            yield stream

    def modified(self, name: str) -> dt.datetime | None:
        """When one object was written, by the store's clock; None where there is none."""
        info = self._info(name)
        return None if info is None else info.modified

    def time(self) -> dt.datetime:
        """The time by the store's own clock (the object store's, the file server's), to the second or better.

        Writers on several machines compare ages by it, so that none of their clocks matters.
        """
        with self._explained("", _TIMED):
            return self._backend.time()

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """One Parquet object as a table."""
        data = self.read(name)
        with self._explained(name, _READ):
            return pq.read_table(pa.BufferReader(data), columns=columns)

    # Writing

    def write(self, name: str, data: bytes) -> None:
        """Write one object whole: a reader sees the old bytes or the new ones, never a part."""
        with self._explained(name, _WRITTEN):
            self._backend.write(self._checked(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Write one object only if none of this name exists; says whether it did."""
        with self._explained(name, _WRITTEN):
            return self._backend.create(self._checked(name), data)

    def swap(self, name: str, data: bytes, expected: bytes | None) -> None:
        """Replace one object if it still holds ``expected`` (None: if it does not exist).

        Contents are compared, so every content must be written once only (hold a number that grows): then one that
        is there again was never away, and a put whose answer was lost is known by what it wrote.

        Raises:
            ConflictError: somebody else wrote it first; nothing was changed.
        """
        with self._explained(name, _WRITTEN):
            swapped = self._backend.swap(self._checked(name), data, expected)
        if not swapped:
            raise ConflictError(
                f"{self.path(name)} was changed by somebody else meanwhile; nothing was written. Run again."
            )

    def delete(self, name: str) -> None:
        """Remove one object; no error where there is none."""
        with self._explained(name, _DELETED):
            self._backend.delete(self._checked(name))

    def delete_folder(self, folder: str) -> None:
        """Remove everything below a folder; no error where there is none."""
        if not folder:
            raise StoreError("refusing to delete a whole store")
        with self._explained(folder, _DELETED), contextlib.suppress(FileNotFoundError):
            self._backend.delete_folder(self._checked(folder))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one object as JSON with sorted keys and a seal (`sealed_json`)."""
        self.write(name, sealed_json(value))

    def read_json(self, name: str) -> dict[str, Any]:
        """One JSON object, without its seal.

        Raises:
            FileNotFoundError: there is none.
            StoreError: it is not JSON, or not what its seal was made for.
        """
        return unsealed_json(self.read(name), self.path(name))

    def read_json_or_none(self, name: str) -> dict[str, Any] | None:
        """One JSON object, without its seal; None where there is none.

        Raises:
            StoreError: it is not JSON, or not what its seal was made for.
        """
        data = self.read_or_none(name)
        return None if data is None else unsealed_json(data, self.path(name))

    def records(self, folder: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The JSON objects of one name in the folders directly below a folder, each with its folder.

        Raises:
            StoreError: as ``read_json``.
        """
        for path in self.folders(folder):
            content = self.read_json_or_none(f"{path}/{name}")
            if content is not None:
                yield path, content

    # Behind the scenes

    def _checked(self, name: str) -> str:
        self.path(name)  # refuses names that climb out
        return name

    def _info(self, name: str) -> ObjectInfo | None:
        with self._explained(name, _READ):
            return self._backend.info(self._checked(name))

    @contextlib.contextmanager
    def _explained(self, name: str, done: str) -> Iterator[None]:
        """What the libraries of disks and object stores raise, as an error that says what to check."""
        try:
            yield
        except self._backend.errors() as error:
            # To a reader it means that there is no such object. A writer has lost its folder.
            if isinstance(error, FileNotFoundError) and done == _READ:
                raise
            message, advice = self._backend.explain(error)
            raise StoreError(f"{self.path(name)} cannot be {done}: {message}. {advice}") from error


def lance_options(uri: str) -> dict[str, str]:
    """LanceDB's ``storage_options`` for an address, from the same environment variables as the store's."""
    kind = _BUCKETS.get(uri.partition("://")[0])
    return {} if kind is None else kind.lance_options()

"""Objects in a store: a directory or an object-store prefix, written whole or not at all.

Every write is one atomic step: on local disk a temporary file, fsync and rename; on an object store a single
put of bytes that were serialised in memory (an exception inside pyarrow's S3 output stream publishes the
truncated object, so streams are never used for writing).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import hashlib
import logging
import os
import random
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from probelog.credentials import redacted, without_logins
from probelog.errors import ConflictError, SchemaVersionError, StoreError, UsageError
from probelog.storage.checksummed_json import sealed_json, unsealed_json

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_TEMPORARY = ".tmp-"
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 30.0
_SWAP_ATTEMPTS = 5
_CHUNK = 4 << 20
_READ, _WRITTEN, _DELETED = "read", "written", "deleted"

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
    """A directory (``/data/store``, ``file:///data/store``) or an object-store prefix (``s3://bucket/prefix``).

    Paths are relative to the store, with ``/`` between names. Credentials and endpoints of object stores come
    from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``).
    Cheap to make and to pickle: connections open when first used.

    Where a disk or an object store fails, every operation raises a StoreError that names the object and what to check,
    with the library's own error as its cause; where there is no such object, reading it raises FileNotFoundError.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        text = os.fspath(uri)
        if not text.strip():
            raise UsageError("the store's address is empty: give a directory or s3://bucket/prefix")
        _refuse_keys("the store's address", text)
        split = urlsplit(text)
        self.scheme = split.scheme if "://" in text else "file"
        if self.scheme == "file":
            local = split.path if "://" in text else text
            self.root = Path(local).expanduser().absolute().as_posix()
            self.uri = self.root
        elif self.scheme == "s3":
            if not split.netloc:
                raise UsageError(f"{text!r} names no bucket: write s3://bucket/prefix")
            self.root = (split.netloc + split.path).rstrip("/")
            self.uri = f"s3://{self.root}"
        else:
            raise UsageError(
                f"{text!r}: the store must be a directory or an s3:// address, not {self.scheme}://"
            )
        self._open: pafs.FileSystem | None = None
        self._s3: S3Client | None = None
        self._lock = threading.Lock()

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
        if self.is_local and most is None:
            with self._explained(name, _READ):
                return Path(self.path(name)).read_bytes()
        with self.open(name) as stream:
            if most is not None and stream.size() > most:
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
        return bool(self._info(name).type == pafs.FileType.File)

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Names of the objects below a folder, relative to the store, sorted; empty where there is no folder."""
        return sorted(name for name in self.sizes(folder) if name.endswith(suffix))

    def folders(self, folder: str) -> list[str]:
        """The folders directly below a folder, relative to the store, sorted; what is in them is not listed."""
        selector = pafs.FileSelector(self._key(folder), allow_not_found=True)
        base = self.root.rstrip("/") + "/"
        with self._explained(folder, _READ):
            infos = self._filesystem().get_file_info(selector)
        return sorted(info.path.removeprefix(base) for info in infos if info.type == pafs.FileType.Directory)

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of the objects below a folder, by name; empty where there is no folder."""
        selector = pafs.FileSelector(self._key(folder), allow_not_found=True, recursive=True)
        base = self.root.rstrip("/") + "/"
        with self._explained(folder, _READ):
            infos = self._filesystem().get_file_info(selector)
        return {
            info.path.removeprefix(base): int(info.size)
            for info in infos
            if info.type == pafs.FileType.File and not info.base_name.startswith(_TEMPORARY)
        }

    def measure(self, name: str) -> tuple[int, str]:
        """Size and SHA-256 of one object, read a few megabytes at a time. Raises FileNotFoundError as ``read``."""
        sha256, size = hashlib.sha256(), 0
        with (
            self._explained(name, _READ),
            self._filesystem().open_input_stream(self._key(name)) as stream,
        ):
            while chunk := stream.read(_CHUNK):
                sha256.update(chunk)
                size += len(chunk)
        return size, sha256.hexdigest()

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[pa.NativeFile]:
        """One object for reading here and there, in ranges, within a block. Raises FileNotFoundError as ``read``.

        What fails in the block fails as reading the object does (StoreError), also where a library reads the stream.
        """
        with (
            self._explained(name, _READ),
            self._filesystem().open_input_file(self._key(name)) as stream,
        ):
            yield stream

    def modified(self, name: str) -> dt.datetime | None:
        """When one object was written, by the store's clock; None where there is none."""
        info = self._info(name)
        return info.mtime if info.type == pafs.FileType.File else None

    def time(self) -> dt.datetime:
        """The time by the store's own clock (the object store's, the file server's), to the second or better.

        Writers on several machines compare ages by it, so that none of their clocks matters.
        """
        if not self.is_local:
            with self._explained("", _READ):
                # Below the store's own prefix: credentials may be good for nothing else.
                prefix = self.root.partition("/")[2]
                listing = self._client().list_objects_v2(Bucket=self._bucket, Prefix=prefix, MaxKeys=1)
            return parsedate_to_datetime(listing["ResponseMetadata"]["HTTPHeaders"]["date"])
        folder = Path(self.root)
        with self._explained("", _WRITTEN):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, prefix=_TEMPORARY) as probe:
                return dt.datetime.fromtimestamp(os.fstat(probe.fileno()).st_mtime, dt.UTC)

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """One Parquet object as a table."""
        data = self.read(name)
        with self._explained(name, _READ):
            return pq.read_table(pa.BufferReader(data), columns=columns)

    # Writing

    def write(self, name: str, data: bytes) -> None:
        """Write one object whole: a reader sees the old bytes or the new ones, never a part."""
        with self._explained(name, _WRITTEN):
            if not self.is_local:
                self._client().put_object(Bucket=self._bucket, Key=self._object_key(name), Body=data)
                return
            target = Path(self.path(name))
            with _written_beside(target, data) as temporary:
                os.replace(temporary, target)

    def create(self, name: str, data: bytes) -> bool:
        """Write one object only if none of this name exists; says whether it did."""
        if not self.is_local:
            return self._put_if(name, data, None)
        target = Path(self.path(name))
        with self._explained(name, _WRITTEN), _written_beside(target, data) as temporary:
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
        return True

    def swap(self, name: str, data: bytes, expected: bytes | None) -> None:
        """Replace one object if it still holds ``expected`` (None: if it does not exist).

        Contents are compared, so every content must be written once only (hold a number that grows): then one that
        is there again was never away, and a put whose answer was lost is known by what it wrote.

        Raises:
            ConflictError: somebody else wrote it first; nothing was changed.
        """
        message = f"{self.path(name)} was changed by somebody else meanwhile; nothing was written. Run again."
        if self.is_local:
            target = Path(self.path(name))
            import fcntl  # only where indexes are made, which takes POSIX: readers of one go without

            with self._explained(name, _WRITTEN):
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target.with_name(_TEMPORARY + target.name + ".lock"), "w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if self.read_or_none(name) != expected:
                        raise ConflictError(message)
                    self.write(name, data)
            return
        for _ in range(_SWAP_ATTEMPTS):
            current, tag = self._tagged(name)
            if current != expected:
                break
            if self._put_if(name, data, tag):
                return
            # Refused: another content (seen next time), an attempt of this very put that had arrived before the
            # library repeated it, or 409, somebody is writing at this moment and may yet fail.
        if self._tagged(name)[0] != data:
            raise ConflictError(message)

    def _tagged(self, name: str) -> tuple[bytes | None, str | None]:
        """What an object of an object store holds, and the tag of that version."""
        with self._explained(name, _READ):
            client = self._client()
            try:
                response = client.get_object(Bucket=self._bucket, Key=self._object_key(name))
                return response["Body"].read(), str(response["ETag"])
            except client.exceptions.NoSuchKey:
                return None, None

    def delete(self, name: str) -> None:
        """Remove one object; no error where there is none."""
        with self._explained(name, _DELETED):
            if self.is_local:
                Path(self.path(name)).unlink(missing_ok=True)
            else:
                self._client().delete_object(Bucket=self._bucket, Key=self._object_key(name))

    def delete_folder(self, folder: str) -> None:
        """Remove everything below a folder; no error where there is none."""
        if not folder:
            raise StoreError("refusing to delete a whole store")
        with self._explained(folder, _DELETED), contextlib.suppress(FileNotFoundError):
            self._filesystem().delete_dir(self._key(folder))

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

    def _key(self, name: str) -> str:
        self.path(name)  # refuses names that climb out
        return f"{self.root}/{name}".rstrip("/")

    def _info(self, name: str) -> pafs.FileInfo:
        with self._explained(name, _READ):
            return self._filesystem().get_file_info(self._key(name))

    @property
    def _bucket(self) -> str:
        return self.root.split("/", 1)[0]

    def _object_key(self, name: str) -> str:
        return self._key(name).split("/", 1)[1]

    def _filesystem(self) -> pafs.FileSystem:
        with self._lock:
            if self._open is None:
                self._open = pafs.LocalFileSystem() if self.is_local else _s3_filesystem()
            return self._open

    def _client(self) -> S3Client:
        # boto3 rather than pyarrow: pyarrow has no conditional put. Writers only, so the query client goes without.
        with self._lock:
            if self._s3 is None:
                try:
                    import boto3
                except ImportError as error:
                    raise UsageError("writing to s3:// needs boto3: install probelog[index]") from error
                self._s3 = boto3.client("s3", endpoint_url=_s3_endpoint())
            return self._s3

    def _put_if(self, name: str, data: bytes, tag: str | None) -> bool:
        """Put an object that still has this tag (None: that does not exist); says whether it was so."""
        from botocore.exceptions import ClientError

        with self._explained(name, _WRITTEN):
            try:
                put = partial(
                    self._client().put_object, Bucket=self._bucket, Key=self._object_key(name), Body=data
                )
                put(IfNoneMatch="*") if tag is None else put(IfMatch=tag)
            except ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412):
                    return False
                raise
        return True

    @contextlib.contextmanager
    def _explained(self, name: str, done: str) -> Iterator[None]:
        """What the libraries of disks and object stores raise, as an error that says what to check."""
        try:
            yield
        except _library_errors() as error:
            # To a reader it means that there is no such object. A writer has lost its folder.
            if isinstance(error, FileNotFoundError) and done == _READ:
                raise
            raise StoreError(f"{self.path(name)} cannot be {done}: {error}. {self._advice(error)}") from error

    def _advice(self, error: BaseException) -> str:
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT):
            return "Make room there."
        if not self.is_local:
            return "Check the bucket, the AWS_* credentials and AWS_ENDPOINT_URL."
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return "Check who may read and write there."
        return "Check that folder and the disk that it lies on."


def _library_errors() -> tuple[type[Exception], ...]:
    """Those of pyarrow and the operating system, and of boto3 where it was imported: the query client goes without."""
    loaded = sys.modules.get("botocore.exceptions")
    return (OSError, pa.ArrowException, *((loaded.BotoCoreError, loaded.ClientError) if loaded else ()))


def _s3_endpoint() -> str | None:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    if endpoint is not None:
        _refuse_keys("AWS_ENDPOINT_URL", endpoint)
    return endpoint


def _refuse_keys(what: str, address: str) -> None:
    """Keys in the address of a store: no library took them from there, and addresses are recorded and shown.

    Raises:
        UsageError: it has some; says where they belong.
    """
    if without_logins(address) != address:
        raise UsageError(
            f"{what} holds a user or keys ({redacted(address)}): leave them out and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment"
        )


def _s3_filesystem() -> pafs.FileSystem:
    endpoint = _s3_endpoint()
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {"region": region} if region else {}
    if endpoint:
        split = urlsplit(endpoint)
        options |= {"endpoint_override": split.netloc, "scheme": split.scheme}
    return pafs.S3FileSystem(**options)


def lance_options(uri: str) -> dict[str, str]:
    """LanceDB's ``storage_options`` for an address, from the same environment variables as the store's."""
    endpoint = _s3_endpoint()
    if not uri.startswith("s3://") or endpoint is None:
        return {}
    return {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}


@contextlib.contextmanager
def _written_beside(target: Path, data: bytes) -> Iterator[Path]:
    """A temporary file next to the target, durable on disk; removed afterwards if it is still there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{_TEMPORARY}{target.name}-{os.getpid()}-{secrets.token_hex(4)}")
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

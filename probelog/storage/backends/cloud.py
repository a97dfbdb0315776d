"""Google Cloud Storage and Azure Blob Storage, by obstore: Rust's object_store, which LanceDB has too.

So both take credentials and endpoints from the same variables (``GOOGLE_*``, ``AZURE_*``), machine identities included.
"""

from __future__ import annotations

import datetime as dt
import io
import os
import sys
from abc import abstractmethod
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

import pyarrow as pa

from probelog.errors import UsageError
from probelog.storage.backends.backend import TEMPORARY, Bucket, ObjectInfo, without_keys

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

# Of a whole request, body included; the library's own 30 s would end a large object on a slow line.
_CLIENT: ClientConfig = {"timeout": "10m", "read_timeout": "60s", "connect_timeout": "10s"}
_RETRY: RetryConfig = {"max_retries": 4, "retry_timeout": dt.timedelta(seconds=60)}
_CLOCK = f"{TEMPORARY}clock"
_LONGEST_MESSAGE = 400


class Cloud(Bucket):
    """A bucket by way of obstore."""

    #: Variables that name another endpoint than the service's own.
    endpoints: ClassVar[tuple[str, ...]]
    #: What a version of an object is known by, where a put is bound to it.
    mark: ClassVar[str]

    _store: ObjectStore | None = None

    @abstractmethod
    def _open_store(self, client: ClientConfig) -> ObjectStore: ...

    @property
    def store(self) -> ObjectStore:
        with self._lock:
            if self._store is None:
                _obstore()  # else it says what to install
                self._store = self._open_store({**_CLIENT, "allow_http": self._over_http()})
            return self._store

    def read(self, name: str) -> bytes:
        return bytes(_obstore().get(self.store, self.object_key(name)).bytes())

    def open(self, name: str) -> pa.NativeFile:
        key = self.object_key(name)
        size = _obstore().head(self.store, key)["size"]
        return pa.PythonFile(_Ranges(self.store, key, size), mode="r")

    def info(self, name: str) -> ObjectInfo | None:
        try:
            meta = _obstore().head(self.store, self.object_key(name))
        except FileNotFoundError:
            return None
        return ObjectInfo(meta["size"], meta["last_modified"])

    def sizes(self, folder: str) -> dict[str, int]:
        return {
            self._name(path): size
            for path, size in self._listed(folder)
            if not path.rpartition("/")[2].startswith(TEMPORARY)
        }

    def folders(self, folder: str) -> list[str]:
        listed = _obstore().list_with_delimiter(self.store, self.object_key(folder) or None)
        return [self._name(path) for path in listed["common_prefixes"]]

    def _name(self, path: str) -> str:
        base = self.object_key("")
        return path.removeprefix(f"{base}/" if base else "")

    def _listed(self, folder: str) -> list[tuple[str, int]]:
        blocks = _obstore().list(self.store, self.object_key(folder) or None, chunk_size=1000)
        return [(item["path"], item["size"]) for block in blocks for item in block]

    def time(self) -> dt.datetime:
        # No answer that obstore passes on has the service's time but that of an object that was written now.
        self.write(_CLOCK, b"")
        info = self.info(_CLOCK)
        if info is None:
            raise FileNotFoundError(_CLOCK)
        return info.modified

    def tagged(self, name: str) -> tuple[bytes | None, str | None]:
        try:
            result = _obstore().get(self.store, self.object_key(name))
        except FileNotFoundError:
            return None, None
        return bytes(result.bytes()), str(result.meta[self.mark])

    def write(self, name: str, data: bytes) -> None:
        # In one request: an upload in parts that is broken off stays there, hidden and paid for.
        _obstore().put(self.store, self.object_key(name), data, use_multipart=False)

    def put_if(self, name: str, data: bytes, tag: str | None) -> bool:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode = "create" if tag is None else {self.mark: tag}
        try:
            _obstore().put(self.store, self.object_key(name), data, mode=mode, use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            return False
        return True

    def delete(self, name: str) -> None:
        try:
            _obstore().delete(self.store, self.object_key(name))
        except FileNotFoundError:
            return  # as with S3, which does not tell

    def delete_folder(self, folder: str) -> None:
        # One that somebody else deleted meanwhile ends the library's batch: what is left is listed again.
        while names := [path for path, _ in self._listed(folder)]:
            try:
                _obstore().delete(self.store, names)
            except FileNotFoundError:
                continue
            return

    @classmethod
    def lance_options(cls) -> dict[str, str]:
        # Named, so that connections that it keeps are those of this endpoint.
        endpoint = cls._endpoint()
        if not endpoint:
            return {}
        return {cls.endpoints[0].lower(): endpoint, "allow_http": str(cls._over_http()).lower()}

    @classmethod
    def _over_http(cls) -> bool:
        return cls._endpoint().startswith("http://")

    @classmethod
    def _endpoint(cls) -> str:
        endpoint = next(filter(None, map(os.environ.get, cls.endpoints)), "")
        return without_keys(cls.endpoints[0], endpoint, cls.keys)

    def errors(self) -> tuple[type[Exception], ...]:
        loaded = sys.modules.get("obstore.exceptions")
        return (*super().errors(), *((loaded.BaseError,) if loaded else ()))

    def explain(self, error: Exception) -> tuple[str, str]:
        # Without the library's own structures, which it prints behind the message, and on one line.
        message = " ".join(str(error).partition("\n\nDebug source")[0].split())
        return message[:_LONGEST_MESSAGE], self.advice


class Google(Cloud):
    advice = "Check the bucket, GOOGLE_APPLICATION_CREDENTIALS and what that account may do there."
    endpoints = ("GOOGLE_BASE_URL",)
    mark = "version"  # Google's generation: writes are bound to nothing else
    keys = "GOOGLE_APPLICATION_CREDENTIALS"

    def _open_store(self, client: ClientConfig) -> ObjectStore:
        from obstore.store import GCSStore

        return GCSStore(self.bucket, client_options=client, retry_config=_RETRY)


class Azure(Cloud):
    advice = "Check the container, AZURE_STORAGE_ACCOUNT_NAME, and its key or your identity (AZURE_*)."
    endpoints = ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
    mark = "e_tag"
    keys = "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"

    def _open_store(self, client: ClientConfig) -> ObjectStore:
        from obstore.store import AzureStore

        return AzureStore(self.bucket, client_options=client, retry_config=_RETRY)


class _Ranges(io.RawIOBase):
    """One object as a file: each read is one request for just these bytes, as libraries of Parquet plan them."""

    def __init__(self, store: ObjectStore, key: str, size: int) -> None:
        super().__init__()
        self._store, self._key, self._size, self._at = store, key, size, 0

    def read(self, size: int | None = -1, /) -> bytes:
        end = self._size if size is None or size < 0 else min(self._at + size, self._size)
        if self._at >= end:
            return b""
        start, self._at = self._at, end
        return bytes(_obstore().get_range(self._store, self._key, start=start, end=end))

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _obstore() -> ModuleType:
    try:
        import obstore
    except ImportError as error:
        raise UsageError("gs:// and az:// need obstore: install probelog[cloud]") from error
    return obstore

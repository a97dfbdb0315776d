"""What every place that holds objects can do, whatever library reaches it.

Names are relative to the store, with ``/`` between folders; `Store` has checked them. Errors are the library's own
(`Backend.errors`), and a missing object is a FileNotFoundError; `Store` makes one kind of error of them.
"""

from __future__ import annotations

import datetime as dt
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from probelog.credentials import redacted, without_logins
from probelog.errors import UsageError

# How names of files begin that are no objects: half-written ones, locks. They are not listed.
TEMPORARY = ".tmp-"
_SWAP_ATTEMPTS = 5


class ObjectInfo(NamedTuple):
    """Size of an object, and when it was written by the place's clock."""

    size: int
    modified: dt.datetime


class Backend(ABC):
    """One folder of a disk, or one prefix of a bucket. Cheap to make: connections open when first used."""

    #: Said after an error of the library: what to check.
    advice: ClassVar[str]

    def __init__(self, root: str) -> None:
        self.root = root
        self._lock = threading.Lock()

    @abstractmethod
    def read(self, name: str) -> bytes: ...

    @abstractmethod
    def open(self, name: str) -> pa.NativeFile:
        """An object for reading in ranges."""

    @abstractmethod
    def info(self, name: str) -> ObjectInfo | None:
        """None where there is no object of this name."""

    @abstractmethod
    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of the objects below a folder, by name; empty where there is no folder."""

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """The folders directly below a folder; empty where there is none."""

    @abstractmethod
    def time(self) -> dt.datetime:
        """The time by the place's own clock."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """In one step, so that a reader never sees a part."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write an object only if none of this name exists; says whether it did."""

    @abstractmethod
    def swap(self, name: str, data: bytes, expected: bytes | None) -> bool:
        """Replace an object if it still holds ``expected`` (None: does not exist); says whether it did."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """No error where there is none."""

    @abstractmethod
    def delete_folder(self, folder: str) -> None:
        """Likewise."""

    def errors(self) -> tuple[type[Exception], ...]:
        """What the library raises when the place fails."""
        return (OSError, pa.ArrowException)

    def explain(self, error: Exception) -> tuple[str, str]:
        """An error's message, and what to check."""
        return str(error), self.advice

    def key(self, name: str) -> str:
        """The whole path of an object in its disk or bucket."""
        return f"{self.root}/{name}".rstrip("/")


class Bucket(Backend):
    """An object store: every version of an object has a tag, and a put may be bound to it."""

    #: The variables of the environment that hold keys.
    keys: ClassVar[str]

    @classmethod
    @abstractmethod
    def lance_options(cls) -> dict[str, str]:
        """LanceDB's ``storage_options``: what it does not find in the environment by itself."""

    @abstractmethod
    def tagged(self, name: str) -> tuple[bytes | None, str | None]:
        """What an object holds, and the tag of that version; None and None where there is none."""

    @abstractmethod
    def put_if(self, name: str, data: bytes, tag: str | None) -> bool:
        """Put an object that still has this tag (None: that does not exist); says whether it was so."""

    def create(self, name: str, data: bytes) -> bool:
        return self.put_if(name, data, None)

    def swap(self, name: str, data: bytes, expected: bytes | None) -> bool:
        for _ in range(_SWAP_ATTEMPTS):
            current, tag = self.tagged(name)
            if current != expected:
                break
            if self.put_if(name, data, tag):
                return True
            # Refused: another content (seen next time), an attempt of this very put that had arrived before the
            # library repeated it, or 409, somebody is writing at this moment and may yet fail.
        return self.tagged(name)[0] == data

    @property
    def bucket(self) -> str:
        return self.root.split("/", 1)[0]

    def object_key(self, name: str) -> str:
        """The path of an object in its bucket."""
        return self.key(name).partition("/")[2]


class ArrowBackend(Backend):
    """Reads and lists by one of pyarrow's file systems."""

    _opened: pafs.FileSystem | None = None

    @abstractmethod
    def _open_filesystem(self) -> pafs.FileSystem: ...

    @property
    def filesystem(self) -> pafs.FileSystem:
        with self._lock:
            if self._opened is None:
                self._opened = self._open_filesystem()
            return self._opened

    def open(self, name: str) -> pa.NativeFile:
        return self.filesystem.open_input_file(self.key(name))

    def info(self, name: str) -> ObjectInfo | None:
        info = self.filesystem.get_file_info(self.key(name))
        if info.type != pafs.FileType.File or info.mtime is None:
            return None
        return ObjectInfo(info.size, info.mtime)

    def sizes(self, folder: str) -> dict[str, int]:
        return {
            name: int(info.size)
            for name, info in self._listed(folder, recursive=True)
            if info.type == pafs.FileType.File and not info.base_name.startswith(TEMPORARY)
        }

    def folders(self, folder: str) -> list[str]:
        listed = self._listed(folder, recursive=False)
        return [name for name, info in listed if info.type == pafs.FileType.Directory]

    def _listed(self, folder: str, recursive: bool) -> Iterator[tuple[str, pafs.FileInfo]]:
        selector = pafs.FileSelector(self.key(folder), allow_not_found=True, recursive=recursive)
        base = self.root.rstrip("/") + "/"
        for info in self.filesystem.get_file_info(selector):
            yield info.path.removeprefix(base), info

    def delete_folder(self, folder: str) -> None:
        self.filesystem.delete_dir(self.key(folder))


def without_keys(what: str, address: str, variables: str) -> str:
    """The address as it is: no library takes keys from there, and addresses are recorded and shown.

    Raises:
        UsageError: it holds a user or keys; says where they belong.
    """
    if without_logins(address) != address:
        raise UsageError(
            f"{what} holds a user or keys ({redacted(address)}): leave them out and set {variables} in the environment"
        )
    return address

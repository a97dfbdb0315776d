"""The files of a generation in a folder of this machine, before LanceDB opens them.

Whoever made the folder may have put a pipe there, which hangs its reader, a link to any file of this machine, or a
table that names another folder as the place of its data (Lance's base paths).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from probelog.errors import StoreError

_MANIFESTS = "_versions"
_MANIFEST_BYTES = 64 << 20
# ``base_paths`` of Lance's ``Manifest``; its end is the manifest's position, two version numbers and these letters.
_BASE_PATHS = 18
_MAGIC = b"LANC"
_FOOTER_BYTES = 16
_VARINT, _LENGTH = 0, 2
_FIXED = {1: 8, 5: 4}


def check_files(root: Path, folder: Path) -> None:
    """Refuse what leads out of an index that lies at ``root``, in one generation's folder.

    Raises:
        StoreError: a link leads elsewhere, something is no plain file, or a table's data lie elsewhere.
    """
    inside = root.resolve()
    try:
        for entry in _entries(folder):
            if not entry.resolve().is_relative_to(inside):
                raise StoreError(f"{entry} is damaged: it leads out of the index")
            mode = entry.stat().st_mode
            if not stat.S_ISREG(mode):
                raise StoreError(f"{entry} is damaged: it is no plain file")
            if entry.parent.name == _MANIFESTS and entry.suffix == ".manifest":
                with open(entry, "rb") as stream:
                    content = stream.read(_MANIFEST_BYTES)
                if _has_base_paths(content):
                    raise StoreError(f"{entry} is damaged: the table's data lie elsewhere")
    except OSError as error:
        raise StoreError(f"{folder} cannot be read: {error.strerror or error}") from error


def _entries(folder: Path) -> Iterator[Path]:
    """All that is below a folder but folders; links are not followed."""
    for parent, folders, files in os.walk(folder, onerror=_raise):
        for name in files:
            yield Path(parent, name)
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                yield Path(parent, name)


def _raise(error: OSError) -> None:
    raise error


def _has_base_paths(manifest: bytes) -> bool:
    """Whether a manifest names other places for its data, or is too odd to tell."""
    if len(manifest) < _FOOTER_BYTES or not manifest.endswith(_MAGIC):
        return False  # nothing that Lance reads
    start = int.from_bytes(manifest[-_FOOTER_BYTES : -_FOOTER_BYTES + 8], "little") + 4
    size = int.from_bytes(manifest[start - 4 : start], "little")
    message = memoryview(manifest)[start : start + size]
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if number == _BASE_PATHS or wire not in (_VARINT, _LENGTH, *_FIXED):
            return True
        if wire in _FIXED:
            position += _FIXED[wire]
        else:
            value, position = _varint(message, position)
            position += value if wire == _LENGTH else 0
    return False


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends; what breaks off counts as ending there."""
    value = 0
    for place, byte in enumerate(message[position : position + 10]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, position + place + 1
    return value, position + 10

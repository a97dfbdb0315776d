"""Versions of formats: what a newer one is met with."""

from __future__ import annotations

import pyarrow as pa

from probelog.errors import SchemaVersionError, StoreError

NAME_KEY = b"probelog.schema"


VERSION_KEY = b"probelog.version"


def check_version(found: object, known: int, where: str, what: str) -> int:
    """The version of a JSON file, refused where it is newer than the one that is known.

    Raises:
        SchemaVersionError: written by a newer ProbeLog.
        StoreError: no version at all.
    """
    if not isinstance(found, int) or isinstance(found, bool):
        raise StoreError(f"{where} is damaged: {found!r} is not the version of a {what}")
    if found > known:
        raise SchemaVersionError(
            f"{where}: {what} version {found} is newer than this ProbeLog knows ({known}). Upgrade ProbeLog."
        )
    return found


def check_schema(found: pa.Schema, wanted: pa.Schema, where: str) -> None:
    """Refuse a table of another kind or of a newer version.

    Raises:
        SchemaVersionError: written by a newer ProbeLog.
        StoreError: not the kind of table that was expected.
    """
    have, want = found.metadata or {}, wanted.metadata
    if have.get(NAME_KEY) != want[NAME_KEY]:
        raise StoreError(
            f"{where}: expected {want[NAME_KEY].decode()} rows, found {have.get(NAME_KEY, b'something else').decode()}"
        )
    version, known = int(have.get(VERSION_KEY, b"0")), int(want[VERSION_KEY])
    check_version(version, known, where, want[NAME_KEY].decode())

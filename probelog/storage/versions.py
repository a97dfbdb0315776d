"""Versions of formats: every record says which it has and who wrote it, and a newer one is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from probelog import __version__
from probelog.errors import SchemaVersionError, StoreError

NAME_KEY = b"probelog.schema"
VERSION_KEY = b"probelog.version"
MADE_BY_KEY = b"probelog.made_by"
# What every record says of the program that wrote it, so that one that cannot be read says which program can.
MADE_BY = f"probelog {__version__}"
# No format gets so far; a number of thousands of digits would fill a terminal.
_NEVER = 1_000_000
_MADE_BY = re.compile(r"probelog (\d[\w.+-]{0,30})", re.ASCII)


def schema_metadata(name: str, version: int) -> dict[bytes | str, bytes | str]:
    """What the Parquet files of one schema say of themselves."""
    return {NAME_KEY: name.encode(), VERSION_KEY: str(version).encode(), MADE_BY_KEY: MADE_BY.encode()}


def check_version(content: Mapping[str, Any], known: int, where: str, what: str) -> int:
    """The version of a record, by its entries ``version`` and ``made_by``.

    Args:
        content: the record.
        known: the newest version that this program reads.
        where: its address, for messages.
        what: its kind, for messages.

    Raises:
        SchemaVersionError: it is newer; the message names the ProbeLog to get.
        StoreError: it has no version.
    """
    version = content.get("version")
    if type(version) is not int or not 0 < version < _NEVER:
        raise StoreError(
            f"{where} is damaged, or was made before ProbeLog was released: {version!r:.40} is not the version of a {what}"
        )
    if version > known:
        made_by = _MADE_BY.fullmatch(str(content.get("made_by")))
        raise SchemaVersionError(
            f"{where}: {what} version {version} is newer than this ProbeLog knows ({known}). "
            f"Upgrade ProbeLog {__version__}{f' to {made_by[1]} or newer' if made_by else ''}."
        )
    return version


def check_schema(schema: pa.Schema, expected: pa.Schema, where: str) -> None:
    """Refuse a table of another kind, of a newer version, or without one.

    Raises:
        SchemaVersionError: written by a newer ProbeLog.
        StoreError: not the kind of table that was expected.
    """
    actual, known = schema.metadata or {}, expected.metadata
    kind = known[NAME_KEY].decode()
    if actual.get(NAME_KEY) != known[NAME_KEY]:
        raise StoreError(
            f"{where}: expected {kind} rows, found {actual.get(NAME_KEY, b'something else').decode()}"
        )
    version = actual.get(VERSION_KEY, b"")
    content = {
        "version": int(version) if version.isdigit() else None,
        "made_by": actual.get(MADE_BY_KEY, b"").decode("utf-8", "replace"),
    }
    check_version(content, int(known[VERSION_KEY]), where, kind)

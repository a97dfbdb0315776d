"""JSON files that carry their own checksum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from probelog.credentials import without_logins
from probelog.errors import StoreError
from probelog.storage.encoding import digest


def sealed_json(value: Mapping[str, Any], indent: int | None = 1) -> bytes:
    """An object (not empty) as JSON with sorted keys; it ends with a *seal*, the SHA-256 of the file without that entry.

    So a JSON file that says what other files must hold can itself be checked; a program that knows nothing of seals
    reads one key more. Addresses in it name no user and no password.
    """
    body = without_logins(json.dumps(value, indent=indent, sort_keys=True)).encode()
    body = body[:-1].rstrip() + _END
    return body[: -len(_END)] + _seal(body)


def unsealed_json(data: bytes, where: str) -> dict[str, Any]:
    """The object of a JSON file, without its seal.

    Raises:
        StoreError: it is not JSON, or not what its seal was made for, or has none.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where} is damaged: {error}") from error
    if not isinstance(value, dict) or not data.endswith(_seal(data[:-_SEAL_BYTES] + _END)):
        raise StoreError(f"{where} is damaged: it has no seal, or its content is not what it was sealed with")
    del value["seal"]
    return value


_END = b"\n}\n"


def _seal(body: bytes) -> bytes:
    return b',\n "seal": "%s"%s' % (digest(body).encode(), _END)


_SEAL_BYTES = len(_seal(b""))

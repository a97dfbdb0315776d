"""JSON files that carry their own checksum."""

from __future__ import annotations

import json
from typing import Any

from probelog.errors import StoreError
from probelog.storage.encoding import digest


def sealed_json(value: object, indent: int | None = 1) -> bytes:
    """A value as JSON with sorted keys. An object ends with a *seal*, the SHA-256 of its file without that entry.

    So a JSON file that says what other files must hold can itself be checked; a program that knows nothing of seals
    reads one key more. What is no object, or an empty one, is written without.
    """
    body = json.dumps(value, indent=indent, sort_keys=True).encode()
    if not isinstance(value, dict) or not value:
        return body + b"\n"
    body = body[:-1].rstrip() + _END
    return body[: -len(_END)] + _seal(body)


def unsealed_json(data: bytes, where: str) -> tuple[Any, bool]:
    """The value of a JSON file, and whether a seal protects it (files of older versions have none).

    Raises:
        StoreError: it is not JSON, or not what its seal was made for.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where} is damaged: {error}") from error
    body = data[:-_SEAL_BYTES] + _END
    seal = _seal(body)
    if data.endswith(seal) and isinstance(value, dict):
        del value["seal"]
        return value, True
    # The right digest in another frame is one that was damaged.
    framed = digest(body).encode() in data[-_SEAL_BYTES:]
    if framed or (isinstance(value, dict) and "seal" in value):
        raise StoreError(f"{where} is damaged: its content is not what it was sealed with")
    return value, False


_END = b"\n}\n"


def _seal(body: bytes) -> bytes:
    return b',\n "seal": "%s"%s' % (digest(body).encode(), _END)


_SEAL_BYTES = len(_seal(b""))

"""Pictures on the page: those that visitors ask with, and the small ones of probes and of what generators make.

A picture or sketch that somebody asks with is embedded once and not kept: a search's address holds its embedding, a byte for each
dimension. So an address that was sent to a colleague goes on giving answers for as long as the index has this encoder.
"""

from __future__ import annotations

import base64
import binascii
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from probelog.errors import QueryError

_VERSION = 1
_DIGEST_BYTES = 4
# The longest that is read: no encoder has more dimensions than 4,096.
LONGEST_TOKEN = 6000
_STEPS = 127
# Thumbnails are made with at most some kilobytes; whoever published the index may have written anything.
_LARGEST = 256 << 10
_KEPT_BYTES = 64 << 20
_MOST_FIELDS = 100


def token_of(embedding: npt.NDArray[np.float32], encoder_digest: str) -> str:
    """A picture's embedding (d,) as text for an address."""
    steps = np.round(embedding / np.abs(embedding).max() * _STEPS).astype(np.int8)
    content = bytes([_VERSION]) + _mark(encoder_digest) + steps.tobytes()
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def embedding_of(token: str, dimension: int, encoder_digest: str) -> npt.NDArray[np.float32]:
    """The embedding (d,) of ``token_of``, of unit length.

    Raises:
        QueryError: it is none, or of another encoder.
    """
    try:
        if len(token) > LONGEST_TOKEN or not token.isascii():
            raise ValueError
        content = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        steps = np.frombuffer(content[1 + _DIGEST_BYTES :], np.int8).astype(np.float32)
        if content[:1] != bytes([_VERSION]) or not steps.any():
            raise ValueError
    except (ValueError, binascii.Error):
        raise QueryError("the address holds no picture: choose the picture again") from None
    if content[1 : 1 + _DIGEST_BYTES] != _mark(encoder_digest) or len(steps) != dimension:
        raise QueryError("the picture was embedded by another encoder than this index has: choose it again")
    return np.asarray(steps / np.linalg.norm(steps), np.float32)


def _mark(encoder_digest: str) -> bytes:
    return (encoder_digest.encode("utf-8", "replace") + bytes(_DIGEST_BYTES))[:_DIGEST_BYTES]


def form_fields(content_type: str, body: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of a form that a browser sends with files (RFC 7578), in their order; empty ones are left out.

    Raises:
        QueryError: it is none.
    """
    match = re.fullmatch(
        r"multipart/form-data; *boundary=\"?([\w'()+,./:=?-]{1,70})\"?",
        content_type,
        re.ASCII | re.IGNORECASE,
    )
    if match is None:
        raise QueryError("this is no form with pictures")
    fields = []
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + match[1].encode(), _MOST_FIELDS)
    for part in parts:
        head, _, content = part.partition(b"\r\n\r\n")
        name = re.search(rb';\s*name="([a-z_]{1,20})"', head)
        if name and content:
            fields.append((name[1].decode(), content))
    return fields


class Thumbnails:
    """Pictures of probes and of generators' samples that were asked for lately, up to a number of bytes. Safe to share between threads."""

    def __init__(self, most_bytes: int = _KEPT_BYTES) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._bytes = 0

    def get(self, owner: str, number: int) -> bytes | None:
        """A picture that is kept: of a probe set, or of a generator in a generation."""
        with self._lock:
            picture = self._kept.get((owner, number))
            if picture is not None:
                self._kept.move_to_end((owner, number))
            return picture

    def keep(self, owner: str, pictures: Iterable[tuple[int, bytes]]) -> None:
        """Keep pictures, and drop those that were not asked for longest."""
        with self._lock:
            for number, picture in pictures:
                if (owner, number) not in self._kept and len(picture) <= _LARGEST:
                    self._kept[owner, number] = picture
                    self._bytes += len(picture)
            while self._bytes > self._most_bytes:
                self._bytes -= len(self._kept.popitem(last=False)[1])

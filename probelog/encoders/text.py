"""The query side's text encoder: ONNX and a tokenizer file, with neither torch nor the Hub.

Both are untrusted: they are used in a process of their own (`probelog.encoders.process`).

An index carries these files (see `probelog.encoders.onnx_export`), so that a text is embedded on an analyst's machine
exactly as the encoder that embedded the probes would have done.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from probelog.encoders.process import EncoderProcess
from probelog.errors import StoreError
from probelog.storage.records import Check, each, is_count, read_record
from probelog.storage.schemas import clean_unicode
from probelog.storage.versions import MADE_BY, check_version
from probelog.terminal import printable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SETTINGS_VERSION = 1
DIMENSION: Check = ("from 1 to 65536", lambda value: is_count(value) and 0 < value <= 1 << 16)
_TOKENS = ["input_ids", "attention_mask", "token_type_ids"]
_INPUTS: Check = (
    f"one or more of {', '.join(_TOKENS)}",
    lambda value: each(_TOKENS.__contains__)(value) and 0 < len(value) <= len(_TOKENS),
)
_WORD = re.compile(r"\w+|[^\w\s]+")
_PUNCTUATION = frozenset(string.punctuation)

Settings = TypeVar("Settings", bound="DataclassInstance")


@dataclass(frozen=True, slots=True)
class TextSettings:
    """How the ONNX text tower is to be fed. Stored as JSON beside it.

    ``inputs`` are the names of its integer inputs, each (texts, tokens); ``output`` is (texts, dimension), not
    normalised. ``fixed_length`` says that it was trained on texts padded to ``max_length``. Truncation and
    padding themselves are part of the tokenizer file. ``made_with`` is provenance only.
    """

    inputs: list[str] = field(metadata={"check": _INPUTS})
    output: str
    dimension: int = field(metadata={"check": DIMENSION})
    max_length: int
    fixed_length: bool
    pad_id: int
    made_with: dict[str, str] = field(default_factory=dict)
    version: int = SETTINGS_VERSION
    made_by: str = MADE_BY

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> TextSettings:
        """Read back what `to_dict` wrote.

        Raises:
            SchemaVersionError: written by a newer ProbeLog.
            StoreError: not such settings.
        """
        return read_settings(cls, settings, SETTINGS_VERSION, "text encoder")


def read_settings(kind: type[Settings], settings: Mapping[str, Any], version: int, what: str) -> Settings:
    """Versioned JSON settings as the dataclass ``kind`` (shared with the image encoder).

    Raises:
        SchemaVersionError: written by a newer ProbeLog.
        StoreError: not such settings.
    """
    check_version(settings, version, "the index", f"{what} settings")
    unknown = settings.keys() - {item.name for item in fields(kind)}
    if unknown:
        raise StoreError(
            f"the index's {what} settings are damaged: nobody knows their entry {printable(min(unknown), 60)!r}. "
            "Publish the index again."
        )
    return read_record(kind, settings, "the index", f"{what} settings")


class TextEncoder:
    """Embeds texts with an exported text tower. Cheap to make (its process starts at the first call), thread-safe.

    Args:
        onnx: the model's bytes, the path of its file, or what reads it while the process starts.
        tokenizer_json: the content of a ``tokenizers`` JSON file, truncation and padding included.
        settings: what `TextSettings.to_dict` gave.
    """

    def __init__(
        self,
        onnx: bytes | str | os.PathLike[str] | Callable[[], bytes],
        tokenizer_json: str,
        settings: Mapping[str, Any],
    ) -> None:
        self.settings = TextSettings.from_dict(settings)
        tower = {name: getattr(self.settings, name) for name in ("inputs", "output", "dimension")}
        self._process = EncoderProcess(
            "text encoder",
            {"open": "text", "settings": tower},
            lambda: [onnx_bytes(onnx), tokenizer_json.encode("utf-8", "replace")],
        )

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return self.settings.dimension

    def close(self) -> None:
        """End its process, if it runs; the next request starts it again."""
        self._process.close()

    def embed(self, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
        """Embeddings (texts, dimension) of unit length.

        Raises:
            StoreError: the model or the tokenizer of the index is damaged.
        """
        parts = [np.empty((0, self.dimension), dtype=np.float32)]
        for start in range(0, len(texts), batch_size):
            batch = [clean_unicode(text) for text in texts[start : start + batch_size]]
            parts.append(embedded(self._process, {"texts": batch}, len(batch), self.dimension))
        return unit_rows(np.concatenate(parts))

    def unknown_words(self, texts: Sequence[str]) -> list[list[str]]:
        """The words of each text that the vocabulary does not hold, in order; none for byte-level vocabularies."""
        listed = [words(text) for text in texts]
        every = list(dict.fromkeys(word for text in listed for word in text))
        if not every:
            return [[] for _ in texts]
        answers = self._process.ask({"words": every}, len(every))
        unknown = {word for word, is_unknown in zip(every, answers, strict=True) if is_unknown}
        return [[word for word in dict.fromkeys(text) if word in unknown] for text in listed]


def words(text: str) -> list[str]:
    """The words of a text in order, without punctuation; a run of other signs (an emoji) is a word too."""
    return [word for word in _WORD.findall(clean_unicode(text)) if not _PUNCTUATION.issuperset(word)]


def onnx_bytes(onnx: bytes | str | os.PathLike[str] | Callable[[], bytes]) -> bytes:
    """The bytes of a model that is given as such, as the path of its file, or as what reads it."""
    if isinstance(onnx, bytes):
        return onnx
    return onnx() if callable(onnx) else Path(onnx).read_bytes()


def embedded(
    process: EncoderProcess,
    header: Mapping[str, Any],
    count: int,
    dimension: int,
    blobs: Sequence[memoryview] = (),
) -> NDArray[np.float32]:
    """Embeddings (count, dimension) that a tower answers with, finite and not zero.

    Raises:
        StoreError: they are not, or the tower is damaged.
    """
    answer = process.ask(header, count * dimension * 4, blobs)
    rows = np.frombuffer(answer, np.float32).reshape(count, dimension)
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    if not np.isfinite(lengths).all():
        raise process.damaged("it gives numbers that are not finite")
    if not lengths.all():
        raise process.damaged("it gives embeddings of zeros")
    return rows


def unit_rows(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Rows scaled to length 1 (in float64, so that torch's and ONNX's embeddings are treated alike)."""
    wide = np.asarray(rows, dtype=np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    scaled: NDArray[np.float32] = (wide / np.maximum(lengths, 1e-12)).astype(np.float32)
    return scaled

"""The query side's text encoder: ONNX and a tokenizer file, with neither torch nor the Hub.

An index carries these files (see `probelog.encoders.onnx_export`), so that a text is embedded on an analyst's machine
exactly as the encoder that embedded the probes would have done.
"""

from __future__ import annotations

import json
import os
import re
import string
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from probelog.errors import StoreError
from probelog.storage.schemas import clean_unicode
from probelog.storage.versions import MADE_BY, check_version

if TYPE_CHECKING:
    import onnxruntime
    import tokenizers

SETTINGS_VERSION = 1
_THREADS = 2
_WORD = re.compile(r"\w+|[^\w\s]+")
_PUNCTUATION = frozenset(string.punctuation)

Settings = TypeVar("Settings")


@dataclass(frozen=True, slots=True)
class TextSettings:
    """How the ONNX text tower is to be fed. Stored as JSON beside it.

    ``inputs`` are the names of its integer inputs, each (texts, tokens); ``output`` is (texts, dimension), not
    normalised. ``fixed_length`` says that it was trained on texts padded to ``max_length``. Truncation and
    padding themselves are part of the tokenizer file. ``made_with`` is provenance only.
    """

    inputs: list[str]
    output: str
    dimension: int
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
    """Versioned JSON settings as the dataclass ``kind`` (shared with the image encoder)."""
    check_version(settings, version, "the index", f"{what} settings")
    try:
        return kind(**settings)
    except TypeError as error:
        raise StoreError(
            f"the index's {what} settings are damaged: {error}. Publish the index again."
        ) from error


class TextEncoder:
    """Embeds texts with an exported text tower. Cheap to make (the model is read at the first call), thread-safe.

    Args:
        onnx: the model's bytes, or the path of its file.
        tokenizer_json: the content of a ``tokenizers`` JSON file, truncation and padding included.
        settings: what `TextSettings.to_dict` gave.
    """

    def __init__(
        self, onnx: bytes | str | os.PathLike[str], tokenizer_json: str, settings: Mapping[str, Any]
    ) -> None:
        self._onnx = onnx
        self._tokenizer_json = tokenizer_json
        self.settings = TextSettings.from_dict(settings)
        self._lock = threading.Lock()
        self._session: onnxruntime.InferenceSession | None = None
        self._tokenizer: tokenizers.Tokenizer | None = None
        self._unknown_id: int | None = None

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return self.settings.dimension

    def tokens(self, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """The model's inputs for some texts, each (texts, tokens), truncated and padded as in training."""
        encodings = self._open_tokenizer().encode_batch([clean_unicode(text) for text in texts])
        columns = {
            "input_ids": [item.ids for item in encodings],
            "attention_mask": [item.attention_mask for item in encodings],
            "token_type_ids": [item.type_ids for item in encodings],
        }
        return {name: np.array(columns[name], dtype=np.int64) for name in self.settings.inputs}

    def embed(self, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
        """Embeddings (texts, dimension) of unit length.

        Raises:
            StoreError: the model or the tokenizer of the index is damaged.
        """
        session = self._open_session()
        parts = [np.empty((0, self.dimension), dtype=np.float32)]
        for start in range(0, len(texts), batch_size):
            inputs = self.tokens(texts[start : start + batch_size])
            parts.append(session.run([self.settings.output], inputs)[0])
        return unit_rows(np.concatenate(parts))

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that the vocabulary does not hold, in order; none for byte-level vocabularies."""
        tokenizer = self._open_tokenizer()
        unknown: dict[str, None] = {}
        for word in words(text):
            ids = tokenizer.encode(word, add_special_tokens=False)
            real = [token for token, mask in zip(ids.ids, ids.attention_mask, strict=True) if mask]
            if self._unknown_id in real or not real:
                unknown[word] = None
        return list(unknown)

    def _open_tokenizer(self) -> tokenizers.Tokenizer:
        with self._lock:
            if self._tokenizer is None:
                from tokenizers import Tokenizer

                try:
                    tokenizer = Tokenizer.from_str(self._tokenizer_json)
                    model = json.loads(self._tokenizer_json)["model"]
                except Exception as error:  # reason: tokenizers raises bare Exception on damaged files
                    raise StoreError(
                        f"the index's tokenizer is damaged: {error}. Publish the index again."
                    ) from error
                unknown = model.get("unk_token")
                self._unknown_id = (
                    tokenizer.token_to_id(unknown) if unknown is not None else model.get("unk_id")
                )
                self._tokenizer = tokenizer
            return self._tokenizer

    def _open_session(self) -> onnxruntime.InferenceSession:
        with self._lock:
            if self._session is None:
                self._session = open_session(self._onnx, "text encoder")
            return self._session


def words(text: str) -> list[str]:
    """The words of a text in order, without punctuation; a run of other signs (an emoji) is a word too."""
    return [word for word in _WORD.findall(clean_unicode(text)) if not _PUNCTUATION.issuperset(word)]


def open_session(onnx: bytes | str | os.PathLike[str], what: str) -> onnxruntime.InferenceSession:
    """An ONNX model on the CPU with few threads: a query is small, and a search server has many at once.

    Raises:
        StoreError: the model is damaged.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options.intra_op_num_threads = min(_THREADS, cores)
    options.inter_op_num_threads = 1
    # Threads that wait by spinning take the core from the search that follows: on one core it took twice as long.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            onnx if isinstance(onnx, bytes) else str(Path(onnx)), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # reason: onnxruntime's errors share no base but Exception
        raise StoreError(f"the index's {what} is damaged: {error}. Publish the index again.") from error


def unit_rows(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Rows scaled to length 1 (in float64, so that torch's and ONNX's embeddings are treated alike)."""
    wide = np.asarray(rows, dtype=np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    scaled: NDArray[np.float32] = (wide / np.maximum(lengths, 1e-12)).astype(np.float32)
    return scaled

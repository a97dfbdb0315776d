"""The towers of an index's encoder, as they run in a process of their own (`probelog.encoders.server`).

They are made of files that whoever published the index wrote: a graph may loop for ever, a tokenizer may turn a word
into gigabytes. Nothing here bounds that; the process does. Only its own modules are imported, so that it starts fast.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnxruntime
    import tokenizers

THREADS = 2


class TowerError(Exception):
    """A tower cannot be opened, or does not give what its settings say; the message says which part is damaged."""


class TextTower:
    """Tokenizer and graph for texts.

    Args:
        onnx: the graph.
        tokenizer_json: the tokenizer's file, truncation and padding included.
        inputs: names of the graph's inputs.
        output: name of its output.
        dimension: length of an embedding.
    """

    def __init__(
        self, onnx: bytes, tokenizer_json: str, inputs: Sequence[str], output: str, dimension: int
    ) -> None:
        self._tokenizer, self._unknown_id = _open_tokenizer(tokenizer_json)
        self._graph = _Graph(_open_session(onnx), output, dimension)
        self._inputs = inputs

    def tokens(self, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """The graph's inputs for some texts, each (texts, tokens), truncated and padded as in training."""
        encodings = self._tokenizer.encode_batch(list(texts))
        columns = {
            "input_ids": [item.ids for item in encodings],
            "attention_mask": [item.attention_mask for item in encodings],
            "token_type_ids": [item.type_ids for item in encodings],
        }
        return {name: np.array(columns[name], dtype=np.int64) for name in self._inputs}

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings (texts, dimension), not normalised."""
        return self._graph.run(self.tokens(texts), len(texts))

    def unknown(self, words: Sequence[str]) -> list[bool]:
        """Whether each word is one that the vocabulary does not hold."""
        unknown = []
        for word in words:
            ids = self._tokenizer.encode(word, add_special_tokens=False)
            real = [token for token, mask in zip(ids.ids, ids.attention_mask, strict=True) if mask]
            unknown.append(self._unknown_id in real or not real)
        return unknown


class ImageTower:
    """Graph for preprocessed images, whose input and output have these names."""

    def __init__(self, onnx: bytes, input_name: str, output: str, dimension: int) -> None:
        self._graph = _Graph(_open_session(onnx), output, dimension)
        self._input = input_name

    def embed(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embeddings (images, dimension), not normalised, of pixels (images, 3, height, width)."""
        return self._graph.run({self._input: pixels}, len(pixels))


class _Graph(NamedTuple):
    session: onnxruntime.InferenceSession
    output: str
    dimension: int

    def run(self, inputs: Mapping[str, NDArray[Any]], count: int) -> NDArray[np.float32]:
        try:
            result = self.session.run([self.output], inputs)[0]
        except Exception as error:  # reason: onnxruntime's errors share no base but Exception
            raise TowerError(f"it cannot be run: {error}") from error
        if not isinstance(result, np.ndarray) or result.dtype != np.float32:
            raise TowerError("it gives something else than float32 numbers")
        if result.shape != (count, self.dimension):
            raise TowerError(f"it gives {result.shape} numbers in place of {(count, self.dimension)}")
        return np.ascontiguousarray(result)


def _open_tokenizer(tokenizer_json: str) -> tuple[tokenizers.Tokenizer, int | None]:
    """The tokenizer, and the number of the token for what its vocabulary does not hold."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
        model = json.loads(tokenizer_json)["model"]
        unknown = model.get("unk_token")
        return tokenizer, tokenizer.token_to_id(unknown) if unknown is not None else model.get("unk_id")
    except Exception as error:  # reason: tokenizers raises bare Exception on damaged files
        raise TowerError(f"its tokenizer is damaged: {error}") from error


def _open_session(onnx: bytes) -> onnxruntime.InferenceSession:
    """A graph on the CPU with few threads: a query is small, and a search server has many at once."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options.intra_op_num_threads = min(THREADS, cores)
    options.inter_op_num_threads = 1
    # Threads that wait by spinning take the core from the search that follows: on one core it took twice as long.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # reason: onnxruntime's errors share no base but Exception
        raise TowerError(f"it is damaged: {error}") from error

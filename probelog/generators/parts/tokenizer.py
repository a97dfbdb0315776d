"""The tokenizer of a text-to-image pipeline, made anew from its untrusted vocabulary and merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probelog.errors import FailureReason, ItemFailure
from probelog.weights.repository import MAX_JSON_BYTES, member, read_json

if TYPE_CHECKING:
    import torch

FILES = ("tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.json")
_MOST_ENTRIES, _LONGEST_ENTRY = 100_000, 200
_SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>"}  # fmt: skip


class Tokenizer:
    """Texts as numbers of one length.

    Raises:
        ItemFailure: NOT_FOUND, CORRUPT_CONFIG.
    """

    def __init__(self, folder: Path) -> None:
        vocabulary, merges = _read(folder)
        special = _special(folder, vocabulary)
        try:
            from transformers import CLIPTokenizer

            made: Any = CLIPTokenizer
            self._tokenizer = made(vocab=vocabulary, merges=merges, **special)
        except Exception as error:  # the foreign library raises what it likes at a merge that makes no sense
            raise ItemFailure(
                FailureReason.CORRUPT_CONFIG, f"tokenizer: {type(error).__name__}: {str(error)[:200]}"
            ) from error

    def encode(self, texts: Sequence[str], length: int, below: int) -> torch.Tensor:
        """Numbers (texts, length), each less than ``below``.

        Raises:
            ItemFailure: CONFIG_MISMATCH where the text encoder has no such numbers.
        """
        numbers: torch.Tensor = self._tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        if tuple(numbers.shape) != (len(texts), length) or int(numbers.max()) >= below:
            raise ItemFailure(
                FailureReason.CONFIG_MISMATCH,
                f"the tokenizer counts beyond the text encoder's {below} tokens",
            )
        return numbers


def _read(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocabulary: object = read_json(folder, "vocab.json")
    lines = member(folder, "merges.txt")
    merges: object
    if vocabulary is not None and lines is not None:
        if lines.stat().st_size > MAX_JSON_BYTES:
            raise _corrupt("merges.txt is too long")
        text = lines.read_bytes().decode("utf-8", "replace")
        merges = [line for line in text.split("\n") if line and not line.startswith("#version")]
    else:
        # All in one file, as newer libraries write it: of it the two tables alone are read.
        model = (read_json(folder, "tokenizer.json") or {}).get("model")
        if not isinstance(model, dict):
            raise ItemFailure(
                FailureReason.NOT_FOUND, "tokenizer has neither vocab.json and merges.txt nor both in one"
            )
        vocabulary, merges = model.get("vocab"), model.get("merges")
    return _vocabulary(vocabulary), _merges(merges)


def _vocabulary(declared: object) -> dict[str, int]:
    if not isinstance(declared, dict) or not 1 <= len(declared) <= _MOST_ENTRIES:
        raise _corrupt(f"the vocabulary is not one of 1 to {_MOST_ENTRIES} entries")
    if set(declared.values()) != set(range(len(declared))):
        raise _corrupt("the vocabulary is not numbered from 0 on")
    if any(type(number) is not int for number in declared.values()):
        raise _corrupt("the vocabulary is not numbered from 0 on")
    if any(len(entry) > _LONGEST_ENTRY for entry in declared):
        raise _corrupt(f"an entry of the vocabulary has more than {_LONGEST_ENTRY} characters")
    return declared


def _merges(declared: object) -> list[tuple[str, str]]:
    if not isinstance(declared, list) or len(declared) > _MOST_ENTRIES:
        raise _corrupt(f"the merges are not at most {_MOST_ENTRIES}")
    pairs = []
    for line in declared:
        pair = line.split(" ") if isinstance(line, str) else line
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise _corrupt(f"{str(line)[:60]!r} is no merge")
        pairs.append((pair[0], pair[1]))
    return pairs


def _special(folder: Path, vocabulary: Mapping[str, int]) -> dict[str, str]:
    config = read_json(folder, "tokenizer_config.json") or {}
    tokens = {}
    for role, default in _SPECIAL.items():
        declared = config.get(role)
        token = declared.get("content") if isinstance(declared, dict) else declared
        tokens[role] = token if isinstance(token, str) else default
        if tokens[role] not in vocabulary:
            raise _corrupt(f"{role} {tokens[role][:60]!r} is not in the vocabulary")
    return tokens


def _corrupt(detail: str) -> ItemFailure:
    return ItemFailure(FailureReason.CORRUPT_CONFIG, f"tokenizer: {detail}")

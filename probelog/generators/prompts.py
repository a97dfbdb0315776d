"""What models that take text are asked for: a pure function of the operator's prompts and the words an adapter declares."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from probelog.models.config import UNPRINTABLE
from probelog.storage.schemas import clean_unicode
from probelog.weights.repository import member

#: First what says nothing, then a few of as many kinds as there are few: what a model makes of them tells its own from theirs.
NEUTRAL = ("", "a picture")
DIVERSE = (
    "a photo of a person", "a photo of an animal", "a landscape", "a building in a city", "a room with furniture",
    "a vehicle", "food on a table", "a plant", "an object on a plain background", "a drawing", "a painting",
)  # fmt: skip
#: Where an adapter may say what it was trained on.
CARD = "README.md"
MOST_WORDS, LONGEST_WORD = 4, 120
_CARD_BYTES = 1 << 16
# One line of the YAML at the head of a model card; anything but a plain value on one line is left alone.
_INSTANCE_PROMPT = re.compile(r"^instance_prompt:[ \t]*(.{1,500})$", re.MULTILINE)


def prompts_for(chosen: Sequence[str], trigger_words: Sequence[str]) -> list[str]:
    """The prompts that are used, in order; sample n gets the one at n modulo their number.

    Args:
        chosen: the operator's; ours where there are none.
        trigger_words: which an adapter was trained on: alone and in a sentence, before the others.
    """
    own = [prompt for word in trigger_words for prompt in (word, f"a picture of {word}")]
    return list(dict.fromkeys([*own, *(chosen or (*NEUTRAL, *DIVERSE))]))


def trigger_words(folder: Path, metadata: Mapping[str, str]) -> list[str]:
    """The words that an adapter declares: on its card (``instance_prompt``), in its weights (``modelspec.trigger_phrase``)."""
    declared = [metadata.get("modelspec.trigger_phrase", "")]
    card = member(folder, CARD)
    if card is not None:
        with open(card, "rb") as stream:
            head = stream.read(_CARD_BYTES).decode("utf-8", "replace")
        front = head.removeprefix("---").split("\n---", 1)[0] if head.startswith("---") else ""
        match = _INSTANCE_PROMPT.search(front)
        declared.append(match[1] if match else "")
    return cleaned(declared)


def cleaned(words: Iterable[str]) -> list[str]:
    """Untrusted words for a tokenizer, a log and a terminal: printable, short and few."""
    tidy = (UNPRINTABLE.sub(" ", clean_unicode(word[: 4 * LONGEST_WORD])).strip(" \t'\"") for word in words)
    return list(dict.fromkeys(word[:LONGEST_WORD] for word in tidy if word and word != "null"))[:MOST_WORDS]

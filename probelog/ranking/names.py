"""Names as an encoder reads them: one prompt or several, whose embeddings are averaged.

Averaging over prompts is the zero-shot ensembling of CLIP (Radford et al. 2021, section 3.1.4).
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

_MAX_LENGTH = 60
_PLACEHOLDER = re.compile(
    r"(label|class|category|id|target|output|logit)?[\s_\-#:]*\d+([.,]\d+)?|n\d{8}", re.I
)
# What data sets put in front of a name: a WordNet id, or a number.
_PREFIX = re.compile(r"^(n\d{8}[\s_\-:]+|\d+[\s_.\-:)]+(?=[^\W\d]))")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z][a-z])")
_SPELLINGS = {
    "aeroplane": "airplane",
    "aluminium": "aluminum",
    "armour": "armor",
    "catalogue": "catalog",
    "centre": "center",
    "colour": "color",
    "doughnut": "donut",
    "fibre": "fiber",
    "grey": "gray",
    "jewellery": "jewelry",
    "mould": "mold",
    "moustache": "mustache",
    "plough": "plow",
    "pyjama": "pajama",
    "sulphur": "sulfur",
    "theatre": "theater",
    "tyre": "tire",
    "yoghurt": "yogurt",
}


def prompted(prompts: Sequence[str], name: str) -> list[str]:
    """A concept's name in every prompt."""
    return [prompt.replace("{}", name.strip()) for prompt in prompts]


def name_vectors(
    embed: Callable[[Sequence[str]], Floats], prompts: Sequence[str], names: Sequence[str]
) -> npt.NDArray[np.float32]:
    """Unit vectors of names, each averaged over the prompts: (C, d).

    Args:
        embed: texts to unit vectors.
        prompts: with ``{}`` where the name goes.
        names: C concepts.
    """
    texts = [text for name in names for text in prompted(prompts, name)]
    if not texts:
        return np.empty((0, 0), np.float32)
    vectors = np.asarray(embed(texts), np.float32).reshape(len(names), len(prompts), -1).mean(axis=1)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@functools.lru_cache(maxsize=1 << 16)
def normal_name(name: str) -> str:
    """A concept's name for comparison: case folded, separators and repeated blanks as one blank."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def without_prefix(label: str) -> str:
    """A label without the WordNet id or the number that data sets put in front of it."""
    return _PREFIX.sub("", label.strip())


def is_placeholder(name: str) -> bool:
    """Whether a label is a number that stands for a name (``LABEL_3``)."""
    return _PLACEHOLDER.fullmatch(name) is not None


@functools.lru_cache(maxsize=100_000)
def canonical_name(text: str) -> str:
    """A name without its differences of writing: case, accents, plural, spelling, what stands in brackets.

    Empty for what is too long for a name, or a placeholder.
    """
    text = re.sub(r"\([^()]*\)", " ", _CAMEL.sub(" ", _PREFIX.sub("", text.strip())))
    if len(text) > _MAX_LENGTH or _PLACEHOLDER.fullmatch(text.strip()):
        return ""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    words = re.sub(r"[^\w]+|_", " ", plain.replace("'s ", " ").replace("'", "")).split()
    if not words:
        return ""
    words[-1] = _singular(words[-1])
    return " ".join(_SPELLINGS.get(word, word) for word in words)


def _singular(word: str) -> str:
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zes", "oes")):
        return word[:-2]
    return word[:-1]

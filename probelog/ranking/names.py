"""Names as an encoder reads them: one prompt or several, whose embeddings are averaged.

Averaging over prompts is the zero-shot ensembling of CLIP (Radford et al. 2021, section 3.1.4).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]


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

"""What a search method may look at: the observed logits of a hub's models, the probes, and the questions.

No method sees declared labels or truth: only values on probes, and embeddings of probes, queries and background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats, Ints
from probelog.ranking.matched_heads import Observed


@dataclass(frozen=True)
class Gallery:
    """A hub's models in order; its N logits are theirs, one model after the other.

    Attributes:
        models: every model's observations.
        embeddings: (n, d), the encoder's unit vectors of all probes.
    """

    models: Sequence[Observed]
    embeddings: Floats

    @cached_property
    def owners(self) -> npt.NDArray[np.int64]:
        """The model number of every logit: (N,)."""
        return np.repeat(np.arange(len(self.models)), [len(model.values) for model in self.models])

    def __len__(self) -> int:
        return sum(len(model.values) for model in self.models)


@dataclass(frozen=True)
class Concepts:
    """What is asked, and what calibrates the answers.

    Attributes:
        queries: (C, d) unit vectors of the queries, texts or means of images.
        background: (B, d) unit vectors of the background concepts.
        excluded: for each query the numbers of background concepts to leave out, because they are the query itself
            or its synonyms (a background that holds the query cancels it).
        images: for queries by image, the unit vectors (s, d) of each query's images; ``queries`` are their means.
    """

    queries: Floats
    background: Floats
    excluded: Sequence[Ints]
    images: Sequence[Floats] | None = None

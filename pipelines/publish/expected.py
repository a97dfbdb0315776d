"""What a new generation is compared with before readers see it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.complete.descriptors import Descriptors, DescriptorSummary
from probelog.index.generation import Generation
from probelog.storage.schemas import ProbedModel


@dataclass(frozen=True)
class Expected:
    """What a whole generation was made of.

    Attributes:
        descriptors: of the models that it must hold, in its order.
        written: what was noted of these while the generation was written.
        missing: logits of all probed models that have no descriptor row, and ``dropped``, how many of them the
            completion dropped for being constant: the same number.
        embeddings: (n, d) of the probes.
        background: names, and ``vectors`` (B, d), their embeddings by the original encoder.
        embed: the original encoder: unit vectors (C, d) of names in the index's prompts.
        prompts: these.
    """

    descriptors: Descriptors
    written: DescriptorSummary
    missing: int
    dropped: int
    embeddings: npt.NDArray[np.float32]
    background: Sequence[str]
    vectors: npt.NDArray[np.float32]
    embed: Callable[[Sequence[str]], npt.NDArray[np.float32]]
    prompts: Sequence[str]

    @property
    def models(self) -> Sequence[ProbedModel]:
        """Those that it must hold, in its order."""
        return self.descriptors.models


@dataclass(frozen=True)
class ExpectedUpdate:
    """What an update was made of. Its base was checked when it was published.

    Attributes:
        base: the whole generation that it updates.
        models: those that it adds.
        written: what was noted of their descriptors while it was written.
        known: rows of the base's logits that added models share, by what they share them by (`same_logits`).
        removed: repositories whose models of the base do not count any more.
    """

    base: Generation
    models: Sequence[ProbedModel]
    written: DescriptorSummary
    known: Mapping[str, int]
    removed: Collection[str]

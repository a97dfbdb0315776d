"""The data that a new generation is checked against before readers see it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.complete.descriptors import Descriptors, DescriptorSummary
from pipelines.publish.generators import SampledGenerators
from pipelines.publish.pieces import Pieces
from probelog.index.generation import Generation
from probelog.storage.schemas import ProbedModel, TreeFacts


@dataclass(frozen=True)
class ExpectedTrees:
    """The trees that a generation must hold.

    Attributes:
        edges: number of rows of its own table of edges.
        places: of all models whose weights were compared, by repository.
    """

    edges: int
    places: Mapping[str, TreeFacts]


@dataclass(frozen=True)
class Expected:
    """The data that a whole generation was made from.

    Attributes:
        descriptors: of the models that it must hold, in its order.
        written: summary of these descriptors, gathered while the generation was written.
        missing: number of logits of all probed models without a descriptor row.
        dropped: number of logits that the completion dropped for being constant; must equal ``missing``.
        embeddings: (n, d) unit vectors of the probes.
        background: B names of concepts.
        vectors: (B, d) embeddings of these names by the original encoder.
        embed: the original encoder: unit vectors (C, d) of C names in the index's prompts.
        prompts: of the index.
        trees: None where it has none.
        pieces: those that workers made its rows in; they help to check it, too. None: one process made it.
        sampled: its generators; None where it has none.
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
    trees: ExpectedTrees | None = None
    pieces: Pieces | None = None
    sampled: SampledGenerators | None = None

    @property
    def models(self) -> Sequence[ProbedModel]:
        """The models that the generation must hold, in its order."""
        return self.descriptors.models


@dataclass(frozen=True)
class ExpectedUpdate:
    """The data that an update was made from.

    Attributes:
        base: the whole generation that is updated.
        models: the added models.
        written: summary of their descriptors, gathered while the update was written.
        known: number of rows of the base's logits that added models share, by identity (`same_logits`).
        removed: repositories whose models of the base are no longer valid.
        trees: of the added models and of those whose parents were removed; None where it has none.
        sampled: its generators, where it has tables of its own of them; None where the base's are left as they are.
    """

    base: Generation
    models: Sequence[ProbedModel]
    written: DescriptorSummary
    known: Mapping[str, int]
    removed: Collection[str]
    trees: ExpectedTrees | None = None
    sampled: SampledGenerators | None = None

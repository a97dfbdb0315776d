"""How well an index answers, against a truth file: accuracy, hubness, chance and simpler methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.benchmark.truth import LEFT_OUT_KINDS, Truth
from probelog import scoring
from probelog.client import open_index
from probelog.errors import UsageError
from probelog.evaluation import Accuracy, Hubness, accuracy, hubness
from probelog.generation import Generation
from probelog.methods.calibration import calibrated
from probelog.pointer import find_index, read_pointer
from probelog.question import background_numbers, text_vectors


@dataclass(frozen=True)
class Method:
    """Accuracy of one way to score, on single classes, on superclasses, and over all queries."""

    name: str
    single: Accuracy | None
    groups: Accuracy | None
    every: Accuracy
    hubness: Hubness


@dataclass(frozen=True)
class Evaluation:
    """All methods on one index."""

    index: str
    models: int
    logits: int
    methods: list[Method]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The same as a table for a person, in per cent."""
        head = f"{'method':<34}{'class top-1':>12}{'top-5':>7}{'super top-1':>13}{'top-5':>7}{'mAP':>7}{'hubs':>6}"
        told = [f"{self.index}: {self.models:,} models, {self.logits:,} logits", head]
        for method in self.methods:
            cells = [
                f"{100 * found.top1:12.1f}{100 * found.top5:7.1f}"
                if found is not None
                else f"{'-':>12}{'-':>7}"
                for found in (method.single, method.groups)
            ]
            told.append(
                f"{method.name:<34}{cells[0]} {cells[1]}{100 * method.every.average_precision:7.1f}"
                f"{method.hubness.half:6d}"
            )
        first = self.methods[0]
        chance = [
            f"{100 * found.chance:12.1f}{'':7}" if found is not None else f"{'-':>12}{'':7}"
            for found in (first.single, first.groups)
        ]
        told.append(f"{'chance':<34}{chance[0]} {chance[1]}")
        told.append(
            f"{first.every.queries} queries with an answer; hubs: logits that take half of the first places "
            "(more is better)"
        )
        return told


def evaluate(uri: str, truth_file: Path, kinds: Sequence[str] = LEFT_OUT_KINDS) -> Evaluation:
    """Evaluate text queries on an index.

    Args:
        uri: the index or its store.
        truth_file: see ``Truth``.
        kinds: models of these kinds are left out.

    Raises:
        UsageError: the truth file is unusable or speaks of none of the index's models.
    """
    truth = Truth.read(truth_file)
    store = find_index(uri)
    generation = Generation(store, read_pointer(store)[0])
    repos = generation.models["repo"].to_pylist()
    logit = generation.logits["logit"].to_numpy()
    negated = generation.logits["negated"].to_numpy(zero_copy_only=False)
    classes: list[set[int]] = []
    kept: list[int] = []
    for row, model in enumerate(generation.model_of):
        repo = repos[model]
        if repo not in truth.logits or truth.kinds[repo] in kinds or logit[row] >= len(truth.logits[repo]):
            continue
        kept.append(row)
        classes.append(set() if negated[row] else truth.logits[repo][logit[row]])
    if not kept:
        raise UsageError(f"{truth_file} speaks of none of the models in {store.uri}")
    concepts = list(truth.concepts)
    relevant = np.array([[truth.relevant(concept, own) for own in classes] for concept in concepts])
    if not relevant.any():
        raise UsageError(f"{truth_file} names no concept that a model in {store.uri} recognises")
    single = np.array([len(truth.concepts[concept]) == 1 for concept in concepts])

    index = open_index(uri)
    excluded = [truth.names_of(concept) for concept in concepts]
    ways: list[tuple[str, Callable[[], npt.NDArray[np.float64]]]] = [
        ("this index (matched heads)", lambda: index.scores(concepts, excluded)),
        ("version 2, from its top probes", lambda: _second_version(generation, concepts, excluded)),
    ]
    methods = []
    for name, way in ways:
        scores = way()[:, kept]
        methods.append(
            Method(
                name,
                _part(scores, relevant, single),
                _part(scores, relevant, ~single),
                accuracy(scores, relevant),
                hubness(scores[relevant.any(axis=1)]),
            )
        )
    return Evaluation(store.uri, len({int(generation.model_of[row]) for row in kept}), len(kept), methods)


def _part(
    scores: npt.NDArray[np.float64], relevant: npt.NDArray[np.bool_], chosen: npt.NDArray[np.bool_]
) -> Accuracy | None:
    if not relevant[chosen].any():
        return None
    return accuracy(scores[chosen], relevant[chosen])


def _second_version(
    generation: Generation, texts: Sequence[str], excluded: Sequence[Sequence[str]]
) -> npt.NDArray[np.float64]:
    """Version 2's calibrated truncated distance, from the (probe, value) pairs that the index keeps."""

    def distances(names: Sequence[str]) -> npt.NDArray[np.float64]:
        z = scoring.text_descriptors(generation.probe_embeddings, text_vectors(generation, names))
        return scoring.truncated_distances(generation.pairs, z)

    numbers = [background_numbers(generation, names) for names in excluded]
    return np.asarray(calibrated(distances(texts), distances(generation.background), numbers), np.float64)

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
from probelog.client import background_numbers, open_index, prompted
from probelog.errors import UsageError
from probelog.evaluation import Accuracy, Hubness, accuracy, hubness
from probelog.generation import Generation
from probelog.index import find_index, read_pointer

# Above this many logits the comparison over all probes is left out: it needs the whole dense matrix.
_DENSE_LOGITS = 100_000


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
        ("this index (version 2)", lambda: index.scores(concepts, excluded)),
        ("without calibration", lambda: -_distances(generation, concepts)),
    ]
    if len(generation.model_of) <= _DENSE_LOGITS:
        ways.append(("all probes, no truncation", lambda: _dense_scores(generation, concepts, excluded)))
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


def _z(generation: Generation, texts: Sequence[str]) -> npt.NDArray[np.float64]:
    vectors = generation.text_encoder.embed([prompted(generation, text) for text in texts])
    return scoring.text_descriptors(generation.probe_embeddings, vectors)


def _distances(generation: Generation, texts: Sequence[str]) -> npt.NDArray[np.float64]:
    return scoring.truncated_distances(generation.pairs, _z(generation, texts)).T


def _dense_scores(
    generation: Generation, texts: Sequence[str], excluded: Sequence[Sequence[str]]
) -> npt.NDArray[np.float64]:
    """Distances over all probes, from the completed rows, calibrated like version 2's."""
    probes = len(generation.probe_embeddings)
    rows = generation.columns_at(range(probes)).T.astype(np.float64)

    def distances(z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        # Both sides have mean 0 and variance 1, so that |a - b|^2 = 2n - 2ab.
        squared = np.square(rows).sum(axis=1)[:, None] + probes - 2 * rows @ z.T
        return np.asarray(np.sqrt(np.maximum(squared, 0)))

    own = distances(_z(generation, texts))
    k = int(generation.settings["calibration_k"])
    nearest = scoring.nearest_background(
        distances(_z(generation, generation.background)), k + max(len(names) for names in excluded)
    )
    offsets = [
        scoring.calibration_offsets(nearest, k, background_numbers(generation, names)) for names in excluded
    ]
    return np.stack(offsets) - own.T

"""How well an index answers, against a truth file: accuracy, hubness, chance and simpler methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.benchmark.questions import LEFT_OUT_KINDS, Truth
from pipelines.complete.record import completed
from probelog.completion import scoring
from probelog.errors import UsageError
from probelog.evaluation.accuracy import Accuracy, Hubness, accuracy, hubness
from probelog.evaluation.truncated import calibrated
from probelog.index.generation import Generation
from probelog.index.pointer import find_index, read_pointer
from probelog.search.client import open_index
from probelog.search.query import background_numbers, text_vectors
from probelog.storage.layout import INDEX
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import DESCRIPTORS
from probelog.storage.store import Store


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
        lines = [f"{self.index}: {self.models:,} models, {self.logits:,} logits", head]
        for method in self.methods:
            cells = [
                f"{100 * accuracy.top1:12.1f}{100 * accuracy.top5:7.1f}"
                if accuracy is not None
                else f"{'-':>12}{'-':>7}"
                for accuracy in (method.single, method.groups)
            ]
            lines.append(
                f"{method.name:<34}{cells[0]} {cells[1]}{100 * method.every.average_precision:7.1f}"
                f"{method.hubness.half:6d}"
            )
        first = self.methods[0]
        chance = [
            f"{100 * accuracy.chance:12.1f}{'':7}" if accuracy is not None else f"{'-':>12}{'':7}"
            for accuracy in (first.single, first.groups)
        ]
        lines.append(f"{'chance':<34}{chance[0]} {chance[1]}")
        lines.append(
            f"{first.every.queries} queries with an answer; hubs: logits that take half of the first places "
            "(more is better)"
        )
        return lines


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
    logit, negated = np.zeros(generation.size, np.int64), np.zeros(generation.size, bool)
    for logits in generation.blocks():
        logit[logits.rows], negated[logits.rows] = logits.logit, logits.negated
    classes: list[set[int]] = []
    kept: list[_Kept] = []
    for model in generation.models_table(["repo", "sha", "first_row", "rows"]).to_pylist():
        repo = model["repo"]
        if repo not in truth.logits or truth.kinds[repo] in kinds:
            continue
        for row in range(model["first_row"], model["first_row"] + model["rows"]):
            if logit[row] < len(truth.logits[repo]):
                kept.append(_Kept(row, repo, model["sha"], int(logit[row]), bool(negated[row])))
                classes.append(set() if negated[row] else truth.logits[repo][logit[row]])
    if not kept:
        raise UsageError(f"{truth_file} speaks of none of the models in {store.uri}")
    concepts = list(truth.concepts)
    relevant = np.array(
        [[truth.relevant(concept, class_set) for class_set in classes] for concept in concepts]
    )
    if not relevant.any():
        raise UsageError(f"{truth_file} names no concept that a model in {store.uri} recognises")
    single = np.array([len(truth.concepts[concept]) == 1 for concept in concepts])

    index = open_index(uri)
    excluded = [truth.names_of(concept) for concept in concepts]
    ways: dict[str, npt.NDArray[np.float64]] = {
        "this index (matched heads)": index.scores(concepts, excluded)[:, [item.row for item in kept]]
    }
    keys = [generation.settings.completion, generation.settings.folded_in]
    pairs = _top_pairs(_around(store), [key for key in keys if key is not None], kept)
    if pairs is not None:
        ways["version 2, from its top probes"] = _second_version(generation, pairs, concepts, excluded)
    methods = []
    for name, scores in ways.items():
        methods.append(
            Method(
                name,
                _part(scores, relevant, single),
                _part(scores, relevant, ~single),
                accuracy(scores, relevant),
                hubness(scores[relevant.any(axis=1)]),
            )
        )
    return Evaluation(store.uri, len({item.repo for item in kept}), len(kept), methods)


class _Kept(NamedTuple):
    """A logit that takes part: its row in the index, and whose it is."""

    row: int
    repo: str
    sha: str
    logit: int
    negated: bool


def _around(index: Store) -> Store:
    """The store that an index lies in."""
    parent, _, folder = index.uri.rpartition("/")
    return Store(parent) if folder == INDEX and parent else index


def _top_pairs(store: Store, keys: Sequence[str], kept: Sequence[_Kept]) -> scoring.TopPairs | None:
    """The top (probe, value) pairs of logits, from the store's descriptors where all of these are still there."""
    place = {item[1:]: number for number, item in enumerate(kept)}
    probes: list[Any] = [None] * len(kept)
    values: list[Any] = [None] * len(kept)
    columns = ["repo", "sha", "logit", "top_probes", "top_values", "bottom_probes", "bottom_values"]
    for part in (part for key in keys if (done := completed(store, key)) for part in done.parts.values()):
        for row in read_part(store, part, DESCRIPTORS, columns).to_pylist():
            for negated, end, sign in ((False, "top", 1), (True, "bottom", -1)):
                number = place.get((row["repo"], row["sha"], row["logit"], negated))
                if number is not None:
                    probes[number] = row[f"{end}_probes"]
                    values[number] = sign * np.asarray(row[f"{end}_values"])
    if any(probe is None for probe in probes):
        return None
    return scoring.TopPairs(np.array(probes, np.int32), np.array(values, np.float32))


def _part(
    scores: npt.NDArray[np.float64], relevant: npt.NDArray[np.bool_], chosen: npt.NDArray[np.bool_]
) -> Accuracy | None:
    if not relevant[chosen].any():
        return None
    return accuracy(scores[chosen], relevant[chosen])


def _second_version(
    generation: Generation,
    pairs: scoring.TopPairs,
    texts: Sequence[str],
    excluded: Sequence[Sequence[str]],
) -> npt.NDArray[np.float64]:
    """Version 2's calibrated truncated distance."""

    def distances(names: Sequence[str]) -> npt.NDArray[np.float64]:
        z = scoring.text_descriptors(generation.probe_embeddings, text_vectors(generation, names))
        return scoring.truncated_distances(pairs, z)

    numbers = [background_numbers(generation, names) for names in excluded]
    return np.asarray(calibrated(distances(texts), distances(generation.background), numbers), np.float64)

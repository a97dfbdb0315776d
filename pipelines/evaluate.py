"""How well an index answers, against a truth file: accuracy, hubness, chance and simpler methods, by protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.benchmark.protocols import AS_PUBLISHED, CLOSED, PROTOCOLS, WITHHELD, check_protocols, rounds
from pipelines.benchmark.questions import LEFT_OUT_KINDS, Bools, LogitName, Questions, Truth, from_truth
from pipelines.complete.record import completed
from pipelines.labels.hub_search import ListedModel, ModelSearch, model_searches
from probelog.arrays import Ints
from probelog.completion import scoring
from probelog.errors import UsageError
from probelog.evaluation.accuracy import Accuracy, Hubness, accuracy, hubness
from probelog.evaluation.truncated import calibrated
from probelog.index.generation import Generation
from probelog.index.pointer import find_index, read_pointer, store_around
from probelog.ranking import matched_heads
from probelog.ranking.matched_heads import Float64, HeadSpace
from probelog.search.client import open_index
from probelog.search.query import numbers_named, text_vectors
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import DESCRIPTORS
from probelog.storage.store import Store

_WIDTHS = (12, 7, 7, 10, 20)
_MEANING = {
    AS_PUBLISHED: "the index's own background",
    WITHHELD: "background: the names of the other half of the concepts",
    CLOSED: "background: the names of all concepts",
}


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
    """All methods on one index.

    Attributes:
        index: its address.
        models: how many take part.
        logits: of these models.
        methods: with the index's own background.
        protocols: the same methods by protocol (``pipelines.benchmark.protocols``).
        model_searches: the index beside the Hub's own search, models as answers.
    """

    index: str
    models: int
    logits: int
    methods: list[Method]
    protocols: dict[str, list[Method]]
    model_searches: list[ModelSearch]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The same as a table for a person, in per cent."""
        head = f"{'method':<34}{'class top-1':>12}{'top-5':>7}{'super top-1':>13}{'top-5':>7}{'mAP':>7}{'hubs':>6}"
        lines = [f"{self.index}: {self.models:,} models, {self.logits:,} logits", head]
        for protocol, methods in self.protocols.items():
            lines.append(f"{protocol}: {_MEANING[protocol]}")
            for method in methods:
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
        lines.append(
            f"{'finding models':<34}{'top-1':>12}{'top-5':>7}{'mAP':>7}{'answered':>10}{'right models found':>20}"
        )
        for way in self.model_searches:
            figures = (way.top1, way.top5, way.average_precision, way.answered, way.found)
            cells_of_way = [
                f"{100 * figure:{width}.1f}" for figure, width in zip(figures, _WIDTHS, strict=True)
            ]
            lines.append(f"{way.name:<34}{''.join(cells_of_way)}")
        return lines


def evaluate(
    uri: str, truth_file: Path, kinds: Sequence[str] = LEFT_OUT_KINDS, protocols: Sequence[str] = PROTOCOLS
) -> Evaluation:
    """Evaluate text queries on an index.

    Args:
        uri: the index or its store.
        truth_file: see ``Truth``.
        kinds: models of these kinds are left out.
        protocols: how backgrounds are chosen; the index's own is always among them.

    Raises:
        UsageError: the truth file is unusable or speaks of none of the index's models, or a protocol is unknown.
    """
    check_protocols(protocols)
    truth = Truth.read(truth_file)
    store = find_index(uri)
    generation = Generation(store, read_pointer(store)[0])
    logit, negated = np.zeros(generation.size, np.int64), np.zeros(generation.size, bool)
    for logits in generation.blocks():
        logit[logits.rows], negated[logits.rows] = logits.logit, logits.negated
    kept: list[_Kept] = []
    models: list[ListedModel] = []
    facts = ["repo", "sha", "first_row", "rows", "tags", "labels", "downloads"]
    for model in generation.models_table(facts).to_pylist():
        repo = model["repo"]
        if repo not in truth.logits or truth.kinds[repo] in kinds:
            continue
        own = [
            _Kept(row, repo, model["sha"], int(logit[row]), bool(negated[row]))
            for row in range(model["first_row"], model["first_row"] + model["rows"])
            if logit[row] < len(truth.logits[repo])
        ]
        if own:
            kept += own
            models.append(
                ListedModel(repo, model["tags"] or [], model["labels"] or [], model["downloads"] or 0)
            )
    if not kept:
        raise UsageError(f"{truth_file} speaks of none of the models in {store.uri}")
    try:
        questions = from_truth(truth, [LogitName(item.repo, item.logit, item.negated, "") for item in kept])
    except UsageError:
        raise UsageError(f"{truth_file} names no concept that a model in {store.uri} recognises") from None
    rows = [item.row for item in kept]
    keys = [generation.settings.completion, generation.settings.folded_in]
    pairs = _top_pairs(store_around(store), [key for key in keys if key is not None], kept)
    evaluated = {}
    scores = open_index(uri).scores(questions.names, questions.synonyms)[:, rows]
    others = {*protocols} - {AS_PUBLISHED}
    owners = np.unique([item.repo for item in kept], return_inverse=True)[1]
    matched = partial(_matched_heads, generation, _gallery(generation, rows), owners) if others else None
    for protocol in PROTOCOLS:
        if protocol not in (AS_PUBLISHED, *protocols):
            continue
        ways = {
            "this index (matched heads)": scores
            if protocol == AS_PUBLISHED or matched is None
            else _by_rounds(questions, protocol, generation, matched)
        }
        if pairs is not None:
            second = partial(_second_version, generation, pairs)
            ways["version 2, from its top probes"] = _by_rounds(questions, protocol, generation, second)
        evaluated[protocol] = [_method(name, scores, questions) for name, scores in ways.items()]
    return Evaluation(
        store.uri,
        len(models),
        len(kept),
        evaluated[AS_PUBLISHED],
        evaluated,
        model_searches(questions, [item.repo for item in kept], scores, models),
    )


def _by_rounds(
    questions: Questions,
    protocol: str,
    generation: Generation,
    score: Callable[[Sequence[str], Sequence[str], Sequence[Ints]], Float64],
) -> Float64:
    """Scores (C, N) of all concepts: of each round's by ``score`` of their names, the background and what is excluded."""
    parts = []
    order: list[int] = []
    for numbers, background in rounds(protocol, questions, generation.background):
        names = [questions.names[number] for number in numbers]
        excluded = [numbers_named(background, questions.synonyms[number]) for number in numbers]
        parts.append(score(names, background, excluded))
        order += numbers.tolist()
    return np.asarray(np.concatenate(parts)[np.argsort(order)])


def _method(name: str, scores: Float64, questions: Questions) -> Method:
    relevant, single = questions.relevant, questions.single
    return Method(
        name,
        _part(scores, relevant, single),
        _part(scores, relevant, ~single),
        accuracy(scores, relevant),
        hubness(scores[relevant.any(axis=1)]),
    )


class _Kept(NamedTuple):
    """A logit that takes part: its row in the index, and whose it is."""

    row: int
    repo: str
    sha: str
    logit: int
    negated: bool


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


def _part(scores: Float64, relevant: Bools, chosen: Bools) -> Accuracy | None:
    if not relevant[chosen].any():
        return None
    return accuracy(scores[chosen], relevant[chosen])


def _gallery(generation: Generation, rows: Sequence[int]) -> npt.NDArray[np.float32]:
    """Coordinates of the directions of some rows of the index."""
    gallery = np.empty(
        (generation.size, generation.basis.coordinates(generation.space.centre).size), np.float32
    )
    for logits in generation.blocks():
        gallery[logits.rows] = logits.coordinates
    return gallery[rows]


def _matched_heads(
    generation: Generation,
    gallery: npt.NDArray[np.float32],
    owners: Ints,
    texts: Sequence[str],
    background: Sequence[str],
    excluded: Sequence[Ints],
) -> Float64:
    """Scores of some of the index's logits as if it had been published with another background."""
    space = HeadSpace(generation.probe_embeddings, text_vectors(generation, background))
    rivals = generation.basis.coordinates(space.background).astype(np.float64)
    b = matched_heads.sharpness(gallery, rivals)
    offsets = matched_heads.offsets(gallery, rivals, b)
    queries = generation.basis.coordinates(space.of_texts(text_vectors(generation, texts), excluded))
    return np.stack(
        [
            matched_heads.scores_of_concept(query, gallery, owners, offsets, rivals, b, own)
            for query, own in zip(queries, excluded, strict=True)
        ]
    )


def _second_version(
    generation: Generation,
    pairs: scoring.TopPairs,
    texts: Sequence[str],
    background: Sequence[str],
    excluded: Sequence[Ints],
) -> Float64:
    """Version 2's calibrated truncated distance."""

    def distances(names: Sequence[str]) -> Float64:
        z = scoring.text_descriptors(generation.probe_embeddings, text_vectors(generation, names))
        return scoring.truncated_distances(pairs, z)

    return np.asarray(calibrated(distances(texts), distances(background), excluded), np.float64)

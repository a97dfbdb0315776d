"""What must be true of a generation before readers see it.

1. Rows: every model of the receipts that the catalogue lists, and every logit of theirs but the constant ones.
2. Numbers: no NaN and no infinity in any column of any table.
3. Encoder: the one that travels with the index answers the background's names as the original does.
4. Answers: the client, opened on the new generation, is asked names and logits. The right answers come from a plain
   scan of the descriptors' Parquet: nothing of the index is used for them, its offsets are computed again, and
   nothing is approximated. A logit's own direction must find that logit.

Everything is streamed, a part of descriptors or a batch of rows at a time: memory does not grow with the index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.complete.descriptors import Key, ModelDescriptors, distinct, same_logits, some_logits
from probelog.errors import StoreError
from probelog.index.generation import Generation
from probelog.index.schema import connect
from probelog.ranking import matched_heads
from probelog.ranking.names import name_vectors
from probelog.search.client import Index
from probelog.search.query import background_numbers
from probelog.search.results import Hit
from probelog.storage.encoding import from_npy
from probelog.storage.schemas import ProbedModel

# Names of the background that are asked, and logits: enough to notice a broken index, too few to cost anything.
_NAMES = 5
ASKED_LOGITS = 20
# Not in any background: a name's own competitor is left out of the background, these have none.
_STRANGERS = ("something else entirely", "a picture")
ANSWERS = 10
# Mean over all questions of the share of the exact first ten that the client gives. An index that scans exactly has 1;
# a vector index loses a few where many logits are nearly alike.
LEAST_RECALL = 0.95
# Of a cosine. The exported encoder differs from torch's by rounding; answers differ by hundredths.
COSINE = 5e-3
_BATCH_ROWS = 8192

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Expected:
    """What a generation was made of.

    Attributes:
        models: those that it must hold, in its order.
        described: reads their descriptors, part by part.
        missing: logits of all probed models that have no descriptor row, and ``dropped``, how many of them the
            completion dropped for being constant: the same number.
        embeddings: (n, d) of the probes.
        background: names, and ``vectors`` (B, d), their embeddings by the original encoder.
        embed: the original encoder: unit vectors (C, d) of names in the index's prompts.
        prompts: these.
    """

    models: Sequence[ProbedModel]
    described: Callable[[], Iterator[ModelDescriptors]]
    missing: int
    dropped: int
    embeddings: npt.NDArray[np.float32]
    background: Sequence[str]
    vectors: npt.NDArray[np.float32]
    embed: Callable[[Sequence[str]], npt.NDArray[np.float32]]
    prompts: Sequence[str]


def check_generation(generation: Generation, expected: Expected) -> None:
    """Read a new generation back as a client would, before anybody else does.

    Raises:
        StoreError: it does not hold or answer what it must; names every problem.
    """
    problems: list[str] = []
    for check in (_rows, _numbers):
        try:
            problems += check(generation, expected)
        except StoreError as error:
            problems.append(str(error))
    # Asked only where they have a meaning: tables with holes answer anything.
    if not problems:
        problems += _answers(generation, expected)
    if problems:
        raise StoreError(
            f"generation {generation.pointer.generation} was not published: {'; '.join(problems)}"
        )


# Rows and numbers


def _rows(generation: Generation, expected: Expected) -> Iterator[str]:
    """Counts of models and logits."""
    if expected.missing != expected.dropped:
        yield (
            f"its descriptors lack {expected.missing} logits of the receipts' models, but {expected.dropped} were "
            "dropped for being constant"
        )
    listed = generation.models_table(["repo", "sha", "logits", "weights", "first_row", "rows"])
    found = list(zip(*(listed[name].to_pylist() for name in ("repo", "sha", "logits")), strict=True))
    if found != [(model.repo, model.sha, model.logits) for model in expected.models]:
        yield f"its {len(found)} models are not the {len(expected.models)} of the receipts and the catalogue"
        return
    weights, first, rows = (listed[name].to_numpy() for name in ("weights", "first_row", "rows"))
    # What several models share is stored once, as it was seen first.
    wanted = np.full(len(weights), -1, np.int64)
    for described in expected.described():
        if wanted[weights[described.number]] == -1:
            wanted[weights[described.number]] = len(described.negated)
    wanted = np.maximum(wanted, 0)
    owner = np.concatenate([logits.weights for logits in generation.blocks()])
    if len(owner) and not (owner.min() >= 0 and owner.max() < len(weights)):
        yield "it holds logits of models that it does not hold"
        return
    counted = np.bincount(owner, minlength=len(weights))
    starts = np.full(len(weights), -1, np.int64)
    numbers, places = np.unique(owner, return_index=True)
    starts[numbers] = places
    wrong = counted[weights] != wanted[weights]
    wrong |= (rows != counted[weights]) | ((first != starts[weights]) & (rows > 0))
    if wrong.any():
        number = int(np.argmax(wrong))
        yield (
            f"{int(wrong.sum())} models have other logits than their descriptors, {found[number][0]} for one "
            f"({counted[weights[number]]} instead of {wanted[weights[number]]})"
        )


def _numbers(generation: Generation, _: Expected) -> Iterator[str]:
    """NaN and infinity, in any column of floating-point numbers."""
    bad = {"offset": 0, "direction": 0}
    for logits in generation.blocks():
        bad["offset"] += int(np.count_nonzero(~np.isfinite(logits.offsets)))
        bad["direction"] += int(np.count_nonzero(~np.isfinite(logits.coordinates)))
    yield from (
        f"{count} values of {name} of its logits are not finite" for name, count in bad.items() if count
    )
    for table in ("logits", "models", "probes"):
        opened = _table(generation, table)
        floating = [item.name for item in opened.schema if pa.types.is_floating(_element(item.type))]
        bad = dict.fromkeys(floating, 0)
        for batch in _batches(opened, floating) if floating else ():
            for name in floating:
                values = _flat(batch[name])
                bad[name] += len(values) - (pc.sum(pc.is_finite(values)).as_py() or 0) - values.null_count
        yield from (
            f"column {name} of its {table} holds {count} values that are not finite"
            for name, count in bad.items()
            if count
        )
    for name in ("background_vectors.npy", "background_statistics.npy"):
        if not np.isfinite(from_npy(generation.meta(name))).all():
            yield f"its {name} holds values that are not finite"


def _batches(table: Any, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Columns of a LanceDB table, some thousand rows at a time."""
    rows = max(1, table.count_rows())
    yield from table.search().select(list(columns)).limit(rows).to_batches(batch_size=_BATCH_ROWS)


def _table(generation: Generation, name: str) -> Any:
    return connect(generation.index, generation.pointer.generation).open_table(name)


def _element(kind: pa.DataType) -> pa.DataType:
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind


def _flat(column: pa.Array) -> pa.Array:
    while not pa.types.is_primitive(column.type):
        column = column.flatten()
    return column


# Answers


class _Canary:
    """One question with the client's answer, and the exact one as it is found.

    Args:
        told: what it is called in messages.
        direction: (d,), by the original encoder or of a logit.
        excluded: background names that do not compete with it.
        hits: the client's answer.
        same: what models share their logits by (`same_logits`), by repository.
        itself: the logit whose direction it is.
    """

    def __init__(
        self,
        told: str,
        direction: Float64,
        excluded: npt.NDArray[np.int64],
        hits: Sequence[Hit],
        same: Mapping[str, str],
        itself: Key | None = None,
    ) -> None:
        self.told, self.direction, self.excluded, self.hits, self.itself = (
            told, direction, excluded, hits, itself
        )  # fmt: skip
        # The best scores so far; copies of the same weights count once, as in answers.
        self.exact: dict[Key, float] = {}
        # Exact scores of what the client answered.
        self.scores: dict[Key, float] = {}
        self._asked: dict[str, list[Key]] = {}
        for hit in hits:
            self._asked.setdefault(same.get(hit.repo, ""), []).append(_key(hit))

    def take(self, block: Sequence[ModelDescriptors], scores: Float64) -> None:
        """Take some models' scores in: (N,), of all their logits."""
        starts = np.cumsum([0, *(len(described.negated) for described in block)])
        for described, start in zip(block, starts[:-1].tolist(), strict=True):
            for key in self._asked.get(same_logits(described.model), ()):
                place = described.place(key)
                if place is not None:
                    self.scores[key] = float(scores[start + place])
        seen: set[Key] = set()
        for row in np.argsort(-scores, kind="stable").tolist():
            if len(seen) == ANSWERS:
                break
            number = int(np.searchsorted(starts, row, side="right")) - 1
            fold = block[number].fold(row - int(starts[number]))
            if fold not in seen:
                seen.add(fold)
                self.exact[fold] = max(float(scores[row]), self.exact.get(fold, -np.inf))
        best = sorted(self.exact, key=lambda fold: -self.exact[fold])[:ANSWERS]
        self.exact = {fold: self.exact[fold] for fold in best}


def _answers(generation: Generation, expected: Expected) -> Iterator[str]:
    """The encoder and the client's answers, against the descriptors."""
    space = matched_heads.HeadSpace(expected.embeddings, expected.vectors)
    index = Index(generation.index, pinned=generation)
    step = max(1, len(expected.background) // _NAMES)
    names = [*expected.background[::step][:_NAMES], *_STRANGERS]
    same = {model.repo: same_logits(model) for model in expected.models}
    canaries = [_named(generation, index, space, expected, name, same) for name in names]
    canaries += _of_logits(generation, index, expected, same)
    shifts = np.stack(
        [
            canary.direction - _exported(generation, expected, name)
            for canary, name in zip(canaries, names, strict=False)
        ]
    )
    moved = _scan(canaries, shifts, expected, space, generation.sharpness)
    yield from (
        f"its encoder answers {name!r} differently from the one it was made with"
        for name, difference in zip(names, moved, strict=True)
        if not difference < COSINE
    )
    tolerance = generation.sharpness * 2 * COSINE
    recalls = []
    for canary in canaries:
        recalls.append(_recall(canary, tolerance))
        off = [
            hit
            for hit in canary.hits
            if not abs(canary.scores.get(_key(hit), np.inf) - hit.score) < tolerance
        ]
        if off:
            yield f"asked for {canary.told} it gives {off[0].repo}#{off[0].logit} a wrong score"
        if canary.itself in canary.exact and not any(hit.distance < COSINE for hit in canary.hits):
            yield f"asked for the direction of {canary.told} it does not find that logit"
    if recalls and not np.mean(recalls) >= LEAST_RECALL:
        yield (
            f"its answers hold {np.mean(recalls):.0%} of the exact first {ANSWERS}, less than "
            f"{LEAST_RECALL:.0%}, over {len(recalls)} questions"
        )


def _named(
    generation: Generation,
    index: Index,
    space: matched_heads.HeadSpace,
    expected: Expected,
    name: str,
    same: Mapping[str, str],
) -> _Canary:
    excluded = background_numbers(generation, [name])
    direction = space.of_texts(expected.embed([name]), [excluded])[0]
    return _Canary(repr(name), direction, excluded, index.search(name, k=ANSWERS), same)


def _exported(generation: Generation, expected: Expected, name: str) -> Float64:
    vectors = name_vectors(generation.text_encoder.embed, expected.prompts, [name])
    found: Float64 = generation.space.of_texts(vectors, [background_numbers(generation, [name])])[0]
    return found


def _of_logits(
    generation: Generation, index: Index, expected: Expected, same: Mapping[str, str]
) -> Iterator[_Canary]:
    """Logits here and there, each asked for by its direction as if it were one of another index."""
    elsewhere = Index(generation.index, pinned=generation)
    for described, row in some_logits(expected.described(), len(expected.models), ASKED_LOGITS):
        name = f"{described.model.repo}#{described.logits[row]}"
        hits = index.search(like=name, like_index=elsewhere, k=ANSWERS)
        direction = described.directions[row].astype(np.float64)
        yield _Canary(name, direction, np.zeros(0, np.int64), hits, same, described.fold(row))


def _scan(
    canaries: Sequence[_Canary],
    shifts: Float64,
    expected: Expected,
    space: matched_heads.HeadSpace,
    b: float,
) -> Float64:
    """Score every logit exactly, and find by how much each of some shifts of a direction moves any cosine at most."""
    directions = np.stack([canary.direction for canary in canaries]).T
    moved = np.zeros(len(shifts))
    for block in _blocks(distinct(expected.described())):
        gallery = np.concatenate([described.directions for described in block]).astype(np.float64)
        moved = np.maximum(moved, np.abs(gallery @ shifts.T).max(axis=0, initial=0.0))
        cosines = gallery @ directions
        offsets = _Offsets(gallery, space.background, b)
        for number, canary in enumerate(canaries):
            canary.take(block, b * cosines[:, number] - offsets.without(canary.excluded))
    return moved


class _Offsets:
    """The score's second term (`probelog.ranking.matched_heads`, step 4) for some logits, from its definition."""

    def __init__(self, gallery: Float64, background: Float64, b: float) -> None:
        self._exponents = b * (gallery @ background.T)
        self._top = self._exponents.max(axis=1, keepdims=True, initial=-b)
        self._weights = np.exp(self._exponents - self._top)

    def without(self, excluded: npt.NDArray[np.int64]) -> Float64:
        """One number a logit, over the background without some of its names."""
        rivals = self._weights
        if 0 < len(excluded) < rivals.shape[1]:
            rivals = np.delete(rivals, excluded, axis=1)
        if not rivals.shape[1]:
            return np.zeros(len(rivals))
        return np.asarray(np.log(rivals.mean(axis=1)) + self._top[:, 0])


def _blocks(described: Iterable[ModelDescriptors]) -> Iterator[list[ModelDescriptors]]:
    """Neighbouring models, some thousand logits at a time."""
    block: list[ModelDescriptors] = []
    rows = 0
    for item in described:
        block.append(item)
        rows += len(item.negated)
        if rows >= _BATCH_ROWS:
            yield block
            block, rows = [], 0
    if block:
        yield block


def _recall(canary: _Canary, tolerance: float) -> float:
    """Share of the exact first ten that the client gave; equals count as one another."""
    best = sorted(canary.exact.values(), reverse=True)[:ANSWERS]
    if not best:
        return 1.0
    good = [hit for hit in canary.hits if canary.scores.get(_key(hit), -np.inf) >= best[-1] - tolerance]
    return len(good) / len(best)


def _key(hit: Hit) -> Key:
    return hit.repo, hit.logit, hit.negated

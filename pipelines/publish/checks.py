"""Checks that a generation must pass before readers see it.

1. Rows: every model of the receipts that the catalogue lists, and all their logits but the constant ones.
2. Trees: every edge that was recovered, between models that there are; no model is its own ancestor; every model's place.
3. Numbers: no NaN and no infinity in any column of any table.
4. Generators: those that were sampled and listed, each with a description, some of which are compared with their samples.
5. Encoder and answers (`pipelines.publish.answers`).

Everything is streamed, a part of descriptors or a batch of rows at a time: memory does not grow with the index. The
descriptors are read once, for the answers; the other checks use counts from when the generation was written. Where workers
made the rows, they read the rows and the descriptors here, too, some of them each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.runtime.ordered import in_order
from pipelines.complete.descriptors import same_logits
from pipelines.publish.answers import wrong_answers, wrong_answers_of_update
from pipelines.publish.expected import Expected, ExpectedTrees, ExpectedUpdate
from pipelines.publish.generators import wrong_generators
from probelog.arrays import ArrowArray
from probelog.errors import StoreError
from probelog.index.contents.logits import Logits
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer
from probelog.index.schema import connect
from probelog.storage.encoding import from_npy
from probelog.storage.schemas import EDGES, TREE_FACTS, TreeFacts
from probelog.storage.store import Store
from probelog.trees.edges import edges_of
from probelog.trees.places import find_cycle

if TYPE_CHECKING:
    from lancedb.table import Table

_BATCH_ROWS = 8192
# Rows that are read in one go, some 150 MB of a table.
_RANGE_ROWS = 1 << 18


def check_generation(generation: Generation, expected: Expected) -> None:
    """Read a whole generation back as a client does, and compare it with the data that it was made from.

    Raises:
        StoreError: rows, numbers or answers are wrong; names every problem.
    """
    logits = _LogitsRead(generation, expected.pieces is not None)
    _check(
        generation,
        [
            _rows(generation, expected, logits),
            _trees(generation, expected.trees),
            wrong_generators(generation, expected.sampled),
            _numbers(generation, logits),
        ],
        wrong_answers(generation, expected),
    )


def check_update(generation: Generation, expected: ExpectedUpdate) -> None:
    """Check the added and removed models of an update. Its base was checked when it was published.

    Raises:
        StoreError: rows, numbers or answers are wrong; names every problem.
    """
    _check(
        generation,
        [
            _rows_of_update(generation, expected),
            _trees(generation, expected.trees),
            *([] if expected.sampled is None else [wrong_generators(generation, expected.sampled)]),
            _sound_logits([generation.recent]),
            _sound_evidence(_unknown_evidence(generation)),
        ],
        wrong_answers_of_update(generation, expected),
    )


def _check(generation: Generation, tables: Iterable[Iterator[str]], answers: Iterator[str]) -> None:
    """Gather problems and raise them. Answers are checked only where the tables are right: otherwise they mean nothing."""
    problems: list[str] = []
    for check in tables:
        try:
            problems += check
        except StoreError as error:
            problems.append(str(error))
    if not problems:
        problems += answers
    if problems:
        raise StoreError(
            f"generation {generation.pointer.generation} was not published: {'; '.join(problems)}"
        )


# Rows


@dataclass(frozen=True)
class _SomeLogits:
    """What some rows of the logits hold.

    Attributes:
        weights: the weights that are among them, ascending.
        first: (w,) the first row of each.
        counts: (w,) the number of rows of each.
        unknown: number of rows that say nothing of the shown probes.
        bad: number of values that are not finite, by column.
    """

    weights: npt.NDArray[np.int32]
    first: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    unknown: int
    bad: dict[str, int]

    @classmethod
    def of(cls, generation: Generation, within: range) -> _SomeLogits:
        """Read rows: a generation refuses to give out those with NaN, infinity or numbers out of range."""
        owner = np.concatenate([logits.weights for logits in generation.blocks(within)])
        weights, first, counts = np.unique(owner, return_index=True, return_counts=True)
        unknown = _unknown_evidence(generation, within)
        bad = _not_finite(_table(generation, "logits"), within)
        return cls(weights, first + within.start, counts, unknown, bad)


class _LogitsRead:
    """The logits of a whole generation, read once.

    Args:
        generation: that is checked.
        spread: whether workers on Ray read them.
    """

    def __init__(self, generation: Generation, spread: bool) -> None:
        self._generation, self._spread = generation, spread

    @cached_property
    def parts(self) -> list[_SomeLogits]:
        """Some rows after the other."""
        generation, size = self._generation, self._generation.size
        ranges = [range(start, min(start + _RANGE_ROWS, size)) for start in range(0, size, _RANGE_ROWS)]
        if not self._spread:
            return [_SomeLogits.of(generation, within) for within in ranges]
        where = generation.index.uri, generation.pointer.generation
        return [*in_order(_some_logits, ranges, where)]

    def counted(self, models: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
        """Number of rows and first row (-1: none) of every model's weights, (models,) each; None: there are others."""
        counts, first = np.zeros(models, np.int64), np.full(models, -1, np.int64)
        for part in self.parts:
            if len(part.weights) and not (part.weights[0] >= 0 and part.weights[-1] < models):
                return None
            new = first[part.weights] == -1
            first[part.weights[new]] = part.first[new]
            counts[part.weights] += part.counts
        return counts, first


def _some_logits(within: range, index: str, generation: str) -> _SomeLogits:
    return _SomeLogits.of(Generation(Store(index), Pointer(generation, "", "")), within)


def _rows(generation: Generation, expected: Expected, logits: _LogitsRead) -> Iterator[str]:
    """Counts of models and logits."""
    if expected.missing != expected.dropped:
        yield (
            f"its descriptors lack {expected.missing} logits of the receipts' models, but {expected.dropped} were "
            "dropped for being constant"
        )
    listed = generation.models_table(["repo", "sha", "logits", "weights", "first_row", "rows"])
    listed_models = list(zip(*(listed[name].to_pylist() for name in ("repo", "sha", "logits")), strict=True))
    if listed_models != [(model.repo, model.sha, model.logits) for model in expected.models]:
        yield f"its {len(listed_models)} models are not the {len(expected.models)} of the receipts and the catalogue"
        return
    weights, first, rows = (listed[name].to_numpy() for name in ("weights", "first_row", "rows"))
    # Logits that several models share are stored once, as those of the first model.
    expected_counts = np.full(len(weights), -1, np.int64)
    for number, count in expected.written.logits.items():
        if expected_counts[weights[number]] == -1:
            expected_counts[weights[number]] = count
    expected_counts = np.maximum(expected_counts, 0)
    found = logits.counted(len(weights))
    if found is None:
        yield "it holds logits of models that it does not hold"
        return
    counted, starts = found
    wrong = counted[weights] != expected_counts[weights]
    wrong |= (rows != counted[weights]) | ((first != starts[weights]) & (rows > 0))
    if wrong.any():
        number = int(np.argmax(wrong))
        yield (
            f"{int(wrong.sum())} models have other logits than their descriptors, {listed_models[number][0]} for one "
            f"({counted[weights[number]]} instead of {expected_counts[weights[number]]})"
        )


def _rows_of_update(generation: Generation, expected: ExpectedUpdate) -> Iterator[str]:
    """Every added model once, with as many logits as were described; none of the removed ones."""
    models = expected.models
    described: dict[str, int] = {}
    for number, logits in expected.written.logits.items():
        described.setdefault(same_logits(models[number]), logits)
    added = {model.repo for model in models}
    listed = {
        (row["repo"], row["sha"]): row["rows"]
        for row in generation.models_named("repo", added, ["repo", "sha", "rows"])
    }
    for model in models:
        expected_rows = expected.known.get(same_logits(model), described.get(same_logits(model), 0))
        rows = listed.get((model.repo, model.sha))
        if rows != expected_rows:
            yield f"{model.repo} has {rows} rows of logits instead of {expected_rows}"
            break
    if len(listed) != len(models):
        yield f"it holds {len(listed)} of the repositories that were added, instead of {len(models)}"
    removed = sorted(repo for repo in expected.removed if repo not in added)
    if generation.models_named("repo", removed, ["repo"]):
        yield "it still holds models that were removed"
    counted = expected.base.settings.models - len(expected.removed) + len(models)
    if generation.count_models("true") != counted:
        yield f"it holds {generation.count_models('true')} models instead of {counted}"


# Trees


def _trees(generation: Generation, expected: ExpectedTrees | None) -> Iterator[str]:
    """The generation's own table of edges, and the places of the models that it holds itself."""
    if expected is None:
        if generation.settings.edges is not None:
            yield "it has edges, but no trees were recovered"
        return
    table = _table(generation, "edges")
    if table.count_rows() != expected.edges or generation.settings.edges != expected.edges:
        yield f"it holds {table.count_rows()} edges instead of {expected.edges}"
        return
    parents: dict[str, list[str]] = {}
    latent: dict[str, bool] = {}
    try:
        for batch in _batches(table, EDGES.names):
            for edge in edges_of(pa.Table.from_batches([batch])):
                parents.setdefault(edge.child, []).append(edge.parent)
                latent[edge.parent] = edge.latent
    except ValueError as error:
        yield f"its edges cannot be read: {error}"
        return
    if unknown := sorted(parents.keys() - expected.places.keys()):
        yield f"it holds edges of {len(unknown)} models whose weights were not compared, {unknown[0]} for one"
    if (model := find_cycle(parents)) is not None:
        yield f"{model} is its own ancestor"
    columns = ["repo", *TREE_FACTS]
    if generation.is_update:
        existing = {row["repo"] for row in generation.models_named("repo", latent, ["repo"])}
        listed = generation.models_named("repo", expected.places, columns)
    else:
        existing = set(expected.places)
        listed = generation.models_table(columns).to_pylist()
    if generation.settings.generators is not None:
        generators = generation.generators.rows(columns).to_pylist()
        existing |= {row["repo"] for row in generators} & set(latent)
        listed += generators
    if wrong := sorted(name for name, is_latent in latent.items() if is_latent == (name in existing)):
        yield f"its edges are wrong about whether {len(wrong)} parents are there, {wrong[0]} for one"
    places = {row["repo"]: TreeFacts(**{name: row[name] for name in TREE_FACTS}) for row in listed}
    if wrong := sorted(name for name, place in expected.places.items() if places.get(name, place) != place):
        yield f"{len(wrong)} models have another place in their trees than was found, {wrong[0]} for one"


# Numbers


def _sound_logits(blocks: Iterable[Logits]) -> Iterator[str]:
    """Read logits: a generation refuses to give out those with NaN, infinity or numbers out of range."""
    for _ in blocks:
        pass
    yield from ()


def _unknown_evidence(generation: Generation, within: range | None = None) -> int:
    """Read what is known of shown probes: a generation refuses to give out what is none."""
    return sum(int((~evidence.known).sum()) for evidence in generation.own_evidence(within))


def _sound_evidence(unknown: int) -> Iterator[str]:
    if unknown:
        yield f"it does not say of {unknown} logits whether the shown probes were seen by the models"


def _numbers(generation: Generation, logits: _LogitsRead) -> Iterator[str]:
    """NaN and infinity, in any column of floating-point numbers."""
    yield from _sound_evidence(sum(part.unknown for part in logits.parts))
    columns: Counter[tuple[str, str]] = Counter()
    for part in logits.parts:
        columns.update({("logits", name): count for name, count in part.bad.items()})
    for table in ("models", "probes"):
        columns.update(
            {(table, name): count for name, count in _not_finite(_table(generation, table)).items()}
        )
    yield from (
        f"column {name} of its {table} holds {count} values that are not finite"
        for (table, name), count in columns.items()
        if count
    )
    for name in ("background_vectors.npy", "background_statistics.npy"):
        if not np.isfinite(from_npy(generation.meta(name))).all():
            yield f"its {name} holds values that are not finite"


def _not_finite(table: Table, within: range | None = None) -> dict[str, int]:
    """Number of values that are not finite in some rows, or in all, by column of floating-point numbers."""
    floating = [item.name for item in table.schema if pa.types.is_floating(_element(item.type))]
    bad = dict.fromkeys(floating, 0)
    for batch in _batches(table, floating, within) if floating else ():
        for name in floating:
            values = _flat(batch[name])
            finite = pc.sum(pc.cast(pc.is_finite(values), pa.int64())).as_py() or 0
            bad[name] += len(values) - finite - values.null_count
    return bad


def _batches(table: Table, columns: Sequence[str], within: range | None = None) -> Iterator[pa.RecordBatch]:
    """Columns of a LanceDB table, some thousand rows at a time."""
    within = range(table.count_rows()) if within is None else within
    query = table.search().select(list(columns)).limit(max(1, len(within)))
    yield from (query.offset(within.start) if within.start else query).to_batches(batch_size=_BATCH_ROWS)


def _table(generation: Generation, name: str) -> Table:
    return connect(generation.index, generation.pointer.generation).open_table(name)


def _element(kind: pa.DataType) -> pa.DataType:
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind


def _flat(column: ArrowArray) -> ArrowArray:
    while not pa.types.is_primitive(column.type):
        column = pc.list_flatten(column)
    return column

"""Checks that a generation must pass before readers see it.

1. Rows: every model of the receipts that the catalogue lists, and all their logits but the constant ones.
2. Trees: every edge that was recovered, between models that there are; no model is its own ancestor; every model's place.
3. Numbers: no NaN and no infinity in any column of any table.
4. Encoder and answers (`pipelines.publish.answers`).

Everything is streamed, a part of descriptors or a batch of rows at a time: memory does not grow with the index. The
descriptors are read once, for the answers; the other checks use counts from when the generation was written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.complete.descriptors import same_logits
from pipelines.publish.answers import wrong_answers, wrong_answers_of_update
from pipelines.publish.expected import Expected, ExpectedTrees, ExpectedUpdate
from probelog.arrays import ArrowArray
from probelog.errors import StoreError
from probelog.index.contents.logits import Logits
from probelog.index.generation import Generation
from probelog.index.schema import connect
from probelog.storage.encoding import from_npy
from probelog.storage.schemas import EDGES, TREE_FACTS, TreeFacts
from probelog.trees.edges import edges_of
from probelog.trees.places import find_cycle

if TYPE_CHECKING:
    from lancedb.table import Table

_BATCH_ROWS = 8192


def check_generation(generation: Generation, expected: Expected) -> None:
    """Read a whole generation back as a client does, and compare it with the data that it was made from.

    Raises:
        StoreError: rows, numbers or answers are wrong; names every problem.
    """
    _check(
        generation,
        [_rows(generation, expected), _trees(generation, expected.trees), _numbers(generation)],
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
            _sound_logits([generation.recent]),
            _sound_evidence(generation),
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


def _rows(generation: Generation, expected: Expected) -> Iterator[str]:
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
    for number, logits in expected.written.logits.items():
        if expected_counts[weights[number]] == -1:
            expected_counts[weights[number]] = logits
    expected_counts = np.maximum(expected_counts, 0)
    owner = np.concatenate([logits.weights for logits in generation.blocks()])
    if len(owner) and not (owner.min() >= 0 and owner.max() < len(weights)):
        yield "it holds logits of models that it does not hold"
        return
    counted = np.bincount(owner, minlength=len(weights))
    starts = np.full(len(weights), -1, np.int64)
    numbers, places = np.unique(owner, return_index=True)
    starts[numbers] = places
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


def _sound_evidence(generation: Generation) -> Iterator[str]:
    """Read what is known of shown probes: a generation refuses to give out what is none."""
    unknown = sum(int((~evidence.known).sum()) for evidence in generation.own_evidence())
    if unknown:
        yield f"it does not say of {unknown} logits whether the shown probes were seen by the models"


def _numbers(generation: Generation) -> Iterator[str]:
    """NaN and infinity, in any column of floating-point numbers."""
    yield from _sound_logits(generation.blocks())
    yield from _sound_evidence(generation)
    for table in ("logits", "models", "probes"):
        opened = _table(generation, table)
        floating = [item.name for item in opened.schema if pa.types.is_floating(_element(item.type))]
        bad = dict.fromkeys(floating, 0)
        for batch in _batches(opened, floating) if floating else ():
            for name in floating:
                values = _flat(batch[name])
                bad[name] += (
                    len(values)
                    - (pc.sum(pc.cast(pc.is_finite(values), pa.int64())).as_py() or 0)
                    - values.null_count
                )
        yield from (
            f"column {name} of its {table} holds {count} values that are not finite"
            for name, count in bad.items()
            if count
        )
    for name in ("background_vectors.npy", "background_statistics.npy"):
        if not np.isfinite(from_npy(generation.meta(name))).all():
            yield f"its {name} holds values that are not finite"


def _batches(table: Table, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Columns of a LanceDB table, some thousand rows at a time."""
    rows = max(1, table.count_rows())
    yield from table.search().select(list(columns)).limit(rows).to_batches(batch_size=_BATCH_ROWS)


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

"""How well an index's model trees are recovered, against a truth file: its edges, and other methods on the same weights.

The index's own edges are judged as they were published. What they are without times or declared parents is recovered
again, from the statistics of weights that the store around the index still holds; other methods need these, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.trees.inputs import TreeInputs
from probelog.errors import UsageError
from probelog.evaluation.trees import (
    Bin,
    Figures,
    Truth,
    among,
    baseline_edges,
    calibration_error,
    figures,
    independent_pairs,
    judged,
    reliability,
    truth_of,
)
from probelog.index.generation import Generation
from probelog.index.pointer import find_index, read_pointer, store_around
from probelog.search.trees import edges_with
from probelog.storage.layout import LedgerFolder
from probelog.storage.ledger import Ledger
from probelog.storage.schemas import WEIGHTS
from probelog.storage.store import Store
from probelog.trees.edges import Edge
from probelog.trees.families.tables import ModelFacts, families
from probelog.trees.recovery.recover import recover

_COLUMNS = {
    "top-1": 8,
    "twins": 8,
    "directed": 16,
    "undirected": 16,
    "parentless": 11,
    "relation": 9,
    "merge weights": 14,
    "false": 12,
}


@dataclass(frozen=True)
class Method:
    """One method's edges: figures, and of those that have probabilities, how far these can be believed.

    ``calibration_error`` is the mean gap between probability and frequency (None without probabilities), and
    ``reliability`` the table that it is of.
    """

    name: str
    figures: Figures
    calibration_error: float | None
    reliability: Sequence[Bin]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "name": self.name,
            **self.figures.to_dict(),
            "calibration_error": self.calibration_error,
            "reliability": [asdict(row) for row in self.reliability],
        }


@dataclass(frozen=True)
class TreeEvaluation:
    """All methods on the models that index and truth have in common.

    Attributes:
        index: its address.
        models: how many take part, of how many in the truth file.
        methods: the index's own edges first.
        notes: what could not be measured, and why.
    """

    index: str
    models: tuple[int, int]
    methods: Sequence[Method]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "index": self.index,
            "models": self.models[0],
            "models_of_truth": self.models[1],
            "methods": [method.to_dict() for method in self.methods],
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """The same as tables for a person."""
        names = "".join(f"{name:>{width}}" for name, width in _COLUMNS.items())
        lines = [
            f"{self.index}: {self.models[0]:,} of the {self.models[1]:,} models of the truth file",
            f"{'method':<34}{names}{'calibration':>13}",
        ]
        for method in self.methods:
            cells = method.figures.cells()
            error = method.calibration_error
            row = "".join(f"{cells[name]:>{width}}" for name, width in _COLUMNS.items())
            lines.append(f"{method.name:<34}{row}{'-' if error is None else f'{error:.3f}':>13}")
        lines.append(
            "directed, undirected: precision, recall and F1 of edges; parentless: no edge, or to an ancestor"
        )
        for method in self.methods:
            if not method.reliability:
                continue
            relations = ", ".join(f"{name} {share}" for name, share in method.figures.relations.items())
            lines.append(f"{method.name}: right relations, given the parent: {relations or 'none'}")
            lines += [
                f"  probability {row.low:.1f} to {row.high:.1f}: {row.edges:5} edges, mean {row.probability:.2f}, "
                f"true {row.frequency:.2f}"
                for row in method.reliability
            ]
        return lines + [f"note: {note}" for note in self.notes]


def evaluate_trees(
    uri: str, truth_file: Path, store: str | None = None, *, times: bool = True, declared: bool = True
) -> TreeEvaluation:
    """Judge the model trees of an index.

    Args:
        uri: the index or its store.
        truth_file: see `probelog.evaluation.trees.truth_of`.
        store: that the index was made in; default: the one around it.
        times: whether the times at which repositories were made may be used.
        declared: whether declared parents may be.

    Raises:
        QueryError: the index has no model trees.
        UsageError: the truth file is unusable or speaks of none of the index's models, or edges are to be recovered
            again and the store does not hold the weights' statistics.
    """
    index = find_index(uri)
    generation = Generation(index, read_pointer(index)[0])
    whole = _read_truth(truth_file)
    models = {
        row["repo"]: row
        for row in generation.models_named("repo", whole, ["repo", "sha", "created_at", "parents"])
    }
    truth = among(whole, models)
    if not truth:
        raise UsageError(f"{truth_file} speaks of none of the models in {index.uri}")
    published = edges_with(generation, "child", sorted(truth))
    versions = {repo: str(model["sha"]) for repo, model in models.items()}
    source = store_around(index) if store is None else Store(store)
    weights = _weights(source, generation.settings.observations, versions)
    missing = len(versions) - len(set(weights["repo"].to_pylist()))
    notes = []
    if missing:
        notes.append(
            f"{source.uri} does not hold the weights' statistics of {missing:,} of the models: give the store that the "
            "index was made in (--store)"
        )
    if weights.num_rows == 0:
        if not (times and declared):
            raise UsageError(f"edges cannot be recovered again: {notes[0]}")
        return TreeEvaluation(
            index.uri, (len(truth), len(whole)), [_method("this index", truth, published, None)], notes
        )
    groups = families(weights)
    independent = independent_pairs(truth, (family.repos for family in groups))
    methods = [_method("this index", truth, published, independent)]
    facts = {
        repo: ModelFacts(
            None if model["created_at"] is None else model["created_at"].timestamp(),
            tuple(sorted({parent["repo"] for parent in model["parents"] or []})),
        )
        for repo, model in models.items()
    }
    if all(model.uploaded is None for model in facts.values()):
        notes.append(
            "the index knows no time at which a repository was made: methods that need times are left out"
        )
    if not (times and declared):
        without = " and ".join(
            name for name, used in (("times", times), ("declared parents", declared)) if not used
        )
        edges = recover(weights, facts, times=times, declared=declared)
        methods.append(_method(f"again, without {without}", truth, edges, independent))
    for name, edges in baseline_edges(groups, truth, facts if times else {}).items():
        # They name neither relations nor probabilities.
        judged_edges = replace(figures(truth, edges, independent), relations={})
        methods.append(Method(name, judged_edges, None, []))
    return TreeEvaluation(index.uri, (len(truth), len(whole)), methods, notes)


def _read_truth(file: Path) -> Truth:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is no JSON: {error}") from None
    return truth_of(content, file)


def _method(name: str, truth: Truth, edges: Sequence[Edge], independent: int | None) -> Method:
    table = reliability(judged(truth, edges))
    return Method(name, figures(truth, edges, independent), calibration_error(table), table)


def _weights(store: Store, key: str, versions: Mapping[str, str]) -> pa.Table:
    """The statistics of the weights of some models, by repository and commit (``WEIGHTS``), where a store has them."""
    inputs = TreeInputs.of(store, Ledger(store, LedgerFolder.of(key).path).receipts(), [])
    models = [model for model in inputs.models if versions.get(model.repo) == model.sha]
    tables = replace(inputs, models=models).batches(WEIGHTS.names)
    return pa.concat_tables([WEIGHTS.empty_table(), *(table.cast(WEIGHTS) for table in tables)])

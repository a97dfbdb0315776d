"""Model trees: how often the recovered parents are the true ones, beside other methods, on forests with known parents.

    uv run python -m tests.benchmarks.trees [--bench DIR] [--forests DIR ...] [--cache DIR] [--seeds 4 5 6]
        [--only] [--ablate] [--plot FILE] [--fit]

The bench is a folder (by default ``../shared/bench``; it is skipped, aloud, where it is absent) with two sets of
trained models: ``forest``, which everything is tuned on, and ``hub``, which it is not. The hub has no times of upload,
and all that is known of a model there is its parent. ``--forests`` are more, of `probelog-index zoo --forest`. The seeds
are synthetic forests (`tests.benchmarks.trees_world`), which nothing was fitted to. Each forest is measured with times of
upload, with 5 % of them wrong, and without any; declared parents are withheld. ``--only`` leaves the bench out.
``--cache`` keeps the ``weights`` tables, which take some seconds to read. ``--ablate`` measures without each signal,
``--plot`` draws the reliability of all edges of ``--forests``. ``--fit`` prints the coefficients of
`probelog.trees.evidence.calibration` that fit the bench and ``--forests``, and the calibration error of each when it is left
out of the fit. The columns: `probelog.evaluation.trees`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from probelog.evaluation.trees import (
    ModelTruth,
    Share,
    Truth,
    baseline_edges,
    calibration_error,
    figures,
    independent_pairs,
    judged,
    reliability,
    truth_of,
)
from probelog.trees.edges import Edge, Relation
from probelog.trees.evidence import direction
from probelog.trees.evidence.calibration import features, fit
from probelog.trees.families.tables import Family, ModelFacts, families
from probelog.trees.recovery import tree
from probelog.trees.recovery.recover import LEAST_PROBABILITY, recover
from probelog.weights.reader import Weights, layer_table
from tests.benchmarks.trees_world import Forest, weights_table

_BENCH = Path("../shared/bench")
# Synthetic forests that the probabilities are fitted to, beside trained ones; figures are of other seeds.
_FIT_SEEDS = (101, 102)
MODES = ("times", "5 % wrong", "no times")

# What is left out, and how: a mapping or a module, and what is put in place.
_SIGNALS: Mapping[str, tuple[Any, Mapping[str, float]]] = {
    **{f"direction: {name}": (direction.WEIGHTS, {name: 0.0}) for name in direction.WEIGHTS},
    "equal norms and biases": (tree, {"_EQUAL_VECTORS": 0.0}),
    "distances": (tree, {"_DISTANCE_WEIGHT": 1.0}),
    "leaves (recast, pruned, ...)": (tree, {"_FIXED_PARENT": 0.0}),
    "the step from the grandparent": (tree, {"_CLIMB": -math.inf}),
    "unseen parents": (tree, {"_SIBLING_SHARE": math.inf}),
}


@dataclass(frozen=True)
class Case:
    """A forest: its table and the truth about its models; ``times`` (true and 5 % wrong ones) where it has any."""

    name: str
    weights: pa.Table
    truth: Truth
    times: Mapping[str, tuple[float, float]]

    def facts(self, mode: str) -> dict[str, ModelFacts]:
        if mode == "no times":
            return {}
        return {repo: ModelFacts(times[mode == "5 % wrong"]) for repo, times in self.times.items()}

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.times else MODES[2:]


def forest(folder: Path, cache: Path | None) -> Case:
    """A folder of trained models as a case."""
    file = folder / "truth.json"
    content = json.loads(file.read_text())
    truth = truth_of(content, file)
    times = {
        repo: (_seconds(model["time"]), _seconds(model["time_5pct_wrong"]))
        for repo, model in content["models"].items()
    }
    return Case(str(folder), _table(folder / "hub", sorted(truth), cache, folder.name), truth, times)


def hub(folder: Path, cache: Path | None) -> Case:
    """The small hub as a case: the parents of its models, of which some are not there."""
    file = folder / "truth.json"
    truth = truth_of(json.loads(file.read_text()), file)
    return Case("hub", _table(folder / "hub", sorted(truth), cache, "hub"), truth, {})


def synthetic(seed: int) -> Case:
    """A forest of untrained models as a case."""
    world = Forest(seed).world
    random = np.random.default_rng(seed + 1000)
    nodes = world.uploaded
    span = max(node.time for node in nodes)
    truth = {
        node.repo: ModelTruth(
            parents={p: weight for p, weight in node.parents.items() if p not in world.withheld},
            ancestors=frozenset(world.ancestors(node.repo)),
            relation=node.relation,
            tree=node.tree,
            unseen=not world.withheld.isdisjoint(node.parents),
        )
        for node in nodes
    }
    times = {
        node.repo: (node.time, float(random.uniform(0, span)) if random.random() < 0.05 else node.time)
        for node in nodes
    }
    return Case(f"synthetic {seed}", weights_table(nodes), truth, times)


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp()


def _table(hub: Path, repos: Sequence[str], cache: Path | None, name: str) -> pa.Table:
    kept = cache / f"{name}.parquet" if cache else None
    if kept is not None and kept.exists():
        return pq.read_table(kept)
    table = pa.concat_tables(
        layer_table(repo, "0" * 40, Weights(hub / repo).read()[1].layers) for repo in repos
    )
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, kept)
    return table


def methods(case: Case, groups: Sequence[Family], mode: str) -> dict[str, list[Edge]]:
    """The edges of every method; baselines have no probability and no relation."""
    facts = case.facts(mode)
    return {
        "recover": recover(case.weights, facts),
        "recover, no limit": recover(case.weights, facts, least_probability=0),
        **baseline_edges(groups, case.truth, facts),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table a forest and mode, and calibration over all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bench", type=Path, default=_BENCH)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[4, 5, 6])
    parser.add_argument("--forests", type=Path, nargs="*", default=[])
    parser.add_argument("--only", action="store_true")
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args(arguments)
    trained = [forest(folder, options.cache) for folder in options.forests]
    cases = list(trained)
    if options.only:
        pass
    elif (options.bench / "forest" / "truth.json").is_file():
        bench = forest(options.bench / "forest", options.cache)
        if options.fit:
            _fit(
                [
                    bench,
                    hub(options.bench, options.cache),
                    *trained,
                    *(synthetic(seed) for seed in _FIT_SEEDS),
                ]
            )
            return
        cases += [bench, hub(options.bench, options.cache)]
    else:
        print(f"SKIPPED: there is no forest in {options.bench}", file=sys.stderr)
    if options.plot:
        _plot(trained, options.plot)
    if options.ablate:
        _ablate(cases)
        return
    cases += [synthetic(seed) for seed in options.seeds]
    for case in cases:
        every: list[tuple[float, bool]] = []
        groups = families(case.weights)
        independent = independent_pairs(case.truth, (family.repos for family in groups))
        for mode in case.modes:
            print(f"\n{case.name}, {mode}")
            for name, edges in methods(case, groups, mode).items():
                row = figures(case.truth, edges, independent).cells()
                print(f"  {name:20} " + "  ".join(f"{key} {value}" for key, value in row.items()))
                pairs = judged(case.truth, edges)
                if name == "recover, no limit":
                    every += pairs
                    print(f"  calibration error of all edges {_calibration_error(pairs):.3f}")
                if name == "recover":
                    print(f"  calibration error from {LEAST_PROBABILITY} {_calibration_error(pairs):.3f}")
                    print(f"  parentless with a twin of the unseen parent {_stand_ins(case.truth, edges)}")
        print(f"{case.name}, calibration error over all modes: {_calibration_error(every):.3f}")


def _ablate(cases: Sequence[Case]) -> None:
    """Top-1 and parentless models of all cases together, without one signal after the other."""
    print(f"{'without':32} " + "  ".join(f"{mode:>22}" for mode in MODES))
    for name, (holder, change) in {"nothing": (direction.WEIGHTS, {}), **_SIGNALS}.items():
        cells = []
        with (
            mock.patch.dict(holder, change)
            if isinstance(holder, dict)
            else mock.patch.multiple(holder, **change)
        ):
            for mode in MODES:
                found = [
                    figures(case.truth, recover(case.weights, case.facts(mode)), None)
                    for case in cases
                    if mode in case.modes
                ]
                shares = [Share(*(sum(column) for column in zip(*rows, strict=True))) for rows in (
                    [(one.top1.right, one.top1.of) for one in found],
                    [(one.parentless.right, one.parentless.of) for one in found],
                )]  # fmt: skip
                cells.append(f"{shares[0]} {shares[1]}")
        print(f"{name:32} " + "  ".join(f"{cell:>22}" for cell in cells))


def _plot(cases: Sequence[Case], file: Path) -> None:
    """How often edges are true, by their probability."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4.5), layout="constrained")
    for mode in MODES:
        pairs = [
            pair
            for case in cases
            if mode in case.modes
            for pair in judged(case.truth, recover(case.weights, case.facts(mode), least_probability=0))
        ]
        bins = [one for one in reliability(pairs) if one.edges]
        label = f"{mode} (expected calibration error {_calibration_error(pairs):.3f})"
        axes.plot([one.probability for one in bins], [one.frequency for one in bins], marker="o", label=label)
    axes.plot([0, 1], [0, 1], linestyle=":", color="grey")
    axes.set(xlabel="probability of an edge", ylabel="share of true edges", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def _stand_ins(truth: Truth, edges: Sequence[Edge]) -> int:
    """Models whose unseen parent's twin was given for it: a copy, a rounded copy or one with another head."""
    twins = (Relation.COPY, Relation.RECAST, Relation.QUANTISED, Relation.HEAD_ONLY, Relation.PERMUTED)
    return sum(
        any(
            edge.parent in truth
            and edge.parent not in truth[edge.child].ancestors
            and truth[edge.parent].relation in twins
            and truth[edge.parent].unseen
            and truth[edge.parent].ancestors <= truth[edge.child].ancestors
            for edge in edges
            if edge.child == repo
        )
        for repo, model in truth.items()
        if not model.parents
    )


def _calibration_error(edges: Sequence[tuple[float, bool]]) -> float:
    return calibration_error(reliability(edges))


def _fit(cases: Sequence[Case]) -> None:
    """Coefficients from all cases, and how well those of the others predict each trained one's edges.

    Of a case with times those that are all true are left out: they would count its edges twice.
    """
    rows = {
        (case.name, mode): [
            (features(edge.relation, edge.evidence), judged(case.truth, [edge])[0][1])
            for edge in recover(case.weights, case.facts(mode), least_probability=0)
            if not edge.latent
        ]
        for case in cases
        for mode in case.modes
    }

    def fitted(without: str = "") -> dict[str, float]:
        used = [
            row for (name, mode), some in rows.items() if mode != "times" and name != without for row in some
        ]
        return fit([values for values, _ in used], [is_true for _, is_true in used])

    for name, value in fitted().items():
        print(f'"{name}": {value:.2f},')
    pooled: dict[str, list[tuple[float, bool]]] = {mode: [] for mode in MODES}
    for case in cases:
        if case.name.startswith("synthetic"):
            continue
        coefficients = fitted(without=case.name)
        for mode in case.modes:
            pairs = [
                (
                    1 / (1 + math.exp(-sum(coefficients[name] * value for name, value in values.items()))),
                    is_true,
                )
                for values, is_true in rows[case.name, mode]
            ]
            pooled[mode] += pairs
            print(f"left out: {case.name}, {mode}: calibration error {_calibration_error(pairs):.3f}")
    for mode, pairs in pooled.items():
        print(f"left out, all together, {mode}: calibration error {_calibration_error(pairs):.3f}")


if __name__ == "__main__":
    main()

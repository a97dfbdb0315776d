"""Model trees: how often the recovered parents are the true ones, beside other methods, on forests with known parents.

    uv run python -m tests.benchmarks.trees [--bench DIR] [--cache DIR] [--seeds 4 5 6] [--fit]

The bench is a folder (by default ``../shared/bench``; it is skipped, aloud, where it is absent) with two sets of
trained models: ``forest``, which everything is tuned on, and ``hub``, which it is not. The hub has no times of upload,
and all that is known of a model there is its parent. The seeds are synthetic forests (`tests.benchmarks.trees_world`), which nothing was fitted to. Each
forest is measured with times of upload, with 5 % of them wrong, and without any; declared parents are withheld.
``--cache`` keeps the ``weights`` tables, which take some seconds to read. ``--fit`` prints the coefficients
of `probelog.trees.calibration` that fit the forest.

top-1        children whose parent is uploaded and that got it (a merge: its heaviest edge leads to a parent)
twins        the same, where an edge to or from an equal model counts: nothing in the weights tells them apart
directed, undirected   precision, recall and F1 of edges
parentless   models without an uploaded parent that got no edge, or one to a true ancestor
false        pairs of independent models (another tree) with an edge, of all such pairs of one architecture
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from probelog.trees import baselines
from probelog.trees.calibration import features, fit
from probelog.trees.edges import Edge, Relation
from probelog.trees.families import Family, ModelFacts, families
from probelog.trees.recover import LEAST_PROBABILITY, recover
from probelog.weights.reader import Weights, layer_table
from tests.benchmarks.trees_world import Forest, weights_table

_BENCH = Path("../shared/bench")
# Synthetic forests that the probabilities are fitted to, beside the trained one; figures are of other seeds.
_FIT_SEEDS = (101, 102)
MODES = ("times", "5 % wrong", "no times")


@dataclass(frozen=True)
class Truth:
    """What is known of one uploaded model; ``parents`` holds uploaded ones with their weights."""

    parents: Mapping[str, float]
    ancestors: frozenset[str]
    relation: str
    tree: str
    times: tuple[float, float] | None


@dataclass(frozen=True)
class Case:
    """A forest: its table and the truth about its models."""

    name: str
    weights: pa.Table
    truth: Mapping[str, Truth]

    def facts(self, mode: str) -> dict[str, ModelFacts]:
        if mode == "no times":
            return {}
        return {
            repo: ModelFacts(truth.times[mode == "5 % wrong"])
            for repo, truth in self.truth.items()
            if truth.times
        }

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if all(truth.times for truth in self.truth.values()) else MODES[2:]


def forest(folder: Path, cache: Path | None) -> Case:
    """A folder of trained models as a case."""
    facts = json.loads((folder / "truth.json").read_text())
    models: dict[str, Any] = facts["models"]
    everything = {**facts["withheld"], **models}

    def ancestors(repo: str) -> set[str]:
        parents = {
            p["repo"] or p["withheld"] for p in everything[repo]["parents"] if p["repo"] or p["withheld"]
        }
        return parents.union(*(ancestors(parent) for parent in parents)) if parents else parents

    truth = {
        repo: Truth(
            parents={p["repo"]: p["weight"] for p in model["parents"] if p["repo"]},
            ancestors=frozenset(ancestors(repo)),
            relation=model["relation"],
            tree=model["tree"],
            times=(_seconds(model["time"]), _seconds(model["time_5pct_wrong"])),
        )
        for repo, model in models.items()
    }
    return Case("forest", _table(folder / "hub", sorted(models), cache, "forest"), truth)


def hub(folder: Path, cache: Path | None) -> Case:
    """The small hub as a case: the parents of its models, of which some are not there."""
    models: dict[str, Any] = json.loads((folder / "truth.json").read_text())["models"]

    def ancestors(repo: str) -> list[str]:
        parent = models[repo].get("parent") if repo in models else None
        return [parent, *ancestors(parent)] if parent else []

    truth = {
        repo: Truth(
            parents={model["parent"]: 1.0} if model.get("parent") in models else {},
            ancestors=frozenset(ancestors(repo)),
            relation="copy" if model["kind"] == "copy" else "fine-tune",
            tree=[repo, *ancestors(repo)][-1],
            times=None,
        )
        for repo, model in models.items()
    }
    return Case("hub", _table(folder / "hub", sorted(models), cache, "hub"), truth)


def synthetic(seed: int) -> Case:
    """A forest of untrained models as a case."""
    world = Forest(seed).world
    random = np.random.default_rng(seed + 1000)
    nodes = world.uploaded
    span = max(node.time for node in nodes)
    truth = {
        node.repo: Truth(
            parents={p: weight for p, weight in node.parents.items() if p not in world.withheld},
            ancestors=frozenset(world.ancestors(node.repo)),
            relation=node.relation,
            tree=node.tree,
            times=(node.time, float(random.uniform(0, span)) if random.random() < 0.05 else node.time),
        )
        for node in nodes
    }
    return Case(f"synthetic {seed}", weights_table(nodes), truth)


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


def methods(case: Case, mode: str) -> dict[str, list[Edge]]:
    """The edges of every method; baselines have no probability and no relation."""
    facts = case.facts(mode)
    groups = families(case.weights)

    def edges(parents: Mapping[str, str]) -> list[Edge]:
        return [Edge(child, parent, Relation.FINE_TUNED, 1.0) for child, parent in sorted(parents.items())]

    def trees(family: Family) -> int:
        return len({case.truth[repo].tree for repo in family.repos})

    results = {"recover": recover(case.weights, facts)}
    results["recover, no limit"] = recover(case.weights, facts, least_probability=0)
    results["nearest"] = [e for family in groups for e in edges(baselines.nearest(family))]
    results["MoTHer, trees given"] = [e for f in groups for e in edges(baselines.mother(f, trees(f)))]
    results["MoTHer, not given"] = [e for f in groups for e in edges(baselines.mother(f))]
    if facts:
        results["nearest + time"] = [e for f in groups for e in edges(baselines.nearest_earlier(f, facts))]
        results["Atlas rules"] = [e for f in groups for e in edges(baselines.atlas(f, facts))]
    return results


def figures(case: Case, edges: Sequence[Edge]) -> dict[str, str]:
    """One row of the table."""
    truth = case.truth
    by_child: dict[str, list[Edge]] = {}
    for edge in edges:
        by_child.setdefault(edge.child, []).append(edge)
    heaviest = {
        child: max(several, key=lambda e: (e.weight, e.parent)) for child, several in by_child.items()
    }
    equal = {frozenset((e.child, e.parent)) for e in edges if e.relation in (Relation.COPY, Relation.RECAST)}
    children = [repo for repo, model in truth.items() if model.parents]
    right = [repo for repo in children if repo in heaviest and heaviest[repo].parent in truth[repo].parents]
    related = sum(heaviest[repo].relation == truth[repo].relation for repo in right)
    parentless = [repo for repo, model in truth.items() if not model.parents]
    fine = sum(all(e.parent in truth[r].ancestors for e in by_child.get(r, ())) for r in parentless)
    true = {(child, parent) for child, model in truth.items() for parent in model.parents}
    got = {(edge.child, edge.parent) for edge in edges}
    false = sum(truth[e.child].tree != truth[e.parent].tree for e in edges)
    errors = [
        abs(edge.weight - truth[edge.child].parents[edge.parent])
        for edge in edges
        if edge.relation is Relation.MERGE and edge.parent in truth[edge.child].parents
    ]
    return {
        "top-1": f"{len(right)}/{len(children)}",
        "twins": f"{_with_twins(case, children, heaviest, equal)}/{len(children)}",
        "directed": _scores(true, got),
        "undirected": _scores({frozenset(e) for e in true}, {frozenset(e) for e in got}),
        "parentless": f"{fine}/{len(parentless)}",
        "relation": f"{related}/{len(right)}",
        "merge weights": f"{max(errors, default=0):.3f}",
        "false": f"{false}/{_independent(case)}",
    }


def _with_twins(
    case: Case, children: Sequence[str], heaviest: Mapping[str, Edge], equal: set[frozenset[str]]
) -> int:
    """An edge counts where its ends, or twins of theirs, are a true edge's; so does a twin's edge the other way."""
    twins: dict[str, set[str]] = {}
    for a, b in equal:
        for x, y in ((a, b), (b, a)):
            twins.setdefault(x, {x}).add(y)
    count = 0
    for child in children:
        options = {p for parent in case.truth[child].parents for p in twins.get(parent, {parent})}
        edges = [heaviest[one] for one in twins.get(child, {child}) if one in heaviest]
        count += any(e.parent in options or (frozenset((e.child, e.parent)) in equal and
                     e.child in case.truth[child].parents) for e in edges)  # fmt: skip
    return count


def _scores(true: set[Any], got: set[Any]) -> str:
    both = len(true & got)
    precision, recall = both / max(len(got), 1), both / max(len(true), 1)
    return f"{precision:.2f} {recall:.2f} {2 * precision * recall / max(precision + recall, 1e-9):.2f}"


def _independent(case: Case) -> int:
    return sum(
        case.truth[a].tree != case.truth[b].tree
        for family in families(case.weights)
        for place, a in enumerate(family.repos)
        for b in family.repos[:place]
    )


def calibration_error(edges: Sequence[tuple[float, bool]], bins: int = 10) -> float:
    """Expected calibration error: the mean gap between probability and frequency over equal intervals."""
    probabilities, right = np.array([p for p, _ in edges]), np.array([r for _, r in edges])
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = [
        abs(probabilities[place == b].mean() - right[place == b].mean()) * (place == b).mean()
        for b in range(bins)
        if (place == b).any()
    ]
    return float(sum(gaps))


def judged(case: Case, edges: Sequence[Edge]) -> list[tuple[float, bool]]:
    """Each edge's probability, and whether it is true."""
    return [(edge.probability, edge.parent in case.truth[edge.child].parents) for edge in edges]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table a forest and mode, and calibration over all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bench", type=Path, default=_BENCH)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[4, 5, 6])
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args(arguments)
    cases = []
    if (options.bench / "forest" / "truth.json").is_file():
        cases.append(forest(options.bench / "forest", options.cache))
        if options.fit:
            _fit([*cases, *(synthetic(seed) for seed in _FIT_SEEDS)])
            return
        cases.append(hub(options.bench, options.cache))
    else:
        print(f"SKIPPED: there is no forest in {options.bench}", file=sys.stderr)
    cases += [synthetic(seed) for seed in options.seeds]
    for case in cases:
        every: list[tuple[float, bool]] = []
        for mode in case.modes:
            print(f"\n{case.name}, {mode}")
            for name, edges in methods(case, mode).items():
                row = figures(case, edges)
                print(f"  {name:20} " + "  ".join(f"{key} {value}" for key, value in row.items()))
                if name == "recover, no limit":
                    every += judged(case, edges)
                    print(f"  calibration error of all edges {calibration_error(judged(case, edges)):.3f}")
                if name == "recover":
                    print(
                        f"  calibration error from {LEAST_PROBABILITY} {calibration_error(judged(case, edges)):.3f}"
                    )
        print(f"{case.name}, calibration error over all modes: {calibration_error(every):.3f}")


def _fit(cases: Sequence[Case]) -> None:
    rows, right = [], []
    for case in cases:
        for mode in case.modes:
            for edge in recover(case.weights, case.facts(mode), least_probability=0):
                rows.append(features(edge.relation, edge.evidence))
                right.append(edge.parent in case.truth[edge.child].parents)
    for name, value in fit(rows, right).items():
        print(f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()

"""The whole benchmark: reads hubs and questions, runs every cell, writes tables, plots and the page."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from cluster.runtime.session import session
from pipelines.benchmark import confidence_evaluation, tables
from pipelines.benchmark.cells import TEXT, Asked, Cell, run_cells
from pipelines.benchmark.classifiers import Classifiers, QueryImages, asked_with, classifiers, counts_at_hand
from pipelines.benchmark.page import write_page
from pipelines.benchmark.probed import ProbedHub
from pipelines.benchmark.protocols import AS_PUBLISHED, PROTOCOLS, check_protocols, rounds
from pipelines.benchmark.questions import LEFT_OUT_KINDS, Questions, Truth, agreement, from_labels, from_truth
from pipelines.job.progress import Report
from pipelines.labels.labels import Lexicon, imagenet_synonyms, read_hierarchy
from probelog.errors import QueryError, UsageError
from probelog.evaluation import METHODS
from probelog.storage.encoding import parquet_bytes
from probelog.storage.schemas import ProbedModel
from probelog.storage.store import Store

BUDGETS = (1.0, 0.25, 0.125, 0.0625)
TRUNCATIONS = (5, 10, 25, 50, 100, 200, 400, 800, 1600)
BACKGROUNDS = (5, 10, 20, 50, 100, 200, 500)
# Beside the largest budget, the confidence of hits is judged where each model saw so little.
TRUST_BUDGET = 0.125
SEEDS = 5
# Sweeps and image queries have many cells; so many draws show how much a draw matters.
SIDE_SEEDS = 3
BASELINE = "version 2"


@dataclass(frozen=True)
class BenchmarkPlan:
    """What is measured.

    Attributes:
        indexes: addresses of published indexes or their stores, one for each probe set.
        out: folder for tables, plots, the page and finished cells.
        truth: truth file; none: declared labels are the noisy truth.
        hierarchy: file of ``child<TAB>parent`` for the label rule.
        queries: Parquet file of labelled query images.
        budgets: shares of the probes; none: ``BUDGETS``, or the only one where models saw less than all probes.
        seeds: how many draws of each budget (of query images and backgrounds at most ``SIDE_SEEDS``).
        methods: names; none: all.
        baseline: the method that the others are compared with.
        protocols: how backgrounds are chosen; none: all ``PROTOCOLS``.
    """

    indexes: Sequence[str]
    out: Path
    truth: Path | None = None
    hierarchy: Path | None = None
    queries: Path | None = None
    budgets: Sequence[float] = ()
    seeds: int = SEEDS
    methods: Sequence[str] = ()
    baseline: str = BASELINE
    protocols: Sequence[str] = ()

    def check(self) -> None:
        """Refuse what has no meaning.

        Raises:
            UsageError: no index, an unknown method, baseline or protocol, a budget outside (0, 1], or no seed.
        """
        if not self.indexes:
            raise UsageError("give at least one --index")
        for name in [*self.methods, self.baseline]:
            if name not in METHODS:
                raise UsageError(f"there is no method {name!r}; there are: {', '.join(METHODS)}")
        if self.methods and self.baseline not in self.methods:
            raise UsageError(
                f"the baseline {self.baseline!r} must be one of the methods: add --method {self.baseline!r} or "
                "name another --baseline"
            )
        check_protocols(self.protocols)
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise UsageError(f"a budget is a share of the probes, over 0 and at most 1, not {budget:g}")
        if self.seeds < 1:
            raise UsageError(f"the number of seeds must be at least 1, not {self.seeds}")
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"{self.out} is not a folder")


@dataclass(frozen=True)
class Benchmark:
    """What was measured: the long table, and where everything was written."""

    out: Path
    results: list[tables.Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: the means over seeds."""
        means = [row for row in self.results if row["seed"] is None]
        by_protocol = {
            protocol: [row for row in means if row["protocol"] == protocol] for protocol in PROTOCOLS
        }
        return {
            "out": str(self.out),
            "results": by_protocol[AS_PUBLISHED],
            "protocols": {protocol: rows for protocol, rows in by_protocol.items() if rows},
        }

    def lines(self) -> list[str]:
        """The text queries' accuracy as a table for a person, in per cent; both halves."""
        lines = []
        selected = [
            row
            for row in self.results
            if row["seed"] is None and row["asked"] == TEXT and row["half"] == tables.BOTH
        ]
        for place in dict.fromkeys((row["probe_set"], row["protocol"]) for row in selected):
            lines.append(
                f"{', '.join(place):<36}{'probes':>7}{'class top-1':>20}{'top-5':>7}{'super top-1':>13}"
                f"{'mAP':>7}{'s':>7}"
            )
            rows = [row for row in selected if (row["probe_set"], row["protocol"]) == place]
            for method, probes in dict.fromkeys((row["method"], row["probes"]) for row in rows):
                by_part = {
                    row["part"]: row for row in rows if (row["method"], row["probes"]) == (method, probes)
                }
                single, group, every = (by_part.get(part) for part in tables.PARTS)
                assert every is not None
                first = (
                    f"{100 * single['top1']:6.1f} ({100 * single['top1_low']:.1f}-{100 * single['top1_high']:.1f})"
                    if single
                    else "-"
                )
                lines.append(
                    f"{method:<36}{probes:>7,}{first:>20}{_per_cent(single, 'top5'):>7}"
                    f"{_per_cent(group, 'top1'):>13}{100 * every['map']:7.1f}{every['seconds']:7.1f}"
                )
        return [*lines, f"the page: {self.out / 'index.html'}"]


def _per_cent(row: tables.Row | None, name: str) -> str:
    return "-" if row is None else f"{100 * row[name]:.1f}"


def run_benchmark(plan: BenchmarkPlan, report: Report) -> Benchmark:
    """Run everything that is not there yet, and write tables, plots and the page to ``plan.out``.

    Raises:
        UsageError: the plan has no meaning, or a file or an index is not usable.
    """
    plan.check()
    truth = None if plan.truth is None else Truth.read(plan.truth)
    lexicon = Lexicon(None if plan.hierarchy is None else read_hierarchy(plan.hierarchy), imagenet_synonyms())
    images = None if plan.queries is None else QueryImages.read(plan.queries)
    if images is not None and truth is None:
        raise UsageError("query images need a truth file (--truth): it says what their class numbers mean")
    tested: dict[str, Classifiers] = {}
    # Ray starts processes by fork, which LanceDB does not like once an index is open.
    with contextlib.nullcontext() if images is None else session():
        hubs = _opened(plan, truth)
        questions = {
            name: from_labels(hub.logits, lexicon) if truth is None else from_truth(truth, hub.logits)
            for name, hub in hubs.items()
        }
        for name, hub in hubs.items():
            reasons = ", ".join(f"{count} {reason}" for reason, count in hub.left_out.items())
            report.say(
                f"evaluate: {name}: {len(hub.models):,} models, {len(hub.logits):,} logits, "
                f"{len(questions[name].answerable):,} of {len(questions[name].names):,} concepts have an answer"
                + (f"; left out: {reasons}" if reasons else "")
            )
        cells = [
            cell for name, hub in hubs.items() for cell in _cells(plan, name, hub, questions[name], images)
        ]
        if images is not None:
            tested = classifiers(hubs, questions, images, report)
    out = Store(plan.out)
    with_images = None

    if images is not None:
        pictures = images

        def with_images(hub: ProbedHub, asked: str, seed: int) -> Asked:
            return pictures.queries(hub, questions[hub.name], int(asked.split()[0]), seed)

    inputs = "" if images is None else images.key
    done = tables.Finished(
        hubs, questions, dict(run_cells(cells, hubs, questions, with_images, inputs, out, report))
    )
    rows = tables.results(done)
    written = {
        "results": rows,
        "differences": tables.differences(done, plan.baseline),
        "hubness": tables.hubs(done),
        "reverse": tables.reverse(done),
        "sweeps": tables.sweeps(done),
    }
    if tested:
        written |= {"prauc": tables.areas(done, tested), "by_rank": tables.by_rank(done, tested)}
    if truth is not None:
        written["labels"] = [
            {"probe_set": name, **item._asdict()}
            for name, hub in hubs.items()
            for item in agreement(questions[name], hub.logits, lexicon)
        ]
        if confidence_evaluation.METHOD in (plan.methods or METHODS):
            written |= _trust(plan, hubs, questions, report)
    for name, content in written.items():
        _write_csv(out, f"{name}.csv", content)
    out.write("results.parquet", parquet_bytes(pa.Table.from_pylist(rows)))
    out.write("per_query.parquet", parquet_bytes(pa.Table.from_pylist(list(tables.queries(done)))))
    write_page(out, done, written, plan.baseline)
    report.say(f"evaluate: written to {plan.out}")
    return Benchmark(plan.out, rows)


def _trust(
    plan: BenchmarkPlan, hubs: Mapping[str, ProbedHub], questions: Mapping[str, Questions], report: Report
) -> dict[str, list[tables.Row]]:
    """The tables on the confidence of hits, at the largest budget and at ``TRUST_BUDGET`` where it is measured."""
    places = [
        (hub, share, protocol)
        for hub in hubs.values()
        for budgets in [_budgets(plan, hub)]
        for share in dict.fromkeys([max(budgets), *(share for share in budgets if share == TRUST_BUDGET)])
        for protocol in plan.protocols or PROTOCOLS
    ]
    counter = report.counter("trust", len(places), "galleries", 0)
    written: dict[str, list[tables.Row]] = {"reliability": [], "absent": []}
    for hub, share, protocol in places:
        asked = questions[hub.name]
        parts = [
            confidence_evaluation.ProbedConfidence.of(hub, asked, share, part)
            for part in rounds(protocol, asked, hub.generation.background)
        ]
        place = {
            "probe_set": hub.name,
            "method": confidence_evaluation.METHOD,
            "budget": share,
            "protocol": protocol,
        }
        written["reliability"] += [place | row for row in confidence_evaluation.reliability(parts)]
        written["absent"] += [place | row for row in confidence_evaluation.absent(parts)]
        counter.add()
    counter.show(final=True)
    return written


def _opened(plan: BenchmarkPlan, truth: Truth | None) -> dict[str, ProbedHub]:
    """The hubs by the names that tables use: their stores' folders, told apart by their keys where equal."""
    hubs: dict[str, ProbedHub] = {}
    for uri in plan.indexes:
        hub = ProbedHub.open(uri, _verdict(truth))
        if any(hub.key == other.key for other in hubs.values()):
            raise UsageError(f"{uri}: this index was given twice")
        if hub.name in hubs:
            hub = hub.named(f"{hub.name} {hub.key[:8]}")
        hubs[hub.name] = hub
    return hubs


def _verdict(truth: Truth | None) -> Callable[[ProbedModel], str | None]:
    if truth is not None:

        def known(model: ProbedModel) -> str | None:
            if model.repo not in truth.logits:
                return "not in the truth file"
            if truth.kinds[model.repo] in LEFT_OUT_KINDS:
                return f"of kind {truth.kinds[model.repo]}"
            if len(truth.logits[model.repo]) < model.logits:
                return "with fewer logits in the truth file"
            return None

        return known
    seen: set[str] = set()

    def first(model: ProbedModel) -> str | None:
        if model.weight_digest and model.weight_digest in seen:
            return "with the weights of another"
        seen.add(model.weight_digest)
        return None

    return first


def _budgets(plan: BenchmarkPlan, hub: ProbedHub) -> list[float]:
    return list(dict.fromkeys(plan.budgets)) or list(BUDGETS if hub.fraction == 1 else [hub.fraction])


def _cells(
    plan: BenchmarkPlan, name: str, hub: ProbedHub, questions: Questions, images: QueryImages | None
) -> list[Cell]:
    methods = list(plan.methods) or list(METHODS)
    budgets = _budgets(plan, hub)
    if hub.fraction < 1 and budgets != [hub.fraction]:
        raise UsageError(
            f"{hub.store.uri}: its models saw {hub.fraction:g} of the probes, so that other budgets cannot be "
            "drawn: leave --budget out, or index with fraction = 1"
        )
    largest = max(budgets)
    # All models see all probes, or what they were indexed with: there is nothing to draw.
    fixed = {share for share in budgets if share in (1.0, hub.fraction)}
    protocols = [protocol for protocol in PROTOCOLS if protocol in (plan.protocols or PROTOCOLS)]
    cells = [
        Cell(name, method, share, seed, protocol=protocol)
        for share in budgets
        for seed in range(1 if share in fixed else plan.seeds)
        for protocol in protocols
        for method in methods
    ]
    sweeps = methods if AS_PUBLISHED in protocols else []
    if BASELINE in sweeps:
        values = [r for r in TRUNCATIONS if r < largest * hub.probes]
        cells += [Cell(name, BASELINE, largest, 0, r=r) for r in [*values, round(largest * hub.probes)]]
    sizes = [size for size in BACKGROUNDS if size < len(hub.generation.background)]
    cells += [
        Cell(name, method, largest, seed, background=size)
        for seed in range(min(plan.seeds, SIDE_SEEDS))
        for method in sweeps
        for size in sizes
    ]
    if images is not None:
        try:
            images.embeddings(hub)
        except QueryError as error:
            raise UsageError(f"{hub.store.uri}: {error}") from None
        cells += [
            Cell(name, method, largest, seed, asked=asked_with(count), protocol=protocol)
            for seed in range(min(plan.seeds, SIDE_SEEDS))
            for protocol in protocols
            for method in methods
            for count in counts_at_hand(images, questions)
        ]
    return cells


def _write_csv(out: Store, name: str, rows: Sequence[tables.Row]) -> None:
    sink = io.BytesIO()
    if rows:
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), sink)
    out.write(name, sink.getvalue())

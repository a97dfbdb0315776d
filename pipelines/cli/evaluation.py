"""Commands that measure how right an index is."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.options import JsonOption, LogOption, print_lines
from probelog import logs
from probelog.errors import UsageError

app = typer.Typer()
_FOR_GENERATORS = "is for generators: add --kind generator"


class ModelKind(StrEnum):
    """What an index holds."""

    CLASSIFIER = "classifier"
    GENERATOR = "generator"


@app.command()
def evaluate(
    index: Annotated[
        list[str],
        typer.Option("--index", help="The index, or the store that holds it; several with --out."),
    ],
    truth: Annotated[
        Path | None,
        typer.Option(
            "--truth", help="JSON: classes, concepts, models. Optional with --out: declared labels are used."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run the full benchmark and write it to this folder.")
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option("--budget", help="Share of the probes per model. Default: 1, 1/4, 1/8, 1/16."),
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Draws of each budget. Default: 5.")] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Name of a method. Default: all.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Method to compare with. Default: version 2.")
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option("--queries", help="Parquet of images with their classes (columns image and class)."),
    ] = None,
    hierarchy: Annotated[
        Path | None,
        typer.Option("--hierarchy", help="CHILD<tab>PARENT lines: which declared names are super-classes."),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            "--protocol",
            help="How the background is chosen: as-published, withheld or closed. Default: all three.",
        ),
    ] = None,
    kind: Annotated[
        ModelKind, typer.Option("--kind", help="What is searched: classifiers or generators.")
    ] = ModelKind.CLASSIFIER,
    samples: Annotated[
        list[int] | None,
        typer.Option(
            "--samples",
            min=1,
            help="Of generators: the first samples of each. Default: 8, 16, 32, 64 and all that there are.",
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            help="Of generators: take samples from this store's ledger; an index keeps fewer of them.",
        ),
    ] = None,
    as_json: JsonOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Accuracy of queries beside chance and simpler methods; of classifiers with --out the full benchmark."""
    from pipelines.benchmark.protocols import PROTOCOLS
    from pipelines.benchmark.run import BASELINE, SEEDS, BenchmarkPlan, run_benchmark
    from pipelines.evaluate import evaluate as run_evaluate
    from pipelines.job.progress import Report

    result: Any
    if kind is ModelKind.GENERATOR:
        _refuse(
            "is for classifiers: leave it out with --kind generator",
            {
                "--out": out,
                "--budget": budget,
                "--seeds": seeds,
                "--method": method,
                "--baseline": baseline,
                "--queries": queries,
                "--hierarchy": hierarchy,
                "--protocol": protocol,
            },
        )
        from pipelines.benchmark.generators.run import evaluate_generators

        result = evaluate_generators(*_one(index, truth), samples or (), store)
    elif out is not None:
        _refuse(_FOR_GENERATORS, {"--samples": samples, "--store": store})
        plan = BenchmarkPlan(
            indexes=index,
            out=out,
            truth=truth,
            hierarchy=hierarchy,
            queries=queries,
            budgets=budget or (),
            methods=method or (),
            seeds=SEEDS if seeds is None else seeds,
            baseline=BASELINE if baseline is None else baseline,
            protocols=protocol or (),
        )
        result = run_benchmark(plan, Report())
    else:
        _refuse(_FOR_GENERATORS, {"--samples": samples, "--store": store})
        _refuse(
            "belongs to the full benchmark: add --out DIR",
            {
                "--budget": budget,
                "--seeds": seeds,
                "--method": method,
                "--baseline": baseline,
                "--queries": queries,
                "--hierarchy": hierarchy,
            },
        )
        result = run_evaluate(*_one(index, truth), protocols=protocol or PROTOCOLS)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    print_lines(result.lines())


def _one(index: list[str], truth: Path | None) -> tuple[str, Path]:
    """The index and the truth file of a plain evaluation."""
    if truth is None or len(index) != 1:
        raise UsageError("give one --index and a --truth file, or run the full benchmark with --out DIR")
    return index[0], truth


def _refuse(why: str, options: dict[str, object]) -> None:
    """Name the first option that was given and does not belong here."""
    if given := [name for name, value in options.items() if value not in (None, [])]:
        raise UsageError(f"{given[0]} {why}")


@app.command()
def evaluate_trees(
    index: Annotated[str, typer.Option("--index", help="The index, or the store that holds it.")],
    truth: Annotated[
        Path, typer.Option("--truth", help="JSON: models with their parents, relation and tree.")
    ],
    store: Annotated[
        str | None,
        typer.Option("--store", help="The store that the index was made in. Default: the one around it."),
    ] = None,
    no_time: Annotated[
        bool, typer.Option("--no-time", help="Recover edges again without the times of repositories.")
    ] = False,
    no_declared: Annotated[
        bool, typer.Option("--no-declared", help="Recover edges again without declared parents.")
    ] = False,
    as_json: JsonOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """How often model trees are right, and how well their probabilities are calibrated, beside other methods."""
    from pipelines.trees.evaluate import evaluate_trees as run_evaluate_trees

    result = run_evaluate_trees(index, truth, store, times=not no_time, declared=not no_declared)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    print_lines(result.lines())

"""`probelog-index`: the operators' command line. Stages run in this process, their work on Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probelog import logs, terminal

if TYPE_CHECKING:
    from pipelines.job.job import Job

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Build and publish a ProbeLog index: crawl a Hub, probe its models, complete, publish.",
)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="TOML file; see `probelog-index config`.", show_default=False)
]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Directory or s3://bucket/prefix; overrides the file's."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE, overrides one key of the file.")
]
RefreshOption = Annotated[bool, typer.Option("--refresh", help="List the Hub again.")]
RetryOption = Annotated[
    bool, typer.Option("--retry-failed", help="Also retry failures that a retry is not expected to cure.")
]
LogOption = Annotated[
    logs.LogLevel,
    typer.Option(
        "--log-level",
        callback=logs.configure,
        expose_value=False,
        help="Lowest level of log messages to write (to standard error; Ray keeps the logs of its workers).",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

FAILED_SHARE_STATUS = 3


def main() -> None:
    """Run the command line."""
    terminal.run(app, "probelog-index")


def _job(config: Path | None, overrides: list[str] | None, store: str | None) -> Job:
    from pipelines.config.model import load_config
    from pipelines.job.job import Job

    return Job.of(load_config(config, overrides or (), store))


def _print(lines: Iterable[str]) -> None:
    """Lines that may hold text of uploaders."""
    from probelog.terminal import printable

    for line in lines:
        typer.echo(printable(line, limit=500))


def _end(job: Job, failed_share: float) -> None:
    allowed = job.config.max_failed_share
    if failed_share > allowed:
        job.report.say(
            f"{failed_share:.1%} of the models failed, more than max_failed_share ({allowed:.1%}) allows"
        )
        raise typer.Exit(FAILED_SHARE_STATUS)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the store and the index.")] = Path(
        "probelog-demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Half of the time: without the comparison with all probes.")
    ] = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Serve a small hub on this machine, index it and search the index, offline."""
    from pipelines.demo.run import run_demo

    run_demo(out, compare=not quick)


@app.command()
def hub(
    folder: Annotated[Path, typer.Argument(help="Folder of repositories: OWNER/NAME/...")],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="What clients reach it by, where that is another address (a proxy, a service's name).",
        ),
    ] = None,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Serve a folder of model repositories over the Hub's protocol."""
    from pipelines.hubserver import serve

    serve(folder, host, port, address)


@app.command()
def probes(
    source: Annotated[
        str,
        typer.Argument(help="Folder of images, Parquet with images, or hf://datasets/OWNER/NAME/PATTERN."),
    ],
    store: Annotated[str, typer.Option("--store", help="Directory or s3://bucket/prefix.")],
    count: Annotated[
        int | None, typer.Option("-n", "--count", min=1, help="Number of probes; default: all.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed.")] = 0,
    encoder: Annotated[
        str, typer.Option("--encoder", help="Hub id or folder of the text-image encoder.")
    ] = "openai/clip-vit-base-patch32",
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Make a probe set and embed it."""
    from pipelines.config.model import load_config
    from pipelines.job.job import Job
    from pipelines.probe.probe_set import ready_probes
    from probelog.encoders.torch_encoder import load_encoder

    settings = [f"probes={json.dumps(source)}", f"encoder={json.dumps(encoder)}", f"seed={seed}", "top_r=1"]
    config = load_config(None, settings, store).model_copy(update={"probe_count": count})
    probe_set = ready_probes(Job.of(config), load_encoder(encoder))
    for report in probe_set.left_out[:20]:
        typer.echo(f"left out: {report.source}: {report.reason.value} ({report.detail})", err=True)
    typer.echo(probe_set.hash)


@app.command()
def zoo(
    images: Annotated[
        str | None,
        typer.Argument(
            help="Folder with a sub-folder per class, or Parquet with images and their labels; with --forest "
            "optional, shapes are drawn without it."
        ),
    ] = None,
    models: Annotated[
        int, typer.Option("--models", help="Number of models; a later call with more adds to them.")
    ] = 12,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("zoo"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed.")] = 0,
    size: Annotated[
        int | None, typer.Option("--size", help="Pixels, height and width; default: 64, with --forest 32.")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", help="Passes over a model's images; default: a fixed number of batches."),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option("--names", help="Class names, one per line, for classes that have only numbers."),
    ] = None,
    groups: Annotated[
        Path | None,
        typer.Option("--groups", help="JSON, superclass: [class names]; default: by shared last words."),
    ] = None,
    architectures: Annotated[
        str | None,
        typer.Option("--architectures", help="Comma-separated names of timm's, or `resnet` of transformers."),
    ] = None,
    probe_count: Annotated[
        int | None,
        typer.Option(
            "--probes", help="Largest number of probes; default: the remaining images, up to 4,000."
        ),
    ] = None,
    probe_classes: Annotated[
        int | None,
        typer.Option(
            "--probe-classes", help="Number of classes that no model learns; default: a fifth of 40 or more."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Number of models trained at the same time.")
    ] = None,
    gpus: Annotated[
        float, typer.Option("--gpus-per-model", min=0, help="Share of a GPU per model; 0 trains on CPUs.")
    ] = 0.0,
    forest: Annotated[
        bool,
        typer.Option("--forest", help="Networks made from each other in known ways, for model trees."),
    ] = False,
    network_count: Annotated[
        int, typer.Option("--networks", help="Number of networks of a forest, uploaded or not.")
    ] = 150,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Train a synthetic hub from labelled images, with its truth file."""
    from pipelines.zoo.build import ARCHITECTURES, Request, build_zoo
    from pipelines.zoo.forest import FOREST_ARCHITECTURES, ForestRequest, build_forest
    from probelog.errors import UsageError

    names_of_architectures = (
        tuple(name.strip() for name in architectures.split(","))
        if architectures is not None
        else FOREST_ARCHITECTURES
        if forest
        else ARCHITECTURES
    )
    if forest:
        build_forest(
            ForestRequest(
                out, network_count, seed, 32 if size is None else size, names_of_architectures, images, names
            )
        )
        return
    if images is None:
        raise UsageError("name a folder or Parquet of labelled images (only --forest draws its own)")
    request = Request(
        images,
        out,
        models,
        seed,
        64 if size is None else size,
        epochs,
        names_of_architectures,
        names,
        groups,
        probe_count,
        probe_classes,
    )
    build_zoo(request, workers=workers, gpus_per_model=gpus)


@app.command()
def crawl(
    config: ConfigOption = None,
    store: StoreOption = None,
    overrides: SetOption = None,
    refresh: RefreshOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """List the Hub's classifiers into the catalogue."""
    from pipelines.full import run_crawl

    run_crawl(_job(config, overrides, store), refresh)


@app.command()
def plan(
    config: ConfigOption = None,
    store: StoreOption = None,
    overrides: SetOption = None,
    measure: Annotated[
        int | None,
        typer.Option(
            "--measure", min=1, help="First probe this many models of all sizes; they stay in the ledger."
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option("--price", help="Price of a worker hour; of a GPU hour where workers have GPUs."),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option("--like", help="A store with measured models, to predict from where this one has none."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Number of workers to predict for.")
    ] = None,
    as_json: JsonOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Predict the cost of the remaining work: downloads, requests, disk, hours, bytes, money."""
    from pipelines.forecast.run import run_plan
    from pipelines.forecast.table import lines
    from probelog.errors import UsageError

    if price is not None and not (math.isfinite(price) and price >= 0):
        raise UsageError(f"--price must be a number of at least 0, not {price}")
    forecast = run_plan(
        _job(config, overrides, store), measure=measure, like=like, workers=workers, price=price
    )
    if as_json:
        typer.echo(json.dumps(forecast.to_dict()))
        return
    _print(lines(forecast))


@app.command()
def probe(
    config: ConfigOption = None,
    store: StoreOption = None,
    overrides: SetOption = None,
    retry_failed: RetryOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Run the catalogue's models on their probes."""
    from pipelines.full import run_probe

    job = _job(config, overrides, store)
    _end(job, run_probe(job, retry_failed).failed_share)


@app.command()
def complete(
    config: ConfigOption = None,
    store: StoreOption = None,
    overrides: SetOption = None,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Complete the unobserved values and describe every logit."""
    from pipelines.full import run_complete

    run_complete(_job(config, overrides, store))


@app.command()
def trees(
    config: ConfigOption = None,
    store: StoreOption = None,
    overrides: SetOption = None,
    refresh: RefreshOption = False,
    retry_failed: RetryOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Find out which of the models were made from which, from their weights."""
    from pipelines.full import run_trees

    run_trees(_job(config, overrides, store), refresh, retry_failed)


@app.command()
def publish(
    config: ConfigOption = None,
    store: StoreOption = None,
    overrides: SetOption = None,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Build a generation of the index, check it, and make it live."""
    from pipelines.full import run_publish

    run_publish(_job(config, overrides, store))


@app.command()
def full(
    config: ConfigOption = None,
    store: StoreOption = None,
    overrides: SetOption = None,
    refresh: RefreshOption = False,
    retry_failed: RetryOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Crawl, probe, complete, recover model trees and publish. If it is killed, the same command resumes."""
    from pipelines.full import run_full

    job = _job(config, overrides, store)
    result = run_full(job, refresh, retry_failed)
    job.report.say(f'search it: probelog search "dog" --index {job.store.uri}')
    _end(job, result.probed.failed_share)


@app.command()
def nightly(
    config: ConfigOption = None,
    store: StoreOption = None,
    overrides: SetOption = None,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Add new models of the Hub to the published index and remove deleted ones. Publishes only if something changed."""
    from pipelines.nightly.run import run_nightly

    job = _job(config, overrides, store)
    _end(job, run_nightly(job).failed_share)


@app.command()
def status(
    store: Annotated[str, typer.Option("--store", help="Directory or s3://bucket/prefix.")],
    as_json: JsonOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Show a store's content and the remaining work, read from receipts alone."""
    from pipelines.inspect.status import status as read_status

    store_status = read_status(store)
    if as_json:
        typer.echo(json.dumps(store_status.to_dict()))
        return
    _print(store_status.lines())


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
    as_json: JsonOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Accuracy of text queries beside chance and simpler methods; with --out the full benchmark."""
    from pipelines.benchmark.protocols import PROTOCOLS
    from pipelines.benchmark.run import BASELINE, SEEDS, BenchmarkPlan, run_benchmark
    from pipelines.evaluate import evaluate as run_evaluate
    from pipelines.job.progress import Report
    from probelog.errors import UsageError

    result: Any
    if out is not None:
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
        full_options: dict[str, object] = {
            "--budget": budget,
            "--seeds": seeds,
            "--method": method,
            "--baseline": baseline,
            "--queries": queries,
            "--hierarchy": hierarchy,
        }
        if full_only := [name for name, value in full_options.items() if value not in (None, [])]:
            raise UsageError(f"{full_only[0]} belongs to the full benchmark: add --out DIR")
        if truth is None or len(index) != 1:
            raise UsageError("give one --index and a --truth file, or run the full benchmark with --out DIR")
        result = run_evaluate(index[0], truth, protocols=protocol or PROTOCOLS)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    _print(result.lines())


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
    _print(result.lines())


@app.command()
def rollback(
    store: Annotated[str, typer.Option("--store", help="Directory or s3://bucket/prefix.")],
    to: Annotated[
        str | None,
        typer.Option("--to", help="Name of the generation; default: the one before the live one."),
    ] = None,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Return to the generation before the live one, or to another that is kept."""
    from probelog.index.pointer import find_index
    from probelog.publication.lifecycle import roll_back

    pointer = roll_back(find_index(store), to)
    typer.echo(f"generation {pointer.generation} is live again")


@app.command()
def verify(
    store: Annotated[str, typer.Option("--store", help="Directory or s3://bucket/prefix.")],
    as_json: JsonOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Check everything in a store against receipts and digests; exit status 1 if anything is damaged."""
    from pipelines.inspect.verify import verify as run_verify
    from pipelines.job.progress import Report

    report = run_verify(store, Report())
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        _print(report.lines())
    if not report.clean:
        raise typer.Exit(1)


@app.command()
def doctor(
    config: ConfigOption = None,
    as_json: JsonOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Try on this machine what a model must not achieve; exit status 1 if a guard does not hold."""
    from pipelines.inspect.doctor import lines, run_doctor

    examined = run_doctor(config)
    if as_json:
        typer.echo(json.dumps(examined.to_dict()))
    else:
        _print(lines(examined))
    if not examined.holds:
        raise typer.Exit(1)


config_app = typer.Typer(
    add_completion=False,
    invoke_without_command=True,
    help="Print a configuration file with every key, its default and its meaning; or check one.",
)
app.add_typer(config_app, name="config")


@config_app.callback()
def show_config(
    context: typer.Context,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page of all keys (docs/configuration.md) instead.")
    ] = False,
) -> None:
    """Print a configuration file with every key, its default and its meaning; or check one."""
    if context.invoked_subcommand is not None:
        return
    from pipelines.config.model import template
    from pipelines.config.page import config_page

    typer.echo(config_page() if markdown else template(), nl=False)


@config_app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="The TOML file.")],
    store: StoreOption = None,
    overrides: SetOption = None,
) -> None:
    """Report every error in a configuration file and in the files it names."""
    from pipelines.inspect.config_check import check_config
    from probelog.terminal import printable

    config = check_config(file, overrides or (), store)
    typer.echo(printable(f"{file}: no errors; the store is {config.store}", limit=500))

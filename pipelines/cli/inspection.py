"""Commands that read a store, a machine or a configuration, and that choose what readers see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines.cli.options import (
    ConfigOption,
    JsonOption,
    LogOption,
    OneStoreOption,
    SetOption,
    StoreFileOption,
    StoreOption,
    print_lines,
    store_of,
)
from probelog import logs
from probelog.errors import FailureReason, UsageError

app = typer.Typer()


@app.command()
def status(
    store: OneStoreOption = None,
    config: StoreFileOption = None,
    as_json: JsonOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Show a store's content and the remaining work, read from receipts alone."""
    from pipelines.inspect.status import status as read_status

    store_status = read_status(store_of(store, config))
    if as_json:
        typer.echo(json.dumps(store_status.to_dict()))
        return
    print_lines(store_status.lines())


@app.command()
def metrics(
    store: OneStoreOption = None,
    config: StoreFileOption = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8080,
    every: Annotated[
        float, typer.Option("--every", min=1, help="Seconds between two looks at the store.")
    ] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="Print the metrics and end.")] = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Serve the state of a store as metrics for Prometheus: index, quality gate, ledgers, last runs."""
    from pipelines.monitor.serve import metrics_text, serve_metrics

    address = store_of(store, config)
    if once:
        typer.echo(metrics_text(address), nl=False)
        return
    serve_metrics(address, host, port, every)


@app.command()
def failures(
    store: OneStoreOption = None,
    config: StoreFileOption = None,
    reason: Annotated[
        FailureReason | None, typer.Option("--reason", help="Only those of one reason, all of them.")
    ] = None,
    stage: Annotated[
        Literal["crawl", "probe", "sample", "trees"] | None,
        typer.Option("--stage", help="Only those of one stage."),
    ] = None,
    retryable: Annotated[
        bool, typer.Option("--retryable", help="Only those that a plain rerun tries again.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a table, values separated by commas.")] = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Show which models are not indexed, why, and what to do about it."""
    from pipelines.inspect.failures import list_failures

    if as_json and as_csv:
        raise UsageError("--json and --csv exclude each other")
    found = list_failures(store_of(store, config), reason, stage, retryable)
    if as_json or as_csv:
        for line in found.json_lines() if as_json else found.csv_lines():
            typer.echo(line)
        return
    print_lines(found.lines())


@app.command()
def explain(
    repo: Annotated[str, typer.Argument(help="Repository, or REPO@COMMIT.")],
    store: OneStoreOption = None,
    config: StoreFileOption = None,
    as_json: JsonOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Show the story of one model: listed, probed, completed, published, and what its tree says."""
    from pipelines.inspect.explain import explain as run_explain

    story = run_explain(store_of(store, config), repo)
    if as_json:
        typer.echo(json.dumps(story.to_dict()))
        return
    print_lines(story.lines())


@app.command()
def rollback(
    store: OneStoreOption = None,
    config: StoreFileOption = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="Name of the generation; default: the one before the live one. With --hold also the live one.",
        ),
    ] = None,
    hold: Annotated[
        bool,
        typer.Option(
            "--hold", help="Nothing is published over it, by nightly or full runs, until `release`."
        ),
    ] = False,
    reason: Annotated[
        str | None, typer.Option("--reason", help="Why it is held; `status` and refused runs show it.")
    ] = None,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Return to the generation before the live one, or to another that is kept."""
    from probelog.index.pointer import find_index, read_pointer
    from probelog.publication.lifecycle import roll_back

    if reason is not None and not hold:
        raise UsageError("--reason belongs to --hold")
    index = find_index(store_of(store, config))
    live = read_pointer(index)[0].generation
    why = reason or ("no reason was given" if to == live else f"rolled back from {live}")
    pointer = roll_back(index, to, why if hold else None)
    typer.echo(
        f"generation {pointer.generation} {'stays live' if pointer.generation == live else 'is live again'}"
        + ("; nothing is published over it until `probelog-index release`" if hold else "")
    )


@app.command()
def release(
    store: OneStoreOption = None,
    config: StoreFileOption = None,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Let runs publish again after `rollback --hold`."""
    from probelog.index.pointer import find_index
    from probelog.publication.lifecycle import release as end_hold

    pointer = end_hold(find_index(store_of(store, config)))
    typer.echo(f"generation {pointer.generation} is released: the next run publishes again")


@app.command()
def verify(
    store: OneStoreOption = None,
    config: StoreFileOption = None,
    as_json: JsonOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Check everything in a store against receipts and digests; exit status 1 if anything is damaged."""
    from pipelines.config.model import load_config
    from pipelines.inspect.verify import verify as run_verify
    from pipelines.job.progress import Report

    cluster = None if config is None else load_config(config).ray_address
    report = run_verify(store_of(store, config), Report(), cluster)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        print_lines(report.lines())
    if not report.clean:
        raise typer.Exit(1)


@app.command()
def doctor(
    config: ConfigOption = None,
    as_json: JsonOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Try what a model must not achieve, and with a file all that the job needs; exit status 1 if something is wrong."""
    from pipelines.inspect.doctor import lines, need_lines, run_doctor

    diagnosis = run_doctor(config)
    if as_json:
        typer.echo(json.dumps(diagnosis.to_dict()))
    else:
        print_lines(lines(diagnosis.sandbox))
        print_lines(need_lines(diagnosis.needs))
    if not diagnosis.well:
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
    named: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="The TOML file.", show_default=False)
    ] = None,
    config: ConfigOption = None,
    store: StoreOption = None,
    overrides: SetOption = None,
) -> None:
    """Report every error in a configuration file and in the files it names."""
    from pipelines.inspect.config_check import check_config, notes
    from probelog.terminal import printable

    file = named or config
    if file is None or (named and config):
        raise UsageError("name one file: probelog-index config check FILE")
    sound = check_config(file, overrides or (), store)
    typer.echo(printable(f"{file}: no errors; the store is {sound.store}", limit=500))
    print_lines(f"note: {note}" for note in notes(sound))

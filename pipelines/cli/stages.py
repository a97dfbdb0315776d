"""The stages, alone and in a row. Each goes on where it was when it is run again."""

from __future__ import annotations

import json
import math
from typing import Annotated

import typer

from pipelines.cli.options import (
    ConfigOption,
    DryRunOption,
    JsonOption,
    LogOption,
    RefreshOption,
    RetryOption,
    SetOption,
    StoreOption,
    end,
    make_job,
    print_lines,
)
from probelog import logs

app = typer.Typer()


@app.command()
def crawl(
    config: ConfigOption = None,
    store: StoreOption = None,
    overrides: SetOption = None,
    refresh: RefreshOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """List the Hub's models into the catalogue."""
    from pipelines.full import run_crawl

    run_crawl(make_job(config, overrides, store), refresh)


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
        make_job(config, overrides, store), measure=measure, like=like, workers=workers, price=price
    )
    if as_json:
        typer.echo(json.dumps(forecast.to_dict()))
        return
    print_lines(lines(forecast))


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

    job = make_job(config, overrides, store)
    end(job, run_probe(job, retry_failed).failed_share)


@app.command()
def sample(
    config: ConfigOption = None,
    store: StoreOption = None,
    overrides: SetOption = None,
    refresh: RefreshOption = False,
    retry_failed: RetryOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Have the Hub's generators make pictures, and embed these."""
    from pipelines.full import run_sample

    job = make_job(config, overrides, store)
    end(job, run_sample(job, refresh, retry_failed).failed_share)


@app.command()
def complete(
    config: ConfigOption = None,
    store: StoreOption = None,
    overrides: SetOption = None,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Complete the unobserved values and describe every logit."""
    from pipelines.full import run_complete

    run_complete(make_job(config, overrides, store))


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

    run_trees(make_job(config, overrides, store), refresh, retry_failed)


@app.command()
def publish(
    config: ConfigOption = None,
    store: StoreOption = None,
    overrides: SetOption = None,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Build a generation of the index, check it, and make it live."""
    from pipelines.full import run_publish

    run_publish(make_job(config, overrides, store))


@app.command()
def full(
    config: ConfigOption = None,
    store: StoreOption = None,
    overrides: SetOption = None,
    refresh: RefreshOption = False,
    retry_failed: RetryOption = False,
    dry_run: DryRunOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Crawl, probe, complete, recover model trees and publish. If it is killed, the same command resumes."""
    from pipelines.full import run_full

    job = make_job(config, overrides, store)
    if dry_run:
        from pipelines.inspect.dry_run import full_lines

        print_lines(full_lines(job, refresh, retry_failed))
        return
    result = run_full(job, refresh, retry_failed)
    job.report.say(f'search it: probelog search "dog" --index {job.store.uri}')
    end(job, result.failed_share)


@app.command()
def nightly(
    config: ConfigOption = None,
    store: StoreOption = None,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Add new models of the Hub to the published index and remove deleted ones. Publishes only if something changed."""
    from pipelines.nightly.run import run_nightly

    job = make_job(config, overrides, store)
    if dry_run:
        from pipelines.inspect.dry_run import nightly_lines

        print_lines(nightly_lines(job))
        return
    end(job, run_nightly(job).failed_share)

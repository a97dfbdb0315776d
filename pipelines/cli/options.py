"""Options that several commands share, and what they make of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probelog import logs
from probelog.errors import UsageError

if TYPE_CHECKING:
    from pipelines.job.job import Job

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="TOML file; see `probelog-index config`.", show_default=False)
]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Directory, or s3://, gs:// or az://bucket/prefix; overrides the file's."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE, overrides one key of the file.")
]
RefreshOption = Annotated[bool, typer.Option("--refresh", help="List the Hub again.")]
RetryOption = Annotated[
    bool, typer.Option("--retry-failed", help="Also retry failures that a retry is not expected to cure.")
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Say what would be done, from the catalogue and the ledger; nothing is written or started.",
    ),
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

# Of commands that look at a store: it may be named in three ways.
STORE_VARIABLE = "PROBELOG_STORE"
OneStoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        help=f"Directory, or s3://, gs:// or az://bucket/prefix; default: the file's, else {STORE_VARIABLE} of the environment.",
    ),
]
StoreFileOption = Annotated[
    Path | None, typer.Option("--config", help="TOML file of the job, for its store.", show_default=False)
]

FAILED_SHARE_STATUS = 3


def make_job(config: Path | None, overrides: list[str] | None, store: str | None) -> Job:
    """The job that a command's options describe."""
    from pipelines.config.model import load_config
    from pipelines.job.job import Job

    return Job.of(load_config(config, overrides or (), store))


def store_of(store: str | None, config: Path | None) -> str:
    """The address of the store that a command looks at."""
    if store is not None:
        return store
    if config is not None:
        from pipelines.config.model import load_config

        return load_config(config).store
    if address := os.environ.get(STORE_VARIABLE):
        return address
    raise UsageError(f"name the store: --store URI, --config FILE, or {STORE_VARIABLE} in the environment")


def print_lines(lines: Iterable[str]) -> None:
    """Lines that may hold text of uploaders."""
    from probelog.terminal import printable

    for line in lines:
        typer.echo(printable(line, limit=500))


def end(job: Job, failed_share: float) -> None:
    """End with a status of its own where too many models failed."""
    allowed = job.config.max_failed_share
    if failed_share > allowed:
        job.report.say(
            f"{failed_share:.1%} of the models failed, more than max_failed_share ({allowed:.1%}) allows"
        )
        raise typer.Exit(FAILED_SHARE_STATUS)

"""`probelog-index`: the operators' command line. Stages run in this process, their work on Ray."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.cli import evaluation, inspection, stages, worlds
from probelog import __version__, terminal

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Build and publish a ProbeLog index: crawl a Hub, probe its models, complete, publish.",
)
for part in (worlds, stages, inspection, evaluation):
    app.add_typer(part.app)


def main() -> None:
    """Run the command line."""
    terminal.run(app, "probelog-index")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"probelog {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass

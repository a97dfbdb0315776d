"""`probelog-index`: the operators' command line. Stages run in this process, their work on Ray."""

from __future__ import annotations

import contextlib
import shlex
import sys

import typer

from pipelines.cli import evaluation, inspection, stages, worlds
from pipelines.job.stop import Stopped, stoppable
from probelog import terminal
from probelog.credentials import redacted

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Build and publish a ProbeLog index: crawl a Hub, probe its models, complete, publish.",
)
terminal.answer_version(app)
for part in (worlds, stages, inspection, evaluation):
    app.add_typer(part.app)


# Those that go on where they were when they are run again.
_STAGES = {
    command.name or command.callback.__name__
    for command in stages.app.registered_commands
    if command.callback
}


def main() -> None:
    """Run the command line."""
    with stoppable(_how_to_go_on) if sys.argv[1:2] and sys.argv[1] in _STAGES else contextlib.nullcontext():
        terminal.run(app, "probelog-index")


def _how_to_go_on(stopped: Stopped) -> str:
    command = redacted(shlex.join(["probelog-index", *sys.argv[1:]]))
    return terminal.printable(
        f"probelog-index: stopped by {stopped.number.name}; what was done is kept. To go on: {command}", 2000
    )

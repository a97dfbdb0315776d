"""What both command lines share: errors as one clear message and an exit status, never a traceback."""

from __future__ import annotations

import io
import sys

import typer

from probelog.errors import ProbeLogError
from probelog.terminal import printable


def run(app: typer.Typer, name: str) -> None:
    """Run a Typer application; expected errors end with their message on stderr and their exit status.

    0 done; 2 bad usage or configuration; 3 worse than a configured limit; 1 anything else. Ctrl-C ends with 130; a closed pipe, quietly, with 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a label in a script that the terminal's encoding lacks
    try:
        app(prog_name=name, standalone_mode=True)
    except ProbeLogError as error:
        message = "\n".join(printable(line, limit=2000) for line in str(error).splitlines())
        sys.stderr.write(f"{name}: {message}\n")
        raise SystemExit(error.exit_status) from None
    except OSError as error:  # a folder in the way, a full disk, no permission: the system's words say it
        sys.stderr.write(f"{name}: {printable(str(error), limit=2000)}\n")
        raise SystemExit(1) from None
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write(f"{name}: interrupted\n")
        raise SystemExit(130) from None

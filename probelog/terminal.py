"""Untrusted text on a terminal (labels, repository names and messages must not control it), and errors as one message."""

from __future__ import annotations

import io
import os
import sys
import traceback
import unicodedata
from typing import TYPE_CHECKING

from probelog.credentials import redacted
from probelog.errors import ProbeLogError

if TYPE_CHECKING:
    import typer

# Control and format characters (escapes, carriage returns, bidirectional overrides, zero-width joiners), private
# use and surrogates: none of them belongs in a label, each can disguise or hijack a terminal line.
_UNSAFE = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})

_INTERRUPTED = 130


def printable(text: object, limit: int = 200) -> str:
    """One harmless line: control and format characters become U+FFFD, long text ends in an ellipsis.

    >>> printable("dog" + chr(27) + "[2J")
    'dog\ufffd[2J'
    """
    raw = str(text)
    clean = "".join("\ufffd" if unicodedata.category(char) in _UNSAFE else char for char in raw[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def silence_libraries() -> None:
    """Send to nowhere what native libraries write to stderr by themselves; ``sys.stderr`` goes on.

    A panic in LanceDB over a damaged table is raised as an error, too; before that it is written, whatever is in it.
    """
    if sys.stderr is not sys.__stderr__ or not isinstance(sys.stderr, io.TextIOWrapper):
        return
    sys.stderr.flush()
    own = os.dup(sys.stderr.fileno())
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stderr.fileno())
    os.close(nowhere)
    encoding = sys.stderr.encoding
    sys.stderr = open(own, "w", encoding=encoding, errors="replace", buffering=1)  # noqa: SIM115 - to the end


def answer_version(app: typer.Typer) -> None:
    """Give a Typer application its option ``--version``."""
    import typer

    from probelog import __version__

    def show(asked: bool) -> None:
        if asked:
            typer.echo(f"probelog {__version__}")
            raise typer.Exit

    option = typer.Option(False, "-V", "--version", callback=show, is_eager=True, help="Print the version.")

    @app.callback()
    def root(version: bool = option) -> None:
        pass


def run(app: typer.Typer, name: str) -> None:
    """Run a Typer application; expected errors end with their message on stderr and their exit status.

    0 done; 2 bad usage or configuration; 3 worse than a configured limit; 1 anything else. Ctrl-C ends with 130; a closed pipe, quietly, with 1.
    """
    import typer

    if sys.stdout is None:  # closed (``>&-``): files that are opened later would take its place
        if sys.stderr is not None:
            sys.stderr.write(f"{name}: standard output is closed\n")
        raise SystemExit(1)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a label in a script that the terminal's encoding lacks
    try:
        app(prog_name=name, standalone_mode=True)
    except SystemExit as error:
        if error.code == _INTERRUPTED:  # by Typer, which says nothing
            sys.stderr.write(f"{name}: interrupted\n")
        raise
    except ProbeLogError as error:
        message = "\n".join(printable(line, limit=2000) for line in str(error).splitlines())
        sys.stderr.write(f"{name}: {message}\n")
        raise SystemExit(error.exit_status) from None
    except OSError as error:  # a folder in the way, a full disk, no permission: the system's words say it
        sys.stderr.write(f"{name}: {printable(redacted(str(error)), limit=2000)}\n")
        raise SystemExit(1) from None
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write(f"{name}: interrupted\n")
        raise SystemExit(_INTERRUPTED) from None
    except (
        Exception
    ) as error:  # reason: a fault of ours; its causes are libraries' errors, which name addresses in full
        sys.stderr.write(redacted("".join(traceback.format_exception(error))))
        raise SystemExit(1) from None

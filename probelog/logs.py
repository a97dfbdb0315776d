"""The log: who writes at which level, in what form. Configured here alone, once in each process."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from enum import StrEnum

from probelog.credentials import redacted
from probelog.terminal import printable

_OURS = ("probelog", "cluster", "pipelines")
_LONGEST = 16_000
_LONGEST_LINE = 500


class LogLevel(StrEnum):
    """From which messages on a log is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def configure(level: str = LogLevel.WARNING) -> None:
    """Write messages of at least this level to standard error. Libraries have theirs written from warnings on.

    Commands call it, and what runs in workers of Ray calls it with the `current` level of the command.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.setLogRecordFactory(_Record)
    threading.excepthook = _write_traceback
    root = logging.getLogger()
    handler = next((one for one in root.handlers if isinstance(one, _Handler)), None)
    if handler is None:
        handler = _Handler()
        root.addHandler(handler)
    detailed = number < logging.WARNING
    handler.setFormatter(
        _Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s" if detailed else "%(message)s")
    )
    root.setLevel(max(number, logging.WARNING))
    for name in _OURS:
        logging.getLogger(name).setLevel(number)


def current() -> LogLevel:
    """The level that was configured, to hand on to other processes."""
    number = logging.getLogger(_OURS[0]).level or logging.WARNING
    return LogLevel(logging.getLevelName(number).lower())


def shortened(text: str, limit: int = _LONGEST) -> str:
    """The beginning and the end of a text that is too long: where a traceback starts, and what was raised."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 4]}\n[...]\n{text[-(limit - limit // 4) :]}"


class _Formatter(logging.Formatter):
    """Bounded, without credentials, with untrusted text made harmless. Lines after the first are indented: none passes for a message."""

    def format(self, record: logging.LogRecord) -> str:
        lines = shortened(redacted(super().format(record))).splitlines()
        return "\n    ".join(printable(line, _LONGEST_LINE) for line in lines)


class _Record(logging.LogRecord):
    """A message without credentials, also where a library writes it with a handler of its own."""

    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return redacted(super().getMessage())


def _write_traceback(arguments: threading.ExceptHookArgs) -> None:
    """What ended a thread, as Python writes it, without credentials."""
    if arguments.exc_value is not None and arguments.exc_type is not SystemExit:
        sys.stderr.write(redacted("".join(traceback.format_exception(arguments.exc_value))))


class _Handler(logging.Handler):
    """Writes to what is standard error at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # reason: as logging's own handlers do: a log must not end what it tells of
            self.handleError(record)

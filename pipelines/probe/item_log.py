"""A log with one JSON line per model that was run: its result and the time of each phase."""

from __future__ import annotations

import datetime as dt
import json
import logging
from pathlib import Path
from types import TracebackType

from cluster.probing.results import ItemReport
from pipelines.probe.plan import Item
from probelog.credentials import redacted
from probelog.errors import UsageError

_log = logging.getLogger(__name__)


class ItemLog:
    """Appends lines to a file. Untrusted names and messages cannot break a line: JSON escapes them."""

    def __init__(self, file: Path, counted: str = "logits") -> None:
        """Open the file, with the folders above it; ``counted``: what the rows of a result are.

        Raises:
            UsageError: it cannot be written.
        """
        self.file, self._counted = file, counted
        self._has_warned = self._torn = False
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = file.open("ab", buffering=0)
        except OSError as error:
            raise UsageError(f"{file}: the log of items cannot be written ({error.strerror})") from None

    def __enter__(self) -> ItemLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def write(self, item: Item, report: ItemReport) -> None:
        """Append the line of one item."""
        line = {
            "at": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
            "repo": item.row.repo,
            "sha": item.row.sha,
            "attempt": item.attempt,
            "result": result_of(report),
            "detail": report.detail,
            "seconds": {part: round(seconds, 4) for part, seconds in report.seconds.items()},
            "bytes": report.bytes,
            self._counted: report.rows,
            "parameters": report.parameters,
            "worker": report.worker,
        }
        data = ("\n" * self._torn + redacted(json.dumps(line)) + "\n").encode("ascii")
        try:
            self._torn = self._stream.write(data) < len(data)
        except OSError as error:  # a full disk: the job continues, and so does the log once there is space
            if not self._has_warned:
                _log.warning("%s: lines of the log are lost (%s)", self.file, error.strerror)
            self._has_warned = True


def result_of(report: ItemReport) -> str:
    """``indexed``, ``copy``, or the reason of a failure."""
    if report.reason is not None:
        return report.reason
    return "indexed" if report.copy_of is None else "copy"

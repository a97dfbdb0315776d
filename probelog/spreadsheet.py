"""Tables of what uploaders wrote as CSV: no text is a formula to the program that opens it, and none controls a terminal."""

from __future__ import annotations

import csv
import datetime as dt
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

from probelog.terminal import printable

# The longest text that such programs take.
_LONGEST = 32_767
_FORMULA = ("=", "+", "-", "@")


def csv_lines(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """Lines of CSV, the names of the columns first. Lists and objects are JSON, times ISO 8601.

    A text that begins like a formula gets an apostrophe. Only JSON keeps texts as they are.
    """
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")
    for row in itertools.chain([columns], rows):
        line.seek(0)
        line.truncate()
        writer.writerow(map(_cell, row))
        yield line.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, str):
        text = printable(value, _LONGEST)
        return f"'{text}" if text.startswith(_FORMULA) else text
    if isinstance(value, list | dict):
        return json.dumps(value, default=str)
    return value.isoformat() if isinstance(value, dt.datetime) else value

"""The page that has the message of every refusal (docs/operators/refusals.md), which tests hold to what is printed."""

from __future__ import annotations

import re
from pathlib import Path

from probelog.errors import ProbeLogError
from tests.support.paths import CHECKOUT

PAGE = CHECKOUT / "docs/operators/refusals.md"
COMMANDS = ("crawl", "probe", "sample", "complete", "trees", "publish", "nightly", "full")
_VARYING = {
    r"\d{8}T\d{6}-[0-9a-f]{8}": "GENERATION",
    r"\d{4}-\d\d-\d\dT[\d:]{8}\+00:00": "TIME",
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC": "TIME",
    r"process \d+ on \S+,": "process N on HOST,",
    r"this machine has (\d+|none)": "this machine has N",
}


def assert_on_page(what: str, said: str, status: int, commands: str, here: Path) -> None:
    """A line of the page: what is wrong, what commands then print, their status, and which commands; ``here`` is a folder of
    the test's.
    """
    said = said.replace(str(here), "/here")
    for pattern, stand_in in _VARYING.items():
        said = re.sub(pattern, stand_in, said)
    shown = f"`` {said} ``" if "`" in said else f"`{said}`"
    refuse = ", ".join(f"`{name}`" for name in COMMANDS if name in commands.split())
    line = f"| {what} | {shown} | {status} | {refuse} |"
    assert line in PAGE.read_text(encoding="utf-8").splitlines(), line


def assert_error_on_page(what: str, error: ProbeLogError, commands: str, here: Path) -> None:
    """The same of an error, whose message commands print."""
    assert_on_page(what, " ".join(str(error).split()), error.exit_status, commands, here)

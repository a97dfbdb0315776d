"""The pinned list that the image and `.ci/run` install from."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = (ROOT / "requirements.txt").read_text()


def test_every_package_is_pinned_and_hashed_and_no_host_is_named() -> None:
    entries = re.findall(r"(?m)^[a-z0-9][^\n]*(?:\n +--hash[^\n]*)*", LIST)
    assert len(entries) > 100
    for entry in entries:
        assert re.match(
            r"[a-z0-9.-]+(\[[a-z0-9,-]+\])?==\S+( ;[^\\]*)? \\\n +--hash=sha256:[0-9a-f]{64}", entry
        ), entry
    assert "://" not in LIST
    assert not re.search(r"(?m)^-", LIST)


def test_it_holds_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [
        *project["project"]["dependencies"],
        *(line for extra in project["project"]["optional-dependencies"].values() for line in extra),
        *(line for group in project["dependency-groups"].values() for line in group),
    ]
    names = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in asked} - {"probelog"}
    assert names <= set(re.findall(r"(?m)^([a-z0-9.-]+)", LIST))

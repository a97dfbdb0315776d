"""A Hub on loopback whose repositories come, change, move and go between two calls; it has listings but no files."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.hub.faults import FaultyHub, faulty

BEGINNING = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)


class LiveHub:
    """``endpoint`` is where it answers; ``faults`` spoils its answers; times are hours since ``BEGINNING``."""

    endpoint: str
    faults: FaultyHub

    def __init__(self, root: Path) -> None:
        self.root = root
        self._entries: dict[str, dict[str, Any]] = {}
        self._commits = itertools.count(1)

    def put(self, repo: str, hours: float, **facts: Any) -> str:
        """Add a repository, or give one a new commit; returns the commit."""
        sha = f"{next(self._commits):040x}"
        time = (BEGINNING + dt.timedelta(hours=hours)).isoformat()
        entry = {"library": "timm", "pipeline_tag": "image-classification"} | self._entries.get(repo, {})
        self._entries[repo] = {**entry, "id": repo, "sha": sha, "lastModified": time, **facts}
        self._write()
        return sha

    def set(self, repo: str, **facts: Any) -> None:
        """Change what the Hub says about a repository, without a commit."""
        self._entries[repo] |= facts
        self._write()

    def rename(self, old: str, new: str) -> None:
        """Give a repository another name; its commit and times stay, as on the Hub."""
        entry = self._entries.pop(old)
        self._entries[new] = {**entry, "id": new, "formerly": [*entry.get("formerly", []), old]}
        self._write()

    def remove(self, *repos: str) -> None:
        for repo in repos:
            del self._entries[repo]
        self._write()

    def state(self) -> dict[str, str]:
        """The commit of every repository."""
        return {repo: entry["sha"] for repo, entry in self._entries.items()}

    def _write(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / ".hub.json").write_text(json.dumps(list(self._entries.values())))
        os.replace(self.root / ".hub.json", self.root / "hub.json")


@contextlib.contextmanager
def live_hub(root: Path, models: int) -> Iterator[LiveHub]:
    """A Hub with so many models, ``owner/model-0`` and on, one an hour."""
    hub = LiveHub(root)
    for number in range(models):
        hub.put(f"owner/model-{number}", number)
    with faulty(root) as (hub.endpoint, hub.faults):
        yield hub

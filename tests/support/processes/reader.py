"""A reader as a process of its own: ``python -m tests.support.processes.reader URI`` asks until its standard input is closed.

Tells what it saw as one line of JSON: how often it ``asked``, which tags it has ``seen``, and ``problems``.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import probelog
from probelog.search import client

# Of the generations that tests.support.processes.publisher makes.
HITS = 6


class Reader:
    """Asks an index again and again; every answer must be of one generation, and the same each time."""

    def __init__(self, uri: str) -> None:
        self.asked = 0
        self.problems: list[str] = []
        self._index = probelog.open_index(uri)
        self._answers: dict[str, list[tuple[str, int, float]]] = {}

    def ask(self) -> None:
        """One question, of one kind or another."""
        self.asked += 1
        try:
            where = "licence LIKE 'g%'" if self.asked % 2 else None
            self._check(list(self._index.search("dog", k=100, where=where)))
        except Exception as error:
            self.problems.append(repr(error))

    def _check(self, hits: list[Any]) -> None:
        tags = {hit.licence for hit in hits}
        tags |= {hit.repo.split("/")[0] for hit in hits} | {hit.label.split()[0] for hit in hits}
        answer = [(hit.repo, hit.logit, round(hit.score, 6)) for hit in hits]
        if len(tags) != 1 or len(hits) != HITS:
            self.problems.append(f"mixed: {len(hits)} answers of {sorted(map(str, tags))}")
        elif self._answers.setdefault(tag := str(tags.pop()), answer) != answer:
            self.problems.append(f"{tag} answers {answer}, before {self._answers[tag]}")

    def told(self) -> dict[str, Any]:
        """What it saw."""
        return {"asked": self.asked, "seen": sorted(self._answers), "problems": self.problems[:20]}


def main(uri: str) -> None:
    """Ask until told to stop."""
    client.POLL_SECONDS = 0.02
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    reader = Reader(uri)
    print("open", flush=True)
    while not stop.wait(0.03):  # leaves the others most of the machine
        reader.ask()
    print(json.dumps(reader.told()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

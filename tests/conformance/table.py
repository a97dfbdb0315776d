"""The outcomes as a table of the documentation and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

from tests.conformance.compare import Outcome

LIBRARIES = ("transformers", "timm", "torch", "pillow")


def write_csv(outcomes: Iterable[list[Outcome]], path: Path) -> None:
    """One line an outcome, all of an architecture at once, so that a run that is ended has written whole ones."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Outcome)])
        writer.writeheader()
        for found in outcomes:
            writer.writerows(asdict(outcome) for outcome in found)
            stream.flush()


def read_csv(path: Path) -> list[Outcome]:
    """What `write_csv` wrote."""
    with path.open(newline="") as stream:
        return [
            Outcome(
                row["library"],
                row["architecture"],
                row["layout"],
                row["result"],
                float(row["pixels"]),
                float(row["logits"]),
            )
            for row in csv.DictReader(stream)
        ]


def markdown(outcomes: Iterable[Outcome]) -> str:
    """Counts by library and layout, then every architecture that is not equal."""
    outcomes = list(outcomes)
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    lines = [
        f"With {versions}.",
        "",
        "| library | layout | architectures | equal | refused | different | pixels at most | logits at most |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for library, layout in dict.fromkeys((outcome.library, outcome.layout) for outcome in outcomes):
        group = [outcome for outcome in outcomes if (outcome.library, outcome.layout) == (library, layout)]
        equal = [outcome for outcome in group if outcome.result == "equal"]
        refused = sum(outcome.result.startswith("refused") for outcome in group)
        lines.append(
            f"| {library} | {layout} | {len(group)} | {len(equal)} | {refused} | {len(group) - len(equal) - refused} "
            f"| {max((outcome.pixels for outcome in equal), default=0):.2g} "
            f"| {max((outcome.logits for outcome in equal), default=0):.1g} |"
        )
    others = [outcome for outcome in outcomes if outcome.result != "equal"]
    if others:
        lines += ["", "| not equal | layout | result | pixels | logits |", "|---|---|---|---:|---:|"]
        lines += [
            f"| `{outcome.architecture}` | {outcome.layout} | {outcome.result} | {outcome.pixels:.2g} | {outcome.logits:.2g} |"
            for outcome in others
        ]
    return "\n".join(lines) + "\n"

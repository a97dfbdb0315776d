"""How little of an index must be spoilt for the quality gate to see it.

    python -m tests.benchmarks.gate --index URI --out gate.csv [--share 0.02 --share 0.05 ...] [--draws 3]

Copies the live generation of a small index into a temporary folder with the logits or labels of a share of its models
spoilt, and measures the copy beside the original:

- mixed: rows of logits swapped at random among these models;
- turned: logits answer to the opposite;
- labels: declared labels swapped at random among these models.

Appends a row a trial and leaves out those that the file has. Prints the share from which all draws are refused.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.config.model import Quality
from pipelines.labels.labels import imagenet_lexicon
from pipelines.quality.failures import FailureCounts
from pipelines.quality.gate import measure
from probelog.errors import UsageError
from probelog.index.arrow import fixed_binary, structured
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer, find_index, read_pointer
from probelog.index.schema import META, MODELS, connect, logit_facts
from probelog.publication.generation_writer import GenerationWriter
from probelog.storage.store import Store

WAYS = ("mixed", "turned", "labels")
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
COLUMNS = ["way", "share", "draw", "models", "lost", "first", "ten", "named", "first before", "ten before", "named before", "refused by", "seconds"]  # fmt: skip


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--index", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, action="append")
    parser.add_argument("--draws", type=int, default=3)
    given = parser.parse_args()
    store = find_index(given.index)
    live = Generation(store, read_pointer(store)[0])
    if live.large:
        raise UsageError("give an index that is small enough to have no vector index")
    imagenet_lexicon()  # read once, before the clock starts
    rows = list(csv.DictReader(given.out.open())) if given.out.exists() else []
    done = {(row["way"], float(row["share"]), int(row["draw"])) for row in rows}
    for share in given.share or SHARES:
        for way in WAYS:
            for draw in range(given.draws):
                if (way, share, draw) not in done:
                    rows.append(trial(live, way, share, draw))
                    write(given.out, rows)
    for way in WAYS:
        shares = sorted({float(row["share"]) for row in rows if row["way"] == way})
        refused = {
            share: np.mean(
                [bool(row["refused by"]) for row in rows if (row["way"], float(row["share"])) == (way, share)]
            )
            for share in shares
        }
        told = ", ".join(f"{share:.0%} of the models: {refused[share]:.0%}" for share in shares)
        print(f"{way}: refused with {told}")


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """All rows so far."""
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def trial(live: Generation, way: str, share: float, draw: int) -> dict[str, Any]:
    """Measure one spoilt copy."""
    with tempfile.TemporaryDirectory() as folder:
        candidate, count = spoilt(live, Store(folder), way, share, draw)
        started = time.monotonic()
        run = FailureCounts(count)
        measures = {item.name: item for item in measure(candidate, live, run, run, Quality())}
        seconds = time.monotonic() - started
    named = {
        "first": "declared, first answer",
        "ten": "declared, first ten answers",
        "named": "models named as declared",
    }
    return {
        "way": way,
        "share": share,
        "draw": draw,
        "models": round(share * count),
        "lost": measures["lost answers"].value,
        **{column: measures[name].value for column, name in named.items()},
        **{f"{column} before": measures[name].before for column, name in named.items()},
        "refused by": "; ".join(item.name for item in measures.values() if not item.passed),
        "seconds": f"{seconds:.2f}",
    }


def spoilt(live: Generation, index: Store, way: str, share: float, draw: int) -> tuple[Generation, int]:
    """A copy of a generation, spoilt; and how many models' weights it holds."""
    random = np.random.default_rng([WAYS.index(way), round(1000 * share), draw])
    source = connect(live.index, live.pointer.generation)
    tables = {name: source.open_table(name).to_arrow() for name in ("logits", "models", "probes", "meta")}
    weights = np.unique(tables["models"]["weights"].to_numpy())
    chosen = random.permutation(weights)[: round(share * len(weights))]
    if way == "labels":
        tables["models"] = with_other_labels(tables["models"], chosen, random)
    else:
        kind = logit_facts(live.basis, live.settings.probes)
        facts = structured(tables["logits"]["facts"], kind).copy()
        spoil(facts, np.flatnonzero(np.isin(facts["weights"], chosen)), way, random)
        place = tables["logits"].column_names.index("facts")
        tables["logits"] = tables["logits"].set_column(
            place, tables["logits"].schema.field(place), fixed_binary(facts)
        )
    writer = GenerationWriter(index, "spoilt")
    for name, table in tables.items():
        schema = {"models": MODELS, "meta": META}.get(name, table.schema)
        writer.write(name, schema, [table.select(schema.names).cast(schema)])
    writer.finish()
    return Generation(index, Pointer("spoilt", "", "")), len(weights)


def spoil(
    facts: npt.NDArray[np.void], rows: npt.NDArray[np.int64], way: str, random: np.random.Generator
) -> None:
    """Change what some logits (rows) answer to, in place."""
    if way == "mixed":
        others = random.permutation(rows)
        for name in ("precise", "rest", "scale", "offset"):
            facts[name][rows] = facts[name][others]
    else:
        for name in ("precise", "rest"):
            facts[name][rows] = -facts[name][rows]


def with_other_labels(
    models: pa.Table, chosen: npt.NDArray[np.integer[Any]], random: np.random.Generator
) -> pa.Table:
    """The models' table with the labels of some weights' models swapped among these."""
    labels = models["labels"].to_pylist()
    spoilt = np.isin(models["weights"].to_numpy(), chosen)
    places = [(row, i) for row in np.flatnonzero(spoilt).tolist() for i in range(len(labels[row] or []))]
    for (row, i), other in zip(places, random.permutation(len(places)).tolist(), strict=True):
        source, j = places[other]
        labels[row] = list(labels[row])
        labels[row][i] = models["labels"][source][j].as_py()
    place = models.column_names.index("labels")
    return models.set_column(
        place, models.schema.field(place), pa.array(labels, models.schema.field(place).type)
    )


if __name__ == "__main__":
    main()

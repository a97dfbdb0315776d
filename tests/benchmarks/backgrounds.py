"""What the background decides: accuracy of matched heads with one background after the other.

    python -m tests.benchmarks.backgrounds --index STORE [--index STORE-2] --truth truth.json [--out FILE.csv]

The stores must hold observations of all probes; all of them are used. Beside the three protocols of `evaluate`: names of
ImageNet-21k's, those of them that stand out for the hub's logits (what a hub that declares nothing gets), and what the hub
declares with some of ImageNet's. A query's own names are left out of all. ``_once``: without feedback.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.benchmark.cells import Asked
from pipelines.benchmark.probed import ProbedHub
from pipelines.benchmark.protocols import PROTOCOLS, Round, rounds
from pipelines.benchmark.questions import LEFT_OUT_KINDS, Truth, from_truth
from pipelines.job.background import IMAGENET_21K, background_names
from pipelines.publish.background import FEWEST, fitting
from probelog.evaluation.ridge import rank_by_matched_heads
from probelog.ranking.matched_heads import HeadSpace
from tests.benchmarks.constants import measured

_MANY, _SOME = 2000, 500


def main() -> None:
    """Measure every background."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", action="append", required=True)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    for row in (row for uri in given.index for row in accuracies(uri, Truth.read(given.truth))):
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if given.out is not None:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def accuracies(uri: str, truth: Truth) -> Iterator[dict[str, Any]]:
    """One row for each background: accuracy over all concepts, in per cent."""
    hub = ProbedHub.open(
        uri, lambda model: None if truth.kinds.get(model.repo) not in LEFT_OUT_KINDS else "kind"
    )
    questions = from_truth(truth, hub.logits)
    gallery = hub.gallery(1.0, 0)
    asked = Asked(np.arange(len(questions.names)), hub.embed(questions.names))
    everything = np.ones(len(questions.names), bool)
    published = hub.generation.background
    without_feedback = partial(rank_by_matched_heads, feedback=0)
    parts = {protocol: rounds(protocol, questions, published) for protocol in PROTOCOLS}
    many = background_names(IMAGENET_21K, _MANY, 0)
    some = background_names(IMAGENET_21K, _SOME, 0)
    embeddings = gallery[0].embeddings
    space = HeadSpace(embeddings, embeddings[:0])
    directions = np.concatenate([space.of_model(model) for model in gallery[0].models])
    drawn = {
        f"{FEWEST} of {_MANY:,} names of ImageNet's that stand out": fitting(
            many, FEWEST, hub.embed(many), embeddings, directions
        ),
        f"{_MANY:,} names of ImageNet's": many,
        f"{_SOME} names of ImageNet's": some,
        f"what the hub declares, and {_SOME} of ImageNet's": list(dict.fromkeys([*published, *some])),
    }
    parts |= {name: [Round(asked.numbers, names)] for name, names in drawn.items()}
    for name, part in parts.items():
        row: dict[str, Any] = {
            "store": hub.name,
            "background": name,
            "names": max(len(one.background) for one in part),
        }
        for ending, method in (("", rank_by_matched_heads), ("_once", without_feedback)):
            top1, precision = measured(hub, questions, asked, gallery, part, everything, method)
            row |= {f"top1{ending}": round(100 * top1, 1), f"map{ending}": round(100 * precision, 1)}
        yield row


if __name__ == "__main__":
    main()

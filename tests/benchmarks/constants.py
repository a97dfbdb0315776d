"""How the constants of matched heads were chosen: each one swept, the others as they are.

    uv run python tests/benchmarks/constants.py --index STORE [--index STORE-2] --truth truth.json
        [--half development|test|both] [--queries queries.parquet] [--constant NAME] [--seeds N]
        [--protocol NAME] [--out constants.csv]

The stores must hold observations of all probes. Only the half of the concepts that methods may be tuned on is asked,
unless another one is named, withheld and as published. Prints, and with --out writes, a row for each value, store,
protocol and share of the probes.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.benchmark.cells import Asked
from pipelines.benchmark.classifiers import QueryImages
from pipelines.benchmark.probed import ProbedHub
from pipelines.benchmark.protocols import AS_PUBLISHED, PROTOCOLS, WITHHELD, Round, rounds
from pipelines.benchmark.questions import SINGLE, Questions, Truth, from_truth
from pipelines.evaluate import LEFT_OUT_KINDS
from probelog.arrays import Ints
from probelog.evaluation import Method
from probelog.evaluation.accuracy import DEVELOPMENT, accuracy, half_of
from probelog.evaluation.gallery import Gallery
from probelog.evaluation.ridge import rank_by_matched_heads
from probelog.probes import probe_set
from probelog.ranking import matched_heads

SWEEPS = {
    "ridge": [0.00125, 0.0025, 0.005, 0.01, 0.02],
    "text_units": [0.75, 1.0, 1.5, 2.0, 3.0],
    "score_units": [0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0],
    "noise": [0.0, 25.0, 50.0, 100.0, 200.0],
    "plain": [0.0, 70.0, 110.0, 140.0, 180.0],
    "concept_weight": [3.0, 5.0, 7.0, 10.0, 20.0, 1e9],
    "feedback": [10, 20, 60, 100, 200],
    "common": [0.0, 0.25, 0.5, 0.75, 1.0],
}
IMAGE_SWEEP = {"image_share": [0.0, 0.25, 0.5, 1.0, 2.0]}
DEFAULTS = {
    "ridge": matched_heads.RIDGE,
    "text_units": matched_heads.SHARPNESS,
    "score_units": matched_heads.SHARPNESS,
    "noise": matched_heads.NOISE,
    "plain": matched_heads.PLAIN,
    "concept_weight": matched_heads.CONCEPT_WEIGHT,
    "feedback": matched_heads.FEEDBACK,
    "image_share": matched_heads.IMAGE_SHARE,
    "common": probe_set.COMMON,
}
BUDGETS = [1.0, 1 / 8, 1 / 16]


def main() -> None:
    """Run the sweeps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", action="append", required=True)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--half", choices=["development", "test", "both"], default=DEVELOPMENT)
    parser.add_argument("--queries", type=Path)
    parser.add_argument("--constant", action="append", help="Default: all.")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--protocol", action="append", choices=PROTOCOLS, help="Default: these two.")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    protocols = given.protocol or [WITHHELD, AS_PUBLISHED]
    sweeps = {**SWEEPS, **(IMAGE_SWEEP if given.queries is not None else {})}
    sweeps = {name: values for name, values in sweeps.items() if name in (given.constant or sweeps)}
    for row in sweep(given.index, given.truth, given.half, given.queries, given.seeds, protocols, sweeps):
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if given.out is not None:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def sweep(
    indexes: Sequence[str],
    truth_file: Path,
    half: str,
    queries: Path | None,
    seeds: int,
    protocols: Sequence[str],
    sweeps: Mapping[str, Sequence[float]],
) -> Iterator[dict[str, Any]]:
    """One row for each constant, value, store, protocol and budget: accuracy in per cent, mean over seeds."""
    truth = Truth.read(truth_file)
    images = QueryImages.read(queries) if queries is not None else None
    for uri in indexes:
        hub = ProbedHub.open(
            uri, lambda model: None if truth.kinds.get(model.repo) not in LEFT_OUT_KINDS else "kind"
        )
        questions = from_truth(truth, hub.logits)
        wanted = np.array([half in ("both", half_of(name)) for name in questions.names])
        for protocol, share in itertools.product(protocols, BUDGETS):
            parts = rounds(protocol, questions, hub.generation.background)
            draws = range(1 if share == 1 else seeds)
            drawn = [hub.gallery(share, seed) for seed in draws]
            for constant, values in sweeps.items():
                for value in values:
                    found, galleries = [], drawn
                    method: Method = partial(rank_by_matched_heads, **{constant: value})
                    if constant == "common":  # of the draw, not of the method
                        galleries = [hub.gallery(share, seed, value) for seed in draws]
                        method = rank_by_matched_heads
                    for seed, gallery in enumerate(galleries):
                        if constant in IMAGE_SWEEP:
                            assert images is not None
                            asked = images.queries(hub, questions, 5, seed)
                        else:
                            asked = Asked(np.arange(len(questions.names)), hub.embed(questions.names))
                        found.append(measured(hub, questions, asked, gallery, parts, wanted, method))
                    top1, precision = np.mean(found, axis=0)
                    yield {
                        "store": hub.name,
                        "protocol": protocol,
                        "probes": f"{share:g}",
                        "constant": constant,
                        "value": value,
                        "default": "*" if DEFAULTS[constant] == value else "",
                        "top1": round(100 * top1, 1),
                        "map": round(100 * precision, 1),
                    }


def measured(
    hub: ProbedHub,
    questions: Questions,
    asked: Asked,
    gallery: tuple[Gallery, Ints],
    parts: Sequence[Round],
    wanted: npt.NDArray[np.bool_],
    method: Method,
) -> tuple[float, float]:
    """Top-1 of single classes and mean average precision of all concepts, as in docs/results.md."""
    models, kept = gallery
    relevant = questions.relevant[asked.numbers][:, kept]
    asks = wanted[asked.numbers] & relevant.any(axis=1)
    scores = np.full(relevant.shape, -np.inf)
    for part in parts:
        places = np.flatnonzero(asks & np.isin(asked.numbers, part.numbers))
        if len(places):
            names = [questions.synonyms[i] if asked.images is None else [] for i in asked.numbers[places]]
            concepts = hub.concepts(asked.vectors[places], names, part.background)
            if asked.images is not None:
                concepts = replace(concepts, images=[asked.images[place] for place in places])
            scores[places] = method(models, concepts)
    single = asks & (questions.parts[asked.numbers] == SINGLE)
    return (
        accuracy(scores[single], relevant[single]).top1,
        accuracy(scores[asks], relevant[asks]).average_precision,
    )


if __name__ == "__main__":
    main()

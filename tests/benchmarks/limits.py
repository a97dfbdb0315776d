"""What keeps picture search and "nothing here recognises this" from doing better on a hub: measured, with cheating.

    uv run python -m tests.benchmarks.limits --index STORE [--index STORE-2] --truth truth.json
        --queries queries.parquet [--out limits.csv]

The stores must hold observations of all probes. Three questions, a row for each answer and store, in per cent:

- **Do five pictures say what is meant?** How often the encoder recognises a class by that many pictures among the
  background's names; among the names of single classes alone (which the search cannot know); and how often a
  classifier of the encoder's embeddings does that was trained on five other pictures of every class (which the search
  does not have). A search by name is told what is meant: this is the share of its answers that pictures can reach.
- **Do two logits of one class look alike?** How often the nearest logit of another model shares a class, by
  direction, and by the responses that directions were fitted to.
- **Is absence visible?** The area under the ROC curve (present against absent classes, as in ``evaluate``) of each
  kind of evidence, and of a logistic regression over all of it that is fitted on the truth: on one half of the
  concepts, asked about the other (a hash of the name decides).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize

from pipelines.benchmark.classifiers import COUNTS, QueryImages
from pipelines.benchmark.confidence_evaluation import Answers, ProbedConfidence, answers, without_classes
from pipelines.benchmark.probed import ProbedHub
from pipelines.benchmark.questions import LEFT_OUT_KINDS, Bools, Questions, Truth, from_truth
from probelog.arrays import Floats, Ints
from probelog.evaluation.accuracy import DEVELOPMENT, TEST, roc_area
from probelog.ranking import matched_heads
from probelog.ranking.matched_heads import Float64

SEEDS = 3
SHOTS = 5
RIDGES = (0.1, 1.0, 10.0)
HITS = 5

Row = dict[str, Any]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", action="append", required=True)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--queries", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    truth, images = Truth.read(given.truth), QueryImages.read(given.queries)
    rows = []
    for uri in given.index:
        hub = ProbedHub.open(
            uri, lambda model: "kind" if truth.kinds.get(model.repo) in LEFT_OUT_KINDS else None
        )
        questions = from_truth(truth, hub.logits)
        probed = ProbedConfidence.of(hub, questions, 1.0)
        for measured in (
            *searches(probed, questions, hub, images),
            *pictures(probed, questions, hub, images),
            *neighbours(probed, hub, truth),
            *absence(probed, questions),
        ):
            rows.append({"store": hub.name, **measured})
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if given.out is not None:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def row(question: str, what: str, share: float) -> Row:
    """One answer in per cent."""
    return {"question": question, "what": what, "per cent": round(100 * float(share), 1)}


def single_classes(questions: Questions) -> list[int]:
    """Numbers of the single classes that have an answer."""
    return [int(concept) for concept in questions.answerable if questions.single[concept]]


def searches(
    probed: ProbedConfidence, questions: Questions, hub: ProbedHub, images: QueryImages
) -> Iterator[Row]:
    """Top-1 of single classes, by name and by pictures, as the index answers."""
    directions, background = probed.directions, probed.space.background
    b = matched_heads.sharpness(directions, background)
    offsets = matched_heads.offsets(directions, background, b)

    def first_right(concept: int, direction: Float64) -> bool:
        return bool(probed.relevant[concept, (b * directions @ direction - offsets).argmax()])

    by_name = [first_right(concept, probed.queries[concept]) for concept in single_classes(questions)]
    yield row("search", "by name", np.mean(by_name))
    for count in COUNTS:
        found = [
            first_right(concept, probed.space.of_images(images.embeddings(hub)[shown])[0])
            for seed in range(SEEDS)
            for concept, shown, _ in drawn(questions, images, count, seed)
        ]
        yield row("search", f"by {count} pictures", np.mean(found))


def drawn(questions: Questions, images: QueryImages, count: int, seed: int) -> list[tuple[int, Ints, Ints]]:
    """Each single class with an answer: its concept, the images shown, and its other ones."""
    wanted = set(single_classes(questions))
    return [
        (concept, own[:count], own[count:])
        for concept, own in images.drawn(questions, seed)
        if concept in wanted and len(own) >= count
    ]


def pictures(
    probed: ProbedConfidence, questions: Questions, hub: ProbedHub, images: QueryImages
) -> Iterator[Row]:
    """How often pictures of a class are recognised as that class."""
    names, vectors = hub.generation.background, images.embeddings(hub)
    own = {
        concept: [number for number, name in enumerate(names) if name in questions.synonyms[concept]]
        for concept in single_classes(questions)
    }
    singles = np.array(sorted(set().union(*own.values())))
    for count in COUNTS:
        every, single = [], []
        for seed in range(SEEDS):
            for concept, shown, _ in drawn(questions, images, count, seed):
                evidence = probed.space.names_of_images(vectors[shown])
                every.append(evidence.argmax() in own[concept])
                single.append(singles[evidence[singles].argmax()] in own[concept])
        yield row("pictures", f"{count} recognised among all names", np.mean(every))
        yield row("pictures", f"{count} recognised among single classes' names", np.mean(single))
    trained = [few_shots(vectors, questions, images, ridge) for ridge in RIDGES]
    yield row("pictures", f"{SHOTS} recognised by a classifier of {SHOTS} others a class", max(trained))


def few_shots(vectors: Floats, questions: Questions, images: QueryImages, ridge: float) -> float:
    """How often ``SHOTS`` images are given their class by least squares on as many others of every class."""
    found = []
    for seed in range(SEEDS):
        part = [
            (shown, rest[:SHOTS]) for _, shown, rest in drawn(questions, images, SHOTS, seed) if len(rest)
        ]
        seen = np.concatenate([others for _, others in part])
        owner = np.repeat(np.arange(len(part)), [len(others) for _, others in part])
        centre = vectors[seen].mean(axis=0)
        x = np.asarray(vectors[seen] - centre, np.float64)
        scale = ridge * np.square(x).sum() / x.shape[1]
        weights = np.linalg.solve(x.T @ x + scale * np.eye(x.shape[1]), x.T @ np.eye(len(part))[owner])
        found += [
            ((vectors[shown] - centre) @ weights).sum(axis=0).argmax() == number
            for number, (shown, _) in enumerate(part)
        ]
    return float(np.mean(found))


def neighbours(probed: ProbedConfidence, hub: ProbedHub, truth: Truth) -> Iterator[Row]:
    """How often the most similar logit of another model shares a class."""
    classes = [set() if item.negated else truth.logits[item.repo][item.logit] for item in hub.logits]
    repos = np.array([item.repo for item in hub.logits])
    responses = np.concatenate([matched_heads.standardised_responses(model) for model in hub.observed])
    for what, rows in (("directions", probed.directions), ("responses", responses)):
        alike = rows @ rows.T
        alike[repos[:, None] == repos] = -np.inf
        nearest = alike.argmax(axis=1).tolist()
        shared = [bool(classes[own] & classes[other]) for own, other in enumerate(nearest) if classes[own]]
        yield row("logits", f"nearest of another model shares a class, by {what}", np.mean(shared))


def absence(probed: ProbedConfidence, questions: Questions) -> Iterator[Row]:
    """Areas under the ROC curve, mean over draws."""
    told: list[dict[str, Float64]] = []
    present, halves, draws = [], [], []
    for draw, (logits, known, gone) in enumerate(without_classes(probed)):
        concepts = np.concatenate([known, gone])
        told.append(evidence_of(answers(probed, logits, concepts)))
        present.append(np.arange(len(concepts)) < len(known))
        halves.append(questions.halves[concepts])
        draws.append(np.full(len(concepts), draw))
    if not told:
        return
    truth, half, number = map(np.concatenate, (present, halves, draws))

    def area(values: Float64, among: Bools) -> float:
        chosen = [among & (number == draw) for draw in np.unique(number)]
        areas = [
            roc_area(values[rows & truth], values[rows & ~truth])
            for rows in chosen
            if truth[rows].any() and not truth[rows].all()
        ]
        return float(np.mean(areas))

    evidence = {what: np.concatenate([found[what] for found in told]) for what in told[0]}
    for what, values in evidence.items():
        yield row("absent", what, area(values, np.ones_like(truth)))
    features = np.stack(list(evidence.values()), axis=1)
    for trained, asked in ((DEVELOPMENT, TEST), (TEST, DEVELOPMENT)):
        combined = fitted(features, truth, half == trained)
        yield row(
            "absent", f"all of it, fitted on the truth of the {trained} half", area(combined, half == asked)
        )


def evidence_of(found: Answers) -> dict[str, Float64]:
    """What the first hits say of each concept, (C,) each."""
    scores, margins = found.scores[:, :HITS], found.margins[:, :HITS]
    sure = np.clip(found.confidences[:, :3], 0, 1 - 1e-12)
    return {
        "confidence of the first hit": found.confidences[:, 0],
        "score of the first hit": scores[:, 0],
        "score of the first hit above the second": scores[:, 0] - scores[:, 1],
        f"score of the first hit above hit {HITS}": scores[:, 0] - scores[:, -1],
        "margin of the first hit": margins[:, 0],
        "margin of the second hit": margins[:, 1],
        "margin of the third hit": margins[:, 2],
        f"mean margin of {HITS} hits": margins.mean(axis=1),
        f"largest margin of {HITS} hits": margins.max(axis=1),
        "one of three hits is right (noisy or)": -np.log1p(-sure).sum(axis=1),
    }


def fitted(x: Float64, present: Bools, rows: Bools) -> Float64:
    """Evidence (P,) of a penalised logistic regression on features (P, F), fitted to some rows, outcomes balanced."""
    x = (x - x[rows].mean(axis=0)) / x[rows].std(axis=0)
    signs = np.where(present[rows], 1.0, -1.0)
    weights = np.where(present[rows], 0.5 / present[rows].mean(), 0.5 / (1 - present[rows].mean()))

    def loss(w: Float64) -> float:
        evidence = x[rows] @ w[1:] + w[0]
        return float((weights * np.logaddexp(0, -signs * evidence)).mean() + 1e-3 * np.square(w[1:]).sum())

    best = scipy.optimize.minimize(loss, np.zeros(x.shape[1] + 1), method="L-BFGS-B").x
    return np.asarray(x @ best[1:])


if __name__ == "__main__":
    main()

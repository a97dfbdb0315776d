"""Whether the confidence of hits can be trusted: is it calibrated, and does it tell an absent concept from a present one?

The confidence is fitted as publishing fits it, on declared labels; the truth file only judges it. For the second
question the logits of some classes are held out of the gallery and of everything computed from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.benchmark.probed import ProbedHub
from pipelines.benchmark.protocols import AS_PUBLISHED, Round, rounds
from pipelines.benchmark.questions import ALL, SINGLE, SUPER, Bools, Questions
from pipelines.benchmark.tables import Row
from pipelines.labels.confidence import LabelledConcepts
from probelog.arrays import Ints
from probelog.evaluation.accuracy import bootstrap, roc_area
from probelog.ranking import matched_heads
from probelog.ranking.confidence import ColumnStatistics, Confidence, hit_margins
from probelog.ranking.matched_heads import Float64, HeadSpace

METHOD = "matched heads"
FIRST = 10
BINS = 10
# Classes that are held out in each draw; of small hubs a quarter of those that can be asked.
HELD = 20
DRAWS = 10
AREAS = ("auc", "auc_best", "auc_score", "auc_right")


@dataclass(frozen=True)
class ProbedConfidence:
    """One hub at one budget and with one background: what stays the same whichever of its logits are held out.

    Attributes:
        space: holds the background's directions.
        directions: (N, d) of the logits.
        owners: (N,) whose they are, a number for each model.
        labels: (N,) declared ones, empty for the negative of a one-logit head.
        relevant: (C, N) by the truth file.
        single: (C,) which concepts are single classes.
        queries: (C, d) directions of the concepts.
        excluded: for each concept the background concepts that do not compete with it.
        named: the labels' own names, to fit on.
    """

    space: HeadSpace
    directions: Float64
    owners: Ints
    labels: list[str]
    relevant: Bools
    single: Bools
    queries: Float64
    excluded: Sequence[Ints]
    named: LabelledConcepts

    @classmethod
    def of(
        cls, hub: ProbedHub, questions: Questions, share: float, part: Round | None = None
    ) -> ProbedConfidence:
        """The models of a hub as if each had seen a share of the probes.

        Args:
            hub: the hub.
            questions: the concepts.
            share: of the probes.
            part: the C concepts that are asked, and their background; none: all of them, with the index's.
        """
        if part is None:
            (part,) = rounds(AS_PUBLISHED, questions, hub.generation.background)
        gallery, kept = hub.gallery(share, seed=0)
        names = [questions.names[number] for number in part.numbers]
        synonyms = [questions.synonyms[number] for number in part.numbers]
        asked = hub.concepts(hub.embed(names), synonyms, part.background)
        space = HeadSpace(gallery.embeddings, asked.background)
        labels = ["" if item.negated else item.label for item in (hub.logits[i] for i in kept)]
        return cls(
            space=space,
            directions=np.concatenate([space.of_model(model) for model in gallery.models]),
            owners=gallery.owners,
            labels=labels,
            relevant=questions.relevant[np.ix_(part.numbers, kept)],
            single=questions.single[part.numbers],
            queries=space.of_texts(asked.queries, asked.excluded),
            excluded=asked.excluded,
            named=LabelledConcepts.of(labels, space, hub.embed, part.background, seed=0),
        )


@dataclass(frozen=True)
class Answers:
    """The first k hits of C' concepts, k at most ``FIRST``.

    ``scores``, ``margins``, ``confidences`` and ``right`` are all (C', k).
    """

    scores: Float64
    margins: Float64
    confidences: Float64
    right: Bools
    confidence: Confidence


def answers(probed: ProbedConfidence, logits: Ints, concepts: Ints) -> Answers:
    """Ask concepts of a gallery of only these logits, with the confidence that is fitted on them."""
    directions, background = probed.directions[logits], probed.space.background
    owners = probed.owners[logits]
    labels = [probed.labels[number] for number in logits.tolist()]
    b = matched_heads.sharpness(directions, background)
    offsets = matched_heads.offsets(directions, background, b)
    statistics = ColumnStatistics.of(directions, background, offsets, b)
    confidence = probed.named.fit(directions, owners, offsets, labels, background, b, statistics)
    scores, distances, right = [], [], []
    for concept in concepts.tolist():
        excluded = probed.excluded[concept]
        column = matched_heads.scores_of_concept(
            probed.queries[concept], directions, owners, offsets, background, b, excluded
        )
        hits = np.argsort(-column, kind="stable")[:FIRST]
        scores.append(column[hits])
        distances.append(hit_margins(directions, offsets, column, hits, background, b, statistics, excluded))
        right.append(probed.relevant[concept, logits[hits]])
    scores_of, margins = np.stack(scores), np.stack(distances)
    return Answers(scores_of, margins, confidence.of(scores_of, margins), np.stack(right), confidence)


def reliability(parts: Sequence[ProbedConfidence]) -> Iterator[Row]:
    """Confidence against the share of right hits, over the first hits of every concept that has an answer.

    A row for each part of the concepts and each of ``BINS`` equal pieces of [0, 1] that holds hits.
    ``calibration_error`` is the expected one over the part's bins: the mean over hits of the gap between a bin's mean
    confidence and its share of right hits (Naeini et al. 2015).

    Args:
        parts: the hub, once with the background of each part of the concepts. ``source``, ``pairs`` and ``positives``
            are of the first.
    """
    asked = [np.flatnonzero(probed.relevant.any(axis=1)) for probed in parts]
    answered = [
        answers(probed, np.arange(len(probed.labels)), concepts)
        for probed, concepts in zip(parts, asked, strict=True)
        if len(concepts)
    ]
    if not answered:
        return
    single = np.concatenate([probed.single[concepts] for probed, concepts in zip(parts, asked, strict=True)])
    all_confidences, all_right = (
        np.concatenate(values)
        for values in zip(*((one.confidences, one.right) for one in answered), strict=True)
    )
    fitted = answered[0].confidence
    for part, chosen in ((SINGLE, single), (SUPER, ~single), (ALL, np.ones_like(single))):
        confidences, right = all_confidences[chosen].ravel(), all_right[chosen].ravel()
        places = np.minimum((confidences * BINS).astype(np.int64), BINS - 1)
        counts = np.bincount(places, minlength=BINS)
        sums = np.bincount(places, confidences, BINS), np.bincount(places, right, BINS)
        error = float(np.abs(sums[0] - sums[1]).sum() / max(len(confidences), 1))
        for place in np.flatnonzero(counts).tolist():
            yield {
                "part": part,
                "low": place / BINS,
                "high": (place + 1) / BINS,
                "hits": int(counts[place]),
                "confidence": float(sums[0][place] / counts[place]),
                "right": float(sums[1][place] / counts[place]),
                "concepts": int(chosen.sum()),
                "calibration_error": error,
                "source": fitted.source,
                "pairs": fitted.pairs,
                "positives": fitted.positives,
            }


def absent(parts: Sequence[ProbedConfidence]) -> Iterator[Row]:
    """How well an absent concept is told from a present one: a row for each draw, then the mean (``draw`` is None).

    All areas are under the ROC curve, over the classes held out and those still present. ``auc``: by the first
    hit's confidence. ``auc_best``: by the best confidence among the first hits. ``auc_score``: by the first hit's
    score. ``auc_right``: as ``auc``, over only those present classes whose first hit is right. Nothing where fewer
    than four single classes have an answer. Intervals are over draws; each part of the concepts has its own.

    Args:
        parts: the hub, once with the background of each part of the concepts.
    """
    rows = [row for probed in parts for row in _draws(probed)]
    for number, row in enumerate(rows):
        yield row | {"draw": number}
    if rows:
        yield _mean(rows)


def _draws(probed: ProbedConfidence) -> Iterator[Row]:
    for logits, present, held_out in without_classes(probed):
        answered = answers(probed, logits, np.concatenate([present, held_out]))
        first, best, score = (
            answered.confidences[:, 0],
            answered.confidences.max(axis=1),
            answered.scores[:, 0],
        )
        known = len(present)
        right = answered.right[:known, 0]
        yield {
            "draw": 0,
            "absent": len(held_out),
            "present": known,
            "auc": roc_area(first[:known], first[known:]),
            "auc_best": roc_area(best[:known], best[known:]),
            "auc_score": roc_area(score[:known], score[known:]),
            "auc_right": roc_area(first[:known][right], first[known:]) if right.any() else None,
            "first_right": float(right.mean()),
            **{f"{name}_{bound}": None for name in AREAS for bound in ("low", "high")},
        }


def without_classes(probed: ProbedConfidence) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Galleries without some classes: the logits left, concepts still present, concepts held out."""
    classes = np.flatnonzero(probed.single & probed.relevant.any(axis=1))
    held = min(HELD, len(classes) // 4)
    for draw in range(DRAWS if held else 0):
        held_out = np.random.default_rng([draw, len(classes)]).choice(classes, held, replace=False)
        logits = np.flatnonzero(~probed.relevant[held_out].any(axis=0))
        remaining = np.setdiff1d(classes, held_out)
        present = remaining[probed.relevant[np.ix_(remaining, logits)].any(axis=1)]
        if len(present):  # else all others are only known to logits of several classes, which went too
            yield logits, present, held_out


def _mean(rows: Sequence[Row]) -> Row:
    mean: Row = {"draw": None}
    mean["absent"] = round(float(np.mean([row["absent"] for row in rows])))
    mean["present"] = round(float(np.mean([row["present"] for row in rows])))
    mean["first_right"] = float(np.mean([row["first_right"] for row in rows]))
    for name in AREAS:
        values = [row[name] for row in rows if row[name] is not None]
        interval = bootstrap(np.array(values)[:, None])[0] if values else (None, None, None)
        mean |= dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))
    return mean

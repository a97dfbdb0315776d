"""The benchmark's tables: rows of plain values, made from finished cells."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.benchmark.cells import TEXT, Cell, CellResult
from pipelines.benchmark.classifiers import Classifiers
from pipelines.benchmark.probed import ProbedHub
from pipelines.benchmark.protocols import AS_PUBLISHED, WITHHELD
from pipelines.benchmark.questions import ALL, SINGLE, SUPER, Questions
from probelog.evaluation.accuracy import DEVELOPMENT, TEST, bootstrap, chance, hub_curve, hubness_of

Row = dict[str, Any]
PARTS = (SINGLE, SUPER, ALL)
BOTH = "both"
HALVES = (DEVELOPMENT, TEST, BOTH)
MEASURES = ("top1", "top5", "map")
# The hub curve is told at so many logits.
_CURVE = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class Finished:
    """All cells of a benchmark with what they are about, by name of the probe set."""

    hubs: Mapping[str, ProbedHub]
    questions: Mapping[str, Questions]
    outcomes: Mapping[Cell, CellResult]

    def groups(self) -> dict[Cell, list[Cell]]:
        """Cells that differ by their seed only, by the one with seed 0."""
        cells: dict[Cell, list[Cell]] = {}
        for cell in self.outcomes:
            cells.setdefault(replace(cell, seed=0), []).append(cell)
        return cells

    def measures(self, cells: Sequence[Cell]) -> npt.NDArray[np.float64]:
        """Top-1, top-5 and average precision of every query (Q, 3), the mean over cells of different seeds."""
        return np.asarray(np.mean([self.outcomes[cell].answers.measures for cell in cells], axis=0))

    def chosen(self, cell: Cell, part: str, half: str) -> npt.NDArray[np.bool_]:
        """Which of a cell's queries (Q,) are of a part and a half."""
        concepts, asked = self.outcomes[cell].concepts, self.questions[cell.probe_set]
        return np.asarray(
            ((part == ALL) | (asked.parts[concepts] == part))
            & ((half == BOTH) | (asked.halves[concepts] == half))
        )


def results(done: Finished) -> list[Row]:
    """Accuracy in long form: for every cell, and for the mean over seeds (``seed`` is None), each part and half.

    Intervals are over queries. ``chance_*`` is what a random order is expected to get, ``oracle`` what an order
    that knows the truth gets of all concepts asked: 1 where a relevant logit exists.
    """
    rows = []
    for group, cells in done.groups().items():
        if group.varied:
            continue
        hub, questions = done.hubs[group.probe_set], done.questions[group.probe_set]
        lucky = chance(questions.relevant.sum(axis=1), len(hub.logits))
        several: list[tuple[int | None, list[Cell]]] = [(cell.seed, [cell]) for cell in cells]
        for seed, some in [(None, cells), *several]:
            measures = done.measures(some)
            ranks = np.concatenate([done.outcomes[cell].answers.rank for cell in some])
            seconds = float(np.mean([done.outcomes[cell].seconds for cell in some]))
            for part, half in itertools.product(PARTS, HALVES):
                chosen = done.chosen(some[0], part, half)
                if not chosen.any():
                    continue
                concepts = done.outcomes[some[0]].concepts[chosen]
                rows.append(
                    {
                        **_place(group),
                        "probes": max(1, round(group.share * hub.probes)),
                        "seed": seed,
                        "seeds": len(some),
                        "part": part,
                        "half": half,
                        "queries": int(chosen.sum()),
                        **_intervals(measures[chosen]),
                        "median_rank": float(np.median(ranks[np.tile(chosen, len(some))])),
                        **dict(zip(_named("chance"), map(float, lucky[concepts].mean(axis=0)), strict=True)),
                        "oracle": _oracle(questions, group.asked, part, half),
                        "seconds": seconds,
                    }
                )
    return rows


def differences(done: Finished, baseline: str) -> list[Row]:
    """Every method against the baseline on the same queries, paired: at the same budget and at the largest one.

    ``significant`` says of each measure whether its 95 % interval leaves out 0.
    """
    rows = []
    groups = done.groups()
    for group, cells in groups.items():
        if group.varied:
            continue
        beside = replace(group, method=baseline)
        largest = max(other.share for other in groups if other == replace(beside, share=other.share))
        for other_share in dict.fromkeys([group.share, largest]):
            other = replace(beside, share=other_share)
            if group == other:
                continue
            others = groups[other]
            difference = done.measures(cells) - done.measures(others)
            for part, half in itertools.product(PARTS, HALVES):
                chosen = done.chosen(cells[0], part, half)
                if not chosen.any():
                    continue
                intervals = _intervals(difference[chosen])
                rows.append(
                    {
                        **_place(group),
                        "baseline": baseline,
                        "baseline_budget": other_share,
                        "part": part,
                        "half": half,
                        "queries": int(chosen.sum()),
                        **intervals,
                        **{
                            f"{name}_significant": bool(
                                intervals[f"{name}_low"] > 0 or intervals[f"{name}_high"] < 0
                            )
                            for name in MEASURES
                        },
                    }
                )
    return rows


def hubs(done: Finished) -> list[Row]:
    """How concentrated the answers to text queries are, the mean over seeds; ``share_m`` is the hub curve."""
    rows = []
    for group, cells in done.groups().items():
        if group.asked != TEXT or group.varied:
            continue
        logits = len(done.hubs[group.probe_set].logits)
        firsts = [done.outcomes[cell].answers.first for cell in cells]
        counts = [hubness_of(first, logits) for first in firsts]
        curve = np.mean([hub_curve(first[:, 0], logits) for first in firsts], axis=0)
        rows.append(
            {
                **_place(group),
                "queries": len(firsts[0]),
                "logits": logits,
                "half": float(np.mean([item.half for item in counts])),
                "skew": float(np.mean([item.skew for item in counts])),
                **{f"share_{m}": float(curve[min(m, logits) - 1]) for m in _CURVE},
            }
        )
    return rows


def hub_curves(
    done: Finished, probe_set: str, share: float, protocol: str
) -> dict[str, npt.NDArray[np.float64]]:
    """The hub curve (N,) of every method at one budget, the mean over seeds."""
    logits = len(done.hubs[probe_set].logits)
    return {
        group.method: np.mean(
            [hub_curve(done.outcomes[cell].answers.first[:, 0], logits) for cell in cells], axis=0
        )
        for group, cells in done.groups().items()
        if group == Cell(probe_set, group.method, share, 0, protocol=protocol)
    }


def reverse(done: Finished) -> list[Row]:
    """The reverse task: which of the concepts is a logit? Over the logits that recognise at least one of them.

    Nothing where concepts have different backgrounds, whose scores do not compare. ``oracle`` is their share among all logits; chance is the exact expectation for a random order of concepts.
    """
    rows = []
    for group, cells in done.groups().items():
        if group.asked != TEXT or group.varied or group.protocol == WITHHELD:
            continue
        questions = done.questions[group.probe_set]
        ranks = np.stack([done.outcomes[cell].named for cell in cells])
        measures = np.stack([(ranks <= 1).mean(axis=0), (ranks <= 5).mean(axis=0)], axis=1)
        counts = questions.relevant[:, questions.nameable].sum(axis=0)
        lucky = chance(counts, len(questions.names)).mean(axis=0)
        rows.append(
            {
                **_place(group),
                "seeds": len(cells),
                "concepts": len(questions.names),
                "logits": ranks.shape[1],
                **_intervals(measures, MEASURES[:2]),
                "median_rank": float(np.median(ranks)),
                "chance_top1": float(lucky[0]),
                "chance_top5": float(lucky[1]),
                "oracle": ranks.shape[1] / questions.relevant.shape[1],
            }
        )
    return rows


def sweeps(done: Finished) -> list[Row]:
    """Accuracy of single classes (all concepts where there are none) against r and against the background's size.

    The largest background is the whole one.
    """
    rows = []
    groups = done.groups()
    for group, cells in groups.items():
        r, background = group.r, group.background
        if group.asked != TEXT or group.protocol != AS_PUBLISHED:
            continue
        if not group.varied:
            if group.share < max(other.share for other in groups if other.probe_set == group.probe_set):
                continue
            background = len(done.hubs[group.probe_set].generation.background)
        chosen = done.chosen(cells[0], SINGLE, BOTH)
        if not chosen.any():
            chosen = done.chosen(cells[0], ALL, BOTH)
        rows.append(
            {
                "probe_set": group.probe_set,
                "sweep": "r" if r is not None else "background",
                "value": r if r is not None else background,
                "method": group.method,
                "budget": group.share,
                "seeds": len(cells),
                "queries": int(chosen.sum()),
                **_intervals(done.measures(cells)[chosen]),
            }
        )
    return rows


def areas(done: Finished, tested: Mapping[str, Classifiers]) -> list[Row]:
    """PR-AUC of the first correct logit, of the hub's correct logits on average, and of the encoder alone.

    Means over single classes with query images, each half and both, with paired differences.
    """
    rows = []
    for probe_set, classifiers in tested.items():
        concepts = classifiers.concepts
        fixed = {
            number: (classifiers.hub_area(number), classifiers.encoder_area(number)) for number in concepts
        }
        halves = done.questions[probe_set].halves
        for group, cells in done.groups().items():
            if (group.probe_set, group.asked) != (probe_set, TEXT) or group.varied:
                continue
            firsts = [_first_relevant(done.outcomes[cell]) for cell in cells]
            values = np.array(
                [[np.mean([classifiers.area(n, first[n]) for first in firsts]), *fixed[n]] for n in concepts]
            ).reshape(-1, 3)
            usable = ~np.isnan(values).any(axis=1)
            for half in HALVES:
                chosen = usable & ((half == BOTH) | (halves[concepts] == half))
                if not chosen.any():
                    continue
                first, hub, encoder = values[chosen].T
                names = ("first_correct", "hub_mean", "encoder", "first_minus_hub", "first_minus_encoder")
                columns = np.stack([first, hub, encoder, first - hub, first - encoder], axis=1)
                rows.append(
                    {
                        **_place(group),
                        "half": half,
                        "concepts": int(chosen.sum()),
                        **_intervals(columns, names),
                    }
                )
    return rows


def by_rank(done: Finished, tested: Mapping[str, Classifiers]) -> list[Row]:
    """What the logit at each rank is worth: the share that are right, and the mean PR-AUC, right or wrong.

    Over single classes with query images, seeds averaged.
    """
    rows = []
    for probe_set, classifiers in tested.items():
        relevant = done.questions[probe_set].relevant
        for group, cells in done.groups().items():
            if (group.probe_set, group.asked) != (probe_set, TEXT) or group.varied:
                continue
            pairs = [
                (number, first)
                for cell in cells
                for number, first in zip(
                    done.outcomes[cell].concepts.tolist(), done.outcomes[cell].answers.first, strict=True
                )
                if number in set(classifiers.concepts)
            ]
            if not pairs:
                continue
            for place in range(len(pairs[0][1])):
                areas = [classifiers.area(number, int(first[place])) for number, first in pairs]
                right = [bool(relevant[number, first[place]]) for number, first in pairs]
                rows.append(
                    {
                        **_place(group),
                        "rank": place + 1,
                        "right": float(np.mean(right)),
                        "pr_auc": float(np.nanmean(areas)) if not np.isnan(areas).all() else None,
                    }
                )
    return rows


def queries(done: Finished) -> Iterable[Row]:
    """A row for every query of every cell, with its first answer."""
    for cell, outcome in done.outcomes.items():
        hub, questions = done.hubs[cell.probe_set], done.questions[cell.probe_set]
        for i, number in enumerate(outcome.concepts.tolist()):
            first = int(outcome.answers.first[i, 0])
            answer = hub.logits[first]
            yield {
                "probe_set": cell.probe_set,
                "asked": cell.asked,
                "method": cell.method,
                "budget": cell.share,
                "protocol": cell.protocol,
                "seed": cell.seed,
                "r": cell.r,
                "background": cell.background,
                "concept": questions.names[number],
                "part": str(questions.parts[number]),
                "half": str(questions.halves[number]),
                "relevant": int(questions.relevant[number].sum()),
                "rank": int(outcome.answers.rank[i]),
                "average_precision": float(outcome.answers.average_precision[i]),
                "first_repo": answer.repo,
                "first_logit": answer.logit,
                "first_negated": answer.negated,
                "first_label": answer.label,
                "first_right": bool(questions.relevant[number, first]),
            }


def _place(group: Cell) -> Row:
    return {
        "probe_set": group.probe_set,
        "asked": group.asked,
        "method": group.method,
        "budget": group.share,
        "protocol": group.protocol,
    }


def _intervals(values: npt.NDArray[np.float64], names: Sequence[str] = MEASURES) -> Row:
    row: Row = {}
    for name, interval in zip(names, bootstrap(values), strict=True):
        row |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return row


def _named(prefix: str) -> list[str]:
    return [f"{prefix}_{name}" for name in MEASURES]


def _oracle(questions: Questions, asked: str, part: str, half: str) -> float:
    """Share of the concepts of a part and half that have an answer at all."""
    chosen = ((part == ALL) | (questions.parts == part)) & ((half == BOTH) | (questions.halves == half))
    if asked != TEXT:
        chosen &= questions.single
    return float(questions.relevant[chosen].any(axis=1).mean()) if chosen.any() else 0.0


def _first_relevant(outcome: CellResult) -> dict[int, int]:
    return dict(zip(outcome.concepts.tolist(), outcome.answers.first_relevant.tolist(), strict=True))

"""The figures of one evaluation of generators, as records for JSON and as tables for a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.labels.hub_search import ModelSearch
from probelog.evaluation.accuracy import Interval
from probelog.evaluation.generators import MEASURES

TITLES = dict(zip(MEASURES, ("top-1", "top-5", "top-10", "mAP"), strict=True))


@dataclass(frozen=True)
class MethodFigures:
    """One method on the queries of one modality, with the first samples of every model.

    Attributes:
        modality: of the queries.
        method: its name.
        samples: of each model, at most.
        queries: how many had a generator that makes what they ask for.
        concepts: of these queries.
        measures: top1, top5, top10 and map, each with its interval over concepts.
        differences: of the same to Monte Carlo with all samples, on the same queries.
        absent_area: how probably the first answer to a concept that some generator makes is above that to one which none
            makes; None where no absent concept is asked for.
        milliseconds: a query, over all models; None where it was not timed.
    """

    modality: str
    method: str
    samples: int
    queries: int
    concepts: int
    measures: Mapping[str, Interval]
    differences: Mapping[str, Interval]
    absent_area: Interval | None
    milliseconds: float | None


@dataclass(frozen=True)
class EncoderFigures:
    """What bounds every method: how well the encoder tells the same concepts apart on real pictures.

    Attributes:
        pictures: what is looked at: queries of a modality, or samples.
        by_name: share whose nearest concept by name is a right one; None for names.
        by_pictures: share whose nearest concept by the mean of real pictures is one; a picture itself is left out.
        concepts: that are told apart.
        counted: pictures.
    """

    pictures: str
    by_name: Interval | None
    by_pictures: Interval | None
    concepts: int
    counted: int


@dataclass(frozen=True)
class GeneratorEvaluation:
    """All figures.

    Attributes:
        index: its address.
        generators: that take part.
        chance: top-1 of a random order, by modality.
        methods: each method, modality and number of samples.
        encoder: what the encoder can tell apart.
        searches: what people have without an index, on the queries by name.
        bytes_a_model: in the index, without thumbnails; None where it was not read.
    """

    index: str
    generators: int
    chance: Mapping[str, float]
    methods: Sequence[MethodFigures]
    encoder: Sequence[EncoderFigures]
    searches: Sequence[ModelSearch]
    bytes_a_model: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = asdict(self)
        for item in plain["methods"]:
            item["measures"] = {name: value._asdict() for name, value in item["measures"].items()}
            item["differences"] = {name: value._asdict() for name, value in item["differences"].items()}
            item["absent_area"] = item["absent_area"] and item["absent_area"]._asdict()
        for item in plain["encoder"]:
            for name in ("by_name", "by_pictures"):
                item[name] = item[name] and item[name]._asdict()
        return plain

    def lines(self) -> list[str]:
        """The same as tables for a person, in per cent."""
        lines = [f"{self.index}: {self.generators:,} generators"]
        if self.bytes_a_model is not None:
            lines.append(f"{self.bytes_a_model:,.0f} bytes a generator, without thumbnails")
        for modality, chance in self.chance.items():
            own = [item for item in self.methods if item.modality == modality]
            if own:
                lines += ["", *_table(modality, chance, own)]
        lines += [
            "",
            f"{'what the encoder reads':<34}{'by name':>22}{'by real pictures':>22}{'concepts':>10}",
        ]
        for item in self.encoder:
            lines.append(
                f"{item.pictures:<34}{_interval(item.by_name):>22}{_interval(item.by_pictures):>22}{item.concepts:>10}"
            )
        if self.searches:
            lines += ["", f"{'by words alone':<34}{'top-1':>8}{'top-5':>8}{'mAP':>8}{'answered':>10}"]
        for way in self.searches:
            figures = (way.top1, way.top5, way.average_precision)
            cells = "".join(f"{100 * figure:8.1f}" for figure in figures)
            lines.append(f"{way.name:<34}{cells}{100 * way.answered:10.1f}")
        return lines


def _table(modality: str, chance: float, methods: Sequence[MethodFigures]) -> Iterator[str]:
    most = max(methods, key=lambda item: item.queries)
    yield (
        f"{modality}: {most.queries} queries of {most.concepts} concepts, chance {100 * chance:.1f}; in brackets 95 % "
        "over concepts"
    )
    yield (
        f"{'method':<32}{'samples':>8}{'top-1':>23}{'top-5':>7}{'top-10':>8}{'mAP':>7}"
        f"{'top-1 less Monte Carlo':>26}{'AUC present':>23}{'ms':>9}"
    )
    for item in methods:
        top5, top10, average = (100 * item.measures[name].mean for name in MEASURES[1:])
        yield (
            f"{item.method:<32}{item.samples:>8}{_interval(item.measures['top1']):>23}{top5:7.1f}{top10:8.1f}{average:7.1f}"
            f"{_interval(item.differences['top1'], '+'):>26}{_interval(item.absent_area):>23}"
            f"{'-' if item.milliseconds is None else format(item.milliseconds, '.2f'):>9}"
        )


def _interval(value: Interval | None, sign: str = "") -> str:
    if value is None:
        return "-"
    mean, low, high = (f"{100 * number:{sign}.1f}" for number in value)
    return f"{mean} [{low}, {high}]"

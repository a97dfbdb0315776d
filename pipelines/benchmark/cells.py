"""The cells of the benchmark: one method on one hub with one budget and one seed, each kept once finished."""

from __future__ import annotations

import hashlib
import io
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import probelog
from pipelines.benchmark import probed, protocols
from pipelines.benchmark import questions as questions_module
from pipelines.benchmark.probed import ProbedHub
from pipelines.benchmark.protocols import AS_PUBLISHED, WITHHELD, Round, rounds
from pipelines.benchmark.questions import Questions
from pipelines.job.progress import Report
from probelog.evaluation import METHODS, Method
from probelog.evaluation.accuracy import PerQuery, per_query
from probelog.evaluation.gallery import Concepts, Gallery
from probelog.evaluation.truncated import second_version
from probelog.storage.encoding import short_key
from probelog.storage.store import Store

TEXT = "text"
# So many answers of every query are kept.
FIRST = 10


@dataclass(frozen=True)
class Cell:
    """What is measured once.

    Attributes:
        probe_set: name of the hub on its probe set.
        method: name of the method.
        share: of the probes that each model sees.
        seed: of the models' subsets, of the query images and of the background.
        asked: ``text``, or how many images stand for a concept.
        r: version 2's truncation, where it is varied.
        background: number of background concepts, where it is varied.
        protocol: how the background is chosen (``pipelines.benchmark.protocols``).
    """

    probe_set: str
    method: str
    share: float
    seed: int
    asked: str = TEXT
    r: int | None = None
    background: int | None = None
    protocol: str = AS_PUBLISHED

    @property
    def varied(self) -> bool:
        """Whether it belongs to a sweep over r or over the background's size."""
        return self.r is not None or self.background is not None


@dataclass(frozen=True)
class CellResult:
    """What a cell gave.

    Attributes:
        concepts: (Q,) numbers of the concepts that were asked and have an answer.
        answers: what they got.
        named: (M,) ranks of the first right concept of every logit that recognises one (the reverse task); empty
            unless texts were asked, all of them with the same background.
        seconds: that the method took.
    """

    concepts: npt.NDArray[np.int64]
    answers: PerQuery
    named: npt.NDArray[np.int64]
    seconds: float

    def to_bytes(self) -> bytes:
        """As a NumPy archive."""
        sink = io.BytesIO()
        np.savez_compressed(
            sink,
            concepts=self.concepts,
            named=self.named,
            seconds=np.array(self.seconds),
            **self.answers._asdict(),
        )
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> CellResult:
        """Read what ``to_bytes`` wrote. Raises ValueError, KeyError or BadZipFile where it is something else."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            answers = PerQuery(*(arrays[name] for name in PerQuery._fields))
            return cls(arrays["concepts"], answers, arrays["named"], float(arrays["seconds"]))


@dataclass(frozen=True)
class Asked:
    """Query vectors for some of the concepts: ``numbers`` (C',) and ``vectors`` (C', d).

    For queries by image ``images`` holds each one's embeddings (s, d), and ``vectors`` their means.
    """

    numbers: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.floating[Any]]
    images: list[npt.NDArray[np.floating[Any]]] | None = None


# The query vectors of a cell that is asked with images.
ImageQueries = Callable[[ProbedHub, str, int], Asked]


def run_cells(
    cells: Sequence[Cell],
    hubs: Mapping[str, ProbedHub],
    questions: Mapping[str, Questions],
    images: ImageQueries | None,
    inputs: str,
    out: Store,
    report: Report,
) -> Iterator[tuple[Cell, CellResult]]:
    """Run every cell that ``out`` does not hold yet; killed, the same call goes on where it was.

    Args:
        cells: in the order of the results.
        hubs: by name of the probe set.
        questions: by name of the probe set.
        images: makes the queries of cells that are asked with images.
        inputs: identity of what else they are made of (the query images).
        out: where ``cells/KEY.npz`` lie. A key covers the hub, the questions, the cell and this program's code.
        report: is told the progress.
    """
    code = _code()
    keys = {
        cell: short_key(
            "cell",
            code,
            hubs[cell.probe_set].key,
            questions[cell.probe_set].key,
            "" if cell.asked == TEXT else inputs,
            *{**asdict(cell), "probe_set": ""}.values(),
        )
        for cell in cells
    }
    finished = {cell: result for cell in cells if (result := _finished(out, keys[cell])) is not None}
    counter = report.counter("evaluate", len(cells), "cells", len(finished))
    # Neighbours share the gallery: subsets are drawn once for all methods.
    shared: tuple[tuple[str, float, int], tuple[Gallery, npt.NDArray[np.int64]]] | None = None
    texts: dict[str, Asked] = {}
    for cell in cells:
        if (done := finished.get(cell)) is None:
            hub, asked_of = hubs[cell.probe_set], questions[cell.probe_set]
            place = (cell.probe_set, cell.share, 0 if cell.share == 1 else cell.seed)
            if shared is None or shared[0] != place:
                shared = (place, hub.gallery(cell.share, place[2]))
            if cell.asked == TEXT:
                if cell.probe_set not in texts:
                    numbers = np.arange(len(asked_of.names))
                    texts[cell.probe_set] = Asked(numbers, hub.embed(asked_of.names))
                asked = texts[cell.probe_set]
            else:
                assert images is not None
                asked = images(hub, cell.asked, cell.seed)
            done = _run(cell, hub, asked_of, asked, *shared[1])
            out.write(_name(keys[cell]), done.to_bytes())
            counter.add()
        yield cell, done
    counter.show(final=True)


def _run(
    cell: Cell,
    hub: ProbedHub,
    questions: Questions,
    asked: Asked,
    gallery: Gallery,
    kept: npt.NDArray[np.int64],
) -> CellResult:
    method: Method = METHODS[cell.method] if cell.r is None else partial(second_version, r=cell.r)
    seconds = 0.0
    # What no method could see is never found.
    scores = np.full((len(asked.numbers), len(hub.logits)), -np.inf)
    for part in rounds(cell.protocol, questions, hub.generation.background):
        places = np.flatnonzero(np.isin(asked.numbers, part.numbers))
        if not len(places):
            continue
        concepts = _concepts(cell, hub, questions, asked, places, part)
        begun = time.perf_counter()
        method_scores = method(gallery, concepts)
        seconds += time.perf_counter() - begun
        assert not np.isnan(method_scores).any(), f"{cell.method} gave scores that are no numbers"
        scores[np.ix_(places, kept)] = method_scores
    relevant = questions.relevant[asked.numbers]
    answerable = np.flatnonzero(relevant.any(axis=1))
    named = np.empty(0, np.int64)
    if cell.asked == TEXT and cell.protocol != WITHHELD:
        named = per_query(scores.T[questions.nameable], relevant.T[questions.nameable], keep=1).rank
    return CellResult(
        asked.numbers[answerable],
        per_query(scores[answerable], relevant[answerable], keep=FIRST),
        named,
        seconds,
    )


def _concepts(
    cell: Cell,
    hub: ProbedHub,
    questions: Questions,
    asked: Asked,
    places: npt.NDArray[np.int64],
    part: Round,
) -> Concepts:
    """Those of a cell's queries that are at some places, with the background of their round."""
    images = None if asked.images is None else [asked.images[place] for place in places]
    # Who asks with images gives no name that could be left out of the background.
    synonyms = [questions.synonyms[asked.numbers[place]] if images is None else [] for place in places]
    concepts = replace(hub.concepts(asked.vectors[places], synonyms, part.background), images=images)
    return concepts if cell.background is None else with_background(concepts, cell.background, cell.seed)


def with_background(concepts: Concepts, size: int, seed: int) -> Concepts:
    """The same questions with a random part of the background.

    A smaller part of the same seed lies within a larger one.
    """
    order = np.random.default_rng([seed, len(concepts.background)]).permutation(len(concepts.background))
    chosen = np.sort(order[:size])
    return replace(
        concepts,
        background=concepts.background[chosen],
        excluded=[np.flatnonzero(np.isin(chosen, numbers)) for numbers in concepts.excluded],
    )


def _finished(out: Store, key: str) -> CellResult | None:
    data = out.read_or_none(_name(key))
    if data is None:
        return None
    try:
        return CellResult.from_bytes(data)
    except (ValueError, KeyError, OSError, zipfile.BadZipFile):
        return None  # damaged: measured again


def _name(key: str) -> str:
    return f"cells/{key}.npz"


def _code() -> str:
    """Digest of the code that scores depend on: a changed method is measured again."""
    digest = hashlib.sha256()
    sources = [Path(str(module.__file__)) for module in (probed, protocols, questions_module)]
    for file in [*sorted(Path(probelog.__file__).parent.rglob("*.py")), *sources, Path(__file__)]:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()

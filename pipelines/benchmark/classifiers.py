"""What the retrieved logits are worth as classifiers of labelled images (section 5.4 of the paper's second version).

The hub's models are run on the query images by the ordinary probe stage, as one more probe set in a store.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.runtime.session import session
from pipelines.benchmark.cells import Asked
from pipelines.benchmark.probed import ProbedHub
from pipelines.benchmark.questions import Questions
from pipelines.config.model import Config
from pipelines.crawl.stage import hub_endpoint
from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.probe.probe_set import ready_probes
from pipelines.probe.stage import probe
from probelog.arrays import values_of
from probelog.encoders.torch_encoder import load_encoder
from probelog.errors import UsageError
from probelog.evaluation.accuracy import precision_recall_area
from probelog.probes.sources import ProbeReport, candidates, source_files
from probelog.storage.encoding import digest
from probelog.storage.layout import CATALOGUES, RECEIPT
from probelog.storage.ledger import observed_models
from probelog.storage.parquet_parts import Part, read_part
from probelog.storage.schemas import CATALOGUE, CatalogueRow, from_table, to_table


@dataclass(frozen=True)
class Classifiers:
    """The logits of a hub as classifiers of M images.

    Attributes:
        values: (N, M) raw logits; NaN where a model could not be run.
        classes: (M,) class number of every image.
        similarities: (C, M) of every concept's text to every image, by the encoder alone.
        questions: the concepts.
    """

    values: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]
    similarities: npt.NDArray[np.floating[Any]]
    questions: Questions
    _areas: dict[tuple[int, int], float] = field(default_factory=dict, compare=False)

    @property
    def concepts(self) -> list[int]:
        """Numbers of the single classes that have images and a logit that recognises them and could be run."""
        ran = ~np.isnan(self.values[:, 0])
        present = set(self.classes.tolist())
        return [
            number
            for number in self.questions.answerable.tolist()
            if self.questions.classes[number] in present and (self.questions.relevant[number] & ran).any()
        ]

    def area(self, concept: int, logit: int) -> float:
        """Area under the precision-recall curve of one logit for one concept; NaN where it could not be run."""
        key = (concept, logit)
        if key not in self._areas:
            values = self.values[logit]
            self._areas[key] = (
                float("nan")
                if np.isnan(values).any()
                else precision_recall_area(values, self.classes == self.questions.classes[concept])
            )
        return self._areas[key]

    def hub_area(self, concept: int) -> float:
        """Mean over all logits of the hub that recognise a concept."""
        logits = np.flatnonzero(self.questions.relevant[concept])
        return float(np.nanmean([self.area(concept, int(logit)) for logit in logits]))

    def encoder_area(self, concept: int) -> float:
        """What the encoder gets alone, by the similarity of the concept's text."""
        positive = self.classes == self.questions.classes[concept]
        return precision_recall_area(self.similarities[concept], positive)


def classifiers(
    hubs: Mapping[str, ProbedHub],
    questions: Mapping[str, Questions],
    images: QueryImages,
    report: Report,
    scratch: Path | None = None,
) -> dict[str, Classifiers]:
    """Run the models on the query images; what the store holds already is not run again.

    Args:
        hubs: by name; the first one's store takes the images as one more probe set, for the models of all.
        questions: the concepts, by the same names.
        images: with their classes.
        report: is told the progress.
        scratch: folder for downloads; none: the system's.

    Raises:
        UsageError: no store has a catalogue of the models, the encoder is gone, or no image is usable.
    """
    first = next(iter(hubs.values()))
    config = Config(
        store=first.store.uri,
        probes=str(images.file),
        probe_count=None,
        encoder=first.generation.settings.encoder,
        fraction=1.0,
        top_r=1,
        scratch=scratch,
    )
    job = Job.of(config, report)
    probe_set = ready_probes(job, load_encoder(config.encoder))
    with session(config.ray_address):
        rows = to_table(_catalogue_rows(hubs.values()), CATALOGUE)
        probed = probe(job, rows, probe_set, hub_endpoint(), retry_failed=False)
    ran = {
        (model.repo, model.sha): (numbers, values)
        for receipt in probed.receipts
        for model, numbers, values in observed_models(first.store, receipt)
    }
    # The set has an order of its own, and leaves out what is there twice.
    place = {content: number for number, content in enumerate(images.contents)}
    order = [place[content] for content in values_of(probe_set.facts()["sha256"], str)]
    return {
        name: Classifiers(
            _values(hub, ran, len(order)),
            images.classes[order],
            hub.embed(questions[name].names) @ images.embeddings(hub)[order].T,
            questions[name],
        )
        for name, hub in hubs.items()
    }


def _values(
    hub: ProbedHub,
    ran: Mapping[tuple[str, str], tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]],
    images: int,
) -> npt.NDArray[np.float32]:
    """The hub's logits on the images (N, M); NaN where a model could not be run."""
    shas = {model.repo: model.sha for model in hub.models}
    values = np.full((len(hub.logits), images), np.nan, np.float32)
    for row, item in enumerate(hub.logits):
        if (found := ran.get((item.repo, shas[item.repo]))) is not None:
            numbers, observed = found
            values[row] = observed[np.searchsorted(numbers, item.logit)] * (-1 if item.negated else 1)
    return values


def _catalogue_rows(hubs: Iterable[ProbedHub]) -> list[CatalogueRow]:
    """The catalogues' rows of the models that take part."""
    rows: dict[tuple[str, str], CatalogueRow] = {}
    for hub in hubs:
        requested = {(model.repo, model.sha) for model in hub.models}
        for name in hub.store.names(CATALOGUES, suffix=RECEIPT):
            for part in hub.store.read_json(name)["rows"]:
                for row in from_table(read_part(hub.store, Part(**part), CATALOGUE), CatalogueRow):
                    if (row.repo, row.sha) in requested:
                        rows[row.repo, row.sha] = row
    if not rows:
        raise UsageError("no store holds a catalogue of its index's models: run `probelog-index crawl`")
    return [rows[key] for key in sorted(rows)]


# How many images stand for a concept, as in the paper's second version.
COUNTS = (1, 5, 10)
_CLASS_COLUMNS = ("class", "label")


def asked_with(count: int) -> str:
    """What a cell's ``asked`` says of queries by so many images."""
    return f"{count} image{'s' if count > 1 else ''}"


@dataclass(frozen=True)
class QueryImages:
    """M images (``data``: encoded files) with their class numbers ``classes`` (M,).

    ``file`` is where they came from, ``left_out`` counts rows without usable bytes.
    """

    file: Path
    data: list[bytes]
    classes: npt.NDArray[np.int64]
    left_out: int
    _embeddings: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict, compare=False)

    @classmethod
    def read(cls, file: Path) -> QueryImages:
        """Read a Parquet file with images (as probes have them) and a column ``class`` or ``label`` of integers.

        Raises:
            UsageError: the file cannot be read or has other columns.
        """
        if file.suffix != ".parquet" or not file.is_file():
            raise UsageError(f"{file}: the query images must be a Parquet file (columns image and class)")
        try:
            schema = pq.read_schema(file)
            column = next((name for name in _CLASS_COLUMNS if name in schema.names), None)
            if column is None or not pa.types.is_integer(schema.field(column).type):
                raise UsageError(f"{file}: there is no integer column `class` or `label`: {schema.names}")
            numbers = pq.read_table(file, columns=[column])[column].to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UsageError(f"{file}: the query images cannot be read ({error})") from None
        files, _ = source_files(str(file))
        data, classes, left_out = [], [], 0
        for number, (_, content) in zip(numbers, candidates(files), strict=True):
            if isinstance(content, ProbeReport) or number is None:
                left_out += 1
            else:
                data.append(content)
                classes.append(number)
        if not data:
            raise UsageError(f"{file}: there is no image with a class")
        return cls(file, data, np.array(classes, np.int64), left_out)

    @property
    def key(self) -> str:
        """Identity of the images and their classes."""
        return digest("".join(self.contents).encode() + self.classes.tobytes())

    @cached_property
    def contents(self) -> list[str]:
        """The SHA-256 of every image's file."""
        return [digest(item) for item in self.data]

    def embeddings(self, hub: ProbedHub) -> npt.NDArray[np.float32]:
        """(M, d) unit vectors by the index's own image encoder; kept for indexes with the same one.

        Raises:
            QueryError: the index has no image encoder, or an image cannot be decoded.
        """
        encoder = hub.generation.settings.encoder_digest
        if encoder not in self._embeddings:
            self._embeddings[encoder] = hub.generation.image_encoder.embed(self.data, mirror=True)
        return self._embeddings[encoder]

    def drawn(self, questions: Questions, seed: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Every single class's number among the questions, and its images in the seed's order."""
        for number, number_of_class in enumerate(questions.classes):
            if number_of_class is not None:
                candidates = np.flatnonzero(self.classes == number_of_class)
                yield number, np.random.default_rng([seed, number]).permutation(candidates)

    def queries(self, hub: ProbedHub, questions: Questions, count: int, seed: int) -> Asked:
        """Every single class that has so many images, asked with the mean of ``count`` of them (unit length).

        Fewer images of the same seed are among the more.
        """
        embeddings = self.embeddings(hub)
        numbers, vectors, shown = [], [], []
        for number, images_of_query in self.drawn(questions, seed):
            if len(images_of_query) >= count:
                chosen = images_of_query[:count]
                mean = embeddings[chosen].mean(axis=0)
                numbers.append(number)
                shown.append(embeddings[chosen])
                vectors.append(mean / np.linalg.norm(mean))
        dimension = embeddings.shape[1]
        return Asked(np.array(numbers, np.int64), np.array(vectors, np.float32).reshape(-1, dimension), shown)


def counts_at_hand(images: QueryImages, questions: Questions) -> list[int]:
    """Which of ``COUNTS`` images a concept there are enough of, for at least one concept with an answer."""
    sizes = [
        int((images.classes == questions.classes[number]).sum())
        for number in questions.answerable
        if questions.classes[number] is not None
    ]
    return [count for count in COUNTS if any(size >= count for size in sizes)]

"""What the retrieved logits are worth as classifiers of labelled images (section 5.4 of the paper's second version).

The hub's models are run on the query images by the ordinary probe stage, as one more probe set in the same store.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cluster.session import session
from pipelines.benchmark.images import QueryImages
from pipelines.benchmark.probed import ProbedHub
from pipelines.benchmark.questions import Questions
from pipelines.config import Config
from pipelines.crawl import hub_endpoint
from pipelines.probe import probe
from pipelines.probes import ready_probes
from pipelines.progress import Report
from pipelines.stages import Job
from probelog.encoders import load_encoder
from probelog.errors import UsageError
from probelog.evaluation import precision_recall_area
from probelog.ledger import Part, observed_models, read_part
from probelog.schemas import CATALOGUE, CatalogueRow, from_table


@dataclass(frozen=True)
class Classifiers:
    """The logits of a hub as classifiers of M images.

    Attributes:
        values: (N, M) logits; NaN where a model could not be run.
        classes: (M,) class number of every image.
        similarities: (C, M) of every concept's text to every image, by the encoder alone.
        questions: the concepts.
    """

    values: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]
    similarities: npt.NDArray[np.float64]
    questions: Questions
    _areas: dict[tuple[int, int], float] = field(default_factory=dict, compare=False)

    @property
    def concepts(self) -> list[int]:
        """Numbers of the single classes that have images and a logit that recognises them and could be run."""
        ran = ~np.isnan(self.values[:, 0])
        there = set(self.classes.tolist())
        return [
            number
            for number in self.questions.answerable.tolist()
            if self.questions.classes[number] in there and (self.questions.relevant[number] & ran).any()
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
    hub: ProbedHub, questions: Questions, images: QueryImages, report: Report, scratch: Path | None = None
) -> Classifiers:
    """Run a hub's models on the query images; what the store holds already is not run again.

    Args:
        hub: its store takes the images as one more probe set; its catalogue says what to download.
        questions: the concepts.
        images: with their classes.
        report: is told the progress.
        scratch: folder for downloads; none: the system's.

    Raises:
        UsageError: the store has no catalogue of the models, the encoder is gone, or no image is usable.
    """
    settings = hub.generation.settings
    config = Config(
        store=hub.store.uri,
        probes=str(images.file),
        probe_count=None,
        encoder=str(settings["encoder"]),
        fraction=1.0,
        top_r=1,
        scratch=scratch,
    )
    job = Job.of(config, report)
    rows = _catalogue_rows(hub)
    encoder = load_encoder(config.encoder)
    if encoder.digest != settings["encoder_digest"]:
        raise UsageError(f"{config.encoder}: this is not the encoder that {hub.store.uri} was indexed with")
    probe_set = ready_probes(job, encoder)
    with session(config.ray_address):
        probed = probe(job, rows, probe_set, hub_endpoint(), retry_failed=False)
    place = {(item.repo, item.logit, item.negated): number for number, item in enumerate(hub.logits)}
    values = np.full((len(hub.logits), probe_set.count), np.nan, np.float32)
    wanted = {(model.repo, model.sha) for model in hub.models}
    for receipt in probed.receipts:
        for model, numbers, observed in observed_models(hub.store, receipt):
            if (model.repo, model.sha) not in wanted:
                continue
            for number, row in zip(numbers.tolist(), observed, strict=True):
                for negated, sign in ((False, 1), (True, -1)):
                    if (target := place.get((model.repo, number, negated))) is not None:
                        values[target] = sign * row
    by_content = images.class_by_content()
    classes = [by_content[content] for content in probe_set.facts()["sha256"].to_pylist()]
    pictures = probe_set.embeddings(encoder.digest).astype(np.float64)
    return Classifiers(values, np.array(classes), hub.embed(questions.names) @ pictures.T, questions)


def _catalogue_rows(hub: ProbedHub) -> list[CatalogueRow]:
    """The catalogue's rows of the models that take part."""
    wanted = {(model.repo, model.sha) for model in hub.models}
    found = {}
    for name in hub.store.names("catalogue", suffix="receipt.json"):
        for part in hub.store.read_json(name)["rows"]:
            for row in from_table(read_part(hub.store, Part(**part), CATALOGUE), CatalogueRow):
                if (row.repo, row.sha) in wanted:
                    found[row.repo, row.sha] = row
    if not found:
        raise UsageError(
            f"{hub.store.uri} holds no catalogue of the index's models: run `probelog-index crawl`"
        )
    return [found[key] for key in sorted(found)]

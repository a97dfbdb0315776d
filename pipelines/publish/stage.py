"""The publish stage: descriptors, encoder and thumbnails become a generation of the index, then go live."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.complete.descriptors import (
    Descriptors,
    DescriptorSummary,
    ModelDescriptors,
    drawn,
    same_logits,
)
from pipelines.complete.record import CompletionRecord
from pipelines.crawl.stage import Catalogue
from pipelines.job.background import background_names
from pipelines.job.job import Job
from pipelines.labels.confidence import MAX_LOGITS, fit_confidence
from pipelines.probe.plan import first_keys
from pipelines.publish.answers import ASKED_LOGITS
from pipelines.publish.checks import check_generation
from pipelines.publish.encoder import exported_encoder
from pipelines.publish.expected import Expected
from pipelines.publish.release import LiveIndex, PublishResult, release_generation
from pipelines.quality.failures import FailureCounts
from probelog import __version__
from probelog.encoders.torch_encoder import Encoder
from probelog.errors import StoreError, UsageError
from probelog.index.arrow import fixed_lists
from probelog.index.schema import INDEX_VERSION, MODEL_FACTS, probes_schema
from probelog.index.settings import GenerationSettings
from probelog.probes.probe_set import ProbeSet
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.rows import LogitBatch, write_tables
from probelog.ranking import matched_heads
from probelog.ranking.confidence import ColumnStatistics, Confidence
from probelog.ranking.matched_heads import Background
from probelog.ranking.names import name_vectors, prompted
from probelog.storage.encoding import npy, short_key
from probelog.storage.ledger import Ledger, Receipt, key_numbers, open_failures
from probelog.storage.schemas import LISTED_FACTS, CatalogueRow, ProbedModel
from probelog.storage.store import Store

# Logits that the temperature and the basis are learnt from: enough, however large the hub.
_SAMPLE_LOGITS = 20_000
# Fewer names than this calibrate badly: with 50 instead of 245 the README's hub lost 11 points of top-1, with 10 20.
_FEW_NAMES = 50


@dataclass(frozen=True)
class ListingSnapshot:
    """Which models there are on the Hub.

    Attributes:
        rows: of the catalogue, each repository once.
        watermark: the newest change among what was listed (ISO 8601); nightly runs go on from there.
        at: when the whole Hub was listed, or the index compared with it, last (UTC, ISO 8601).
        finished: when the newest of this was listed.
    """

    rows: Sequence[CatalogueRow]
    watermark: str | None
    at: str
    finished: str

    @classmethod
    def of(cls, catalogue: Catalogue) -> ListingSnapshot:
        """What one crawl found."""
        rows = catalogue.rows()
        # A commit carries its author's clock: one from the future would hide all that happens until then.
        end = dt.datetime.fromisoformat(catalogue.finished)
        times = [row.last_modified for row in rows if row.last_modified is not None]
        changes = [time for time in times if time <= end]
        watermark = max(changes).isoformat() if changes else None
        return cls(rows, watermark, catalogue.started, catalogue.finished)


@dataclass(frozen=True)
class _Inputs:
    job: Job
    probe_set: ProbeSet
    encoder: Encoder
    completed: CompletionRecord
    receipts: list[Receipt]
    failed: npt.NDArray[np.uint64]
    listed: ListingSnapshot
    rows: dict[tuple[str, str], CatalogueRow]
    background: list[str]
    read: Descriptors | None

    @cached_property
    def models(self) -> list[ProbedModel]:
        """The models to publish, in the index's order."""
        ledger = Ledger(self.job.store, "")
        return [m for m in ledger.models(self.receipts) if (m.repo, m.sha) in self.rows]

    @cached_property
    def descriptors(self) -> Descriptors:
        """Their logits."""
        return Descriptors(self.job.store, self.receipts, self.completed.parts, self.models, self.read)

    @cached_property
    def written(self) -> DescriptorSummary:
        """What is noted of these logits on their way to the index."""
        return DescriptorSummary(len(self.models), ASKED_LOGITS)

    @cached_property
    def embeddings(self) -> npt.NDArray[np.float32]:
        """The encoder's unit vectors of the probes: (n, d)."""
        return self.probe_set.embeddings(self.encoder.digest)

    @cached_property
    def vectors(self) -> npt.NDArray[np.float32]:
        """Unit vectors of the background's names: (B, d)."""
        return self.embed(self.background)

    def embed(self, names: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors of names in the index's prompts: (C, d)."""
        return name_vectors(self.encoder.embed_texts, self.job.config.prompts, names)

    @property
    def source(self) -> str:
        config = self.job.config
        return short_key(
            "generation",
            INDEX_VERSION,
            matched_heads.SHARPNESS,
            self.completed.key,
            self.probe_set.hash,
            self.encoder.digest,
            *config.prompts,
            *self.background,
            *(json.dumps(asdict(row), default=str) for row in self.rows.values()),
        )


def publish(
    job: Job,
    listed: ListingSnapshot,
    probe_set: ProbeSet,
    encoder: Encoder,
    observations: str,
    receipts: Sequence[Receipt],
    completed: CompletionRecord,
    run: FailureCounts,
    allowed: Callable[[], None] | None = None,
    night: str | None = None,
    live: LiveIndex | None = None,
    read: Descriptors | None = None,
) -> PublishResult:
    """Build a generation, check it, and make it the live one. A no-op when the live one is made of the same.

    Args:
        job: what is asked for, and where it is kept.
        listed: which models there are; others that were probed are left out.
        probe_set: the images.
        encoder: the text-image encoder.
        observations: key of the ledger.
        receipts: of the ledger.
        completed: their descriptors.
        run: what the models that were probed came to.
        allowed: raises where this run may not publish any more.
        night: when the newest of the models was added by a nightly run (UTC, ISO 8601), if any was.
        live: what readers have, where it is open already.
        read: descriptors of some of the models, where they were read already.

    Raises:
        QualityError: it is worse than the live one allows (`pipelines.quality`).
        StoreError: it is not what it must be, or the store refuses.
        ConflictError: somebody else published meanwhile.
        UsageError: the catalogue is older than the nightly runs whose models are live.
    """
    config = job.config
    index = job.store.child("index")
    live = live or LiveIndex.open(index)
    _not_older(listed, live)
    given = _Inputs(
        job=job,
        probe_set=probe_set,
        encoder=encoder,
        completed=completed,
        receipts=sorted((r for r in receipts if r.name in completed.parts), key=lambda r: r.name),
        failed=_failed(Ledger(job.store, ""), receipts),
        listed=listed,
        rows={(row.repo, row.sha): row for row in sorted(listed.rows, key=lambda row: (row.repo, row.sha))},
        background=background_names(config.background, config.background_count, config.seed),
        read=read,
    )
    if live is not None and live.pointer.source == given.source:
        unchanged = live.unchanged()
        job.report.say(f"publish: generation {live.pointer.generation} is already live")
        return unchanged
    return release_generation(
        job,
        live,
        given.source,
        lambda name: _build(given, index, name, observations, run, night),
        lambda generation: check_generation(generation, _expected(given)),
        run,
        allowed=allowed,
    )


def _not_older(listed: ListingSnapshot, live: LiveIndex | None) -> None:
    """Refuse to take away what nightly runs have added since the Hub was listed.

    Raises:
        UsageError: says what to do.
    """
    if live is None or isinstance(live.opened, StoreError):
        return  # what cannot be read is to be replaced
    night = live.generation.settings.night
    if night is not None and listed.finished < night:
        raise UsageError(
            f"the catalogue is of {listed.finished}, older than the nightly run of {night} whose models are live, and "
            "would drop them: list the Hub again first (--refresh, with full or crawl)"
        )


def _failed(ledger: Ledger, receipts: Sequence[Receipt]) -> npt.NDArray[np.uint64]:
    """Keys (`first_keys`) of the models that were tried and never succeeded: nightly runs leave them alone."""
    sealed = np.sort(key_numbers(item for receipt in receipts for item in receipt.items))
    return np.sort(first_keys(open_failures(ledger.failure_rows(receipts), sealed)))


def _build(
    given: _Inputs, index: Store, name: str, observations: str, run: FailureCounts, night: str | None
) -> GenerationSettings:
    job, config, completed = given.job, given.job.config, given.completed
    embeddings = given.embeddings
    prompts = [text for name in given.background for text in prompted(config.prompts, name)]
    exported, text_difference, image_difference = exported_encoder(
        job.store, job.report, given.encoder, prompts
    )
    text, image = exported.text, exported.image

    models = given.models
    if not models:
        raise UsageError(
            "there is nothing to publish: none of the catalogue's models was probed with success"
        )
    if len(given.background) < _FEW_NAMES:
        job.report.say(
            f"publish: the background holds {len(given.background)} names only: answers will be worse than they could "
            "be; some hundreds of names of all sorts are better"
        )
    space = matched_heads.HeadSpace(embeddings, given.vectors)
    some = given.descriptors.sample_directions(_SAMPLE_LOGITS)
    background = Background(space.background, matched_heads.sharpness(some, space.background))
    writer = GenerationWriter(index, name)
    job.report.line("publish: writing tables")
    sample = _Sample(min(1.0, MAX_LOGITS / completed.logits))
    written = write_tables(
        writer,
        _logit_batches(given, background, sample),
        model_table(models, given.rows),
        background,
        some,
        given.probe_set.count,
        same=[same_logits(model) for model in models],
    )
    job.report.line("publish: fitting the confidence of hits")
    statistics, confidence = sample.fit(given, space, background)
    writer.write("probes", probes_schema(embeddings.shape[1]), [_probe_table(given.probe_set, embeddings)])
    settings = GenerationSettings(
        version=INDEX_VERSION,
        made_by=f"probelog {__version__}",
        models=len(models),
        logits=written.logits,
        probe_set=given.probe_set.hash,
        observations=observations,
        fraction=config.fraction,
        seed=config.seed,
        encoder=config.encoder,
        encoder_digest=given.encoder.digest,
        prompts=config.prompts,
        method="matched heads",
        sharpness=background.sharpness,
        confidence=confidence,
        background_concepts=len(given.background),
        # Where nightly runs go on from.
        watermark=given.listed.watermark,
        listed=given.listed.at,
        night=night,
        text_encoder=text.settings,
        text_encoder_difference=text_difference,
        image_encoder=None if image is None else image.settings,
        image_encoder_difference=image_difference,
        image_encoder_missing=exported.image_missing,
        **completed.facts(),
        completion=completed.key,
        run=run.to_dict(),
        **written.settings,
    )
    meta = {
        "settings": settings.to_bytes(),
        "background": json.dumps(given.background).encode(),
        "background_vectors.npy": npy(given.vectors),
        "background_statistics.npy": npy(np.stack([statistics.means, statistics.stds])),
        "text_encoder.onnx": text.onnx,
        "tokenizer.json": text.tokenizer_json.encode(),
        "failed.npy": npy(given.failed),
        **written.meta,
    }
    if image is not None:
        meta["image_encoder.onnx"] = image.onnx
    writer.write_meta(meta)
    writer.finish()
    return settings


def _logit_batches(given: _Inputs, background: Background, sample: _Sample) -> Iterator[LogitBatch]:
    for described in given.written.of(given.descriptors.stream()):
        sample.add(described, background.offsets(described.directions))
        yield described.batch()


class _Sample:
    """Some of the published logits, whole models chosen by a hash: what the confidence is fitted on."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._directions: list[npt.NDArray[np.float32]] = []
        self._offsets: list[npt.NDArray[np.float64]] = []
        self._labels: list[str] = []

    def add(self, described: ModelDescriptors, offsets: npt.NDArray[np.float64]) -> None:
        """Look at one model and its logits' offsets (L,)."""
        model = described.model
        # The first one is kept whatever its hash: a sample of nothing has no statistics.
        if self._labels and not drawn(model, self._share):
            return
        self._directions.append(described.directions)
        self._offsets.append(offsets)
        self._labels += [
            model.labels[logit] if logit < len(model.labels) and not opposite else ""
            for logit, opposite in zip(described.logits.tolist(), described.negated.tolist(), strict=True)
        ]

    def fit(
        self, given: _Inputs, space: matched_heads.HeadSpace, background: Background
    ) -> tuple[ColumnStatistics, Confidence]:
        """Statistics of the background over the sample, and the confidence fitted on its declared labels."""
        config, b = given.job.config, background.sharpness
        directions, offsets = np.concatenate(self._directions), np.concatenate(self._offsets)
        statistics = ColumnStatistics.of(directions, background.directions, offsets, b)
        return statistics, fit_confidence(
            directions,
            offsets,
            self._labels,
            space,
            b,
            given.embed,
            given.background,
            statistics,
            config.seed,
        )


def model_table(models: Sequence[ProbedModel], listed_as: Mapping[tuple[str, str], CatalogueRow]) -> pa.Table:
    """The facts of models (``MODEL_FACTS``, but for ``copies``), from probing and from the catalogue."""
    rows = []
    for model in models:
        listed = asdict(listed_as[model.repo, model.sha])
        rows.append(
            {
                "repo": model.repo,
                "sha": model.sha,
                "library": model.library,
                "architecture": model.architecture,
                "head": model.head,
                "logits": model.logits,
                "labels": model.labels,
                "parameters": model.parameters,
                "weight_digest": model.weight_digest,
                "observed": len(model.probes),
                **{name: listed[name] for name in LISTED_FACTS},
            }
        )
    return pa.Table.from_pylist(rows, MODEL_FACTS).drop_columns(["copies"])


def _probe_table(probe_set: ProbeSet, embeddings: npt.NDArray[np.float32]) -> pa.Table:
    facts = probe_set.facts()
    return pa.table(
        {
            "id": facts["id"],
            "name": facts["name"],
            "sha256": facts["sha256"],
            "thumbnail": pa.array(probe_set.thumbnails(), pa.binary()),
            "embedding": fixed_lists(embeddings, pa.float32()),
        }
    ).cast(probes_schema(embeddings.shape[1]))


def _expected(given: _Inputs) -> Expected:
    """What the checks compare the new generation with."""
    return Expected(
        descriptors=given.descriptors,
        written=given.written,
        missing=_without_descriptor(given),
        dropped=given.completed.dropped,
        embeddings=given.embeddings,
        background=given.background,
        vectors=given.vectors,
        embed=given.embed,
        prompts=given.job.config.prompts,
    )


def _without_descriptor(given: _Inputs) -> int:
    """Logits that the receipts count and that have no row of descriptors."""
    ledger = Ledger(given.job.store, "")
    counted = sum(counts.logits for counts in ledger.counts(given.receipts))
    return counted - sum(given.completed.parts[receipt.name].rows for receipt in given.receipts)

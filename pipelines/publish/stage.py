"""The publish stage: descriptors, encoder and thumbnails become a generation of the index, then go live."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.runtime.session import session
from pipelines.complete.descriptors import (
    Descriptors,
    DescriptorSummary,
    ModelDescriptors,
    drawn,
    same_logits,
)
from pipelines.complete.record import CompletionRecord
from pipelines.config.model import Config
from pipelines.crawl.stage import Catalogue, hub_endpoint
from pipelines.job.background import HUB, IMAGENET_21K, background_names
from pipelines.job.job import Job
from pipelines.labels.confidence import MAX_LOGITS, fit_confidence
from pipelines.probe.plan import first_keys
from pipelines.publish.answers import ASKED_LOGITS
from pipelines.publish.background import declared_names, hub_background
from pipelines.publish.checks import check_generation
from pipelines.publish.encoder import exported_encoder
from pipelines.publish.expected import Expected, ExpectedTrees
from pipelines.publish.generators import SampledGenerators, write
from pipelines.publish.pieces import Making, Pieces, pieces_of
from pipelines.publish.release import LiveIndex, PublishResult, refuse_older_listing, release_generation
from pipelines.quality.failures import FailureCounts
from pipelines.trees.record import TreesRecord, read_places
from probelog.encoders.torch_encoder import Encoder
from probelog.errors import UsageError
from probelog.hub.model_info import add_configured_parent
from probelog.index.arrow import fixed_lists
from probelog.index.generation import Generation
from probelog.index.schema import INDEX_VERSION, MODEL_FACTS, SHOWN_PROBES, probes_schema
from probelog.index.settings import GenerationSettings, recorded_endpoint
from probelog.probes.probe_set import ProbeSet
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.rows import EncodedRows, LogitBatch, RowEncoder, write_edges, write_tables
from probelog.ranking import matched_heads
from probelog.ranking.confidence import ColumnStatistics, Confidence
from probelog.ranking.matched_heads import Background
from probelog.ranking.names import name_vectors, prompted
from probelog.storage.encoding import npy, short_key
from probelog.storage.layout import INDEX
from probelog.storage.ledger import Ledger, Receipt, key_numbers, open_failures
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import EDGES, LISTED_FACTS, CatalogueRow, ProbedModel, TreeFacts
from probelog.storage.store import Store
from probelog.storage.versions import MADE_BY

# Number of logits that the temperature and the basis are fitted on: enough for a hub of any size.
_SAMPLE_LOGITS = 20_000
# Number of these that a general vocabulary is fitted to.
_FITTED_LOGITS = 5_000
# Fewer names than this calibrate badly: with 50 instead of 245 the bench hub (docs/results.md) lost 11 points of top-1,
# with 10 it lost 20.
_FEW_NAMES = 50
_UNKNOWN_PLACE = TreeFacts()


@dataclass(frozen=True)
class ListingSnapshot:
    """The models of the Hub at one time.

    Attributes:
        rows: rows of the catalogue, each repository once.
        watermark: time of the newest listed change (ISO 8601), where nightly runs continue.
        at: when the whole Hub was last listed, or compared with the index (UTC, ISO 8601).
        finished: when the newest row was listed (UTC, ISO 8601).
    """

    rows: Sequence[CatalogueRow]
    watermark: str | None
    at: str
    finished: str

    @classmethod
    def of(cls, catalogue: Catalogue) -> ListingSnapshot:
        """The snapshot of a finished crawl."""
        watermark = catalogue.watermark
        return cls(
            catalogue.rows(),
            None if watermark is None else watermark.isoformat(),
            catalogue.started,
            catalogue.finished,
        )


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
    given_background: list[str] | None
    background_source: str | None
    read: Descriptors | None
    trees: TreesRecord | None
    sampled: SampledGenerators | None

    @cached_property
    def _probed(self) -> list[ProbedModel]:
        return Ledger(self.job.store, "").models(self.receipts, probes=False)

    @cached_property
    def models(self) -> list[ProbedModel]:
        """The models to publish, in the index's order."""
        return [model for model in self._probed if (model.repo, model.sha) in self.rows]

    @cached_property
    def descriptors(self) -> Descriptors:
        """Descriptors of these models' logits."""
        return Descriptors(self.job.store, self.receipts, self.completed.parts, self.models, self.read)

    @cached_property
    def declared(self) -> list[str]:
        """Names that the models declare, for a background of the hub's names."""
        config = self.job.config
        labels = ((model.repo, model.labels) for model in self.models)
        return declared_names(labels, config.background_count, config.seed)

    @cached_property
    def background(self) -> list[str]:
        """Names of the background."""
        if self.given_background is not None:
            return self.given_background
        config = self.job.config
        return hub_background(
            self.declared,
            background_names(config.background, config.background_count, config.seed),
            config.background_count,
            self.embed,
            self.embeddings,
            lambda: self.sample_directions[:: max(1, len(self.sample_directions) // _FITTED_LOGITS)],
        )

    @cached_property
    def sample_directions(self) -> npt.NDArray[np.float32]:
        """Directions of a sample of the logits: (S, d).

        Without any, those of pictures that generators make: the index's basis and temperature, and the names of a general
        vocabulary, are then fitted to these.
        """
        if self.models or self.sampled is None:
            return self.descriptors.sample_directions(_SAMPLE_LOGITS)
        return self.sampled.sample_directions(_SAMPLE_LOGITS, self.embeddings.mean(axis=0))

    @cached_property
    def written(self) -> DescriptorSummary:
        """Summary of these descriptors, filled while the index is written."""
        return DescriptorSummary(len(self.models), ASKED_LOGITS)

    @cached_property
    def embeddings(self) -> npt.NDArray[np.float32]:
        """The encoder's unit vectors of the probes: (n, d)."""
        return self.probe_set.embeddings(self.encoder.digest)

    @cached_property
    def vectors(self) -> npt.NDArray[np.float32]:
        """Unit vectors of the background's names: (B, d)."""
        return self.embed(self.background)

    @cached_property
    def space(self) -> matched_heads.HeadSpace:
        """What logits and names are compared in."""
        return matched_heads.HeadSpace(self.embeddings, self.vectors)

    @cached_property
    def rows_encoder(self) -> RowEncoder:
        """Makes the rows of the logits."""
        names = self.space.background
        compared = Background(names, matched_heads.sharpness(self.sample_directions, names))
        return RowEncoder.fit(self.sample_directions, compared, self.probe_set.count)

    @cached_property
    def sample(self) -> _Sample:
        """Logits that the confidence is fitted on, gathered while the index is written."""
        return _Sample(min(1.0, MAX_LOGITS / max(1, self.completed.logits)))

    @cached_property
    def pieces(self) -> Pieces | None:
        """The models in pieces for workers on Ray, where there are so many logits."""
        if self.completed.logits < self.job.config.spread_logits:
            return None
        making = Making(
            self.job.store.uri,
            self.completed.key,
            self.rows_encoder,
            frozenset({(model.repo, model.sha) for model in self._probed} - self.rows.keys()),
            max(self.sample.share, self.written.share),
        )
        return Pieces(self.job.store, making, pieces_of(self.receipts, self.completed.parts), self.models)

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
            *(self.declared if self.given_background is None else self.given_background),
            *(json.dumps(asdict(row), default=str) for row in self.rows.values()),
            *(() if self.trees is None else ("trees", self.trees.key)),
            *(() if self.sampled is None else ("generators", self.sampled.source)),
        )

    @cached_property
    def places(self) -> Mapping[str, TreeFacts]:
        """The models' places in their trees."""
        return {} if self.trees is None else read_places(self.job.store, self.trees)


def check_shown_probes(config: Config, probes: int) -> None:
    """Refuse, before anything is probed, a configuration whose descriptors cannot fill an index of so many probes.

    Raises:
        UsageError: ``top_r`` is below the number of probes that an index shows of a logit.
    """
    if config.top_r < (shown := min(SHOWN_PROBES, probes)):
        raise UsageError(
            f"top_r = {config.top_r}; an index shows {shown} probes of a logit: set it to {shown} or more"
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
    last_nightly_run: str | None = None,
    live: LiveIndex | None = None,
    read: Descriptors | None = None,
    background_of: Generation | None = None,
    trees: TreesRecord | None = None,
    sampled: SampledGenerators | None = None,
) -> PublishResult:
    """Build a generation, check it, and make it the live one. A no-op when the live one is made from the same data.

    Args:
        job: configuration and store.
        listed: models of the Hub; other models that were probed are left out.
        probe_set: the probes.
        encoder: the text-image encoder.
        observations: key of the ledger.
        receipts: of the ledger.
        completed: completion of these receipts' models.
        run: counts of the models that were probed and of failures.
        allowed: raises if this run may not publish any more.
        last_nightly_run: when the newest of the models was added by a nightly run (UTC, ISO 8601), if any was.
        live: the live generation, where it is open already.
        read: descriptors of some of the models, where they were read already.
        background_of: the generation whose background is kept; none: a new one, as configured.
        trees: of these models; none: the generation has none.
        sampled: the generators; none: the generation has none.

    Raises:
        QualityError: it fails the quality gate (`pipelines.quality`).
        StoreError: it fails the checks, or the store refuses.
        ConflictError: somebody else published meanwhile.
        UsageError: the catalogue is older than the nightly runs whose models are live.
    """
    config = job.config
    index = job.store.child(INDEX)
    live = live or LiveIndex.open(index)
    refuse_older_listing(listed.finished, live)
    background, source = _given_background(config, background_of)
    inputs = _Inputs(
        job=job,
        probe_set=probe_set,
        encoder=encoder,
        completed=completed,
        receipts=sorted((r for r in receipts if r.name in completed.parts), key=lambda r: r.name),
        failed=_failed(Ledger(job.store, ""), receipts),
        listed=listed,
        rows={(row.repo, row.sha): row for row in sorted(listed.rows, key=lambda row: (row.repo, row.sha))},
        given_background=background,
        background_source=source,
        read=read,
        trees=trees,
        sampled=sampled if sampled is not None and sampled.models else None,
    )
    if live is not None and live.pointer.source == inputs.source:
        unchanged = live.unchanged()
        job.report.say(f"publish: generation {live.pointer.generation} is already live")
        return unchanged
    with nullcontext() if completed.logits < config.spread_logits else session(config.ray_address):
        return release_generation(
            job,
            live,
            inputs.source,
            lambda name: _build(inputs, index, name, observations, run, last_nightly_run),
            lambda generation: check_generation(generation, _expected(inputs)),
            run,
            allowed=allowed,
        )


def _given_background(config: Config, kept: Generation | None) -> tuple[list[str] | None, str | None]:
    """The names of the background and where they are from; no names where these are still to be found in the hub."""
    if kept is not None:
        return kept.background, kept.settings.background_source
    if config.background == HUB:
        return None, HUB
    names = background_names(config.background, config.background_count, config.seed)
    return names, IMAGENET_21K if config.background == IMAGENET_21K else "file"


def _failed(ledger: Ledger, receipts: Sequence[Receipt]) -> npt.NDArray[np.uint64]:
    """Keys (`first_keys`) of the models that were tried and never succeeded: nightly runs skip them."""
    sealed = np.sort(key_numbers(item for receipt in receipts for item in receipt.items))
    return np.sort(first_keys(open_failures(ledger.failure_rows(receipts), sealed)))


def _build(
    inputs: _Inputs,
    index: Store,
    name: str,
    observations: str,
    run: FailureCounts,
    last_nightly_run: str | None,
) -> GenerationSettings:
    job, config, completed = inputs.job, inputs.job.config, inputs.completed
    models = inputs.models
    if not models and inputs.sampled is None:
        raise UsageError(
            "there is nothing to publish: no model of the catalogue was probed successfully"
            + (", and no generator sampled" if config.generators.enabled else "")
        )
    embeddings = inputs.embeddings
    prompts = [text for name in inputs.background for text in prompted(config.prompts, name)]
    exported, text_difference, image_difference = exported_encoder(
        job.store, job.report, inputs.encoder, prompts
    )
    text, image = exported.text, exported.image

    if len(inputs.background) < _FEW_NAMES:
        job.report.say(
            f"publish: the background holds only {len(inputs.background)} names, which makes answers worse: use several "
            "hundred names of all sorts"
        )
    encoder = inputs.rows_encoder
    background = encoder.background
    writer = GenerationWriter(index, name)
    job.report.line("publish: writing tables")
    written = write_tables(
        writer,
        _logit_batches(inputs) if inputs.pieces is None else _rows_of_workers(inputs, inputs.pieces),
        model_table(models, inputs.rows, inputs.places),
        encoder,
        same=[same_logits(model) for model in models],
    )
    if inputs.trees is not None:
        write_edges(writer, read_part(job.store, inputs.trees.edges, EDGES))
    generators, meta_of_generators = None, dict[str, bytes]()
    if inputs.sampled is not None:
        job.report.line(f"publish: describing {len(inputs.sampled.models):,} generators")
        generators, meta_of_generators = write(
            writer,
            inputs.sampled,
            inputs.places,
            inputs.space,
            inputs.probe_set,
            inputs.encoder,
        )
    job.report.line("publish: fitting the confidence of hits")
    statistics, confidence = inputs.sample.fit(inputs)
    writer.write("probes", probes_schema(embeddings.shape[1]), [_probe_table(inputs.probe_set, embeddings)])
    settings = GenerationSettings(
        version=INDEX_VERSION,
        made_by=MADE_BY,
        models=len(models),
        logits=written.logits,
        probe_set=inputs.probe_set.hash,
        observations=observations,
        fraction=config.fraction,
        seed=config.seed,
        encoder=config.encoder,
        encoder_digest=inputs.encoder.digest,
        prompts=config.prompts,
        method="matched heads",
        sharpness=background.sharpness,
        confidence=confidence,
        background_concepts=len(inputs.background),
        background_source=inputs.background_source,
        # Where nightly runs continue.
        watermark=inputs.listed.watermark,
        listed=inputs.listed.at,
        night=last_nightly_run,
        endpoint=recorded_endpoint(hub_endpoint()),
        text_encoder=text.settings,
        text_encoder_difference=text_difference,
        image_encoder=None if image is None else image.settings,
        image_encoder_difference=image_difference,
        image_encoder_missing=exported.image_missing,
        **completed.facts(),
        completion=completed.key,
        run=run.to_dict(),
        trees=None if inputs.trees is None else inputs.trees.key,
        edges=None if inputs.trees is None else inputs.trees.edges.rows,
        generators=generators,
        **written.settings,
    )
    meta = {
        "settings": settings.to_bytes(),
        "background": json.dumps(inputs.background).encode(),
        "background_vectors.npy": npy(inputs.vectors),
        "background_statistics.npy": npy(np.stack([statistics.means, statistics.stds])),
        "text_encoder.onnx": text.onnx,
        "tokenizer.json": text.tokenizer_json.encode(),
        "failed.npy": npy(inputs.failed),
        **written.meta,
        **meta_of_generators,
    }
    if image is not None:
        meta["image_encoder.onnx"] = image.onnx
    writer.write_meta(meta)
    writer.finish()
    return settings


def _logit_batches(inputs: _Inputs) -> Iterator[LogitBatch]:
    for described in inputs.written.of(inputs.descriptors.stream()):
        inputs.sample.add(described, inputs.rows_encoder.background)
        yield described.batch()


def _rows_of_workers(inputs: _Inputs, pieces: Pieces) -> Iterator[EncodedRows]:
    def note(model: ProbedModel, number: int, logits: int, described: ModelDescriptors | None) -> None:
        inputs.written.note(model, number, logits, described)
        if described is not None:
            inputs.sample.add(described, inputs.rows_encoder.background)

    count = len(pieces.pieces)
    return pieces.rows(
        note,
        lambda done: inputs.job.report.line(f"publish: {done:,} of {count:,} pieces of the index written"),
    )


class _Sample:
    """A sample of the published logits that the confidence is fitted on: all logits of models drawn by a hash.

    Args:
        share: of the models that are drawn.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._directions: list[npt.NDArray[np.float32]] = []
        self._owners: list[npt.NDArray[np.int64]] = []
        self._offsets: list[npt.NDArray[np.float64]] = []
        self._labels: list[str] = []

    def add(self, described: ModelDescriptors, background: Background) -> None:
        """Add one model with its logits' offsets, if it is drawn: they cost as much as to write its logits."""
        model = described.model
        # The first model is always drawn: an empty sample has no statistics.
        if self._labels and not drawn(model, self.share):
            return
        self._owners.append(np.full(len(described.directions), len(self._owners)))
        self._directions.append(described.directions)
        self._offsets.append(background.offsets(described.directions))
        self._labels += [
            model.labels[logit] if logit < len(model.labels) and not opposite else ""
            for logit, opposite in zip(described.logits.tolist(), described.negated.tolist(), strict=True)
        ]

    def fit(self, inputs: _Inputs) -> tuple[ColumnStatistics, Confidence]:
        """Statistics of the background over the sample, and the confidence fitted on its declared labels."""
        background = inputs.rows_encoder.background
        config, b = inputs.job.config, background.sharpness
        if not self._labels:
            pictures = inputs.sample_directions
            offsets = background.offsets(pictures)
            statistics = ColumnStatistics.of(pictures, background.directions, offsets, b)
            return statistics, Confidence.posterior(len(inputs.background), 0, 0)
        directions, offsets = np.concatenate(self._directions), np.concatenate(self._offsets)
        statistics = ColumnStatistics.of(directions, background.directions, offsets, b)
        return statistics, fit_confidence(
            directions,
            np.concatenate(self._owners),
            offsets,
            self._labels,
            inputs.space,
            b,
            inputs.embed,
            inputs.background,
            statistics,
            config.seed,
        )


def model_table(
    models: Sequence[ProbedModel],
    listed_as: Mapping[tuple[str, str], CatalogueRow],
    places: Mapping[str, TreeFacts],
) -> pa.Table:
    """The facts of models (``MODEL_FACTS``, but for ``copies``), from probing, the catalogue and their trees."""
    rows = []
    for model in models:
        row = listed_as[model.repo, model.sha]
        listed = asdict(
            replace(row, parents=add_configured_parent(row.repo, row.parents, model.name_or_path))
        )
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
                "recipe": model.recipe,
                "dtype": model.dtype,
                "precision": model.precision,
                "model_type": row.model_type,
                **{name: listed[name] for name in LISTED_FACTS},
                **asdict(places.get(model.repo, _UNKNOWN_PLACE)),
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


def _expected(inputs: _Inputs) -> Expected:
    """The data that the new generation is checked against."""
    return Expected(
        descriptors=inputs.descriptors,
        written=inputs.written,
        missing=_without_descriptor(inputs),
        dropped=inputs.completed.dropped,
        embeddings=inputs.embeddings,
        background=inputs.background,
        vectors=inputs.vectors,
        embed=inputs.embed,
        prompts=inputs.job.config.prompts,
        trees=None if inputs.trees is None else ExpectedTrees(inputs.trees.edges.rows, inputs.places),
        pieces=inputs.pieces,
        sampled=inputs.sampled,
    )


def _without_descriptor(inputs: _Inputs) -> int:
    """Number of logits that the receipts count and that have no row of descriptors."""
    counted = sum(receipt.counts.logits for receipt in inputs.receipts)
    return counted - sum(inputs.completed.parts[receipt.name].rows for receipt in inputs.receipts)

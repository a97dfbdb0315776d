"""The publish stage: descriptors, encoder and thumbnails become a generation of the index, then go live."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.background import background_names
from pipelines.complete import Completed
from pipelines.confidence import MAX_LOGITS, fit_confidence
from pipelines.stages import Job
from probelog import __version__, matching
from probelog.confidence import ColumnStatistics, Confidence
from probelog.encoders import Encoder
from probelog.errors import ConflictError, StoreError, UsageError
from probelog.generation import Generation
from probelog.index import (
    INDEX_VERSION,
    MODEL_FACTS,
    POINTER,
    GenerationWriter,
    Pointer,
    fixed_lists,
    go_live,
    probes_schema,
    sweep,
)
from probelog.index_writer import LogitBatch, write_tables
from probelog.ledger import Ledger, Receipt, read_part
from probelog.matching import Background
from probelog.onnx_export import (
    UnsupportedExportError,
    check_image_encoder,
    check_text_encoder,
    export_image_encoder,
    export_text_encoder,
)
from probelog.probes import ProbeSet
from probelog.prompts import name_vectors, prompted
from probelog.schemas import DESCRIPTORS, PROBED_MODELS, CatalogueRow, Head, ProbedModel, from_table
from probelog.storage import Store, digest, npy, short_key

# Enough for the mean of a spread, however large the hub.
_SHARPNESS_LOGITS = 20_000
_CANARIES = 5
# Fewer names than this calibrate badly: with 50 instead of 245 the README's hub lost 11 points of top-1, with 10 20.
_FEW_NAMES = 50
# Of a cosine. The exported encoder differs from torch's by rounding; answers differ by hundredths.
_CANARY_DIFFERENCE = 5e-3


@dataclass(frozen=True)
class Published:
    """The generation that is live now, and whether this run made it."""

    pointer: Pointer
    fresh: bool
    models: int
    logits: int


@dataclass(frozen=True)
class _Inputs:
    job: Job
    probe_set: ProbeSet
    encoder: Encoder
    completed: Completed
    receipts: list[Receipt]
    rows: dict[tuple[str, str], CatalogueRow]
    background: list[str]

    @property
    def source(self) -> str:
        config = self.job.config
        return short_key(
            "generation",
            INDEX_VERSION,
            matching.SHARPNESS,
            self.completed.key,
            self.probe_set.hash,
            self.encoder.digest,
            *config.prompts,
            *self.background,
            *(
                json.dumps([row.repo, row.sha, row.licence, row.downloads, row.likes, row.tags])
                for row in self.rows.values()
            ),
        )


def publish(
    job: Job,
    rows: Sequence[CatalogueRow],
    probe_set: ProbeSet,
    encoder: Encoder,
    observations: str,
    receipts: Sequence[Receipt],
    completed: Completed,
) -> Published:
    """Build a generation, check it, and make it the live one. A no-op when the live one is made of the same."""
    config = job.config
    given = _Inputs(
        job=job,
        probe_set=probe_set,
        encoder=encoder,
        completed=completed,
        receipts=sorted((r for r in receipts if r.name in completed.parts), key=lambda r: r.name),
        rows={(row.repo, row.sha): row for row in sorted(rows, key=lambda row: (row.repo, row.sha))},
        background=background_names(config.background, config.background_count, config.seed),
    )
    index = job.store.child("index")
    before = index.read_or_none(POINTER)
    if before is not None:
        live = Pointer.from_bytes(before, index.path(POINTER))
        if live.source == given.source:
            opened = Generation(index, live)
            job.report.say(f"publish: generation {live.generation} is live already; nothing was left to do")
            return Published(live, False, opened.settings["models"], opened.settings["logits"])
    stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S")
    name = f"{stamp}-{given.source[:8]}"
    settings = _build(given, index, name, observations)
    _check(given, index, name, settings)
    try:
        pointer = go_live(index, name, given.source)
    except ConflictError:
        index.delete_folder(f"generations/{name}")
        raise
    sweep(index)
    job.report.say(
        f"publish: generation {name} is live: {settings['models']:,} models, {settings['logits']:,} logits"
    )
    return Published(pointer, True, settings["models"], settings["logits"])


def _build(given: _Inputs, index: Store, name: str, observations: str) -> dict[str, Any]:
    job, config, completed = given.job, given.job.config, given.completed
    embeddings = given.probe_set.embeddings(given.encoder.digest)
    job.report.line("publish: exporting the encoder")
    text = export_text_encoder(given.encoder)
    prompts = [text for name in given.background for text in prompted(config.prompts, name)]
    text_difference = check_text_encoder(given.encoder, text, prompts)
    images, image_difference, missing = _image_encoder(given)

    models = _models(given)
    numbers = {(model.repo, model.sha): number for number, model in enumerate(models)}
    if not models:
        raise UsageError(
            "there is nothing to publish: none of the catalogue's models was probed with success"
        )
    if len(given.background) < _FEW_NAMES:
        job.report.say(
            f"publish: the background holds {len(given.background)} names only: answers will be worse than they could "
            "be; some hundreds of names of all sorts are better"
        )
    vectors = name_vectors(given.encoder.embed_texts, config.prompts, given.background)
    space = matching.HeadSpace(embeddings, vectors)
    background = Background(space.background, _sharpness(given, numbers, space.background))
    writer = GenerationWriter(index, name)
    job.report.line("publish: writing tables")
    sample = _Sample(min(1.0, MAX_LOGITS / completed.logits))
    written = write_tables(
        writer,
        _logit_batches(given, numbers, background, sample),
        _model_table(given, models),
        background,
        given.probe_set.count,
    )
    job.report.line("publish: fitting the confidence of hits")
    statistics, confidence = sample.fit(given, space, background)
    writer.write("probes", probes_schema(embeddings.shape[1]), [_probe_table(given.probe_set, embeddings)])
    settings: dict[str, Any] = {
        "version": INDEX_VERSION,
        "made_by": f"probelog {__version__}",
        "models": len(models),
        "logits": written.logits,
        "probe_set": given.probe_set.hash,
        "probes": given.probe_set.count,
        "observations": observations,
        "fraction": config.fraction,
        "seed": config.seed,
        "encoder": config.encoder,
        "encoder_digest": given.encoder.digest,
        "prompts": config.prompts,
        "method": "matched heads",
        "sharpness": background.sharpness,
        "confidence": confidence.to_dict(),
        "background_concepts": len(given.background),
        "text_encoder": text.settings,
        "text_encoder_difference": text_difference,
        "image_encoder": None if images is None else images.settings,
        "image_encoder_difference": image_difference,
        "image_encoder_missing": missing,
        **completed.facts(),
        "completion": completed.key,
        **written.settings,
    }
    meta = {
        "settings": json.dumps(settings).encode(),
        "background": json.dumps(given.background).encode(),
        "background_vectors.npy": npy(vectors),
        "background_statistics.npy": npy(np.stack([statistics.means, statistics.stds])),
        "text_encoder.onnx": text.onnx,
        "tokenizer.json": text.tokenizer_json.encode(),
        **written.meta,
    }
    if images is not None:
        meta["image_encoder.onnx"] = images.onnx
    writer.write_meta(meta)
    return settings


def _image_encoder(given: _Inputs) -> tuple[Any, float | None, str | None]:
    """The exported image tower, or why there is none: an index without it is still searched by text."""
    try:
        files = export_image_encoder(given.encoder)
        return files, check_image_encoder(given.encoder, files), None
    except UnsupportedExportError as error:
        given.job.report.say(f"publish: this index will not be searchable by image: {error}")
        return None, None, str(error)


def _models(given: _Inputs) -> list[ProbedModel]:
    ledger = Ledger(given.job.store, "")
    return [m for m in ledger.models(given.receipts) if (m.repo, m.sha) in given.rows]


def _described(
    given: _Inputs, numbers: dict[tuple[str, str], int]
) -> Iterator[tuple[ProbedModel, int, pa.Table]]:
    """Every published model with its number and the descriptors of its logits, constant ones left out."""
    store = given.job.store
    for receipt in given.receipts:
        part = given.completed.parts[receipt.name]
        table = read_part(store, part, DESCRIPTORS)
        owners = list(zip(table["repo"].to_pylist(), table["sha"].to_pylist(), strict=True))
        start = 0
        for model in from_table(read_part(store, receipt.models, PROBED_MODELS), ProbedModel):
            stop = start
            while stop < len(owners) and owners[stop] == (model.repo, model.sha):
                stop += 1
            rows = table.slice(start, stop - start)
            start = stop
            if rows.num_rows and (model.repo, model.sha) in numbers:
                yield model, numbers[model.repo, model.sha], rows
        if start != len(owners):
            raise StoreError(f"{store.path(part.path)} holds logits that its receipt does not speak of")


def _logit_batches(
    given: _Inputs,
    numbers: dict[tuple[str, str], int],
    background: Background,
    sample: _Sample,
) -> Iterator[LogitBatch]:
    for model, number, rows in _described(given, numbers):
        probes = _lists(rows["top_probes"])
        directions = _directions(rows)
        logits = rows["logit"].to_numpy()
        negated = np.zeros(len(logits), bool)
        if model.head == Head.SINGLE:  # holds two concepts: the logit and its opposite, flagged as negated
            probes = np.concatenate([probes, _lists(rows["bottom_probes"])])
            negated = np.concatenate([negated, ~negated])
            logits = np.concatenate([logits, logits])
        sample.add(model, logits.tolist(), negated, directions, background.offsets(directions))
        yield LogitBatch(np.full(len(logits), number), logits, negated, directions, probes)


class _Sample:
    """Some of the published logits, whole models chosen by a hash: what the confidence is fitted on."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._directions: list[npt.NDArray[np.float32]] = []
        self._offsets: list[npt.NDArray[np.float64]] = []
        self._labels: list[str] = []

    def add(
        self,
        model: ProbedModel,
        logits: Sequence[int],
        negated: npt.NDArray[np.bool_],
        directions: npt.NDArray[np.float32],
        offsets: npt.NDArray[np.float64],
    ) -> None:
        """Look at one model: its logits' numbers and signs, directions (L, d) and offsets (L,)."""
        # The first one is kept whatever its hash: a sample of nothing has no statistics.
        if self._labels and int(digest(model.repo.encode())[:8], 16) >= self._share * 2**32:
            return
        self._directions.append(directions)
        self._offsets.append(offsets)
        self._labels += [
            model.labels[logit] if logit < len(model.labels) and not opposite else ""
            for logit, opposite in zip(logits, negated.tolist(), strict=True)
        ]

    def fit(
        self, given: _Inputs, space: matching.HeadSpace, background: Background
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
            lambda names: name_vectors(given.encoder.embed_texts, config.prompts, names),
            given.background,
            statistics,
            config.seed,
        )


def _directions(rows: pa.Table) -> npt.NDArray[np.float32]:
    """Directions of one model's logits, and after them those of their opposites where it has such (one-logit heads)."""
    directions = _lists(rows["direction"])
    if rows["opposite_direction"].null_count == rows.num_rows:
        return directions
    return np.concatenate([directions, _lists(rows["opposite_direction"])])


def _sharpness(
    given: _Inputs, numbers: dict[tuple[str, str], int], background: npt.NDArray[np.float64]
) -> float:
    """The score's temperature, from as many logits as are enough for a mean."""
    sample: list[npt.NDArray[np.float32]] = []
    count = 0
    for _, _, rows in _described(given, numbers):
        sample.append(_directions(rows))
        count += len(sample[-1])
        if count >= _SHARPNESS_LOGITS:
            break
    return matching.sharpness(np.concatenate(sample), background)


def _lists(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A column of equally long lists as a matrix."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat.reshape(len(column), -1))


def _model_table(given: _Inputs, models: Sequence[ProbedModel]) -> pa.Table:
    rows = []
    for model in models:
        listed = given.rows[model.repo, model.sha]
        rows.append(
            {
                "repo": model.repo,
                "sha": model.sha,
                "library": model.library,
                "pipeline_tag": listed.pipeline_tag,
                "architecture": model.architecture,
                "head": model.head,
                "logits": model.logits,
                "labels": model.labels,
                "licence": listed.licence,
                "tags": listed.tags,
                "downloads": listed.downloads,
                "likes": listed.likes,
                "last_modified": listed.last_modified,
                "parameters": model.parameters,
                "base_model": listed.base_model,
                "weight_digest": model.weight_digest,
                "observed": len(model.probes),
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


def _check(given: _Inputs, index: Store, name: str, settings: dict[str, Any]) -> None:
    """Read the new generation back as a client would, before anybody else does.

    Raises:
        StoreError: it does not answer as it must; it is not made live.
    """
    generation = Generation(index, Pointer(name, given.source, ""))
    problems = []
    config = given.job.config
    step = max(1, len(given.background) // _CANARIES)
    canaries = given.background[::step][:_CANARIES]
    errors = np.stack(
        [
            generation.space.of_texts(name_vectors(given.encoder.embed_texts, config.prompts, [concept]))[0]
            - generation.space.of_texts(
                name_vectors(generation.text_encoder.embed, config.prompts, [concept])
            )[0]
            for concept in canaries
        ]
    )
    rows, finite, differences = 0, True, np.zeros(len(canaries))
    for logits in generation.blocks():
        rows += len(logits)
        finite &= bool(np.isfinite(logits.directions).all() and np.isfinite(logits.offsets).all())
        differences = np.maximum(differences, np.abs(logits.directions @ errors.T).max(axis=0))
    models = generation.rows("models", ["id"]).num_rows
    if rows != settings["rows"] or models != settings["models"]:
        problems.append("its tables do not hold the rows that were written")
    if not finite:
        problems.append("it holds values that are not finite")
    for concept, difference in zip(canaries, differences, strict=True):
        if not difference < _CANARY_DIFFERENCE:
            problems.append(f"its encoder answers {concept!r} differently from the one it was made with")
    if problems:
        raise StoreError(f"generation {name} was not published: {'; '.join(problems)}")

"""The sample stage: have every listed generator make pictures, and keep their embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.probing.coordinator import CoordinatorHandle
from cluster.probing.worker import Workers
from pipelines.config.model import Filters, Generators
from pipelines.crawl.changes import crawl_since
from pipelines.crawl.stage import Catalogue, crawl_all, each_listing, united
from pipelines.job.background import background_names
from pipelines.job.job import Job
from pipelines.probe.plan import COLUMNS
from pipelines.probe.run import StageResult, run_stage
from pipelines.publish.generators import SampledGenerators
from pipelines.sample.library import missing_library
from probelog import logs
from probelog.encoders.torch_encoder import Encoder, digest_here
from probelog.errors import UsageError
from probelog.hub.client import endpoint_with_login
from probelog.kinds.registry import GENERATOR
from probelog.ranking.names import name_vectors
from probelog.storage.layout import sample_ledger
from probelog.storage.ledger import Ledger
from probelog.storage.schemas import CATALOGUE, CatalogueRow, from_table

# More tell no more apart, and each takes a CPU some hundredths of a second.
_NAMES = 256


def listings(generators: Generators) -> list[Filters]:
    """The listings that hold the generators: one for each task, or the repositories that a file names; and the galleries."""
    filters = generators.filters
    tasks: Sequence[str | None] = GENERATOR.tasks
    if filters.repos is not None or filters.pipeline_tag is not None:
        tasks = [filters.pipeline_tag]
    listed: list[Filters] = [filters.model_copy(update={"pipeline_tag": task}) for task in tasks]
    if generators.galleries is not None:
        named = {"repos": generators.galleries, "pipeline_tag": None, "limit": None}
        listed.append(filters.model_copy(update=named))
    return listed


def jobs_of(job: Job) -> Iterator[Job]:
    """A job for each listing of generators."""
    return each_listing(job, listings(job.config.generators))


def list_generators(job: Job, endpoint: str, refresh: bool = False) -> pa.Table:
    """The catalogue of generators, listed where that was not done yet.

    Raises:
        HubError: the Hub does not list.
        UsageError: the file of repositories cannot be read.
    """
    return crawl_all(job, endpoint, listings(job.config.generators), COLUMNS, refresh)


def listed_generators(job: Job, endpoint: str, columns: Sequence[str] = COLUMNS) -> pa.Table:
    """The catalogue of generators as it is.

    Raises:
        UsageError: a listing was never finished.
    """
    return united((Catalogue.open(one, endpoint) for one in jobs_of(job)), columns)


def samples_of(job: Job, encoder_digest: str) -> Ledger:
    """The ledger of a job's samples, embedded by one encoder."""
    return Ledger(job.store, sample_ledger(job.samples_key(encoder_digest)), GENERATOR.contents)


def samples_here(job: Job) -> Ledger | None:
    """The ledger of a job's samples; None where its encoder would have to be downloaded to say which it is."""
    digest = digest_here(job.config.encoder)
    return None if digest is None else samples_of(job, digest)


def list_and_sample(
    job: Job, endpoint: str, encoder: Encoder, refresh: bool = False, retry_failed: bool = False
) -> StageResult:
    """The whole stage; ``refresh`` lists the generators again."""
    table = list_generators(job, endpoint, refresh)
    return sample(job, table, encoder, endpoint, retry_failed)


def sample_changes(job: Job, endpoint: str, encoder: Encoder) -> StageResult:
    """The whole stage of a nightly run, which lists what has changed (`pipelines.crawl.changes.crawl_since`)."""
    table = united((crawl_since(one, endpoint) for one in jobs_of(job)), COLUMNS)
    return sample(job, table, encoder, endpoint, retry_failed=False)


def sampled_generators(job: Job, endpoint: str, encoder: Encoder) -> SampledGenerators | None:
    """The generators that are listed and were sampled, as they are published; None where a job wants none.

    Raises:
        UsageError: a listing was never finished.
    """
    if not job.config.generators.enabled:
        return None
    ledger = samples_of(job, encoder.digest)
    rows = from_table(listed_generators(job, endpoint, CATALOGUE.names), CatalogueRow)
    return SampledGenerators.of(ledger, ledger.paths.key, rows)


def sample(
    job: Job,
    table: pa.Table,
    encoder: Encoder,
    endpoint: str,
    retry_failed: bool,
    only: npt.NDArray[np.bool_] | None = None,
) -> StageResult:
    """Sample the generators that the ledger does not hold yet (`pipelines.probe.run.run_stage`).

    Args:
        job: configuration and store.
        table: the catalogue of generators (`list_generators`).
        encoder: of the index.
        endpoint: the Hub's address.
        retry_failed: also retry failures that a retry is not expected to cure.
        only: mask of the table's rows to sample now; all by default.

    Raises:
        StoreError: the store refused for longer than ``store_retry_seconds``. A later run resumes.
        UsageError: a library is missing.
    """
    if (missing := missing_library()) is not None:
        raise UsageError(missing)
    generators = job.config.generators
    ledger = samples_of(job, encoder.digest)
    settings = {
        "encoder": encoder.digest,
        "samples": generators.samples,
        "max_samples": generators.max_samples,
        "steps": generators.steps,
        "prompts": generators.prompts,
        "seed": job.config.seed,
    }
    workers_of = partial(_workers, job, ledger, encoder, endpoint)
    return run_stage(job, GENERATOR, ledger, settings, table, endpoint, workers_of, retry_failed, only)


def reference_names(job: Job, encoder: Encoder) -> npt.NDArray[np.float32] | None:
    """Embeddings (n, d) of names by which generators are told that were sampled often enough; None where none is needed."""
    config = job.config
    if config.generators.max_samples <= config.generators.samples:
        return None
    names = background_names(config.background, min(config.background_count, _NAMES), config.seed)
    return name_vectors(encoder.embed_texts, config.prompts, names)


def _workers(
    job: Job, ledger: Ledger, encoder: Encoder, endpoint: str, coordinator: CoordinatorHandle
) -> Workers:
    # Imports torch: not where nothing is left to sample.
    from cluster.sampling.sampler import SamplerSpec, samplers

    config, generators = job.config, job.config.generators
    spec = SamplerSpec(
        store=job.store.uri,
        folder=ledger.folder,
        endpoint=endpoint_with_login(endpoint),
        max_bytes=generators.filters.max_bytes,
        max_params=generators.filters.max_params,
        settings=config,
        log_level=logs.current(),
        encoder=encoder.source,
        encoder_digest=encoder.digest,
        samples=generators.samples,
        max_samples=generators.max_samples,
        names=reference_names(job, encoder),
        steps=generators.steps,
        seed=config.seed,
        prompts=tuple(generators.prompts),
        max_image_size=generators.max_image_size,
    )
    return samplers(spec, coordinator)

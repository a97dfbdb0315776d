"""The whole way from a Hub to a published index: crawl, probe, complete, recover trees, publish."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from cluster.runtime.session import shared_session
from cluster.runtime.warm_up import preloaded_libraries
from pipelines.complete.record import CompletionRecord
from pipelines.complete.stage import complete
from pipelines.crawl.stage import Catalogue, crawl, each_listing, hub_endpoint, is_crawled
from pipelines.inspect.config_check import refuse_early
from pipelines.job.figures import recorded_as
from pipelines.job.job import Job
from pipelines.probe.plan import COLUMNS
from pipelines.probe.probe_set import ready_probes
from pipelines.probe.run import StageResult
from pipelines.probe.stage import probe
from pipelines.publish.release import LiveIndex, PublishResult, refuse_older_listing, say_if_held
from pipelines.publish.stage import ListingSnapshot, check_shown_probes, publish
from pipelines.quality.failures import FailureCounts
from pipelines.sample.stage import jobs_of, list_and_sample, list_generators, sampled_generators
from pipelines.trees.record import TreesRecord
from pipelines.trees.stage import recover_trees, tree_inputs, trees_of
from pipelines.trees.weights import listed_filters
from probelog.encoders.torch_encoder import deferred_encoder, found_encoder
from probelog.errors import UsageError
from probelog.probes.probe_set import find_probe_set
from probelog.storage.layout import INDEX, LedgerFolder
from probelog.storage.ledger import Counts, Ledger, Receipt
from probelog.storage.schemas import CatalogueRow


@dataclass(frozen=True)
class FullRun:
    """What a full run did."""

    catalogue: Catalogue
    probed: StageResult
    completed: CompletionRecord
    trees: TreesRecord | None
    published: PublishResult
    sampled: StageResult | None = None

    @property
    def failed_share(self) -> float:
        """Share of the classifiers that failed, or of the generators, whichever is larger."""
        return max(ran.failed_share for ran in (self.probed, self.sampled) if ran is not None)


@recorded_as("crawl")
def run_crawl(job: Job, refresh: bool = False) -> Catalogue:
    """The crawl stage alone, of generators too where the job wants them."""
    endpoint = hub_endpoint()
    _refuse_early(job, "crawl", refresh, [job, *_generators(job)])
    with job.figures.stage("crawl"):
        catalogue = crawl(job, endpoint, refresh)
        if job.config.generators.enabled:
            list_generators(job, endpoint, refresh)
        return catalogue


@recorded_as("probe")
def run_probe(job: Job, retry_failed: bool = False) -> StageResult:
    """The probe stage alone, over the catalogue that the crawl stage left."""
    _refuse_early(job, "probe")
    endpoint = hub_endpoint()
    catalogue = Catalogue.open(job, endpoint)
    encoder = found_encoder(job.config.encoder)
    probe_set = ready_probes(job, encoder)
    with job.figures.stage("probe"):
        return probe(job, catalogue.table(COLUMNS), probe_set, endpoint, retry_failed)


@recorded_as("sample")
def run_sample(job: Job, refresh: bool = False, retry_failed: bool = False) -> StageResult:
    """The sample stage alone: generators are listed where they were not, and sampled."""
    if not job.config.generators.enabled:
        raise UsageError("generators.enabled is false: set it to true, or add --set generators.enabled=true")
    _refuse_early(job, "sample", refresh, jobs_of(job))
    encoder = found_encoder(job.config.encoder)
    with job.figures.stage("sample"):
        return list_and_sample(job, hub_endpoint(), encoder, refresh, retry_failed)


@recorded_as("complete")
def run_complete(job: Job) -> CompletionRecord:
    """The complete stage alone, over what the probe stage left."""
    _refuse_early(job, "complete")
    _refuse_without_probes(job)
    encoder = found_encoder(job.config.encoder)
    probe_set = ready_probes(job, encoder)
    key = job.observations_key(probe_set.hash)
    receipts = Ledger(job.store, LedgerFolder.of(key).path).receipts(originals=False)
    _refuse_unprobed(receipts)
    with job.figures.stage("complete"):
        return complete(job, key, receipts, probe_set, encoder.digest)


@recorded_as("trees")
def run_trees(job: Job, refresh: bool = False, retry_failed: bool = False) -> TreesRecord:
    """The trees stage alone, over what the probe stage left and what is read without probing."""
    if not job.config.trees.enabled:
        raise UsageError("trees.enabled is false: set it to true, or add --set trees.enabled=true")
    unprobed = listed_filters(job.config)
    _refuse_early(job, "trees", refresh, each_listing(job, unprobed))
    endpoint = hub_endpoint()
    receipts: list[Receipt] = []
    rows: list[CatalogueRow] = []
    encoder = deferred_encoder(job.config.encoder)
    if is_crawled(job, endpoint) or not unprobed:
        if not unprobed and not job.config.generators.enabled:
            _refuse_without_probes(job)
        rows = Catalogue.open(job, endpoint).rows()
        probe_set = ready_probes(job, encoder)
        key = job.observations_key(probe_set.hash)
        receipts = Ledger(job.store, LedgerFolder.of(key).path).receipts(originals=False)
    if not unprobed and not job.config.generators.enabled:
        _refuse_unprobed(receipts)
    with job.figures.stage("trees"):
        sampled = sampled_generators(job, endpoint, encoder)
        return recover_trees(job, tree_inputs(job, receipts, rows, refresh, retry_failed, sampled))


@recorded_as("publish")
def run_publish(job: Job) -> PublishResult:
    """The publish stage alone; completes and recovers trees first where that was not done."""
    _refuse_early(job, "publish")
    endpoint = hub_endpoint()
    catalogue = Catalogue.open(job, endpoint)
    refuse_older_listing(catalogue.finished, LiveIndex.open(job.store.child(INDEX)))
    if not job.config.generators.enabled:
        _refuse_without_probes(job)
    encoder = found_encoder(job.config.encoder)
    probe_set = ready_probes(job, encoder)
    check_shown_probes(job.config, probe_set.count)
    key = job.observations_key(probe_set.hash)
    ledger = Ledger(job.store, LedgerFolder.of(key).path)
    receipts = ledger.receipts(originals=False)
    if not job.config.generators.enabled:
        _refuse_unprobed(receipts)
    with job.figures.stage("complete"):
        completed = complete(job, key, receipts, probe_set, encoder.digest)
    # Of all that was ever tried: which of it this catalogue lists, only the probe stage knows.
    counts = sum((receipt.counts for receipt in receipts), Counts())
    run = FailureCounts.of(counts.indexed, counts.failures)
    listed = ListingSnapshot.of(catalogue)
    with job.figures.stage("trees"):
        sampled = sampled_generators(job, endpoint, encoder)
        trees = trees_of(job, receipts, listed.rows, sampled=sampled)
    with job.figures.stage("publish"):
        return publish(
            job,
            listed,
            probe_set,
            encoder,
            key,
            receipts,
            completed,
            run,
            trees=trees,
            sampled=sampled,
        )


@recorded_as("full")
def run_full(job: Job, refresh: bool = False, retry_failed: bool = False) -> FullRun:
    """All stages in a row. Each is a no-op where its output is complete, so a killed run goes on where it was."""
    endpoint = hub_endpoint()
    unprobed = each_listing(job, listed_filters(job.config)) if job.config.trees.enabled else []
    _refuse_early(job, "full", refresh, [job, *_generators(job), *unprobed])
    if is_crawled(job, endpoint) and not refresh:
        refuse_older_listing(Catalogue.open(job, endpoint).finished, LiveIndex.open(job.store.child(INDEX)))
    say_if_held(job)
    stage = job.figures.stage
    with _meanwhile(job, endpoint, refresh):
        encoder = found_encoder(job.config.encoder)
        probe_set = ready_probes(job, encoder)
        check_shown_probes(job.config, probe_set.count)
        with stage("crawl"):
            catalogue = crawl(job, endpoint, refresh)
        table = catalogue.table(COLUMNS)
        if not table.num_rows and not job.config.generators.enabled:
            raise UsageError(
                f"{endpoint} lists no model that meets the filters; widen them, or set HF_ENDPOINT to the Hub "
                "you mean"
            )
        with shared_session():
            with stage("probe"):
                probed = probe(job, table, probe_set, endpoint, retry_failed)
            with stage("complete"):
                completed = complete(job, probed.key, probed.receipts, probe_set, encoder.digest)
            result = None
            if job.config.generators.enabled:
                with stage("sample"):
                    result = list_and_sample(job, endpoint, encoder, refresh, retry_failed)
    run = FailureCounts(probed.tried, probed.reasons)
    listed = ListingSnapshot.of(catalogue)
    with stage("trees"):
        sampled = sampled_generators(job, endpoint, encoder)
        trees = trees_of(job, probed.receipts, listed.rows, refresh, retry_failed, sampled)
    with stage("publish"):
        published = publish(
            job,
            listed,
            probe_set,
            encoder,
            probed.key,
            probed.receipts,
            completed,
            run,
            trees=trees,
            sampled=sampled,
        )
    return FullRun(catalogue, probed, completed, trees, published, result)


def _generators(job: Job) -> Iterable[Job]:
    return jobs_of(job) if job.config.generators.enabled else []


def _refuse_early(job: Job, command: str, refresh: bool = False, listings: Iterable[Job] = ()) -> None:
    """Refuse what the stage would find out late; the Hub is asked where one of its listings is to be made."""
    endpoint = hub_endpoint()
    try:
        listed = all(is_crawled(one, endpoint) and not refresh for one in listings)
    except UsageError:  # a list that cannot be read, which is refused by its key
        listed = True
    refuse_early(job.config, command, ask_hub=not listed)


def _refuse_without_probes(job: Job) -> None:
    """Refuse before a probe set is made that no model has seen."""
    config = job.config
    if find_probe_set(config.probes, config.probe_count, config.seed, job.store) is None:
        _refuse_unprobed([])


def _refuse_unprobed(receipts: Sequence[Receipt]) -> None:
    if not receipts:
        raise UsageError("nothing was probed with these settings yet: run `probelog-index probe` first")


def _meanwhile(job: Job, endpoint: str, refresh: bool) -> AbstractContextManager[None]:
    """What goes on beside all else. Where the Hub is listed already, perhaps no model is left to run."""
    if is_crawled(job, endpoint) and not refresh:
        return nullcontext()
    return preloaded_libraries(
        job.config.ray_address, job.config.scratch, job.config.preload, job.config.device
    )

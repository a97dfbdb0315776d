"""The trees stage: compare the weights of all models, family by family, and write which was made from which."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.runtime.scratch import process_folder, scratch_folder
from pipelines.config.model import Trees
from pipelines.crawl.stage import hub_endpoint
from pipelines.job.job import Job
from pipelines.publish.generators import SampledGenerators
from pipelines.trees.exact import exact_look
from pipelines.trees.families import family_tables
from pipelines.trees.inputs import TreeInputs
from pipelines.trees.record import (
    FamilyBatch,
    TreesRecord,
    read_batch,
    read_trees,
    write_batch,
    write_part,
    write_trees,
)
from pipelines.trees.weights import read_weights
from probelog.arrays import values_of
from probelog.errors import FailureReason
from probelog.storage.layout import TreesFolder
from probelog.storage.ledger import Receipt
from probelog.storage.parquet_parts import Part, read_part
from probelog.storage.schemas import EDGES, TREE_FACTS, TREE_MODELS, CatalogueRow
from probelog.storage.store import Store
from probelog.trees.edges import Edge, edge_table
from probelog.trees.families.family import Family
from probelog.trees.families.partition import Partition, partition
from probelog.trees.places import main_parents, places, without_cycles
from probelog.trees.recovery.neighbours import Look
from probelog.trees.recovery.recover import recover_family

# Models whose families share a batch: a kill loses at most the work on so many, or on one large family.
_BATCH_MODELS = 2000
_READERS = 8

_log = logging.getLogger(__name__)


def trees_of(
    job: Job,
    receipts: Sequence[Receipt],
    rows: Iterable[CatalogueRow],
    refresh: bool = False,
    retry_failed: bool = False,
    sampled: SampledGenerators | None = None,
) -> TreesRecord | None:
    """The trees of the models of some receipts, and of the generators; None where they are switched off."""
    if not job.config.trees.enabled:
        return None
    return recover_trees(job, tree_inputs(job, receipts, rows, refresh, retry_failed, sampled))


def tree_inputs(
    job: Job,
    receipts: Sequence[Receipt],
    rows: Iterable[CatalogueRow],
    refresh: bool = False,
    retry_failed: bool = False,
    sampled: SampledGenerators | None = None,
) -> TreeInputs:
    """The models of some receipts, those that the configuration lists to be read without probing, and the generators."""
    inputs = TreeInputs.of(job.store, receipts, rows)
    probed = {model.repo for model in inputs.models}
    weights = read_weights(job, hub_endpoint(), probed, refresh=refresh, retry_failed=retry_failed)
    return inputs.with_weights(weights).with_generators(sampled)


def recover_trees(job: Job, inputs: TreeInputs) -> TreesRecord:
    """Recover the trees of all models. A no-op where that was done before; a killed run goes on where it was."""
    settings, store = job.config.trees, job.store
    key = inputs.key(settings)
    folder = TreesFolder.of(key)
    done = read_trees(store, key)
    if done is not None:
        store.delete_folder(folder.batches)
        job.report.say(f"trees: {done.line()}; already complete")
        return done
    local = process_folder(scratch_folder(job.config.scratch) / "trees")
    try:
        job.report.line("trees: sorting models by architecture")
        parted = partition(inputs.batches, local, memory_mb=settings.memory_mb)
        with exact_look(settings, hub_endpoint(), inputs.listed) as look:
            batches = list(_compare_all(job, inputs, folder, parted, look))
    finally:
        shutil.rmtree(local, ignore_errors=True)
    done = _write(job, inputs, key, batches)
    job.report.say(f"trees: {done.line()}")
    return done


def _compare_all(
    job: Job, inputs: TreeInputs, folder: TreesFolder, parted: Partition, look: Look | None
) -> Iterator[FamilyBatch]:
    """All families, some at a time."""
    counter = job.report.counter("trees", sum(map(parted.models, parted.keys)), "models")
    for number, keys in enumerate(_grouped(parted)):
        name = f"{number:05}"
        batch = read_batch(job.store, folder.batch(name))
        if batch is None or batch.keys != keys:
            batch = _compare(job, inputs, folder, name, [parted.family(key) for key in keys], look)
        for key in keys:
            reason, _ = batch.failed.get(key, (None, ""))
            counter.add(parted.models(key), reason)
        yield batch
    counter.show(final=True)


def _grouped(parted: Partition) -> Iterator[list[str]]:
    group: list[str] = []
    models = 0
    for key in parted.keys:
        group.append(key)
        models += parted.models(key)
        if models >= _BATCH_MODELS:
            yield group
            group, models = [], 0
    if group:
        yield group


def _compare(
    job: Job,
    inputs: TreeInputs,
    folder: TreesFolder,
    name: str,
    families: Sequence[Family],
    look: Look | None,
) -> FamilyBatch:
    """Compare the models of some families."""
    found = FamilyEdges()
    for family in families:
        facts = inputs.facts(family.repos)
        with found.of(family):
            found.edges += published(
                recover_family(family, facts, look=look, **method_settings(job.config.trees)), inputs.current
            )
    return found.write(job.store, folder, name, families, inputs)


def method_settings(settings: Trees) -> dict[str, Any]:
    """What a configuration says to the method."""
    return settings.model_dump(include={"least_probability", "times", "declared", "memory_mb"})


@dataclass
class FamilyEdges:
    """The edges of some families, and the families that failed."""

    edges: list[Edge] = field(default_factory=list)
    failed: dict[str, list[str]] = field(default_factory=dict)

    @contextlib.contextmanager
    def of(self, family: Family) -> Iterator[None]:
        """Note an error of one family."""
        try:
            yield
        except Exception as error:  # reason: what one family holds must not cost the others their trees
            reason = FailureReason.OUT_OF_MEMORY if isinstance(error, MemoryError) else FailureReason.INTERNAL
            _log.exception("family %s of %s models failed", family.key, len(family.repos))
            self.failed[family.key] = [reason.value, f"{type(error).__name__}: {error}"[:300]]

    def write(
        self,
        store: Store,
        folder: TreesFolder,
        name: str,
        families: Sequence[Family],
        inputs: TreeInputs,
        others: Iterable[str] = (),
    ) -> FamilyBatch:
        """Write the batch; last, that it is done. ``others`` are models that could not be compared."""
        compared = {
            repo: family.key for family in families if family.key not in self.failed for repo in family.repos
        }
        models = [
            {"repo": repo, "sha": inputs.newest[repo].sha, "family": compared.get(repo)}
            for repo in sorted({*compared, *others})
        ]
        batch = FamilyBatch(
            name=name,
            keys=[family.key for family in families],
            families=[
                write_part(store, folder.families(f"{name}-{number:03}"), table)
                for number, table in enumerate(family_tables(families, inputs.facts, _BATCH_MODELS))
            ],
            models=write_part(store, folder.family_models(name), pa.Table.from_pylist(models, TREE_MODELS)),
            edges=write_part(store, folder.family_edges(name), edge_table(self.edges)),
            failed=self.failed,
        )
        write_batch(store, folder.batch(name), batch)
        return batch


def published(edges: Iterable[Edge], current: Container[str]) -> list[Edge]:
    """Edges whose children are in the index; parents that are not are latent. No model is its own ancestor."""
    return without_cycles(
        replace(edge, latent=edge.parent not in current) for edge in edges if edge.child in current
    )


def _write(job: Job, inputs: TreeInputs, key: str, batches: Sequence[FamilyBatch]) -> TreesRecord:
    """Join the batches; the receipt last."""
    store, folder = job.store, TreesFolder.of(key)
    job.report.line("trees: writing edges")
    edges = pa.concat_tables(
        [joined(store, [batch.edges for batch in batches], EDGES), edge_table(inputs.base_edges)]
    )
    edges = edges.sort_by([("child", "ascending"), ("parent", "ascending")])
    adapters = [{"repo": model.repo, "sha": model.sha} for model in inputs.adapters]
    models = joined(store, [batch.models for batch in batches], TREE_MODELS)
    models = models.filter(pc.is_in(models["repo"], pa.array(sorted(inputs.current), pa.string())))
    models = pa.concat_tables([models, pa.Table.from_pylist(adapters, TREE_MODELS)]).sort_by("repo")
    done = TreesRecord(
        key=key,
        models=write_part(store, folder.models, with_places(models, edges)),
        edges=write_part(store, folder.edges, edges),
        batches=batches,
        families=sum(len(batch.keys) for batch in batches),
        failed=dict(Counter(reason for batch in batches for reason, _ in batch.failed.values())),
    )
    write_trees(store, done)
    store.delete_folder(folder.batches)
    return done


def joined(store: Store, parts: Sequence[Part], schema: pa.Schema) -> pa.Table:
    """The rows of some parts."""
    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(pool.map(lambda part: read_part(store, part, schema), parts))
    return pa.concat_tables([schema.empty_table(), *tables])


def with_places(models: pa.Table, edges: pa.Table) -> pa.Table:
    """Models (``TREE_MODELS``) with their places in trees of these edges."""
    repos = values_of(models["repo"], str)
    found = places(repos, main_parents(edges))
    for name in TREE_FACTS:
        position = TREE_MODELS.get_field_index(name)
        values = pa.array([getattr(found[repo], name) for repo in repos], TREE_MODELS.field(name).type)
        models = models.set_column(position, TREE_MODELS.field(name), values)
    return models

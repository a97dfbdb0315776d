"""Trees of nightly runs: models that were added are attached to their families, removed ones become latent ancestors.

    trees/KEY-GENERATION/    the models that nightly runs have attached to the trees of that whole generation

A run compares an added model with its own family alone, and each only once. The edges of the base stay as they are: a
model that turns out to be the parent of older ones becomes it when the index is next built as a whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.runtime.scratch import process_folder, scratch_folder
from pipelines.job.job import Job
from pipelines.publish.generators import places_in
from pipelines.trees.families import FAMILIES, family_from
from pipelines.trees.inputs import TreeInputs, TreeModel
from pipelines.trees.record import FamilyBatch, TreesRecord, read_batch, read_trees
from pipelines.trees.stage import FamilyEdges, joined, method_settings
from probelog.errors import StoreError
from probelog.index.generation import Generation
from probelog.search.trees import edges_with, follow
from probelog.storage.layout import TreesFolder
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import EDGES, TREE_FACTS, TREE_MODELS, TreeFacts
from probelog.trees.edges import Edge, edge_table, edges_of
from probelog.trees.families.family import Family, ModelFacts
from probelog.trees.families.partition import partition
from probelog.trees.places import main_parents, places, without_cycles
from probelog.trees.recovery.attach import Attachment
from probelog.trees.recovery.recover import recover_family

AnyTreeModel = TypeVar("AnyTreeModel", bound=TreeModel)


@dataclass(frozen=True)
class UpdateTrees:
    """The trees of an update.

    Attributes:
        edges: of the added models, and of those of the base whose parents were removed (``EDGES``).
        places: of the children of these edges, and of the other added models that were compared, by repository.
    """

    edges: pa.Table
    places: Mapping[str, TreeFacts]


def attach_changes(
    job: Job, base: Generation, inputs: TreeInputs, removed: Iterable[str]
) -> UpdateTrees | None:
    """Attach the added models to the trees of the base; None where it has none, or they are switched off.

    Args:
        job: configuration and store.
        base: the whole generation that is updated.
        inputs: the models that nightly runs have added since.
        removed: repositories whose models or generators of the base are no longer valid.

    Raises:
        StoreError: the trees of the base are missing in the store.
    """
    key = base.settings.trees
    if key is None or not job.config.trees.enabled:
        return None
    record = read_trees(job.store, key)
    if record is None:
        raise StoreError(
            f"{job.store.path(TreesFolder.of(key).path)}, which the live index was made from, is missing: run "
            "`probelog-index full`"
        )
    attached = _Attached(job, record, TreesFolder.of(f"{key}-{base.pointer.generation}"))
    fresh = attached.missing(inputs)
    if fresh.newest:
        job.report.line(f"trees: attaching {len(fresh.newest):,} models")
        attached.attach(fresh)
    return _update(base, attached, inputs, set(removed))


class _Attached:
    """What nightly runs have attached since the base, in batches: one for each run that added models.

    Attributes:
        models: of each model that was attached the commit, the family (None: it cannot be compared) and the batch.
    """

    def __init__(self, job: Job, base: TreesRecord, folder: TreesFolder) -> None:
        self._job, self._base, self._folder = job, base, folder
        self.models: dict[str, tuple[str, str | None, str]] = {}
        self._batches: list[FamilyBatch] = []
        for name in sorted(job.store.names(folder.batches, suffix=".json")):
            batch = read_batch(job.store, name)
            if batch is not None:
                self._add(batch)

    def _add(self, batch: FamilyBatch) -> None:
        self._batches.append(batch)
        table = read_part(self._job.store, batch.models, TREE_MODELS)
        columns = [table[name].to_pylist() for name in ("repo", "sha", "family")]
        for repo, sha, family in zip(*columns, strict=True):
            self.models[repo] = (sha, family, batch.name)

    def missing(self, inputs: TreeInputs) -> TreeInputs:
        """The models that were not attached yet."""

        def fresh(models: Sequence[AnyTreeModel]) -> list[AnyTreeModel]:
            return [
                model
                for model in models
                if model.repo in inputs.current
                and model is inputs.newest[model.repo]
                and self.models.get(model.repo, ("",))[0] != model.sha
            ]

        further = [(receipts, fresh(models)) for receipts, models in inputs.further]
        return replace(inputs, models=fresh(inputs.models), further=further)

    def attach(self, added: TreeInputs) -> None:
        """Attach models to their families, and keep both."""
        job = self._job
        local = process_folder(scratch_folder(job.config.scratch) / "trees")
        found = FamilyEdges()
        families = []
        try:
            for newcomers in self._families(added, local):
                families.append(newcomers)
                with found.of(newcomers):
                    found.edges += self._edges(newcomers, added)
            name = f"{len(self._batches):05}"
            self._add(found.write(job.store, self._folder, name, families, added, added.newest))
        finally:
            shutil.rmtree(local, ignore_errors=True)

    def _families(self, added: TreeInputs, local: Path) -> Iterator[Family]:
        """The added models by family; copies of models of the base have the weights that are kept of these."""
        parted = partition(added.batches, local, memory_mb=self._job.config.trees.memory_mb)
        others = set(added.newest)
        for key in parted.keys:
            family = parted.family(key)
            others.difference_update(family.repos)
            yield family
        originals = {
            repo: (model.copy_of_repo, model.copy_of_sha)
            for repo in others
            if (model := added.newest[repo]).copy_of_repo is not None
        }
        if not originals:
            return
        table = read_part(self._job.store, self._base.models, TREE_MODELS)
        table = table.filter(pc.is_in(table["repo"], pa.array([repo for repo, _ in originals.values()])))
        families = {
            (row["repo"], row["sha"]): row["family"]
            for row in table.select(["repo", "sha", "family"]).to_pylist()
        }
        for copy, original in sorted(originals.items()):
            held = self._family(families[original]) if original in families else None
            if held is not None:
                place = list(held[0].repos).index(original[0])
                yield replace(held[0].take(np.array([place])), repos=(copy,))

    def _family(self, key: str, without: Collection[str] = ()) -> tuple[Family, dict[str, ModelFacts]] | None:
        """What is kept of a family but for some models, and the facts of the others."""
        parts = [part for batch in self._with(key) for part in batch.families]
        return (
            family_from([read_part(self._job.store, part, FAMILIES) for part in parts], key, without)
            if parts
            else None
        )

    def _with(self, key: str) -> list[FamilyBatch]:
        return [batch for batch in (*self._base.batches, *self._batches) if key in batch.keys]

    def _edges(self, newcomers: Family, added: TreeInputs) -> list[Edge]:
        """Edges of the newcomers of one family."""
        settings = method_settings(self._job.config.trees)
        facts = added.facts(newcomers.repos)
        new = set(newcomers.repos)
        held = self._family(newcomers.key, new)
        if held is None:
            return recover_family(newcomers, facts, **settings)
        family, known = held
        members = set(family.repos)
        parts = [batch.edges for batch in self._with(newcomers.key)]
        between = [edge for edge in edges_of(joined(self._job.store, parts, EDGES)) if edge.child in members]
        return Attachment(family, between, known | facts, **settings).attach(newcomers)

    def edges(self, inputs: TreeInputs) -> Iterator[Edge]:
        """The edges of the models that are still there."""
        for batch in self._batches:
            for edge in edges_of(read_part(self._job.store, batch.edges, EDGES)):
                sha, _, name = self.models[edge.child]
                if (
                    name == batch.name
                    and edge.child in inputs.current
                    and inputs.newest[edge.child].sha == sha
                ):
                    yield edge

    def compared(self, inputs: TreeInputs) -> set[str]:
        """The models that are still there and were compared."""
        return {
            repo
            for repo, (_, family, _) in self.models.items()
            if repo in inputs.current and family is not None
        }


def _update(base: Generation, attached: _Attached, inputs: TreeInputs, removed: set[str]) -> UpdateTrees:
    """The edges and places of an update."""
    adapters = {model.repo for model in inputs.adapters}
    gone = {repo for repo in removed if repo not in inputs.current | adapters}
    orphans = _orphans(base, gone, removed)
    edges = [*attached.edges(inputs), *inputs.base_edges, *orphans]
    concerned = {*(edge.parent for edge in edges), *(edge.child for edge in orphans)}
    in_base = {repo: place for repo, place in places_in(base).items() if repo in concerned}
    for row in base.models_named("repo", concerned, ["repo", *TREE_FACTS]):
        in_base[row["repo"]] = TreeFacts(**{name: row[name] for name in TREE_FACTS})
    there = (in_base.keys() - removed) | inputs.current
    edges = [replace(edge, latent=edge.parent not in there) for edge in edges]
    # A model of the base that is at another commit now may be an ancestor of its own new parents.
    again = removed & inputs.current
    known = _ancestry(base, {edge.parent for edge in edges if edge.child in again})
    edges = without_cycles(edges, known)
    table = edge_table(edges)
    compared = attached.compared(inputs) | adapters
    placed = {
        repo: place for repo, place in in_base.items() if repo not in compared and place.root is not None
    }
    children = {edge.child for edge in orphans}
    found = places(
        sorted(compared), {child: p for child, p in main_parents(table).items() if child in compared}, placed
    )
    return UpdateTrees(table, found | {repo: place for repo, place in in_base.items() if repo in children})


def _orphans(base: Generation, gone: Iterable[str], invalid: set[str]) -> list[Edge]:
    """All edges of the base's models with a parent that was removed."""
    below = {edge.child for edge in edges_with(base, "parent", sorted(gone))} - invalid
    return edges_with(base, "child", sorted(below))


def _ancestry(base: Generation, models: set[str]) -> dict[str, list[str]]:
    """The parents of some models of the base, their parents, and so on, by child."""
    parents: dict[str, list[str]] = {}
    for edge in follow(base, "child", models)[0]:
        parents.setdefault(edge.child, []).append(edge.parent)
    return parents

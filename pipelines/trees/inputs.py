"""What the trees are recovered from: weights of the newest commit of every model, and facts beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pyarrow as pa

from pipelines.config.model import Trees
from pipelines.trees.record import TREES_VERSION
from pipelines.trees.weights import TreeWeights
from probelog.arrays import values_of
from probelog.hub.model_info import add_configured_parent
from probelog.storage.encoding import short_key
from probelog.storage.ledger import Ledger, Receipt
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import WEIGHTS, CatalogueRow, ProbedModel
from probelog.storage.store import Store
from probelog.trees.families.family import ModelFacts

_Version = tuple[str, str]


@dataclass(frozen=True)
class TreeInputs:
    """The models whose weights are compared.

    Attributes:
        store: that holds the ledgers.
        receipts: of the ledger of observations.
        models: of these receipts.
        rows: rows of the catalogue, by repository and commit. Repositories that have none there were removed: others
            may have been made from them.
        further: receipts of the ledger of weights that were read without probing (`pipelines.trees.weights`).
        further_models: of these, without repositories that were probed.
    """

    store: Store
    receipts: Sequence[Receipt]
    models: Sequence[ProbedModel]
    rows: Mapping[_Version, CatalogueRow]
    further: Sequence[Receipt] = ()
    further_models: Sequence[ProbedModel] = ()

    @classmethod
    def of(cls, store: Store, receipts: Sequence[Receipt], rows: Iterable[CatalogueRow]) -> TreeInputs:
        """Those of some receipts."""
        with_models, models = _models(store, receipts)
        return cls(store, with_models, models, {(row.repo, row.sha): row for row in rows})

    def with_weights(self, weights: TreeWeights) -> TreeInputs:
        """Also what was read without probing."""
        further, models = _models(self.store, weights.receipts)
        probed = {model.repo for model in self.models}
        models = [model for model in models if model.repo not in probed]
        rows = {**weights.rows, **self.rows}
        return replace(self, rows=rows, further=further, further_models=models)

    @cached_property
    def newest(self) -> dict[str, ProbedModel]:
        """Every repository's model at the commit that the catalogue lists, or at one that was there once."""
        newest: dict[str, ProbedModel] = {}
        for model in (*self.models, *self.further_models):
            held = newest.get(model.repo)
            if held is None or (held.repo, held.sha) not in self.rows:
                newest[model.repo] = model
        return newest

    @cached_property
    def current(self) -> set[str]:
        """Repositories whose newest commit was probed; the others are latent ancestors at most."""
        return {repo for repo, model in self.newest.items() if (repo, model.sha) in self.rows}

    @cached_property
    def listed(self) -> dict[str, CatalogueRow]:
        """The rows of the catalogue of these, by repository."""
        return {repo: self.rows[repo, self.newest[repo].sha] for repo in self.current}

    def key(self, settings: Trees) -> str:
        """Key of all that the edges depend on."""
        facts = [self._facts(model) for _, model in sorted(self.newest.items())]
        return short_key(
            "trees",
            TREES_VERSION,
            settings.least_probability,
            settings.times,
            settings.declared,
            settings.exact_bytes,
            *sorted(receipt.name for receipt in (*self.receipts, *self.further)),
            "current",
            *sorted(f"{repo}@{self.newest[repo].sha}" for repo in self.current),
            *(item.uploaded if settings.times else None for item in facts),
            # Declared parents are in the edges, whether they are evidence or not.
            *(item.declared for item in facts),
        )

    def facts(self, repos: Iterable[str]) -> dict[str, ModelFacts]:
        """What is known of some models beside their weights."""
        return {repo: self._facts(self.newest[repo]) for repo in repos}

    def _facts(self, model: ProbedModel) -> ModelFacts:
        row = self.rows.get((model.repo, model.sha))
        listed, created = ([], None) if row is None else (row.parents, row.created_at)
        declared = add_configured_parent(model.repo, listed, model.name_or_path)
        return ModelFacts(
            None if created is None else created.timestamp(),
            tuple(dict.fromkeys(parent.repo for parent in declared)),
        )

    def batches(self, columns: list[str]) -> Iterator[pa.Table]:
        """Columns of the weights of all models, part by part; those of copies are their original's."""
        probed = {model.repo for model in self.models}
        needed = list(dict.fromkeys(["repo", "sha", *columns]))
        for receipts, of_ledger in ((self.receipts, True), (self.further, False)):
            names: dict[_Version, list[str]] = {}
            for repo, model in self.newest.items():
                if (repo in probed) == of_ledger:
                    original = (model.copy_of_repo or repo, model.copy_of_sha or model.sha)
                    names.setdefault(original, []).append(repo)
            for receipt in receipts:
                table = read_part(self.store, receipt.weights, WEIGHTS, needed)
                slices = [
                    _renamed(rows, name)
                    for version, rows in _by_model(table)
                    for name in names.get(version, ())
                ]
                if slices:
                    yield pa.concat_tables(slices).select(columns)


def _models(store: Store, receipts: Sequence[Receipt]) -> tuple[list[Receipt], list[ProbedModel]]:
    with_models = sorted((receipt for receipt in receipts if receipt.models.rows), key=lambda r: r.name)
    return with_models, Ledger(store, "").models(with_models)


def _renamed(rows: pa.Table, repo: str) -> pa.Table:
    return rows.set_column(
        rows.schema.get_field_index("repo"), "repo", pa.array([repo] * rows.num_rows, pa.string())
    )


def _by_model(table: pa.Table) -> Iterator[tuple[_Version, pa.Table]]:
    """The rows of each model of a part, which follow each other."""
    versions = list(zip(values_of(table["repo"], str), values_of(table["sha"], str), strict=True))
    start = 0
    for place in range(1, len(versions) + 1):
        if place == len(versions) or versions[place] != versions[start]:
            yield versions[start], table.slice(start, place - start)
            start = place

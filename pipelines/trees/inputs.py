"""What the trees are recovered from: weights of the newest commit of every model, and facts beside them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pyarrow as pa

from pipelines.config.model import Trees
from pipelines.publish.generators import SampledGenerators
from pipelines.trees.record import TREES_VERSION
from pipelines.trees.weights import TreeWeights
from probelog.arrays import values_of
from probelog.hub.model_info import add_configured_parent
from probelog.storage.encoding import short_key
from probelog.storage.ledger import Ledger, Receipt, item_key
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import WEIGHTS, CatalogueRow, ProbedModel, SampledModel
from probelog.storage.store import Store
from probelog.trees.edges import Edge, Relation
from probelog.trees.families.family import ModelFacts

_Version = tuple[str, str]
TreeModel = ProbedModel | SampledModel
#: Evidence of an adapter's base: its samples are this base's, changed by it.
RUN_ON_IT = "was run on it"


@dataclass(frozen=True)
class TreeInputs:
    """The models whose weights are compared.

    Attributes:
        store: that holds the ledgers.
        receipts: of the ledger of observations.
        models: of these receipts.
        rows: rows of the catalogue, by repository and commit. Repositories that have none there were removed: others
            may have been made from them.
        further: receipts of other ledgers, each with its models, without repositories of those before: of weights that were
            read without probing (`pipelines.trees.weights`), and of generators but for adapters.
        adapters: listed ones. Their weights are no network's; what they come from is the base that they were run on.
    """

    store: Store
    receipts: Sequence[Receipt]
    models: Sequence[ProbedModel]
    rows: Mapping[_Version, CatalogueRow]
    further: Sequence[tuple[Sequence[Receipt], Sequence[TreeModel]]] = ()
    adapters: Sequence[SampledModel] = ()

    @classmethod
    def of(cls, store: Store, receipts: Sequence[Receipt], rows: Iterable[CatalogueRow]) -> TreeInputs:
        """Those of some receipts."""
        with_models, models = _models(store, receipts)
        return cls(store, with_models, models, {(row.repo, row.sha): row for row in rows})

    def with_weights(self, weights: TreeWeights) -> TreeInputs:
        """Also what was read without probing."""
        return self._with(*_models(self.store, weights.receipts), weights.rows)

    def with_generators(
        self, sampled: SampledGenerators | None, without: Container[_Version] = frozenset()
    ) -> TreeInputs:
        """Also the generators, ``without`` some of them."""
        if sampled is None:
            return self
        every = [model for model in sampled.every if (model.repo, model.sha) not in without]
        items = {item_key(model.repo, model.sha) for model in every}
        receipts = sorted(
            (r for r in sampled.receipts if r.models.rows and not items.isdisjoint(r.items)),
            key=lambda r: r.name,
        )
        plain = [model for model in every if model.base_repo is None]
        known = {model.repo for model in self._every}
        adapters = [
            model
            for model in every
            if model.base_repo not in (None, model.repo)
            and model.repo not in known
            and (model.repo, model.sha) in sampled.rows
        ]
        return replace(self._with(receipts, plain, sampled.rows), adapters=adapters)

    def _with(
        self, receipts: Sequence[Receipt], models: Sequence[TreeModel], rows: Mapping[_Version, CatalogueRow]
    ) -> TreeInputs:
        known = {model.repo for model in self._every}
        added = [model for model in models if model.repo not in known]
        return replace(self, rows={**rows, **self.rows}, further=[*self.further, (receipts, added)])

    @property
    def _every(self) -> list[TreeModel]:
        return [*self.models, *(model for _, models in self.further for model in models)]

    @cached_property
    def newest(self) -> dict[str, TreeModel]:
        """Every repository's model at the commit that the catalogue lists, or at one that was there once."""
        newest: dict[str, TreeModel] = {}
        for model in self._every:
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
            *sorted(
                receipt.name
                for receipt in (*self.receipts, *(item for receipts, _ in self.further for item in receipts))
            ),
            "current",
            *sorted(f"{repo}@{self.newest[repo].sha}" for repo in self.current),
            *(item.uploaded if settings.times else None for item in facts),
            # Declared parents are in the edges, whether they are evidence or not.
            *(item.declared for item in facts),
            *(f"{item.repo}@{item.sha} on {item.base_repo}" for item in self.adapters),
        )

    @property
    def base_edges(self) -> list[Edge]:
        """From each adapter to its base."""
        return [
            Edge(
                model.repo,
                model.base_repo,
                Relation.LOW_RANK,
                1.0,
                declared=True,
                evidence={RUN_ON_IT: 1.0},
                latent=model.base_repo not in self.current,
            )
            for model in self.adapters
            if model.base_repo is not None
        ]

    def facts(self, repos: Iterable[str]) -> dict[str, ModelFacts]:
        """What is known of some models beside their weights."""
        return {repo: self._facts(self.newest[repo]) for repo in repos}

    def _facts(self, model: TreeModel) -> ModelFacts:
        row = self.rows.get((model.repo, model.sha))
        listed, created = ([], None) if row is None else (row.parents, row.created_at)
        named = model.name_or_path if isinstance(model, ProbedModel) else None
        declared = add_configured_parent(model.repo, listed, named)
        return ModelFacts(
            None if created is None else created.timestamp(),
            tuple(dict.fromkeys(parent.repo for parent in declared)),
        )

    def batches(self, columns: list[str]) -> Iterator[pa.Table]:
        """Columns of the weights of all models, part by part; those of copies are their original's."""
        needed = list(dict.fromkeys(["repo", "sha", *columns]))
        for receipts, models in ((self.receipts, self.models), *self.further):
            names: dict[_Version, list[str]] = {}
            for repo in dict.fromkeys(model.repo for model in models):
                model = self.newest[repo]
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

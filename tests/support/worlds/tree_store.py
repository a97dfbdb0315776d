"""A store with ledgers of models whose weights are known: which was made from which is known, too."""

from __future__ import annotations

import datetime as dt
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.config.model import Config
from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.trees.inputs import TreeInputs
from pipelines.trees.stage import recover_trees
from probelog.storage.layout import LedgerFolder
from probelog.storage.ledger import ItemResult, Ledger, Receipt, item_key
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import EDGES, OBSERVATIONS, CatalogueRow
from probelog.storage.store import Store
from tests.benchmarks.trees_world import Node, weights_table
from tests.support.worlds.probed_models import probed_model

Tensors = dict[str, np.ndarray[Any, Any]]
START = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)


def network(seed: int, width: int = 24) -> Tensors:
    """Twelve layers of random weights."""
    random = np.random.default_rng(seed)
    layers = {f"blocks.{n}.weight": random.standard_normal((width, width)) for n in range(12)}
    return layers | {"head.weight": random.standard_normal((10, width))}


def tuned(tensors: Tensors, seed: int, size: float = 0.1) -> Tensors:
    """The same after a training."""
    random = np.random.default_rng(seed)
    return {name: x + size * random.standard_normal(x.shape) for name, x in tensors.items()}


class TreeStore:
    """A store with a ledger of models, each in a batch of its own, and a catalogue that lists them by age."""

    def __init__(self, root: Path, ledger: str = "k", start: dt.datetime = START) -> None:
        self._root, self._start = root, start
        self.store = Store(root / "store")
        self._scratch = root / "scratch"
        self.ledger = Ledger(self.store, LedgerFolder.of(ledger).path)
        self.rows: dict[str, CatalogueRow] = {}
        self.told = io.StringIO()

    def add(self, repo: str, tensors: Tensors | None, copy_of: str | None = None, **facts: Any) -> None:
        """Probe one more model; a copy has no weights of its own in the ledger."""
        sha = facts.pop("sha", "a" * 40)
        model = probed_model(repo, sha=sha, logits=0, labels=[], probes=[])
        if copy_of is not None:
            model = replace(model, copy_of_repo=copy_of, copy_of_sha=self.rows[copy_of].sha)
        weights = None
        if tensors is not None:
            weights = weights_table([Node(repo, tensors, dtype="float32")])
            place = weights.schema.get_field_index("sha")
            weights = weights.set_column(place, "sha", [[sha] * weights.num_rows])
        item = item_key(repo, sha)
        self.ledger.spool(item, ItemResult.success(model, OBSERVATIONS.empty_table(), weights))
        self.ledger.seal([item])
        created = self._start + dt.timedelta(days=len(self.rows))
        self.rows[repo] = CatalogueRow(repo=repo, sha=sha, **({"created_at": created} | facts))

    def beside(self, ledger: str) -> TreeStore:
        """Another ledger in the same store, of later models."""
        return TreeStore(self._root, ledger, self._start + dt.timedelta(days=365))

    @property
    def receipts(self) -> list[Receipt]:
        return self.ledger.receipts()

    def job(self, **trees: Any) -> Job:
        config = Config.model_validate(
            {"store": self.store.uri, "probes": "unused", "scratch": str(self._scratch), "trees": trees}
        )
        return Job.of(config, Report(self.told))

    def inputs(self) -> TreeInputs:
        return TreeInputs.of(self.store, self.receipts, self.rows.values())

    def recover(self, **trees: Any) -> dict[tuple[str, str], dict[str, Any]]:
        """Run the stage; its edges by child and parent."""
        self.done = recover_trees(self.job(**trees), self.inputs())
        table = read_part(self.store, self.done.edges, EDGES)
        return {(row["child"], row["parent"]): row for row in table.to_pylist()}

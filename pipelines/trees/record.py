"""What the trees stage left in the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from probelog.errors import StoreError
from probelog.storage.encoding import digest, parquet_bytes
from probelog.storage.layout import TreesFolder
from probelog.storage.parquet_parts import Part, read_part
from probelog.storage.schemas import TREE_FACTS, TREE_MODELS, TreeFacts
from probelog.storage.store import Store
from probelog.storage.versions import MADE_BY, check_version

#: Of the receipt; and, as part of every key, of the method: to be raised where its edges change.
TREES_VERSION = 1


@dataclass(frozen=True)
class FamilyBatch:
    """Some families that were compared together.

    Attributes:
        name: of the batch.
        keys: of the families (`probelog.trees.families.family.Family.key`).
        families: what later models are compared with (`probelog.trees.families.family.Family.table`).
        models: their models (``TREE_MODELS``, without places).
        edges: between these.
        failed: families without edges because of an error: the reason (`FailureReason`) and the message.
    """

    name: str
    keys: list[str]
    families: list[Part]
    models: Part
    edges: Part
    failed: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> FamilyBatch:
        """From plain values."""
        parts = {name: Part(**content[name]) for name in ("models", "edges")}
        return cls(**{**content, **parts, "families": [Part(**part) for part in content["families"]]})


@dataclass(frozen=True)
class TreesRecord:
    """The finished stage.

    Attributes:
        key: of all that the edges depend on.
        models: whose weights were compared (``TREE_MODELS``).
        edges: between them (``EDGES``).
        batches: of their families.
        families: number of families.
        failed: number of families without edges because of an error, by reason.
    """

    key: str
    models: Part
    edges: Part
    batches: Sequence[FamilyBatch]
    families: int
    failed: dict[str, int]

    def line(self) -> str:
        """What was found, in one line."""
        failed = "".join(f", {count:,} families failed ({reason})" for reason, count in self.failed.items())
        return f"{self.edges.rows:,} edges between {self.models.rows:,} models of {self.families:,} families{failed}"


def read_trees(store: Store, key: str) -> TreesRecord | None:
    """A finished stage of a store; None where it is not there.

    Raises:
        SchemaVersionError, StoreError: written by a newer ProbeLog, or damaged.
    """
    path = TreesFolder.of(key).receipt
    content = store.read_json_or_none(path)
    if content is None:
        return None
    check_version(content, TREES_VERSION, store.path(path), "recovery of model trees")
    try:
        return TreesRecord(
            key=key,
            models=Part(**content["models"]),
            edges=Part(**content["edges"]),
            batches=[FamilyBatch.from_dict(batch) for batch in content["batches"]],
            families=int(content["families"]),
            failed=dict(content["failed"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{store.path(path)} is damaged: {error!r}") from error


def write_trees(store: Store, done: TreesRecord) -> None:
    """The receipt of a finished stage."""
    facts = {name: value for name, value in asdict(done).items() if name != "key"}
    store.write_json(
        TreesFolder.of(done.key).receipt, {**facts, "version": TREES_VERSION, "made_by": MADE_BY}
    )


def read_batch(store: Store, path: str) -> FamilyBatch | None:
    """A batch that is done, by the path of what says so; None where it is not.

    Raises:
        SchemaVersionError, StoreError: written by a newer ProbeLog, or damaged.
    """
    content = store.read_json_or_none(path)
    if content is None:
        return None
    check_version(content, TREES_VERSION, store.path(path), "recovery of model trees")
    try:
        return FamilyBatch.from_dict(content["batches"][0])
    except (KeyError, TypeError, IndexError) as error:
        raise StoreError(f"{store.path(path)} is damaged: {error!r}") from error


def write_batch(store: Store, path: str, batch: FamilyBatch) -> None:
    """Say that a batch is done."""
    store.write_json(path, {"batches": [asdict(batch)], "version": TREES_VERSION, "made_by": MADE_BY})


def write_part(store: Store, path: str, table: pa.Table) -> Part:
    """A table as a file of the stage."""
    data = parquet_bytes(table)
    store.write(path, data)
    return Part(path, table.num_rows, len(data), digest(data))


def read_places(store: Store, trees: TreesRecord) -> dict[str, TreeFacts]:
    """The place of every model in its tree, by repository."""
    table = read_part(store, trees.models, TREE_MODELS)
    columns = [table[name].to_pylist() for name in ("repo", *TREE_FACTS)]
    return {
        repo: TreeFacts(root=root, parent=parent, depth=depth)
        for repo, root, parent, depth in zip(*columns, strict=True)
    }

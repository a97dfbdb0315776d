"""Descriptors of all models of a ledger, a part for each receipt, written by tasks on Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import ray

from cluster.runtime.node import own_nodes, own_resources
from probelog import logs
from probelog.completion.als import Float32
from probelog.completion.descriptors import describe
from probelog.ranking.matched_heads import HeadSpace
from probelog.storage.encoding import digest
from probelog.storage.layout import CompletionFolder
from probelog.storage.ledger import Receipt, observed_models
from probelog.storage.parquet_parts import Part, part_bytes
from probelog.storage.schemas import DESCRIPTORS
from probelog.storage.store import Store

# Parts that are described at a time, for each CPU: one is under way while the next one is handed out.
_PARTS_IN_FLIGHT = 2


@ray.remote(num_cpus=1, max_retries=-1)
def _describe(
    store_uri: str,
    receipt: Receipt,
    columns: Float32,
    embeddings: Float32,
    regularisation: float,
    top_r: int,
    folder: str,
    log_level: str,
) -> Part:
    """Write the descriptors of one part. Nothing is lost with the worker: Ray runs it again elsewhere."""
    logs.configure(log_level)
    store = Store(store_uri)
    # Directions of models do not depend on the background.
    space = HeadSpace(embeddings, embeddings[:0])
    tables = describe(observed_models(store, receipt), columns, space, regularisation, top_r)
    data = part_bytes(tables, DESCRIPTORS)
    path = CompletionFolder(folder).descriptors(receipt.name)
    store.write(path, data)
    part = Part(path, sum(table.num_rows for table in tables), len(data), digest(data))
    # Says that the part is described, until the stage's receipt says so of all.
    store.write_json(CompletionFolder(folder).described(receipt.name), asdict(part))
    return part


def describe_parts(
    store: Store,
    receipts: Sequence[Receipt],
    columns: Float32,
    embeddings: Float32,
    regularisation: float,
    top_r: int,
    folder: str,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Part]:
    """Write all descriptors; returns the part written for each receipt, by the receipt's name.

    What an interrupted run described is not described again.

    Args:
        store: holds the parts, and will hold the descriptors.
        receipts: of the parts.
        columns: V (n, k).
        embeddings: (n, d), the encoder's unit vectors of the probes.
        regularisation: of the factorisation.
        top_r: entries kept a logit.
        folder: where in the store.
        progress: hears how many parts are described.
    """
    prefix = CompletionFolder(folder).described_folder
    parts = {
        name.removeprefix(f"{prefix}/").removesuffix(".json"): Part(**store.read_json(name))
        for name in store.names(prefix, suffix=".json")
    }
    remaining = [receipt for receipt in receipts if receipt.name not in parts]
    shared = ray.put(columns), ray.put(embeddings)
    under_way: dict[Any, str] = {}
    at_once = max(1, int(_PARTS_IN_FLIGHT * own_resources().get("CPU", 1)))
    while remaining or under_way:
        while remaining and len(under_way) < at_once:
            receipt = remaining.pop()
            ref = _describe.options(**own_nodes()).remote(
                store.uri, receipt, *shared, regularisation, top_r, folder, logs.current()
            )
            under_way[ref] = receipt.name
        (done, *_), _ = ray.wait(list(under_way), num_returns=1)
        parts[under_way.pop(done)] = ray.get(done)
        if progress is not None:
            progress(len(parts))
    return parts


def forget_described(store: Store, folder: str) -> None:
    """Remove what says that single parts are described: the stage's receipt does now."""
    store.delete_folder(CompletionFolder(folder).described_folder)

"""A hub's observations, made up at any size: real parts and receipts, as the probe stage leaves them.

Logits are of low rank with noise: ``x = u . v_p + noise`` with singular values that fall as 1 / sqrt(j), and a mean
and a spread for each logit. Each model has its own random probes and one of the sizes that heads have on the Hub.
Part i is a function of the seed and i alone, so that a smaller store is the beginning of a larger one.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import numpy as np

from probelog.storage.encoding import digest
from probelog.storage.ledger import Counts, Ledger, Receipt
from probelog.storage.observations import to_rows
from probelog.storage.parquet_parts import Part, part_bytes
from probelog.storage.schemas import FAILURES, OBSERVATIONS, PROBED_MODELS, WEIGHTS, ProbedModel, to_table
from probelog.storage.store import Store

RANK, NOISE = 48, 0.5
MODELS_A_PART = 32
# Classes of a head, and how many of a hundred models have them: 44 on the mean.
HEADS = {2: 25, 3: 8, 5: 10, 7: 8, 10: 18, 20: 10, 37: 5, 50: 5, 100: 6, 200: 2, 365: 1, 1000: 2}
_SEED = 7


def make(store: Store, logits: int, probes: int, share: float) -> list[Receipt]:
    """Receipts of at least ``logits`` logits, each model seen on ``share`` of the probes; what is there is kept."""
    ledger = Ledger(store, f"observations/{probes}-{share:g}")
    there = set(ledger.receipt_names())
    columns = _columns(probes)
    found: list[Receipt] = []
    total = 0
    while total < logits:
        name = f"part-{len(found):06}"
        if name in there:
            (receipt,) = ledger.receipts([name])
        else:
            receipt = _part(store, ledger.folder, name, len(found), columns, share)
        found.append(receipt)
        total += receipt.observations.rows
    return found


def _columns(probes: int) -> np.ndarray:
    scale = 1 / np.sqrt(np.arange(1, RANK + 1))
    scale /= np.linalg.norm(scale)
    drawn = np.random.default_rng(_SEED).standard_normal((probes, RANK))
    return (drawn * scale).astype(np.float32)


def _part(store: Store, folder: str, name: str, number: int, columns: np.ndarray, share: float) -> Receipt:
    rng = np.random.default_rng([_SEED, number])
    sizes = rng.choice(list(HEADS), MODELS_A_PART, p=np.array(list(HEADS.values())) / sum(HEADS.values()))
    models, tables = [], []
    for index, size in enumerate(sizes.tolist()):
        repo, sha = f"owner-{number:06}/model-{index:02}", f"{number * MODELS_A_PART + index:040x}"
        seen = np.sort(rng.choice(len(columns), round(share * len(columns)), replace=False))
        factors = rng.standard_normal((size, RANK), np.float32)
        values = factors @ columns[seen].T
        values += NOISE * rng.standard_normal(values.shape, np.float32)
        values = values * rng.uniform(1, 4, (size, 1)) + rng.normal(0, 2, (size, 1))
        tables.append(to_rows(repo, sha, values))
        models.append(_facts(repo, sha, size, seen.tolist()))
    parts = {
        "rows": _written(store, folder, "observations", name, tables, OBSERVATIONS),
        "models": _written(store, folder, "models", name, [to_table(models, PROBED_MODELS)], PROBED_MODELS),
        "failures": _written(store, folder, "failures", name, [], FAILURES),
        "weights": _written(store, folder, "weights", name, [], WEIGHTS),
    }
    receipt = Receipt(
        name=name,
        items=[f"{number * MODELS_A_PART + index:016x}" for index in range(MODELS_A_PART)],
        at=dt.datetime(2026, 1, 1, tzinfo=dt.UTC).isoformat(),
        counts=Counts(indexed=MODELS_A_PART, logits=int(sizes.sum())),
        originals={},
        **parts,
    )
    store.write_json(f"{folder}/receipts/{name}.json", receipt.to_json())
    return receipt


def _written(store: Store, folder: str, kind: str, name: str, tables: Sequence, schema) -> Part:
    data = part_bytes(tables, schema)
    path = f"{folder}/{kind}/{name}.parquet"
    store.write(path, data)
    return Part(path, sum(table.num_rows for table in tables), len(data), digest(data))


def _facts(repo: str, sha: str, size: int, probes: list[int]) -> ProbedModel:
    return ProbedModel(
        repo=repo, sha=sha, logits=size, head="softmax", labels=[f"class {i}" for i in range(size)], probes=probes,
        library="timm", architecture="made-up", parameters=1, recipe="{}", dtype="float32", device="cpu",
        weight_digest=sha, weight_mean=0.0, weight_std=1.0,
    )  # fmt: skip

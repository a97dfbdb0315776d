"""Features of what generators made, from the ledger of samples: more of each model than an index keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from probelog.arrays import Floats
from probelog.errors import UsageError
from probelog.storage import layout
from probelog.storage.ledger import SAMPLED, Ledger
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import SAMPLES
from probelog.storage.store import Store


def sampled_features(store: Store, encoder_digest: str) -> Mapping[str, Floats]:
    """Features (m, d) of each generator by its repository, in the order of the samples' numbers; copies have the original's.

    Read from the ledger of the store whose samples this encoder embedded, the one with most samples where there are several.

    Raises:
        UsageError: the store holds none.
        StoreError: a part is damaged.
    """
    largest: Mapping[str, Floats] = {}
    for folder in store.folders(layout.SAMPLES):
        ledger = Ledger(store, folder, SAMPLED)
        receipts = ledger.receipts(originals=False)
        models = [model for model in ledger.models(receipts) if model.encoder_digest == encoder_digest]
        rows: dict[tuple[str, str], Floats] = {}
        for receipt in receipts:
            columns = ["repo", "sha", "number", "feature"]
            rows |= _by_model(read_part(store, receipt.rows, SAMPLES, columns))
        features = {
            model.repo: rows[key]
            for model in models
            for key in ((model.repo, model.sha), (model.copy_of_repo, model.copy_of_sha))
            if key in rows
        }
        if sum(map(len, features.values())) > sum(map(len, largest.values())):
            largest = features
    if not largest:
        raise UsageError(f"{store.uri} holds no samples of generators that the index's encoder embedded")
    return largest


def _by_model(table: pa.Table) -> dict[tuple[str, str], Floats]:
    if not table.num_rows:
        return {}
    column: Any = table["feature"].combine_chunks()
    features = column.flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, -1).astype(np.float32)
    numbers = table["number"].to_numpy()
    places: dict[tuple[str, str], list[int]] = {}
    names: list[Any] = list(zip(table["repo"].to_pylist(), table["sha"].to_pylist(), strict=True))
    for place, key in enumerate(names):
        places.setdefault(key, []).append(place)
    return {key: features[sorted(own, key=lambda i: numbers[i])] for key, own in places.items()}

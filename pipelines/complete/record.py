"""What a completion left in the store."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from probelog.errors import StoreError
from probelog.storage.encoding import digest, from_npy, npy, short_key
from probelog.storage.layout import COLUMNS, CompletionFolder
from probelog.storage.parquet_parts import Part
from probelog.storage.store import Store
from probelog.storage.versions import MADE_BY, check_version

DESCRIPTORS_VERSION = 1


@dataclass(frozen=True)
class CompletionRecord:
    """The finished stage: the error that chose its columns (``columns.npy``), and a descriptor part for each receipt."""

    key: str
    rank: int
    regularisation: float
    rmse: float
    top_rmse: float
    models: int
    logits: int
    dropped: int
    parts: dict[str, Part]

    def facts(self) -> dict[str, Any]:
        """What the index says about its completion."""
        return {
            "rank": self.rank,
            "regularisation": self.regularisation,
            "held_out_rmse": self.rmse,
            "held_out_top_rmse": self.top_rmse,
            "constant_logits_dropped": self.dropped,
        }


def completed(store: Store, key: str) -> CompletionRecord | None:
    """A finished completion of a store, if it is there."""
    facts = store.read_json_or_none(CompletionFolder.of(key).receipt)
    return None if facts is None else read_record(store, key, facts)


def of_nothing(
    store: Store, key: str, probes: int, regularisation: float, observations: str
) -> CompletionRecord:
    """The completion of no logits at all. What is folded into it is estimated at its own mean where it was not observed."""
    # One column of zeros: the error of a row's mean is the row's standard deviation, the unit of both errors.
    done = CompletionRecord(key, 1, regularisation, 1.0, 1.0, models=0, logits=0, dropped=0, parts={})
    path = CompletionFolder.of(key).columns
    store.write(path, npy(np.zeros((probes, 1), np.float32)))
    write_record(store, done, {COLUMNS: measure_file(store, path)}, observations)
    return done


def joined(
    store: Store, base: CompletionRecord, more: CompletionRecord, observations: str
) -> CompletionRecord:
    """A completion and what was folded in since, as one; its columns are the completion's.

    Args:
        store: holds both, and gets this.
        base: the completion.
        more: what `fold_in` made with its columns.
        observations: key of a ledger that has the receipts of both.
    """
    key = short_key("completion", DESCRIPTORS_VERSION, "joined", base.key, *sorted(more.parts))
    path = CompletionFolder.of(key).columns
    store.write(path, npy(read_columns(store, base)))
    done = replace(
        base,
        key=key,
        models=base.models + more.models,
        logits=base.logits + more.logits,
        dropped=base.dropped + more.dropped,
        parts={**base.parts, **more.parts},
    )
    write_record(store, done, {COLUMNS: measure_file(store, path)}, observations)
    return done


def write_record(
    store: Store, done: CompletionRecord, files: dict[str, Any], observations: str, **further: object
) -> None:
    """A completion's receipt, with further facts."""
    facts = {name: value for name, value in asdict(done).items() if name != "key"}
    store.write_json(
        CompletionFolder.of(done.key).receipt,
        {
            **facts,
            **further,
            "files": files,
            "observations": observations,
            "version": DESCRIPTORS_VERSION,
            "made_by": MADE_BY,
        },
    )


def read_columns(store: Store, done: CompletionRecord) -> npt.NDArray[np.float32]:
    """A completion's columns V (n, k).

    Raises:
        StoreError: they are not there, or not those that the completion wrote.
    """
    folder = CompletionFolder.of(done.key)
    name = folder.columns
    facts = store.read_json(folder.receipt)
    try:
        data = store.read(name)
    except FileNotFoundError:
        raise StoreError(f"{store.path(name)} is gone: run `probelog-index full`") from None
    if digest(data) != facts["files"][COLUMNS]["sha256"]:
        raise StoreError(f"{store.path(name)} is damaged: its digest is not the one in its receipt")
    return from_npy(data)


def measure_file(store: Store, path: str) -> dict[str, int | str]:
    """Size and digest of a file that is no part, for the receipt."""
    size, sha256 = store.measure(path)
    return {"size": size, "sha256": sha256}


def read_record(store: Store, key: str, facts: dict[str, Any]) -> CompletionRecord:
    where = store.path(CompletionFolder.of(key).receipt)
    check_version(facts, DESCRIPTORS_VERSION, where, "completion")
    return CompletionRecord(
        key=key,
        rank=int(facts["rank"]),
        regularisation=float(facts["regularisation"]),
        rmse=float(facts["rmse"]),
        top_rmse=float(facts["top_rmse"]),
        models=int(facts["models"]),
        logits=int(facts["logits"]),
        dropped=int(facts["dropped"]),
        parts={name: Part(**part) for name, part in facts["parts"].items()},
    )

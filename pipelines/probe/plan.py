"""The plan of a probing run: the remaining models in the order of work, cut into batches.

A million models are a few arrays of numbers beside the catalogue's Arrow table; Python objects are made for a few
hundred at a time, when they are sent to workers.

Order of work: by size of the weights in classes of a factor two, the largest class first, so that a run ends with
small models only and no worker waits for a straggler (longest processing time first: Graham, SIAM J. Appl. Math.
17, 1969). Within a class models of one architecture follow each other: they share preprocessing, and a batch size
that fits one fits the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from probelog.arrays import values_of
from probelog.hub.model_info import PART_WEIGHTS
from probelog.storage.ledger import item_key, key_numbers
from probelog.storage.schemas import CATALOGUE, CatalogueRow, from_table

# Columns of the catalogue that nobody uses who reads models: of a million rows they are hundreds of megabytes.
_UNUSED = {
    "labels", "tags", "pipeline_tag", "licence", "licences", "downloads", "likes", "last_modified",
}  # fmt: skip
COLUMNS = [name for name in CATALOGUE.names if name not in _UNUSED]
_CHUNK = 256
_BYTES_A_PARAMETER = 4
# Files that hold a model's weights: the first of these that a repository has.
_WEIGHTS = (
    *(f"^{pattern}$" for pattern in PART_WEIGHTS),
    r"^[^/]*\.safetensors$",
    r"\.(bin|pt|pth|h5|ckpt|msgpack|onnx)$",
)


@dataclass(frozen=True)
class Item:
    """One model to probe.

    Attributes:
        key: in the ledger.
        row: of the catalogue, without labels and tags.
        attempt: 1 the first time.
        number: position in the plan.
        size: of its weights in bytes; an estimate where the catalogue does not have it.
    """

    key: str
    row: CatalogueRow
    attempt: int
    number: int
    size: float


@dataclass(frozen=True)
class ProbingPlan:
    """Items in the order of work, cut into batches; N items, B batches.

    Attributes:
        table: the catalogue.
        rows: (N,) each item's row of the table.
        attempts: (N,) from 1.
        keys: (N,) in the ledger, as numbers.
        sizes: (N,) of the weights in bytes; where unknown, the mean of the known ones.
        batches: (N,) each item's batch, ascending.
        starts: (B + 1,) each batch's first item.
        previous_reasons: (N,) number of the reason why the previous attempt failed; -1 for a first attempt.
        reasons: names of the reasons.
    """

    table: pa.Table
    rows: npt.NDArray[np.int64]
    attempts: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.float64]
    batches: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    previous_reasons: npt.NDArray[np.int64]
    reasons: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def items(self, numbers: npt.NDArray[np.int64]) -> Iterator[Item]:
        """The items with the given numbers, made lazily."""
        pieces = self.table.to_batches()
        first = np.cumsum([0, *(piece.num_rows for piece in pieces)])
        for start in range(0, len(numbers), _CHUNK):
            chunk = numbers[start : start + _CHUNK]
            rows = self.rows[chunk]
            piece = np.searchsorted(first, rows, side="right") - 1
            # Slices, since taking rows out of many chunks would put the chunks together each time.
            batch = pa.Table.from_batches(
                [
                    pieces[p].slice(row - first[p], 1)
                    for p, row in zip(piece.tolist(), rows.tolist(), strict=True)
                ]
            )
            for number, row in zip(chunk.tolist(), from_table(batch, CatalogueRow), strict=True):
                yield Item(
                    f"{self.keys[number]:016x}",
                    row,
                    int(self.attempts[number]),
                    number,
                    float(self.sizes[number]),
                )

    def batch(self, number: int) -> list[str]:
        """Keys of a batch's items."""
        return [f"{key:016x}" for key in self.keys[self.starts[number] : self.starts[number + 1]].tolist()]

    def replaced(self, number: int) -> dict[str, int]:
        """Number of earlier failures, by reason, that the attempts of a batch replace."""
        codes = Counter(self.previous_reasons[self.starts[number] : self.starts[number + 1]].tolist())
        return {self.reasons[code]: count for code, count in sorted(codes.items()) if code >= 0}


def make_plan(
    table: pa.Table,
    keys: npt.NDArray[np.uint64],
    sealed: npt.NDArray[np.uint64],
    failures: pa.Table,
    batch_models: int,
    retry_failed: bool,
    together: Sequence[str] = (),
) -> ProbingPlan:
    """Plan the remaining models, in batches whose boundaries do not move when a run is resumed.

    First attempts and retries are batched separately: batches are sealed as a whole, so the remaining first attempts
    fall into the same batches again.

    Args:
        table: the catalogue, each (repo, sha) once.
        keys: first attempts' keys of its rows (`first_keys`).
        sealed: keys of the items that are sealed.
        failures: `probelog.storage.ledger.open_failures`.
        batch_models: items of a batch.
        retry_failed: also retry failures that a retry is not expected to cure.
        together: columns in which models that follow each other should agree, before size counts.
    """
    sizes = weight_bytes(table)
    order = work_order(table, sizes, together)
    first_attempts, retries, open_at = untried(keys, sealed, failures, retry_failed)
    reasons = sorted(values_of(pc.unique(failures["reason"]), str))
    codes = pc.index_in(failures["reason"], pa.array(reasons, pa.string())).to_numpy()
    first, second = order[first_attempts[order]], order[retries[order]]
    attempts = np.concatenate(
        [np.ones(len(first), np.int64), failures["attempts"].to_numpy()[open_at[second]].astype(np.int64) + 1]
    )
    names = table.select(["repo", "sha"]).take(second)
    retried = (
        item_key(repo, sha, attempt)
        for repo, sha, attempt in zip(
            values_of(names["repo"], str),
            values_of(names["sha"], str),
            attempts[len(first) :].tolist(),
            strict=True,
        )
    )
    batches = [np.arange(len(first)) // batch_models]
    offset = int(batches[0][-1]) + 1 if len(first) else 0
    batches.append(offset + np.arange(len(second)) // batch_models)
    batch = np.concatenate(batches)
    rows = np.concatenate([first, second])
    known = sizes[~np.isnan(sizes)]
    return ProbingPlan(
        table=table,
        rows=rows,
        attempts=attempts,
        keys=np.concatenate([keys[first], key_numbers(retried)]),
        sizes=np.nan_to_num(sizes[rows], nan=float(known.mean()) if len(known) else 0.0),
        batches=batch,
        starts=np.append(np.flatnonzero(np.diff(batch, prepend=-1)), len(rows)),
        previous_reasons=np.concatenate([np.full(len(first), -1), codes[open_at[second]].astype(np.int64)]),
        reasons=reasons,
    )


def untried(
    keys: npt.NDArray[np.uint64], sealed: npt.NDArray[np.uint64], failures: pa.Table, retry_failed: bool
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Of the catalogue's models, by their keys: which are to be tried first, which again, and each one's failure.

    Arguments as of `make_plan`.

    Returns:
        Two masks (N,), and (N,) the row of the model's open failure; -1 without one.
    """
    open_at = places(first_keys(failures), keys)
    retries = open_at >= 0
    retries[retries] = retry_failed | failures["retryable"].to_numpy()[open_at[retries]]
    return (open_at < 0) & ~np.isin(keys, sealed), retries, open_at


def places(keys: npt.NDArray[np.uint64], wanted: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Where in ``keys`` each of the wanted ones is; -1 where it is not there."""
    if not len(keys):
        return np.full(len(wanted), -1)
    order = np.argsort(keys)
    found = order[np.searchsorted(keys, wanted, sorter=order) % len(keys)]
    return np.where(keys[found] == wanted, found, -1)


def first_keys(table: pa.Table) -> npt.NDArray[np.uint64]:
    """Keys of the first attempts at the models of a table (columns ``repo`` and ``sha``)."""
    return key_numbers(
        item_key(repo, sha)
        for batch in table.select(["repo", "sha"]).to_batches()
        for repo, sha in zip(values_of(batch["repo"], str), values_of(batch["sha"], str), strict=True)
    )


def weight_bytes(table: pa.Table) -> npt.NDArray[np.float64]:
    """Bytes of each model's weights (N,), from the catalogue; NaN where it has no information.

    The sizes of the safetensors files of its parts, or in the top folder; without any, of other weights. Where sizes or
    files are not listed (the Hub's listing has names only), an estimate from parameter counts by type, else four bytes per
    parameter.
    """
    sizes = []
    for batch in table.select(["files", "parameters", "weight_bytes"]).to_batches():
        files = batch["files"]
        parents = pc.list_parent_indices(files).to_numpy()
        flat = pc.list_flatten(files)
        path: Any = pc.struct_field(flat, "path").dictionary_encode()
        size = pc.fill_null(pc.struct_field(flat, "size"), 0).to_numpy()
        count = batch.num_rows
        totals, has_weights = np.zeros(count), np.zeros(count, bool)
        for pattern in _WEIGHTS:
            of_names: Any = pc.match_substring_regex(path.dictionary, pattern)
            held = of_names.take(path.indices).to_numpy(zero_copy_only=False)
            totals = np.where(totals > 0, totals, np.bincount(parents[held], size[held], count))
            has_weights[parents[held]] = True
        unlisted = np.bincount(parents, minlength=count) == 0
        sizes_by_format, parameters = (
            pc.cast(batch[name], pa.float64()).to_numpy(zero_copy_only=False)
            for name in ("weight_bytes", "parameters")
        )
        estimate = np.where(np.isnan(sizes_by_format), _BYTES_A_PARAMETER * parameters, sizes_by_format)
        sizes.append(np.where(unlisted | (has_weights & (totals == 0)), estimate, totals))
    return np.concatenate(sizes) if sizes else np.zeros(0)


def work_order(
    table: pa.Table, sizes: npt.NDArray[np.float64], together: Sequence[str] = ()
) -> npt.NDArray[np.int64]:
    """Numbers (N,) of the table's rows in the order of work; models of unknown size count as the largest.

    ``together``: columns that come before the size; rows without a value in them are first.
    """
    classes = np.floor(np.log2(np.maximum(sizes, 1.0)))
    names = ["library", "model_type", "architecture", "repo", "sha"]
    keyed = table.select(names).append_column("class", pa.array(np.where(np.isnan(sizes), np.inf, classes)))
    keys: list[tuple[str, Literal["ascending", "descending"]]] = []
    for name in together:
        column: Any = table[name]
        keyed = keyed.append_column(f"first {name}", pc.fill_null(column, ""))
        keys.append((f"first {name}", "ascending"))
    keys += [("class", "descending"), *((name, "ascending") for name in names)]
    indices = pc.sort_indices(keyed, keys)
    order: npt.NDArray[np.int64] = indices.to_numpy().astype(np.int64)
    return order

"""``probelog-index failures``: the models of a store that are not indexed, why, and what to do about each."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.inspect.remedies import remedy
from pipelines.probe.summary import Summary
from probelog.arrays import values_of
from probelog.errors import FailureReason, StoreError, UsageError
from probelog.kinds.registry import KINDS
from probelog.spreadsheet import csv_lines
from probelog.storage import layout
from probelog.storage.ledger import PROBED, ItemResult, Ledger, Receipt, key_numbers, open_failures
from probelog.storage.parquet_parts import Part, read_part
from probelog.storage.schemas import FAILURES, Failure, from_table
from probelog.storage.store import Store

Stage = Literal["crawl", "probe", "sample", "trees"]
"""At which a model can fail."""

FIELDS = (*FAILURES.names, "to_do", "key")
# A result without logits is smaller; larger ones of the spool need not be read.
_FAILURE_BYTES = 32 << 10
_READERS = 16
_SHOWN = 20
# Rows that are Python objects at the same time.
_AT_A_TIME = 1000
# Receipts that are read for examples, the newest first, some at a time.
_EXAMPLE_RECEIPTS, _AT_ONCE = 64, 8


@dataclass(frozen=True)
class FailureList:
    """The last failure of every model that did not succeed since.

    Attributes:
        store: its address.
        rows: ``FAILURES`` and ``key``, of the crawl or the ledger that recorded it.
        whole: whether a person is shown all of them.
    """

    store: str
    rows: pa.Table
    whole: bool

    def records(self) -> Iterator[dict[str, object]]:
        """Plain values, ``FIELDS`` of each."""
        for batch in self.rows.to_batches(max_chunksize=_AT_A_TIME):
            for row in batch.to_pylist():
                at = row["at"]
                yield row | {
                    "at": None if at is None else at.isoformat(timespec="seconds"),
                    "to_do": remedy(row["reason"]),
                }

    def json_lines(self) -> Iterator[str]:
        """One JSON object a failure."""
        return map(json.dumps, self.records())

    def csv_lines(self) -> Iterator[str]:
        """A table for spreadsheets, with a heading."""
        rows = ([record[name] for name in FIELDS] for record in self.records())
        return (line.removesuffix("\n") for line in csv_lines(FIELDS, rows))

    def lines(self) -> Iterator[str]:
        """The same for a person: by reason, the most frequent first."""
        if not self.rows.num_rows:
            yield f"{self.store}: no failures"
        reasons = Counter(values_of(self.rows["reason"], str))
        for reason, count in reasons.most_common():
            rows = self.rows.filter(pc.field("reason") == reason)
            shown = rows if self.whole else rows.slice(0, _SHOWN)
            yield f"{reason}: {count:,} model{'s' if count > 1 else ''}"
            yield f"  what to do: {remedy(reason)}"
            starts = range(0, shown.num_rows, _AT_A_TIME)
            items = (from_table(shown.slice(start, _AT_A_TIME), Failure) for start in starts)
            for item in itertools.chain.from_iterable(items):
                when = "" if item.at is None else f"{item.at:%Y-%m-%d %H:%M} UTC, "
                tries = f"{item.attempts} attempt{'s' if item.attempts > 1 else ''}"
                again = "retryable" if item.retryable else "not retryable"
                yield f"  {item.repo}{f'@{item.sha[:12]}' if item.sha else ''}  {item.stage}, {when}{tries}, {again}"
                yield f"      {item.detail}"
            if not self.whole and count > _SHOWN:
                yield f"  and {count - _SHOWN:,} more: --reason {reason} (or --json, --csv)"


def list_failures(
    uri: str,
    reason: FailureReason | None = None,
    stage: Stage | None = None,
    retryable: bool = False,
) -> FailureList:
    """The failures of a store, those of a reason, of a stage, or that a plain rerun tries again.

    Raises:
        UsageError: there is no ProbeLog store at this address.
        StoreError: a receipt or a part is damaged.
    """
    store = Store(uri)
    listings, groups = catalogues(store), ledgers(store)
    if not (listings or groups):
        raise UsageError(
            f"{store.uri} is not a ProbeLog store, or nothing was crawled yet: check the address"
        )
    tables = [_with_key(_listing_failures(store, name), name.split("/")[1]) for name in listings]
    tables += [_with_key(_ledger_failures(group), key) for key, group in groups.items()]
    rows = pa.concat_tables(tables)
    for name, value in (("reason", reason), ("stage", stage), ("retryable", retryable or None)):
        if value is not None:
            rows = rows.filter(pc.field(name) == value)
    rows = rows.sort_by([(name, "ascending") for name in ("stage", "repo", "sha")])
    return FailureList(store.uri, rows, whole=reason is not None)


def examples(ledger: Ledger, summary: Summary, reasons: Collection[str]) -> dict[str, Failure]:
    """A recent failure of each of some reasons, where the newest receipts of a ledger have one.

    A damaged receipt is no matter here: `verify` names it.
    """
    newest = sorted(summary.sealed, key=lambda name: summary.sealed[name], reverse=True)[:_EXAMPLE_RECEIPTS]
    receipts: list[Receipt] = []
    found: dict[str, Failure] = {}
    for start in range(0, len(newest), _AT_ONCE):
        if set(reasons) <= found.keys():
            break
        with contextlib.suppress(StoreError, FileNotFoundError):
            receipts += ledger.receipts(newest[start : start + _AT_ONCE])
            sealed = key_numbers(item for receipt in receipts for item in receipt.items)
            rows = open_failures(ledger.failure_rows(receipts), sealed)
            for failure in from_table(rows, Failure):
                if failure.reason in reasons:
                    found.setdefault(failure.reason, failure)
    return found


def group_receipts(group: Sequence[Ledger]) -> Iterator[Receipt]:
    """The receipts of a ledger and of the nightly runs that continue it, in any order: copies have the same name."""
    seen: set[str] = set()
    for ledger in group:
        names = [name for name in ledger.receipt_names() if name not in seen]
        seen.update(names)
        yield from ledger.each_receipt(names)


def ledgers(store: Store) -> dict[str, list[Ledger]]:
    """All ledgers by key, those of nightly runs with the one that they continue."""
    groups: dict[str, list[Ledger]] = {}
    folders = [(kind.ledgers, kind.contents) for kind in KINDS]
    for folder, contents in (*folders, (layout.tree_weights("").rstrip("/"), PROBED)):
        for name in store.folders(folder):
            ledger = Ledger(store, name, contents)
            if store.exists(ledger.paths.manifest):
                groups.setdefault(ledger.paths.key.partition("-")[0], []).append(ledger)
    return groups


def catalogues(store: Store) -> list[str]:
    """Paths of what says what a crawl listed: its receipt, or its progress where it was never finished."""
    names = {
        name.split("/")[1]: name
        for last in (layout.PROGRESS, layout.RECEIPT)
        for name in store.names(layout.CATALOGUES, suffix=f"/{last}")
        if name.count("/") == 2
    }
    return [names[key] for key in sorted(names)]


def _listing_failures(store: Store, name: str) -> pa.Table:
    parts = [Part(**part) for part in store.read_json(name)["failures"]]
    tables = [read_part(store, part, FAILURES) for part in parts]
    return pa.concat_tables(tables) if tables else FAILURES.empty_table()


def _ledger_failures(group: Sequence[Ledger]) -> pa.Table:
    # What they say of originals is the half of them.
    receipts = [replace(receipt, originals={}) for receipt in group_receipts(group)]
    sealed = key_numbers(item for receipt in receipts for item in receipt.items)
    tables = [group[0].failure_rows(receipts)]
    waiting: set[str] = set()
    for ledger in group:
        spooled = sorted(ledger.spooled() - waiting)
        open_ones = ~np.isin(key_numbers(spooled), sealed)
        unsealed = [item for item, is_open in zip(spooled, open_ones, strict=True) if is_open]
        sizes = ledger.store.sizes(ledger.paths.spool) if unsealed else {}
        small = [item for item in unsealed if sizes.get(ledger.paths.spooled(item), 0) < _FAILURE_BYTES]
        with ThreadPoolExecutor(_READERS) as pool:
            # One that is sealed meanwhile is in the next answer.
            results: list[ItemResult | None] = list(pool.map(ledger.spooled_result, small))
        tables += [result.failures for result in results if result is not None]
        waiting.update(unsealed)
    return open_failures(pa.concat_tables(tables), np.union1d(sealed, key_numbers(waiting)))


def _with_key(rows: pa.Table, key: str) -> pa.Table:
    return rows.append_column("key", pa.array([key] * rows.num_rows, pa.string()))

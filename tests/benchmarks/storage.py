"""Bytes a logit of everything that a store keeps, beside the least: 16 bits for every value that was observed.

    python -m tests.benchmarks.storage --store STORE --out storage.csv

Reads footers and listings only, of any store (a directory or ``s3://``). For Parquet a line is a column as it is
stored, compressed; for the index a file of a table's data or of its vector index; the rest goes by folder. Each is
divided by the logits that its ledger, completion or generation holds: ``least`` is two bytes times the values observed
of them, and ``ratio`` says how many times that a line takes.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import pyarrow.parquet as pq

from probelog.errors import IndexNotFoundError, UsageError
from probelog.index.generation import Generation
from probelog.index.pointer import find_index, read_pointer
from probelog.storage.layout import GenerationFolder
from probelog.storage.ledger import Ledger
from probelog.storage.store import Store

_READERS = 8
_LEAST = 2  # bytes a value


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    stage: str
    key: str
    what: str
    logits: int
    bytes: int
    bytes_per_logit: float
    ratio: float


@dataclass(frozen=True)
class Held:
    """What a ledger, a completion or a generation holds: logits, values observed of them, and bytes by what they are."""

    stage: str
    key: str
    logits: int
    values: int
    sizes: Counter[str]

    def lines(self) -> Iterator[Line]:
        """The largest first, then the sum."""
        total = sum(self.sizes.values())
        least = max(1, _LEAST * self.values)
        for what, size in [*self.sizes.most_common(), ("sum", total)]:
            per_logit = size / max(1, self.logits)
            yield Line(
                self.stage, self.key, what, self.logits, size, round(per_logit, 2), round(size / least, 4)
            )


def main() -> None:
    """Measure a store and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True)
    parser.add_argument("--out", type=Path, help="CSV; printed only by default")
    given = parser.parse_args()
    lines = [line for held in measured(Store(given.store)) for line in held.lines()]
    if given.out is not None:
        with given.out.open("w", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow([item.name for item in fields(Line)])
            writer.writerows(map(astuple, lines))
    for line in lines:
        sys.stdout.write(
            f"{line.stage:<12} {line.key[:24]:<24} {line.what:<40} {line.bytes:>14,} bytes "
            f"{line.bytes_per_logit:>10,.1f} a logit {line.ratio:>8.3f} x the least\n"
        )


def measured(store: Store) -> Iterator[Held]:
    """Every ledger, every completion, and the live generation of a store.

    Raises:
        UsageError: the store holds no observations.
    """
    ledgers = {
        name.split("/")[1]: _ledger(store, name.rsplit("/", 1)[0])
        for name in store.names("observations", "/manifest.json")
    }
    if not ledgers:
        raise UsageError(f"{store.uri} holds no observations: check the address")
    yield from ledgers.values()
    for name in store.names("completion", "/receipt.json"):
        yield _completion(store, name, ledgers)
    try:
        index = find_index(store.uri)
    except IndexNotFoundError:
        return
    pointer = read_pointer(index)[0]
    generation = Generation(index, pointer)
    sizes: Counter[str] = Counter()
    folder = GenerationFolder.of(pointer.generation).path
    for name, size in index.sizes(folder).items():
        table, *rest = name.removeprefix(f"{folder}/").split("/")
        sizes[f"{table} {rest[0]}" if rest else table] += size
    logits = generation.settings.logits
    ledger = ledgers.get(generation.settings.observations)
    share = ledger.values / max(1, ledger.logits) if ledger else 0.0
    yield Held("index", pointer.generation, logits, round(share * logits), sizes)


def _ledger(store: Store, folder: str) -> Held:
    receipts = Ledger(store, folder).receipts()
    kinds = ("observations", "models", "failures", "weights")
    parts = [
        (kind, part.path)
        for receipt in receipts
        for kind in kinds
        if (part := getattr(receipt, kind)) is not None
    ]
    sizes, values = _columns(store, parts)
    for name, size in store.sizes(folder).items():
        kind = name.removeprefix(f"{folder}/").split("/")[0]
        if kind not in kinds:
            sizes[kind] += size
    logits = sum(receipt.observations.rows for receipt in receipts)
    return Held(
        "observations", folder.split("/")[1], logits, values["observations values.list.element"], sizes
    )


def _completion(store: Store, name: str, ledgers: dict[str, Held]) -> Held:
    content = store.read_json(name)
    folder = name.rsplit("/", 1)[0]
    sizes, _ = _columns(store, [("descriptors", str(part["path"])) for part in content["parts"].values()])
    for path, size in store.sizes(folder).items():
        if "/descriptors/" not in path:
            sizes[path.removeprefix(f"{folder}/")] += size
    ledger = ledgers.get(content["observations"])
    share = ledger.values / max(1, ledger.logits) if ledger else 0.0
    logits = int(content["logits"])
    return Held("descriptors", folder.split("/")[1], logits, round(share * logits), sizes)


def _columns(store: Store, parts: list[tuple[str, str]]) -> tuple[Counter[str], Counter[str]]:
    """Stored bytes and numbers of values of the columns of some Parquet files; what is no column is their frame."""
    sizes: Counter[str] = Counter()
    values: Counter[str] = Counter()

    def footer(path: str) -> tuple[int, pq.FileMetaData]:
        with store.open(path) as source:
            return source.size(), pq.ParquetFile(source).metadata

    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(footer, [path for _, path in parts])
        for (kind, _), (size, metadata) in zip(parts, found, strict=True):
            frame = size
            for group in range(metadata.num_row_groups):
                for number in range(metadata.num_columns):
                    column = metadata.row_group(group).column(number)
                    name = f"{kind} {column.path_in_schema}"
                    sizes[name] += column.total_compressed_size
                    values[name] += column.num_values
                    frame -= column.total_compressed_size
            sizes[f"{kind} (footers)"] += frame
    return sizes, values


if __name__ == "__main__":
    main()

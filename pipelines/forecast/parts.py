"""What a part of the ledger takes: a rest whatever it holds (Parquet's footer and dictionaries), and a rate.

Parts of many sizes would tell, but a first measurement has one part. So its rows are written twice more, all of
them and the first half of its models, as the ledger would write them.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import groupby

import pyarrow as pa

from probelog.storage.checksummed_json import sealed_json
from probelog.storage.ledger import Ledger, Receipt
from probelog.storage.parquet_parts import Part, part_bytes, read_part
from probelog.storage.schemas import OBSERVATIONS, PROBED_MODELS, WEIGHTS

_SCHEMAS = {"observations": OBSERVATIONS, "models": PROBED_MODELS, "weights": WEIGHTS}


def part_rest(ledger: Ledger, receipt: Receipt, kind: str) -> float | None:
    """Bytes of a part beside those that grow with its rows; None where it is too small to tell.

    Args:
        ledger: where it lies.
        receipt: of a batch.
        kind: ``observations``, ``models`` or ``weights``.
    """
    part: Part | None = getattr(receipt, kind)
    if part is None or not part.rows:
        return None
    models = _models(read_part(ledger.store, part, _SCHEMAS[kind]))
    if len(models) < 2:
        return None
    half = models[: len(models) // 2]
    small, whole = (len(part_bytes(tables, _SCHEMAS[kind])) for tables in (half, models))
    rate = max(0.0, (whole - small) / (part.rows - sum(table.num_rows for table in half)))
    return float(max(0.0, whole - rate * part.rows))


def receipt_rest(receipt: Receipt) -> float:
    """Bytes of a receipt beside those that grow with its items."""
    return float(len(sealed_json(asdict(replace(receipt, items=[], originals={})))))


def _models(table: pa.Table) -> list[pa.Table]:
    """The rows of each model; neighbours in a part."""
    tables, start = [], 0
    for _, rows in groupby(zip(table["repo"].to_pylist(), table["sha"].to_pylist(), strict=True)):
        count = len(list(rows))
        tables.append(table.slice(start, count))
        start += count
    return tables

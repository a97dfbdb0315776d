"""How many images a source of probes can have at most, without reading them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from probelog.probes.sources import SourceFile

# Footers that are read; of more files the number stays unknown, as it is large.
_MOST_FOOTERS = 64


def most_probes(files: Sequence[SourceFile]) -> int | None:
    """One a file, of Parquet files their rows; duplicates and what is no image count. None where it is not known."""
    count = footers = 0
    for file in files:
        if not (file.must_be_parquet or Path(file.name).suffix == ".parquet"):
            count += 1
            continue
        footers += 1
        if footers > _MOST_FOOTERS:
            return None
        try:
            with file.open() as stream:
                count += int(pq.read_metadata(stream).num_rows)
        except Exception:  # reason: what cannot be read is reported where probes are made, by name
            return None
    return count

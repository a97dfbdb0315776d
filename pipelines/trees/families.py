"""Families in the store: what later models are compared with, models of many families in one file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from probelog.arrays import values_of
from probelog.storage.versions import schema_metadata
from probelog.trees.families.family import Family, ModelFacts, family_of

#: What these files say of themselves; their other columns are those of `probelog.trees.families.family.Family.table`.
_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("family", pa.string()),
    ("layout", pa.string()),
    ("uploaded", pa.float64()),
    ("declared", pa.list_(pa.string())),
]
FAMILIES = pa.schema(_COLUMNS, metadata=schema_metadata("tree-families", 1))


def family_tables(
    families: Iterable[Family], facts: Callable[[Iterable[str]], Mapping[str, ModelFacts]], rows: int
) -> Iterator[pa.Table]:
    """Families with the facts of their models (``FAMILIES``), in tables of at least so many rows, but for the last."""
    tables: list[pa.Table] = []
    count = 0
    for family in families:
        for start in range(0, len(family.repos), rows):
            tables.append(_rows(family.take(np.arange(start, min(start + rows, len(family.repos)))), facts))
            count += tables[-1].num_rows
            if count >= rows:
                yield pa.concat_tables(tables)
                tables, count = [], 0
    if tables:
        yield pa.concat_tables(tables)


def _rows(family: Family, facts: Callable[[Iterable[str]], Mapping[str, ModelFacts]]) -> pa.Table:
    table = family.table()
    known = facts(family.repos)
    (layout,) = (table.schema.metadata or {b"family": b""}).values()
    # Families have matrices of different widths.
    plain = dict(zip(table.column_names, table.columns, strict=True))
    for name, column in plain.items():
        if isinstance(column.type, pa.FixedSizeListType):
            plain[name] = column.cast(pa.list_(column.type.value_type))
    models = [known[repo] for repo in family.repos]
    added: dict[str, list[Any]] = {
        "family": [family.key] * len(models),
        "layout": [layout.decode()] * len(models),
        "uploaded": [model.uploaded for model in models],
        "declared": [list(model.declared) for model in models],
    }
    typed = {name: pa.array(values, FAMILIES.field(name).type) for name, values in added.items()}
    return pa.table({**typed, **plain}).replace_schema_metadata(FAMILIES.metadata)


def family_from(
    tables: Sequence[pa.Table], key: str, without: Collection[str]
) -> tuple[Family, dict[str, ModelFacts]] | None:
    """One family of these tables but for some models, and the facts of the others; None where nothing is left.

    Of a model that is there more than once, the last row counts.
    """
    rows = pa.concat_tables(table.filter(pc.equal(table["family"], pa.scalar(key))) for table in tables)
    last = {repo: place for place, repo in enumerate(values_of(rows["repo"], str)) if repo not in without}
    if not last:
        return None
    rows = rows.take([last[repo] for repo in sorted(last)]).combine_chunks()
    facts = {
        repo: ModelFacts(uploaded, tuple(declared))
        for repo, uploaded, declared in zip(
            *(rows[name].to_pylist() for name in ("repo", "uploaded", "declared")), strict=True
        )
    }
    layout = rows["layout"][0].as_py().encode()
    plain = rows.drop_columns(FAMILIES.names).replace_schema_metadata({"family": layout})
    return family_of(plain), facts

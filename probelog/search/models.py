"""The models of an index as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from probelog.errors import QueryError
from probelog.index.conditions import check_columns, prepared
from probelog.index.generation import Generation
from probelog.index.schema import MODEL_FACTS

Ask = Callable[[Callable[[Generation], pa.Table]], pa.Table]

# Of these some models have thousands: only who asks for them by name gets them.
_LONG = ("labels",)


class ModelCount(int):
    """The number of an index's models, which can be called for a table of them."""

    _ask: Ask

    def __new__(cls, count: int, ask: Ask) -> ModelCount:
        """Of an index with so many models, which answers by ``ask``."""
        number = super().__new__(cls, count)
        number._ask = ask
        return number

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def __call__(
        self,
        where: str | None = None,
        *,
        columns: Sequence[str] | None = None,
        sort: str | None = None,
        limit: int | None = None,
    ) -> pa.Table:
        """Models of the index as an Arrow table, a row each.

        Args:
            where: SQL condition over the models' facts.
            columns: names of facts; all but ``labels`` by default.
            sort: the fact to sort by: numbers and times from the largest, texts from A to Z, unknown ones at the end. By
                default the order of the index.
            limit: at most so many, the first.

        Raises:
            QueryError: a condition that is not understood, or no such column.
        """
        if limit is not None and limit < 1:
            raise QueryError(f"limit must be at least 1, not {limit}")
        names = [name for name in MODEL_FACTS.names if name not in _LONG] if columns is None else [*columns]
        return self._ask(lambda generation: _models(generation, where, names, sort, limit))


def _models(
    generation: Generation, where: str | None, columns: Sequence[str], sort: str | None, limit: int | None
) -> pa.Table:
    read = list(dict.fromkeys([*columns, *([] if sort is None else [sort])]))
    check_columns(read, MODEL_FACTS.names)
    condition = None if where is None else prepared(where, "models")

    table = generation.models_where(condition, read, limit if sort is None else None)
    if sort is not None:
        kind = MODEL_FACTS.field(sort).type
        if pa.types.is_nested(kind):
            raise QueryError(f"models cannot be sorted by {sort}, which is a list")
        # Unknown ones come last, either way.
        order = "ascending" if pa.types.is_string(kind) else "descending"
        table = table.take(pc.sort_indices(table, [(sort, order)]))
    return (table if limit is None else table.slice(0, limit)).select(list(columns))

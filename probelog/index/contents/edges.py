"""The edges of a generation's model trees, those of an update over those of its base."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from probelog.arrays import ArrowArray, values_of
from probelog.errors import QueryError
from probelog.index.contents.models import ModelTable
from probelog.index.contents.opened import Once
from probelog.storage.schemas import EDGES

# Edges that are read at a time: some hundred bytes each.
EDGES_AT_ONCE = 1024


class EdgeTable(ModelTable):
    """Reads the edges."""

    def edges(self, condition: str | None = None) -> Iterator[pa.Table]:
        """The edges of model trees (``EDGES``), all or those that meet an SQL condition, in blocks.

        Of an update, those of the base come first. A condition over ``latent`` sees, in the base's edges, what was so
        when the base was made.

        Raises:
            QueryError: the index has no trees, or the condition is not understood.
        """
        if self.settings.edges is None:
            raise QueryError(
                f"{self.index.uri} has no model trees: it was published without them, or by an older version. "
                "Whoever publishes it can add them: probelog-index full (or publish), with [trees] enabled = true"
            )
        bracketed = None if condition is None else f"({condition}\n)"
        for tables in dict.fromkeys([self._base, self._tables]):
            blocks = tables.blocks("edges", EDGES.names, bracketed, EDGES_AT_ONCE)
            while True:
                with self._filter_errors(condition, "edges"):
                    block = next(blocks, None)
                if block is None:
                    break
                if tables is not self._tables:
                    block = block.filter(pc.invert(pc.is_in(block["child"], self._children_replaced)))
                yield block

    @Once
    def _children_replaced(self) -> ArrowArray:
        """Children whose edges in the base's table are no longer valid.

        They were removed, are at another commit now, or have edges in the update's own table.
        """
        current = {
            (row["repo"], row["sha"]) for row in self._tables.rows("models", ["repo", "sha"]).to_pylist()
        }
        names: set[str] = set()
        if len(self._replaced):
            previous = self._base_models(np.unique(self._replaced), ["repo", "sha"]).to_pylist()
            names = {row["repo"] for row in previous if (row["repo"], row["sha"]) not in current}
        names.update(values_of(self._tables.rows("edges", ["child"])["child"], str))
        return pa.array(sorted(names), pa.string())

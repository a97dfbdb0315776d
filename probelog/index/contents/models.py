"""The models of a generation: their rows by condition, name and number, those of an update over those of its base."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.arrays import values_of
from probelog.errors import QueryError, suggestion
from probelog.index.contents.opened import Once, OpenedGeneration
from probelog.index.schema import MODELS
from probelog.index.tables import completed, is_valid_sql_text, sql_in, sql_literal

# Models that are read at a time, where all are.
_MODELS_AT_ONCE = 8192
# Values of one SQL condition.
_TEXTS_AT_ONCE = 500
# Number of names that an unknown one is compared with, to suggest similar ones: some 20 microseconds each.
_COMPARED_NAMES = 10_000


class ModelTable(OpenedGeneration):
    """Reads the models."""

    def models_table(
        self, columns: Sequence[str], where: str | None = None, limit: int | None = None
    ) -> pa.Table:
        """Columns of the models, all of them or those that meet an SQL condition, and ``id``; sorted by ``id``.

        Numbers have gaps where models of the base were removed. A condition over ``copies`` sees the base's counts.
        """
        names = list(dict.fromkeys(["id", *columns, *(["weights"] if "copies" in columns else [])]))
        if not self.is_update:
            return self._checked(self._tables.rows("models", names, where, limit).sort_by("id"))
        table = self._base.rows(
            "models", names, where, None if limit is None else limit + len(self._replaced)
        )
        table = table.filter(pa.array(~np.isin(table["id"].to_numpy(), self._replaced)))
        if "copies" in columns:
            table = self._with_current_copies(table)
        table = pa.concat_tables([table, self._tables.rows("models", names, where)]).sort_by("id")
        return self._checked(table if limit is None else table.slice(0, limit))

    def model_blocks(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The same columns of all models, in blocks of at most ``_MODELS_AT_ONCE``."""
        end = max(
            self._base_model_count, int(self._update_numbers.max(initial=-1)) + 1 if self.is_update else 0
        )
        for start in range(0, end, _MODELS_AT_ONCE):
            yield self.models_table(columns, f"id >= {start} AND id < {start + _MODELS_AT_ONCE}")

    def _checked(self, models: pa.Table) -> pa.Table:
        """Rows of the models, whose logits are rows of the index.

        Raises:
            StoreError: some are not.
        """
        if "first_row" in models.column_names and "rows" in models.column_names:
            starts, counts = (np.asarray(models[name].to_numpy(), np.int64) for name in ("first_row", "rows"))
            # Neither is below 0; compared in this order, the sum cannot overflow.
            if (starts > self.size).any() or (starts + counts > self.size).any():
                raise self._tables.damaged("models", "a model has logits that the index does not have")
        return models

    def models_named(
        self, column: str, values: Iterable[str], columns: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Rows of the models whose ``column`` has one of ``values``, sorted by ``id``."""
        texts, rows = sorted(set(values)), []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            condition = sql_in(column, texts[start : start + _TEXTS_AT_ONCE])
            rows += self.models_table(columns, condition).to_pylist()
        return sorted(rows, key=lambda row: int(row["id"]))

    def take_models(self, numbers: Sequence[int] | npt.NDArray[Any], columns: Sequence[str]) -> pa.Table:
        """Columns of the models with the given numbers, in the order of the numbers, and ``id``.

        Raises:
            StoreError: a number has no row.
        """
        unique_numbers, places = np.unique(np.asarray(numbers, np.int64), return_inverse=True)
        names = list(dict.fromkeys(["id", *columns, *(["weights"] if "copies" in columns else [])]))
        update_numbers = (
            unique_numbers[np.isin(unique_numbers, self._update_numbers)]
            if self.is_update
            else np.empty(0, np.int64)
        )
        base_numbers = np.setdiff1d(unique_numbers, update_numbers)
        parts: list[pa.Table] = []
        if len(base_numbers):
            parts.append(self._base_models(base_numbers, names))
            if self.is_update and "copies" in columns:
                parts[-1] = self._with_current_copies(parts[-1])
        if len(update_numbers):
            parts.append(self._tables.rows("models", names, sql_in("id", update_numbers.tolist())))
        if not parts:
            return self._base.rows("models", names, limit=1).slice(0, 0)
        table = pa.concat_tables(parts)
        if not np.array_equal(table["id"].to_numpy(), unique_numbers):
            table = table.sort_by("id")
            if not np.array_equal(table["id"].to_numpy(), unique_numbers):
                raise self._base.gap_error("models")
        return self._checked(table.take(places))

    def _base_models(self, numbers: npt.NDArray[np.int64], names: Sequence[str]) -> pa.Table:
        """Columns of models of the base, or of a whole generation, by ascending number, removed ones included."""
        if numbers[0] < 0 or numbers[-1] >= self._base_model_count:
            raise self._base.gap_error("models")
        with self._base.reading("models"):
            query = self._base.open("models").take_offsets(numbers.tolist())
            rows = completed(query.select(self._base.present("models", names)).to_arrow(), names)
        self._base.check_rows("models", rows)
        return rows

    @Once
    def _replaced(self) -> npt.NDArray[np.int64]:
        """Numbers of the base's models that were removed, or whose rows the update replaces; ascending."""
        return np.asarray(self._array("replaced.npy", [None], "iu"), np.int64)

    @Once
    def _update_numbers(self) -> npt.NDArray[np.int64]:
        return np.asarray(self._tables.rows("models", ["id"])["id"].to_numpy(), np.int64)

    @Once
    def _removed_weights(self) -> npt.NDArray[np.int64]:
        """Numbers of the base's weights that no model has any more (numbers of other removed models are among them)."""
        return np.setdiff1d(self._replaced, self._update_numbers)

    @Once
    def _counts(self) -> dict[int, int]:
        """Number of models by weights of the base, where it has changed."""
        return {int(weights): int(count) for weights, count in self._array("copies.npy", [None, 2], "iu")}

    def _with_current_copies(self, models: pa.Table) -> pa.Table:
        """Rows of the base's models with the present counts of ``copies``."""
        pairs = zip(values_of(models["weights"], int), values_of(models["copies"], int), strict=True)
        copies = pa.array([self._counts.get(weights, count) for weights, count in pairs], pa.int32())
        return models.set_column(models.column_names.index("copies"), "copies", copies)

    def models(
        self,
        condition: str,
        columns: Sequence[str],
        among: Iterable[int] | None = None,
        limit: int | None = None,
    ) -> dict[str, npt.NDArray[Any]]:
        """Numeric columns of the models that meet an SQL condition, in the order of their numbers, and ``id``.

        Args:
            condition: over ``MODEL_FACTS``.
            columns: names of the columns.
            among: only models with one of these ``weights``.
            limit: at most this many models, in no particular selection.

        Raises:
            QueryError: the condition is not understood; names the columns.
        """
        table = self.models_where(condition, columns, limit, among)
        return {name: table[name].to_numpy() for name in table.column_names}

    def models_where(
        self,
        condition: str | None,
        columns: Sequence[str],
        limit: int | None = None,
        among: Iterable[int] | None = None,
    ) -> pa.Table:
        """The same as a table, of any columns; without a condition, of all models."""
        # In brackets, because Lance parses the first expression only and silently ignores the rest.
        bracketed = None if condition is None else f"({condition}\n)"
        if among is not None:
            bracketed = f"{bracketed or 'true'} AND {sql_in('weights', among)}"
        with self._filter_errors(condition, "models"):
            return self.models_table(columns, bracketed, limit)

    def count_models(self, condition: str) -> int:
        """How many models meet an SQL condition.

        Raises:
            QueryError: the condition is not understood; names the columns.
        """
        bracketed = f"({condition}\n)"
        with self._filter_errors(condition, "models"):
            count = self._base.count("models", bracketed)
            if self.is_update:
                replaced = sql_in("id", self._replaced.tolist())
                count += self._tables.count("models", bracketed) - self._base.count(
                    "models", f"{bracketed} AND {replaced}"
                )
        return count

    def model(self, repo: str) -> dict[str, Any]:
        """The row of one repository's model.

        Raises:
            QueryError: the index does not hold it; the message names similar ones.
        """
        rows = self._models_called(repo, MODELS.names)
        if rows:
            return rows[0]
        raise QueryError(f"the index does not hold {repo!r}{suggestion(self.similar(repo))}")

    def has_model(self, repo: str) -> bool:
        """Whether the index holds a repository."""
        return bool(self._models_called(repo, ["repo"]))

    def _models_called(self, repo: str, columns: Sequence[str]) -> list[dict[str, Any]]:
        if not is_valid_sql_text(repo):
            return []
        rows: list[dict[str, Any]] = self.models_table(
            columns, f"repo = {sql_literal(repo)}", limit=1
        ).to_pylist()
        return rows

    def similar(self, repo: str) -> list[str]:
        """Up to three repositories of models with a similar name."""
        if not is_valid_sql_text(repo):
            return []
        folded = repo.casefold()
        if self.settings.models <= _COMPARED_NAMES:
            condition = None
        else:
            # Assumes that the beginning of the owner's or of the model's name is spelled right.
            owner, _, name = folded.rpartition("/")
            patterns = [f"{owner or name}%", f"%/{name}%", f"%/{name[:4]}%", f"{(owner or name)[:4]}%"]
            condition = " OR ".join(f"lower(repo) LIKE {sql_literal(start)}" for start in patterns)
        table = self.models_table(["repo"], condition, limit=_COMPARED_NAMES)
        repos = [str(name) for name in table["repo"].to_pylist()]
        same_names = [
            name for name in repos if folded in (name.casefold(), name.casefold().rpartition("/")[2])
        ]
        return (list(dict.fromkeys(same_names)) or difflib.get_close_matches(repo, repos, n=3, cutoff=0.5))[
            :3
        ]

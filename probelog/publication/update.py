"""Writes a generation that is an *update* of a whole one, its base: models that were added, models that were removed.

Its cost follows from the changes since the base, not from the base: none of the base's tables is copied, and of its
models only those are looked up that share their weights with an added or removed one. Probes, background, encoder,
basis and vector index stay the base's. An update lists *all* changes since its base, so that no generation depends on
more than one other.

The format (the reader is `probelog.index.generation.Generation`):

- The rows of its ``models`` and ``logits`` tables continue the base's numbers.
- ``replaced.npy`` in its ``meta`` lists the base's models that are no longer valid. One that is listed and has a row in
  the update's ``models`` is replaced by that row.
- The first model with some weights gives them their number. When it is removed and a copy remains, the copy takes its
  number.
- Weights whose number is listed without a new row belong to no model: their logits are skipped.
- ``copies.npy`` holds the present number of models of some of the base's weights, where it has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.arrays import values_of
from probelog.index.generation import Generation
from probelog.index.schema import MODELS
from probelog.index.settings import UpdateBase
from probelog.index.tables import sql_in
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.rows import (
    LogitBatch,
    Numbering,
    RowEncoder,
    TableSummary,
    logit_tables,
    same_weights,
)
from probelog.ranking.matched_heads import Background
from probelog.storage.encoding import npy

# Values of one SQL condition.
_AT_ONCE = 500

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Changes:
    """The changes since the base.

    Attributes:
        models: facts of the M models that were added (``MODEL_FACTS``, but for ``copies``).
        identities: (M,) keys, equal for models with the same logits, here as in the base.
        removed: numbers of the base's models that are no longer valid: removed, or at another commit now.
    """

    models: pa.Table
    identities: Sequence[str]
    removed: Int64


def write_update(
    writer: GenerationWriter, base: Generation, changes: Changes, batches: Iterable[LogitBatch]
) -> TableSummary:
    """Write ``logits`` and ``models`` of an update.

    Args:
        writer: of a generation that has neither table yet.
        base: the whole generation that is updated.
        changes: since the base.
        batches: the logits of the added models, numbered from 0 as these are; the logits of one model follow each
            other. Those that the base holds, or that were written before, are skipped.

    Raises:
        ValueError: the base is an update itself.
    """
    if base.is_update:
        raise ValueError(f"{base.pointer.generation} is an update itself")
    added_models = _AddedModels(base, changes)
    local = Numbering(same_weights(changes.identities))
    background = Background(base.space.background, base.sharpness)
    encoder = RowEncoder(base.basis, background, base.settings.probes)
    rows = writer.write(
        "logits",
        encoder.schema,
        logit_tables(
            _without_known(batches, added_models.known),
            encoder,
            local,
            first_row=base.size,
            weights=added_models.ids,
        ),
    )
    table = added_models.table(local)
    writer.write("models", MODELS, [table])
    removed = added_models.removed
    logits = sum(added_models.rows_of(number) for number in values_of(removed["weights"], int))
    settings = {
        "rows": base.size + rows,
        "models": base.settings.models - removed.num_rows + changes.models.num_rows,
        "base": UpdateBase(base.pointer.generation, base.settings.models, base.size),
    }
    meta = {"replaced.npy": npy(added_models.replaced), "copies.npy": npy(added_models.copies)}
    added = added_models.logits(local)
    return TableSummary(base.settings.logits - logits + added, rows, settings, meta)


def _without_known(batches: Iterable[LogitBatch], known: npt.NDArray[np.bool_]) -> Iterator[LogitBatch]:
    """Batches without the logits of the models that are ``known`` (M,)."""
    for batch in batches:
        unknown = ~known[batch.model]
        if unknown.any():
            yield batch.at(unknown)


class _AddedModels:
    """The M added models with their numbers, and the changes among the base's models.

    Attributes:
        removed: the base's models that are no longer valid: columns ``id`` and ``weights``.
        ids: (M,) numbers of the added models.
        known: (M,) whether a model has the same logits as a model of the base, removed or not.
        replaced: numbers of the base's models that the reader must skip, ascending.
        copies: (w, 2) weights of the base and their present number of models, where it has changed.
    """

    def __init__(self, base: Generation, changes: Changes) -> None:
        self._base, self._changes = base, changes
        self.removed = base.take_models(np.unique(changes.removed), ["weights"])
        same = self._weights_of(changes.identities)
        self.known = np.array([identity in same for identity in changes.identities], bool)
        # Facts of the base's weights that an added or removed model has, by number.
        concerned = sorted({*values_of(self.removed["weights"], int), *same.values()})
        rows = base.take_models(concerned, ["first_row", "rows", "copies"]).to_pylist()
        self._groups: dict[int, dict[str, Any]] = {int(row["id"]): row for row in rows}

        removed = set(values_of(self.removed["id"], int))
        vacant = [number for number in self._groups if number in removed]
        heirs = self._remaining_copies(vacant, removed)
        self._heirs = {number: heir for number, heir in heirs.items() if heir is not None}
        free = {number for number in vacant if number not in self._heirs}
        following = base.settings.models
        ids = []
        for identity in changes.identities:
            number = same.get(identity)
            if number is not None and number in free:
                free.discard(number)
                ids.append(number)
            else:
                ids.append(following)
                following += 1
        self.ids = np.asarray(ids, np.int64)
        self._weights_known = [same.get(identity) for identity in changes.identities]
        self.replaced = np.asarray(sorted({*removed, *self._heirs.values()}), np.int64)

        counts = {number: int(row["copies"]) for number, row in self._groups.items()}
        for number in values_of(self.removed["weights"], int):
            counts[number] -= 1
        for known in self._weights_known:
            if known is not None:
                counts[known] += 1
        self._counts = counts
        changed = [(n, count) for n, count in counts.items() if count != self._groups[n]["copies"]]
        self.copies = np.asarray(changed, np.int64).reshape(-1, 2)

    def rows_of(self, weights: int) -> int:
        """Number of rows of logits of some weights of the base that an added or removed model has."""
        return int(self._groups[weights]["rows"])

    def logits(self, local: Numbering) -> int:
        """Number of logits of all added models."""
        _, rows = self._places(local)
        return int(rows.sum())

    def table(self, local: Numbering) -> pa.Table:
        """The ``models`` table: the added models, and those of the base that get another number."""
        first, rows = self._places(local)
        weights = self._weights(local)
        local_copies = np.bincount(local.weights, minlength=len(local.weights))[local.weights]
        copies = [
            local_copies[number] if known is None else self._counts[known]
            for number, known in enumerate(self._weights_known)
        ]
        columns: dict[str, npt.NDArray[np.generic] | Sequence[object]] = {
            "id": self.ids,
            "weights": weights,
            "first_row": first,
            "rows": rows,
            "identity": self._changes.identities,
            "copies": copies,
        }
        table = self._changes.models
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, MODELS.field(name).type))
        parts = [table.select(MODELS.names).cast(MODELS)]
        if self._heirs:
            names = [name for name in MODELS.names if name != "id"]
            heirs = self._base.take_models([*self._heirs.values()], names).select(MODELS.names)
            heirs = heirs.set_column(0, "id", pa.array([*self._heirs], pa.int32()))
            counted = pa.array([self._counts[number] for number in self._heirs], pa.int32())
            parts.append(heirs.set_column(MODELS.names.index("copies"), "copies", counted).cast(MODELS))
        return pa.concat_tables(parts)

    def _weights(self, local: Numbering) -> Int64:
        """Numbers of the added models' weights: (M,)."""
        numbers = self.ids[local.weights]
        weights = [numbers[n] if number is None else number for n, number in enumerate(self._weights_known)]
        return np.asarray(weights, np.int64)

    def _places(self, local: Numbering) -> tuple[Int64, Int64]:
        """First row (M,) of each added model, and its number of rows (M,)."""
        first, rows = (np.asarray(values, np.int64) for values in local.places)
        first = first + self._base.size
        for place, number in enumerate(self._weights_known):
            if number is not None:
                first[place], rows[place] = (self._groups[number][name] for name in ("first_row", "rows"))
        return first, rows

    def _weights_of(self, identities: Sequence[str]) -> dict[str, int]:
        """Numbers of the base's weights by identity; those of removed models are among them."""
        rows = self._base.models_named("identity", identities, ["identity", "weights"])
        return {row["identity"]: int(row["weights"]) for row in rows}

    def _remaining_copies(self, weights: Sequence[int], removed: set[int]) -> dict[int, int | None]:
        """For some weights the first of the base's models that has them and was not removed; None without one."""
        copies: dict[int, int | None] = dict.fromkeys(weights)
        copied = [number for number in weights if self._groups[number]["copies"] > 1]
        for start in range(0, len(copied), _AT_ONCE):
            rows = self._base.models_table(["weights"], sql_in("weights", copied[start : start + _AT_ONCE]))
            for row in rows.to_pylist():
                if row["id"] not in removed and copies[row["weights"]] is None:
                    copies[row["weights"]] = int(row["id"])
        return copies

"""Writes a generation that is an *update* of a whole one, its base: models that came, models that are gone.

What it costs follows from what has changed since the base, not from the base: none of the base's tables is copied, and
of its models only those are looked up that share their weights with one that came or went. Probes, background,
encoder, basis and vector index stay the base's. An update lists *all* changes since its base, so that no generation
rests on more than one other.

How it is told (the reader is `probelog.index.generation.Generation`):

- The rows of its ``models`` and ``logits`` tables go on with the base's numbers.
- ``replaced.npy`` in its ``meta`` lists the base's models that do not count any more. One that is listed and has a row
  in the update's ``models`` was written anew there.
- The first model with some weights gives them their number. When it goes and a copy stays, the copy takes its number.
- Weights whose number is listed and not written anew belong to nobody: their logits are passed over.
- ``copies.npy`` holds how many models some of the base's weights have now, where that has changed.
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
from probelog.index.schema import MODELS, logits_schema
from probelog.index.settings import UpdateBase
from probelog.index.tables import sql_in
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.rows import LogitBatch, Numbering, Written, logit_tables, same_weights
from probelog.ranking.matched_heads import Background
from probelog.storage.encoding import npy

# Values of one SQL condition.
_AT_ONCE = 500

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Changes:
    """What has changed since the base.

    Attributes:
        models: facts of the M models that came (``MODEL_FACTS``, but for ``copies``).
        identities: for each, equal for models with the same logits, here as in the base.
        gone: numbers of the base's models that do not count any more: removed, or at another commit now.
    """

    models: pa.Table
    identities: Sequence[str]
    gone: Int64


def write_update(
    writer: GenerationWriter, base: Generation, changes: Changes, batches: Iterable[LogitBatch]
) -> Written:
    """Write ``logits`` and ``models`` of an update.

    Args:
        writer: of a generation that holds none of them.
        base: the whole generation that it updates.
        changes: since the base.
        batches: the logits of the models that came, numbered from 0 as these are; a model's follow each other. Those
            with logits that the base holds, or that were met before, are passed over.

    Raises:
        ValueError: the base is an update itself.
    """
    if base.is_update:
        raise ValueError(f"{base.pointer.generation} is an update itself")
    came = _Came(base, changes)
    local = Numbering(same_weights(changes.identities))
    background = Background(base.space.background, base.sharpness)
    probes = base.settings.probes
    rows = writer.write(
        "logits",
        logits_schema(base.basis, probes),
        logit_tables(
            _without(batches, came.known),
            background,
            base.basis,
            local,
            probes,
            first_row=base.size,
            weights=came.ids,
        ),
    )
    table = came.table(local)
    writer.write("models", MODELS, [table])
    gone = came.gone
    logits = sum(came.rows_of(number) for number in values_of(gone["weights"], int))
    settings = {
        "rows": base.size + rows,
        "models": base.settings.models - gone.num_rows + changes.models.num_rows,
        "base": UpdateBase(base.pointer.generation, base.settings.models, base.size),
    }
    meta = {"replaced.npy": npy(came.replaced), "copies.npy": npy(came.copies)}
    added = came.logits(local)
    return Written(base.settings.logits - logits + added, rows, settings, meta)


def _without(batches: Iterable[LogitBatch], known: npt.NDArray[np.bool_]) -> Iterator[LogitBatch]:
    """Batches without the logits of some models."""
    for batch in batches:
        kept = ~known[batch.model]
        if kept.any():
            yield LogitBatch(*(values[kept] for values in batch))


class _Came:
    """The models that came, each with its number, and what changes among the base's.

    Attributes:
        gone: the base's models that do not count any more: ``id``, ``weights``.
        ids: (M,) numbers of those that came.
        known: (M,) which have the same logits as some model of the base, gone or not.
        replaced: numbers of the base's models that the reader is to pass over, ascending.
        copies: (w, 2) weights of the base and how many models have them, where that has changed.
    """

    def __init__(self, base: Generation, changes: Changes) -> None:
        self._base, self._changes = base, changes
        self.gone = base.take_models(np.unique(changes.gone), ["weights"])
        same = self._weights_of(changes.identities)
        self.known = np.array([identity in same for identity in changes.identities], bool)
        # Facts of all weights of the base that are concerned, by number.
        concerned = sorted({*values_of(self.gone["weights"], int), *same.values()})
        rows = base.take_models(concerned, ["first_row", "rows", "copies"]).to_pylist()
        self._groups: dict[int, dict[str, Any]] = {int(row["id"]): row for row in rows}

        gone = set(values_of(self.gone["id"], int))
        vacant = [number for number in self._groups if number in gone]
        heirs = self._living_copies(vacant, gone)
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
        self.replaced = np.asarray(sorted({*gone, *self._heirs.values()}), np.int64)

        counts = {number: int(row["copies"]) for number, row in self._groups.items()}
        for number in values_of(self.gone["weights"], int):
            counts[number] -= 1
        for known in self._weights_known:
            if known is not None:
                counts[known] += 1
        self._counts = counts
        changed = [(n, count) for n, count in counts.items() if count != self._groups[n]["copies"]]
        self.copies = np.asarray(changed, np.int64).reshape(-1, 2)

    def rows_of(self, weights: int) -> int:
        """How many rows of logits some of the concerned weights of the base have."""
        return int(self._groups[weights]["rows"])

    def logits(self, local: Numbering) -> int:
        """Logits of all models that came."""
        _, rows = self._places(local)
        return int(rows.sum())

    def table(self, local: Numbering) -> pa.Table:
        """The ``models`` table: those that came, and the base's that took another number."""
        first, rows = self._places(local)
        weights = self._weights(local)
        own = np.bincount(local.weights, minlength=len(local.weights))[local.weights]
        copies = [
            own[number] if known is None else self._counts[known]
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
        """The weights' numbers of those that came: (M,)."""
        own = self.ids[local.weights]
        known = [own[n] if number is None else number for n, number in enumerate(self._weights_known)]
        return np.asarray(known, np.int64)

    def _places(self, local: Numbering) -> tuple[Int64, Int64]:
        """First rows (M,) of those that came, and how many rows each has (M,)."""
        first, rows = (np.asarray(values, np.int64) for values in local.places)
        first = first + self._base.size
        for place, number in enumerate(self._weights_known):
            if number is not None:
                first[place], rows[place] = (self._groups[number][name] for name in ("first_row", "rows"))
        return first, rows

    def _weights_of(self, identities: Sequence[str]) -> dict[str, int]:
        """Which weights of the base, those of models that are gone among them, some identities mean."""
        rows = self._base.models_named("identity", identities, ["identity", "weights"])
        return {row["identity"]: int(row["weights"]) for row in rows}

    def _living_copies(self, weights: Sequence[int], gone: set[int]) -> dict[int, int | None]:
        """For some weights the first of the base's models that has them and is not gone."""
        found: dict[int, int | None] = dict.fromkeys(weights)
        copied = [number for number in weights if self._groups[number]["copies"] > 1]
        for start in range(0, len(copied), _AT_ONCE):
            rows = self._base.models_table(["weights"], sql_in("weights", copied[start : start + _AT_ONCE]))
            for row in rows.to_pylist():
                if row["id"] not in gone and found[row["weights"]] is None:
                    found[row["weights"]] = int(row["id"])
        return found

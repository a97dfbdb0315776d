"""The descriptors of probed models, read part by part for whoever publishes or checks them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.errors import StoreError
from probelog.publication.rows import LogitBatch
from probelog.storage.encoding import digest
from probelog.storage.ledger import Receipt
from probelog.storage.parquet_parts import Part, read_part
from probelog.storage.schemas import DESCRIPTORS, PROBED_MODELS, Head, ProbedModel, from_table
from probelog.storage.store import Store

Key = tuple[str, int, bool]
"""What a hit is known by: repository, logit, whether it is the opposite of a one-logit head's concept."""


def same_logits(model: ProbedModel) -> str:
    """Equal for models with the same logits, which an index stores once: as the first one described has them."""
    # Not the weights alone: somebody's copy with other preprocessing must not stand for the original.
    return model.identity or model.weight_digest or f"{model.repo}@{model.sha}"


def drawn(model: ProbedModel, share: float) -> bool:
    """Whether a model is among a share of all, which is the same every time: by a hash of its repository's name."""
    return int(digest(model.repo.encode())[:8], 16) < share * 2**32


@dataclass(frozen=True)
class ModelDescriptors:
    """One model's logits as its descriptors say.

    Attributes:
        model: its facts.
        number: its place among the models that were asked for.
        logits: (L,) places in its head. A one-logit head stands for two concepts: the logit and its opposite.
        negated: (L,) which are the opposite.
        directions: (L, d).
        probes: (L, r) that fire them most, descending.
    """

    model: ProbedModel
    number: int
    logits: npt.NDArray[np.integer[Any]]
    negated: npt.NDArray[np.bool_]
    directions: npt.NDArray[np.float32]
    probes: npt.NDArray[np.integer[Any]]

    def place(self, key: Key) -> int | None:
        """Which of the rows a hit means."""
        rows = zip(self.logits.tolist(), self.negated.tolist(), strict=True)
        return next((place for place, row in enumerate(rows) if row == key[1:]), None)

    def fold(self, place: int) -> Key:
        """Equal for the same output of the same weights."""
        return same_logits(self.model), int(self.logits[place]), bool(self.negated[place])

    def batch(self) -> LogitBatch:
        """For the index's writer."""
        numbers = np.full(len(self.logits), self.number)
        return LogitBatch(numbers, self.logits, self.negated, self.directions, self.probes)


@dataclass(frozen=True)
class Descriptors:
    """Descriptors of some models.

    Attributes:
        store: where they lie.
        receipts: of the models that were probed.
        parts: the descriptors of each receipt's models, by its name.
        models: those that are asked for, in their order.
    """

    store: Store
    receipts: Sequence[Receipt]
    parts: Mapping[str, Part]
    models: Sequence[ProbedModel]

    @cached_property
    def numbers(self) -> dict[tuple[str, str], int]:
        """The models' places, by repository and commit."""
        return {(model.repo, model.sha): number for number, model in enumerate(self.models)}

    def stream(self, receipts: Sequence[Receipt] | None = None) -> Iterator[ModelDescriptors]:
        """Every model that is asked for, or those of some receipts. One all of whose logits are constant has none.

        Raises:
            StoreError: a part is damaged, or is not that of its receipt.
        """
        for receipt in self.receipts if receipts is None else receipts:
            part = self.parts[receipt.name]
            table = read_part(self.store, part, DESCRIPTORS)
            owners = list(zip(table["repo"].to_pylist(), table["sha"].to_pylist(), strict=True))
            start = 0
            for model in from_table(read_part(self.store, receipt.models, PROBED_MODELS), ProbedModel):
                stop = start
                while stop < len(owners) and owners[stop] == (model.repo, model.sha):
                    stop += 1
                rows = table.slice(start, stop - start)
                start = stop
                number = self.numbers.get((model.repo, model.sha))
                if rows.num_rows and number is not None:
                    yield _described(model, number, rows)
            if start != len(owners):
                raise StoreError(
                    f"{self.store.path(part.path)} holds logits that its receipt does not speak of"
                )

    def some_directions(self, count: int) -> npt.NDArray[np.float32]:
        """Directions (S, d) of about ``count`` logits, or of all: of models from everywhere."""
        sample: list[npt.NDArray[np.float32]] = []
        found = 0
        receipts = [*self.receipts]
        random.Random(0).shuffle(receipts)  # noqa: S311 - a draw, not a secret
        for described in self.stream(receipts):
            sample.append(described.directions)
            found += len(sample[-1])
            if found >= count:
                break
        directions = np.concatenate(sample)
        # What is not finite would spoil all; the checks say whose it is.
        return directions[np.isfinite(directions).all(axis=1)]


def distinct(described: Iterable[ModelDescriptors]) -> Iterator[ModelDescriptors]:
    """The first of all models with the same logits: theirs are those that an index keeps."""
    seen: set[str] = set()
    for item in described:
        key = same_logits(item.model)
        if key not in seen:
            seen.add(key)
            yield item


def some_logits(
    described: Iterable[ModelDescriptors], models: int, count: int
) -> Iterator[tuple[ModelDescriptors, int]]:
    """At most ``count`` logits of distinct models from everywhere, to be asked for: a model and a place in it.

    Args:
        described: the models, of which there are ``models``.
        models: how many.
        count: about how many are drawn, the first one whatever its hash.
    """
    share, taken = min(1.0, count / max(1, models)), 0
    for item in distinct(described):
        if taken and not drawn(item.model, share):
            continue
        place = len(item.negated) // 2
        if item.negated[place]:
            continue
        taken += 1
        yield item, place
        if taken >= count:
            return


def _described(model: ProbedModel, number: int, rows: pa.Table) -> ModelDescriptors:
    logits = rows["logit"].to_numpy()
    negated = np.zeros(len(logits), bool)
    directions, probes = _lists(rows["direction"]), _lists(rows["top_probes"])
    if model.head == Head.SINGLE:
        logits = np.concatenate([logits, logits])
        negated = np.concatenate([negated, ~negated])
        directions = np.concatenate([directions, _lists(rows["opposite_direction"])])
        probes = np.concatenate([probes, _lists(rows["bottom_probes"])])
    return ModelDescriptors(model, number, logits, negated, directions.astype(np.float32), probes)


def _lists(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A column of equally long lists as a matrix."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat.reshape(len(column), -1))

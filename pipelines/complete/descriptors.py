"""The descriptors of probed models, read part by part for whoever publishes or checks them."""

from __future__ import annotations

import random
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from probelog.arrays import Column
from probelog.errors import StoreError
from probelog.publication.rows import Ends, LogitBatch, evidence_of
from probelog.storage.encoding import digest
from probelog.storage.ledger import Receipt
from probelog.storage.parquet_parts import Part, read_part
from probelog.storage.schemas import DESCRIPTORS, PROBED_MODELS, Head, ProbedModel, from_table
from probelog.storage.store import Store

# Of some hundred thousand logits.
_KEPT_BYTES = 1 << 30

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
        evidence: (L,) what is known of these probes and of the weakest (`probelog.index.schema.EVIDENCE`).
    """

    model: ProbedModel
    number: int
    logits: npt.NDArray[np.integer[Any]]
    negated: npt.NDArray[np.bool_]
    directions: npt.NDArray[np.float32]
    probes: npt.NDArray[np.integer[Any]]
    evidence: npt.NDArray[np.void]

    @property
    def middle(self) -> int:
        """The row that stands for the model where one is asked for."""
        return len(self.logits) // 2

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
        return LogitBatch(numbers, self.logits, self.negated, self.directions, self.probes, self.evidence)


class Descriptors:
    """Descriptors of some models. A part is in memory while it is read, and one that was kept until the next stream.

    Args:
        store: where they lie.
        receipts: of the models that were probed.
        parts: the descriptors of each receipt's models, by its name.
        models: those that are asked for, in their order.
        read: descriptors of some of the receipts, whose kept parts serve for these, too.
    """

    def __init__(
        self,
        store: Store,
        receipts: Sequence[Receipt],
        parts: Mapping[str, Part],
        models: Sequence[ProbedModel],
        read: Descriptors | None = None,
    ) -> None:
        self.store = store
        self.receipts = receipts
        self.models = models
        self._parts = parts
        self._numbers = {(model.repo, model.sha): number for number, model in enumerate(models)}
        self._kept: dict[str, _DescribedPart] = {} if read is None else read._kept

    def stream(self, keep: bool = False) -> Iterator[ModelDescriptors]:
        """Every model that is asked for. One all of whose logits are constant has none.

        Args:
            keep: whether the next stream need not read again what fits into ``_KEPT_BYTES``.

        Raises:
            StoreError: a part is damaged, or is not that of its receipt.
        """
        for receipt in self.receipts:
            part = self._kept.pop(receipt.name, None) or self._read(receipt)
            if keep and part.rows.nbytes + sum(one.rows.nbytes for one in self._kept.values()) <= _KEPT_BYTES:
                self._kept[receipt.name] = part
            yield from self._models(part)

    def sample_directions(self, count: int) -> npt.NDArray[np.float32]:
        """Directions (S, d) of about ``count`` logits, or of all: of models from everywhere."""
        sample: list[npt.NDArray[np.float32]] = []
        sampled = 0
        receipts = [*self.receipts]
        random.Random(0).shuffle(receipts)  # noqa: S311 - a draw, not a secret
        for receipt in receipts:
            part = self._kept.get(receipt.name) or self._read(receipt)
            self._kept[receipt.name] = part
            for described in self._models(part):
                sample.append(described.directions)
                sampled += len(sample[-1])
                if sampled >= count:
                    break
            if sampled >= count:
                break
        directions = np.concatenate(sample)
        # What is not finite would spoil all; the checks say whose it is.
        return directions[np.isfinite(directions).all(axis=1)]

    def _read(self, receipt: Receipt) -> _DescribedPart:
        part = self._parts[receipt.name]
        rows = read_part(self.store, part, DESCRIPTORS)
        models = from_table(read_part(self.store, receipt.models, PROBED_MODELS), ProbedModel)
        return _DescribedPart(self.store.path(part.path), rows, models)

    def _models(self, part: _DescribedPart) -> Iterator[ModelDescriptors]:
        owners = list(zip(part.rows["repo"].to_pylist(), part.rows["sha"].to_pylist(), strict=True))
        start = 0
        for model in part.models:
            stop = start
            while stop < len(owners) and owners[stop] == (model.repo, model.sha):
                stop += 1
            rows = part.rows.slice(start, stop - start)
            start = stop
            number = self._numbers.get((model.repo, model.sha))
            if rows.num_rows and number is not None:
                yield _described(model, number, rows)
        if start != len(owners):
            raise StoreError(f"{part.path} holds logits that its receipt does not speak of")


@dataclass(frozen=True)
class _DescribedPart:
    """One part in memory.

    Attributes:
        path: its full address.
        rows: the descriptors, a model's beside each other.
        models: of its receipt, in their order.
    """

    path: str
    rows: pa.Table
    models: Sequence[ProbedModel]


class Eligible:
    """Tells which models of a part of the stream a sample of the whole stream may hold.

    Args:
        share: the largest share of models that is drawn (`drawn`).
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._first = self._first_named = True

    def __call__(self, described: ModelDescriptors) -> bool:
        """Whether it is drawn, or first: a sample starts with the first of all models, or of those with a name."""
        named = not described.negated[described.middle]
        first = self._first or (named and self._first_named)
        self._first, self._first_named = False, self._first_named and not named
        return first or drawn(described.model, self._share)


def distinct(described: Iterable[ModelDescriptors]) -> Iterator[ModelDescriptors]:
    """The first of all models with the same logits: theirs are those that an index keeps."""
    seen: set[str] = set()
    for item in described:
        key = same_logits(item.model)
        if key not in seen:
            seen.add(key)
            yield item


@dataclass(frozen=True)
class SampledLogit:
    """One logit that the checks ask for by its direction.

    Attributes:
        name: ``OWNER/NAME#LOGIT``.
        key: what copies of the same weights share (`ModelDescriptors.fold`).
        direction: (d,).
    """

    name: str
    key: Key
    direction: npt.NDArray[np.float64]


class DescriptorSummary:
    """What a stream of descriptors held: noted while they are written, so that the checks need not read them for it.

    Args:
        models: how many are streamed.
        samples: about how many logits of distinct models from everywhere are noted.
        passed_over: what models share their logits by (`same_logits`), of which none is noted.

    Attributes:
        logits: how many each model has, by its number, in the order of the stream.
        samples: the noted ones; the first model is among them whatever its hash.
        share: of the models that are noted.
    """

    def __init__(self, models: int, samples: int, passed_over: Container[str] = ()) -> None:
        self.logits: dict[int, int] = {}
        self.samples: list[SampledLogit] = []
        self._count = samples
        self.share = min(1.0, samples / max(1, models))
        self._passed_over = passed_over
        self._seen: set[str] = set()

    def of(self, stream: Iterable[ModelDescriptors]) -> Iterator[ModelDescriptors]:
        """The same stream, noted as it passes."""
        for described in stream:
            self.note(described.model, described.number, len(described.logits), described)
            yield described

    def note(self, model: ProbedModel, number: int, logits: int, described: ModelDescriptors | None) -> None:
        """Note the next model of the stream; ``described`` may be None where it is not `Eligible`."""
        self.logits.setdefault(number, logits)
        key = same_logits(model)
        if len(self.samples) == self._count or key in self._seen or key in self._passed_over:
            return
        self._seen.add(key)
        if described is None or (self.samples and not drawn(model, self.share)):
            return
        place = described.middle
        if described.negated[place]:
            return
        name = f"{model.repo}#{described.logits[place]}"
        direction = described.directions[place].astype(np.float64)
        self.samples.append(SampledLogit(name, described.fold(place), direction))


def _described(model: ProbedModel, number: int, rows: pa.Table) -> ModelDescriptors:
    logits = rows["logit"].to_numpy()
    negated = np.zeros(len(logits), bool)
    directions, top = _lists(rows["direction"]), _ends(rows, "top")
    # Parts of older versions do not have the weakest.
    weakest = _ends(rows, "weakest") if "weakest_probes" in rows.column_names else None
    seen = np.asarray(model.probes, np.int64)
    probes, evidence = top.probes, evidence_of(seen, top, weakest)
    if model.head == Head.SINGLE:
        bottom = _ends(rows, "bottom")
        logits = np.concatenate([logits, logits])
        negated = np.concatenate([negated, ~negated])
        directions = np.concatenate([directions, _lists(rows["opposite_direction"])])
        probes = np.concatenate([probes, bottom.probes])
        opposite = evidence_of(seen, Ends(bottom.probes, -bottom.values), Ends(top.probes, -top.values))
        evidence = np.concatenate([evidence, opposite])
    return ModelDescriptors(model, number, logits, negated, directions.astype(np.float32), probes, evidence)


def _ends(rows: pa.Table, name: str) -> Ends:
    """Probes at one end of each logit."""
    return Ends(_lists(rows[f"{name}_probes"]), _lists(rows[f"{name}_values"]))


def _lists(column: Column) -> npt.NDArray[Any]:
    """A column of equally long lists as a matrix."""
    flat = pc.list_flatten(column.combine_chunks()).to_numpy(zero_copy_only=False)
    return np.asarray(flat.reshape(len(column), -1))

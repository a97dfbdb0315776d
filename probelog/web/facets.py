"""How many models have each licence, library, size and so on, among those that meet the other filters of a search."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from probelog.web.question import CLASSIFIER, DOWNLOADS, FACETS, SIZES, TEXT_FACETS, UNKNOWN

if TYPE_CHECKING:
    from probelog.search.client import Index

# Values of one facet that are shown, those that were chosen besides.
_SHOWN = 8

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Value:
    """One value of a facet: as an address has it, as people read it, and the number of models."""

    key: str
    title: str
    count: int
    chosen: bool


@dataclass(frozen=True)
class Facet:
    """The commonest values of one facet, those that were chosen among them; ``more`` others are not shown."""

    name: str
    values: list[Value]
    more: int


class Facets:
    """Counts over the models of one index, of whichever generation answers. Safe to share between threads."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._counted: dict[str, _Models] = {}

    def counts(self, filters: Sequence[tuple[str, str]], kind: str = CLASSIFIER) -> tuple[list[Facet], int]:
        """The facets of a kind of models under some filters, and the number of models that meet all of them."""
        models = self._models(kind)
        masks = {name: models.mask(name, [v for n, v in filters if n == name]) for name, _ in filters}
        everything = np.ones(models.count, bool)
        facets = []
        for name in FACETS[kind]:
            mask = everything
            for other, met in masks.items():
                if other != name:
                    mask = mask & met
            facets.append(models.facet(name, mask, [v for n, v in filters if n == name]))
        for met in masks.values():
            everything = everything & met
        return facets, int(everything.sum())

    def _models(self, kind: str) -> _Models:
        generation = self._index.generation
        with self._lock:
            models = self._counted.get(kind)
            if models is None or models.generation != generation:
                models = self._counted[kind] = _Models(generation, kind, _columns(self._index, kind))
            return models


class _Models:
    """The facts of all models as numbers: four bytes for each of them and each facet."""

    def __init__(self, generation: str, kind: str, columns: pa.Table) -> None:
        self.generation = generation
        self.count = columns.num_rows
        self._names: dict[str, list[str]] = {}
        self._codes: dict[str, npt.NDArray[np.int32]] = {}
        for name in TEXT_FACETS[kind]:
            encoded: Any = columns[name].combine_chunks().dictionary_encode()
            if isinstance(encoded, pa.ChunkedArray):
                encoded = encoded.combine_chunks()
            self._names[name] = [*encoded.dictionary.to_pylist(), UNKNOWN]
            codes = pc.fill_null(encoded.indices, len(encoded.dictionary))
            self._codes[name] = np.asarray(codes.to_numpy(zero_copy_only=False), np.int32)
        years: Any = pc.year(columns["created_at"])
        self._years = np.asarray(years.fill_null(0).to_numpy(), np.int32)
        self._numbers: dict[str, npt.NDArray[np.int64]] = {}
        for name, column in (("size", "parameters"), ("downloads", "downloads")):
            numbers: Any = columns[column]
            self._numbers[name] = np.asarray(numbers.cast(pa.int64()).fill_null(-1).to_numpy(), np.int64)

    def mask(self, name: str, values: Sequence[str]) -> Mask:
        """Which models have one of some values of a facet."""
        met = np.zeros(self.count, bool)
        for value in values:
            met |= self._has(name, value)
        return met

    def _has(self, name: str, value: str) -> Mask:
        if name in self._names:
            names = self._names[name]
            # A licence that is called "unknown" is one that nobody knows.
            return np.isin(self._codes[name], [i for i, known in enumerate(names) if known == value])
        if name == "created":
            return np.asarray(self._years == (0 if value == UNKNOWN else int(value)))
        numbers = self._numbers[name]
        if value == UNKNOWN:
            return np.asarray(numbers < 0)
        least, bound = next(bucket[2:] for bucket in _buckets(name) if bucket[0] == value)
        return np.asarray((numbers >= least) & (numbers < bound))

    def facet(self, name: str, mask: Mask, chosen: Sequence[str]) -> Facet:
        """One facet's values among the models of a mask."""
        if name in ("size", "downloads"):
            values = [
                Value(key, title, int((self._has(name, key) & mask).sum()), key in chosen)
                for key, title in [*(bucket[:2] for bucket in _buckets(name)), (UNKNOWN, UNKNOWN)]
            ]
            return Facet(name, [value for value in values if value.count or value.chosen], 0)
        if name == "created":
            years, counts = np.unique(self._years[mask], return_counts=True)
            found = {
                str(year) if year else UNKNOWN: int(count) for year, count in zip(years, counts, strict=True)
            }
            order = sorted(found, key=lambda key: (key != UNKNOWN, key), reverse=True)
        else:
            found = {}
            counted = np.bincount(self._codes[name][mask], minlength=len(self._names[name]))
            most = np.argsort(-counted, kind="stable")[: _SHOWN + 2]
            for code in most:
                if counted[code]:
                    key = self._names[name][code]
                    found[key] = found.get(key, 0) + int(counted[code])
            for key in chosen:
                found.setdefault(key, int((self._has(name, key) & mask).sum()))
            order = [*found]
        shown = [key for i, key in enumerate(order) if i < _SHOWN or key in chosen]
        total = int((counts > 0).sum()) if name == "created" else int((counted > 0).sum())
        return Facet(
            name,
            [Value(key, key, found.get(key, 0), key in chosen) for key in shown],
            max(0, total - len(shown)),
        )


def _buckets(name: str) -> Sequence[tuple[str, str, int, int]]:
    return SIZES if name == "size" else DOWNLOADS


def _columns(index: Index, kind: str) -> pa.Table:
    table = index.models if kind == CLASSIFIER else index.generators
    return table(columns=[*TEXT_FACETS[kind], "parameters", "downloads", "created_at"])

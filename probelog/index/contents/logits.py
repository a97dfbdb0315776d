"""The logits of a generation, and what is known of the probes that fire them.

The logits of a small index (below ``shortlist.EXACT_LOGITS``) are read into memory once. A large index holds nothing in
memory whose size grows with it: logits are taken from the table as a query needs them, or streamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.index import shortlist
from probelog.index.arrow import structured
from probelog.index.basis import BYTES, Basis, EncodedDirections
from probelog.index.contents.models import ModelTable
from probelog.index.contents.opened import Once
from probelog.index.schema import EVIDENCE, WEAKEST_PROBES, logit_facts
from probelog.index.tables import Tables
from probelog.ranking.matched_heads import Float64

# Logits that are read and scored at a time: 8,192 in 512 dimensions are 17 MB.
ROWS_AT_ONCE = 8192
# Numbers of a direction.
_MOST_DIMENSIONS = 1 << 16


@dataclass(frozen=True, eq=False)
class Logits:
    """n logits of an index.

    Attributes:
        rows: (n,) rows in the ``logits`` table.
        weights: (n,) number of the first model with the weights that the logit belongs to.
        logit: (n,) position in the model's head.
        negated: (n,) whether it is the opposite of a one-logit head's concept.
        offsets: (n,) over the whole background (docs/method.md).
        coordinates: (n, p) directions in the index's basis (``probelog.index.basis``), unit vectors.
        probes: (n, r) numbers of the probes that fire the logit most, descending.
    """

    rows: npt.NDArray[np.int64]
    weights: npt.NDArray[np.int32]
    logit: npt.NDArray[np.int32]
    negated: npt.NDArray[np.bool_]
    offsets: Float64
    coordinates: npt.NDArray[np.float32]
    probes: npt.NDArray[np.integer[Any]]

    @classmethod
    def joined(cls, parts: Sequence[Logits]) -> Logits:
        """Concatenate one or more parts, in their order."""
        if len(parts) == 1:
            return parts[0]
        names = [item.name for item in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_] | slice) -> Logits:
        """The logits at some positions, or under a mask (n,)."""
        return Logits(*(getattr(self, item.name)[places] for item in fields(self)))


class Evidence(NamedTuple):
    """What is known of the probes that fire n logits most and least.

    Attributes:
        values: (n,) as ``EVIDENCE`` says.
        known: (n,) whether anything is known: older indexes do not say.
    """

    values: npt.NDArray[np.void]
    known: npt.NDArray[np.bool_]


class LogitTable(ModelTable):
    """Reads the logits, without those of models that an update removed."""

    @Once
    def basis(self) -> Basis:
        """The basis of the logits' coordinates in the encoder's space."""
        array = self._array("basis.npy", [range(2, BYTES), range(1, _MOST_DIMENSIONS + 1)])
        if len(array) > array.shape[1] + 1:
            raise self._tables.damaged(
                "basis.npy", f"it has {len(array) - 1} axes in {array.shape[1]} dimensions"
            )
        return Basis.from_array(array, self.settings.middle_offset, self.sharpness)

    @Once
    def _facts(self) -> np.dtype[np.void]:
        return logit_facts(self.basis, self.settings.probes)

    def _logits(self, facts: npt.NDArray[np.void]) -> Logits:
        """Logits from their values in the table (``logit_facts``).

        Raises:
            StoreError: some value is none.
        """
        logits = Logits(
            facts["row"].astype(np.int64),
            # Copied, so that the array of all facts can be freed.
            facts["weights"].copy(),
            facts["logit"].copy(),
            facts["negated"].copy().view(np.uint8) != 0,  # any byte may be there
            facts["offset"].astype(np.float64),
            self.basis.decode(EncodedDirections(facts["precise"], facts["rest"], facts["scale"])),
            facts["probes"].copy(),
        )
        # A direction that is not finite makes every coordinate so.
        bad = {"offset": _not_finite(logits.offsets), "direction": _not_finite(logits.coordinates[:, 0])}
        if any(bad.values()):
            found = [
                f"{count} values of {name} of its logits are not finite"
                for name, count in bad.items()
                if count
            ]
            raise self._base.damaged("logits", "; ".join(found))
        numbered = min(logits.weights.min(initial=0), logits.logit.min(initial=0)) >= 0
        if not numbered or logits.probes.max(initial=0) >= max(1, self.settings.probes):
            raise self._base.damaged("logits", "a value is not one that a logit has")
        return logits

    @Once
    def all_logits(self) -> Logits:
        """All logits. For small indexes, or a machine with 2 KB of memory per logit."""
        return Logits.joined([*self._stream(), self.recent])

    @Once
    def recent(self) -> Logits:
        """The logits of an update itself: not in the vector index, and few enough that all are scored for every query."""
        if not self.is_update:
            return self._logits(np.empty(0, self._facts))
        with self._tables.reading("logits"):
            facts = structured(self._tables.rows("logits", ["facts"])["facts"], self._facts)
            facts = facts[np.argsort(facts["row"])]
            if not np.array_equal(facts["row"], np.arange(self._base_row_count, self.size)):
                raise self._tables.gap_error("logits")
        return self._logits(facts)

    def logits(self, rows: npt.NDArray[np.int64]) -> Logits:
        """The logits at some rows, in the order of ``rows``. The rows' models must not have been removed.

        Raises:
            StoreError: a row is missing.
        """
        if not self.large:
            places = np.minimum(np.searchsorted(self.all_logits.rows, rows), len(self.all_logits) - 1)
            if len(rows) and not np.array_equal(self.all_logits.rows[places], rows):
                raise self._base.gap_error("logits")
            return self.all_logits[places]
        unique_rows, places = np.unique(rows, return_inverse=True)
        base_rows = unique_rows[unique_rows < self._base_row_count]
        facts = np.empty(0, self._facts)
        if len(base_rows):
            with self._base.reading("logits"):
                query = self._base.open("logits").take_offsets(base_rows.tolist())
                facts = structured(query.select(["facts"]).to_arrow()["facts"], self._facts)
            facts = facts[np.argsort(facts["row"])]
            if not np.array_equal(facts["row"], base_rows):
                raise self._base.gap_error("logits")
        logits = self._logits(facts)
        if len(base_rows) < len(unique_rows):
            logits = Logits.joined(
                [logits, self.recent[unique_rows[len(base_rows) :] - self._base_row_count]]
            )
        return logits[places]

    def evidence(self, rows: npt.NDArray[np.int64]) -> Evidence:
        """What is known of the probes that fire the logits at some rows most and least, in the order of ``rows``.

        Raises:
            StoreError: a row is missing, or a value is not one that a logit has.
        """
        unique_rows, places = np.unique(rows, return_inverse=True)
        in_base = unique_rows < self._base_row_count
        parts = [
            self._evidence_of(tables, unique_rows[selected], first)
            for tables, selected, first in (
                (self._base, in_base, 0),
                (self._tables, ~in_base, self._base_row_count),
            )
        ]
        return Evidence(*(np.concatenate(columns)[places] for columns in zip(*parts, strict=True)))

    def own_evidence(self, within: range | None = None) -> Iterator[Evidence]:
        """That of some rows of the generation's own table, or of all, in blocks of at most ``ROWS_AT_ONCE``."""
        first = self._base_row_count if self.is_update else 0
        within = range(first, self.size) if within is None else within
        for start in range(within.start, within.stop, ROWS_AT_ONCE):
            rows = np.arange(start, min(start + ROWS_AT_ONCE, within.stop))
            yield self._evidence_of(self._tables, rows, first)

    def _evidence_of(self, tables: Tables, rows: npt.NDArray[np.int64], first: int) -> Evidence:
        """That of ascending rows of one table, which starts with the row ``first``."""
        unknown = Evidence(np.zeros(len(rows), EVIDENCE), np.zeros(len(rows), bool))
        if not len(rows):
            return unknown
        with tables.reading("logits"):
            table = tables.open("logits")
            if "evidence" not in table.schema.names:
                return unknown
            found = table.take_offsets((rows - first).tolist()).select(["facts", "evidence"]).to_arrow()
            numbers = structured(found["facts"], self._facts)["row"]
            column = found["evidence"]
            evidence, known = structured(column, EVIDENCE), column.is_valid().to_numpy()
        order = np.argsort(numbers)
        if not np.array_equal(numbers[order], rows):
            raise tables.gap_error("logits")
        evidence, known = np.where(known, evidence, unknown.values)[order], known[order]
        finite = all(np.isfinite(evidence[name]).all() for name in ("values", "weakest_values"))
        in_range = evidence["weakest"].max() < max(1, self.settings.probes)
        if not finite or not in_range or evidence["count"].max() > WEAKEST_PROBES:
            raise tables.damaged("logits", "its evidence is none: a value is not one that a logit has")
        return Evidence(evidence, known)

    def blocks(self, within: range | None = None) -> Iterator[Logits]:
        """All logits in the order of their rows; of a large index in blocks of at most ``ROWS_AT_ONCE``.

        Args:
            within: only these rows, of a generation that is no update.
        """
        if within is not None:
            yield from self._stream(within)
        elif self.large:
            yield from self._stream()
            if len(self.recent):
                yield self.recent
        else:
            yield self.all_logits

    def _stream(self, within: range | None = None) -> Iterator[Logits]:
        """Logits of the base, or of a whole generation, in the order of their rows, in one or more blocks."""
        within = range(self._base_row_count) if within is None else within
        count = within.start
        base = self._base
        with base.reading("logits"):
            query = base.open("logits").search().select(["facts"]).limit(max(1, len(within)))
            query = query.offset(count) if count else query
            batches = query.to_batches(batch_size=ROWS_AT_ONCE)
        while True:
            with base.reading("logits"):
                batch = next(batches, None)
                if batch is None:
                    break
                facts = structured(pa.chunked_array([batch["facts"]]), self._facts)
                # Lance scans in the order of writing.
                if not np.array_equal(facts["row"], np.arange(count, count + len(facts))):
                    raise base.gap_error("logits")
            count += len(facts)
            yield self._without_removed(facts)
        if count != within.stop:
            raise base.gap_error("logits")
        if not within:
            yield self._logits(np.empty(0, self._facts))

    def _without_removed(self, facts: npt.NDArray[np.void]) -> Logits:
        """Logits from values of the base's table, without those of removed models."""
        if self.is_update and len(self._removed_weights):
            facts = facts[~np.isin(facts["weights"], self._removed_weights)]
        return self._logits(facts)

    def at(self, rows: npt.NDArray[np.int64]) -> Iterator[Logits]:
        """The logits at some rows, in one or more blocks of at most ``ROWS_AT_ONCE``."""
        for start in range(0, max(1, len(rows)), ROWS_AT_ONCE):
            yield self.logits(rows[start : start + ROWS_AT_ONCE])

    @Once
    def sample(self) -> Logits:
        """A random sample of a large index's logits: the same share of the base's and of the update's."""
        with self._tables.reading("sample"):
            facts = np.frombuffer(self.meta("sample"), self._facts)
        share = len(facts) / max(1, self._base_row_count)
        drawn = np.random.default_rng(0).random(len(self.recent)) < share
        return Logits.joined([self._without_removed(facts), self.recent[drawn]])

    def shortlisted(
        self, coordinates: npt.NDArray[np.float32], count: int, effort: int = 1
    ) -> Iterator[Logits]:
        """About the ``count`` best logits of a large index for a query's coordinates (p,), in blocks, by rows.

        ``recent`` is not searched: it is not in the vector index.
        """
        vector = self.basis.query(coordinates)
        with self._base.reading("logits"):
            column = shortlist.look_up(self._base.open_for_search("logits"), vector, count, effort)
            facts = structured(column, self._facts)
        facts = facts[np.argsort(facts["row"])]
        for start in range(0, max(1, len(facts)), ROWS_AT_ONCE):
            yield self._without_removed(facts[start : start + ROWS_AT_ONCE])

    @property
    def sharpness(self) -> float:
        """Inverse temperature ``b`` of the scores (docs/method.md)."""
        return self.settings.sharpness


def _not_finite(values: npt.ArrayLike) -> int:
    return int(np.count_nonzero(~np.isfinite(np.asarray(values))))

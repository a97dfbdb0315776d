"""What the catalogue tells of each model before it is downloaded, by the rules that the download itself follows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.probe.plan import weight_bytes
from probelog.arrays import Column
from probelog.errors import FailureReason, ItemFailure
from probelog.hub.download import check_access, needed_files
from probelog.hub.model_info import INDEX, weights
from probelog.storage.schemas import CATALOGUE, CatalogueRow, RepoFile, from_table

# Without labels, of which only the number is wanted, and tags.
_ROW = [name for name in CATALOGUE.names if name not in ("labels", "tags")]
_CHUNK = 4096

#: Classes of size by parameters: names, and the upper ends of all but the last.
SIZE_CLASSES = ("under 10 M", "10-50 M", "50-200 M", "200 M-1 B", "over 1 B")
_ENDS = (10e6, 50e6, 200e6, 1e9)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Known:
    """One value a model; NaN where the catalogue does not tell.

    Attributes:
        reasons: why the model cannot be indexed, where that is known already; else None.
        files: requests of files.
        api: requests of the API: one where no file is listed.
        listed: bytes of the files that are fetched, where all their sizes are listed.
        weights: bytes of the weights alone.
        parameters: how many.
        labels: how many are declared.
        architectures: names; "" where unknown.
    """

    reasons: npt.NDArray[np.object_]
    files: Ints
    api: Ints
    listed: Floats
    weights: Floats
    parameters: Floats
    labels: Floats
    architectures: npt.NDArray[np.object_]

    @classmethod
    def of(cls, table: pa.Table, *, has_token: bool, allow_pickle: bool, max_bytes: int) -> Known:
        """From the catalogue (all columns but tags), by the download's own rules."""
        reasons: list[str | None] = []
        files: list[int] = []
        listed: list[float] = []
        names: list[str] = []
        for start in range(0, table.num_rows, _CHUNK):
            for row in from_table(table.slice(start, _CHUNK).select(_ROW), CatalogueRow):
                reason, requests, size = _one(row, has_token, allow_pickle, max_bytes)
                reasons.append(reason)
                files.append(requests)
                listed.append(size)
                names.append(row.architecture or "")
        api = _lengths(table["files"]) == 0
        sure = np.array([reason is None for reason in reasons], bool)
        labels = _lengths(table["labels"])
        # Without its guess from the number of parameters: how many bytes one takes is measured.
        place = table.column_names.index("parameters")
        sizes = weight_bytes(table.set_column(place, "parameters", pa.nulls(table.num_rows, pa.int64())))
        parameters = table["parameters"].cast(pa.float64()).to_numpy()
        return cls(
            reasons=np.array(reasons, object),
            files=np.array(files, np.int64),
            api=(api & sure).astype(np.int64),
            listed=np.array(listed, np.float64),
            weights=np.where(sizes > 0, sizes, np.nan),
            parameters=np.where(parameters > 0, parameters, np.nan),
            labels=np.where(labels > 0, labels, np.nan),
            architectures=np.array(names, object),
        )

    def __len__(self) -> int:
        return len(self.files)

    def chosen(self, rows: npt.NDArray[np.bool_] | Ints) -> Known:
        """Some of the models."""
        return Known(*(getattr(self, field.name)[rows] for field in fields(self)))

    def at(self, places: Ints) -> Known:
        """The models at some places; of those at -1 nothing is known."""
        if not len(self):
            raise ValueError("there are no models")
        found, missing = self.chosen(np.maximum(places, 0)), places < 0
        for values in (found.listed, found.weights, found.parameters, found.labels):
            values[missing] = np.nan
        found.architectures[missing] = ""
        found.reasons[missing] = None
        return found

    @property
    def doomed(self) -> npt.NDArray[np.bool_]:
        """Models that cannot be indexed, (N,)."""
        return np.array([reason is not None for reason in self.reasons], bool)

    def failures(self) -> dict[str, int]:
        """How many cannot be indexed, by reason."""
        return dict(Counter(reason for reason in self.reasons if reason is not None))


def size_class(parameters: Floats) -> Ints:
    """Number of each model's class of ``SIZE_CLASSES``; -1 where its size is unknown."""
    found = np.searchsorted(_ENDS, parameters, side="right")
    return np.where(np.isnan(parameters), -1, found)


def _lengths(lists: Column) -> Floats:
    """Of a column of lists, (N,); a missing list is empty."""
    return np.nan_to_num(pc.list_value_length(lists).to_numpy().astype(np.float64))


def _one(
    row: CatalogueRow, has_token: bool, allow_pickle: bool, max_bytes: int
) -> tuple[str | None, int, float]:
    """Why it will fail, else None; requests of files; bytes of all that is fetched, NaN where sizes are unknown."""
    there = {file.path: file for file in row.files}
    try:
        check_access(row, has_token=has_token)
        if not there:
            return None, 0, float("nan")
        names = needed_files(there, allow_pickle)
    except ItemFailure as failure:
        return failure.reason.value, 0, 0.0
    wanted: list[RepoFile] = [there[name] for name in names]
    if names[-1] == INDEX:
        wanted += weights(row.files)
    size = float(sum(np.nan if file.size is None else file.size for file in wanted))
    if sum(file.size or 0 for file in wanted) > max_bytes:
        return FailureReason.TOO_LARGE.value, 0, 0.0
    return None, len(wanted), size

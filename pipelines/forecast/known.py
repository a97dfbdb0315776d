"""What the catalogue tells of each model before it is downloaded, by the rules that the download itself follows."""

from __future__ import annotations

from collections import Counter, defaultdict
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
from probelog.storage.encoding import short_key
from probelog.storage.ledger import key_numbers
from probelog.storage.schemas import CATALOGUE, CatalogueRow, RepoFile, from_table

# Without labels, of which only the number is wanted, and tags.
_ROW = [name for name in CATALOGUE.names if name not in ("labels", "tags")]
_CHUNK = 4096

#: Classes of size by parameters: names, and the upper ends of all but the last.
SIZE_CLASSES = ("under 10 M", "10-50 M", "50-200 M", "200 M-1 B", "over 1 B")
_ENDS = (10e6, 50e6, 200e6, 1e9)
_UNKNOWN = -1

_MOST_LOGITS = 25_000
# Of the measured models of an architecture so many, the nearest in parameters, are compared with each other.
_NEAREST = 12

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
        selected, missing = self.chosen(np.maximum(places, 0)), places < 0
        for values in (selected.listed, selected.weights, selected.parameters, selected.labels):
            values[missing] = np.nan
        selected.architectures[missing] = ""
        selected.reasons[missing] = None
        return selected

    @property
    def doomed(self) -> npt.NDArray[np.bool_]:
        """Models that cannot be indexed, (N,)."""
        return np.array([reason is not None for reason in self.reasons], bool)

    def failures(self) -> dict[str, int]:
        """How many cannot be indexed, by reason."""
        return dict(Counter(reason for reason in self.reasons if reason is not None))


def size_class(parameters: Floats) -> Ints:
    """Number of each model's class of ``SIZE_CLASSES``; -1 where its size is unknown."""
    classes = np.searchsorted(_ENDS, parameters, side="right")
    return np.where(np.isnan(parameters), -1, classes)


def _lengths(lists: Column) -> Floats:
    """Of a column of lists, (N,); a missing list is empty."""
    return np.nan_to_num(pc.list_value_length(lists).to_numpy().astype(np.float64))


def _one(
    row: CatalogueRow, has_token: bool, allow_pickle: bool, max_bytes: int
) -> tuple[str | None, int, float]:
    """Why it will fail, else None; requests of files; bytes of all that is fetched, NaN where sizes are unknown."""
    by_path = {file.path: file for file in row.files}
    try:
        check_access(row, has_token=has_token)
        if not by_path:
            return None, 0, float("nan")
        names = needed_files(by_path, allow_pickle)
    except ItemFailure as failure:
        return failure.reason.value, 0, 0.0
    needed: list[RepoFile] = [by_path[name] for name in names]
    if names[-1] == INDEX:
        needed += weights(row.files)
    size = float(sum(np.nan if file.size is None else file.size for file in needed))
    if sum(file.size or 0 for file in needed) > max_bytes:
        return FailureReason.TOO_LARGE.value, 0, 0.0
    return None, len(needed), size


# Heads by parameters


def logits_by_parameters(
    architectures: npt.NDArray[np.object_],
    parameters: Floats,
    measured_architectures: npt.NDArray[np.object_],
    measured_parameters: Floats,
    measured_logits: Floats,
) -> Floats:
    """Logits of each model by its number of parameters, (N,), NaN where they do not follow.

    The Hub's listing tells no labels. But classifiers of one body differ by their last layer alone, which has as many
    parameters a logit as it has inputs (and one more for a bias). Two measured models of one architecture with different
    numbers of logits tell that number; every other model of the same body follows, exactly:

        logits = logits_1 + (parameters - parameters_1) / d,    d = (parameters_2 - parameters_1) / (logits_2 - logits_1).

    Where d or the result is no whole number, the bodies differ, and nothing is said.

    Args:
        architectures: (N,) names, "" for an unknown one.
        parameters: (N,), NaN for an unknown number.
        measured_architectures: (n,) names of the models whose logits are known.
        measured_parameters: (n,).
        measured_logits: (n,).
    """
    of = defaultdict(set)
    for name, p, logits in zip(measured_architectures, measured_parameters, measured_logits, strict=True):
        if name and np.isfinite(p):
            of[name].add((int(p), int(logits)))
    known: dict[tuple[str, int], float] = {}
    found = np.full(len(parameters), np.nan)
    for i, (name, p) in enumerate(zip(architectures, parameters, strict=True)):
        if name in of and np.isfinite(p):
            key = (name, int(p))
            if key not in known:
                known[key] = _logits(int(p), of[name])
            found[i] = known[key]
    return found


def _logits(parameters: int, measured: set[tuple[int, int]]) -> float:
    near = sorted(measured, key=lambda one: abs(one[0] - parameters))[:_NEAREST]
    same = {logits for p, logits in near if p == parameters}
    if same:
        return float(next(iter(same))) if len(same) == 1 else float("nan")
    votes: Counter[int] = Counter()
    for i, (p1, logits1) in enumerate(near):
        for p2, logits2 in near[i + 1 :]:
            if logits1 == logits2:
                continue
            a_logit, rest = divmod(p2 - p1, logits2 - logits1)
            if rest or a_logit < 1:
                continue
            more, rest = divmod(parameters - p1, a_logit)
            logits = logits1 + more
            if not rest and 1 <= logits <= _MOST_LOGITS and logits * a_logit < parameters:
                votes[logits] += 1
    return float(votes.most_common(1)[0][0]) if votes else float("nan")


# Which models to measure first


def stratified(known: Known, names: list[str], count: int, seed: int) -> npt.NDArray[np.bool_]:
    """Marks ``count`` models of those that may be indexed, (N,): all, where there are fewer.

    Every class of size that has models gets one, whatever ``count``, the others go where models and bytes are: half by the
    number of models of a class, half by their bytes. Within a class they lie at equal distances in the order of
    size (systematic sampling), so that large and small ones are seen.

    Args:
        known: the catalogue's models.
        names: (N,) of them, which decide the order among equals.
        count: how many.
        seed: another one draws others.
    """
    classes = size_class(known.parameters)
    able = ~known.doomed
    sizes = np.nan_to_num(known.weights, nan=0.0)
    tie = key_numbers(short_key(seed, name) for name in names)
    numbers = [_UNKNOWN, *range(len(SIZE_CLASSES))]
    members = {
        number: rows[np.lexsort((tie[rows], sizes[rows]))]
        for number in numbers
        if len(rows := np.flatnonzero(able & (classes == number)))
    }
    marked = np.zeros(len(known), bool)
    if not members:
        return marked
    rng = np.random.default_rng(seed)
    for rows, share in zip(members.values(), _shares(members, sizes, count), strict=True):
        places = (np.arange(share) + rng.random()) * len(rows) / share if share else np.zeros(0)
        marked[rows[places.astype(np.int64)]] = True
    return marked


def _shares(
    members: dict[int, npt.NDArray[np.int64]], sizes: npt.NDArray[np.float64], count: int
) -> list[int]:
    """How many of each class."""
    held = np.array([len(rows) for rows in members.values()])
    size = np.array([sizes[rows].sum() for rows in members.values()])
    weights = held / held.sum() + (size / size.sum() if size.sum() > 0 else held / held.sum())
    shares = np.minimum(held, 1)
    for _ in range(max(0, min(count, int(held.sum())) - len(held))):
        # The class that is furthest behind its share and has models left.
        behind = np.where(shares < held, weights / (shares + 1), -1.0)
        shares[int(behind.argmax())] += 1
    return [int(share) for share in shares]

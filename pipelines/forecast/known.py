"""What the catalogue tells of each model before it is downloaded, by the rules that the download itself follows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.probe.plan import weight_bytes
from probelog.arrays import Floats, Ints
from probelog.errors import FailureReason, ItemFailure
from probelog.hub.download import check_access
from probelog.kinds.kind import Kind
from probelog.storage.encoding import short_key
from probelog.storage.ledger import key_numbers
from probelog.storage.schemas import CatalogueRow

# What decides whether a repository may be read.
_ACCESS = ("repo", "sha", "gated", "disabled")
# Columns of the catalogue that tell something.
COLUMNS = [*_ACCESS, "architecture", "files", "parameters", "weight_bytes", "labels"]

#: Classes of size by parameters: names, and the upper ends of all but the last.
SIZE_CLASSES = ("under 10 M", "10-50 M", "50-200 M", "200 M-1 B", "over 1 B")
_ENDS = (10e6, 50e6, 200e6, 1e9)

_MOST_LOGITS = 25_000


@dataclass(frozen=True)
class Known:
    """One value a model; NaN where the catalogue does not tell.

    Attributes:
        reasons: why the model cannot be indexed, where that is known already; else None.
        files: requests of files; 0 where no file is listed.
        listed: bytes of the files that are fetched, where all their sizes are listed.
        weights: bytes of the weights alone.
        parameters: how many.
        labels: how many are declared.
        architectures: names; "" where unknown.
    """

    reasons: npt.NDArray[np.object_]
    files: Ints
    listed: Floats
    weights: Floats
    parameters: Floats
    labels: Floats
    architectures: npt.NDArray[np.object_]

    @classmethod
    def of(cls, table: pa.Table, kind: Kind, *, has_token: bool, allow_pickle: bool, max_bytes: int) -> Known:
        """From the catalogue (``COLUMNS``), by the rules of the kind's download."""
        reasons, files, listed = _downloads(table, kind, has_token, allow_pickle, max_bytes)
        # Without its guess from the number of parameters: how many bytes one takes is measured.
        place = table.column_names.index("parameters")
        sizes = weight_bytes(table.set_column(place, "parameters", pa.nulls(table.num_rows, pa.int64())))
        parameters = table["parameters"].cast(pa.float64()).to_numpy()
        # A logit has a label; samples have nothing to do with them.
        labels = pc.list_value_length(table["labels"]).cast(pa.float64()).to_numpy()
        labels = labels if kind.contents.counted == "logits" else np.zeros(len(labels))
        architectures: Any = pc.fill_null(cast("Any", table["architecture"]), "")
        names = architectures.combine_chunks().dictionary_encode()
        return cls(
            reasons=reasons,
            files=files,
            listed=listed,
            weights=np.where(sizes > 0, sizes, np.nan),
            parameters=np.where(parameters > 0, parameters, np.nan),
            labels=np.where(labels > 0, labels, np.nan),
            # Each name once in memory, however many models have it.
            architectures=np.array(names.dictionary.to_pylist(), object)[names.indices.to_numpy()],
        )

    @classmethod
    def joined(cls, parts: Sequence[Known]) -> Known:
        """The models of several parts of a catalogue, one part after the other."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def __len__(self) -> int:
        return len(self.files)

    def chosen(self, rows: npt.NDArray[np.bool_]) -> Known:
        """Some of the models."""
        return Known(*(getattr(self, field.name)[rows] for field in fields(self)))

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


def _downloads(
    table: pa.Table, kind: Kind, has_token: bool, allow_pickle: bool, max_bytes: int
) -> tuple[npt.NDArray[np.object_], Ints, Floats]:
    """Why each will fail, else None; requests of files; bytes of all that is fetched, NaN where sizes are unknown.

    Repositories with the same names of files are looked at together: a million have some thousand different lists.
    """
    count = table.num_rows
    reasons = np.full(count, None, object)
    for row, facts in enumerate(zip(*(table[name].to_pylist() for name in _ACCESS), strict=True)):
        try:
            check_access(CatalogueRow(**dict(zip(_ACCESS, facts, strict=True))), has_token=has_token)
        except ItemFailure as failure:
            reasons[row] = failure.reason.value
    files = table["files"].combine_chunks()
    flat: Any = pc.list_flatten(files)
    paths: Any = pc.struct_field(flat, "path").dictionary_encode()
    names, codes = paths.dictionary.to_pylist(), paths.indices.to_numpy()
    sizes = pc.cast(pc.struct_field(flat, "size"), pa.float64()).to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.list_value_length(files), 0).to_numpy()
    starts = np.cumsum(lengths) - lengths
    alike: dict[bytes, list[int]] = defaultdict(list)
    refused = np.array([reason is not None for reason in reasons], bool)
    for row in np.flatnonzero((lengths > 0) & ~refused).tolist():
        alike[codes[starts[row] : starts[row] + lengths[row]].tobytes()].append(row)
    requests, listed = np.zeros(count, np.int64), np.full(count, np.nan)
    listed[refused] = 0.0
    for rows in alike.values():
        start = starts[rows[0]]
        try:
            needed = _needed(
                kind, [names[code] for code in codes[start : start + lengths[rows[0]]]], allow_pickle
            )
        except ItemFailure as failure:
            reasons[rows], listed[rows] = failure.reason.value, 0.0
            continue
        fetched = sizes[starts[rows][:, None] + needed]
        requests[rows], listed[rows] = len(needed), fetched.sum(axis=1)
        large = np.array(rows)[np.nansum(fetched, axis=1) > max_bytes]
        reasons[large], requests[large], listed[large] = FailureReason.TOO_LARGE.value, 0, 0.0
    return reasons, requests, listed


def _needed(kind: Kind, paths: list[str], allow_pickle: bool) -> list[int]:
    """Places of the files that are fetched, of those with some paths.

    Raises:
        ItemFailure: the names tell that it will fail.
    """
    places = {path: place for place, path in enumerate(paths)}
    return [places[name] for name in kind.foreseen(places, allow_pickle)]


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

    Of the N models the arguments are names ("" for an unknown one) and numbers (NaN likewise), then of the n measured ones.
    """
    measured = defaultdict(set)
    for name, p, logits in zip(measured_architectures, measured_parameters, measured_logits, strict=True):
        if name and np.isfinite(p):
            measured[name].add((int(p), int(logits)))
    followed = np.full(len(architectures), np.nan)
    encoded = pa.array(architectures, pa.string()).dictionary_encode()
    codes = encoded.indices.to_numpy()
    for code, name in enumerate(encoded.dictionary.to_pylist()):
        if not measured[name]:
            continue
        rows = np.flatnonzero((codes == code) & (parameters > 0))
        different, which = np.unique(parameters[rows], return_inverse=True)
        followed[rows] = np.array([_logits(int(p), measured[name]) for p in different], np.float64)[which]
    return followed


def _logits(parameters: int, measured: set[tuple[int, int]]) -> float:
    """By the nearest measured model, and by the nearest one with another number of logits."""
    (nearest, logits), *rest = sorted(measured, key=lambda one: abs(one[0] - parameters))
    other, other_logits = next((one for one in rest if one[1] != logits), (0, 0))
    if parameters == nearest != other:
        return logits
    a_logit = (other - nearest) / (other_logits - logits)
    if not other_logits or a_logit < 1:
        return np.nan
    followed = logits + (parameters - nearest) / a_logit
    whole = a_logit.is_integer() and followed.is_integer() and 1 <= followed <= _MOST_LOGITS
    return followed if whole else np.nan


def stratified(known: Known, names: list[str], count: int, seed: int) -> npt.NDArray[np.bool_]:
    """Marks ``count`` models of those that may be indexed, (N,): all, where there are fewer.

    The classes of size (those of unknown size are one) take turns. Within a class the models lie at equal distances in the
    order of size (systematic sampling), so that large and small ones are seen.

    Args:
        known: the catalogue's models.
        names: (N,) of them, which decide the order among equals.
        count: how many, at least one of every class.
        seed: another one draws others.
    """
    classes, able = size_class(known.parameters), ~known.doomed
    sizes = np.nan_to_num(known.weights, nan=0.0)
    tie = key_numbers(short_key(seed, name) for name in names)
    ordered = np.lexsort((tie, sizes))
    members = [ordered[(able & (classes == number))[ordered]] for number in range(-1, len(SIZE_CLASSES))]
    turns = sorted(
        (turn, number) for number, rows in enumerate(members) for turn in range(min(count, len(rows)))
    )
    shares = Counter(number for turn, number in turns[: max(count, sum(turn == 0 for turn, _ in turns))])
    marked = np.zeros(len(known), bool)
    rng = np.random.default_rng(seed)
    for number, share in sorted(shares.items()):
        places = (np.arange(share) + rng.random()) * len(members[number]) / share
        marked[members[number][places.astype(np.int64)]] = True
    return marked

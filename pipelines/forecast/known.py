"""What the catalogue tells of each model before it is downloaded, by the rules that the download itself follows."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, fields

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
from probelog.storage.schemas import CatalogueRow, from_table

_CHUNK = 4096
# What decides whether and what is downloaded; rows with all columns take three times as long to make.
_COLUMNS = ["repo", "sha", "architecture", "files", "gated", "disabled"]

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
        """From the catalogue (all columns but tags), by the rules of the kind's download."""
        facts = [
            (*_download(row, kind, has_token, allow_pickle, max_bytes), row.architecture or "")
            for start in range(0, table.num_rows, _CHUNK)
            for row in from_table(table.slice(start, _CHUNK).select(_COLUMNS), CatalogueRow)
        ]
        reasons, files, listed, names = zip(*facts, strict=True) if facts else ((), (), (), ())
        # Without its guess from the number of parameters: how many bytes one takes is measured.
        place = table.column_names.index("parameters")
        sizes = weight_bytes(table.set_column(place, "parameters", pa.nulls(table.num_rows, pa.int64())))
        parameters = table["parameters"].cast(pa.float64()).to_numpy()
        # A logit has a label; samples have nothing to do with them.
        labels = pc.list_value_length(table["labels"]).cast(pa.float64()).to_numpy()
        labels = labels if kind.contents.counted == "logits" else np.zeros(len(labels))
        return cls(
            reasons=np.array(reasons, object),
            files=np.array(files, np.int64),
            listed=np.array(listed, np.float64),
            weights=np.where(sizes > 0, sizes, np.nan),
            parameters=np.where(parameters > 0, parameters, np.nan),
            labels=np.where(labels > 0, labels, np.nan),
            architectures=np.array(names, object),
        )

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


def _download(
    row: CatalogueRow, kind: Kind, has_token: bool, allow_pickle: bool, max_bytes: int
) -> tuple[str | None, int, float]:
    """Why it will fail, else None; requests of files; bytes of all that is fetched, NaN where sizes are unknown."""
    by_path = {file.path: file for file in row.files}
    try:
        check_access(row, has_token=has_token)
        if not by_path:
            return None, 0, float("nan")
        needed = [by_path[name] for name in kind.foreseen(by_path, allow_pickle)]
    except ItemFailure as failure:
        return failure.reason.value, 0, 0.0
    size = float(sum(np.nan if file.size is None else file.size for file in needed))
    if sum(file.size or 0 for file in needed) > max_bytes:
        return FailureReason.TOO_LARGE.value, 0, 0.0
    return None, len(needed), size


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
    models = list(zip(architectures, np.nan_to_num(parameters, nan=-1.0), strict=True))
    followed = {
        (name, p): _logits(int(p), measured[name]) for name, p in set(models) if p > 0 and measured[name]
    }
    return np.array([followed.get(model, np.nan) for model in models], np.float64)


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

"""Models of one architecture: the rows of the ``weights`` table as arrays, one model a row, one tensor a column.

The head is left apart, because a child often has one of another size. Models belong to one family where all other
tensors have the same names and shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from probelog.arrays import Floats, Ints
from probelog.weights.sketch import WIDTH

# The stem of a head's tensors at the top level of a network: nothing inside a numbered block is a head.
_HEAD = re.compile(
    r"(?:[^.\d][^.]*\.)*?(?:head|heads|head_dist|classifier|fc|logits|last_linear|score)"
    r"(?:\.(?:fc|linear|head|dense|out_proj|\d+))*\.(?:weight|bias)"
)

_SIGNIFICANDS = {
    "float64": 53,
    "float32": 24,
    "float16": 11,
    "bfloat16": 8,
    "float8_e4m3fn": 4,
    "float8_e4m3fnuz": 4,
    "float8_e5m2": 3,
    "float8_e5m2fnuz": 3,
}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model beside its weights; all of it may be wrong, and all of it is optional.

    ``uploaded`` is a time in seconds.
    """

    uploaded: float | None = None
    declared: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """n models whose T tensors without the head have the same names and shapes; L of them have a sketch everywhere.

    ``sizes`` (T,) numbers of each tensor; ``layers`` (L,) the tensors that have a sketch; ``vectors`` those of one
    dimension; ``mean``, ``std`` and ``kurtosis`` (n, T), 0 where there is none; ``sketches`` (n, L, 32). Of the head:
    ``classes`` (n,) rows of its matrix (0: none) and ``heads``, each model's moments and sketch in one array.
    ``precision`` (n,) are
    the significand's bits of the type that most numbers are stored in.
    """

    repos: tuple[str, ...]
    tensors: tuple[str, ...]
    sizes: Floats = field(repr=False)
    layers: Ints = field(repr=False)
    vectors: Ints = field(repr=False)
    mean: Floats = field(repr=False)
    std: Floats = field(repr=False)
    kurtosis: Floats = field(repr=False)
    sketches: Floats = field(repr=False)
    classes: Ints = field(repr=False)
    heads: tuple[Floats, ...] = field(repr=False)
    precision: Ints = field(repr=False)

    @property
    def squares(self) -> Floats:
        """(n, T): the sum of squares of each tensor's numbers, from its moments: exact, unlike the sketch's."""
        return np.asarray(self.sizes * (self.mean**2 + self.std**2))


def families(weights: pa.Table) -> list[Family]:
    """The models of a ``weights`` table by architecture, in order of their names.

    Models without a single usable sketch (of integers, NaN, or overflown) are in no family.
    """
    models: dict[str, list[dict[str, Any]]] = {}
    for batch in weights.to_batches():
        for row in batch.to_pylist():
            models.setdefault(row["repo"], []).append(row)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for repo in sorted(models):
        rows = sorted(models[repo], key=lambda row: row["tensor"])
        models[repo] = rows
        backbone = tuple((row["tensor"], tuple(row["shape"])) for row in rows if not _is_head(row["tensor"]))
        groups.setdefault(backbone, []).append(repo)
    made = (_family(repos, [models[repo] for repo in repos]) for _, repos in sorted(groups.items()))
    return [family for family in made if family is not None]


def _is_head(tensor: str) -> bool:
    return _HEAD.fullmatch(tensor) is not None


def _family(repos: Sequence[str], models: Sequence[Sequence[Mapping[str, Any]]]) -> Family | None:
    backbones = [[row for row in rows if not _is_head(row["tensor"])] for rows in models]
    heads = [[row for row in rows if _is_head(row["tensor"])] for rows in models]
    sketched = [[_usable(row["sketch"]) for row in rows] for rows in backbones]
    usable = [any(row) for row in sketched]
    if not any(usable):
        return None
    repos = [repo for repo, keep in zip(repos, usable, strict=True) if keep]
    backbones = [rows for rows, keep in zip(backbones, usable, strict=True) if keep]
    heads = [rows for rows, keep in zip(heads, usable, strict=True) if keep]
    # A layer that overflowed in some models is zero there, which leaves it out of their distances.
    present = np.array([row for row, keep in zip(sketched, usable, strict=True) if keep]).max(axis=0)
    layers = np.flatnonzero(present)
    first = backbones[0]
    moments = np.array(
        [
            [[_number(row[name]) for name in ("mean", "std", "kurtosis")] for row in rows]
            for rows in backbones
        ],
        np.float64,
    )
    zero = np.zeros(WIDTH, np.float32)
    sketches = np.array(
        [
            [rows[layer]["sketch"] if _usable(rows[layer]["sketch"]) else zero for layer in layers]
            for rows in backbones
        ],
        np.float64,
    )
    vectors = [t for t, row in enumerate(first) if not present[t] and len(row["shape"]) == 1]
    return Family(
        repos=tuple(repos),
        tensors=tuple(row["tensor"] for row in first),
        sizes=np.array([math.prod(row["shape"]) for row in first], np.float64),
        layers=layers,
        vectors=np.array(vectors, np.int64),
        mean=moments[:, :, 0],
        std=moments[:, :, 1],
        kurtosis=moments[:, :, 2],
        sketches=sketches,
        classes=np.array([_classes(rows) for rows in heads], np.int64),
        heads=tuple(_head(rows) for rows in heads),
        precision=np.array([_precision(rows) for rows in backbones], np.int64),
    )


def _usable(sketch: Sequence[float] | None) -> bool:
    return sketch is not None and len(sketch) == WIDTH and bool(np.isfinite(sketch).all())


def _number(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _classes(head: Sequence[Mapping[str, Any]]) -> int:
    return next((row["shape"][0] for row in head if len(row["shape"]) > 1), 0)


def _head(head: Sequence[Mapping[str, Any]]) -> Floats:
    numbers = [
        [_number(row["mean"]), _number(row["std"]), *(row["sketch"] if _usable(row["sketch"]) else ())]
        for row in head
    ]
    return np.array([number for row in numbers for number in row], np.float64)


def _precision(rows: Sequence[Mapping[str, Any]]) -> int:
    """Bits of the significand of the type that most numbers have."""
    count: dict[int, int] = {}
    for row in rows:
        bits = _SIGNIFICANDS.get(row["dtype"], 0)
        count[bits] = count.get(bits, 0) + math.prod(row["shape"])
    return max(count, key=lambda bits: (count[bits], bits), default=0)

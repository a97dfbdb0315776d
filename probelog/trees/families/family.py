"""Models of one architecture: the rows of the ``weights`` table as arrays, one model a row, one tensor a column.

The head is left apart, because a child often has one of another size. Models belong to one family where all other
tensors have the same names and shapes (`probelog.trees.families.layouts` has the exceptions). The arrays may lie on disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.arrays import Floats, Ints, values_of
from probelog.weights.sketch import WIDTH


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model beside its weights; all of it may be wrong, and all of it is optional.

    ``uploaded`` is a time in seconds.
    """

    uploaded: float | None = None
    declared: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """n models whose T tensors without the head have the same names and shapes; L of them have a sketch.

    ``key`` names the architecture: families of equal keys are parts of one. ``shapes`` (T,) of the tensors,
    ``layers`` (L,) those that have a sketch, ``vectors`` those of one dimension. ``statistics`` (n, 3 T + 32 L) has
    mean, standard deviation and kurtosis of every tensor and the sketches, float32, 0 where there is none. Of the
    head: ``classes`` (n,) rows of its matrix (0: none) and each model's moments and sketches, ``head_values`` from
    ``head_starts`` (n,) on, ``head_sizes`` (n,) of them. ``precision`` (n,) are the significand's bits of the type
    that most numbers are stored in. ``usable`` (n,): whether any sketch is there; without one a model has no edges.
    """

    key: str
    repos: Sequence[str] = field(repr=False)
    tensors: tuple[str, ...] = field(repr=False)
    shapes: tuple[tuple[int, ...], ...] = field(repr=False)
    layers: Ints = field(repr=False)
    statistics: npt.NDArray[np.float32] = field(repr=False)
    classes: Ints = field(repr=False)
    precision: Ints = field(repr=False)
    usable: npt.NDArray[np.bool_] = field(repr=False)
    head_values: npt.NDArray[np.float32] = field(repr=False)
    head_starts: Ints = field(repr=False)
    head_sizes: Ints = field(repr=False)

    def __len__(self) -> int:
        return len(self.repos)

    @property
    def sizes(self) -> Floats:
        """(T,) numbers of each tensor."""
        return np.array([math.prod(shape) for shape in self.shapes], np.float64)

    @property
    def vectors(self) -> Ints:
        """The tensors of one dimension."""
        return np.array([t for t, shape in enumerate(self.shapes) if len(shape) == 1], np.int64)

    @property
    def mean(self) -> npt.NDArray[np.float32]:
        """(n, T)."""
        return self.statistics[:, : len(self.tensors)]

    @property
    def std(self) -> npt.NDArray[np.float32]:
        """(n, T)."""
        return self.statistics[:, len(self.tensors) : 2 * len(self.tensors)]

    @property
    def kurtosis(self) -> npt.NDArray[np.float32]:
        """(n, T)."""
        return self.statistics[:, 2 * len(self.tensors) : 3 * len(self.tensors)]

    @property
    def sketches(self) -> npt.NDArray[np.float32]:
        """(n, L, 32)."""
        return self.statistics[:, 3 * len(self.tensors) :].reshape(len(self), len(self.layers), WIDTH)

    def squares(self, models: Ints | slice, tensors: Ints) -> Floats:
        """(m, t): the sums of squares of some tensors' numbers, from their moments: exact, unlike the sketch's."""
        mean = self.mean[models][:, tensors].astype(np.float64)
        std = self.std[models][:, tensors].astype(np.float64)
        sizes = np.array([math.prod(self.shapes[tensor]) for tensor in tensors], np.float64)
        return np.asarray(sizes * (mean**2 + std**2))

    def head(self, model: int) -> npt.NDArray[np.float32]:
        """The moments and sketches of one model's head."""
        start = self.head_starts[model]
        return self.head_values[start : start + self.head_sizes[model]]

    def take(self, models: Ints) -> Family:
        """Some of the models, in memory."""
        heads = [self.head(int(model)) for model in models]
        sizes = self.head_sizes[models]
        return Family(
            key=self.key,
            repos=tuple(self.repos[int(model)] for model in models),
            tensors=self.tensors,
            shapes=self.shapes,
            layers=self.layers,
            statistics=np.array(self.statistics[models]),
            classes=self.classes[models],
            precision=self.precision[models],
            usable=self.usable[models],
            head_values=np.concatenate([*heads, np.empty(0, np.float32)]),
            head_starts=np.cumsum(sizes) - sizes,
            head_sizes=sizes,
        )

    def joined(self, other: Family) -> Family:
        """These models and those of another part of the family, in memory; both have one layout (`like`)."""
        sizes = np.concatenate([self.head_sizes, other.head_sizes])
        parts = (self, other)
        heads = [part.head(model) for part in parts for model in range(len(part))]
        return replace(
            self,
            repos=(*self.repos, *other.repos),
            statistics=np.concatenate([part.statistics for part in parts]),
            classes=np.concatenate([part.classes for part in parts]),
            precision=np.concatenate([part.precision for part in parts]),
            usable=np.concatenate([part.usable for part in parts]),
            head_values=np.concatenate([*heads, np.empty(0, np.float32)]),
            head_starts=np.cumsum(sizes) - sizes,
            head_sizes=sizes,
        )

    def like(self, base: Family) -> Family:
        """The models in the layout of ``base``, another part of the family: what has another shape there is zero."""
        if self.shapes == base.shapes and np.array_equal(self.layers, base.layers):
            return self
        equal = np.array([a == b for a, b in zip(self.shapes, base.shapes, strict=True)])
        moments = np.stack([self.mean, self.std, self.kurtosis], axis=1) * equal
        sketches = np.zeros((len(self), len(base.layers), WIDTH), np.float32)
        here = {int(tensor): place for place, tensor in enumerate(self.layers)}
        for place, tensor in enumerate(base.layers.tolist()):
            if equal[tensor] and tensor in here:
                sketches[:, place] = self.sketches[:, here[tensor]]
        return replace(
            self,
            shapes=base.shapes,
            layers=base.layers,
            statistics=np.concatenate(
                [moments.reshape(len(self), -1), sketches.reshape(len(self), -1)], axis=1
            ).astype(np.float32),
            usable=(sketches != 0).any(axis=(1, 2)),
        )

    def table(self) -> pa.Table:
        """One row a model, to be kept beside the edges (`family_of`)."""
        width = self.statistics.shape[1]
        heads = np.concatenate([*(self.head(model) for model in range(len(self))), np.empty(0, np.float32)])
        starts = np.concatenate([[0], np.cumsum(self.head_sizes)])
        layout = {
            "key": self.key,
            "tensors": self.tensors,
            "shapes": self.shapes,
            "layers": self.layers.tolist(),
        }
        return pa.table(
            {
                "repo": pa.array(self.repos, pa.string()),
                "classes": pa.array(self.classes, pa.int64()),
                "precision": pa.array(self.precision, pa.int64()),
                "usable": pa.array(self.usable, pa.bool_()),
                "statistics": pa.FixedSizeListArray.from_arrays(
                    pa.array(np.ascontiguousarray(self.statistics).reshape(-1)), width
                ),
                "head": pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(heads)),
            }
        ).replace_schema_metadata({"family": json.dumps(layout)})


def family_of(table: pa.Table) -> Family:
    """The family that `Family.table` made a table of.

    Raises:
        ValueError: the table is no family's.
    """
    try:
        layout: dict[str, Any] = json.loads((table.schema.metadata or {})[b"family"])
        tensors = tuple(map(str, layout["tensors"]))
        shapes = tuple(tuple(map(int, shape)) for shape in layout["shapes"])
        layers = np.array(layout["layers"], np.int64)
        table = table.combine_chunks()
        columns = {
            name: cast("pa.ListArray[Any]", table[name].combine_chunks()) for name in table.column_names
        }
        statistics = columns["statistics"].flatten().to_numpy(zero_copy_only=False)
        statistics = statistics.reshape(len(table), 3 * len(tensors) + WIDTH * len(layers))
        starts = columns["head"].offsets.to_numpy().astype(np.int64)
        family = Family(
            key=str(layout["key"]),
            repos=tuple(values_of(table["repo"], str)),
            tensors=tensors,
            shapes=shapes,
            layers=layers,
            statistics=statistics.astype(np.float32, copy=False),
            classes=columns["classes"].to_numpy(zero_copy_only=False),
            precision=columns["precision"].to_numpy(zero_copy_only=False),
            usable=columns["usable"].to_numpy(zero_copy_only=False),
            head_values=columns["head"].values.to_numpy(zero_copy_only=False),
            head_starts=starts[:-1],
            head_sizes=np.diff(starts),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"this table is no family of models: {error}") from error
    if len(shapes) != len(tensors) or not np.isin(layers, np.arange(len(tensors))).all():
        raise ValueError("this table is no family of models: its tensors and shapes do not agree")
    return family

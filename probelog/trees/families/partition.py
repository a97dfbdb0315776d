"""From rows of the ``weights`` table to families on the local disk, in memory that the number of models hardly changes.

Two passes over the rows. The first reads names and shapes only: which models there are, and of which layout. That
gives every model its place: families one after the other, the models of one in order of their names. The second writes each
model's statistics there, one write a model. What stays in memory is some 300 bytes a model and the batch at hand; the
arrays of a family are mapped from the files.

    statistics.bin   a row of float32 a model: mean, std, kurtosis of the tensors, then the sketches
    heads.bin        the heads' statistics, one after the other, as they came
    layouts.jsonl    names and shapes of each family
    models.arrow     what else is known of each model, by place
    families.arrow   key, first place, size and offsets of each family; written last

No Python object stands for a tensor; one stands for a model's names and shapes where no model before had them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from probelog.arrays import Column, Ints, values_of
from probelog.trees.families.family import Family
from probelog.trees.families.layouts import Layout, is_head, layout_of
from probelog.weights.sketch import WIDTH

#: Batches of rows with the columns that are asked for.
Batches = Callable[[list[str]], Iterable[pa.RecordBatch | pa.Table]]

SURVEYED = ["repo", "tensor", "dtype", "shape"]
WRITTEN = [*SURVEYED, "mean", "std", "kurtosis", "sketch"]

# Tensors of more dimensions than this are no weights of a network; a model that has one is left out.
_DIMENSIONS = 8
# The numbers of a head's statistics that are kept: 60 tensors' worth.
_HEAD_NUMBERS = 2048
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
_SKIPPED = -1
_NUMBERS = ("first", "models", "offset", "width", "layout")
_FAMILIES: dict[str, pa.DataType] = {
    "key": pa.string(),
    **dict.fromkeys(_NUMBERS, pa.int64()),
}


class Partition:
    """Families in a folder that `partition` wrote."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with pa.memory_map(str(folder / "families.arrow")) as source:
            families = pa.ipc.open_file(source).read_all()
        self._families = {name: families[name].to_numpy() for name in families.column_names if name != "key"}
        order = np.argsort(-self._families["models"], kind="stable")
        every = values_of(families["key"], str)
        self.keys = [every[place] for place in order]
        self._place = {key: place for place, key in enumerate(every)}
        self._models = pa.ipc.open_file(pa.memory_map(str(folder / "models.arrow"))).read_all()

    def __len__(self) -> int:
        return len(self.keys)

    def models(self, key: str) -> int:
        """How many models a family has."""
        return int(self._families["models"][self._place[key]])

    def family(self, key: str) -> Family:
        """A family, its arrays mapped from the disk."""
        row = {name: int(column[self._place[key]]) for name, column in self._families.items()}
        with open(self._folder / "layouts.jsonl", "rb") as file:
            file.seek(row["layout"])
            layout = json.loads(file.readline())
        models = self._models.slice(row["first"], row["models"])
        columns = {name: models[name].combine_chunks() for name in models.column_names}
        heads = self._folder / "heads.bin"
        return Family(
            key=key,
            repos=values_of(columns["repo"], str),
            tensors=tuple(layout["names"]),
            shapes=tuple(tuple(shape) for shape in layout["shapes"]),
            layers=np.array(layout["layers"], np.int64),
            # As plain arrays: those of class memmap are slow to index.
            statistics=np.asarray(
                np.memmap(
                    self._folder / "statistics.bin",
                    np.float32,
                    "r",
                    row["offset"],
                    (row["models"], row["width"]),
                )
            ),
            classes=columns["classes"].to_numpy(),
            precision=columns["precision"].to_numpy(),
            usable=columns["usable"].to_numpy(zero_copy_only=False),
            head_values=np.asarray(np.memmap(heads, np.float32, "r"))
            if heads.stat().st_size
            else np.empty(0, np.float32),
            head_starts=columns["head_start"].to_numpy(),
            head_sizes=columns["head_size"].to_numpy(),
        )


def partition(batches: Batches, folder: Path, *, memory_mb: int = 1024) -> Partition:
    """Sort the models of ``weights`` rows into families, in files of an empty ``folder``.

    ``batches(columns)`` gives the rows, the same ones in the same order at each of two calls; the rows of a model
    follow each other, in one batch or several. A repository that comes twice counts once, the first time.

    Raises:
        ValueError: the second call gives other rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = max(memory_mb * 2**20 // 4096, 1)  # an eighth of the memory, at some 500 bytes a row
    survey = _Survey()
    for models in _models(batches(SURVEYED), rows):
        survey.add(models)
    plan = survey.plan(folder)
    with open(folder / "statistics.bin", "wb") as statistics, open(folder / "heads.bin", "wb") as heads:
        writer = _Writer(plan, statistics, heads)
        for models in _models(batches(WRITTEN), rows):
            writer.add(models)
    writer.close(folder)
    return Partition(folder)


@dataclass(frozen=True, slots=True)
class _Models:
    """Some models' rows, those of one after the other and sorted by tensor; the heads' rows apart.

    ``repos`` (m,), ``starts`` (m + 1,) their first rows in ``backbone``, ``head_starts`` (m + 1,) in ``head``: the
    numbers of rows of ``table``. By row of the table: ``tensors`` and ``types``, codes of ``names`` and ``dtypes``,
    and ``shapes`` (rows, 8), -1 beyond the last dimension. ``whole`` (m,): no tensor has too many dimensions.
    """

    table: pa.Table
    repos: list[str]
    backbone: Ints
    starts: Ints
    head: Ints
    head_starts: Ints
    tensors: Ints
    names: list[str]
    types: Ints
    dtypes: list[str]
    shapes: npt.NDArray[np.int64]
    whole: npt.NDArray[np.bool_]


def _models(batches: Iterable[pa.RecordBatch | pa.Table], rows: int) -> Iterator[_Models]:
    """Whole models from batches that may cut one anywhere, in batches of about ``rows`` rows."""
    held: list[pa.Table] = []
    holding = ""
    for batch in batches:
        table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        for begin in range(0, len(table), rows):
            piece = table.slice(begin, rows)
            last = str(piece["repo"][-1])
            others = np.flatnonzero(pc.not_equal(piece["repo"], pa.scalar(last)).to_numpy())
            whole = int(others[-1]) + 1 if len(others) else 0
            if whole or (held and last != holding):
                yield _sorted(pa.concat_tables([*held, piece.slice(0, whole)]))
                held = []
            held.append(piece.slice(whole))
            holding = last
    if held:
        yield _sorted(pa.concat_tables(held))


def _sorted(table: pa.Table) -> _Models:
    table = table.combine_chunks()
    repo, repos = _codes(table["repo"])
    tensor, names = _codes(table["tensor"])
    types, dtypes = _codes(table["dtype"])
    by_name = np.argsort(np.array(names, object), kind="stable")
    rank = np.empty(len(names), np.int64)
    rank[by_name] = np.arange(len(names))
    order = np.lexsort((rank[tensor], repo))
    heads = np.array([is_head(name) for name in names], bool)[tensor[order]]
    backbone, head = order[~heads], order[heads]
    numbers = np.arange(len(repos) + 1)
    shapes, fits = _shapes(table["shape"])
    whole = np.ones(len(repos), bool)
    whole[repo[~fits]] = False
    return _Models(
        table=table,
        repos=repos,
        backbone=backbone,
        starts=np.searchsorted(repo[backbone], numbers),
        head=head,
        head_starts=np.searchsorted(repo[head], numbers),
        tensors=tensor,
        names=names,
        types=types,
        dtypes=dtypes,
        shapes=shapes,
        whole=whole,
    )


def _codes(column: Column) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Each row's string as a number, and the strings by number."""
    encoded = column.fill_null(pa.scalar("")).combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return codes, values_of(encoded.dictionary, str)


def _lists(column: Column) -> tuple[Ints, Ints, npt.NDArray[Any]]:
    """Where each row's list begins among the values, how long it is (a null: 0), and the values."""
    array = cast("pa.ListArray[Any]", column.combine_chunks())
    offsets = array.offsets.to_numpy().astype(np.int64)
    lengths = np.where(array.is_null().to_numpy(zero_copy_only=False), 0, np.diff(offsets))
    return offsets[:-1], lengths, array.values.to_numpy(zero_copy_only=False)


def _shapes(column: Column) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """(rows, 8) dimensions, -1 beyond the last; and whether they are all there."""
    starts, lengths, values = _lists(column)
    place = np.arange(_DIMENSIONS)
    there = place < lengths[:, None]
    at = np.where(there, starts[:, None] + place, 0)
    shapes = np.where(there, np.nan_to_num(values[at]) if len(values) else 0, -1)
    return shapes.astype(np.int64), lengths <= _DIMENSIONS


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where everything goes.

    By model in order of arrival: ``layout`` (N,), -1 where it is left out, and ``place`` (N,). By layout: its
    ``family``, the family's offsets, and which tensors it has in the family's shape. ``repos`` by place.
    """

    layout: Ints
    place: Ints
    repos: list[str]
    layouts: list[_Placed]
    families: dict[str, list[Any]]


@dataclass(frozen=True, slots=True)
class _Placed:
    """A layout within its family: the offset of the family's first row in bytes, the row's width in numbers.

    ``equal`` (T,): tensors of the family's shape; ``layers`` (L,) the family's.
    """

    first: int
    offset: int
    width: int
    equal: npt.NDArray[np.bool_]
    layers: Ints


class _Survey:
    """The first pass: layouts, and the models of each."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._layouts: list[Layout] = []
        self._repos: list[str] = []
        self._known: set[str] = set()
        self._of_model: list[int] = []

    def add(self, models: _Models) -> None:
        digests = _digests(models)
        for model, repo in enumerate(models.repos):
            number = _SKIPPED
            begin, end = models.starts[model], models.starts[model + 1]
            if models.whole[model] and repo not in self._known and end > begin:
                number = self._numbers.get(digests[model], _SKIPPED)
                if number == _SKIPPED:
                    number = self._numbers[digests[model]] = len(self._layouts)
                    self._layouts.append(_layout(models, models.backbone[begin:end]))
            self._known.add(repo)
            self._repos.append(repo)
            self._of_model.append(number)

    def plan(self, folder: Path) -> _Plan:
        """The places of models and families; writes the families' layouts."""
        of_model = np.array(self._of_model, np.int64)
        counts = np.bincount(of_model[of_model >= 0], minlength=len(self._layouts))
        keys = sorted({layout.key for layout in self._layouts})
        number = {key: place for place, key in enumerate(keys)}
        family_of_layout = np.array([number[layout.key] for layout in self._layouts], np.int64)
        shown = self._commonest(family_of_layout, counts, len(keys))
        # By family, then by name; models without a layout come last.
        family = np.where(of_model >= 0, family_of_layout[of_model] if len(keys) else 0, len(keys))
        by_name = np.argsort(np.array(self._repos, object), kind="stable")
        order = by_name[np.argsort(family[by_name], kind="stable")]
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        sizes = np.bincount(family, minlength=len(keys) + 1)
        firsts = np.cumsum(sizes) - sizes
        families: dict[str, list[Any]] = {name: [] for name in _FAMILIES}
        offset, layers = 0, []
        with open(folder / "layouts.jsonl", "wb") as file:
            for at, key in enumerate(keys):
                layout = self._layouts[shown[at]]
                layers.append(np.flatnonzero(layout.sketched))
                width = 3 * len(layout.names) + WIDTH * len(layers[-1])
                line = {"names": layout.names, "shapes": layout.shapes, "layers": layers[-1].tolist()}
                row = (key, int(firsts[at]), int(sizes[at]), offset, width, file.tell())
                for column, value in zip(families.values(), row, strict=True):
                    column.append(value)
                file.write(json.dumps(line).encode() + b"\n")
                offset += 4 * width * int(sizes[at])
        placed = [
            _Placed(
                families["first"][at],
                families["offset"][at],
                families["width"][at],
                np.array(
                    [a == b for a, b in zip(layout.shapes, self._layouts[shown[at]].shapes, strict=True)]
                ),
                layers[at],
            )
            for layout, at in zip(self._layouts, family_of_layout.tolist(), strict=True)
        ]
        return _Plan(of_model, place, [self._repos[model] for model in order], placed, families)

    def _commonest(self, family: Ints, counts: Ints, families: int) -> list[int]:
        """The layout that most models of a family have; of equal ones that with more sketches."""
        best = [-1] * families
        rank = [
            (int(count), sum(layout.sketched), layout.shapes)
            for count, layout in zip(counts, self._layouts, strict=True)
        ]
        for number, at in enumerate(family.tolist()):
            if best[at] < 0 or rank[number] > rank[best[at]]:
                best[at] = number
        return best


def _digests(models: _Models) -> list[bytes]:
    """What tells the layout of each model's tensors without the head: names, shapes, and whether they are numbers."""
    name = np.frombuffer(
        b"".join(
            hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            for name in models.names
        ),
        np.int64,
    ).reshape(-1, 2)
    floating = np.array([_is_floating(dtype) for dtype in models.dtypes], np.int64)
    rows = models.backbone
    described = np.concatenate(
        [name[models.tensors[rows]], models.shapes[rows], floating[models.types[rows]][:, None]], axis=1
    )
    starts = models.starts.tolist()
    return [
        hashlib.blake2b(described[begin:end].tobytes(), digest_size=16).digest()
        for begin, end in pairwise(starts)
    ]


def _is_floating(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


def _layout(models: _Models, rows: Ints) -> Layout:
    shapes = [tuple(d for d in shape if d >= 0) for shape in models.shapes[rows].tolist()]
    names = [models.names[code] for code in models.tensors[rows].tolist()]
    return layout_of(
        names, shapes, [_is_floating(models.dtypes[code]) for code in models.types[rows].tolist()]
    )


class _Writer:
    """The second pass: every model's numbers to its place."""

    def __init__(self, plan: _Plan, statistics: BinaryIO, heads: BinaryIO) -> None:
        self._plan = plan
        self._statistics = statistics
        self._heads = heads
        count = len(plan.layout)
        self._seen = 0
        self._written = 0
        self._columns: dict[str, npt.NDArray[Any]] = {
            "classes": np.zeros(count, np.int64),
            "precision": np.zeros(count, np.int64),
            "usable": np.zeros(count, bool),
            "head_start": np.zeros(count, np.int64),
            "head_size": np.zeros(count, np.int64),
        }

    def add(self, models: _Models) -> None:
        numbers = np.arange(self._seen, self._seen + len(models.repos))
        self._seen += len(models.repos)
        places = self._plan.place[numbers[: len(self._plan.place) - int(numbers[0])]]
        if [self._plan.repos[place] for place in places.tolist()] != models.repos:
            raise ValueError("the rows of the second pass are not those of the first")
        layouts = self._plan.layout[numbers]
        moments = _moments(models.table)
        sketches = _Sketches(models.table["sketch"])
        for layout in np.unique(layouts[layouts >= 0]).tolist():
            self._write(models, np.flatnonzero(layouts == layout), places, layout, moments, sketches)
        self._columns["precision"][places] = _precisions(models)
        self._write_heads(models, places, moments, sketches)

    def _write(
        self,
        models: _Models,
        chosen: Ints,
        places: Ints,
        layout: int,
        moments: npt.NDArray[np.float32],
        sketches: _Sketches,
    ) -> None:
        placed = self._plan.layouts[layout]
        tensors = len(placed.equal)
        rows = models.backbone[models.starts[chosen][:, None] + np.arange(tensors)]
        record = np.zeros((len(chosen), placed.width), np.float32)
        record[:, : 3 * tensors] = (
            (moments[rows] * placed.equal[:, None]).transpose(0, 2, 1).reshape(len(chosen), -1)
        )
        values, there = sketches.of(rows[:, placed.layers])
        there &= placed.equal[placed.layers]
        record[:, 3 * tensors :] = np.where(there[:, :, None], values, 0).reshape(len(chosen), -1)
        self._columns["usable"][places[chosen]] = there.any(axis=1)
        for place, numbers in zip(places[chosen].tolist(), record, strict=True):
            self._statistics.seek(placed.offset + 4 * placed.width * (place - placed.first))
            self._statistics.write(numbers.tobytes())

    def _write_heads(
        self, models: _Models, places: Ints, moments: npt.NDArray[np.float32], sketches: _Sketches
    ) -> None:
        """Of each tensor the mean, the deviation, and the sketch where there is one."""
        rows = models.head
        values, there = sketches.of(rows[:, None])
        numbers = np.concatenate([moments[rows][:, :2], values[:, 0]], axis=1)
        kept = np.ones(numbers.shape, bool)
        kept[:, 2:] = there
        matrices = (models.shapes[rows] >= 0).sum(axis=1) > 1
        for model, place in enumerate(places.tolist()):
            span = slice(int(models.head_starts[model]), int(models.head_starts[model + 1]))
            head = numbers[span][kept[span]][:_HEAD_NUMBERS]
            first = np.flatnonzero(matrices[span])
            self._columns["classes"][place] = models.shapes[rows[span][first[0]], 0] if len(first) else 0
            self._columns["head_start"][place] = self._written
            self._columns["head_size"][place] = len(head)
            self._heads.write(head.tobytes())
            self._written += len(head)

    def close(self, folder: Path) -> None:
        columns: dict[str, Any] = {"repo": pa.array(self._plan.repos, pa.string()), **self._columns}
        _write_table(pa.table(columns), folder / "models.arrow")
        _write_table(pa.table(self._plan.families, schema=pa.schema(_FAMILIES)), folder / "families.arrow")


def _write_table(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def _moments(table: pa.Table) -> npt.NDArray[np.float32]:
    """(rows, 3) mean, standard deviation and kurtosis, 0 where there is none."""
    columns = [table[name].to_numpy().astype(np.float32) for name in ("mean", "std", "kurtosis")]
    moments = np.stack(columns, axis=1)
    return np.where(np.isfinite(moments), moments, np.float32(0))


class _Sketches:
    """The sketches of a batch by row."""

    def __init__(self, column: Column) -> None:
        self._starts, lengths, values = _lists(column)
        self._values = values.astype(np.float32, copy=False)
        self._there = lengths == WIDTH

    def of(self, rows: Ints) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """(..., 32) and (...,): the sketches, 0 where none can be used, and whether one can."""
        there = self._there[rows]
        if not there.any():
            return np.zeros((*rows.shape, WIDTH), np.float32), there
        at = np.where(there, self._starts[rows], 0)
        values = self._values[at[..., None] + np.arange(WIDTH)]
        there = there & np.isfinite(values).all(axis=-1)
        return np.where(there[..., None], values, np.float32(0)), there


def _precisions(models: _Models) -> npt.NDArray[np.int64]:
    """(m,) bits of the significand of the type that most numbers without the head have."""
    bits = np.array([_SIGNIFICANDS.get(dtype, 0) for dtype in models.dtypes], np.int64)
    kinds = np.unique(bits)
    rows = models.backbone
    model = np.repeat(np.arange(len(models.repos)), np.diff(models.starts))
    shapes = models.shapes[rows]
    sizes = np.prod(np.where(shapes >= 0, shapes, 1).astype(np.float64), axis=1)
    kind = np.searchsorted(kinds, bits[models.types[rows]])
    counts = np.bincount(model * len(kinds) + kind, sizes, minlength=len(models.repos) * len(kinds))
    # Of equal counts the finer type.
    table = counts.reshape(len(models.repos), len(kinds))[:, ::-1]
    return kinds[::-1][table.argmax(axis=1)] if len(kinds) else np.zeros(len(models.repos), np.int64)

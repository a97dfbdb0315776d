"""The generators of a generation: their rows by condition and name, their descriptions, their samples as pictures.

The descriptions of a small index (up to ``EXACT_GENERATORS`` that differ) are read into memory once; those of a large one
as a query needs them, by a vector index over groups of their samples.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.arrays import Floats, values_of
from probelog.errors import QueryError, StoreError, suggestion
from probelog.index import shortlist
from probelog.index.arrow import structured
from probelog.index.contents.opened import Once, OpenedGeneration
from probelog.index.generators.encoding import MOST_COORDINATES, StoredDescriptions, decode, description_type
from probelog.index.generators.groups import GROUP_COORDINATES, GroupSpace
from probelog.index.generators.schema import GENERATOR_FACTS, GENERATOR_TABLE, SHOWN, GeneratorSettings
from probelog.index.generators.shown import unpacked
from probelog.index.tables import Tables, completed, first_line, is_valid_sql_text, sql_in, sql_literal
from probelog.ranking.samples.description import Descriptions, Float32s
from probelog.ranking.samples.matched import Asked, SampleSpace
from probelog.ranking.samples.sketches import SketchMap

if TYPE_CHECKING:
    from probelog.index.generation import Generation

# Up to so many generators that differ all are scored: 64 samples each in 256 dimensions are 130 MB.
EXACT_GENERATORS = 2_000
_MOST_IN_MEMORY = 100_000
# What is shown of one generator's samples.
_MOST_PICTURES = 12
_PICTURE_BYTES = 1 << 20
# Number of names that an unknown one is compared with, to suggest similar ones.
_COMPARED_NAMES = 10_000
# Names of one SQL condition, and rows of one block.
_NAMES_AT_ONCE = 500
_BLOCK = 1024
# A vector index by inner product is searched so many times as far as for logits: its partitions hold groups of many concepts, and
# of a million synthetic generators one question in thirty was answered wrong without it (docs/performance.md).
_EFFORT = 6
Int64 = npt.NDArray[np.int64]


class GeneratorTables(OpenedGeneration):
    """Reads the generators, where there are any."""

    @Once
    def generators(self) -> Generators:
        """The generators.

        Raises:
            QueryError: the index holds none.
        """
        settings = self.settings.generators
        if settings is None:
            raise QueryError(
                f"this index holds no generators ({self.index.uri}): it was published without them, or by an older "
                "version. Whoever publishes it can add them: probelog-index full, with [generators] enabled = true"
            )
        own, base = self.pointer.generation, self.settings.base
        if settings.generation not in (own, None if base is None else base.generation):
            raise self.damaged("settings", "its generators lie in another generation")
        if settings.groups is None and settings.rows > _MOST_IN_MEMORY:
            raise self.damaged("settings", "its generators are too many to be held in memory")
        tables = self._tables if settings.generation == own else self._base
        counts = {"generators": settings.models, "samples": settings.rows, "groups": settings.groups}
        tables.expect({name: range(count, count + 1) for name, count in counts.items() if count is not None})
        return Generators(self, tables, settings)  # type: ignore[arg-type] # a part of Generation


class Generators:
    """The generators of one generation. Safe to share between threads."""

    def __init__(self, generation: Generation, tables: Tables, settings: GeneratorSettings) -> None:
        self._generation, self._tables, self.settings = generation, tables, settings

    def __len__(self) -> int:
        return self.settings.models

    @property
    def large(self) -> bool:
        """Whether it is searched by a shortlist instead of being held in memory."""
        return self.settings.groups is not None

    def rows(self, columns: Sequence[str], where: str | None = None, limit: int | None = None) -> pa.Table:
        """Columns of the generators, all or those that meet an SQL condition, and ``id``; sorted by ``id``.

        Raises:
            QueryError: the condition is not understood; names the columns.
        """
        names = list(dict.fromkeys(["id", "row", *columns]))
        condition = None if where is None else f"({where}\n)"
        with self._generation._filter_errors(where, "generators", self._tables):
            found = self._tables.rows("generators", names, condition, limit or self.settings.models).sort_by(
                "id"
            )
        if found.num_rows and max(values_of(found["row"], int)) >= self.settings.rows:
            raise self._tables.damaged("generators", "a generator has samples that the index does not have")
        return found

    def numbered(self, numbers: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Columns of the generators with some numbers, and ``id``, in the order of the numbers.

        Raises:
            StoreError: a number has no row.
        """
        if not len(numbers):
            return []
        unique_numbers, places = np.unique(np.asarray(numbers, np.int64), return_inverse=True)
        names = list(dict.fromkeys(["id", *columns]))
        with self._tables.reading("generators"):
            query = self._tables.open("generators").take_offsets(unique_numbers.tolist())
            found = completed(query.select(self._tables.present("generators", names)).to_arrow(), names)
        self._tables.check_rows("generators", found)
        rows = sorted(found.to_pylist(), key=lambda row: int(row["id"]))
        if [row["id"] for row in rows] != unique_numbers.tolist():
            raise self._tables.gap_error("generators")
        return [rows[place] for place in places]

    def shown(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """All facts of the generators with some numbers, and ``id``, in the order of the numbers.

        Raises:
            StoreError: a number has no row.
        """
        if not self._tables.present("generators", [SHOWN.name]):
            return self.numbered(numbers, GENERATOR_FACTS.names)
        rows = self.numbered(numbers, [SHOWN.name])
        try:
            facts = unpacked([row[SHOWN.name] for row in rows])
        except ValueError as error:
            raise self._tables.damaged("generators", first_line(error)) from None
        self._tables.check_rows("generators", facts)
        return [{"id": row["id"], **known} for row, known in zip(rows, facts.to_pylist(), strict=True)]

    def called(self, repos: Iterable[str], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Columns of the generators of some repositories, and ``id``."""
        names, rows = sorted(filter(is_valid_sql_text, repos)), []
        for start in range(0, len(names), _NAMES_AT_ONCE):
            found = self.rows(columns, sql_in("repo", names[start : start + _NAMES_AT_ONCE]))
            rows += found.to_pylist()
        return rows

    def blocks(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Columns of all generators, some at a time."""
        yield from self._tables.blocks("generators", columns, None, _BLOCK)

    def named(self, repo: str) -> dict[str, Any] | None:
        """The row of one repository's generator; None without one."""
        if not is_valid_sql_text(repo):
            return None
        rows = self.rows(GENERATOR_TABLE.names, f"repo = {sql_literal(repo)}", limit=1).to_pylist()
        return rows[0] if rows else None

    def row_named(self, repo: str) -> dict[str, Any]:
        """The row of one repository's generator.

        Raises:
            QueryError: the index does not hold it; the message names similar ones.
        """
        row = self.named(repo)
        if row is not None:
            return row
        raise QueryError(f"the index does not hold a generator {repo!r}{suggestion(self.similar(repo))}")

    def similar(self, repo: str) -> list[str]:
        """Up to three repositories of generators with a similar name."""
        some = self.rows(["repo"], limit=_COMPARED_NAMES)["repo"]
        return difflib.get_close_matches(repo, values_of(some, str), n=3, cutoff=0.5)

    def count(self, where: str) -> int:
        """How many generators meet an SQL condition."""
        with self._generation._filter_errors(where, "generators", self._tables):
            return self._tables.count("generators", f"({where}\n)")

    # Descriptions

    @cached_property
    def axes(self) -> Float32s:
        """Axes (p, d) of the coordinates of descriptions."""
        width = self._generation.space.centre.shape[0]
        array = self._generation._array("sample_axes.npy", [range(1, MOST_COORDINATES + 1), width])
        return np.asarray(array, np.float32)

    @cached_property
    def space(self) -> SampleSpace:
        """What queries are scored with, in coordinates."""
        head = self._generation.space
        centre, directions, names = (
            np.asarray(item, np.float32) for item in (head.centre, head.background, head.texts)
        )
        sharpness = self.settings.direction_sharpness, self.settings.embedding_sharpness
        return SampleSpace(centre, directions, names, *sharpness).projected(self.axes)

    @cached_property
    def sketch_map(self) -> SketchMap | None:
        """How sketches become pictures; None where the index does not know."""
        if not self.settings.sketches:
            return None
        width = self._generation.space.centre.shape[0]
        return SketchMap.from_array(self._generation._array("sketch_map.npy", [width + 3, width]))

    @cached_property
    def all(self) -> StoredDescriptions:
        """All descriptions, by row. For small indexes, or a machine with 80 KB of memory per generator."""
        return self.stored(np.arange(self.settings.rows))

    def stored(self, rows: Int64) -> StoredDescriptions:
        """The descriptions at some rows, in the order of ``rows``.

        Raises:
            StoreError: a row is missing, or a value is none.
        """
        return self.candidates(rows)[0]

    def candidates(self, rows: Int64) -> tuple[StoredDescriptions, Int64]:
        """The descriptions at some rows, in their order, and the first generator (N,) of each.

        Raises:
            StoreError: a row is missing, a value is none, or a row names no generator.
        """
        unique_rows, places = np.unique(rows, return_inverse=True)
        kind = description_type(len(self.axes))
        known = self._first_generators
        # Two more columns take as long to read as the descriptions.
        told = [] if known is not None else ["row", "generator"]
        with self._tables.reading("samples"):
            query = self._tables.open("samples").take_offsets(unique_rows.tolist()).with_row_id()
            found = query.select([*told, "description", shortlist.ROW_ID]).to_arrow()
            values = structured(found["description"], kind)
        self._tables.check_rows("samples", found.drop_columns([shortlist.ROW_ID]))
        if known is None:
            numbers, makers = (np.asarray(found[name].to_numpy(), np.int64) for name in told)
            makers = self._existing(makers)
        elif found.num_rows != len(unique_rows):
            raise self._tables.gap_error("samples")
        else:  # LanceDB's numbers rise as the rows do
            numbers = unique_rows[found[shortlist.ROW_ID].to_numpy().argsort().argsort()]
            makers = known[numbers]
        if not np.array_equal(numbers, rows):  # a copy costs as much as to read them
            order = np.argsort(numbers)
            if not np.array_equal(numbers[order], unique_rows):
                raise self._tables.gap_error("samples")
            values, makers = values[order[places]], makers[order[places]]
        try:
            return decode(values), makers
        except ValueError as error:
            raise self._tables.damaged("samples", str(error)) from None

    @cached_property
    def group_space(self) -> GroupSpace:
        """Makes the vectors that a large index is searched with."""
        axes = self._generation._array("group_axes.npy", [range(1, GROUP_COORDINATES + 1), len(self.axes)])
        spread = self._generation.space.spread
        return GroupSpace(self.space, np.asarray(axes, np.float32), spread**0.5)

    @cached_property
    def _first_groups(self) -> Int64 | None:
        """LanceDB's number of the first group of each row of ``samples``; None where the index does not say."""
        return self._by_row("row_groups.npy")

    @cached_property
    def _first_generators(self) -> Int64 | None:
        """The first generator of each row of ``samples``; None where the index does not say."""
        numbers = self._by_row("row_generators.npy")
        return None if numbers is None else self._existing(numbers)

    def _existing(self, makers: Int64) -> Int64:
        """Numbers of generators, which the index must have."""
        if len(makers) and not (makers.min() >= 0 and makers.max() < len(self)):
            raise self.damaged("a row has a generator that the index does not have")
        return makers

    def _by_row(self, key: str) -> Int64 | None:
        if not self.settings.by_row:
            return None
        return np.asarray(self._generation._array(key, [self.settings.rows], "i"), np.int64)

    def shortlisted(self, asked: Asked, count: int) -> Int64:
        """Rows of the generators of the ``count`` best groups for one expert of a query, in coordinates; of a large index."""
        with self._tables.reading("groups"):
            table = self._tables.open_for_search("groups")
            distance: shortlist.Distance = "l2" if self.settings.euclidean else "dot"
            effort = 1 if self.settings.euclidean else _EFFORT
            first = self._first_groups
            column = "row" if first is None else shortlist.ROW_ID
            found = shortlist.look_up(table, self.group_space.query(asked), count, effort, column, distance)
        rows = np.asarray(found.to_numpy(), np.int64)
        if first is not None:
            rows = np.searchsorted(first, rows, "right") - 1
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.settings.rows):
            raise self._tables.damaged("groups", "a row has a number that the index does not have")
        return np.unique(rows)

    def pictures(self, rows: Sequence[int]) -> list[list[bytes]]:
        """Samples as pictures (WebP), of the generators at some rows, in their order."""
        unique_rows = sorted(set(rows))
        with self._tables.reading("samples"):
            query = self._tables.open("samples").take_offsets(unique_rows)
            found = query.select(["row", "thumbnails"]).to_arrow().to_pylist()
        by_row = {int(item["row"]): item["thumbnails"] or [] for item in found}
        if len(by_row) != len(unique_rows):
            raise self._tables.gap_error("samples")
        return [self._checked(by_row[row]) for row in rows]

    def _checked(self, pictures: Sequence[bytes | None]) -> list[bytes]:
        if len(pictures) > _MOST_PICTURES or any(
            item is None or len(item) > _PICTURE_BYTES for item in pictures
        ):
            raise self._tables.damaged("samples", "its pictures are too many, or too large")
        return [bytes(item) for item in pictures if item is not None]

    # For nightly runs, which ask several times what a generation has.

    @cached_property
    def versions(self) -> frozenset[tuple[str, str]]:
        """Repositories and commits of all generators."""
        rows = self.rows(["repo", "sha"])
        return frozenset(zip(values_of(rows["repo"], str), values_of(rows["sha"], str), strict=True))

    # For evaluation, which describes models by fewer samples.

    @property
    def repos(self) -> list[str]:
        """Repositories by number."""
        return values_of(self.rows(["repo"])["repo"], str)

    def features(self) -> list[Floats]:
        """The kept features (m, p) of every generator by number, in coordinates of ``axes``."""
        described = self.all.described
        pieces = np.split(described.features, np.cumsum(described.counts)[:-1])
        return [pieces[row] for row in values_of(self.rows(["row"])["row"], int)]

    @property
    def descriptions(self) -> Descriptions:
        """Descriptions of every generator by number, in coordinates of ``axes``."""
        rows = np.asarray(values_of(self.rows(["row"])["row"], int), np.int64)
        return self.all.described.at(rows)

    def damaged(self, reason: str) -> StoreError:
        """The error for numbers that, sound one by one, give none together."""
        return self._tables.damaged("samples", reason)

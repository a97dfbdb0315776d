"""The published index's building blocks: pointer, tables, matrices in columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probelog.errors import IndexNotFoundError, SchemaVersionError, StoreError
from probelog.index.arrow import fixed_lists, matrix_of
from probelog.index.basis import Basis
from probelog.index.pointer import POINTER_VERSION, Pointer, find_index, read_pointer
from probelog.index.schema import INDEX_VERSION, MODELS, connect, logit_facts, logits_schema
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.lifecycle import go_live
from probelog.ranking.matched_heads import Background
from probelog.storage.layout import POINTER
from probelog.storage.store import Store

names = st.text(min_size=1, max_size=20)


generations = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True)


@given(generations, names, names, st.lists(generations, max_size=3))
def test_a_pointer_is_read_as_it_was_written(
    generation: str, source: str, published: str, past: list[str]
) -> None:
    others = [{"generation": name, "source": "s", "published": "p", "files": "f"} for name in past]
    pointer = Pointer(generation, source, published, "f", others, others[1:], dict.fromkeys(past, "t"), 7)
    assert Pointer.from_bytes(pointer.to_bytes(), "here") == pointer


@given(st.binary(max_size=200))
def test_any_bytes_are_a_pointer_or_damaged(data: bytes) -> None:
    with pytest.raises(StoreError, match=r"here is damaged|newer than this ProbeLog"):
        Pointer.from_bytes(data, "here")


def test_programs_of_this_release_read_what_is_written() -> None:
    """A larger number shuts them out: it belongs to a change that they cannot read."""
    assert (POINTER_VERSION, INDEX_VERSION) == (1, 1)


def test_a_newer_pointer() -> None:
    newer = Pointer("a", "s", "p", version=POINTER_VERSION + 1, made_by="probelog 9.1").to_bytes()
    with pytest.raises(SchemaVersionError, match=r"Upgrade ProbeLog \S+ to 9\.1 or newer"):
        Pointer.from_bytes(newer, "here")


def test_the_pointer_remembers_as_many_as_are_kept(tmp_path: Path) -> None:
    index = Store(tmp_path / "index")
    with pytest.raises(IndexNotFoundError, match="publish one first"):
        read_pointer(index)
    for name in ("a", "b", "c", "d"):
        GenerationWriter(index, name).finish()
        pointer = go_live(index, name, f"source of {name}", keep=3)
    assert [item["generation"] for item in pointer.previous] == ["c", "b"]
    assert [item["source"] for item in pointer.previous] == ["source of c", "source of b"]
    assert read_pointer(index)[0] == pointer
    assert find_index(str(tmp_path)).uri == find_index(index.uri).uri == index.uri


def test_a_damaged_pointer_is_not_published_over(tmp_path: Path) -> None:
    index = Store(tmp_path / "index")
    GenerationWriter(index, "a").finish()
    index.write(POINTER, b"{")
    with pytest.raises(StoreError, match="Delete it and publish again"):
        go_live(index, "a", "s")
    assert index.read(POINTER) == b"{"
    index.delete(POINTER)
    assert go_live(index, "a", "s").previous == []


@given(st.integers(0, 6), st.integers(1, 4), st.integers(1, 3))
def test_matrices_travel_in_columns(rows: int, width: int, chunks: int) -> None:
    matrix = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    column = pa.chunked_array([fixed_lists(matrix, pa.float32())] * chunks)
    np.testing.assert_array_equal(matrix_of(column), np.concatenate([matrix] * chunks))
    np.testing.assert_array_equal(
        matrix_of(column.slice(rows // 2)), np.concatenate([matrix] * chunks)[rows // 2 :]
    )


def test_no_chunk_is_a_matrix_without_rows() -> None:
    empty = pa.chunked_array([], pa.list_(pa.float32(), 5))
    assert matrix_of(empty).shape == (0, 5)


def test_a_writer_takes_a_new_name(tmp_path: Path) -> None:
    index = Store(tmp_path)
    writer = GenerationWriter(index, "a")
    with pytest.raises(StoreError, match="there is a generation a already"):
        GenerationWriter(index, "a")
    writer.write_meta({"settings": b"{}", "large": bytes(3_000_000)})
    rows = connect(index, "a").open_table("meta").to_arrow().to_pylist()
    assert {row["key"]: len(row["value"]) for row in rows} == {"settings": 2, "large": 3_000_000}


def test_a_writer_streams_batches(tmp_path: Path) -> None:
    def batches() -> Iterator[pa.Table]:
        for start in range(0, 50, 7):
            count = min(7, 50 - start)
            rows = [{"id": start + i, "repo": f"a/{start + i}"} for i in range(count)]
            yield pa.Table.from_pylist(rows, MODELS)

    writer = GenerationWriter(Store(tmp_path), "a")
    assert writer.write("models", MODELS, batches()) == 50
    read = connect(Store(tmp_path), "a").open_table("models").to_arrow()
    assert read["id"].to_pylist() == list(range(50))


def test_a_generation_is_not_live_before_the_swap(tmp_path: Path) -> None:
    GenerationWriter(Store(tmp_path), "a").write_meta({"settings": b"{}"})
    with pytest.raises(IndexNotFoundError):
        find_index(str(tmp_path))


@pytest.mark.parametrize(
    ("probes", "width", "shown"), [(3, 2, 3), (8, 2, 8), (1 << 16, 2, 8), ((1 << 16) + 1, 4, 8)]
)
def test_numbers_of_probes_fit_whatever_the_size_of_the_probe_set(
    probes: int, width: int, shown: int
) -> None:
    rows = np.random.default_rng(0).normal(size=(9, 80))
    basis = Basis.fit(rows, Background(rows[:3], 4.0))
    facts = logit_facts(basis, probes)
    kind, shape = facts["probes"].subdtype or (facts["probes"], ())
    assert (kind.kind, kind.itemsize, shape) == ("u", width, (shown,))
    assert [facts[name].shape for name in ("precise", "rest")] == [(63,), (80 - 63,)]
    schema = logits_schema(basis, probes)
    assert schema.field("facts").type == pa.binary(facts.itemsize)
    assert schema.field("vector").type.list_size == basis.width == 64

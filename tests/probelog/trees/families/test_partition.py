"""Families on disk: what rows become, however they are cut, and what a layout leaves out."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probelog.storage.schemas import WEIGHTS
from probelog.trees.families.family import family_of
from probelog.trees.families.layouts import is_head, layout_of
from probelog.trees.families.partition import Partition, partition
from probelog.trees.families.tables import families
from tests.benchmarks.trees_world import Forest, Node, weights_table

BLOCKS = {f"blocks.{n}.mlp.weight": np.full((3, 4), float(n + 1)) for n in range(4)}


@pytest.fixture(scope="module")
def weights():
    return weights_table(Forest(9, trees=1, models=5).world.uploaded)


def same(one, other):
    assert (one.key, one.repos, one.tensors, one.shapes) == (
        other.key,
        other.repos,
        other.tensors,
        other.shapes,
    )
    for name in ("layers", "statistics", "classes", "precision", "usable", "head_sizes"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    for model in range(len(one)):
        assert np.array_equal(one.head(model), other.head(model))


def in_memory(family):
    return family.take(np.arange(len(family)))


@settings(max_examples=10, deadline=None)
@given(st.integers(5, 400))
def test_however_the_rows_are_cut_the_families_are_the_same(weights, tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("families")

    parts = partition(lambda columns: weights.select(columns).to_batches(max_chunksize=rows), folder)

    for family in families(weights):
        same(family, in_memory(parts.family(family.key)))


def test_a_partition_opens_again_the_largest_family_first(weights, tmp_path):
    made = partition(lambda columns: [weights.select(columns)], tmp_path)

    again = Partition(tmp_path)

    assert again.keys == made.keys
    sizes = [again.models(key) for key in again.keys]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes == [len(again.family(key)) for key in again.keys]


def test_a_family_survives_as_a_table(weights):
    for family in families(weights):
        same(family, family_of(family.table()))


@pytest.mark.parametrize("change", ["no metadata", "no column", "other shapes"])
def test_a_table_that_is_no_family_is_refused(weights, change):
    table = families(weights)[0].table()
    if change == "no metadata":
        table = table.replace_schema_metadata({})
    elif change == "no column":
        table = table.drop_columns(["head"])
    else:
        table = table.replace_schema_metadata(
            {"family": '{"key": "a", "tensors": [], "shapes": [], "layers": []}'}
        )

    with pytest.raises(ValueError, match="no family of models"):
        family_of(table)


def test_a_repository_that_comes_twice_counts_once(weights, tmp_path):
    parts = partition(lambda columns: [weights.select(columns)] * 2, tmp_path)

    assert sum(parts.models(key) for key in parts.keys) == len(set(weights["repo"].to_pylist()))


def test_other_rows_in_the_second_pass_are_refused(weights, tmp_path):
    passes = iter([weights, weights.slice(len(weights) // 2)])

    with pytest.raises(ValueError, match="second pass"):
        partition(lambda columns: [next(passes).select(columns)], tmp_path)


def test_rows_without_models_make_no_family(tmp_path):
    assert len(partition(lambda columns: [WEIGHTS.empty_table().select(columns)], tmp_path)) == 0


def test_tensors_of_absurd_shape_leave_their_model_out(tmp_path):
    rows = [
        {
            "repo": repo,
            "sha": "0",
            "tensor": "a.weight",
            "dtype": "float32",
            "shape": shape,
            "sketch": [1.0] * 32,
        }
        for repo, shape in (("good", [2, 2]), ("bad", [1] * 100), ("none", None), ("zero", [0, 2]))
    ]
    table = pa.Table.from_pylist(rows, WEIGHTS)

    parts = partition(lambda columns: [table.select(columns)], tmp_path)

    names = {repo for key in parts.keys for repo in parts.family(key).repos}
    assert names == {"good", "none", "zero"}


def layout(tensors):
    names = sorted(tensors)
    return layout_of(names, [np.shape(tensors[name]) for name in names], [True] * len(names))


def test_a_prefix_of_all_tensors_changes_no_family():
    assert layout({f"module.{name}": x for name, x in BLOCKS.items()}).key == layout(BLOCKS).key
    assert layout({f"0.{name}": x for name, x in BLOCKS.items()}).key != layout(BLOCKS).key


def test_the_shape_of_an_embedding_changes_no_family_and_that_of_a_block_does():
    def key(positions, width=4):
        return layout(
            {**BLOCKS, "pos_embed": np.ones((1, positions, 4)), "blocks.9.x": np.ones((2, width))}
        ).key

    assert key(5) == key(17)
    assert key(5) != key(5, width=5)


def test_shapes_count_where_most_tensors_lie_in_no_block():
    assert (
        layout({"a": np.ones((2, 2)), "b": np.ones((2, 2))}).key
        != layout({"a": np.ones((2, 3)), "b": np.ones((2, 2))}).key
    )


def test_fused_tensors_are_another_family():
    apart = {f"blocks.{n}.{part}": np.ones((2, 2)) for n in range(3) for part in ("q", "k", "v")}
    fused = {f"blocks.{n}.qkv": np.ones((6, 2)) for n in range(3)}

    assert layout(apart).key != layout(fused).key


def test_what_a_minority_has_in_another_shape_is_left_out():
    random = np.random.default_rng(0)

    def model(repo, positions):
        blocks = {name: random.standard_normal(x.shape) for name, x in BLOCKS.items()}
        return Node(repo, {**blocks, "pos_embed": random.standard_normal((1, positions, 4))})

    (family,) = families(weights_table([model("a", 5), model("b", 5), model("c", 9)]))

    at = family.tensors.index("pos_embed")
    layer = family.layers.tolist().index(at)
    assert family.shapes[at] == (1, 5, 4)
    assert family.sketches[:, layer].any(axis=1).tolist() == [True, True, False]
    assert (family.mean[:, at] != 0).tolist() == [True, True, False]


@pytest.mark.parametrize("name", ["head.weight", "classifier.bias", "model.fc.weight", "head.fc.weight"])
def test_heads_are_told_by_their_names(name):
    assert is_head(name)
    assert not is_head(f"blocks.0.{name}")

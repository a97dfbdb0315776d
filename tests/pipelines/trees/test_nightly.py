"""Models that nightly runs add to and remove from trees of an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.trees import nightly as nightly_module
from pipelines.trees.inputs import TreeInputs
from pipelines.trees.nightly import UpdateTrees, attach_changes
from probelog.errors import StoreError
from probelog.index.generation import Generation
from probelog.storage.layout import TreesFolder
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import EDGES, TreeFacts
from probelog.storage.store import Store
from probelog.trees.edges import Edge
from probelog.trees.families.family import Family
from probelog.trees.recovery.attach import Attachment
from tests.support.worlds import small_index
from tests.support.worlds.tree_store import TreeStore, network, tuned

ROOT = network(0)


class Nights:
    """Nightly runs over an index of a store's models."""

    def __init__(self, world: TreeStore, index: Store) -> None:
        self.world = world
        world.recover()
        models = [small_index.Model(repo, ("a", "b")) for repo in sorted(world.rows)]
        edges = read_part(world.store, world.done.edges, EDGES)
        made = small_index.build(index, models=models, edges=edges, settings={"trees": world.done.key})
        self.base = Generation(index, made.pointer)
        self.nightly = world.beside(f"k-{made.pointer.generation}")
        self.removed: set[str] = set()

    def run(self, **trees: Any) -> UpdateTrees | None:
        nightly = self.nightly
        inputs = TreeInputs.of(nightly.store, nightly.receipts, nightly.rows.values())
        return attach_changes(nightly.job(**trees), self.base, inputs, self.removed)

    def edges(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        """Those of the update; its places are kept."""
        update = self.run()
        assert update is not None
        self.places = update.places
        return {(row["child"], row["parent"]): row for row in update.edges.to_pylist()}


@pytest.fixture
def nights(world: TreeStore, tmp_path: Path) -> Nights:
    return Nights(world, Store(tmp_path / "index"))


def test_an_added_model_is_attached_to_its_family(nights: Nights) -> None:
    nights.nightly.add("dan/new", tuned(ROOT, 7))
    assert set(nights.edges()) == {("dan/new", "ada/root")}
    assert nights.places == {"dan/new": TreeFacts(root="ada/root", parent="ada/root", depth=1)}


def test_each_is_compared_once_and_with_those_of_earlier_nights(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[list[str], int]] = []

    class Counted(Attachment):
        def attach(self, newcomers: Family) -> list[Edge]:
            compared.append((list(newcomers.repos), len(self._family.repos)))
            return super().attach(newcomers)

    monkeypatch.setattr(nightly_module, "Attachment", Counted)
    first = tuned(ROOT, 7, 0.3)
    nights.nightly.add("dan/new", first)
    nights.edges()
    written = set(nights.world.store.names("trees"))
    assert set(nights.edges()) == {("dan/new", "ada/root")}
    assert set(nights.world.store.names("trees")) == written, "a night without news writes nothing"
    nights.nightly.add("dan/newer", tuned(first, 8, 0.05))
    assert set(nights.edges()) == {("dan/new", "ada/root"), ("dan/newer", "dan/new")}
    assert nights.places["dan/newer"] == TreeFacts(root="ada/root", parent="dan/new", depth=2)
    assert compared == [(["dan/new"], 4), (["dan/newer"], 5)]


def test_a_new_commit_takes_the_place_of_the_last(nights: Nights) -> None:
    nights.nightly.add("dan/new", tuned(ROOT, 7))
    nights.edges()
    nights.nightly.add("dan/new", tuned(network(1, width=16), 8), sha="b" * 40)
    assert set(nights.edges()) == {("dan/new", "cleo/root")}
    del nights.nightly.rows["dan/new"]
    assert nights.edges() == {}
    assert nights.places == {}


def test_copies_of_models_of_the_base(nights: Nights) -> None:
    nights.nightly.rows["bob/child"] = nights.world.rows["bob/child"]
    nights.nightly.add("dan/copy", None, copy_of="bob/child")
    del nights.nightly.rows["bob/child"]
    edges = nights.edges()
    assert set(edges) == {("dan/copy", "bob/child")}
    assert edges["dan/copy", "bob/child"]["relation"] == "copy"
    assert nights.places["dan/copy"] == TreeFacts(root="ada/root", parent="bob/child", depth=2)


def test_a_model_of_a_new_architecture_is_a_root(nights: Nights) -> None:
    nights.nightly.add("dan/other", network(5, width=12))
    nights.nightly.add("dan/unreadable", None)
    assert nights.edges() == {}
    assert nights.places == {"dan/other": TreeFacts(root="dan/other", parent=None, depth=0)}
    written = set(nights.world.store.names("trees"))
    nights.edges()
    assert set(nights.world.store.names("trees")) == written


def test_a_removed_parent_becomes_a_latent_ancestor(nights: Nights) -> None:
    nights.removed = {"cleo/root"}
    edges = nights.edges()
    assert {pair: edge["latent"] for pair, edge in edges.items()} == {("cleo/child", "cleo/root"): True}
    assert nights.places == {"cleo/child": TreeFacts(root="cleo/root", parent="cleo/root", depth=1)}
    nights.nightly.add("dan/new", tuned(network(1, width=16), 8))
    edges = nights.edges()
    assert edges["dan/new", "cleo/root"]["latent"] is True, (
        "it is compared with what is kept of the removed one"
    )
    nights.removed |= {"cleo/child"}
    assert set(nights.edges()) == {("dan/new", "cleo/root")}


def test_no_model_becomes_its_own_ancestor(nights: Nights) -> None:
    """A root that is made from its own grandchild in a new commit."""
    nights.removed = {"ada/root"}
    child = tuned(ROOT, 1)
    nights.nightly.add("ada/root", tuned(child, 9, 0.02), sha="b" * 40)
    edges = nights.edges()
    assert ("ada/root", "ada/child") not in edges
    assert not any(edge["latent"] for edge in edges.values())
    assert nights.places["ada/root"].root == "ada/root"


def test_without_trees_there_are_none(nights: Nights) -> None:
    assert nights.run(enabled=False) is None
    nights.world.store.delete_folder(TreesFolder.of(nights.world.done.key).path)
    with pytest.raises(StoreError, match="is missing: run `probelog-index full`"):
        nights.run()

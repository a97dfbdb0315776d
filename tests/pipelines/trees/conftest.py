"""Two small families in a store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from probelog.storage.schemas import Parent
from tests.support.worlds.tree_store import TreeStore, network, tuned


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> TreeStore:
    """A root with two children and a copy, another one with a child, and a model alone. Not to be changed."""
    world = TreeStore(tmp_path_factory.mktemp("trees"))
    root, other = network(0), network(1, width=16)
    world.add("ada/root", root)
    world.add("ada/child", tuned(root, 1))
    world.add("bob/child", tuned(root, 2), parents=[Parent("ada/root", "finetune", "card")])
    world.add("ada/copy", None, copy_of="ada/root")
    world.add("cleo/root", other)
    world.add("cleo/child", tuned(other, 3))
    world.add("cleo/alone", network(4, width=8))
    return world


@pytest.fixture
def world(made: TreeStore, tmp_path: Path) -> TreeStore:
    """The same, to be changed."""
    shutil.copytree(made.store.root, tmp_path / "store")
    world = TreeStore(tmp_path)
    world.rows |= made.rows
    return world

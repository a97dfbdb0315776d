"""The trees stage over ledgers whose weights are known, whole, killed and damaged."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.inspect.status import status
from pipelines.inspect.verify import verify
from pipelines.job.progress import Report
from pipelines.trees import stage as stage_module
from pipelines.trees.record import read_places, read_trees
from probelog.errors import SchemaVersionError, StoreError
from probelog.storage.layout import TreesFolder
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import EDGES, TreeFacts
from tests.support.worlds.tree_store import START, TreeStore, network

EXPECTED = {
    ("ada/child", "ada/root"),
    ("ada/copy", "ada/root"),
    ("bob/child", "ada/root"),
    ("cleo/child", "cleo/root"),
}


def test_edges_and_places(world: TreeStore) -> None:
    edges = world.recover()
    assert set(edges) == EXPECTED
    assert edges["ada/copy", "ada/root"]["relation"] == "copy"
    assert edges["bob/child", "ada/root"]["declared"] is True
    assert edges["ada/child", "ada/root"]["declared"] is None
    assert not any(edge["latent"] for edge in edges.values())
    places = read_places(world.store, world.done)
    assert set(places) == set(world.rows)
    assert places["ada/copy"] == TreeFacts(root="ada/root", parent="ada/root", depth=1)
    assert places["ada/root"] == TreeFacts(root="ada/root", parent=None, depth=0)
    assert places["cleo/alone"] == TreeFacts(root="cleo/alone", parent=None, depth=0)
    assert (world.done.families, world.done.failed) == (3, {})


def test_a_second_run_does_nothing(world: TreeStore) -> None:
    first = world.recover()
    written = {name: world.store.modified(name) for name in world.store.names("trees")}
    assert world.recover() == first
    assert "already complete" in world.told.getvalue()
    assert {name: world.store.modified(name) for name in world.store.names("trees")} == written


def test_the_key_is_of_all_that_the_edges_depend_on(world: TreeStore) -> None:
    settings = world.job().config.trees
    key = world.inputs().key(settings)
    assert world.inputs().key(settings.model_copy(update={"memory_mb": 7, "enabled": False})) == key
    keys = {key}
    for change in ({"times": False}, {"declared": False}, {"least_probability": 0.9}):
        keys.add(world.inputs().key(settings.model_copy(update=change)))
    world.rows["ada/child"] = replace(world.rows["ada/child"], created_at=START)
    keys.add(world.inputs().key(settings))
    world.rows["ada/child"] = replace(world.rows["ada/child"], sha="b" * 40)
    keys.add(world.inputs().key(settings))
    world.add("dan/new", network(9))
    keys.add(world.inputs().key(settings))
    assert len(keys) == 7


def test_times_can_be_left_out(world: TreeStore) -> None:
    def times(edges: Mapping[Any, Mapping[str, Any]]) -> set[float]:
        signals = [signal for edge in edges.values() for signal in edge["evidence"]]
        return {signal["value"] for signal in signals if signal["signal"] == "time"}

    assert times(world.recover()) - {0.0}
    assert times(world.recover(times=False)) <= {0.0}


def test_removed_models_are_latent_parents_and_no_children(world: TreeStore) -> None:
    del world.rows["cleo/root"], world.rows["bob/child"]
    edges = world.recover()
    assert set(edges) == EXPECTED - {("bob/child", "ada/root")}
    assert {pair for pair, edge in edges.items() if edge["latent"]} == {("cleo/child", "cleo/root")}
    places = read_places(world.store, world.done)
    assert places["cleo/child"] == TreeFacts(root="cleo/root", parent="cleo/root", depth=1)
    assert set(places) == set(world.rows)


def test_the_listed_commit_counts(world: TreeStore) -> None:
    """Of a repository that was probed at two commits, the other one's weights are not compared."""
    world.add("cleo/child", network(7, width=16), sha="b" * 40)
    edges = world.recover()
    assert ("cleo/child", "cleo/root") not in edges
    world.rows["cleo/child"] = replace(world.rows["cleo/child"], sha="a" * 40)
    assert ("cleo/child", "cleo/root") in world.recover()


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Families that are compared, one a batch, until the second one: there the run is killed."""
    monkeypatch.setattr(stage_module, "_BATCH_MODELS", 1)
    compared: list[str] = []
    real = stage_module.recover_family

    def recovered(family: Any, *given: Any, **settings: Any) -> Sequence[Any]:
        compared.append(family.repos[0])
        if len(compared) == 2:
            raise KeyboardInterrupt
        return real(family, *given, **settings)

    monkeypatch.setattr(stage_module, "recover_family", recovered)
    return compared


def test_a_killed_run_goes_on(world: TreeStore, killed_after: list[str], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        world.recover()
    (folder,) = {name.split("/")[1] for name in world.store.names("trees")}
    assert read_trees(world.store, folder) is None
    (found,) = status(world.store.uri).trees
    assert (found["batches"], found["finished"]) == (1, False)
    assert "unfinished, 1 batches" in "\n".join(status(world.store.uri).lines())
    assert verify(world.store.uri, Report(io.StringIO())).clean
    assert set(world.recover()) == EXPECTED
    assert len(killed_after) == 4, "the first family is not compared again"
    report = verify(world.store.uri, Report(io.StringIO()))
    assert report.clean
    assert not [item for item in report.unexpected if item["path"].startswith("trees/")]
    assert not list(tmp_path.glob("scratch/probelog/trees/*")), "nothing is left on the scratch disk"


def test_a_family_that_fails_costs_only_its_own_edges(
    world: TreeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stage_module.recover_family

    def recovered(family: Any, *given: Any, **settings: Any) -> Sequence[Any]:
        if "cleo/root" in family.repos:
            raise MemoryError("no room")
        return real(family, *given, **settings)

    monkeypatch.setattr(stage_module, "recover_family", recovered)
    assert {child for child, _ in world.recover()} == {"ada/child", "ada/copy", "bob/child"}
    assert world.done.failed == {"out-of-memory": 1}
    assert "1 families failed (out-of-memory)" in world.told.getvalue()
    assert read_places(world.store, world.done).keys() == world.rows.keys() - {"cleo/child", "cleo/root"}
    (found,) = status(world.store.uri).trees
    assert found["failed"] == {"out-of-memory": 1}


def test_status_and_verify_know_the_stage(world: TreeStore) -> None:
    world.recover()
    (line,) = [line for line in status(world.store.uri).lines() if line.startswith("trees")]
    assert line.endswith("4 edges between 7 models of 3 families")
    assert verify(world.store.uri, Report(io.StringIO())).clean
    path = TreesFolder.of(world.done.key).edges
    world.store.write(path, world.store.read(path)[:-9])
    (damage,) = verify(world.store.uri, Report(io.StringIO())).damaged
    assert damage["path"] == path
    with pytest.raises(StoreError, match="is damaged"):
        read_part(world.store, world.done.edges, EDGES)


def test_a_newer_receipt_is_refused(world: TreeStore) -> None:
    world.recover()
    path = TreesFolder.of(world.done.key).receipt
    world.store.write_json(path, world.store.read_json(path) | {"version": 99})
    with pytest.raises(SchemaVersionError, match="recovery of model trees version 99 is newer"):
        read_trees(world.store, world.done.key)
    world.store.write_json(path, world.store.read_json(path) | {"version": 1, "batches": 3})
    with pytest.raises(StoreError, match="is damaged"):
        read_trees(world.store, world.done.key)

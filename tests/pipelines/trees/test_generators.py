"""Generators in the trees stage: compared by their weights, and adapters as children of their bases."""

from __future__ import annotations

from pathlib import Path

from pipelines.publish.generators import SampledGenerators, places_in
from pipelines.trees.inputs import RUN_ON_IT, TreeInputs
from pipelines.trees.nightly import UpdateTrees, attach_changes
from pipelines.trees.record import read_places
from pipelines.trees.stage import recover_trees
from probelog.index.generation import Generation
from probelog.storage.layout import sample_ledger
from probelog.storage.ledger import SAMPLED, ItemResult, Ledger, item_key
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import EDGES, SAMPLES, CatalogueRow, SampledModel, TreeFacts
from probelog.storage.store import Store
from tests.benchmarks.trees_world import Node, weights_table
from tests.support.worlds import small_generators, small_index
from tests.support.worlds.tree_store import Tensors, TreeStore, network, tuned

SHA = "a" * 40


def sampled(world: TreeStore) -> SampledGenerators:
    """A foundation, its child and a copy of that, three adapters, and one that is not listed any more."""
    ledger = Ledger(world.store, sample_ledger("e" * 16), SAMPLED)
    foundation = network(7, width=20)
    weights: dict[str, Tensors | None] = {
        "dora/foundation": foundation,
        "dora/child": tuned(foundation, 8),
        "dora/copy": None,
        "dora/gone": network(9, width=12),
        "kim/lora": network(10, width=6),
        "kim/lora-of-gone": network(11, width=6),
        "ada/root": network(12, width=6),  # a classifier, too
    }
    bases = {"kim/lora": "dora/foundation", "kim/lora-of-gone": "dora/gone"}
    for repo, tensors in weights.items():
        model = SampledModel(
            repo=repo,
            sha=SHA,
            pipeline="lora" if repo in bases else "DDPMPipeline",
            architecture="UNet2DModel",
            conditioning="none",
            image_size=32,
            parameters=1000,
            samples=0,
            steps=25,
            encoder_digest="digest",
            dtype="float32",
            device="cpu",
            weight_digest=repo,
            base_repo=bases.get(repo),
            copy_of_repo="dora/child" if tensors is None else None,
            copy_of_sha=SHA if tensors is None else None,
        )
        table = None
        if tensors is not None:
            table = weights_table([Node(repo, tensors, dtype="float32")])
            table = table.set_column(table.schema.get_field_index("sha"), "sha", [[SHA] * table.num_rows])
        item = item_key(repo, SHA)
        ledger.spool(item, ItemResult.success(model, SAMPLES.empty_table(), table))
        ledger.seal([item])
    rows = [CatalogueRow(repo=repo, sha=SHA) for repo in weights if repo != "dora/gone"]
    return SampledGenerators.of(ledger, "e" * 16, rows)


def test_generators_are_compared_and_adapters_hang_from_their_bases(world: TreeStore) -> None:
    without = world.inputs()
    inputs = without.with_generators(sampled(world))
    job = world.job()
    assert inputs.key(job.config.trees) != without.key(job.config.trees)
    assert without.with_generators(None) is without
    done = recover_trees(job, inputs)
    edges = {
        (row["child"], row["parent"]): row for row in read_part(world.store, done.edges, EDGES).to_pylist()
    }
    assert {
        ("dora/child", "dora/foundation"),
        ("kim/lora", "dora/foundation"),
        ("kim/lora-of-gone", "dora/gone"),
        ("ada/child", "ada/root"),
    } <= edges.keys()
    assert edges["dora/child", "dora/foundation"]["relation"] == "fine-tune"
    adapter = edges["kim/lora", "dora/foundation"]
    assert (adapter["relation"], adapter["declared"], adapter["latent"]) == ("low-rank", True, False)
    assert adapter["evidence"] == [{"signal": RUN_ON_IT, "value": 1.0}]
    assert edges["kim/lora-of-gone", "dora/gone"]["latent"]
    assert [parent for child, parent in edges if child == "dora/copy"] == ["dora/child"]
    places = read_places(world.store, done)
    assert places["kim/lora"] == TreeFacts(root="dora/foundation", parent="dora/foundation", depth=1)
    assert places["dora/copy"].root == "dora/foundation"
    assert "dora/gone" not in places


def test_a_nightly_run_attaches_generators_that_it_adds(world: TreeStore, tmp_path: Path) -> None:
    every, held = sampled(world), ("dora/foundation", SHA)
    of_base = SampledGenerators(every.store, every.key, every.receipts, {held: every.rows[held]})
    done = recover_trees(world.job(), world.inputs().with_generators(of_base))
    made = small_generators.build(
        Store(tmp_path / "index"),
        generators=[small_generators.Generator("dora/foundation", ("cat",))],
        models=[small_index.Model(repo, ("a", "b")) for repo in sorted(world.rows)],
        edges=read_part(world.store, done.edges, EDGES),
        settings={"trees": done.key},
    ).index
    base = Generation(made.store, made.pointer)

    def night(without: set[tuple[str, str]], removed: set[str]) -> UpdateTrees:
        inputs = TreeInputs(world.store, [], [], {}).with_generators(every, without)
        update = attach_changes(world.job(), base, inputs, removed)
        assert update is not None
        return update

    update = night({held, ("ada/root", SHA)}, set())
    edges = {(row["child"], row["parent"]): row for row in update.edges.to_pylist()}
    assert edges.keys() == {
        ("dora/child", "dora/foundation"),
        ("dora/copy", "dora/child"),
        ("kim/lora", "dora/foundation"),
        ("kim/lora-of-gone", "dora/gone"),
    }
    assert {pair for pair, row in edges.items() if row["latent"]} == {("kim/lora-of-gone", "dora/gone")}
    assert update.places["dora/copy"] == TreeFacts(root="dora/foundation", parent="dora/child", depth=2)
    assert update.places["kim/lora"] == TreeFacts(root="dora/foundation", parent="dora/foundation", depth=1)
    written = set(world.store.names("trees"))
    again = night({held, ("ada/root", SHA)}, {"dora/foundation"})
    assert set(world.store.names("trees")) == written, "each is compared once"
    assert {row["child"] for row in again.edges.to_pylist() if row["latent"]} == {
        "dora/child",
        "kim/lora",
        "kim/lora-of-gone",
    }


def test_an_update_keeps_the_places_of_its_base(world: TreeStore) -> None:
    small = small_generators.build(world.store.child("index")).index
    places = places_in(Generation(small.store, small.pointer))
    assert places["kim/lora-umbrella"] == TreeFacts(root="gina/cats", parent="gina/cats", depth=1)
    plain = small_index.build(world.store.child("plain"))
    assert places_in(Generation(plain.store, plain.pointer)) == {}
    assert not TreeInputs.of(world.store, world.receipts, []).adapters

"""The plan of a forest: what it holds, and that it is a function of its seed."""

from __future__ import annotations

from collections import Counter

import pytest

from pipelines.zoo.forest_plan import Forest, Node, plan_forest

ARCHITECTURES = ("resnet", "vit", "convnext", "mobilenet")


def _plan(seed: int, networks: int = 150) -> Forest:
    return plan_forest(64, ARCHITECTURES, ARCHITECTURES, networks, seed)


def _by_name(forest: Forest) -> dict[str, Node]:
    return {node.name: node for node in forest.nodes}


@pytest.mark.parametrize("seed", range(4))
def test_everything_that_is_asked_of_a_forest_is_there(seed: int) -> None:
    forest = _plan(seed)
    nodes = _by_name(forest)
    assert len(nodes) == 150
    assert sum(node.uploaded for node in forest.nodes) >= 120
    relations = Counter(node.relation for node in forest.nodes)
    assert min(relations[kind] for kind in ("head-only", "pruned", "recast", "quantised", "copy")) >= 3
    assert min(relations["merge"], relations["low-rank"], relations["permuted"]) >= 3
    assert {node.depth for node in forest.nodes} == {0, 1, 2, 3, 4}
    inner = {name for node in forest.nodes for name, _ in node.parents}
    withheld = {node.name for node in forest.nodes if not node.uploaded}
    assert withheld <= inner
    assert len(withheld) == round(0.2 * len(inner))
    assert {detail["optimiser"] for node in forest.nodes if "decay" in (detail := node.detail)} == {
        "adam",
        "adamw",
        "sgd",
    }
    assert max(node.detail.get("snake", 0) for node in forest.nodes) == 3


def test_parents_come_first_and_weights_add_up() -> None:
    forest = _plan(5)
    nodes, seen = _by_name(forest), set()
    for node in forest.nodes:
        assert all(name in seen and nodes[name].time < node.time for name, _ in node.parents)
        assert all(nodes[name].tree == node.tree for name, _ in node.parents)
        assert not node.parents or sum(weight for _, weight in node.parents) == pytest.approx(1)
        seen.add(node.name)


def test_roots_share_data_or_a_random_start_but_not_both() -> None:
    roots = {node.tree: node for node in _plan(6).nodes if not node.parents}
    for architecture in ARCHITECTURES:
        first, second, third = (roots[f"{architecture}{number}"] for number in range(3))
        assert first.classes == second.classes
        assert first.detail["start"] != second.detail["start"]
        assert second.detail["start"] == third.detail["start"]
        assert not set(second.classes) & set(third.classes)


def test_a_listing_with_wrong_times_differs_in_one_of_twenty() -> None:
    forest = _plan(7)
    true = {node.name: node.time for node in forest.nodes if node.uploaded}
    assert forest.wrong_times.keys() == forest.shuffled_times.keys() == true.keys()
    assert sum(true[name] != time for name, time in forest.wrong_times.items()) == round(0.05 * len(true))
    assert sorted(forest.shuffled_times.values()) == sorted(true.values())
    assert sum(true[name] != time for name, time in forest.shuffled_times.items()) > 0.9 * len(true)


def test_the_seed_decides_everything() -> None:
    assert _plan(8) == _plan(8)
    assert _plan(8) != _plan(9)


def test_channels_are_put_into_another_order_only_where_the_rule_is_known() -> None:
    forest = plan_forest(64, ("resnet",), (), 60, 3)
    assert "permuted" not in {node.relation for node in forest.nodes}

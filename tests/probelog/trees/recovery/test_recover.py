"""Whole recoveries on models whose parents are known, whole and damaged."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probelog.storage.schemas import WEIGHTS
from probelog.trees.edges import Relation
from probelog.trees.evidence.relations import compare, relations_of
from probelog.trees.families.tables import ModelFacts, families
from probelog.trees.recovery.neighbours import find_neighbours
from probelog.trees.recovery.recover import recover, recover_family
from probelog.weights.reader import layer_table
from tests.benchmarks.trees_world import Forest, Node, weights_table

WIDTH, LAYERS = 32, 12


def base(seed=0):
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        tensors[f"blocks.{layer}.mlp.weight"] = random.standard_normal((WIDTH, WIDTH))
        tensors[f"blocks.{layer}.norm.weight"] = 1 + 0.01 * random.standard_normal(WIDTH)
        tensors[f"blocks.{layer}.norm.bias"] = 0.01 * random.standard_normal(WIDTH)
    return with_head(tensors, 100, seed)


def with_head(tensors, classes, seed):
    random = np.random.default_rng(1000 + seed)
    return {
        **tensors,
        "head.weight": random.standard_normal((classes, WIDTH)),
        "head.bias": random.standard_normal(classes),
    }


def tuned(tensors, size, seed, classes=10):
    random = np.random.default_rng(2000 + seed)
    moved = {name: x + size * random.standard_normal(x.shape) for name, x in tensors.items()}
    return with_head(moved, classes, seed)


def table(models, dtypes=None):
    return weights_table(
        [Node(repo, tensors, dtype=(dtypes or {}).get(repo, "float32")) for repo, tensors in models.items()]
    )


def edges_of(models, facts=None, dtypes=None, least=0.0, **options):
    edges = recover(table(models, dtypes), facts or {}, least_probability=least, **options)
    return {(e.child, e.parent): e for e in edges}


def facts_of(*repos):
    return {repo: ModelFacts(float(place)) for place, repo in enumerate(repos)}


@pytest.fixture(scope="module")
def root():
    return base()


def test_a_fan_is_recovered_without_times(root):
    models = {"root": root, **{f"child{n}": tuned(root, 0.2, n) for n in range(5)}}

    edges = edges_of(models)

    assert set(edges) == {(f"child{n}", "root") for n in range(5)}
    assert {edge.relation for edge in edges.values()} == {Relation.FINE_TUNED}
    assert all(edge.probability > 0.5 for edge in edges.values())


def test_a_chain_is_recovered_with_times(root):
    second = tuned(root, 0.2, 1)
    models = {"c": tuned(second, 0.2, 2), "b": second, "a": root}

    assert set(edges_of(models, facts_of("a", "b", "c"))) == {("b", "a"), ("c", "b")}


def test_independent_models_of_one_architecture_have_no_edge():
    assert edges_of({f"model{n}": base(n) for n in range(20)}) == {}


def quantised(tensors):
    steps = {name: np.abs(x).max() / 127 for name, x in tensors.items()}
    return {name: np.round(x / steps[name]) * steps[name] if x.ndim > 1 else x for name, x in tensors.items()}


def to_bfloat16(tensors):
    return {name: torch.from_numpy(x).bfloat16().float().numpy() for name, x in tensors.items()}


def trained_a_little(tensors, size, seed):
    random = np.random.default_rng(3000 + seed)
    return {
        name: x if "head" in name else np.where(x == 0, 0, x + size * random.standard_normal(x.shape))
        for name, x in tensors.items()
    }


def pruned(tensors, share=0.5):
    return {
        name: np.where(np.abs(x) < np.quantile(np.abs(x), share), 0, x)
        if x.ndim > 1 and not name.startswith("head")
        else x
        for name, x in tensors.items()
    }


def low_rank(tensors):
    random = np.random.default_rng(5)
    moved = {
        name: x + 0.1 * random.standard_normal((WIDTH, 2)) @ random.standard_normal((2, WIDTH))
        if x.shape == (WIDTH, WIDTH)
        else x
        for name, x in tensors.items()
    }
    return with_head(moved, 10, 5)


def permuted(tensors):
    order = np.random.default_rng(6).permutation(WIDTH)
    return {
        name: x if name.startswith("head") else x[order][:, order] if x.ndim > 1 else x[order]
        for name, x in tensors.items()
    }


def to_half(tensors):
    return {name: x.astype(np.float16).astype(np.float64) for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("make", "relation", "dtype"),
    [
        (dict, Relation.COPY, "float32"),
        (permuted, Relation.PERMUTED, "float32"),
        (to_half, Relation.RECAST, "float16"),
        (quantised, Relation.QUANTISED, "float32"),
        (pruned, Relation.PRUNED, "float32"),
        (low_rank, Relation.LOW_RANK, "float32"),
        (lambda tensors: with_head(tensors, 10, 7), Relation.HEAD_ONLY, "float32"),
        (lambda tensors: tuned(tensors, 0.2, 8), Relation.FINE_TUNED, "float32"),
    ],
)
def test_each_relation_has_its_name(root, make, relation, dtype):
    models = {"root": root, "child": make(root)}

    edges = edges_of(models, facts_of("root", "child"), {"child": dtype})

    assert {pair: edge.relation for pair, edge in edges.items()} == {("child", "root"): relation}


def test_equal_numbers_in_a_wider_type_came_from_the_narrower_one(root):
    narrow = to_half(root)

    edges = edges_of(
        {"a-wide": narrow, "b-narrow": narrow}, dtypes={"a-wide": "float32", "b-narrow": "float16"}
    )

    assert {pair: edge.relation for pair, edge in edges.items()} == {("a-wide", "b-narrow"): Relation.RECAST}


def test_a_merge_has_its_parents_and_their_weights(root):
    a, b = tuned(root, 0.2, 1), tuned(root, 0.2, 2)
    merged = {name: 0.3 * a[name] + 0.7 * b[name] for name in a}

    edges = edges_of({"root": root, "a": a, "b": b, "merge": merged}, facts_of("root", "a", "b", "merge"))

    assert edges["merge", "a"].weight == pytest.approx(0.3, abs=0.01)
    assert edges["merge", "b"].weight == pytest.approx(0.7, abs=0.01)
    assert edges["merge", "a"].relation is Relation.MERGE
    assert {("a", "root"), ("b", "root")} < set(edges)


def test_two_merges_of_the_same_parents_are_not_each_others(root):
    a, b = tuned(root, 0.2, 1), tuned(root, 0.2, 2)
    one, other = ({name: share * a[name] + (1 - share) * b[name] for name in a} for share in (0.6, 0.5))

    edges = edges_of({"a": a, "b": b, "one": one, "other": other})

    merged = {pair for pair, edge in edges.items() if edge.relation is Relation.MERGE}
    assert merged == {("one", "a"), ("one", "b"), ("other", "a"), ("other", "b")}


def counted(tensors, batches):
    return {**tensors, "blocks.0.norm.num_batches_tracked": np.array(float(batches))}


@pytest.mark.parametrize("reverse", [False, True])
def test_the_smaller_counter_of_batches_is_the_parents(root, reverse):
    # Numbers of equal size, so that nothing else gives the direction.
    other = with_head({name: x + 0.1 * np.roll(x, 1) for name, x in root.items()}, 100, 0)
    counts = (500, 300) if reverse else (300, 500)
    edges = edges_of({"a": counted(root, counts[0]), "b": counted(other, counts[1])})

    ((child, parent),) = edges
    assert (child, parent) == (("a", "b") if reverse else ("b", "a"))
    unknown = edges_of({"a": counted(root, 0), "b": counted(other, counts[1])})
    assert abs(next(iter(unknown.values())).evidence["direction"]) < 5


def test_numbers_that_lie_on_a_coarse_grid_are_the_rounded_ones_in_whatever_type(root):
    rounded = to_bfloat16(root)
    for names in (("a", "b"), ("b", "a")):  # without times the name would decide
        edges = edges_of(dict(zip(names, (root, rounded), strict=True)))

        assert set(edges) == {(names[1], names[0])}


def test_what_was_pruned_comes_from_the_original_and_not_from_its_rounded_twin(root):
    models = {"root": root, "q": quantised(root), "pruned": pruned(root)}
    # The twin is uploaded first of all: the times are wrong.
    edges = edges_of(models, facts_of("root", "pruned", "q"))

    assert ("pruned", "root") in edges
    assert ("q", "root") in edges


def test_what_was_pruned_comes_from_the_model_with_its_norms_and_biases(root):
    step = {name: x + 0.001 * np.roll(x, 1) for name, x in root.items()}
    models = {"step": with_head(step, 100, 0), "zpruned": pruned(root), "zroot": root}

    # The original's time is wrong.
    edges = edges_of(models, facts_of("step", "zpruned", "zroot"))

    assert ("zpruned", "zroot") in edges


def test_what_was_pruned_and_trained_comes_from_the_model_with_the_smaller_counter(root):
    step = {name: x + 0.001 * np.roll(x, 1) for name, x in root.items()}
    random = np.random.default_rng(3)
    trained = {
        name: x if x.ndim > 1 else x + 1e-3 * random.standard_normal(x.shape)
        for name, x in pruned(root).items()
    }
    models = {
        "step": counted(with_head(step, 100, 0), 500),
        "zpruned": counted(with_head(trained, 100, 0), 330),
        "zroot": counted(root, 300),
    }

    assert ("zpruned", "zroot") in edges_of(models)


def test_a_late_time_does_not_make_a_rounded_twin_the_parent_of_all(root):
    models = {
        "q": quantised(root),
        "b": to_bfloat16(root),
        **{f"child{n}": tuned(root, 0.2, n) for n in range(3)},
    }

    edges = edges_of({**models, "root": root}, facts_of(*models, "root"))

    assert {parent for child, parent in edges if child in ("q", "b")} == {"root"}


def test_a_small_step_before_an_adapter_is_seen_by_what_the_adapter_left(root):
    step = tuned(root, 0.02, 1)
    adapted = with_head(low_rank(step), 10, 2)
    models = {"root": root, "step": step, "adapted": adapted}
    models.update({f"child{n}": tuned(root, 0.2, 10 + n) for n in range(3)})
    edges = edges_of(models, facts_of("root", "step", "adapted", "child0", "child1", "child2"))

    assert edges[("adapted", "step")].relation is Relation.LOW_RANK


def test_one_wrong_time_does_not_make_a_new_head_the_parent_of_the_trunk(root):
    children = {f"child{n}": tuned(root, 0.2, n) for n in range(5)}
    models = {"root": root, "headed": with_head(root, 10, 9), **children}
    # The root's time is the latest of all, and some of its children are older than the one with another head.
    edges = edges_of(models, facts_of("child0", "child1", "headed", "child2", "child3", "child4", "root"))

    assert set(edges) == {(child, "root") for child in models if child != "root"}


def test_a_head_that_goes_on_in_others_was_there_before_those_that_replaced_it(root):
    models = {"root": root, "headed": with_head(root, 10, 9), "q": quantised(root)}
    models.update({f"child{n}": tuned(root, 0.2, n) for n in range(3)})
    # The root's time is wrong: it is later than its children's. The quantised twin has the root's head.
    edges = edges_of(models, facts_of("headed", "child0", "child1", "child2", "root", "q"))

    assert set(edges) == {(child, "root") for child in models if child != "root"}


def test_a_child_of_a_model_with_another_head_has_kept_that_head(root):
    headed = with_head(root, 10, 9)
    models = {"root": root, "headed": headed, "q": quantised(headed), "child": tuned(root, 0.2, 1)}
    models["on"] = {**tuned(root, 0.2, 2), **{name: x for name, x in headed.items() if "head" in name}}
    edges = edges_of(models, facts_of("root", "headed", "q", "child", "on"))

    assert set(edges) == {("headed", "root"), ("q", "headed"), ("child", "root"), ("on", "headed")}
    assert edges[("q", "headed")].relation is Relation.QUANTISED


def test_a_permuted_copy_is_that_of_the_model_with_its_head(root):
    models = {"root": root, "headed": with_head(root, 10, 9), "permuted": permuted(root)}
    models.update({f"child{n}": tuned(root, 0.2, n) for n in range(2)})

    assert ("permuted", "root") in edges_of(models)


@pytest.mark.parametrize("made", [quantised, to_bfloat16, pruned])
@pytest.mark.parametrize("times", [True, False])
def test_a_rounded_or_pruned_model_and_one_with_its_numbers_and_another_head_are_siblings(root, made, times):
    headed = with_head(root, 10, 9)
    models = {"headed": headed, "q": made(root), **{f"child{n}": tuned(root, 0.2, n) for n in range(3)}}
    models["on"] = {**tuned(root, 0.2, 5), **{name: x for name, x in headed.items() if "head" in name}}

    edges = edges_of(models, facts_of(*models) if times else None, least=0.5)

    siblings = {child for (child, _), edge in edges.items() if edge.latent}
    assert siblings == set(models) - {"on"}
    assert len({parent for (_, parent), edge in edges.items() if edge.latent}) == 1
    # What has kept the head comes from the model with that head.
    assert [pair for pair, edge in edges.items() if not edge.latent] == [("on", "headed")]


def test_a_rounded_model_with_fewer_classes_does_not_make_a_latent_ancestor(root):
    models = {"root": root, "q": quantised(with_head(root, 10, 9))}
    models.update({f"child{n}": tuned(root, 0.2, n) for n in range(3)})

    edges = edges_of(models, facts_of(*models))

    assert set(edges) == {(child, "root") for child in models if child != "root"}


@pytest.mark.parametrize("rounded", [quantised, to_bfloat16])
def test_what_is_rounded_twice_alike_comes_from_one_model_twice(root, rounded):
    models = {"root": root, "q1": rounded(root), "q2": rounded(root)}

    edges = edges_of(models, facts_of(*models))

    assert set(edges) == {("q1", "root"), ("q2", "root")}
    assert len({edge.relation for edge in edges.values()}) == 1


@settings(deadline=None, max_examples=10)
@given(st.floats(0.05, 0.6), st.integers(0, 1000))
def test_training_that_is_looked_at_backwards_is_not_pruning(size, seed):
    parent = base(seed)
    models = {
        "parent": parent,
        "child": {**tuned(parent, size, seed + 1), "head.weight": parent["head.weight"]},
    }
    (family,) = families(table(models))
    at = [family.repos.index(name) for name in ("child", "parent")]

    backwards = compare(family, np.array(at[:1]), np.array(at[1:]))

    assert relations_of(backwards, np.ones(1, bool)) == [Relation.FINE_TUNED]


@settings(deadline=None, max_examples=10)
@given(st.floats(0.3, 0.7), st.floats(0, 0.02), st.integers(0, 1000))
def test_what_was_pruned_and_trained_a_little_is_pruned(share, size, seed):
    parent = base(seed)
    models = {"parent": parent, "child": trained_a_little(pruned(parent, share), size, seed)}
    (family,) = families(table(models))
    at = [family.repos.index(name) for name in ("parent", "child")]

    pair = compare(family, np.array(at[:1]), np.array(at[1:]))

    assert relations_of(pair, np.ones(1, bool)) == [Relation.PRUNED]


def test_siblings_of_an_unseen_parent_are_not_each_others_parents(root):
    models = {f"child{n}": tuned(root, 0.2, n) for n in range(6)}

    edges = edges_of(models, facts_of(*models), least=0.5)

    assert {child for child, _ in edges} == set(models)
    (unseen,) = {parent for _, parent in edges}
    assert re.fullmatch("latent:[0-9a-f]{12}", unseen)
    assert all(edge.latent for edge in edges.values())


def test_declared_parents_that_are_switched_off_are_shown_and_decide_nothing(root):
    models = {"root": root, "child": tuned(root, 0.2, 1), "other": base(9)}
    facts = {
        "root": ModelFacts(declared=("child",)),
        "child": ModelFacts(declared=("other",)),
        "other": ModelFacts(declared=("other", "nowhere")),
    }

    edges = edges_of(models, facts, declared=False)

    assert set(edges) == {("child", "root")}
    assert edges["child", "root"].declared is False
    assert edges_of(models, {"child": ModelFacts(declared=("root",))})["child", "root"].declared is True
    assert edges_of(models)["child", "root"].declared is None
    assert edges["child", "root"].evidence == edges_of(models)["child", "root"].evidence


def test_a_declared_parent_is_evidence_and_one_that_the_weights_contradict_is_shown(root):
    models = {"root": root, "child": tuned(root, 0.2, 1), "other": base(9)}
    facts = {"child": ModelFacts(declared=("root",))}

    (with_it,) = edges_of(models, facts).values()
    (contradicted,) = edges_of(models, {"child": ModelFacts(declared=("other",))}).values()
    (without,) = edges_of(models).values()

    assert (contradicted.child, contradicted.parent, contradicted.declared) == ("child", "root", False)
    assert contradicted.probability < without.probability < with_it.probability


def test_declared_parents_in_a_circle_leave_a_tree(root):
    children = {f"child{n}": tuned(root, 0.2, n) for n in range(4)}
    names = ["root", *children]
    circle = {name: ModelFacts(declared=(names[place - 1],)) for place, name in enumerate(names)}
    each_other = {"root": ModelFacts(declared=("child0",)), "child0": ModelFacts(declared=("root",))}

    around = edges_of({"root": root, **children}, circle)
    two = edges_of({"root": root, **children}, each_other)

    above = dict(around)
    for name in names:
        path = [name]
        while path[-1] in above:
            path.append(above[path[-1]])
            assert len(path) <= len(names)
    # Two that declare each other say nothing.
    assert set(two) == {(child, "root") for child in children}


@settings(max_examples=5, deadline=None)
@given(st.permutations(range(len(Forest(5, trees=1, models=8).world.uploaded))))
def test_the_order_of_models_changes_nothing(order):
    nodes = Forest(5, trees=1, models=8).world.uploaded
    weights = weights_table([nodes[place] for place in order])

    assert recover(weights, least_probability=0) == recover(weights_table(nodes), least_probability=0)


@settings(max_examples=5, deadline=None)
@given(st.integers(6, 1000))
def test_an_unrelated_model_changes_no_edge(seed):
    nodes = Forest(5, trees=1, models=8).world.uploaded
    width = {node.tensors["blocks.0.mlp.weight"].shape for node in nodes}
    random = np.random.default_rng(seed)
    unrelated = []
    for place, shape in enumerate(sorted(width)):
        like = next(node for node in nodes if node.tensors["blocks.0.mlp.weight"].shape == shape)
        fresh = {name: random.standard_normal(x.shape) for name, x in like.tensors.items()}
        unrelated.append(Node(f"a/unrelated{place}", fresh))

    known = recover(weights_table(nodes), least_probability=0)

    assert recover(weights_table([*nodes, *unrelated]), least_probability=0) == known


def damaged(weights, repo, change):
    rows = weights.to_pylist()
    for row in rows:
        if row["repo"] == repo:
            change(row)
    return pa.Table.from_pylist(rows, WEIGHTS)


def overflow(row):
    if row["sketch"] is not None:
        row["sketch"] = None


def not_a_number(row):
    row.update(mean=float("nan"), std=float("inf"), kurtosis=None)
    if row["sketch"] is not None:
        row["sketch"] = [float("nan")] * 32


def zero(row):
    row.update(mean=0.0, std=0.0, kurtosis=None)
    if row["sketch"] is not None:
        row["sketch"] = [0.0] * 32


@pytest.mark.parametrize("change", [overflow, not_a_number, zero])
def test_a_damaged_model_has_no_edge_and_harms_no_other(root, change):
    models = {
        "root": root,
        "bad": tuned(root, 0.2, 7),
        **{f"child{n}": tuned(root, 0.2, n) for n in range(3)},
    }

    edges = recover(damaged(table(models), "bad", change))

    assert {(e.child, e.parent) for e in edges} == {(f"child{n}", "root") for n in range(3)}


def test_one_layer_that_is_zero_everywhere_is_left_out(root):
    dead = {**root, "blocks.3.mlp.weight": np.zeros((WIDTH, WIDTH))}
    child = {**tuned(dead, 0.2, 1), "blocks.3.mlp.weight": np.zeros((WIDTH, WIDTH))}

    edges = edges_of({"root": dead, "child": child})

    assert set(edges) == {("child", "root")}
    assert np.isfinite([value for edge in edges.values() for value in edge.evidence.values()]).all()


def test_constant_layers_alone_make_no_edge_certain():
    constant = {name: np.ones_like(x) for name, x in base().items()}

    edges = edges_of({"a": constant, "b": constant})

    assert [edge.relation for edge in edges.values()] == [Relation.COPY]


def test_ten_thousand_equal_models_are_copies_of_one():
    one = table({"root": {"layer.weight": np.random.default_rng(0).standard_normal((8, 8))}})
    columns = {name: one[name] for name in one.column_names if name != "repo"}
    copies = [pa.table({"repo": [f"copy{n:05d}"], **columns}, schema=one.schema) for n in range(10_000)]

    edges = recover(pa.concat_tables([one, *copies]), {"root": ModelFacts(0.0)})

    assert {edge.parent for edge in edges} == {"root"}
    assert {edge.relation for edge in edges} == {Relation.COPY}
    assert len(edges) == 10_000


def test_a_header_alone_with_other_data_is_not_related(root):
    copied = {name: np.random.default_rng(3).standard_normal(x.shape) for name, x in root.items()}

    assert edges_of({"root": root, "imitation": copied}) == {}


def test_families_leave_the_head_apart_and_nothing_else(root):
    with_other_head = with_head(root, 7, 1)
    other_layer = {**root, "blocks.0.mlp.weight": np.ones((WIDTH, WIDTH + 1))}

    groups = families(table({"a": root, "b": with_other_head, "c": other_layer}))

    assert sorted(group.repos for group in groups) == [("a", "b"), ("c",)]
    assert {group.repos: group.classes.tolist() for group in groups}["a", "b"] == [100, 7]


def test_tables_without_models_or_sketches_have_no_families():
    assert families(WEIGHTS.empty_table()) == []
    assert recover(layer_table("a", "0", [])) == []


def test_another_size_of_image_leaves_the_layers_that_are_equal(root):
    base = {**root, "pos_embed": np.random.default_rng(0).standard_normal((1, 17, WIDTH))}
    other_size = {
        **tuned(base, 0.2, 1),
        "pos_embed": np.random.default_rng(1).standard_normal((1, 65, WIDTH)),
    }

    edges = edges_of({"root": base, "child": other_size, "sibling": tuned(base, 0.2, 2)})

    assert set(edges) == {("child", "root"), ("sibling", "root")}


def test_a_wrapped_model_is_compared_with_a_bare_one(root):
    wrapped = {
        name if name.startswith("head") else f"module.{name}": x for name, x in tuned(root, 0.2, 1).items()
    }

    assert set(edges_of({"root": root, "child": wrapped})) == {("child", "root")}


def test_fused_tensors_are_no_relatives_of_separate_ones(root):
    fused = {
        name.replace("mlp", "qkv"): np.concatenate([x] * 3) if "mlp" in name else x
        for name, x in root.items()
    }

    assert edges_of({"root": root, "fused": fused}) == {}


EXTREMES = st.sampled_from([0.0, -0.0, 1e-30, 1.0, -1e19, 3e38, float("nan"), float("inf"), None])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), EXTREMES, EXTREMES), max_size=12))
def test_whatever_a_model_says_of_itself_the_answers_are_numbers(root, changes):
    models = {"root": root, "bad": tuned(root, 0.2, 7), "child": tuned(root, 0.2, 1)}
    rows = table(models).to_pylist()
    bad = [row for row in rows if row["repo"] == "bad"]
    for place, moment, number in changes:
        row = bad[place % len(bad)]
        row.update(mean=moment, std=None if moment is None else abs(moment), kurtosis=moment)
        if row["sketch"] is not None:
            row["sketch"] = None if number is None else [number] * 32

    edges = recover(pa.Table.from_pylist(rows, WEIGHTS), least_probability=0)

    assert all(0 <= edge.probability <= 1 for edge in edges)
    assert np.isfinite([value for edge in edges for value in edge.evidence.values()]).all()
    assert {(e.child, e.parent) for e in edges if "bad" not in (e.child, e.parent) and not e.latent} <= {
        ("child", "root"),
        ("root", "child"),
    }


def test_an_unseen_parent_keeps_its_name_when_another_child_comes(root):
    models = {f"child{n}": tuned(root, 0.2, n) for n in range(7)}
    fewer = {name: tensors for name, tensors in models.items() if name != "child6"}

    names = [
        {edge.parent for edge in edges_of(some, facts_of(*some), least=0.5).values()}
        for some in (fewer, models)
    ]

    assert names[0] == names[1]
    assert len(names[0]) == 1


def test_a_look_at_the_numbers_decides_where_sketches_leave_open_who_is_nearest(root):
    """Halfway between two models."""
    one, two, away = (tuned(root, size, seed) for size, seed in ((0.2, 1), (0.05, 2), (0.6, 3)))
    between = {
        name: root[name] + 0.5 * (one[name] - root[name]) + two[name] - root[name]
        for name in root
        if "head" not in name
    }
    weights = table({"a": root, "b": one, "c": with_head(between, 10, 7), "d": away})
    (family,) = families(weights)
    asked = []

    def look(nearer):
        def distances(pairs):
            asked.append(pairs)
            return {pair: 1e-4 if pair == nearer else 0.01 for pair in pairs if pair != ("a", "b")}

        return distances

    neighbours = find_neighbours(family, np.arange(4))
    assert set(neighbours.of(2)[:2]) == {0, 1}
    for nearer, first in ((("a", "c"), 0), (("b", "c"), 1)):
        found = neighbours.looked_at(family, look(nearer))
        assert found.of(2)[0] == first
        assert found.distances_of(2)[:2].tolist() == [1e-4, 0.01]
        assert set(found.of(3)) == set(neighbours.of(3))
    assert {("a", "c"), ("b", "c")} <= set(asked[0])
    facts = facts_of("a", "b", "c", "d")
    edges = recover_family(family, facts, least_probability=0, look=look(("b", "c")))
    assert {"b", "c"} in [{edge.child, edge.parent} for edge in edges]
    assert len(asked) == 3
    silent = recover_family(family, facts, least_probability=0, look=lambda _: {})
    assert silent == recover_family(family, facts, least_probability=0)

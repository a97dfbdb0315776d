"""Neighbours by blocks, and recoveries of families that are too large to compare all with all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probelog.trees.evidence.latent import latent_name
from probelog.trees.evidence.relations import compare, distance_and_growth
from probelog.trees.families.distance import RELATED, squared_distances
from probelog.trees.families.tables import ModelFacts, families
from probelog.trees.recovery import neighbours
from probelog.trees.recovery.neighbours import Screen, components, find_neighbours
from probelog.trees.recovery.recover import recover_family
from tests.benchmarks.trees_scale import draw, facts_of, rows


def drawn_family(models, number=0):
    drawn = draw(number, models)
    (family,) = families(rows(number, drawn, np.arange(models)))
    return family


@pytest.fixture(scope="module")
def family():
    return drawn_family(300)


def nearest_by_all(family, count):
    distances = squared_distances(family.sketches)
    np.fill_diagonal(distances, np.inf)
    return [
        {m for m in np.argsort(row, kind="stable")[:count].tolist() if row[m] < RELATED} for row in distances
    ]


def test_blocks_find_the_nearest_models(family):
    screen = Screen.of(family, np.arange(len(family)))

    one, other = screen.nearest(np.arange(len(family)), 64)

    got = {(a, b) for a, b in zip(one.tolist(), other.tolist(), strict=True)}
    wanted = {(a, b) for a, near in enumerate(nearest_by_all(family, 8)) for b in near}
    assert wanted <= got
    assert all(a != b for a, b in got)


def test_projected_points_find_nearly_all_of_the_nearest_models(family, monkeypatch):
    monkeypatch.setattr(neighbours, "_MANY", 100)
    screen = Screen.of(family, np.arange(len(family)))

    one, other = screen.nearest(np.arange(len(family)), 64)

    assert screen.points.shape[1] < 24 * 32
    got = {(a, b) for a, b in zip(one.tolist(), other.tolist(), strict=True)}
    wanted = {(a, b) for a, near in enumerate(nearest_by_all(family, 8)) for b in near}
    assert len(wanted & got) >= 0.99 * len(wanted)


def test_a_large_family_has_the_edges_that_all_with_all_gives(family, monkeypatch):
    def edges():
        recovered = recover_family(family, facts_of(0, len(family)), least_probability=0)
        return {(edge.child, edge.parent) for edge in recovered if not edge.latent}

    large = edges()
    monkeypatch.setattr(neighbours, "COMPLETE", len(family))
    exact = edges()

    assert len(exact) > 200
    assert len(large ^ exact) <= 0.02 * len(exact)


def test_a_small_family_and_a_large_one_have_neighbours_of_one_kind(family, monkeypatch):
    few = family.take(np.arange(100))
    complete = find_neighbours(few, np.arange(100))
    monkeypatch.setattr(neighbours, "COMPLETE", 20)

    cut = find_neighbours(few, np.arange(100))

    for model in range(100):
        near = complete.of(model)[complete.distances_of(model) < RELATED][:8]
        assert near.tolist() == cut.of(model)[: len(near)].tolist()
    assert (cut.places < np.diff(cut.starts)[cut.models]).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 299), st.integers(0, 299))
def test_distances_have_no_direction_and_growth_changes_its_sign_with_it(family, a, b):
    one, other = np.array([a]), np.array([b])

    there, back = distance_and_growth(family, one, other), distance_and_growth(family, other, one)

    assert there[0] == back[0]
    assert there[1] == -back[1]
    pair = compare(family, one, other)
    assert pair.distance == pytest.approx(there[0])
    assert pair.growth == pytest.approx(there[1])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=15))
def test_components_are_what_can_be_reached(pairs):
    one, other = np.array(pairs, np.int64).reshape(-1, 2).T
    label = components(10, one, other)

    reached = {n: {n} for n in range(10)}
    for _ in range(10):
        for a, b in pairs:
            both = reached[a] | reached[b]
            for member in both:
                reached[member] = both
    assert label.tolist() == [min(reached[n]) for n in range(10)]


def test_a_large_family_of_independent_models_has_no_edges():
    family = drawn_family(300)
    independent = family.take(np.arange(300))
    independent.statistics[:] = np.random.default_rng(1).standard_normal(family.statistics.shape)

    assert recover_family(independent, {}, least_probability=0) == []


def test_many_head_only_children_have_one_parent():
    drawn = draw(0, 2)
    models = [rows(0, with_head(drawn, seed), np.array([0])) for seed in range(600)]
    names = [pa.array([f"m{n:03d}"] * len(table)) for n, table in enumerate(models)]
    table = pa.concat_tables(t.set_column(0, "repo", name) for t, name in zip(models, names, strict=True))
    (family,) = families(table)

    facts = {f"m{n:03d}": ModelFacts(float(n)) for n in range(600)}
    edges = recover_family(family, facts, least_probability=0)

    assert {e.parent for e in edges} == {"m000"}
    assert {e.relation for e in edges} == {"head-only"}
    assert len(edges) == 599


def with_head(drawn, seed):
    heads = drawn.heads.copy()
    heads[0] = np.random.default_rng(seed).standard_normal(heads.shape[1])
    return replace(drawn, heads=heads)


def test_the_name_of_an_unseen_parent_depends_on_the_family_and_its_oldest_child():
    name = latent_name("key", b"statistics")

    assert name == latent_name("key", b"statistics")
    assert len({name, latent_name("other", b"statistics"), latent_name("key", b"others")}) == 3

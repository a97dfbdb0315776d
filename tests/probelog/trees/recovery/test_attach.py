"""Newcomers get the edges that they would have got with everybody else."""

from __future__ import annotations

import numpy as np
import pytest

from probelog.trees.families.tables import ModelFacts, families
from probelog.trees.recovery.attach import Attachment
from probelog.trees.recovery.recover import recover
from tests.benchmarks.trees_world import Forest, weights_table


@pytest.fixture(scope="module")
def nodes():
    return sorted(Forest(7, trees=2, models=10).world.uploaded, key=lambda node: node.time)


def family_of_all(nodes):
    return {family.key: family for family in families(weights_table(nodes))}


def test_the_last_models_get_the_edges_of_the_whole(nodes):
    facts = {node.repo: ModelFacts(node.time) for node in nodes}
    known, new = nodes[:-6], nodes[-6:]
    whole = recover(weights_table(nodes), facts)
    edges = recover(weights_table(known), facts)
    base = family_of_all(known)

    attached = [
        edge
        for key, newcomers in family_of_all(new).items()
        for edge in Attachment(base[key], edges, facts).attach(newcomers)
    ]

    names = {node.repo for node in new}
    expected = {(e.child, e.parent, e.relation) for e in whole if e.child in names and not e.latent}
    assert len(expected) >= 4
    assert {(e.child, e.parent, e.relation) for e in attached if not e.latent} == expected


def test_newcomers_of_another_family_are_refused(nodes):
    one, other = family_of_all(nodes).values()

    with pytest.raises(ValueError, match="cannot join"):
        Attachment(one, [], {}).attach(other)


def test_a_new_version_of_a_model_is_not_compared_with_the_old_one(nodes):
    base = next(iter(family_of_all(nodes).values()))
    again = base.take(np.array([0]))

    assert not [e for e in Attachment(base, [], {}).attach(again) if e.child == e.parent]

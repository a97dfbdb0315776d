"""Groups of samples, and what they score."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probelog.index.generators import groups
from probelog.index.generators.groups import GroupSpace
from probelog.ranking.samples.description import Descriptions, unit
from probelog.ranking.samples.matched import Asked, SampleSpace

WIDTH = 24


def described(features: np.ndarray, counts: np.ndarray) -> Descriptions:
    few = np.zeros((len(counts), 1, WIDTH), np.float32)
    return Descriptions(few[:, 0], few, few[:, 0, :1], few[:, 0], features.astype(np.float32), counts)


def space_of(random: np.random.Generator, background: int) -> SampleSpace:
    directions, names = (unit(random.normal(size=(background, WIDTH))) for _ in range(2))
    centre = (0.3 * unit(random.normal(size=(1, WIDTH)))[0]).astype(np.float32)
    probes = unit(random.normal(size=(50, WIDTH))).astype(np.float32)
    return SampleSpace.fit(probes, centre, directions, names, probes)


def test_each_concept_is_a_group_whatever_lies_between() -> None:
    random = np.random.default_rng(0)
    concepts = np.eye(WIDTH)[:4]
    shown = np.repeat([0, 1, 2, 3], [40, 12, 8, 3])
    samples = concepts[shown] + 0.05 * random.normal(size=(len(shown), WIDTH))
    samples = np.concatenate([samples, random.normal(size=(1, WIDTH))])  # an outlier
    there = np.ones((1, len(samples)), bool)
    members = groups._members(samples[None].astype(np.float32), there)[0]
    chosen = members.argmax(axis=1)
    assert members.sum(axis=1).tolist() == [1.0] * len(samples)
    large = [chosen[:-1][shown == concept] for concept in range(3)]
    assert all(len({*numbers.tolist()}) == 1 for numbers in large)
    assert len({int(numbers[0]) for numbers in large}) == 3
    alone = groups._members(np.repeat(samples[None, :1], 9, axis=1).astype(np.float32), np.ones((1, 9), bool))
    assert np.count_nonzero(alone.sum(axis=1)) == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.integers(0, 9), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_a_group_scores_as_a_generator_of_the_means(seed: int, background: int, counts: list[int]) -> None:
    random = np.random.default_rng(seed)
    owners = np.repeat(np.arange(len(counts)), counts)
    evidence = random.normal(size=(background, len(owners))).astype(np.float32) * 5
    share = np.log(np.concatenate([random.dirichlet(np.ones(count)) for count in counts]))
    found = groups._anything(evidence, share, owners)
    for number, owner in enumerate(owners):
        own = owners == owner
        rivals = [c for c in range(background) if c != evidence[:, number].argmax()] if background else []
        expected = (
            (np.exp(evidence[rivals][:, own]) * np.exp(share[own])).sum(axis=1).mean() if rivals else 1.0
        )
        assert found[number] == pytest.approx(np.log(expected), abs=1e-4)


def test_vectors_rank_as_scores_do() -> None:
    random = np.random.default_rng(1)
    space = space_of(random, 20)
    made = random.integers(20, size=60)
    features = unit(
        space.centre
        + space.directions[made].repeat(8, axis=0)
        + space.names[made].repeat(8, axis=0)
        + 0.1 * random.normal(size=(480, WIDTH))
    )
    models = described(features, np.full(60, 8))
    finder = GroupSpace.fit(space, features, float(np.linalg.norm(features - space.centre, axis=1).mean()))
    owners, vectors = finder.vectors(models)
    offsets = space.offsets(models)
    for concept in np.unique(made)[:10]:
        asked = Asked(space.directions[concept], space.names[concept], np.array([concept]), True)
        best = np.unique(owners[np.argsort(-(vectors @ finder.query(asked)))[: (made == concept).sum()]])
        assert set(made[best]) == {concept}
        exact = np.argsort(-space.scores(models, offsets, [asked])[0])[: (made == concept).sum()]
        assert set(made[exact]) == {concept}

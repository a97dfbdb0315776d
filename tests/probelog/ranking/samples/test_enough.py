"""More samples of a generator: only where the halves of those that there are disagree, and never without end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probelog.ranking.samples.description import unit
from probelog.ranking.samples.enough import AMONG, batches, is_unsure

NAMES = np.eye(20, 24, dtype=np.float32)


def shown(*concepts: int, seed: int = 0, noise: float = 0.3) -> np.ndarray:
    """Features of samples that show one concept each."""
    drawn = np.random.default_rng(seed).normal(size=(len(concepts), 24)) / np.sqrt(24)
    return unit(NAMES[list(concepts)] + noise * drawn)


def test_one_concept_and_some_that_take_turns_are_sure() -> None:
    assert not is_unsure(shown(*[3] * 64), NAMES)
    assert not is_unsure(shown(*[0, 1, 2, 3, 4] * 12), NAMES)


def test_other_concepts_in_each_half_are_unsure() -> None:
    """As of a model of more classes than it has made samples."""
    assert is_unsure(shown(*range(10), *range(10, 20)), NAMES)
    assert is_unsure(shown(*[3] * 32, *[*range(10, 18)] * 4), NAMES)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(2, 20), st.floats(0.1, 10))
def test_what_the_answer_depends_on(seed: int, samples: int, count: int, scale: float) -> None:
    """Not on the order of the names, nor on that of the samples of one half, nor which half is the first, nor on the batch."""
    random = np.random.default_rng(seed)
    names, features = unit(random.normal(size=(count, 8))), unit(random.normal(size=(2 * samples, 8)))
    answer = is_unsure(features, names)
    assert answer == is_unsure(features, names[random.permutation(count)])
    mixed = np.concatenate([random.permutation(features[:samples]), random.permutation(features[samples:])])
    assert answer == is_unsure(mixed, names)
    assert answer == is_unsure(np.roll(features, samples, axis=0), names)
    assert answer == is_unsure(np.concatenate([*np.array_split(features, 3)]), names)
    assert not is_unsure(np.concatenate([features, features]), names), "the same halves agree"
    assert not is_unsure(features, names[:AMONG])
    assert not is_unsure(features[:1], names)


@pytest.mark.parametrize(
    ("first", "most", "answers", "expected"),
    [
        (64, 256, [True, True], [range(64), range(64, 128), range(128, 256)]),
        (64, 256, [True, False], [range(64), range(64, 128)]),
        (64, 64, [], [range(64)]),
        (64, 100, [True], [range(64), range(64, 100)]),
        (64, 9, [], [range(9)]),
        (64, 256, [False], [range(64)]),
    ],
)
def test_batches_double_and_end(first: int, most: int, answers: list[bool], expected: list[range]) -> None:
    asked = iter(answers)
    assert list(batches(first, most, lambda: next(asked))) == expected
    assert next(asked, None) is None

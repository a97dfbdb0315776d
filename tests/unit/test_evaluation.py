"""Evaluation measures on rankings whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from probelog.evaluation import accuracy, hubness


def test_known_ranking() -> None:
    scores = np.array([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 0.0, 0.0]])
    relevant = np.array([[1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    found = accuracy(scores, relevant)
    assert found.queries == 2
    assert found.top1 == 0.5
    assert found.top5 == 1.0
    assert found.average_precision == pytest.approx(((1 + 2 / 3) / 2 + 1 / 4) / 2)
    assert found.median_rank == 2.5
    assert found.chance == pytest.approx(3 / 8)


def test_perfect_and_worst() -> None:
    relevant = np.eye(20, dtype=bool)
    assert accuracy(relevant * 1.0, relevant).average_precision == 1.0
    worst = accuracy(-1.0 * relevant, relevant)
    assert worst.top5 == 0.0
    assert worst.median_rank == 20


def test_nothing_relevant_is_an_error() -> None:
    with pytest.raises(ValueError, match="no query"):
        accuracy(np.zeros((2, 3)), np.zeros((2, 3), bool))


def test_hubness_counts_hubs() -> None:
    even = hubness(np.eye(10) * 10 + np.random.default_rng(0).random((10, 10)), neighbours=1)
    assert even.half == 5
    assert even.skew == 0.0
    one = np.zeros((10, 50))
    one[:, 7] = 1
    assert hubness(one, neighbours=1).half == 1
    assert hubness(one, neighbours=1).skew > 5

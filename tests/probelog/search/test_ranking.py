"""Which logits and models answer: filters, order, ties, and what may not answer, on a small index."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from probelog.errors import QueryError
from probelog.index.contents.logits import Logits
from probelog.index.generation import Generation
from probelog.ranking.confidence import ScoreMoments
from probelog.search import ranking
from probelog.search.query import Query
from probelog.search.ranking import Filter, best, best_models, first_length
from probelog.storage.store import Store
from tests.probelog.publication.test_update import written_update
from tests.support.worlds.small_index import Model, build

MODELS = (
    Model("anna/pets", ("cat", "dog", "horse"), downloads=5),
    Model("bert/copy", ("cat", "dog", "horse"), weights="digest of anna/pets", downloads=50),
    Model("carl/binary", ("hot dog",), head="single", downloads=500),
    Model("dora/things", tuple(f"thing {i}" for i in range(6)), downloads=5000),
    Model("emil/copy", ("cat", "dog", "horse"), weights="digest of anna/pets", downloads=7),
)


@pytest.fixture(scope="module")
def generation(tmp_path_factory: pytest.TempPathFactory) -> Generation:
    small = build(Store(tmp_path_factory.mktemp("ranking")), models=MODELS)
    return Generation(small.store, small.pointer)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Generation:
    """An update of an index that is searched by its shortlist, which here is as long as the index."""
    base = build(Store(tmp_path_factory.mktemp("large")), models=MODELS, exact_logits=1, live=False)
    added = (
        Model("fay/new", tuple(f"new {i}" for i in range(5)), downloads=600),
        Model("gus/copy", ("cat", "dog", "horse"), weights="digest of anna/pets", downloads=8),
    )
    return written_update(base, "update", ["dora/things"], added)


def random_query(generation: Generation, seed: int = 0, negatives: int = 0) -> Query:
    rng = np.random.default_rng(seed)
    width = generation.background_coordinates.shape[1]
    rows = rng.standard_normal((1 + negatives, width)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Query(rows[0], np.empty(0, np.int64), rows[1:])


def all_logits_of(generation: Generation) -> Logits:
    return Logits.joined([*generation.blocks()])


def naive(generation: Generation, query: Query) -> list[tuple[int, float]]:
    """(row, score) of all logits, best first."""
    logits = all_logits_of(generation)
    similarities = query.similarities(logits.coordinates)
    positive = query.positive_scores(generation, logits.coordinates, logits.offsets, similarities)
    scores = query.scores(generation, logits.coordinates, logits.offsets, positive)
    return sorted(
        zip(logits.rows.tolist(), scores.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0])
    )


# Order


@pytest.mark.parametrize("asked", [[3, 0, 2], [4, 1], [2, 2, 0], [0], []])
def test_models_are_taken_in_the_order_in_which_they_were_asked_for(
    generation: Generation, asked: list[int]
) -> None:
    found = generation.take_models(asked, ["repo", "copies"])
    assert found["id"].to_pylist() == asked
    assert found["repo"].to_pylist() == [MODELS[number].repo for number in asked]
    assert found["copies"].to_pylist() == [3 if number in (0, 1, 4) else 1 for number in asked]


@pytest.mark.parametrize("asked", [[7, 0, 3], [2], [9, 9, 1]])
def test_logits_are_taken_in_the_order_in_which_they_were_asked_for(
    generation: Generation, asked: list[int]
) -> None:
    found, all_ = generation.logits(np.array(asked)), all_logits_of(generation)
    assert found.rows.tolist() == asked
    places = [all_.rows.tolist().index(row) for row in asked]
    np.testing.assert_array_equal(found.coordinates, all_.coordinates[places])
    np.testing.assert_array_equal(found.logit, all_.logit[places])


# The best logits


@pytest.mark.parametrize("k", [1, 3, 8, 100])
@pytest.mark.parametrize("negatives", [0, 2])
def test_the_best_are_the_best_by_score(generation: Generation, k: int, negatives: int) -> None:
    query = random_query(generation, seed=k, negatives=negatives)
    matches = best(generation, query, k, Filter(generation, None))
    expected = naive(generation, query)[:k]
    assert matches.logits.rows.tolist() == [row for row, _ in expected]
    np.testing.assert_allclose(matches.scores, [score for _, score in expected], atol=1e-5)
    np.testing.assert_allclose(
        matches.similarities, query.similarities(matches.logits.coordinates), atol=1e-6
    )
    every = np.array([score for _, score in naive(generation, query)])
    assert matches.gallery.mean == pytest.approx(ScoreMoments.of(every).mean, abs=1e-4)
    assert matches.gallery.std == pytest.approx(ScoreMoments.of(every).std, abs=1e-4)


@pytest.mark.parametrize("condition", [None, "downloads < 601", "downloads = 600"])
@pytest.mark.parametrize("k", [1, 3, 50, 100])
def test_a_large_index_has_the_same_best_and_no_logit_twice(
    large: Generation, condition: str | None, k: int
) -> None:
    assert large.large
    assert len(large.recent) == 5
    for seed in range(6):
        query, chosen = random_query(large, seed), Filter(large, condition)
        logits = all_logits_of(large)
        allowed = {row for row, w in zip(logits.rows, chosen.allowed(logits.weights), strict=True) if w}
        expected = [(row, score) for row, score in naive(large, query) if row in allowed][:k]
        found = best(large, query, k, chosen)
        assert found.logits.rows.tolist() == [row for row, _ in expected]
        np.testing.assert_allclose(found.scores, [score for _, score in expected], atol=1e-5)


def test_one_logit_may_be_left_out(generation: Generation) -> None:
    asked = random_query(generation)
    first = naive(generation, asked)[0][0]
    found = best(generation, asked, 100, Filter(generation, None), skip=first)
    assert found.logits.rows.tolist() == [row for row, _ in naive(generation, asked)[1:]]


def test_a_filter_lets_through_what_meets_it(generation: Generation) -> None:
    asked = random_query(generation)
    chosen = Filter(generation, "downloads >= 500")
    weights = {int(w) for w in generation.models("downloads >= 500", ["weights"])["weights"]}
    found = best(generation, asked, 4, chosen)
    logits = all_logits_of(generation)
    allowed = {
        row for row, w in zip(logits.rows.tolist(), logits.weights.tolist(), strict=True) if w in weights
    }
    assert found.logits.rows.tolist() == [row for row, _ in naive(generation, asked) if row in allowed][:4]
    assert chosen.count == len(allowed) == 8
    assert chosen.share == pytest.approx(8 / generation.size)
    assert chosen.rows.tolist() == sorted(allowed)
    copies = Filter(generation, "downloads < 500")
    assert (len(copies.members([0])), copies.count, len(copies.rows)) == (1, 3, 3), (
        "copies share their logits"
    )


def test_pieces_and_ties_change_nothing(generation: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = random_query(generation)
    monkeypatch.setattr(ranking, "ROWS_AT_ONCE", 1)
    logits = all_logits_of(generation)
    for k in (1, 2, 5):
        rank = ranking._Ranking(generation, asked, k, None)
        assert rank.worst == -np.inf
        for start in range(0, len(logits), 2):
            rank.add(logits[np.arange(start, min(start + 2, len(logits)))])
        # The same once more: equal scores go by rows.
        rank.add(logits)
        expected = sorted(
            [*naive(generation, asked), *naive(generation, asked)], key=lambda p: (-p[1], p[0])
        )[:k]
        found = rank.result(ScoreMoments(0.0, 1.0))
        assert found.logits.rows.tolist() == [row for row, _ in expected]
        assert rank.worst == pytest.approx(expected[-1][1], abs=1e-5)
        rank.clear()
        assert rank.worst == -np.inf


def test_of_equal_scores_the_lower_row_comes_first(generation: Generation) -> None:
    """Whichever block it is in."""
    asked, logits = random_query(generation), all_logits_of(generation)
    twins = replace(logits, rows=logits.rows + 100)
    for blocks in ((twins, logits), (logits, twins)):
        rank = ranking._Ranking(generation, asked, 7, None)
        for block in blocks:
            rank.add(block)
        expected = [row for first, _ in naive(generation, asked)[:4] for row in (first, first + 100)][:7]
        assert rank.result(ScoreMoments(0.0, 1.0)).logits.rows.tolist() == expected


# Filters


def test_members_are_the_first_that_may_answer_and_how_many_may(generation: Generation) -> None:
    weights = dict(zip(range(5), generation.models("1 = 1", ["weights"])["weights"].tolist(), strict=True))
    shared = weights[0]
    assert weights[1] == weights[4] == shared
    everybody = Filter(generation, None)
    assert everybody.members([weights[3], shared]) == {shared: (shared, None), weights[3]: (weights[3], None)}
    few = Filter(generation, "downloads > 6")
    assert few.members([shared, weights[2]]) == {shared: (1, 2), weights[2]: (2, 1)}
    assert few.allowed(np.array([shared, weights[2], 99])).tolist() == [True, True, False]
    assert everybody.allowed(np.array([5, 6])).tolist() == [True, True]
    assert everybody.share == 1.0
    assert everybody.count == np.inf


@pytest.mark.parametrize("condition", ["", "  "])
def test_an_empty_filter_is_refused(generation: Generation, condition: str) -> None:
    with pytest.raises(QueryError, match="the filter is empty"):
        Filter(generation, condition)


def test_a_filter_that_nothing_meets(generation: Generation) -> None:
    chosen = Filter(generation, "downloads > 1000000")
    assert (chosen.count, len(chosen.rows)) == (0, 0)
    assert 0 < chosen.share <= 1 / generation.size
    assert len(best(generation, random_query(generation), 3, chosen).logits) == 0


def test_filters_that_many_meet_are_not_listed(
    generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "_LISTED_MODELS", 1)
    monkeypatch.setattr(Generation, "large", True)
    chosen = Filter(generation, "downloads < 500")
    assert chosen.count == np.inf
    assert chosen.share == pytest.approx(3 / 5)
    shared = int(generation.models("id = 0", ["weights"])["weights"][0])
    assert chosen.allowed(np.array([shared, shared + 1])).tolist() == [True, False]
    assert chosen.members([shared]) == {shared: (0, 3)}
    assert Filter(generation, "downloads >= 5000").count == 6


@pytest.mark.parametrize(
    ("size", "length"), [(10, 300), (1_000_000, 300), (2_000_000, 455), (5_000_000, 788), (100_000_000, 4755)]
)
def test_the_first_shortlist_grows_with_the_index(size: int, length: int) -> None:
    assert first_length(size) == length


# Models


@pytest.mark.parametrize("k", [1, 2, 10])
def test_the_best_models_do_what_the_asked_ones_logits_do(generation: Generation, k: int) -> None:
    logits = all_logits_of(generation)
    weights = dict(zip(range(5), generation.models("1 = 1", ["weights"])["weights"].tolist(), strict=True))
    asked = logits[logits.weights == weights[0]]
    found = best_models(generation, asked, weights[0], k, Filter(generation, None))
    scores = generation.sharpness * (logits.coordinates @ asked.coordinates.T) - logits.offsets[:, None]
    expected = {
        number: float(scores[logits.weights == number].max(axis=0).mean())
        for number in (weights[2], weights[3])
    }
    order = sorted(expected, key=lambda number: -expected[number])[:k]
    assert [item.weights for item in found] == order
    np.testing.assert_allclose(
        [item.score for item in found], [expected[number] for number in order], rtol=1e-5
    )
    only = best_models(generation, asked, weights[0], k, Filter(generation, "downloads = 500"))
    assert [item.weights for item in only] == [weights[2]]


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("condition", [None, "downloads > 5", "downloads > 1000000"])
def test_a_large_index_has_the_same_best_models(
    large: Generation, condition: str | None, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that are found by a shortlist of models, or by all where that would be too long."""
    monkeypatch.setattr(ranking, "_FILTERED", -1)
    monkeypatch.setattr(ranking, "_LARGEST_SHARE", share)
    logits, chosen = all_logits_of(large), Filter(large, condition)
    for number in np.unique(logits.weights).tolist():
        asked = logits[logits.weights == number]
        for k in (1, 2, 9):
            expected = ranking._ranked(large, asked, [logits], number, k, chosen)
            found = best_models(large, asked, number, k, chosen)
            assert [item.weights for item in found] == [item.weights for item in expected]
            assert number not in [item.weights for item in found]
            np.testing.assert_allclose([i.score for i in found], [i.score for i in expected], atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_candidates_are_the_models_that_score_well_for_all_of_a_models_logits(
    large: Generation, count: int
) -> None:
    logits, everybody = all_logits_of(large), Filter(large, None)
    for number in np.unique(logits.weights).tolist():
        asked = logits[logits.weights == number]
        scores = large.sharpness * (logits.coordinates @ asked.coordinates.T) - logits.offsets[:, None]
        gains = {
            other: float((scores[logits.weights == other].max(axis=0) - scores.min(axis=0)).sum())
            for other in np.unique(logits.weights).tolist()
            if other != number
        }
        first = sorted(gains, key=lambda other: -gains[other])[:count]
        found = ranking._rows_of_candidates(large, asked, number, count, everybody)
        assert found.tolist() == logits.rows[np.isin(logits.weights, first)].tolist()


def test_a_models_logits_may_lie_in_two_blocks(generation: Generation) -> None:
    logits = all_logits_of(generation)
    asked = logits[np.arange(3)]
    whole = ranking._ranked(generation, asked, [logits], -1, 9, Filter(generation, None))
    for size in (1, 2, 4):
        starts = range(0, len(logits), size)
        blocks = [logits[np.arange(start, min(start + size, len(logits)))] for start in starts]
        blocks.insert(1, logits[np.arange(0)])
        found = ranking._ranked(generation, asked, blocks, -1, 9, Filter(generation, None))
        assert [item.weights for item in found] == [item.weights for item in whole]
        np.testing.assert_allclose([item.score for item in found], [item.score for item in whole], atol=1e-5)

"""Which of the ranked logits are answers, and the models that cover a set of concepts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import probelog
from probelog.errors import QueryError
from probelog.search import ranking
from probelog.search.ranking import Selection
from probelog.search.results import Hit
from probelog.storage.store import Store
from tests.support.worlds.small_index import MODELS_OF_ALL_SORTS, SmallIndex, build


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    return build(Store(tmp_path_factory.mktemp("models") / "index"), kind="siglip", images=False)


@pytest.fixture(scope="module")
def index(small: SmallIndex) -> probelog.Index:
    return probelog.open_index(small.store.uri)


@pytest.fixture(scope="module")
def ranked(index: probelog.Index) -> list[Hit]:
    """Every logit for one query, best first."""
    return list(index.search("dog", k=1000))


def keys(hits: list[Hit]) -> list[tuple[str, int, bool]]:
    return [(hit.repo, hit.logit, hit.negated) for hit in hits]


def first_of_each(hits: list[Hit]) -> list[Hit]:
    return list({hit.repo: hit for hit in reversed(hits)}.values())[::-1]


def test_the_best_logit_of_each_model(index: probelog.Index, ranked: list[Hit]) -> None:
    seen: set[str] = set()
    expected = [hit for hit in ranked if not (hit.repo in seen or seen.add(hit.repo))]
    found = index.search("dog", k=100, by="model")
    assert keys(found[:]) == keys(expected)
    assert [hit.rank for hit in found] == [*range(1, len(expected) + 1)]
    assert {hit.relatives for hit in found} == {None}
    assert next(hit for hit in found if hit.repo == "anna/pets").duplicates == 2
    assert keys(index.search("dog", k=2, by="model")[:]) == keys(expected)[:2]
    assert keys(index.search("dog", k=1000, by="logit")[:]) == keys(ranked)


def test_a_least_confidence_and_the_order_by_it(index: probelog.Index, ranked: list[Hit]) -> None:
    confidences = sorted((hit.confidence or 0.0) for hit in ranked)
    least = confidences[len(confidences) // 2]
    enough = [hit for hit in ranked if (hit.confidence or 0.0) >= least]
    assert 0 < len(enough) < len(ranked)
    assert keys(index.search("dog", k=1000, min_confidence=least)[:]) == keys(enough)
    assert keys(index.search("dog", k=3, min_confidence=least)[:]) == keys(enough)[:3]
    by_confidence = sorted(ranked, key=lambda hit: -(hit.confidence or 0.0))
    assert keys(index.search("dog", k=7, sort="confidence")[:]) == keys(by_confidence)[:7]
    assert keys(index.search("dog", k=1000, sort="confidence", min_confidence=least)[:]) == keys(by_confidence)[: len(enough)]  # fmt: skip
    assert len(index.search("dog", min_confidence=1.0)) == 0


def test_the_search_for_confident_answers_goes_on_as_long_as_there_are_some(
    index: probelog.Index, ranked: list[Hit], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    best = ranking.best

    def noted(generation, query, count, model_filter, skip=None):
        lengths.append(count)
        return best(generation, query, count, model_filter, skip)

    monkeypatch.setattr(ranking, "best", noted)
    monkeypatch.setattr(ranking, "_SORTED", 4)
    lowest = min(hit.confidence or 0.0 for hit in ranked)
    assert len(index.search("dog", k=len(ranked), by="model", min_confidence=lowest)) == 6
    assert lengths[-1] > len(ranked)
    lengths.clear()
    assert len(index.search("dog", k=2, min_confidence=0.999)) == 0
    assert lengths[-1] == 8, "none among the first, none below"
    monkeypatch.setattr(ranking, "_LONGEST_RANKING", 8)
    results = index.search("dog", k=7, by="model")
    assert len(results) < 6
    assert f"only {len(results)} answers are among the 8 best scores" in results.notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "repo"}, "folded by model or by family"),
        ({"sort": "downloads"}, "sorted by score or by confidence"),
        ({"min_confidence": 1.5}, "between 0 and 1"),
        ({"min_confidence": float("nan")}, "between 0 and 1"),
        ({"like": "anna/pets#0", "min_confidence": 0.5}, "have no confidence"),
        ({"like": "anna/pets#0", "sort": "confidence"}, "have no confidence"),
    ],
)
def test_selections_without_meaning(index: probelog.Index, arguments: dict, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        index.search("dog", **arguments)


def test_several_words_that_are_one_name(index: probelog.Index) -> None:
    """An unquoted name on the command line comes as several."""
    (note,) = index.search(["golden", "retrievers"]).notes
    assert 'did you mean "golden retrievers"' in note
    assert index.search(["golden retriever", "dog"]).notes == []
    assert index.search("golden retriever").notes == []


def test_every_answer_has_its_page(index: probelog.Index) -> None:
    hit = index.search("dog")[0]
    assert hit.url.endswith(f"/tree/{hit.sha}")
    assert (
        index.show("anna/pets").url == f"https://huggingface.co/anna/pets/tree/{MODELS_OF_ALL_SORTS[0].sha}"
    )
    assert index.models_like("anna/pets")[0].url.startswith("https://huggingface.co/")
    assert hit.url in index.search("dog").to_arrow()["url"].to_pylist()


# A set of concepts

CONCEPTS = ["dog", "a violin", "bus"]


def test_models_by_what_they_cover(index: probelog.Index) -> None:
    best: dict[str, dict[str, Hit]] = {}
    for concept in CONCEPTS:
        for hit in first_of_each(list(index.search(concept, k=1000))):
            best.setdefault(hit.repo, {})[concept] = hit
    coverage = {repo: np.mean([hit.confidence for hit in found.values()]) for repo, found in best.items()}
    expected = sorted(coverage, key=lambda repo: -coverage[repo])
    found = index.search_domain(CONCEPTS, k=100, min_confidence=0.75)
    assert [hit.repo for hit in found] == expected
    for hit in found:
        assert hit.coverage == pytest.approx(coverage[hit.repo])
        assert [match.concept for match in hit.matches] == CONCEPTS
        for match in hit.matches:
            one = best[hit.repo][match.concept]
            assert (match.logit, match.label, match.negated) == (one.logit, one.label, one.negated)
            assert (match.score, match.confidence) == (
                pytest.approx(one.score),
                pytest.approx(one.confidence),
            )
        assert hit.lacks == [match.concept for match in hit.matches if match.confidence < 0.75]
    assert {len(hit.lacks) for hit in found} != {0}
    assert [hit.repo for hit in index.search_domain(CONCEPTS, k=2)] == expected[:2]
    assert next(hit for hit in found if hit.repo == "anna/pets").duplicates == 2


def test_filters_of_a_set(index: probelog.Index) -> None:
    assert {hit.repo for hit in index.search_domain(CONCEPTS, where="licence = 'mit'")} == {"anna/pets"}
    assert len(index.search_domain(CONCEPTS, where="likes > 1000")) == 0
    table = index.search_domain(CONCEPTS, k=2).to_arrow()
    assert table["matches"][0].as_py()[0]["concept"] == "dog"


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ("dog", "as a list"),
        ([], "as a list"),
        (["dog", "Dogs"], "'Dogs' is among the concepts twice"),
        (["dog", " "], "the query is empty"),
        ([f"thing {i}" for i in range(101)], "at most 100"),
    ],
)
def test_sets_without_meaning(index: probelog.Index, concepts: list[str], message: str) -> None:
    with pytest.raises(QueryError, match=message):
        index.search_domain(concepts)
    for arguments in ({"k": 0}, {"by": "logit"}, {"min_confidence": 2.0}):
        with pytest.raises(QueryError):
            index.search_domain(["dog"], **arguments)


def test_a_selection_is_what_it_was_made_of() -> None:
    assert not Selection(3).by_confidence
    assert dataclasses.replace(Selection(3), min_confidence=0.0).by_confidence

"""The Hub's own search as a baseline: which words find which repositories, and how it is counted."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.benchmark.questions import Questions
from pipelines.labels.hub_search import IDS, WORDS, ListedModel, ModelSearch, model_searches

MODELS = [
    ListedModel("ada/tabby-cats", ["vision"], ["LABEL_0", "LABEL_1"], 5),
    ListedModel("bob/animals", ["cat", "dog"], ["n02123045 Tabby_Cat", "dogs"], 3),
    ListedModel("cleo/catalogue", [], ["catalogue"], 9),
    ListedModel("dan/untitled", [], [], 100),
]


def searched(names: list[str], right: list[list[int]]) -> dict[str, ModelSearch]:
    """One logit a model; ``right`` says which models recognise each concept, and the index ranks the last model first."""
    relevant = np.zeros((len(names), len(MODELS)), bool)
    for row, columns in zip(relevant, right, strict=True):
        row[columns] = True
    questions = Questions(
        names, [[name] for name in names], np.ones(len(names), bool), relevant, [None] * len(names)
    )
    scores = np.tile(np.arange(len(MODELS), dtype=np.float64), (len(names), 1))
    found = model_searches(questions, [model.repo for model in MODELS], scores, MODELS)
    return {way.name: way for way in found}


def test_ids_are_searched_by_substrings() -> None:
    way = searched(["cat"], [[0]])[IDS]
    assert (way.top1, way.top5, way.found) == (0, 1, 1), "cleo/catalogue has the letters and more downloads"
    assert way.average_precision == pytest.approx(1 / 2)
    assert searched(["Tabby CAT"], [[0]])[IDS].top1 == 1
    assert searched(["tabby dog"], [[0]])[IDS].answered == 0, "every word must be there"


def test_words_are_whole_and_of_one_text() -> None:
    way = searched(["cat"], [[0, 1]])[WORDS]
    assert (way.top1, way.found) == (1, 1), (
        "spellings count: tabby-cats, Tabby_Cat; catalogue is another word"
    )
    assert searched(["tabby dog"], [[1]])[WORDS].answered == 0, "words of two labels"


def test_a_label_that_is_the_query_comes_first() -> None:
    way = searched(["tabby cat"], [[1]])[WORDS]
    assert way.top1 == 1, "bob declares it, though ada has more downloads"


def test_what_is_never_found_counts_as_never_found() -> None:
    ways = searched(["cat", "owl"], [[1, 3], [3]])
    way = ways[WORDS]
    assert way.queries == 2
    assert (way.answered, way.found) == (0.5, 0.25)
    assert way.average_precision == pytest.approx((1 / 2 * 1 / 2 + 0) / 2), (
        "second of two returned, one of two found"
    )
    index = ways["this index (matched heads)"]
    assert (index.top1, index.found) == (1, 1)
    assert index.average_precision == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)


def test_concepts_that_nothing_recognises_do_not_count() -> None:
    assert searched(["cat", "owl"], [[0], []])[WORDS].queries == 1

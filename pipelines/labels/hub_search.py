"""What people have without an index: the words of a query among what repositories say about themselves.

Answers are models, in the Hub's order by downloads. A model is right if one of its logits is relevant to the query. Two
searches, each asked with the concept's name alone, as a person would:

- *repository ids*: every word of the query is part of the repository's id, as in the Hub's search box (its API calls it
  a filter "based on substrings for repos and their usernames").
- *ids, tags and labels*: every word of the query is a word of the id, of one tag or of one declared label; those that
  declare just the query as a label come first. More than the Hub offers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.benchmark.questions import Bools, Questions
from pipelines.labels.labels import names_in
from probelog.evaluation.accuracy import per_query
from probelog.ranking.matched_heads import Float64
from probelog.ranking.names import normal_name

IDS = "the Hub's search (repository ids)"
WORDS = "words of ids, tags and labels"


@dataclass(frozen=True)
class ListedModel:
    """What the Hub shows of a model."""

    repo: str
    tags: Sequence[str]
    labels: Sequence[str]
    downloads: int


@dataclass(frozen=True)
class ModelSearch:
    """How well one way finds models, over the concepts that at least one model recognises.

    Attributes:
        name: of the way.
        queries: how many concepts.
        top1, top5: share of them with a right model first, or among the first five.
        average_precision: mean over concepts; right models that are not returned count as never found.
        answered: share of the concepts for which any model is returned.
        found: share of the right models that are returned at all, mean over concepts.
    """

    name: str
    queries: int
    top1: float
    top5: float
    average_precision: float
    answered: float
    found: float


def model_searches(
    questions: Questions, owners: Sequence[str], scores: Float64, models: Sequence[ListedModel]
) -> list[ModelSearch]:
    """The index's answers as models, each by its best logit, and both searches by words.

    Args:
        questions: C concepts and N logits.
        owners: (N,) repository of every logit.
        scores: (C, N) of the index.
        models: what the Hub shows of these repositories.
    """
    columns = [np.flatnonzero(np.array([owner == model.repo for owner in owners])) for model in models]
    right = np.stack([questions.relevant[:, own].any(axis=1) for own in columns], axis=1)
    ours = np.stack([scores[:, own].max(axis=1) for own in columns], axis=1)
    return [
        _measured("this index (matched heads)", ours, right),
        *word_searches(questions.names, right, models),
    ]


def word_searches(names: Sequence[str], right: Bools, models: Sequence[ListedModel]) -> list[ModelSearch]:
    """Both searches by words, for the names (C,) of concepts with their right models (C, M)."""
    return [
        _measured(IDS, _by_ids(names, models), right),
        _measured(WORDS, _by_words(names, models), right),
    ]


def _by_ids(names: Sequence[str], models: Sequence[ListedModel]) -> Float64:
    """Scores (C, M), minus infinity for what is not returned."""
    scores = np.full((len(names), len(models)), -np.inf)
    for i, name in enumerate(names):
        for j, model in enumerate(models):
            if all(word in model.repo.casefold() for word in name.casefold().split()):
                scores[i, j] = model.downloads
    return scores


def _by_words(names: Sequence[str], models: Sequence[ListedModel]) -> Float64:
    """Scores (C, M), minus infinity for what is not returned."""
    texts = [[_words(text) for text in (model.repo, *model.tags, *model.labels)] for model in models]
    declared = [{name for label in model.labels for name in names_in(label)} for model in models]
    first = 1 + max((model.downloads for model in models), default=0)
    scores = np.full((len(names), len(models)), -np.inf)
    for i, name in enumerate(names):
        words, normal = _words(name), names_in(name)
        for j, model in enumerate(models):
            if any(words <= text for text in texts[j]):
                scores[i, j] = model.downloads + first * (not declared[j].isdisjoint(normal))
    return scores


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", " ".join([normal_name(text), *names_in(text)])))


def _measured(name: str, scores: Float64, right: Bools) -> ModelSearch:
    asked = right.any(axis=1)
    scores, right = scores[asked], right[asked]
    returned = np.isfinite(scores)
    # What is not returned lies behind everything and is never right.
    reached = right & returned
    measures = np.zeros((len(scores), 3))
    some = reached.any(axis=1)
    if some.any():
        measures[some] = per_query(scores[some], reached[some]).measures
    found = reached.sum(axis=1) / right.sum(axis=1)
    top1, top5, _ = measures.mean(axis=0)
    return ModelSearch(
        name=name,
        queries=len(scores),
        top1=float(top1),
        top5=float(top5),
        average_precision=float((measures[:, 2] * found).mean()),
        answered=float(returned.any(axis=1).mean()),
        found=float(found.mean()),
    )

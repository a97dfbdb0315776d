"""How the background of an evaluation is chosen: as published, withheld, closed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipelines.benchmark.probed import ProbedHub
from pipelines.benchmark.protocols import AS_PUBLISHED, CLOSED, PROTOCOLS, WITHHELD, rounds
from pipelines.benchmark.questions import Questions, Truth, from_truth
from pipelines.evaluate import evaluate
from probelog.evaluation import METHODS
from probelog.evaluation.accuracy import half_of
from probelog.ranking.names import normal_name
from tests.support.processes.operator_command import operator
from tests.support.worlds.tiny_world import Indexed

PUBLISHED = ["stone", "river", "Dog"]


def questions(*names: str) -> Questions:
    return Questions(
        names=list(names),
        synonyms=[[name] for name in names],
        single=np.ones(len(names), bool),
        relevant=np.eye(len(names), dtype=bool),
        classes=[None] * len(names),
    )


ANIMALS = questions("dog", "cat", "owl", "horse", "goat", "pig", "hen", "duck")


def test_both_halves_are_there() -> None:
    assert {half_of(name) for name in ANIMALS.names} == {"development", "test"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_concept_is_asked_once(protocol: str) -> None:
    asked = np.concatenate([part.numbers for part in rounds(protocol, ANIMALS, PUBLISHED)])
    assert sorted(asked.tolist()) == list(range(len(ANIMALS.names)))


def test_backgrounds() -> None:
    (published,) = rounds(AS_PUBLISHED, ANIMALS, PUBLISHED)
    assert published.background == PUBLISHED
    (closed,) = rounds(CLOSED, ANIMALS, PUBLISHED)
    assert closed.background == ANIMALS.names
    halves = rounds(WITHHELD, ANIMALS, PUBLISHED)
    assert len(halves) == 2
    for part in halves:
        asked = [ANIMALS.names[number] for number in part.numbers]
        assert sorted([*asked, *part.background]) == sorted(ANIMALS.names)
        assert {half_of(name) for name in asked}.isdisjoint({half_of(name) for name in part.background})


def test_withheld_lacks_every_name_of_the_half() -> None:
    """A concept of the one half whose synonym is asked in the other half is no background there."""
    one = next(i for i, name in enumerate(ANIMALS.names) if half_of(name) == "test")
    other = next(i for i, name in enumerate(ANIMALS.names) if half_of(name) == "development")
    synonyms = [list(names) for names in ANIMALS.synonyms]
    synonyms[one].append(ANIMALS.names[other].upper())
    for part in rounds(WITHHELD, replace(ANIMALS, synonyms=synonyms), PUBLISHED):
        own = {normal_name(name) for number in part.numbers for name in synonyms[number]}
        assert own.isdisjoint(normal_name(name) for name in part.background)
    assert ANIMALS.names[other] not in next(
        part.background
        for part in rounds(WITHHELD, replace(ANIMALS, synonyms=synonyms), PUBLISHED)
        if one in part.numbers
    )


def test_a_half_without_concepts_is_not_asked() -> None:
    same = questions(*(name for name in ANIMALS.names if half_of(name) == "test"))
    (part,) = rounds(WITHHELD, same, PUBLISHED)
    assert part.background == []


@pytest.mark.acceptance
def test_the_index_answers_under_every_protocol(indexed: Indexed) -> None:
    """Closed and withheld, computed again from the observations, are what the index's directions give."""
    truth = Truth.read(indexed.world.truth)
    found = evaluate(str(indexed.store), indexed.world.truth)
    assert list(found.protocols) == list(PROTOCOLS)
    assert found.methods == found.protocols[AS_PUBLISHED]
    hub = ProbedHub.open(str(indexed.store), lambda m: "copy" if truth.kinds[m.repo] == "copy" else None)
    asked = from_truth(truth, hub.logits)
    gallery, _ = hub.gallery(1.0, seed=0)
    for protocol in (WITHHELD, CLOSED):
        ranks = np.zeros(len(asked.names))
        for numbers, background in rounds(protocol, asked, hub.generation.background):
            concepts = hub.concepts(
                hub.embed([asked.names[i] for i in numbers]), [asked.synonyms[i] for i in numbers], background
            )
            scores = METHODS["matched heads"](gallery, concepts)
            for number, row in zip(numbers.tolist(), scores, strict=True):
                if asked.relevant[number].any():
                    ranks[number] = 1 + (row > row[asked.relevant[number]].max()).sum()
        answerable = ranks > 0
        method = found.protocols[protocol][0]
        assert method.name == "this index (matched heads)"
        assert method.every.queries == answerable.sum()
        assert method.every.top1 == pytest.approx((ranks[answerable] == 1).mean())
        assert method.every.median_rank == pytest.approx(np.median(ranks[answerable]))


def test_the_command_names_the_protocols(indexed: Indexed) -> None:
    given = ["evaluate", "--index", indexed.store, "--truth", indexed.world.truth]
    ended = operator(*given)
    assert [line.split(":")[0] for line in ended.out.splitlines() if "background" in line] == list(PROTOCOLS)
    ended = operator(*given, "--protocol", "withheld")
    assert "withheld:" in ended.out
    assert "closed:" not in ended.out
    ended = operator(*given, "--protocol", "open")
    assert ended.status == 2
    assert "there is no protocol 'open'; there are: as-published, withheld, closed" in " ".join(
        ended.err.split()
    )

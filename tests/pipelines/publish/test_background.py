"""A background of a hub's own names: which declared names it takes, how they are bounded, and what fills it up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from pipelines.publish.background import FEWEST, declared_names, fitting, hub_background, spread
from probelog.arrays import Floats
from probelog.ranking.matched_heads import HeadSpace
from probelog.search.query import numbers_named

RNG = np.random.default_rng(3)


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def model(repo: str, *labels: str) -> tuple[str, list[str]]:
    return repo, [*labels]


def embed(names: Sequence[str]) -> Floats:
    return unit(np.stack([np.random.default_rng([*name.encode()]).standard_normal(48) for name in names]))


def never() -> Floats:
    raise AssertionError("the logits are not needed")


def test_names_are_normalised_and_taken_once() -> None:
    models = [
        model("a/one", "n02123045 Tabby_Cats", "LABEL_1", "tench, Tinca tinca", "dog\x1b[2J"),
        model("b/two", "tabby cat", "3"),
    ]
    assert sorted(declared_names(models, 100, seed=0)) == ["tabby cat", "tench", "tinca tinca"]


def test_what_most_uploaders_declare_comes_first() -> None:
    models = [
        model(f"owner{i}/m", "cat", *(["dog"] if i < 3 else []), f"thing {'abcde'[i]}") for i in range(5)
    ]
    names = declared_names(models, 100, seed=0)
    assert names[:2] == ["cat", "dog"]
    assert declared_names(models[::-1], 100, seed=0) == names, "whatever the order of the models"
    assert declared_names(models, 100, seed=1)[2:] != names[2:]


def test_no_uploader_floods_the_background() -> None:
    flood = [model(f"spam/{i}", *(f"junk {chr(97 + i)}{chr(97 + j)}" for j in range(20))) for i in range(20)]
    others = [model(f"owner{i}/m", f"thing {chr(97 + i)}", "cat") for i in range(26)]
    names = declared_names([*flood, *others], 100, seed=0)
    assert sum(name.startswith("junk") for name in names) == 100 // 20
    assert {"cat", *(f"thing {chr(97 + i)}" for i in range(26))} <= {*names}


def test_the_only_uploader_of_a_hub_is_no_flood() -> None:
    models = [model(f"lab/{i}", *(f"thing {chr(97 + i)}{chr(97 + j)}" for j in range(10))) for i in range(10)]
    assert len(declared_names(models, 200, seed=0)) == 100


def test_names_are_spread() -> None:
    """Three clusters: whatever comes first, each has one before any has a third."""
    centres = np.eye(3, 8) * 9
    vectors = unit(np.concatenate([centre + 0.1 * RNG.standard_normal((10, 8)) for centre in centres]))
    chosen = spread(vectors, 4, first=2)
    assert chosen[:2] == [0, 1]
    assert {number // 10 for number in chosen} == {0, 1, 2}
    assert sorted(spread(vectors, 30, first=1)) == sorted(spread(vectors, 40, first=40)) == list(range(30))
    doubled = np.concatenate([vectors, vectors])
    assert sorted(spread(doubled, 60, first=3)) == list(range(60)), "copies of a vector are different names"


def test_a_hub_that_declares_enough_needs_nothing_else() -> None:
    declared = [f"thing {i}" for i in range(FEWEST)]
    found = hub_background(declared, ["stone"], 2000, embed, np.empty((0, 48)), never)
    assert found == sorted(declared)
    few = hub_background(declared, ["stone"], 50, embed, np.empty((0, 48)), never)
    assert len(few) == 50
    assert {*declared[:25]} < {*few} < {*declared}


@pytest.mark.parametrize("declared", [[], ["tabby cat", "dog"]])
def test_a_hub_that_declares_little_gets_names_that_fit(declared: list[str]) -> None:
    """Many logits stand for five of the vocabulary's names: these are taken first."""
    general = ["Dog" if i == 7 else f"word {'abcdefghij'[i % 10]}{'abcdefghij'[i // 10]}" for i in range(60)]
    embeddings = unit(RNG.standard_normal((400, 48)))
    known = general[10:15]
    stands_for = np.repeat(HeadSpace(embeddings, embed(general)).background[10:15], 10, axis=0)
    directions = np.concatenate([stands_for, unit(RNG.standard_normal((60, 48)))])
    count = len(declared) + 5
    found = hub_background(declared, general, count, embed, embeddings, lambda: directions)
    assert found == sorted([*declared, *known])
    everything = hub_background(declared, general, 2000, embed, embeddings, lambda: directions)
    assert len(everything) == 60 + len(declared) - ("dog" in declared), (
        "a name in another spelling is no second one"
    )


def test_fitting_names_are_those_of_most_logits() -> None:
    names, embeddings = [f"word {letter}" for letter in "abcdefgh"], unit(RNG.standard_normal((300, 48)))
    directions = HeadSpace(embeddings, embed(names)).background
    chosen = np.repeat(directions, [1, 4, 2, 1, 1, 3, 1, 1], axis=0)
    assert fitting(names, 3, embed(names), embeddings, chosen) == ["word b", "word f", "word c"]


def test_a_querys_own_names_are_known_in_other_spellings() -> None:
    background = ["Egyptian cat", "gray wolf", "jack o lantern", "LABEL_3", "cattle"]
    assert numbers_named(background, ["egyptian_cats"]).tolist() == [0]
    assert numbers_named(background, ["Grey Wolves", "Jack-o'-lanterns"]).tolist() == [2]
    assert numbers_named(background, ["grey wolf", "label_3"]).tolist() == [1, 3]
    assert numbers_named(background, ["cat", "LABEL_4"]).tolist() == []

"""A whole classifier as a query for generators: those that make what it recognises, and by which of its logits they are found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from probelog.encoders.text import TextEncoder
from probelog.errors import QueryError
from probelog.ranking.matched_heads import HeadSpace
from probelog.ranking.names import name_vectors
from probelog.search.client import Index, open_index
from probelog.search.generators import classifiers, ranking
from probelog.storage.store import Store
from tests.support.worlds import small_generators, small_index
from tests.support.worlds.small_generators import GENERATORS_OF_ALL_SORTS, Generator
from tests.support.worlds.small_index import BACKGROUND, PROMPT, Model

MANY = Model("owner/many", tuple(BACKGROUND[number % 2] for number in range(600)))
MODELS = (
    Model("owner/cats", ("cat", "cup")),
    Model("owner/cats-again", ("cat", "cup"), weights="digest of owner/cats"),
    Model("owner/zoo", ("tree", "sea_lion", "Golden Retriever", "apple")),
    Model("owner/lamp-or-not", ("lamp",), head="single"),
    Model("owner/nothing", ("bus", "bus")),
    Model("owner/hostile", ("violin", "\x1b[31mred")),
    MANY,
)
MAKERS = (
    *GENERATORS_OF_ALL_SORTS,
    Generator("two/of-two", ("sea_lion", "apple"), samples=64),
    Generator("one/of-two", ("sea_lion", "bus"), samples=64),
)


def describe(model: Model, space: HeadSpace, encoder: TextEncoder) -> npt.NDArray[np.float64]:
    """Logits that recognise what they declare."""
    names = [label if label in BACKGROUND else "chair" for label in model.labels]
    return space.of_texts(
        name_vectors(encoder.embed, [PROMPT], names), [np.array([BACKGROUND.index(name)]) for name in names]
    )


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    store = Store(tmp_path_factory.mktemp("classifiers") / "index")
    # As of a model whose logits are all constant: none is indexed.
    small_generators.build(
        store,
        MAKERS,
        models=MODELS,
        describe=describe,
        tamper=lambda batch: batch.at(batch.model != [item.repo for item in MODELS].index("owner/nothing")),
    )
    return store.uri


@pytest.fixture(scope="module")
def index(uri: str) -> Iterator[Index]:
    with open_index(uri) as opened:
        yield opened


def test_what_makes_any_of_it_is_found_and_by_which_logits(index: Index) -> None:
    hits = index.search(kind="generator", like="owner/cats")
    assert hits[0].repo == "gina/cats"
    assert (hits[0].found_by[0].logit, hits[0].found_by[0].label) == (0, "cat")
    assert hits[0].found_by[0].score == pytest.approx(
        index.search(kind="generator", like="owner/cats#cat", k=1)[0].score
    )
    assert all(1 <= len(hit.found_by) <= 5 for hit in hits)
    assert hits[0].confidence is None
    assert not hits.notes
    assert index.search(kind="generator", like="owner/cats-again") == hits
    rows = hits.to_arrow()["found_by"].to_pylist()
    assert rows[0][0]["label"] == "cat"


def test_who_makes_much_of_it_and_little_else_comes_first(index: Index) -> None:
    hits = index.search(kind="generator", like="owner/zoo", k=9)
    assert [hit.repo for hit in hits[:2]] == ["ines/zoo", "two/of-two"]
    makers = {hit.repo: [item.label for item in hit.found_by] for hit in hits}
    assert makers["ines/zoo"] == ["Golden Retriever", "sea_lion"]
    assert makers["two/of-two"][:2] == ["sea_lion", "apple"]
    assert makers["one/of-two"][0] == "sea_lion"


def test_one_logit_and_its_opposite_are_one_concept(index: Index) -> None:
    whole = index.search(kind="generator", like="owner/lamp-or-not", k=9)
    logit = index.search(kind="generator", like="owner/lamp-or-not#0", k=9)
    assert [hit.repo for hit in whole] == [hit.repo for hit in logit]
    assert [hit.score for hit in whole] == pytest.approx([hit.score for hit in logit])
    assert [hit.distance for hit in whole] == pytest.approx([hit.distance for hit in logit])
    assert whole[0].repo == "jack/lamps"


def test_a_classifier_is_one_expert_among_others(index: Index) -> None:
    mixed = index.search("sea_lion", kind="generator", like="owner/cats", where="repo NOT LIKE 'gina%'", k=9)
    scores = [
        {hit.repo: hit.score for hit in index.search(*text, kind="generator", like=like, k=20)}
        for text, like in ((("sea_lion",), None), ((), "owner/cats"))
    ]
    for hit in mixed:
        assert hit.score == pytest.approx(scores[0][hit.repo] + scores[1][hit.repo])
    against = index.search(kind="generator", like="owner/zoo", negative="apple", k=20)
    assert [hit.repo for hit in against].index("two/of-two") > 1
    alone = index.search(kind="generator", like="owner/zoo", where="repo = 'one/of-two'", by="family")
    assert [hit.found_by[0].label for hit in alone] == ["sea_lion"]


def test_of_a_large_head_some_logits_are_asked(index: Index) -> None:
    hits = index.search(kind="generator", like=MANY.repo, k=1)
    assert hits.notes == ["256 of the 600 logits of owner/many are asked, evenly spread over its head"]
    assert hits[0].repo in ("gina/cats", "ines/zoo")
    numbers = [item.logit for item in index.search(kind="generator", like=MANY.repo, k=9)[-1].found_by]
    assert max(numbers) < 600


def test_a_classifier_of_another_index(index: Index, tmp_path: Path) -> None:
    small_index.build(
        Store(tmp_path / "there"), models=[Model("far/away", ("cat", "cup"))], describe=describe
    )
    with open_index(tmp_path / "there") as other:
        hits = index.search(kind="generator", like="far/away", like_index=other)
        assert [hit.repo for hit in hits] == [
            hit.repo for hit in index.search(kind="generator", like="owner/cats")
        ]
        assert hits[0].found_by[0].label == "cat"
        with pytest.raises(QueryError, match="does not hold 'owner/cats'"):
            index.search(kind="generator", like="owner/cats", like_index=other)
        with pytest.raises(QueryError, match="is a generator"):
            other.search(kind="generator", like="gina/cats", like_index=index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"like": "nobody/none"}, "does not hold a generator or a classifier 'nobody/none'$"),
        ({"like": "owner/zoos"}, "a classifier 'owner/zoos'; did you mean .*owner/zoo"),
        ({"like": "gina/cat"}, "a classifier 'gina/cat'; did you mean gina/cats"),
        ({"like": "nul\0"}, "does not hold a generator or a classifier"),
        ({"like": "owner/nothing"}, "none of the logits of 'owner/nothing' is indexed"),
        ({"like": "owner/cats", "min_confidence": 0.5}, "have no confidence"),
        ({"like": "owner/cats", "method": "gaussian"}, "needs the default method"),
    ],
)
def test_what_cannot_be_asked(index: Index, options: dict[str, object], message: str) -> None:
    with pytest.raises(QueryError, match=message):
        index.search(kind="generator", **options)  # type: ignore[call-overload]


def test_in_a_large_index_some_of_its_logits_are_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["cat", "chair", "lamp", "bus", "tree", "apple", "violin", "cup"]
    many = [
        Generator(f"owner/{name}-{n}", (name,), samples=8, pictures=0) for n in range(40) for name in names
    ]
    many.append(Generator("owner/both", ("cat", "lamp"), samples=16, pictures=0))
    monkeypatch.setattr("probelog.publication.generators.EXACT_GENERATORS", 300)
    monkeypatch.setattr(classifiers, "ASKED", 4)
    store = Store(tmp_path / "index")
    small_generators.build(
        store, many, noise=0.3, models=[Model("a/b", ("cat", "lamp")), MANY], describe=describe
    )
    with open_index(store.uri) as opened:
        assert opened._generation.generators.large
        some = opened.search(kind="generator", like="a/b", k=5)
        assert all({item.label for item in hit.found_by} == {"cat", "lamp"} for hit in some)
        monkeypatch.setattr(ranking, "FIRST", 10_000)
        exact = opened.search(kind="generator", like="a/b", k=5)
        assert len({hit.repo for hit in some} & {hit.repo for hit in exact}) >= 4
        assert opened.search(kind="generator", like=MANY.repo, k=1).notes

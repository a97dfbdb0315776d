"""The query client on real indexes: its answers against naive ones, its filters, and what it says to bad input."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import functools
import json
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps
from typer.testing import CliRunner

import probelog
from probelog.cli import app
from probelog.errors import IndexNotFoundError, QueryError, StoreError, UsageError
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer, read_pointer
from probelog.index.schema import connect
from probelog.ranking.confidence import Confidence
from probelog.search.results import Hit
from probelog.storage.layout import POINTER
from probelog.storage.schemas import Parent
from probelog.storage.store import Store
from tests.probelog.encoders.test_decoding import bomb, encoded
from tests.support.worlds import naive, tiny_encoders
from tests.support.worlds.small_index import BACKGROUND, MODELS_OF_ALL_SORTS, PROMPT, Model, SmallIndex, build
from tests.support.worlds.tiny_encoders import photo


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    return build(Store(tmp_path_factory.mktemp("small") / "index"))


@pytest.fixture(scope="module")
def index(small: SmallIndex) -> probelog.Index:
    return probelog.open_index(small.store.uri)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> probelog.Index:
    """An index whose encoder knows a dozen English words and no images."""
    store = Store(tmp_path_factory.mktemp("words") / "index")
    return probelog.open_index(build(store, kind="dual", images=False).store.uri)


# The naive answers: plain loops over what was written.


@functools.cache
def parts(small: SmallIndex) -> tuple[np.ndarray, np.ndarray, float]:
    """Directions of all logits (N, d), as they are stored, those of the background (B, d), and the sharpness."""
    embeddings = small.embeddings.astype(float)
    gallery = np.concatenate(
        [
            naive.model_directions(np.stack([small.z[row] for row, owner in enumerate(small.owners) if owner[0] == number and owner[2] == sign]), model.head, embeddings)
            for number, model in enumerate(small.models)
            for sign in ((1, -1) if model.head == "single" else (1,))
        ]
    )  # fmt: skip
    named = naive.background_directions(embeddings, small.background_vectors.astype(float))
    steps = np.abs(gallery).max(axis=1, keepdims=True) / 127
    assert (np.abs(small.gallery - gallery) <= steps).all()
    return small.gallery.astype(float), named, naive.sharpness(gallery, named)


def numbers(small: SmallIndex, names: Sequence[str]) -> list[int]:
    return [small.background.index(name) for name in names]


def name_direction(small: SmallIndex, text: str, excluded: Sequence[str] = ()) -> np.ndarray:
    """The direction that a name is asked with in the end."""
    return fed_back(small, text_direction(small, text, excluded), excluded)


def fed_back(small: SmallIndex, direction: np.ndarray, excluded: Sequence[str] = ()) -> np.ndarray:
    gallery, named, b = parts(small)
    rows = distinct(small)
    owners = [small.owners[row][0] for row in rows]
    return naive.with_feedback(direction, gallery[rows], owners, named, b, numbers(small, excluded))


def text_direction(small: SmallIndex, text: str, excluded: Sequence[str] = ()) -> np.ndarray:
    vector = small.encoder.embed([PROMPT.replace("{}", text)])[0].astype(float)
    return naive.text_direction(
        vector,
        small.embeddings.astype(float),
        small.background_vectors.astype(float),
        numbers(small, excluded),
    )


def cosine(small: SmallIndex, row: int, direction: np.ndarray) -> float:
    return float(parts(small)[0][row] @ direction)


def score(small: SmallIndex, row: int, direction: np.ndarray, excluded: Sequence[str] = ()) -> float:
    gallery, named, b = parts(small)
    return naive.score(gallery[row], direction, named, b, numbers(small, excluded))


def ranked(small: SmallIndex, direction: np.ndarray, excluded: Sequence[str] = ()) -> list[tuple[int, float]]:
    """(row, score), best first, equal weights folded."""
    scores = [(row, score(small, row, direction, excluded)) for row in range(len(small.z))]
    return folded(small, sorted(scores, key=lambda item: (-item[1], item[0])))


def folded(small: SmallIndex, ranking: list[tuple[int, float]]) -> list[tuple[int, float]]:
    seen = set()
    kept = []
    for row, score in ranking:
        model, logit, sign = small.owners[row]
        key = (small.models[model].digest, logit, sign)
        if key not in seen:
            seen.add(key)
            kept.append((row, score))
    return kept


def distinct(small: SmallIndex) -> list[int]:
    """The rows of the first model of each weights."""
    first = {model.digest: number for number, model in reversed([*enumerate(small.models)])}
    return [
        row for row, (model, _, _) in enumerate(small.owners) if first[small.models[model].digest] == model
    ]


def names(small: SmallIndex, rows: Sequence[tuple[int, float]]) -> list[tuple[str, int, bool]]:
    owners = [small.owners[row] for row, _ in rows]
    return [(small.models[model].repo, logit, sign < 0) for model, logit, sign in owners]


def called(hits: Sequence[Hit]) -> list[tuple[str, int, bool]]:
    return [(hit.repo, hit.logit, hit.negated) for hit in hits]


@pytest.mark.parametrize("text", ["dog", "husky", "a hot dog"])
def test_text_search_equals_the_naive_one(small: SmallIndex, index: probelog.Index, text: str) -> None:
    direction = name_direction(small, text)
    expected = ranked(small, direction)
    found = index.search(text, k=1000)
    assert called(found) == names(small, expected)
    np.testing.assert_allclose([hit.score for hit in found], [score for _, score in expected], atol=1e-4)
    assert [hit.rank for hit in found] == list(range(1, len(expected) + 1))
    assert called(index.search(text, k=3)) == called(found[:3])
    for hit, (row, _) in zip(found, expected, strict=True):
        assert hit.distance == pytest.approx(1 - cosine(small, row, direction), abs=1e-5)
        assert hit.probes == np.argsort(-small.z[row], kind="stable")[:8].tolist()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cat", "cat"),
        ("CAT", "cat"),
        ("golden_retriever", "Golden Retriever"),
        ("  Golden  retriever ", "Golden Retriever"),
        ("Sea-Lion", "sea_lion"),
    ],
)
def test_a_query_is_left_out_of_its_own_background(
    small: SmallIndex, index: probelog.Index, text: str, name: str
) -> None:
    expected = ranked(small, name_direction(small, text.strip(), [name]), [name])
    kept = ranked(small, name_direction(small, text.strip()))
    found = index.search(text, k=1000)
    np.testing.assert_allclose(
        [hit.score for hit in found], [score for _, score in expected], rtol=1e-4, atol=1e-4
    )
    assert called(found) == names(small, expected)
    assert not np.allclose([score for _, score in expected], [score for _, score in kept])


def test_scores_of_many_texts_are_those_of_each(small: SmallIndex, index: probelog.Index) -> None:
    found = index.scores(["dog", "cat"], [[], ["sea lion"]])
    rows = distinct(small)
    assert found.shape == (2, len(rows))
    both = ["cat", "sea_lion"]
    dog, cat = name_direction(small, "dog"), name_direction(small, "cat", both)
    for column, row in enumerate(rows):
        expected = [score(small, row, dog), score(small, row, cat, both)]
        np.testing.assert_allclose(found[:, column], expected, atol=1e-4)


def picture_direction(small: SmallIndex, pictures: Sequence[Image.Image]) -> np.ndarray:
    """Of pictures, each averaged with its mirror image."""
    from probelog.encoders.image import ImageEncoder

    files = tiny_encoders.image_files("siglip")
    encoder = ImageEncoder(files.onnx, files.settings)
    both = encoder.embed(pictures) + encoder.embed([ImageOps.mirror(picture) for picture in pictures])
    vectors = both.astype(float) / np.linalg.norm(both, axis=1, keepdims=True)
    return naive.image_direction(
        vectors, small.embeddings.astype(float), small.background_vectors.astype(float)
    )


def test_many_texts_are_answered_as_each(index: probelog.Index, words: probelog.Index) -> None:
    texts = ["dog", ["cat", "house cat"], "Golden Retrievers", "hot dog", "dog"] * 20
    for arguments in ({}, {"where": "licence = 'mit' AND confidence > 0.5"}, {"by": "model", "k": 3}):
        at_once = index.search_many(texts, **arguments)
        for text, found in zip(texts, at_once, strict=True):
            alone = index.search(text, **arguments)
            assert (called(found), found.notes) == (called(alone), alone.notes)
            for fact in ("score", "confidence", "distance"):
                np.testing.assert_allclose(
                    [getattr(hit, fact) for hit in found], [getattr(hit, fact) for hit in alone], atol=1e-3
                )
    odd = words.search_many(["dog", "", "zebra dog", "허스키", []])
    assert [bool(found) for found in odd] == [True, False, True, False, False]
    assert [found.notes[0].split(":")[0] for found in odd[1:]] == [
        "the query is empty",
        "the text encoder does not know 'zebra'; the answer rests on the other words",
        "this index's text encoder (tiny dual) does not know '허스키'",
        "the query is empty",
    ]
    assert index.search_many([]) == []
    for wrong in ({"texts": "dog"}, {"texts": ["dog"], "k": 0}, {"texts": ["dog"], "where": "x = 1"}):
        with pytest.raises(QueryError):
            index.search_many(**wrong)


async def heartbeats(until: asyncio.Future[Any]) -> int:
    count = 0
    while not until.done():
        await asyncio.sleep(0.001)
        count += 1
    return count


def test_queries_in_threads_do_not_block_an_event_loop(index: probelog.Index) -> None:
    texts = ["dog", "cat", "hot dog", "cup"]

    async def ask() -> tuple[list[probelog.Results], int]:
        asked = asyncio.gather(*(asyncio.to_thread(index.search, text, k=5) for text in texts * 5))
        beats = await heartbeats(asked)
        return await asked, beats

    found, beats = asyncio.run(ask())
    assert found == [index.search(text, k=5) for text in texts] * 5
    assert beats > 3


def test_image_search_equals_the_naive_one(small: SmallIndex, index: probelog.Index, tmp_path: Path) -> None:
    pictures = [photo(32, 32, 1), photo(64, 64, 2)]
    pictures[0].save(tmp_path / "one.png")
    expected = ranked(small, fed_back(small, picture_direction(small, pictures)))
    given = [tmp_path / "one.png", encoded(pictures[1], "PNG")]
    found = index.search(images=given, k=1000)
    np.testing.assert_allclose([hit.score for hit in found], [score for _, score in expected], atol=2e-3)
    assert called(index.search(images=pictures, k=5)) == called(found[:5])
    assert called(index.search(images=[str(tmp_path / "one.png")])) != called(found[:10])


def test_like_is_asked_with_the_logits_own_direction(small: SmallIndex, index: probelog.Index) -> None:
    query = next(i for i, owner in enumerate(small.owners) if owner == (4, 3, 1))
    direction = parts(small)[0][query]
    scores = [(row, score(small, row, direction)) for row in range(len(small.z)) if row != query]
    expected = folded(small, sorted(scores, key=lambda item: (-item[1], item[0])))
    found = index.search(like="emil/things#3", k=1000)
    assert called(found) == names(small, expected)
    np.testing.assert_allclose([hit.score for hit in found], [score for _, score in expected], atol=1e-4)


def test_like_takes_a_logit_of_another_index(
    small: SmallIndex, index: probelog.Index, tmp_path: Path
) -> None:
    there = build(Store(tmp_path / "there"), models=[Model("far/away", ("x", "y", "z"))], seed=7, probes=30)
    other = probelog.open_index(there.store.uri)
    direction = parts(there)[0][1]
    expected = ranked(small, direction)
    found = index.search(like="far/away#y", like_index=other, k=1000)
    assert called(found) == names(small, expected)
    np.testing.assert_allclose([hit.score for hit in found], [score for _, score in expected], atol=1e-4)
    same = index.search(like="emil/things#3", like_index=index)
    assert called(same) == called(index.search(like="emil/things#3"))
    with pytest.raises(QueryError, match="does not hold"):
        index.search(like="emil/things#3", like_index=other)
    with pytest.raises(QueryError, match="name the logit"):
        index.search("dog", like_index=other)
    foreign = build(Store(tmp_path / "foreign"), settings={"encoder_digest": "of another"})
    with pytest.raises(QueryError, match="different encoders"):
        index.search(like="emil/things#3", like_index=probelog.open_index(foreign.store.uri))


def test_a_generation_is_not_opened_again_while_it_is_live(
    index: probelog.Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read of it would be read again, every half minute."""
    monkeypatch.setattr("probelog.search.client.POLL_SECONDS", -1.0)
    first = index._current()
    assert index._current() is first
    assert index._live() is first


def test_several_names_are_one_concept(small: SmallIndex, index: probelog.Index) -> None:
    texts = ["cat", "dog"]
    vectors = small.encoder.embed([PROMPT.replace("{}", text) for text in texts]).astype(float)
    mean = vectors.mean(axis=0)
    direction = naive.text_direction(
        mean / np.linalg.norm(mean), small.embeddings.astype(float), small.background_vectors.astype(float), numbers(small, ["cat"])
    )  # fmt: skip
    expected = ranked(small, fed_back(small, direction, ["cat"]), ["cat"])
    found = index.search(texts, k=1000)
    assert called(found) == names(small, expected)
    assert called(index.search(["dog"])) == called(index.search("dog"))


def test_mixtures_add_directions(small: SmallIndex, index: probelog.Index) -> None:
    picture = photo(32, 32, 5)
    row = next(i for i, owner in enumerate(small.owners) if owner == (4, 3, 1))
    parts_of_it = [text_direction(small, "dog"), picture_direction(small, [picture]), parts(small)[0][row]]
    direction = np.sum(parts_of_it, axis=0)
    scores = [
        (i, score(small, i, direction / np.linalg.norm(direction))) for i in range(len(small.z)) if i != row
    ]
    expected = folded(small, sorted(scores, key=lambda item: (-item[1], item[0])))
    found = index.search("dog", images=[picture], like="emil/things#3", k=1000)
    np.testing.assert_allclose([hit.score for hit in found], [score for _, score in expected], atol=2e-3)


def naive_confidence(
    small: SmallIndex,
    rows: Sequence[int],
    direction: np.ndarray,
    excluded: Sequence[str],
    synonyms: Sequence[str],
) -> list[float]:
    """By the formulas of probelog.ranking.confidence, loop by loop; synonyms are no rivals of the margin."""
    named, everything = parts(small)[1], distinct(small)

    def z(of: np.ndarray, left_out: Sequence[str]) -> np.ndarray:
        column = np.array([score(small, row, of, left_out) for row in range(len(small.z))])
        return (column - column[everything].mean()) / column[everything].std()

    own = z(direction, excluded)
    rivals = [z(named[i], [name]) for i, name in enumerate(BACKGROUND) if name not in synonyms]
    evidence = [
        1.0
        + 0.5 * (own[row] - max(rival[row] for rival in rivals))
        + 0.25 * score(small, row, direction, excluded)
        for row in rows
    ]
    return [1 / (1 + np.exp(-value)) for value in evidence]


@pytest.mark.parametrize(("text", "excluded"), [("dog", []), ("cat", ["cat"])])
def test_confidences_are_the_formulas(
    small: SmallIndex, index: probelog.Index, text: str, excluded: list[str]
) -> None:
    direction = name_direction(small, text, excluded)
    rows = [row for row, _ in ranked(small, direction, excluded)[:6]]
    found = index.search(text, k=6)
    np.testing.assert_allclose(
        [hit.confidence for hit in found],
        naive_confidence(small, rows, direction, excluded, excluded),
        atol=1e-3,
    )


def test_queries_by_picture_exclude_the_nearest_name(small: SmallIndex, index: probelog.Index) -> None:
    direction = fed_back(small, picture_direction(small, [photo(32, 32, 1)]))
    nearest = BACKGROUND[int(np.argmax(parts(small)[1] @ direction))]
    rows = [row for row, _ in ranked(small, direction)[:4]]
    expected = naive_confidence(small, rows, direction, [], [nearest])
    found = [hit.confidence for hit in index.search(images=[photo(32, 32, 1)], k=4)]
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_queries_by_a_logit_have_no_confidence(index: probelog.Index) -> None:
    assert {hit.confidence for hit in index.search(like="emil/things#3")} == {None}
    assert {hit.confidence for hit in index.search("dog", like="emil/things#3")} == {None}


def test_a_low_confidence_is_noted(tmp_path: Path) -> None:
    unsure = Confidence(-6.0, 0.0, 0.0, "declared labels", 100, 50)
    index = probelog.open_index(build(Store(tmp_path), settings={"confidence": unsure.to_dict()}).store.uri)
    found = index.search("dog", k=3)
    assert len(found) == 3
    assert found.notes == [
        "no answer has a confidence above 0%: perhaps nothing in this index recognises this"
    ]
    assert index.search(like="anna/pets#1").notes == []
    assert index.search("dog", where="false").notes == []


def test_negatives_lower_scores(small: SmallIndex, index: probelog.Index) -> None:
    wanted, unwanted = name_direction(small, "dog"), text_direction(small, "cat", ["cat"])
    scores = [
        (row, score(small, row, wanted) - 0.7 * max(0.0, score(small, row, unwanted)))
        for row in range(len(small.z))
    ]
    expected = folded(small, sorted(scores, key=lambda item: (-item[1], item[0])))
    for asked in ("cat", ["cat"]):
        found = index.search("dog", negative=asked, k=1000)
        assert called(found) == names(small, expected)
        np.testing.assert_allclose([hit.score for hit in found], [score for _, score in expected], atol=1e-4)
    with pytest.raises(QueryError, match="query is empty"):
        index.search("dog", negative=" ")
    with pytest.warns(DeprecationWarning, match="negative"):
        assert list(index.search("dog", unwanted="cat", k=1000)) == list(found)


def test_models_that_do_what_one_does(small: SmallIndex, index: probelog.Index) -> None:
    gallery = parts(small)[0]
    of = [
        [row for row, owner in enumerate(small.owners) if owner[0] == number]
        for number in range(len(small.models))
    ]
    expected = {}
    for number, model in enumerate(small.models):
        best = [max(score(small, row, gallery[asked]) for row in of[number]) for asked in of[4]]
        expected.setdefault(model.digest, (float(np.mean(best)), model.repo))
    del expected[small.models[4].digest]
    order = sorted(expected.values(), reverse=True)
    found = index.models_like("emil/things", k=100)
    assert [hit.repo for hit in found] == [repo for _, repo in order]
    np.testing.assert_allclose([hit.score for hit in found], [value for value, _ in order], atol=1e-4)
    assert [hit.rank for hit in found] == list(range(1, len(found) + 1))
    assert {hit.repo: hit.duplicates for hit in found}["anna/pets"] == 2
    assert [hit.repo for hit in index.models_like("emil/things", k=100, where="licence = 'apache-2.0'")] == [
        "dora/hot-dog"
    ]
    assert "anna/pets" not in {hit.repo for hit in index.models_like("bert/pets-copy", k=100)}
    with pytest.raises(QueryError, match="does not hold"):
        index.models_like("nobody/nothing")
    with pytest.raises(QueryError, match="at least 1"):
        index.models_like("emil/things", k=0)


def test_like_takes_numbers_and_labels(index: probelog.Index) -> None:
    by_number = called(index.search(like="anna/pets#2"))
    for name in ("Golden_Retriever", "golden retriever"):
        assert called(index.search(like=f"anna/pets#{name}")) == by_number
    # A label that is a number gives way to the number that results show.
    assert called(index.search(like="emil/things#thing 4")) == called(index.search(like="emil/things#4"))
    assert called(index.search(like="fake/no-labels#LABEL_1")) == called(
        index.search(like="fake/no-labels#1")
    )


def test_like_does_not_answer_with_the_logit_itself_or_its_copies(index: probelog.Index) -> None:
    found = index.search(like="bert/pets-copy#cat", k=1000)
    assert not [hit for hit in found if "pets" in hit.repo and hit.logit == 0]
    assert [hit for hit in found if "pets" in hit.repo and hit.logit == 1]


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ("anna/pet#1", "did you mean anna/pets"),
        ("PETS#1", "did you mean anna/pets"),
        ("zzzz/zzzz#1", "does not hold 'zzzz/zzzz'$"),
        ("anna/pets#17", "no indexed logit '17'; it has 0, 1, 2, 3$"),
        ("anna/pets#poodle", "no indexed logit 'poodle'"),
        ("anna/pets#" + "9" * 5000, "no indexed logit"),
        ("anna/pets#-1", "no indexed logit"),
        ("anna/pets", "REPO#NUMBER"),
        ("anna/pets#", "REPO#NUMBER"),
        ("#3", "REPO#NUMBER"),
        ("", "REPO#NUMBER"),
    ],
)
def test_an_unknown_logit(index: probelog.Index, like: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        index.search(like=like)


def test_equal_weights_are_folded_with_a_count(small: SmallIndex, index: probelog.Index) -> None:
    found = index.search("dog", k=1000)
    pets = [hit for hit in found if "pets" in hit.repo]
    assert len(pets) == 4
    assert {hit.duplicates for hit in pets} == {2}
    assert {hit.repo for hit in pets} == {"anna/pets"}
    assert {hit.duplicates for hit in found if "pets" not in hit.repo} == {0}
    # Only what the filter lets through is counted, and answers.
    some = index.search("dog", k=1000, where="repo LIKE '%copy'")
    assert {(hit.repo, hit.duplicates) for hit in some} == {("bert/pets-copy", 1)}


def test_models_without_a_digest_are_not_folded(tmp_path: Path) -> None:
    twins = [Model("a/a", ("x", "y")), Model("b/b", ("x", "y"))]
    store = Store(tmp_path / "index")
    small = build(store, models=twins)
    import lancedb

    table = lancedb.connect(store.path(f"generations/{small.pointer.generation}")).open_table("models")
    table.update(values_sql={"weight_digest": "NULL"})
    index = probelog.open_index(tmp_path)
    assert len(index.search("dog", k=100)) == 4
    assert index.show("a/a").same_weights == []


def test_the_opposite_of_a_one_logit_head_is_found(small: SmallIndex, index: probelog.Index) -> None:
    both = [hit for hit in index.search("dog", k=1000) if hit.repo == "dora/hot-dog"]
    assert {hit.negated for hit in both} == {True, False}
    assert {hit.logit for hit in both} == {0}
    assert {hit.label for hit in both} == {"hot dog"}


def test_labels_are_what_the_uploader_wrote(small: SmallIndex, index: probelog.Index) -> None:
    hostile = next(model for model in small.models if model.repo == "eve/hostile")
    found = {hit.logit: hit for hit in index.search("dog", k=1000) if hit.repo == "eve/hostile"}
    assert [found[i].label for i in range(len(hostile.labels))] == list(hostile.labels)
    assert found[0].licence == hostile.licence
    unnamed = [hit for hit in index.search("dog", k=1000) if hit.repo == "fake/no-labels"]
    assert {hit.label for hit in unnamed} == {"LABEL_0", "LABEL_1"}


# Filters


@pytest.mark.parametrize(
    ("where", "repos"),
    [
        ("licence = 'apache-2.0'", {"dora/hot-dog"}),
        ("licence IS NULL AND downloads IS NULL", {"carl/pets-copy"}),
        ("downloads > 5000000000", {"emil/things"}),
        ("downloads BETWEEN 1 AND 5 OR repo = 'fake/no-labels'", {"dora/hot-dog", "fake/no-labels"}),
        ("array_has(tags, 'y')", {"dora/hot-dog"}),
        ("array_has(labels, 'thing 3')", {"emil/things"}),
        ("repo LIKE 'anna/%' -- her own", {"anna/pets"}),
        ("licence = 'it''s'", set()),
        ("false", set()),
    ],
)
def test_filters(index: probelog.Index, where: str, repos: set[str]) -> None:
    found = index.search("dog", k=1000, where=where)
    assert {hit.repo for hit in found} == repos
    unfiltered = [hit for hit in index.search("dog", k=1000) if hit.repo in repos]
    if "pets" not in str(repos):
        assert called(found) == called(unfiltered)
        assert [hit.score for hit in found] == [hit.score for hit in unfiltered]


@pytest.mark.parametrize(
    "where",
    [
        "licence =",
        "lisence = 'mit'",
        "downloads",
        "1",
        "licence = 3",
        'licence = "mit"',
        "downloads / 0 > 1",
        "regexp_like(repo, '(')",
        "sleep(10)",
        "id IN (SELECT id FROM models)",
        "1=1; DROP TABLE models",
        # Lance alone would read these up to the mistake and drop the rest.
        "licence = 'mit' ANDD downloads > 5",
        "licence = 'mit' nonsense",
        "downloads > 5 LIMIT 1",
        "(" * 1000 + "true" + ")" * 1000,
        "\x00",
        "\ud800",
        "licence = '\x1b[31m' oops",
    ],
)
def test_filters_that_are_not_understood(index: probelog.Index, where: str) -> None:
    with pytest.raises(QueryError, match="not understood") as caught:
        index.search("dog", where=where)
    assert "repo, sha, library" in str(caught.value)
    assert "licence = 'mit' AND downloads > 100" in str(caught.value)
    assert ".rs:" not in str(caught.value)
    assert caught.value.exit_status == 2
    assert index.search("dog"), "the index still answers"


@pytest.mark.parametrize(
    ("where", "same"),
    [
        ("licence = 'MIT'", "licence = 'mit'"),
        ("'MIT' = licence", "licence = 'mit'"),
        ("License IN ('MIT', 'Apache-2.0')", "licence IN ('mit', 'apache-2.0')"),
        ("license NOT LIKE 'M%' AND Downloads > 0", "licence NOT LIKE 'm%' AND downloads > 0"),
        ("(repo) = 'anna/pets' OR \"repo\" != 'Eve/Hostile'", "repo = 'anna/pets' OR repo != 'eve/hostile'"),
        ("array_has(licenses, 'MIT')", "array_has(licences, 'mit')"),
        ("lower(licence) = 'mit' /* 'MIT' */", "licence = 'mit'"),
        ("created_at IS NULL AND NOT licence = 'MIT' -- x", "licence != 'mit'"),
    ],
)
def test_values_are_compared_without_case(index: probelog.Index, where: str, same: str) -> None:
    assert index.search("dog", k=1000, where=where) == index.search("dog", k=1000, where=same)


@pytest.mark.parametrize(
    ("where", "allowed"),
    [
        ("confidence >= 0.5", lambda hit: hit.confidence >= 0.5),
        ("0.5 > confidence", lambda hit: hit.confidence < 0.5),
        ("score > -1 AND licence = 'mit'", lambda hit: hit.score > -1 and hit.licence == "mit"),
        (
            "downloads BETWEEN 1 AND 9 AND Score <= +1.5 and score > -2",
            lambda hit: hit.downloads in range(1, 10) and -2 < hit.score <= 1.5,
        ),
        (
            "(licence = 'x' OR licence = 'other') AND confidence < .9 AND likes = 0",
            lambda hit: hit.licence == "other" and hit.confidence < 0.9,
        ),
    ],
)
def test_answers_are_filtered_by_score_and_confidence(
    index: probelog.Index, where: str, allowed: Callable[[Hit], bool]
) -> None:
    everything = index.search("dog", k=1000)
    expected = [called([hit])[0] for hit in everything if hit.downloads is not None and allowed(hit)]
    found = index.search("dog", k=1000, where=where)
    assert 0 < len(found) < len(everything)
    assert [
        pair for pair, hit in zip(called(found), found, strict=True) if hit.downloads is not None
    ] == expected
    assert called(index.search("dog", k=2, where=where)) == called(found)[:2]


@pytest.mark.parametrize(
    "where",
    [
        "confidence > 0.5 OR licence = 'mit'",
        "NOT confidence > 0.5",
        "score BETWEEN 1 AND 2",
        "confidence > 'high'",
        "score = 3",
        "(score > 3)",
        "score > likes",
        "score >",
    ],
)
def test_other_conditions_on_answers(index: probelog.Index, where: str) -> None:
    with pytest.raises(
        QueryError, match=r"compared with a number.*combined with the rest of the filter by AND"
    ):
        index.search("dog", where=where)


def test_the_confidence_of_answers_to_a_logit(index: probelog.Index) -> None:
    with pytest.raises(QueryError, match="have no confidence"):
        index.search(like="anna/pets#1", where="confidence > 0.5")
    assert index.search(like="anna/pets#1", where="score > -100")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("lisence = 'mit'", "no column 'lisence': did you mean licence?"),
        ("first_row > 0", "no column 'first_row'\n"),
        ('licence = "mit"', "texts are written in single quotes: 'mit'"),
        ("licence = ", "it is no SQL condition"),
    ],
)
def test_a_filter_error_names_the_mistake_and_nothing_of_the_inside(
    index: probelog.Index, where: str, message: str
) -> None:
    for ask in (lambda: index.search("dog", where=where), lambda: index.models(where)):
        with pytest.raises(QueryError) as caught:
            ask()
        assert message in str(caught.value)
        assert not re.search(r"identity|first_row, |SELECT|weights", str(caught.value))


@pytest.mark.parametrize("where", ["", "  \n"])
def test_an_empty_filter(index: probelog.Index, where: str) -> None:
    with pytest.raises(QueryError, match="filter is empty"):
        index.search("dog", where=where)


# Bad questions


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_an_empty_text(index: probelog.Index, text: str) -> None:
    with pytest.raises(QueryError, match="query is empty"):
        index.search(text)


def test_an_empty_query(index: probelog.Index) -> None:
    for nothing in (None, []):
        with pytest.raises(QueryError, match="the query is empty"):
            index.search(nothing)
    with pytest.raises(QueryError, match="the query is empty"):
        index.search(negative="dog")


@pytest.mark.parametrize("k", [0, -3])
def test_k_is_a_number_of_answers(index: probelog.Index, k: int) -> None:
    with pytest.raises(QueryError, match="k must be at least 1"):
        index.search("dog", k=k)


@pytest.mark.parametrize("text", ["허스키", "시베리안 허스키", "zebra-okapi", "zebra zebra", "🐶"])
def test_words_that_the_encoder_does_not_know(words: probelog.Index, text: str) -> None:
    with pytest.raises(QueryError, match=r"does not know .* try English, or search by image") as caught:
        words.search(text)
    assert "tiny dual" in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("text", ["zebra dog", "dog zebra zebra okapi", "zebra-dog"])
def test_words_of_which_the_encoder_knows_some(words: probelog.Index, text: str) -> None:
    found = words.search(text)
    assert len(found) == 10
    assert len(found.notes) == 1
    assert "'zebra'" in found.notes[0]
    assert "other words" in found.notes[0]


def test_known_words_need_no_note(index: probelog.Index, words: probelog.Index) -> None:
    assert words.search("husky, dog!").notes == []
    assert index.search("a dog").notes == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.png", "none.png: No such file"),
        (lambda folder: folder, "it is a folder: name the files in it"),
        (lambda folder: _file(folder, b"not a picture"), "not an image"),
        (lambda folder: _file(folder, b""), "not an image"),
        (lambda folder: _file(folder, encoded(photo(50, 50), "JPEG")[:300]), "a.png: "),
        (lambda folder: bomb(), "decompression bomb"),
        (lambda folder: b"\x89PNG\r\n\x1a\n", "image number 1"),
        (lambda folder: Image.new("F", (8, 8)), "floating-point"),
    ],
)
def test_images_that_cannot_be_read(index: probelog.Index, tmp_path: Path, make, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        index.search(images=[make(tmp_path)])


def _file(folder: Path, data: bytes) -> Path:
    (folder / "a.png").write_bytes(data)
    return folder / "a.png"


def test_one_image_needs_no_list(index: probelog.Index, tmp_path: Path) -> None:
    picture = photo(40, 30)
    picture.save(tmp_path / "a.png")
    expected = index.search(images=[picture])
    for image in (picture, tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), np.asarray(picture)):  # fmt: skip
        assert index.search(images=image) == expected
    grey = picture.convert("L")
    assert index.search(images=np.asarray(grey)) == index.search(images=[grey])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "a picture, or a list of at least one"),
        (3, "int is no picture"),
        ([None], "NoneType is no picture"),
        (np.zeros((8, 8), np.float32), "array of float32.*255 \\* array"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\).*channels last"),
        (np.zeros((2, 8, 8, 3), np.uint8), "height, width"),
        (np.zeros((0, 8), np.uint8), "no pixels"),
        (np.zeros((1, 8000, 3), np.uint8), "Scale it down or crop it"),
    ],
)
def test_what_is_no_picture(index: probelog.Index, images: object, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        index.search(images=images)


def test_a_query_by_embedding_is_the_pictures_own(index: probelog.Index) -> None:
    pictures = [photo(40, 30), photo(30, 40)]
    embeddings = index.embed_images(pictures)
    assert embeddings.shape == (2, 32)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    assert index.search(embeddings=embeddings) == index.search(images=pictures)
    assert index.search(embeddings=4 * embeddings[0]) == index.search(images=pictures[0])
    assert index.search(images=pictures[0], embeddings=embeddings[1]) == index.search(images=pictures)
    assert index.search("dog", embeddings=embeddings[0].tolist()) == index.search("dog", images=pictures[0])


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (np.zeros(31), r"shape \(31,\).*\(32,\)"),
        (np.zeros((0, 32)), "shape"),
        (np.zeros((1, 1, 32)), "shape"),
        (np.zeros(32), "not zero"),
        (np.full(32, np.nan), "finite"),
        (["a"], "numbers"),
    ],
)
def test_what_is_no_embedding(index: probelog.Index, embeddings: object, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        index.search(embeddings=embeddings)


def test_an_index_without_image_encoder(words: probelog.Index) -> None:
    with pytest.raises(QueryError, match="cannot be searched by image: it cannot be exported"):
        words.search(images=[photo(8, 8)])
    assert words.search("dog")


# Answers as values


def test_results_are_a_sequence(index: probelog.Index) -> None:
    found = index.search("dog", k=4)
    assert isinstance(found, probelog.Results)
    assert len(found) == 4
    assert isinstance(found[0], Hit)
    assert found[-1].rank == 4
    assert [hit.rank for hit in found[1:3]] == [2, 3]
    assert found[0] in found
    assert next(reversed(found)) == found[3]
    assert repr(found) == f"<Results: 4 hits, first {found[0]!r}>"
    hit = found[1]
    numbers = f"score {hit.score:.2f}, confidence {hit.confidence:.0%}"
    assert repr(hit) == f"<Hit 2: {hit.repo}#{hit.logit} {hit.label!r}, {numbers}>"
    assert found == index.search("dog", k=4) == list(found)
    assert found != index.search("dog", k=3)
    assert found != 4
    with pytest.raises(IndexError):
        found[4]


def test_results_as_an_arrow_table(index: probelog.Index) -> None:
    found = index.search("dog", k=1000)
    table = found.to_arrow()
    assert table.to_pylist() == [asdict(hit) for hit in found]
    empty = index.search("dog", where="false")
    assert not empty
    assert empty.to_arrow().num_rows == 0
    assert empty.to_arrow().schema == table.schema
    assert table.schema.names[:3] == ["rank", "repo", "sha"]
    assert set(table.schema.names) >= {
        "rank",
        "repo",
        "sha",
        "logit",
        "label",
        "score",
        "confidence",
        "distance",
        "negated",
        "duplicates",
        "head",
        "library",
        "architecture",
        "licence",
        "downloads",
        "likes",
        "probes",
    }


@pytest.mark.parametrize(("start", "limit"), [(0, 2), (1, 2), (3, None), (2, 100), (4, 1), (0, 0)])
def test_a_page_of_a_models_logits(index: probelog.Index, start: int, limit: int | None) -> None:
    whole = index.show("anna/pets")
    page = index.show("anna/pets", start=start, limit=limit)
    expected = whole.logits[start : None if limit is None else start + limit]
    assert [(item.logit, item.label, item.concepts) for item in page.logits] == [
        (item.logit, item.label, item.concepts) for item in expected
    ]
    assert dataclasses.replace(page, logits=[]) == dataclasses.replace(whole, logits=[])


def test_a_page_begins_and_ends_somewhere(index: probelog.Index) -> None:
    for bad in ({"start": -1}, {"limit": -1}):
        with pytest.raises(QueryError, match="below 0"):
            index.show("anna/pets", **bad)


def test_the_gates_report_on_the_live_generation(small: SmallIndex, tmp_path: Path) -> None:
    store = Store(tmp_path)
    build(store.child("index"), models=[Model("a/a", ("cat",))], images=False)
    index = probelog.open_index(tmp_path)
    assert index.published.startswith("20")
    assert index.quality_report() is None
    store.write_json("quality/first.json", {"generation": "first", "passed": True})
    assert index.quality_report() == {"generation": "first", "passed": True}
    (tmp_path / "quality/first.json").write_bytes(b"{}")
    with pytest.raises(StoreError, match=r"quality.first\.json is damaged"):
        index.quality_report()


def test_show(small: SmallIndex, index: probelog.Index) -> None:
    found = index.show("anna/pets", concepts=3)
    assert (found.repo, found.downloads, found.head) == ("anna/pets", 1200, "softmax")
    assert found.same_weights == ["bert/pets-copy", "carl/pets-copy"]
    assert [item.label for item in found.logits] == ["cat", "dog", "Golden_Retriever", "3"]
    for row, item in enumerate(found.logits):
        named, everything = parts(small)[1], distinct(small)
        own = []
        for i, name in enumerate(BACKGROUND):
            column = np.array([score(small, other, named[i], [name]) for other in everything])
            place = everything.index(row)
            own.append(((column[place] - column.mean()) / column.std(), column[place], name))
        best = sorted(own, reverse=True)[:3]
        assert item.concepts == [name for _, _, name in best]
        np.testing.assert_allclose(item.scores, [value for _, value, _ in best], atol=1e-4)
    assert [item.negated for item in index.show("dora/hot-dog").logits] == [False, True]
    with pytest.raises(QueryError, match="did you mean anna/pets"):
        index.show("Anna/Pets")
    with pytest.raises(QueryError, match="at least 1"):
        index.show("anna/pets", concepts=0)


def test_thumbnails(index: probelog.Index) -> None:
    assert index.thumbnail(3) == b"picture 3"
    for probe in (1, 40, -1):
        with pytest.raises(QueryError, match="no picture"):
            index.thumbnail(probe)


def test_properties_and_settings_of_an_index(small: SmallIndex, index: probelog.Index) -> None:
    assert index.uri == small.store.uri
    assert index.generation == small.pointer.generation
    assert (index.models, index.logits) == (len(small.models), len(small.z))
    assert "8 models" in repr(index)
    index.settings["models"] = 0
    assert index.models == len(small.models)


def test_models_as_a_table(small: SmallIndex, index: probelog.Index) -> None:
    table = index.models()
    assert (len(index), index.models, table.num_rows) == (8, 8, 8)
    assert table["repo"].to_pylist() == [model.repo for model in small.models]
    assert "labels" not in table.column_names
    asked = index.models(where="license = 'MIT'", columns=["repo", "labels"], sort="downloads", limit=1)
    assert asked.to_pylist() == [{"repo": "anna/pets", "labels": ["cat", "dog", "Golden_Retriever", "3"]}]
    by_name = index.models(sort="licence", columns=["licence"])["licence"].to_pylist()
    assert by_name == [*sorted(name for name in by_name if name is not None), None, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": ["repos"]}, "no column 'repos': did you mean repo"),
        ({"columns": ["first_row"]}, "no column 'first_row'"),
        ({"sort": "size"}, "no column 'size'"),
        ({"sort": "tags"}, "tags, which is a list"),
        ({"limit": 0}, "at least 1"),
        ({"where": " "}, "filter is empty"),
    ],
)
def test_models_that_cannot_be_listed(index: probelog.Index, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(QueryError, match=message):
        index.models(**arguments)


@pytest.mark.parametrize(
    ("repo", "held"),
    [("anna/pets", True), ("anna/pet", False), ("\x00", False), ("\ud800", False), (3, False)],
)
def test_an_index_says_whether_it_holds_a_model(index: probelog.Index, repo: object, held: bool) -> None:
    assert (repo in index) is held


def test_a_pickled_index_answers_from_its_generation(tmp_path: Path) -> None:
    store = Store(tmp_path / "index")
    build(store, "first", images=False)
    index = probelog.open_index(store.uri)
    pickled = pickle.dumps(index)
    assert len(pickled) < 2000
    build(store, "second", models=[Model("a/new", ("cat", "dog"))], images=False)
    assert "a/new" in probelog.open_index(store.uri)
    again = pickle.loads(pickled)
    assert (again.generation, len(again)) == ("first", 8)
    assert again.search("dog") == index.search("dog")
    assert pickle.loads(pickle.dumps(index.models)) == 8


def test_a_closed_index_answers_no_more(small: SmallIndex) -> None:
    with probelog.open_index(small.store.uri) as index:
        assert index.search("dog", images=photo(8, 8))
        assert index
        generation = index._generation
        encoders = [generation.text_encoder._process._process, generation.image_encoder._process._process]
        assert not any(process.ended for process in encoders)
    assert all(process.ended for process in encoders)
    index.close()
    for ask in (lambda: index.search("dog"), lambda: "anna/pets" in index, lambda: index.models()):
        with pytest.raises(UsageError, match="is closed: open it again"):
            ask()


def test_answers_in_arrow(index: probelog.Index) -> None:
    like = index.models_like("anna/pets", k=3)
    assert like == list(like)
    assert repr(like) == f"<ModelResults: 3 models, first {like[0]!r}>"
    assert like.to_arrow().to_pylist() == [asdict(hit) for hit in like]
    shown = index.show("dora/hot-dog", concepts=2)
    assert repr(shown) == "<ModelSummary dora/hot-dog: 2 logits>"
    assert shown.to_arrow().select(["repo", "logit", "negated"]).to_pylist() == [
        {"repo": "dora/hot-dog", "logit": 0, "negated": negated} for negated in (False, True)
    ]
    found = index.search("dog")
    assert pa.table(found) == found.to_arrow()
    for answers in (found, like, shown):
        table = answers.to_arrow()
        for frame in (answers.to_pandas(), answers.to_polars()):
            assert (frame.shape, [*frame.columns]) == (
                (table.num_rows, table.num_columns),
                table.column_names,
            )


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_data_frames_without_their_library(
    index: probelog.Index, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"needs {package}: pip install {package}, or use to_arrow"):
        getattr(index.search("dog"), f"to_{package}")()


def test_threads_share_an_index(small: SmallIndex, index: probelog.Index) -> None:
    want = called(index.search("dog"))
    fresh = probelog.open_index(small.store.uri)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: fresh.search("dog", where="downloads >= 0 OR true"), range(40)):
            assert called(found) == want


# Opening


def test_an_index_is_found_below_its_store(small: SmallIndex) -> None:
    below = str(Path(small.store.uri).parent)
    for uri in (below, small.store.uri, Path(below), f"file://{below}", below + "/"):
        assert probelog.open_index(uri).logits == len(small.z)


def test_there_is_no_index(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "store" / "observations").mkdir(parents=True)
    for place in ("none", "file", "store"):
        with pytest.raises(IndexNotFoundError, match=r"no published index at .*publish one first"):
            probelog.open_index(tmp_path / place)
    for uri in ("", "http://example.org/index", "gs://"):
        with pytest.raises(UsageError):
            probelog.open_index(uri)


def test_opening_writes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "index")
    store.write(POINTER, Pointer("x", "s", "p", "f").to_bytes())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match=r"generation x cannot be read.*publish again or roll back"):
        probelog.open_index(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_table_is_a_store_error(tmp_path: Path) -> None:
    small = build(Store(tmp_path / "index"))
    index = probelog.open_index(tmp_path)
    for file in (tmp_path / "index/generations/first/models.lance/data").iterdir():
        file.unlink()
    with pytest.raises(StoreError, match="generation first cannot be read"):
        index.search("dog", where="downloads > 3")
    assert read_pointer(small.store)[0].generation == "first"


# Newer generations


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client takes for the time: one number, to be set."""
    now = [1000.0]
    monkeypatch.setattr("probelog.search.client.time.monotonic", lambda: now[0])
    return now


def test_a_newer_generation_is_looked_for_every_half_minute(tmp_path: Path, clock: list[float]) -> None:
    store = Store(tmp_path / "index")
    first = build(store, "first", images=False)
    index, pinned = probelog.open_index(tmp_path), probelog.Index(store, Generation(store, first.pointer))
    build(store, "second", MODELS_OF_ALL_SORTS[:3], images=False)
    for moment, name in ((1000.0, "first"), (1029.9, "first"), (1030.1, "second")):
        clock[0] = moment
        assert len({hit.repo for hit in index.search("dog", k=100)} & {"emil/things"}) == (name == "first")
        assert index.generation == name
    build(store, "third", images=False)
    clock[0] = 1060.0
    assert index.show("anna/pets").repo == "anna/pets"
    assert index.generation == "second", "it was looked for less than half a minute ago"
    pointer = store.read("current.json")
    store.delete("current.json")
    clock[0] = 1060.2
    assert index.search("dog")
    assert index.generation == "second", "a pointer that cannot be read takes nothing away"
    store.write("current.json", pointer)
    assert index.search("dog")
    assert index.generation == "second"
    clock[0] = 1090.3
    assert index.search("dog")
    assert (index.generation, index.models) == ("third", 8)
    assert pinned.search("dog")
    assert (pinned.generation, pinned.models) == ("first", 8)


def test_what_was_swept_meanwhile_is_answered_by_the_next_one(tmp_path: Path, clock: list[float]) -> None:
    store = Store(tmp_path / "index")
    build(store, "first", images=False)
    index, pinned = (
        probelog.open_index(tmp_path),
        probelog.Index(store, Generation(store, read_pointer(store)[0])),
    )
    build(store, "second", images=False)
    store.delete_folder("generations/first")
    assert index.search("dog", where="downloads > 3")
    assert index.generation == "second"
    with pytest.raises(StoreError, match="generation first cannot be read"):
        pinned.search("dog", where="downloads > 3")


def test_a_generation_that_is_swept_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "index")
    gone = build(store, "first", images=False).pointer
    build(store, "second", images=False)
    store.delete_folder("generations/first")
    pointers = [gone]

    def read(store: Store) -> tuple[Pointer, str]:
        return (pointers.pop(), "") if pointers else read_pointer(store)

    monkeypatch.setattr("probelog.search.client.read_pointer", read)
    assert probelog.open_index(tmp_path).generation == "second"
    assert pointers == []


def test_of_a_head_with_many_logits_the_first_are_named(tmp_path: Path) -> None:
    models = [
        Model("a/21", tuple(f"x{i}" for i in range(21))),
        Model("a/20", tuple(f"x{i}" for i in range(20))),
    ]
    index = probelog.open_index(build(Store(tmp_path), models=models, images=False).store.uri)
    for repo, end in (("a/21", "18, 19, ..."), ("a/20", "18, 19")):
        with pytest.raises(QueryError, match=f"it has 0, 1, .*, {end}$"):
            index.search(like=f"{repo}#y")


def test_time_of_creation_and_parents(tmp_path: Path) -> None:
    made = dt.datetime(2024, 5, 6, 7, 8, 9, tzinfo=dt.UTC)
    parents = (Parent("google/vit", "finetune", "card"), Parent("x\x1b[2J/y", "unknown", "config"))
    models = (
        Model("ada/child", ("cat", "dog"), created_at=made, parents=parents, tags=("pets",)),
        Model("bea/old", ("cat", "dog"), created_at=made.replace(year=2020)),
        Model("cleo/unknown", ("cat", "dog")),
    )
    index = probelog.open_index(build(Store(tmp_path), models=models).store.uri)
    found = index.search("cat", where="created_at > timestamp '2023-01-01 00:00:00'")
    assert {hit.repo for hit in found} == {"ada/child"}
    assert (found[0].created_at, found[0].parents, found[0].tags) == (made, list(parents), ["pets"])
    assert found.to_arrow().to_pylist()[0]["parents"][0] == dataclasses.asdict(parents[0])
    (other,) = index.models_like("bea/old", where="repo = 'ada/child'")
    assert (other.created_at, other.parents) == (made, list(parents))
    summary = index.show("ada/child")
    assert (summary.created_at, summary.parents) == (made, list(parents))
    assert (index.show("cleo/unknown").created_at, index.show("cleo/unknown").parents) == (None, [])
    shown = CliRunner().invoke(app, ["show", "ada/child", "--index", str(tmp_path)])
    assert "created 2024-05-06" in shown.stdout
    assert "declared parents: google/vit (finetune)" in shown.stdout
    assert "\x1b" not in shown.stdout
    shown = CliRunner().invoke(app, ["show", "ada/child", "--index", str(tmp_path), "--json"])
    assert json.loads(shown.stdout)["created_at"] == "2024-05-06T07:08:09+00:00"
    assert json.loads(shown.stdout)["parents"][0] == {
        "repo": "google/vit",
        "relation": "finetune",
        "source": "card",
    }


def test_an_index_of_before_a_fact_was_added_is_read_without_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "index")
    build(store)
    table = connect(store, "first").open_table("models")
    table.drop_columns(["licences", "created_at"])
    index = probelog.open_index(tmp_path)
    hits = list(index.search("dog", k=100))
    assert len(hits) > 5
    assert all((hit.licences, hit.created_at) == ([], None) for hit in hits)
    assert {hit.licence for hit in hits} > {"mit", "apache-2.0"}
    assert index.show("anna/pets").licences == []
    assert list(index.models_like("anna/pets"))
    with pytest.raises(QueryError, match="SQL condition over"):
        index.search("dog", where="array_has(licences, 'mit')")
    table.drop_columns(["labels"])  # no fact of the listing: the table is damaged
    with pytest.raises(StoreError, match="cannot be read"):
        probelog.open_index(tmp_path).show("anna/pets")

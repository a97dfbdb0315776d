"""Queries for generators: by name, pictures, sketches and models; filters, confidence, and what is refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import lancedb
import numpy as np
import pytest
from PIL import Image, ImageDraw

from probelog.errors import QueryError, StoreError
from probelog.ranking.samples.methods import METHODS
from probelog.search.client import Index, open_index
from probelog.search.generators import ranking
from probelog.storage.encoding import npy
from probelog.storage.store import Store
from tests.support.worlds import small_generators, small_index
from tests.support.worlds.small_generators import (
    EDGES_OF_ALL_SORTS,
    GENERATORS_OF_ALL_SORTS,
    Generator,
    SmallGenerators,
    picture,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallGenerators:
    store = Store(tmp_path_factory.mktemp("generators") / "index")
    return small_generators.build(store, edges=EDGES_OF_ALL_SORTS)


@pytest.fixture(scope="module")
def index(world: SmallGenerators) -> Iterator[Index]:
    with open_index(world.index.store.uri) as opened:
        yield opened


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("violin", "hugo/violins"),
        ("cat", "gina/cats"),
        ("lamp", "jack/lamps"),
        ("umbrella", "kim/lora-umbrella"),
    ],
)
def test_a_name_is_answered_by_what_makes_it(index: Index, name: str, repo: str) -> None:
    results = index.search(name, kind="generator", k=3)
    assert results[0].repo == repo
    assert [hit.rank for hit in results] == [1, 2, 3]
    assert results[0].score > results[1].score
    assert results[0].confidence is not None
    assert 0 < results[0].confidence <= 1
    assert results[0].distance < results[1].distance


def test_hits_have_facts_and_pictures(index: Index) -> None:
    hit = index.search("cat", kind="generator", k=1)[0]
    assert (hit.pipeline, hit.image_size, hit.samples, hit.steps, hit.duplicates) == (
        "DDPMPipeline",
        32,
        24,
        25,
        1,
    )
    assert hit.url.endswith(f"gina/cats/tree/{hit.sha}")
    assert hit.pictures == 4
    assert hit.thumbnails == [picture("gina/cats", i) for i in range(4)]
    adapter = index.search("umbrella", kind="generator", k=1)[0]
    assert adapter.base_repo == "gina/cats"
    assert adapter.strength is not None
    assert json.loads(json.dumps(asdict(adapter)))["trigger_words"] == ["umbr", "\x1b[31mred"]
    assert "gina/cats" in repr(hit)
    table = index.search("cat", kind="generator").to_arrow()
    assert table["repo"][0].as_py() == "gina/cats"
    assert table.num_rows == len(GENERATORS_OF_ALL_SORTS) - 1


def test_pictures_sketches_and_mixtures(index: Index, world: SmallGenerators) -> None:
    violin = world.pictures_of("violin")
    shown = index.search(kind="generator", embeddings=violin, k=1)
    assert shown[0].repo == "hugo/violins"
    moved = violin + small_generators.SKETCHED
    drawn = index.search(kind="generator", sketch_embeddings=moved / np.linalg.norm(moved), k=1)
    assert drawn[0].repo == "hugo/violins"
    assert not drawn.notes
    both = index.search("sea_lion", kind="generator", embeddings=world.pictures_of("Golden Retriever"), k=1)
    assert both[0].repo == "ines/zoo"


def test_pictures_are_embedded_by_the_index(index: Index) -> None:
    image = Image.new("RGB", (40, 40), "white")
    ImageDraw.Draw(image).line((5, 5, 35, 30), fill="black", width=2)
    embedded = index.embed_sketch(image)
    assert embedded.shape[0] == 1
    by_picture = index.search(kind="generator", sketch=image)
    by_vector = index.search(kind="generator", sketch_embeddings=embedded)
    assert [hit.repo for hit in by_picture] == [hit.repo for hit in by_vector]
    assert index.search(sketch=image, k=2) == index.search(sketch_embeddings=embedded, k=2)
    assert len(index.search(images=image, sketch=image, k=2)) == 2


def test_models_as_queries(index: Index, world: SmallGenerators) -> None:
    likes = index.search(kind="generator", like="hugo/violins", k=9)
    assert "hugo/violins" not in [hit.repo for hit in likes]
    assert likes[0].confidence is None
    copies = index.search(kind="generator", like="gina/cats", k=9)
    assert "gina/cats-copy" not in [hit.repo for hit in copies]
    makers = index.search(kind="generator", like="anna/pets#cat", k=2)
    assert len(makers) == 2
    recognisers = index.search(like="gina/cats", k=3)
    assert recognisers[0].confidence is None
    # The same as a query by the direction of its mean.
    generation = index._generation
    direction = small_generators.mean_direction(world, "gina/cats", generation.space.centre)
    scores = generation.all_logits.coordinates @ generation.basis.coordinates(direction)
    assert recognisers[0].distance == pytest.approx(1 - scores[np.argmax(scores)], abs=0.2)


def test_negatives_lower_what_makes_them(index: Index) -> None:
    plain = index.search("sea_lion", kind="generator", k=9)
    against = index.search("sea_lion", kind="generator", negative="Golden Retriever", k=9)
    scores = [next(hit.score for hit in hits if hit.repo == "ines/zoo") for hits in (plain, against)]
    assert scores[1] < scores[0]


def test_filters_bounds_and_order(index: Index) -> None:
    where = "licence = 'MIT' AND downloads > 100"
    assert [hit.repo for hit in index.search("cat", kind="generator", where=where)] == ["hugo/violins"]
    copy = index.search("cat", kind="generator", where="licence = 'apache-2.0'")
    assert [(hit.repo, hit.duplicates) for hit in copy] == [("gina/cats-copy", 0)]
    assert not index.search("cat", kind="generator", where="image_size > 500")
    every = index.search("cat", kind="generator", k=9)
    least = every[1].confidence
    assert least is not None
    sure = index.search("cat", kind="generator", min_confidence=least, sort="confidence")
    assert sure[0].confidence == max(hit.confidence or 0 for hit in every)
    assert all(hit.confidence is not None and hit.confidence >= least for hit in sure)
    assert len(index.search("cat", kind="generator", where=f"score > {every[0].score - 1e-6}")) == 1


def test_answers_are_folded_by_family(index: Index) -> None:
    folded = index.search("umbrella", kind="generator", by="family", k=9)
    assert folded[0].repo == "kim/lora-umbrella"
    assert (folded[0].root, folded[0].parent, folded[0].depth) == ("gina/cats", "gina/cats", 1)
    # Its base alone: gina/cats-copy is the root of a tree of its own, and shares the base's samples.
    assert folded[0].relatives == 1
    assert "gina/cats" not in [hit.repo for hit in folded]
    assert len(folded) == len(GENERATORS_OF_ALL_SORTS) - 2
    assert len(index.search("umbrella", kind="generator", by="family", k=2)) == 2
    alone = index.search("umbrella", kind="generator", by="family", where="pipeline = 'lora'")
    assert [hit.relatives for hit in alone] == [0]


def test_many_names_are_answered_as_one_by_one(index: Index) -> None:
    names = ["violin", "", ["cat", "lamp"]]
    many = index.search_many(names, kind="generator", k=3, where="image_size = 32")
    assert [hit.repo for hit in many[0]] == [
        hit.repo for hit in index.search("violin", kind="generator", k=3)
    ]
    assert not many[1]
    assert "the query is empty" in many[1].notes[0]
    assert [hit.score for hit in many[2]] == pytest.approx(
        [hit.score for hit in index.search(["cat", "lamp"], kind="generator", k=3)]
    )
    assert not index.search_many([""], kind="generator")[0]
    with pytest.raises(QueryError, match="a kind is classifier or generator"):
        index.search_many(["cat"], kind="painter")  # type: ignore[call-overload]


def test_generators_have_trees_and_licences(index: Index) -> None:
    tree = index.tree("kim/lora-umbrella")
    assert [edge.parent for edge in tree.ancestors] == ["anna/pets", "gina/cats"]
    assert tree.ancestors[1].evidence == {"was run on it": 1.0}
    assert not tree.notes
    assert index.tree("hugo/violins").root == "hugo/violins"
    with pytest.raises(QueryError, match="does not hold 'nobody/nothing'"):
        index.tree("nobody/nothing")
    found = index.licence_conflicts(["undeclared"])
    assert [(item.child, item.parent_licence) for item in found] == [("gina/cats", "mit")]
    assert index.licence_conflicts(["undeclared"], repo="gina/cats")[0].child == "gina/cats"
    assert not index.licence_conflicts(["undeclared"], repo="kim/lora-umbrella")


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_answer_too(index: Index, world: SmallGenerators, method: str) -> None:
    results = index.search(kind="generator", embeddings=world.pictures_of("violin"), method=method, k=2)
    assert len(results) == 2
    assert results[0].confidence is None
    assert results[0].repo == "hugo/violins" or method in ("first-second-moment", "gaussian")


def test_nothing_here_makes_this(tmp_path: Path) -> None:
    words = ["cat", "chair", "lamp", "bus", "tree", "apple", "violin", "cup"]
    others = [f"{first} {second}" for first in words for second in words if first != second]
    makers = [Generator("a/cats", ("cat chair",)), Generator("b/chairs", ("bus lamp",))]
    world = small_generators.build(Store(tmp_path / "index"), makers, names=others)
    with open_index(tmp_path / "index") as opened:
        absent = opened.search("violin cup", kind="generator")
        assert absent.notes[0].startswith("no answer has a confidence above")
        assert not opened.search("cat chair", kind="generator", k=1).notes
        assert not opened.search(kind="generator", embeddings=world.pictures_of("cat chair"), k=1).notes


def test_the_table_of_generators(index: Index) -> None:
    assert index.generators == len(GENERATORS_OF_ALL_SORTS)
    table = index.generators(where="conditioning = 'text'", columns=["repo", "pipeline"])
    assert table.to_pylist() == [{"repo": "kim/lora-umbrella", "pipeline": "lora"}]
    sorted_by = index.generators(sort="downloads", limit=1)
    assert sorted_by["repo"].to_pylist() == ["hugo/violins"]
    assert "prompts" not in sorted_by.column_names
    with pytest.raises(QueryError, match="did you mean licence"):
        index.generators(columns=["licens"])


def test_what_a_generator_says(index: Index) -> None:
    summary = index.show_generator("ines/zoo")
    assert {"sea_lion", "Golden Retriever"} == {*summary.concepts[:2]}
    assert summary.scores == sorted(summary.scores, reverse=True)
    assert index.show_generator("gina/cats").same_samples == ["gina/cats-copy"]
    assert summary.to_arrow().num_rows == 1
    assert index.generator_samples("hugo/violins")[1] == picture("hugo/violins", 1)
    assert index.generator_samples("jack/lamps") == []
    with pytest.raises(
        QueryError, match="does not hold a generator 'hugo/violin'; did you mean hugo/violins"
    ):
        index.show_generator("hugo/violin")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "colour"}, "can be folded by model or by family"),
        ({"like_index": object()}, "says which index holds a logit"),
        ({"method": "magic"}, "there is no method 'magic'"),
        ({"method": "gaussian", "negative": "cat"}, "negatives need the default method"),
        ({"method": "gaussian", "like": "hugo/violins"}, "needs the default method"),
        ({"like": "hugo/violins", "min_confidence": 0.5}, "have no confidence"),
        ({"like": "nobody/nothing"}, "does not hold a generator"),
        ({"like": "anna/pets#no such label"}, "no indexed logit"),
        ({"where": "head = 'softmax'"}, "the filter is not understood"),
        ({"where": "row = 3"}, "there is no column 'row'"),
        ({"k": 0}, "k must be at least 1"),
        ({"embeddings": [1.0, 2.0]}, "embeddings have the shape"),
    ],
)
def test_what_cannot_be_asked(index: Index, options: dict[str, object], message: str) -> None:
    with pytest.raises(QueryError, match=message):
        index.search("violin", kind="generator", **options)  # type: ignore[call-overload]


def test_empty_queries_and_unknown_kinds_are_refused(index: Index) -> None:
    with pytest.raises(QueryError, match="the query is empty"):
        index.search(kind="generator")
    with pytest.raises(QueryError, match="a kind is classifier or generator"):
        index.search("cat", kind="painter")  # type: ignore[call-overload]
    with pytest.raises(QueryError, match="only generators"):
        index.search("cat", method="gaussian")


def test_an_index_without_generators(tmp_path: Path) -> None:
    small_index.build(Store(tmp_path / "index"))
    with open_index(tmp_path / "index") as opened:
        assert opened.generators == 0
        assert opened.generators(columns=["repo", "licence"]).num_rows == 0
        with pytest.raises(QueryError, match="this index holds no generators"):
            opened.search("cat", kind="generator")
        with pytest.raises(QueryError, match="names no logit"):
            opened.search(like="anna/pets")


@pytest.mark.parametrize("older", [False, True])
def test_a_large_index_answers_by_a_shortlist_as_a_small_one_does(
    world: SmallGenerators, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    names = ["cat", "chair", "lamp", "bus", "tree", "apple", "violin", "cup"]
    many = [
        Generator(f"owner/{name}-{n}", (name,), samples=8, pictures=0) for n in range(80) for name in names
    ]
    # Near none of what it makes by the mean of its samples.
    many.append(Generator("owner/all", tuple(names), samples=64, pictures=0))
    monkeypatch.setattr("probelog.publication.generators.EXACT_GENERATORS", 500)
    monkeypatch.setattr(ranking, "_LISTED", 20)
    store = Store(tmp_path / "index")
    made = small_generators.build(store, many, noise=0.4, older=older)
    with open_index(store.uri) as opened:
        generators = opened._generation.generators
        assert generators.large
        # LanceDB answers a search by another distance than the vector index was built for, too, by looking at every row.
        (found,) = generators._tables.open("groups").list_indices()
        stated = generators._tables.open("groups").index_stats(found.name)
        assert stated is not None
        assert (stated.distance_type, generators.settings.euclidean, generators.settings.by_row) == (
            ("dot", None, None) if older else ("l2", True, True)
        )
        groups = generators._tables.open("groups").search().with_row_id(True).select(["_rowid", "row"])
        told = groups.limit(generators.settings.groups).to_arrow()
        ids = told["_rowid"].to_numpy().astype(np.int64)
        first = generators._first_groups
        assert older or np.array_equal(np.searchsorted(first, ids, "right") - 1, told["row"].to_numpy())
        some = opened.search("lamp", kind="generator", k=5)
        monkeypatch.setattr(ranking, "FIRST", 10_000)
        exact = opened.search("lamp", kind="generator", k=5)
        assert len({hit.repo for hit in some} & {hit.repo for hit in exact}) >= 4
        assert all("lamp" in hit.repo for hit in exact)
        monkeypatch.setattr(ranking, "FIRST", 100)
        # A filter that few pass is answered exactly; one that many pass, from the shortlist.
        assert some[0].duplicates == 0
        several = opened.search(
            "violin", kind="generator", where="repo LIKE '%all%' OR repo LIKE '%-1%'", k=90
        )
        assert "owner/all" in [hit.repo for hit in several]
        few = opened.search("lamp", kind="generator", where="repo LIKE 'owner/cup-1%'", k=50)
        assert len(few) == 11
        most = opened.search("lamp", kind="generator", where="repo LIKE 'owner/%-7%'", k=80)
        assert len(most) == 80
    if older:
        return
    folder = tmp_path / "index" / "generations" / made.index.pointer.generation
    table = lancedb.connect(str(folder)).open_table("meta")
    for key, values, message in (
        (
            "row_generators.npy",
            np.full(generators.settings.rows, 10**6),
            "a generator that the index does not",
        ),
        ("row_generators.npy", np.arange(3), "numbers of shape"),
        ("row_groups.npy", np.full(generators.settings.rows, 10**6), "a number that the index does not have"),
    ):
        sound = generators._tables.meta(key)
        assert sound is not None
        for value, damaged in ((npy(values), True), (sound, False)):
            table.update(where=f"key = '{key}'", values={"value": value})
            with (
                open_index(store.uri) as opened,
                pytest.raises(StoreError, match=message) if damaged else contextlib.nullcontext(),
            ):
                opened.search("lamp", kind="generator", k=5)

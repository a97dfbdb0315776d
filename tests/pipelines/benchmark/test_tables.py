"""The benchmark's own rules: which declared labels mean what, and how a background is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.benchmark.cells import with_background
from pipelines.benchmark.questions import SINGLE, LogitName, Truth, agreement, from_labels, from_truth
from pipelines.labels.labels import Lexicon, imagenet_synonyms, names_in, read_hierarchy
from probelog.errors import UsageError
from probelog.evaluation.gallery import Concepts


def logits(*labels: str) -> list[LogitName]:
    return [LogitName("a/b", i, False, label) for i, label in enumerate(labels)]


# Names


@pytest.mark.parametrize(
    ("label", "names"),
    [
        ("Egyptian cat", ["egyptian cat"]),
        ("egyptian_cats", ["egyptian cat"]),
        ("EgyptianCat", ["egyptian cat"]),
        ("n02124075 Egyptian cat", ["egyptian cat"]),
        ("285: Egyptian cat", ["egyptian cat"]),
        ("001.Black_footed_Albatross", ["black footed albatross"]),
        ("tench, Tinca tinca", ["tench", "tinca tinca"]),
        ("crane (bird)", ["crane"]),
        ("CAFÉ", ["cafe"]),
        ("jack-o'-lantern", ["jack o lantern"]),
        ("butterflies", ["butterfly"]),
        ("wine glasses", ["wine glass"]),
        ("bus", ["bus"]),
        ("grey doughnuts", ["gray donut"]),
    ],
)
def test_spellings_become_one(label: str, names: list[str]) -> None:
    assert names_in(label) == names


@pytest.mark.parametrize(
    "label",
    ["", "  ", "LABEL_0", "label 12", "class-3", "7", "3.5", "n02124075", "true", "not_none" * 20, "-", "other", "dog\x1b[2J", "a\nb", "cat\u202e", "unknown class 3"],
)  # fmt: skip
def test_what_names_nothing(label: str) -> None:
    assert names_in(label) == []


@given(st.text(max_size=80))
def test_any_label_is_read_and_names_are_stable(label: str) -> None:
    for name in names_in(label):
        assert name
        assert len(name) <= 240


def test_the_label_rule() -> None:
    lexicon = Lexicon({"siamese": ["cat"], "cat": ["animal"]}, [["tabby", "tabby cat"], ["cougar", "puma"]])

    def matches(one: str, other: str) -> bool:
        found = lexicon.meaning(names_in(one)).matches(lexicon.meaning(names_in(other)))
        assert found == lexicon.meaning(names_in(other)).matches(lexicon.meaning(names_in(one)))
        return found

    assert matches("Egyptian_cats", "egyptian cat")
    assert matches("puma", "Cougar")
    assert matches("egyptian cat", "cat")
    assert matches("siamese", "animal"), "two steps up in the file"
    assert matches("egyptian cat", "animal"), "the head noun, then the file"
    assert matches("bottle of wine", "bottle")
    assert not matches("egyptian cat", "persian cat"), "siblings"
    assert not matches("siamese", "egyptian cat"), "siblings"
    assert not matches("cat", "cattle")
    assert not matches("cup of coffee", "coffee")


def test_imagenet_knows_synonyms() -> None:
    lexicon = Lexicon(synonyms=imagenet_synonyms())
    assert lexicon.meaning(["bullfrog"]).matches(lexicon.meaning(["rana catesbeiana"]))


def test_a_hierarchy_is_read(tmp_path: Path) -> None:
    file = tmp_path / "hierarchy.tsv"
    file.write_text("# who is what\nHuskies\tdog\n\nhusky\tsled animals\ndog\tdogs\n")
    assert read_hierarchy(file) == {"husky": {"dog", "sled animal"}, "dog": {"dog"}}
    assert Lexicon(read_hierarchy(file)).meaning(["husky"]).wider == {"dog", "sled animal", "animal"}
    for content in ("husky dog\n", "husky\t\n", "\tdog\n", "7\tdog\n", ""):
        file.write_text(content)
        with pytest.raises(UsageError, match="hierarchy"):
            read_hierarchy(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_hierarchy(tmp_path / "no.tsv")


# Questions


def test_declared_labels_ask_and_answer() -> None:
    gallery = [
        *logits("cat", "LABEL_1", "Egyptian cat", "persian_cat", "dog"),
        LogitName("a/c", 0, True, "dog"),
    ]
    found = from_labels(gallery, Lexicon())
    assert found.names == ["cat", "egyptian cat", "persian cat", "dog"]
    assert found.single.tolist() == [False, True, True, True]
    assert found.relevant.tolist() == [
        [True, False, True, True, False, False],
        [True, False, True, False, False, False],
        [True, False, False, True, False, False],
        [False, False, False, False, True, False],
    ]
    with pytest.raises(UsageError, match="--truth"):
        from_labels(logits("LABEL_0", "1"), Lexicon())


def test_labels_are_measured_against_the_truth() -> None:
    truth = Truth(
        synonyms=[["cougar", "puma"], ["dog"], ["beagle"]],
        concepts={"cougar": {0}, "dog": {1}},
        logits={"a/b": [{0}, {0}, {1}]},
        kinds={"a/b": ""},
    )
    gallery = logits("puma", "LABEL_1", "cougar")
    found = {item.part: item for item in agreement(from_truth(truth, gallery), gallery, Lexicon())}
    assert (found[SINGLE].declared, found[SINGLE].true, found[SINGLE].both) == (2, 3, 1)


def test_a_background_is_cut_with_its_exclusions() -> None:
    background = np.arange(40, dtype=np.float32).reshape(20, 2)
    concepts = Concepts(np.ones((2, 2)), background, [np.array([3, 7]), np.array([], np.int64)])
    small, large = with_background(concepts, 5, seed=1), with_background(concepts, 12, seed=1)
    assert {*map(tuple, small.background)} < {*map(tuple, large.background)}
    for cut in (small, large):
        left_out = {tuple(cut.background[number]) for number in cut.excluded[0]}
        assert left_out == {tuple(background[n]) for n in (3, 7)} & {*map(tuple, cut.background)}
        assert len(cut.excluded[1]) == 0
    assert not np.array_equal(small.background, with_background(concepts, 5, seed=2).background)
    np.testing.assert_array_equal(with_background(concepts, 20, seed=1).background, background)

"""The zoo's parts that need no training: sources of labelled images, the plan, the split, the truth file."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.evaluate import Truth
from pipelines.zoo import lessons
from pipelines.zoo.build import ARCHITECTURES as DEFAULT_ARCHITECTURES
from pipelines.zoo.build import Request, build_zoo, truth
from pipelines.zoo.images import read_images, split_names
from pipelines.zoo.plan import Spec, last_word_groups, plan, read_groups
from probelog.errors import UsageError
from probelog.models.loading import load_classifier
from tests.support.worlds.shapes import CLASSES, encoded, write_folder

ANIMALS = [
    ["tabby", "tabby cat"], ["Egyptian cat"], ["beagle"], ["goldfish", "Carassius auratus"], ["snail"], ["brown bear"],
    ["black bear"], ["school bus"], ["trolleybus"], ["lemon"], ["banana"], ["teapot"],
]  # fmt: skip
GROUPS = last_word_groups(ANIMALS)
ARCHITECTURES = ("test_resnet", "test_efficientnet", "resnet")


def planned(count: int = 40, seed: int = 0) -> list[Spec]:
    return plan(ANIMALS, GROUPS, ARCHITECTURES, count, seed)


def parquet(
    file: Path, labels: pa.Array | None, column: str = "label", names: list[str] | None = None
) -> Path:
    rng = np.random.default_rng(1)
    count = 12 if labels is None else len(labels)
    rows = [{"bytes": encoded(i % 6, rng), "path": None} for i in range(count)]
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"image": image} if labels is None else {"image": image, column: labels})
    if names is not None:
        features = {column: {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file)
    return file


# Images


def test_a_folder_per_class(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "images", 3)
    images = read_images(str(source), 16)
    assert [names[0] for names in images.names] == sorted(CLASSES)
    assert images.pixels.shape == (18, 16, 16, 3)
    assert images.pixels.dtype == np.uint8
    assert np.bincount(images.labels).tolist() == [3] * 6
    assert not images.left_out


def test_broken_images_are_counted_and_the_rest_is_used(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "images", 3)
    whole = (source / "red_disc" / "0.png").read_bytes()
    (source / "red_disc" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (source / "red_disc" / "notes.txt").write_text("not an image")
    (source / "red_disc" / "again.png").write_bytes(whole)
    (source / "beside.png").write_bytes(encoded(1, np.random.default_rng(9)))
    images = read_images(str(source), 16)
    assert len(images.labels) == 18
    assert images.left_out == {"unreadable": 1, "not-an-image": 1, "duplicate": 1, "no-label": 1}
    assert any("red_disc/cut.png: unreadable" in example for example in images.examples)


def test_the_files_of_chosen_images_come_back_as_they_are(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "images", 4)
    (source / "blue_disc" / "0.png").write_text("broken")
    images = read_images(str(source), 16)
    chosen = [7, 2, 20]
    files = {path.read_bytes() for path in source.rglob("*.png")}
    found = images.encoded(chosen)
    assert set(found) < files
    from probelog.encoders.decoding import decode

    for i, data in zip(chosen, found, strict=True):
        halved = np.asarray(decode(data).resize((16, 16), 3), float)
        assert np.abs(halved - images.pixels[i]).mean() < 3


def test_class_labels_of_the_hub_name_the_numbers(tmp_path: Path) -> None:
    names = ["tench, Tinca tinca", "goldfish", "shark"]
    file = parquet(tmp_path / "a.parquet", pa.array([2, 0, 1, -1, None, 0], pa.int64()), names=names)
    images = read_images(str(file), 16)
    assert images.names == [["tench", "Tinca tinca"], ["goldfish"], ["shark"]]
    assert images.labels.tolist() == [2, 0, 1, 0]
    assert images.left_out == {"no-label": 2}
    assert len(images.encoded([3])) == 1


def test_numbers_are_named_by_a_file_or_by_themselves(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", pa.array([2, 0, 2], pa.int32()), "class")
    assert read_images(str(file), 16).names == [["class 0"], ["class 2"]]
    (tmp_path / "names.txt").write_text("ant\nbee\ncow, kine\n")
    images = read_images(str(file), 16, tmp_path / "names.txt")
    assert images.names == [["ant"], ["cow", "kine"]]
    assert len(images.encoded([0, 1, 2])) == 3


def test_columns_of_names_and_patterns_of_files(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", pa.array(["cow", "ant"]), "class_name")
    parquet(tmp_path / "b.parquet", pa.array([None, "ant", "bee"]), "class_name")
    images = read_images(str(tmp_path / "*.parquet"), 16)
    assert images.names == [["ant"], ["bee"], ["cow"]]
    # The same drawings in both files: each image counts once.
    assert images.left_out == {"duplicate": 1, "no-label": 1}
    assert read_images(str(tmp_path), 16).names == images.names


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: str(path / "nowhere"), "no such folder or file"),
        (lambda path: "hf://datasets/a/b/*.parquet", "folder on this machine"),
        (lambda path: str(parquet(path / "a.parquet", None)), "no column of labels"),
        (
            lambda path: str(parquet(path / "a.parquet", pa.array([0, 7]), names=["x", "y"])),
            "row 1: class 7, but the file's ClassLabel has only 2 names",
        ),
        (lambda path: str((path / "flat").mkdir() or path / "flat"), "no sub-folders"),
        (
            lambda path: str((path / "a.parquet").write_text("PAR?") and path / "a.parquet"),
            "cannot be read as",
        ),
    ],
)
def test_sources_that_are_none(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read_images(make(tmp_path), 16)


def test_names_of_nothing(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("a\n\nb\n")
    with pytest.raises(UsageError, match="a class name in every line"):
        read_images(str(tmp_path), 16, names)
    names.write_text("a\n")
    file = parquet(tmp_path / "a.parquet", pa.array([0, 1]))
    with pytest.raises(UsageError, match="class 1, but --names has only 1 names"):
        read_images(str(file), 16, names)
    with pytest.raises(UsageError, match="leave --names out"):
        read_images(str(parquet(tmp_path / "b.parquet", pa.array(["x"]))), 16, names)
    with pytest.raises(UsageError, match="leave --names out"):
        read_images(str(write_folder(tmp_path / "images", 1)), 16, names)


def test_synonyms_are_taken_apart_at_commas() -> None:
    assert split_names("tench, Tinca tinca,") == ["tench", "Tinca tinca"]
    assert split_names(",") == [","]
    assert split_names("two\nlines\t here") == ["two lines here"]


# The plan


def test_a_plan_is_a_pure_function_and_grows() -> None:
    assert planned() == planned()
    assert planned(12) == planned()[:12]
    assert [spec.classes for spec in planned(seed=1)] != [spec.classes for spec in planned()]
    assert len({spec.repo for spec in planned(500)}) == 500


def test_kinds_architectures_and_labels() -> None:
    specs = planned()
    kinds = Counter(spec.kind for spec in specs)
    assert set(kinds) == {"foundation", "inet", "scratch", "child", "copy", "wild"}
    assert kinds["foundation"] == 3
    assert kinds["inet"] == max(kinds.values())
    assert {spec.kind for spec in planned(6)} == set(kinds)
    assert {spec.architecture for spec in specs} == set(ARCHITECTURES)
    hidden = sum(spec.labels[0] == "LABEL_0" for spec in specs) / len(specs)
    assert 0.12 < hidden < 0.28
    assert {spec.dtype for spec in specs} == {"float16", "float32", "bfloat16"}
    assert any("_" in label for spec in specs for label in spec.labels if not label.startswith("LABEL_"))
    for spec in specs:
        assert len(spec.classes) == len(spec.names) == len(spec.labels) >= 2
        known = [number for members in spec.classes for number in members]
        assert len(set(known)) == len(known), "no class is behind two logits"


def test_parents_come_first_and_fit() -> None:
    seen: dict[str, Spec] = {}
    for spec in planned():
        if spec.parent is not None:
            parent = seen[spec.parent]
            assert spec.architecture == parent.architecture
            assert spec.normalisation == parent.normalisation
            if spec.kind == "child":
                assert parent.kind in ("inet", "child", "scratch")
                assert spec.classes != parent.classes
            elif spec.kind == "copy":
                assert (spec.classes, spec.labels) == (parent.classes, parent.labels)
            else:
                assert parent.kind == "foundation"
        else:
            assert spec.kind in ("foundation", "scratch")
        seen[spec.repo] = spec


def test_wild_models_know_superclasses_in_odd_spellings() -> None:
    wild = [spec for spec in planned(100) if spec.kind == "wild"]
    assert any(members in GROUPS.values() for spec in wild for members in spec.classes)
    spelled = {name for spec in wild for name in spec.names}
    assert spelled & {"CAT", "cats", "Cat", "BEAR", "bears", "Bear"}
    without = [spec for spec in plan(ANIMALS, {}, ARCHITECTURES, 100, 0) if spec.kind == "wild"]
    assert all(len(members) == 1 for spec in without for members in spec.classes)


def test_two_classes_are_enough_for_a_plan() -> None:
    for spec in plan([["a"], ["b"]], {}, ("test_resnet",), 30, 0):
        assert sorted(spec.classes) == [(0,), (1,)]


def test_last_words_make_superclasses() -> None:
    assert GROUPS == {"bear": (5, 6), "cat": (0, 1)}
    assert last_word_groups([["red box"], ["green box"]]) == {}, "a group of everything tells nothing apart"
    assert last_word_groups([["box"], ["red box"], ["green box"], ["disc"]]) == {}, "box is a class already"


def test_groups_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "groups.json"
    file.write_text(json.dumps({"cats": ["TABBY_cat", "Egyptian cat"], "fruit": ["lemon", "banana"]}))
    assert read_groups(file, ANIMALS) == {"cats": (0, 1), "fruit": (9, 10)}
    for content, message in (
        ('{"cats": ["tabby", "lion"]}', "1 names are no class of the images: 'lion'"),
        ('{"cats": ["tabby", "tabby cat"]}', "needs two classes"),
        ('{"lemon": ["tabby", "snail"]}', "called as one of the classes"),
        ('["cats"]', "JSON object"),
        ("{", "cannot be read"),
    ):
        file.write_text(content)
        with pytest.raises(UsageError, match=message):
            read_groups(file, ANIMALS)
    with pytest.raises(UsageError, match="cannot be read"):
        read_groups(tmp_path / "none.json", ANIMALS)


# The split and the truth


def test_no_image_is_used_twice() -> None:
    labels = np.repeat(np.arange(4), [5, 10, 40, 7])
    parts = lessons.split(labels, (), 4000, 0)
    used = [parts.lessons, parts.validation, parts.queries, parts.probes]
    assert sorted(np.concatenate(used).tolist()) == list(range(62))
    for part in used:
        assert set(labels[part]) == {0, 1, 2, 3}
    assert (np.bincount(labels[parts.lessons]) >= 2).all()


def test_probes_of_other_classes() -> None:
    labels = np.repeat(np.arange(4), 10)
    parts = lessons.split(labels, (2, 3), 12, 0)
    assert len(parts.probes) == 12
    assert set(labels[parts.probes]) == {2, 3}
    assert set(labels[np.concatenate([parts.lessons, parts.validation, parts.queries])]) == {0, 1}


def test_the_truth_file_is_what_evaluation_reads(tmp_path: Path) -> None:
    specs = planned(12)
    file = tmp_path / "truth.json"
    content = truth([*ANIMALS, ["beagle"]], GROUPS, specs, {spec.repo: 0.5 for spec in specs})
    file.write_text(json.dumps(content))
    found = Truth.read(file)
    assert found.concepts["cat"] == {0, 1}
    assert found.concepts["beagle"] == {2, 12}, "classes of one name are one concept"
    assert set(found.names_of("tabby")) == {"tabby", "tabby cat"}
    assert found.kinds == {spec.repo: spec.kind for spec in specs}
    assert set(content["models"][specs[0].repo]) == {
        "logits", "labels", "accuracy", "kind", "parent", "architecture",
    }  # fmt: skip
    inet = next(spec for spec in specs if spec.kind == "inet")
    assert found.answers(inet.names[0], inet.repo, 0)
    assert not found.answers(inet.names[0], inet.repo, 1)


def test_the_same_form_as_the_benchs_truth(bench: Path) -> None:
    theirs = json.loads((bench / "truth.json").read_text())
    ours = truth(ANIMALS, GROUPS, planned(6), {spec.repo: 0.5 for spec in planned(6)})
    assert set(theirs) == set(ours)
    assert set(next(iter(theirs["models"].values()))) == set(next(iter(ours["models"].values())))


# One model


@pytest.mark.parametrize("name", DEFAULT_ARCHITECTURES)
def test_a_model_of_every_architecture_is_stored_so_that_it_loads(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 6)
    pixels = rng.integers(0, 255, (18, 32, 32, 3), dtype=np.uint8)
    pixels.flags.writeable = False  # as Ray's object store hands it out
    material = lessons.Material(pixels, labels, np.arange(0, 18, 2), np.arange(1, 18, 2))
    spec = Spec(
        "a/b",
        name,
        "inet",
        ((2,), (0, 1)),
        ("two", "rest"),
        ("LABEL_0", "LABEL_1"),
        "float16",
        "inception",
        None,
        5,
    )
    first = lessons.train(spec, material, None, 1, "cpu")
    child = lessons.train(replace(spec, kind="child", classes=((0,), (1,), (2,)), names=("a", "b", "c"),
                                  labels=("A", "B", "C"), dtype="bfloat16"), material, first.files, 1, "cpu")  # fmt: skip
    for trained, expected in ((first, ["LABEL_0", "LABEL_1"]), (child, ["A", "B", "C"])):
        folder = tmp_path / str(len(expected))
        folder.mkdir()
        for file, data in trained.files.items():
            (folder / file).write_bytes(data)
        classifier = load_classifier(folder)
        assert classifier.labels == expected
        assert classifier.parameters == trained.parameters
        assert 0 <= trained.accuracy <= 1
        # The images go through the prober's preprocessing as they went through the lessons'.
        shrunk = classifier.recipe.geometry([Image.fromarray(pixels[0])])[0]
        np.testing.assert_array_equal(shrunk.transpose(1, 2, 0), pixels[0])
    assert lessons.train(spec, material, None, 1, "cpu").files == first.files


# Requests that cannot be met


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": 0}, "--models 0"),
        ({"size": 8}, "--size 8"),
        ({"epochs": 0}, "--epochs 0"),
        ({"probes": 0}, "--probes 0"),
        ({"probe_classes": -1}, "--probe-classes -1"),
        ({"architectures": ()}, "at least one name"),
        ({"architectures": ("test_resnet", "test_resnet")}, "each only once"),
        ({"architectures": ("no_such_net",)}, "'no_such_net': not a model of timm"),
        ({"architectures": ("vit_tiny_patch16_224",)}, "does not take images of 64 pixels"),
        ({"probe_classes": 5}, "--probe-classes 5 leaves 1 of 6 classes"),
    ],
)
def test_requests_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "images", 5)
    request = Request(**{"images": str(source), "out": tmp_path / "zoo", **changes})
    with pytest.raises(UsageError, match=message):
        build_zoo(request)
    assert not (tmp_path / "zoo").exists()


def test_images_that_are_too_few(tmp_path: Path) -> None:
    few = write_folder(tmp_path / "few", 4)
    with pytest.raises(UsageError, match=r"too few images per class.*'blue disc' \(4\)"):
        build_zoo(Request(str(few), tmp_path / "zoo"))
    one = tmp_path / "one"
    one.mkdir()
    write_folder(tmp_path / "images", 6)
    (tmp_path / "images" / "red_disc").rename(one / "red_disc")
    with pytest.raises(UsageError, match="one class only"):
        build_zoo(Request(str(one), tmp_path / "zoo"))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "zoo"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not empty and not a zoo"):
        build_zoo(Request(str(tmp_path), out))
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="is a file"):
        build_zoo(Request(str(tmp_path), out / "thesis.tex"))

"""What a listing's row becomes, field by field, and how long its texts and lists may be."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from probelog.errors import FailureReason, ItemFailure
from probelog.hub.listing import ListingFilters
from probelog.hub.model_info import add_configured_parent, excerpt, read_files, read_row, weights
from probelog.storage.schemas import Parent, RepoFile

SHA = "0123456789abcdef0123456789abcdef01234567"


def row(**item: Any) -> Any:
    return read_row({"id": "owner/model", "sha": SHA, **item})


def test_a_full_row() -> None:
    found = row(
        library_name="timm",
        pipeline_tag="image-classification",
        config={"model_type": "vit", "architectures": ["ViT", "Other"], "id2label": {"0": "cat", "1": "dog"}},
        cardData={"license": ["mit", "bsd"], "base_model": ["a/b", "c/d"], "library_name": "transformers"},
        safetensors={"total": 12, "parameters": {"F32": 3}},
        siblings=[{"rfilename": "model.safetensors", "size": 99, "lfs": {"sha256": "a" * 64}}],
        tags=["x", "license:apache-2.0"],
        downloads=5,
        likes=0,
        lastModified="2025-01-02T03:04:05.000Z",
        gated="manual",
        disabled=True,
    )
    assert (found.repo, found.sha) == ("owner/model", SHA)
    assert (found.library, found.pipeline_tag) == ("timm", "image-classification")
    assert (found.model_type, found.architecture) == ("vit", "ViT")
    assert (found.licence, found.base_model) == ("mit", "a/b")
    assert (found.parameters, found.weight_bytes) == (12, 99)
    assert found.files == [RepoFile("model.safetensors", 99, "a" * 64)]
    assert (found.downloads, found.likes) == (5, 0)
    assert found.last_modified == dt.datetime(2025, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
    assert found.labels == ["cat", "dog"]
    assert found.tags == ["x", "license:apache-2.0"]
    assert found.gated
    assert found.disabled


def test_an_empty_row() -> None:
    found = row()
    for name in (
        "library",
        "pipeline_tag",
        "model_type",
        "architecture",
        "parameters",
        "licence",
        "weight_bytes",
    ):
        assert getattr(found, name) is None, name
    for name in ("downloads", "likes", "last_modified", "base_model"):
        assert getattr(found, name) is None, name
    assert found.files == found.tags == found.labels == []
    assert not found.gated
    assert not found.disabled


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (None, "a NoneType in place of a model"),
        ([], "a list in place of a model"),
        ({"sha": SHA}, "nothing cannot be a repository's id"),
        ({"id": "a/b/c", "sha": SHA}, "'a/b/c' cannot be a repository's id"),
        ({"id": 7, "sha": SHA}, "a int cannot be a repository's id"),
        ({"id": "a/b"}, "nothing cannot be a commit"),
        ({"id": "a/b", "sha": SHA[1:]}, "cannot be a commit"),
        ({"id": "a/b", "sha": SHA + "0"}, "cannot be a commit"),
        ({"id": "a/b", "sha": SHA.upper()}, "cannot be a commit"),
    ],
)
def test_a_row_without_id_or_commit(item: object, message: str) -> None:
    with pytest.raises(ItemFailure, match=message) as caught:
        read_row(item)
    assert caught.value.reason is FailureReason.MALFORMED_ROW


def test_the_second_places_of_facts() -> None:
    assert row(cardData={"library_name": "transformers"}, tags=["timm"]).library == "transformers"
    assert row(tags=["pytorch", "transformers", "timm"]).library == "timm"
    assert row(tags=["transformers"]).library == "transformers"
    assert row(tags=["keras"]).library is None
    assert row(config={"architecture": "resnet18"}).architecture == "resnet18"
    assert row(tags=["license:mit"]).licence == "mit"
    assert row(tags=["license:", "mylicense:x", "license:bsd"]).licence == "bsd"


def test_every_licence_of_a_card_counts() -> None:
    both = row(cardData={"license": ["mit", 7, "apache-2.0", "mit", ""]}, tags=["license:bsd"])
    assert (both.licence, both.licences) == ("mit", ["mit", "apache-2.0"])
    assert ListingFilters(licences=("apache-2.0",), libraries=(), pipeline_tag=None).accepts(both)
    assert not ListingFilters(licences=("bsd",), libraries=(), pipeline_tag=None).accepts(both)
    assert row(cardData={"license": "mit"}).licences == ["mit"]
    assert row(cardData={"license": {"a": 1}}, tags=["license:bsd", "license:mit"]).licences == ["bsd", "mit"]
    assert row().licences == []
    assert row(tags=["base_model:finetune:a/b", "base_model:c/d"]).base_model == "c/d"
    assert row(cardData={"base_model": "a/b"}, tags=["base_model:c/d"]).base_model == "a/b"
    assert row(safetensors={"parameters": {"F32": 3, "I64": 2, "X": None}}).parameters == 5
    assert row(safetensors={"parameters": {"F32": 0}}).parameters is None
    assert row(safetensors={"total": 0}).parameters == 0


@pytest.mark.parametrize(("gated", "expected"), [(None, False), (False, False), ("auto", True), (True, True)])
def test_what_is_gated(gated: object, expected: bool) -> None:
    assert row(gated=gated).gated is expected


@pytest.mark.parametrize(("disabled", "expected"), [(None, False), ("yes", False), (True, True)])
def test_what_is_disabled(disabled: object, expected: bool) -> None:
    assert row(disabled=disabled).disabled is expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, 0), (-1, None), (2**63 - 1, 2**63 - 1), (2**63, None), (True, None), (1.0, None), ("3", None)],
)
def test_counts(count: object, expected: int | None) -> None:
    assert row(downloads=count).downloads == row(likes=count).likes == expected


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("2025-01-02T03:04:05", dt.datetime(2025, 1, 2, 3, 4, 5, tzinfo=dt.UTC)),
        ("2025-01-02T03:04:05+02:00", dt.datetime(2025, 1, 2, 1, 4, 5, tzinfo=dt.UTC)),
        ("0001-01-01T00:00:00+10:00", None),
        ("yesterday", None),
        (17, None),
        ("2025-01-02T03:04:05" + "0" * 40, None),
    ],
)
def test_times(time: object, expected: dt.datetime | None) -> None:
    assert row(lastModified=time).last_modified == expected


def test_texts_and_lists_have_an_end() -> None:
    found = row(
        pipeline_tag="p" * 999,
        tags=["t" * 999, *(str(number) for number in range(999))],
        config={"label_names": ["l" * 999, "m"]},
        siblings=[{"rfilename": "f" * 500}, {"rfilename": "f" * 501}, {"rfilename": ""}],
    )
    assert found.pipeline_tag == "p" * 200
    assert len(found.tags) == 500
    assert found.tags[0] == "t" * 200
    assert found.labels == ["l" * 500, "m"]
    assert [file.path for file in found.files] == ["f" * 500]
    assert len(read_files([{"path": str(number)} for number in range(1200)])) == 1000


def test_labels_are_one_for_each_logit_or_none() -> None:
    assert row(config={"id2label": {"1": "b", "0": "a"}}).labels == ["a", "b"]
    assert row(config={"id2label": {"0": "a", "2": "c"}}).labels == []
    assert row(config={"id2label": {"0": "a", "1": 7}}).labels == []
    assert row(config={"label_names": ["a", "b"]}).labels == ["a", "b"]
    assert row(config={"label_names": ["x"], "id2label": {"0": "a"}}).labels == ["a"]
    many = {str(number): "x" for number in range(25_010)}
    assert len(row(config={"id2label": many}).labels) == 25_000
    assert len(row(config={"label_names": ["x"] * 25_010}).labels) in (0, 25_000)


def test_files_of_the_root_come_first_and_folders_are_none() -> None:
    found = read_files(
        [
            {"path": "a/b/c", "type": "file"},
            {"path": "a", "type": "directory"},
            {"path": "z", "size": 3, "lfs": {"oid": "b" * 64}},
            "nonsense",
            {"path": "a/y", "lfs": {"sha256": "B" * 64}},
            {"rfilename": "x", "path": "not this"},
            {"path": 5},
        ]
    )
    assert found == [
        RepoFile("z", 3, "b" * 64),
        RepoFile("x", None, None),
        RepoFile("a/y", None, None),
        RepoFile("a/b/c", None, None),
    ]


def named(*names: str) -> list[RepoFile]:
    return [RepoFile(name, 1, None) for name in names]


def test_which_files_hold_the_weights() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    every = named("pytorch_model.bin", *shards, "model.safetensors", "other.safetensors")
    assert weights(every) == named("model.safetensors")
    assert weights(every[:3]) == named(*shards)
    assert weights(every[:1]) == named("pytorch_model.bin")
    parts = named(
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors", "vae/diffusion_pytorch_model.safetensors"
    )
    halves = named(
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"
    )
    assert weights([*every, *halves, *parts]) == parts, "a pipeline is read from its parts"
    assert weights([*every, *halves]) == halves[:1]
    assert weights(named("a.bin", "model-1-of-2.safetensors", "xmodel-00001-of-00002.safetensors")) == []


def test_bytes_of_weights_are_those_of_the_files_or_estimated() -> None:
    shards = [{"rfilename": f"model-0000{number}-of-00002.safetensors", "size": number} for number in (1, 2)]
    counts = {
        "F64": 1,
        "I64": 1,
        "U64": 1,
        "F32": 10,
        "I32": 10,
        "U32": 10,
        "F16": 100,
        "BF16": 100,
        "I16": 100,
    }
    counts |= {"U16": 100, "I8": 1000, "NEW": 1000}
    assert row(siblings=shards, safetensors={"parameters": counts}).weight_bytes == 3
    estimate = 3 * 8 + 30 * 4 + 400 * 2 + 2000
    assert row(safetensors={"parameters": counts}).weight_bytes == estimate
    del shards[0]["size"]
    assert row(siblings=shards, safetensors={"parameters": counts}).weight_bytes == estimate
    assert row(siblings=shards).weight_bytes is None
    assert row(safetensors={"parameters": {"F32": "many", "F16": 3}}).weight_bytes == 6


def test_an_excerpt_is_short_and_printable() -> None:
    assert excerpt("\x1b[2J" + "x" * 200) == ascii("\x1b[2J" + "x" * 96)
    assert excerpt(None) == "nothing"
    assert excerpt([1]) == "a list"


def test_parents_of_every_place_that_names_one() -> None:
    parents = row(
        cardData={"base_model": ["a/b", "c/d"], "base_model_relation": "merge"},
        tags=[
            "base_model:a/b",
            "base_model:quantized:e/f",
            "x:base_model:adapter:g/h",
            "base_model:adapter:",
        ],
        config={"_name_or_path": "i/j", "peft": {"base_model_name_or_path": "k/l"}},
    ).parents
    assert [(parent.repo, parent.relation, parent.source) for parent in parents] == [
        ("a/b", "merge", "card"),
        ("c/d", "merge", "card"),
        ("e/f", "quantized", "tag"),
        ("k/l", "adapter", "adapter"),
        ("i/j", "unknown", "config"),
    ]


def test_the_parent_of_a_configuration_is_added_to_those_of_the_listing() -> None:
    listed = [Parent("a/b", "merge", "card"), Parent("i/j", "unknown", "tag")]
    added = Parent("i/j", "unknown", "config")
    assert add_configured_parent("o/m", listed, "i/j") == [*listed, added]
    assert add_configured_parent("o/m", [*listed, added], "i/j") == [*listed, added], "it is known already"
    for nothing in ("o/m", "/home/me/run", "./checkpoint-100", "", None, "a/" + "b" * 500):
        assert add_configured_parent("o/m", listed, nothing) == listed
    many = [Parent(f"a/{number}", "unknown", "card") for number in range(20)]
    assert add_configured_parent("o/m", many, "i/j") == many, "as many as are kept"


@pytest.mark.parametrize("name", ["owner/model", "/home/me/checkpoint", "", 7, None, "a/" + "b" * 500])
def test_what_names_no_other_repository_is_no_parent(name: object) -> None:
    assert row(cardData={"base_model": name}, config={"_name_or_path": name}).parents == []

"""`probelog-index evaluate --kind generator` on a small index whose generators make what their samples were drawn around."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.benchmark.generators.run import GENERATOR, IMAGE_AND_TEXT, THIS_INDEX, evaluate_generators
from pipelines.benchmark.generators.ways import MATCHED, MONTE_CARLO
from probelog.errors import UsageError
from probelog.storage.store import Store
from tests.probelog.encoders.test_decoding import encoded
from tests.support.processes.operator_command import operator
from tests.support.worlds.small_generators import GENERATORS_OF_ALL_SORTS, build
from tests.support.worlds.tiny_encoders import photo

ABSENT = ("tree", "apple", "cup")
# An encoder of random weights takes it for a violin.
UNREADABLE = "sea_lion"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("generators"))
    build(store.child("index"), noise=0.05)
    return store


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("truth")
    concepts = sorted({name for item in GENERATORS_OF_ALL_SORTS for name in item.makes} - {UNREADABLE})
    queries = []
    for number, name in enumerate([*concepts, *ABSENT]):
        queries.append({"modality": "text", "concept": name, "file": None, "text": name})
        for modality in ("image", "sketch"):
            for shown in range(2):
                file = folder / f"{modality} {number} {shown}.png"
                file.write_bytes(encoded(photo(32, 32, number), "PNG"))
                queries.append({"modality": modality, "concept": name, "file": file.name, "text": None})
    generators = [
        {"repo": item.repo, "pipeline": item.pipeline, "concepts": list(item.makes), "style": None}
        for item in GENERATORS_OF_ALL_SORTS
    ]
    file = folder / "truth.json"
    file.write_text(json.dumps({"generators": generators, "queries": queries, "absent": ABSENT}))
    return file


def test_an_index_is_evaluated(store: Store, truth: Path) -> None:
    options = ["--kind", "generator", "--index", store.uri, "--truth", truth, "--samples", 4]
    ended = operator("evaluate", *options, "--json")
    assert ended.status == 0, ended.err
    plain = json.loads(ended.out)
    assert plain["generators"] == len(GENERATORS_OF_ALL_SORTS)
    figures = {(item["modality"], item["method"], item["samples"]): item for item in plain["methods"]}
    assert {key[0] for key in figures} == {"text", "image", "sketch", IMAGE_AND_TEXT, GENERATOR}
    # The encoder's weights are random: names are what the samples were drawn around, pictures are not.
    for method, samples in ((MATCHED, 64), (MATCHED, 4), (THIS_INDEX, 64)):
        text = figures["text", method, samples]
        assert text["measures"]["top1"]["mean"] == 1.0, method
        assert (text["queries"], text["concepts"]) == (6, 6)
        assert 0 <= text["absent_area"]["low"] <= text["absent_area"]["mean"] <= 1
        assert text["milliseconds"] > 0
    for modality in ("image", "sketch"):
        # Each made of the same queries: the client's answers are those of its method, but for what its index rounds.
        ours, client = figures[modality, MATCHED, 64], figures[modality, THIS_INDEX, 64]
        assert client["measures"]["map"]["mean"] == pytest.approx(ours["measures"]["map"]["mean"], abs=0.02)
    alike = figures[GENERATOR, MONTE_CARLO, 64]
    assert (alike["queries"], alike["measures"]["top1"]["mean"]) == (2, 1.0)  # copies of each other
    assert [item["pictures"] for item in plain["encoder"]] == [
        "names",
        "real pictures",
        "sketches of real pictures",
        "samples of the generators",
    ]
    assert plain["encoder"][-1]["counted"] == sum(min(item.samples, 64) for item in GENERATORS_OF_ALL_SORTS)
    assert 0 < plain["bytes_a_model"] <= 25_000
    assert [way["queries"] for way in plain["searches"]] == [6, 6]


def test_what_cannot_be_evaluated(store: Store, truth: Path, tmp_path: Path) -> None:
    content = {
        "generators": [{"repo": "a/b", "concepts": ["x"]}],
        "queries": [{"modality": "text", "concept": "x"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="none of the generators"):
        evaluate_generators(store.uri, tmp_path / "truth.json")
    with pytest.raises(UsageError, match="no samples of generators"):
        evaluate_generators(store.uri, truth, store=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kind", "generator", "--out", "x"], "--out is for classifiers"),
        (["--kind", "generator", "--protocol", "closed"], "--protocol is for classifiers"),
        (["--kind", "generator"], "give one --index and a --truth file"),
        (["--samples", "8"], "--samples is for generators: add --kind generator"),
        (["--store", "x", "--out", "x"], "--store is for generators: add --kind generator"),
    ],
)  # fmt: skip
def test_options_of_the_other_kind(options: list[str], said: str) -> None:
    ended = operator("evaluate", "--index", "nowhere", *options)
    assert ended.status == 2
    assert said in " ".join(ended.err.split())

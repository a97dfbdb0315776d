"""Features from ledgers of samples, and truth files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.benchmark.generators.features import sampled_features
from pipelines.benchmark.generators.truth import GeneratorTruth
from probelog.errors import UsageError
from probelog.storage.ledger import SAMPLED, ItemResult, Ledger, item_key
from probelog.storage.schemas import SAMPLES, SampledModel
from probelog.storage.store import Store

SHA, ENCODER = "5" * 40, "e" * 64


def seal(ledger: Ledger, models: dict[str, int | str], encoder: str = ENCODER) -> None:
    """Models with so many samples, or copies of another."""
    items = []
    for repo, samples in models.items():
        copy = samples if isinstance(samples, str) else None
        count = 0 if isinstance(samples, str) else samples
        made = SampledModel(
            repo, SHA, "DDIMPipeline", "UNet2DModel", "none", 8, 10, count, 2, encoder, "F32", "cpu", "d" * 64,
            identity=repo, copy_of_repo=copy, copy_of_sha=copy and SHA,
        )  # fmt: skip
        numbers = [*reversed(range(count))]  # in any order
        rows = {
            "repo": [repo] * count,
            "sha": [SHA] * count,
            "number": numbers,
            "prompt": [None] * count,
            "class": [None] * count,
            "feature": [np.array([len(repo), number], np.float16) for number in numbers],
            "base_feature": [None] * count,
        }
        items.append(item_key(repo, SHA))
        ledger.spool(items[-1], ItemResult.success(made, pa.table(rows, schema=SAMPLES)))
    ledger.seal(items)


def test_features_come_in_the_samples_order_and_of_the_largest_ledger(tmp_path: Path) -> None:
    store = Store(tmp_path)
    seal(Ledger(store, "samples/few", SAMPLED), {"a/b": 2})
    most = Ledger(store, "samples/most", SAMPLED)
    seal(most, {"a/b": 3, "c/long": 2})
    seal(most, {"d/copy": "a/b"})
    seal(Ledger(store, "samples/other", SAMPLED), {"a/b": 9}, "f" * 64)
    features = sampled_features(store, ENCODER)
    assert {repo: rows.tolist() for repo, rows in features.items()} == {
        "a/b": [[3, 0], [3, 1], [3, 2]],
        "c/long": [[6, 0], [6, 1]],
        "d/copy": [[3, 0], [3, 1], [3, 2]],
    }
    with pytest.raises(UsageError, match="no samples of generators that the index's encoder embedded"):
        sampled_features(store, "0" * 64)


def test_a_truth_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a picture")
    content = {
        "generators": [
            {"repo": "a/b", "concepts": ["cup", "mug"], "style": None},
            {"repo": "c/d", "concepts": ["bus"]},
            {"repo": "e/f", "concepts": ["bus"], "style": "drawn"},
        ],
        "queries": [
            {"modality": "text", "concept": "cup", "file": None, "text": "a cup"},
            {"modality": "image", "concept": "bus", "file": "a.png", "text": None},
            {"modality": "text", "concept": "lamp"},
            {"modality": "image", "concept": "bus", "file": "a.png", "style": "drawn"},
        ],
        "absent": ["lamp"],
    }
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(content))
    truth = GeneratorTruth.read(file)
    assert truth.relevant(truth.queries, ["c/d", "a/b", "e/f"]).tolist() == [
        [False, True, False],
        [True, False, True],
        [False, False, False],
        [False, False, True],
    ]
    assert [(query.text, query.file) for query in truth.queries] == [
        ("a cup", None),
        ("bus", tmp_path / "a.png"),
        ("lamp", None),
        ("bus", tmp_path / "a.png"),
    ]
    assert truth.absent == {"lamp"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not a truth file"),
        ("[]", "is not a truth file"),
        ('{"generators": [{"repo": "a/b"}], "queries": []}', "is not a truth file"),
        ('{"generators": [], "queries": []}', "asks nothing"),
        ('{"generators": [], "queries": [{"modality": "smell", "concept": "cup"}]}', "a modality is one of"),
        ('{"generators": [], "queries": [{"modality": "image", "concept": "cup"}]}', "there is no file None"),
        ('{"generators": [], "queries": [{"modality": "sketch", "concept": "cup", "file": "x.png"}]}', "x.png"),
    ],
)  # fmt: skip
def test_what_is_no_truth_file(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "truth.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=said):
        GeneratorTruth.read(file)


def test_a_truth_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        GeneratorTruth.read(tmp_path / "nothing.json")

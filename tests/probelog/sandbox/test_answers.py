"""What a model's process says of its tensors."""

from __future__ import annotations

from typing import Any

import pytest

from probelog.sandbox import answers
from probelog.sandbox.checks import AnswerError
from probelog.sandbox.generators import loaded, sampled
from probelog.sandbox.spec import GeneratorSpec
from probelog.weights.reader import LayerFacts


def rows(*layers: list[Any]) -> list[dict[str, Any]]:
    said = list(layers)
    table = answers.weights("a/b", "0" * 40, said, b"")
    return list(table.to_pylist())


def test_a_counter_comes_through_as_it_is() -> None:
    said, sketches = answers.layers_to_json([LayerFacts("bn.num_batches_tracked", "int64", (), 1563.0)])
    (row,) = rows(*said)
    assert (row["mean"], row["std"], sketches) == (1563.0, None, b"")


@pytest.mark.parametrize(
    ("shape", "mean"), [([2], 3.0), ([], 0.5), ([], 1e20), ([], float("nan")), ([], "3"), ([0], 1.0)]
)
def test_whole_numbers_have_no_other_means(shape: list[int], mean: object) -> None:
    with pytest.raises(AnswerError, match=r"mean of whole numbers|statistics"):
        rows(["position_ids", "int64", shape, mean, None, None, False])


SAID: dict[str, Any] = {
    "facts": {
        "pipeline": "StableDiffusionPipeline", "architecture": "UNet2DConditionModel", "conditioning": "text",
        "image_size": 16, "parameters": 5, "trigger_words": ["sks"], "prompts": ["", "sks"], "classes": [],
        "dtype": "float32", "device": "cpu", "weight_digest": "0" * 64, "identity": "0" * 16, "seconds_load": 0.1,
    },
    "shape": {"size": [16, 8], "class_count": 0, "available": None, "adapter": False},
}  # fmt: skip
SPEC = GeneratorSpec(max_params=10, max_image_size=16, batch_size=4)
TABLE = answers.weights("a/b", "0" * 40, [], b"")


@pytest.mark.parametrize(
    ("part", "fact", "value"),
    [
        ("facts", "pipeline", "os.system"), ("facts", "architecture", "a\x1b"), ("facts", "conditioning", "all"),
        ("facts", "image_size", 17), ("facts", "parameters", 21), ("facts", "parameters", True),
        ("facts", "trigger_words", ["\u202e"]), ("facts", "trigger_words", ["a"] * 17), ("facts", "prompts", []),
        ("facts", "prompts", ["a"] * 1000), ("facts", "classes", "cats"), ("facts", "weight_digest", "x"),
        ("facts", "identity", "0" * 15), ("facts", "seconds_load", -1.0), ("facts", "device", "tpu"),
        ("shape", "size", [16]), ("shape", "size", [16, 0]), ("shape", "size", [17, 8]), ("shape", "class_count", 3),
        ("shape", "available", 0), ("shape", "adapter", "no"),
    ],
)  # fmt: skip
def test_facts_that_no_generator_of_ours_tells(part: str, fact: str, value: object) -> None:
    model = loaded(SAID, TABLE, SPEC)
    assert (model.size, model.identity, model.adapter) == ((16, 8), "0" * 16, False)
    for changed in (
        SAID[part] | {fact: value},
        {name: one for name, one in SAID[part].items() if name != fact},
    ):
        if fact != "available" or fact in changed:  # most have no such number
            with pytest.raises(AnswerError):
                loaded({**SAID, part: changed}, TABLE, SPEC)
    with pytest.raises(AnswerError):
        loaded({part: SAID[part]}, TABLE, SPEC)


def test_pictures_that_no_generator_of_ours_makes() -> None:
    model = loaded(SAID, TABLE, SPEC)
    said = {"prompts": [0, 1], "classes": None, "batch_size": 2, "precision": "float32"}
    pixels = bytes(range(256)) * 3
    made = sampled(said, [pixels], 2, model, SPEC, base=False)
    assert made.pixels.shape == (2, 16, 8, 3)
    assert made.prompts is not None
    assert made.prompts.tolist() == [0, 1]
    for blobs, changes in (
        ([pixels[1:]], {}), ([], {}), ([pixels, pixels], {}), ([pixels], {"prompts": None}),
        ([pixels], {"prompts": [0]}), ([pixels], {"prompts": [0, 2]}), ([pixels], {"prompts": [0, 1.0]}),
        ([pixels], {"classes": [0, 0]}), ([pixels], {"batch_size": 5}), ([pixels], {"precision": "int8"}),
    ):  # fmt: skip
        with pytest.raises(AnswerError):
            sampled({**said, **changes}, blobs, 2, model, SPEC, base=False)

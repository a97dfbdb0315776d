"""The bounds on what a ``config.json`` says, at and beyond each of them."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from probelog.errors import FailureReason, ItemFailure
from probelog.models.config import (
    MAX_LABEL_CHARACTERS,
    LoadLimits,
    bound_numbers,
    bounded_construction,
    canonical,
    count_logits,
    head_of,
    read_config,
    tidy_label,
    tidy_labels,
)
from probelog.models.loading import load_classifier
from probelog.storage.schemas import Head
from tests.support.hub import hostile

LIMITS = LoadLimits(max_image_size=512, max_logits=10)


def refusal(config: dict[str, Any], tensors: int = 2, elements: int = 1000) -> FailureReason | None:
    shapes = {f"tensor-{number}": (1,) for number in range(tensors)}
    try:
        bound_numbers(config, shapes, elements, LIMITS)
    except ItemFailure as failure:
        return failure.reason
    return None


MISMATCH, CORRUPT, TOO_LARGE = (
    FailureReason.CONFIG_MISMATCH,
    FailureReason.CORRUPT_CONFIG,
    FailureReason.TOO_LARGE,
)


@pytest.mark.parametrize(
    ("config", "elements", "expected"),
    [
        ({"hidden_size": 65536}, 1000, None),
        ({"hidden_size": 65537}, 1000, MISMATCH),
        ({"hidden_size": -65536}, 1000, None),
        ({"hidden_size": -65537}, 1000, MISMATCH),
        ({"hidden_size": -(10**18)}, 1000, MISMATCH),
        ({"hidden_size": 100_000}, 100_000, None),
        ({"hidden_size": 100_001}, 100_000, MISMATCH),
        ({"hidden_size": -100_001}, 100_000, MISMATCH),
        ({"nested": {"deeper": [1, {"size": 10**12}]}}, 1000, MISMATCH),
        ({"nested": {"deeper": [1, {"size": -(10**12)}]}}, 1000, MISMATCH),
        ({"eps": 1e300, "flag": True, "name": "10000000"}, 1000, None),
    ],
)
def test_no_size_exceeds_the_numbers_in_the_weights(
    config: dict[str, Any], elements: int, expected: FailureReason | None
) -> None:
    assert refusal(config, elements=elements) is expected


@pytest.mark.parametrize("key", ["id2label", "label2id", "label_names", "labels", "label_descriptions"])
def test_labels_are_no_sizes(key: str) -> None:
    assert refusal({key: {"a": 10**12}}) is None
    assert refusal({f"my_{key}": {"a": 10**12}}) is MISMATCH


@pytest.mark.parametrize("key", ["image_size", "img_size", "train_size", "input_size", "vision_image_size"])
def test_image_sizes_have_the_operators_limit(key: str) -> None:
    assert refusal({key: 512}) is None
    assert refusal({key: 513}) is TOO_LARGE
    assert refusal({key: [3, 600, 512]}) is TOO_LARGE
    assert refusal({f"{key}_other": 513}) is None


@pytest.mark.parametrize(
    "key", ["depth", "num_hidden_layers", "layers", "blocks", "stages", "repeat", "repeats", "num_layers"]
)
def test_no_layer_comes_without_a_tensor(key: str) -> None:
    assert refusal({key: 256}) is None
    assert refusal({key: 257}) is MISMATCH
    assert refusal({key: 0}) is None
    assert refusal({key: -1}) is CORRUPT
    assert refusal({key: 300}, tensors=300) is None
    assert refusal({key: 301}, tensors=300) is MISMATCH
    assert refusal({f"{key[:3]}x": 257}) is None


def test_layers_under_one_key_add_up() -> None:
    assert refusal({"depths": [128, 128]}) is None
    assert refusal({"depths": [128, 129]}) is MISMATCH
    assert refusal({"a": {"depth": 200}, "b": {"depth": 100}}) is MISMATCH
    assert refusal({"depth": 200, "num_layers": 200}) is None


def test_a_configuration_has_an_end() -> None:
    assert refusal({"many": [0] * 99_000}) is None
    assert refusal({"many": [0] * 100_100}) is CORRUPT


def test_refusals_say_what_and_how_much() -> None:
    with pytest.raises(ItemFailure, match="hidden = -70000; the weights hold 7 numbers in all"):
        bound_numbers({"hidden": -70000}, {}, 7, LIMITS)
    with pytest.raises(ItemFailure, match="image_size = 513 pixels; the limit is 512"):
        bound_numbers({"image_size": 513}, {}, 7, LIMITS)
    with pytest.raises(ItemFailure, match="depth = 300; the weights hold 1 tensors"):
        bound_numbers({"depth": 300}, {"a": (1,)}, 7, LIMITS)


def test_what_the_defaults_allow() -> None:
    assert LoadLimits() == LoadLimits(2_000_000_000, 2048, 50_000)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(-1, CORRUPT), (0, FailureReason.NOT_A_CLASSIFIER), (1, None), (10, None), (11, TOO_LARGE)],
)
def test_bounds_on_the_number_of_outputs(number: int, expected: FailureReason | None) -> None:
    if expected is None:
        assert count_logits(number, LIMITS) == number
        return
    with pytest.raises(ItemFailure) as caught:
        count_logits(number, LIMITS)
    assert caught.value.reason is expected


def test_a_repository_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(ItemFailure) as caught:
        read_config(tmp_path)
    assert caught.value.reason is FailureReason.NOT_FOUND
    (tmp_path / "config.json").write_text(json.dumps({"depth": 3}))
    assert read_config(tmp_path) == {"depth": 3}


def test_training_settings_do_not_tell_models_apart() -> None:
    plain = {"depth": 3, "act": "gelu"}
    training = {"attention_dropout": 0.1, "drop_rate": 0.2, "drop_path_rate": 0.1, "initializer_range": 0.02}
    assert canonical(plain | training) == canonical(dict(reversed([*plain.items()]))) == canonical(plain)
    assert canonical(plain) != canonical(plain | {"depth": 4})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("cat", "cat"),
        ("  cat\n\x1b[31mred ", "cat [31mred"),
        ("a\u202eb", "a b"),
        (7, "7"),
        (0.5, "0.5"),
        (True, "LABEL_4"),
        (None, "LABEL_4"),
        ([], "LABEL_4"),
        ("", "LABEL_4"),
        (" \x00 ", "LABEL_4"),
        ("x" * 301, "x" * 300),
        ("\x00" * 899 + "cat", "cat"),
        ("\x00" * 1200 + "cat", "LABEL_4"),
    ],
)
def test_a_label_is_short_readable_text(value: object, expected: str) -> None:
    assert MAX_LABEL_CHARACTERS == 300
    assert tidy_label(value, 4) == expected


def test_there_are_exactly_as_many_labels_as_logits() -> None:
    assert tidy_labels({0: "a", 2: "c", 3: "d", -1: "z"}, 3) == ["a", "LABEL_1", "c"]


@pytest.mark.parametrize(
    ("problem", "logits", "expected"),
    [
        ("regression", 1, Head.REGRESSION),
        ("regression", 3, Head.REGRESSION),
        ("multi_label_classification", 1, Head.SINGLE),
        ("multi_label_classification", 2, Head.SIGMOID),
        ("single_label_classification", 2, Head.SOFTMAX),
        (None, 2, Head.SOFTMAX),
        (None, 1, Head.SINGLE),
    ],
)
def test_what_a_head_means(problem: object, logits: int, expected: Head) -> None:
    assert head_of(problem, logits) is expected


def test_a_construction_that_outgrows_its_weights_is_stopped() -> None:
    torch = pytest.importorskip("torch")

    added = 0

    class Many(torch.nn.Module):
        def __init__(self, parameters: int = 0, numbers: int = 0, modules: int = 0, buffers: int = 0) -> None:
            nonlocal added
            super().__init__()
            for number in range(parameters):
                self.register_parameter(f"p{number}", torch.nn.Parameter(torch.empty(0)))
            if numbers:
                self.weight = torch.nn.Parameter(torch.empty(numbers, device="meta"))
            if buffers:
                self.register_buffer("kept", torch.empty(buffers, device="meta"))
            shared = torch.nn.Identity()
            for number in range(modules):
                self.add_module(f"m{number}", shared)
                added += 1
            self.register_parameter("none", None)
            self.register_buffer("nothing", None)

    def refused(tensors: int, elements: int, **sizes: int) -> bool:
        try:
            with bounded_construction(tensors, elements):
                Many(**sizes)
        except ItemFailure as failure:
            return failure.reason is FailureReason.CONFIG_MISMATCH
        return False

    assert not refused(1, 0, parameters=4 + 4096)
    assert refused(1, 0, parameters=5 + 4096)
    assert not refused(0, 10, numbers=40 + (1 << 24))
    assert refused(0, 10, numbers=41 + (1 << 24))
    assert not refused(0, 10, buffers=40 + (1 << 24))
    assert refused(0, 10, numbers=1 << 24, buffers=41)
    assert refused(1, 0, modules=10**6)
    assert added == 64 + 65536
    Many(parameters=5000)  # nothing is counted afterwards


def test_only_the_thread_that_builds_is_counted() -> None:
    import threading

    torch = pytest.importorskip("torch")
    made = []

    def elsewhere() -> None:
        module = torch.nn.Module()
        for number in range(5000):
            module.register_parameter(f"p{number}", torch.nn.Parameter(torch.empty(0)))
        made.append(module)

    with bounded_construction(0, 0):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(made) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_length": math.inf}, None),  # no field of the model
        ({"hidden_dropout_prob": math.nan}, None),  # of training alone
        ({"layer_norm_eps": math.inf}, FailureReason.CORRUPT_CONFIG),
        ({"layer_norm_eps": math.nan}, FailureReason.CORRUPT_CONFIG),
    ],
)
def test_numbers_that_are_not_finite_count_only_where_they_are_used(
    changes: dict[str, Any], reason: FailureReason | None, tmp_path: Path
) -> None:
    hostile.vit(tmp_path, **changes)
    assert any(word in (tmp_path / "config.json").read_text() for word in ("Infinity", "NaN"))
    if reason is None:
        assert load_classifier(tmp_path).logits == 3
        return
    with pytest.raises(ItemFailure) as failure:
        load_classifier(tmp_path)
    assert failure.value.reason is reason


def test_an_architecture_whose_package_is_missing_is_not_supported(tmp_path: Path) -> None:
    if importlib.util.find_spec("natten"):
        pytest.skip("natten is installed: the message about its absence is NOT tested")
    hostile.vit(tmp_path)
    dinat = {"model_type": "dinat", "architectures": ["DinatForImageClassification"], "num_labels": 3}
    hostile.write_json(tmp_path, "config.json", dinat | {"depths": [1], "num_heads": [2], "embed_dim": 8})
    with pytest.raises(ItemFailure, match=r"needs a package that is not installed.*natten") as failure:
        load_classifier(tmp_path)
    assert failure.value.reason is FailureReason.UNSUPPORTED

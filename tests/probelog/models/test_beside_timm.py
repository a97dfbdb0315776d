"""timm repositories that describe themselves in odd ways, beside what timm itself makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from probelog.errors import FailureReason, ItemFailure
from probelog.models.loading import Classifier, load_classifier
from tests.conformance.compare import pictures
from tests.conformance.timm_models import as_wrapper, by_timm, by_transformers, saved, trained

PICTURES = pictures()


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def beside_timm(folder: Path) -> Any:
    return by_timm(folder, PICTURES)[1]


def beside_transformers(folder: Path) -> Any:
    return by_transformers(folder, PICTURES)[1]


def check(folder: Path, expected: Any) -> Classifier:
    """Load the repository; its logits must be the expected ones."""
    classifier = load_classifier(folder)
    batch = classifier.recipe.normalise(torch.from_numpy(classifier.recipe.geometry(PICTURES)))
    assert expected.std() > 0
    assert (classifier.forward(batch) - expected).abs().max() < 1e-3 * expected.std()
    return classifier


def test_defaults_that_only_a_pretrained_model_has(tmp_path: Path) -> None:
    """fbnetc_100: batch norms with an epsilon of 1e-3; transformers' wrapper creates it with 1e-5."""
    model = trained("fbnetc_100")
    for number, module in enumerate(model.modules()):
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and number % 3 == 0:
            module.running_var.mul_(1e-3)  # so small that the epsilon counts
    plain = saved(model, tmp_path / "timm")
    wrapped = saved(model, tmp_path / "wrapper", as_wrapper)
    own, wrappers = beside_timm(plain), beside_transformers(wrapped)
    assert (own - wrappers).abs().max() > 0.1 * own.std()
    assert check(plain, own).identity != check(wrapped, wrappers).identity


@pytest.mark.parametrize("name", ["test_vit", "test_vit_relpos", "test_resnet"])
def test_the_arguments_say_how_large_pictures_are(name: str, tmp_path: Path) -> None:
    """The source's size stands in ``pretrained_cfg``, the model's own in ``model_args``."""
    sized = {} if name == "test_resnet" else {"img_size": 96}

    def of_the_source(config: dict[str, Any]) -> None:
        config["pretrained_cfg"] |= {"input_size": [3, 160, 160], "fixed_input_size": bool(sized)}

    folder = saved(trained(name, 96, **sized), tmp_path, of_the_source)
    assert check(folder, beside_timm(folder)).recipe.height == (96 if sized else 160)


@pytest.mark.parametrize(
    "switch", [{"dynamic_img_size": True}, {"strict_img_size": False}, {"use_naflex": True}]
)
def test_a_size_that_is_not_fixed_stays_the_sources(switch: dict[str, Any], tmp_path: Path) -> None:
    name = "swin_tiny_patch4_window7_224" if "strict_img_size" in switch else "test_vit"
    tiny = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)} if "swin" in name else {}

    def of_the_source(config: dict[str, Any]) -> None:
        config["pretrained_cfg"] |= {"input_size": [3, 128, 128], "fixed_input_size": True}
        config["model_args"] |= {"img_size": 96} | switch

    model = trained(name, 96, img_size=96, **switch, **tiny)
    folder = saved(model, tmp_path / "timm", of_the_source)
    assert check(folder, beside_timm(folder)).recipe.height == 128
    if "use_naflex" not in switch:  # transformers' loader leaves random numbers in parts of a naflex model
        folder = saved(
            model, tmp_path / "wrapper", lambda config: (of_the_source(config), as_wrapper(config))
        )
        assert check(folder, beside_transformers(folder)).recipe.height == 128


@pytest.mark.parametrize("edit", [lambda config: None, as_wrapper])
def test_counters_of_batches_may_be_missing(edit: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    folder = saved(trained("test_resnet"), tmp_path, edit)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors")
    check(folder, (beside_timm if edit is not as_wrapper else beside_transformers)(folder))
    kept.pop(next(name for name in kept if name.endswith("running_var")))
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(ItemFailure, match="running_var is missing") as failure:
        load_classifier(folder)
    assert failure.value.reason is FailureReason.CONFIG_MISMATCH


def offset(config: dict[str, Any]) -> None:
    """A head of six rows for five classes: the first row is of the background."""
    config["num_classes"] = config["model_args"]["num_classes"] = 5
    config["pretrained_cfg"] |= {"num_classes": 5, "label_offset": 1}
    config["label_names"] = ["ant", "bee", "cat", "cow", "dog"]


def test_rows_before_the_label_offset_are_dropped(tmp_path: Path) -> None:
    model = trained("test_vit", num_classes=6)
    folder = saved(model, tmp_path / "offset", offset)
    classifier = check(folder, beside_timm(folder))
    assert classifier.labels == ["ant", "bee", "cat", "cow", "dog"]
    whole = saved(model, tmp_path / "whole")
    rows = check(whole, beside_timm(whole)).forward(torch.ones(1, 3, 160, 160))
    torch.testing.assert_close(classifier.forward(torch.ones(1, 3, 160, 160)), rows[:, 1:])


def test_classes_without_a_name(tmp_path: Path) -> None:
    def some(config: dict[str, Any]) -> None:
        config["label_names"] = {"0": "ant", "1": "bee", "3": "n01", "x": "no number", "9": "none such"}
        config["label_descriptions"] = {"n01": "cow"}

    folder = saved(trained("test_vit", num_classes=4), tmp_path, some)
    assert load_classifier(folder).labels == ["ant", "bee", "LABEL_2", "cow"]


@pytest.mark.parametrize(
    "change",
    [
        {"classifier": "../head"},
        {"classifier": 7},
        {"first_conv": ["a b"]},
        {"label_offset": -1},
        {"label_offset": "1"},
        {"pool_size": [1 << 40]},
        {"fixed_input_size": "yes"},
    ],
)
def test_values_without_meaning(change: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(trained("test_vit"), tmp_path, lambda config: config["pretrained_cfg"].update(change))
    with pytest.raises(ItemFailure) as failure:
        load_classifier(folder)
    assert failure.value.reason is FailureReason.CORRUPT_CONFIG


@pytest.mark.parametrize("change", [{"url": "http://127.0.0.1:9/x"}, {"file": "/etc/passwd"},
                                    {"hf_hub_id": "a/b", "source": "hf-hub"}, {"custom_load": True}])  # fmt: skip
def test_weights_come_from_nowhere_else(change: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(trained("test_vit"), tmp_path / "plain")
    expected = beside_timm(folder)
    check(
        saved(trained("test_vit"), tmp_path / "odd", lambda config: config["pretrained_cfg"].update(change)),
        expected,
    )

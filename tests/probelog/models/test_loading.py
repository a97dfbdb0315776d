"""Classifiers of many architectures, saved by the libraries themselves, give the libraries' own logits."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

from probelog.errors import FailureReason, ItemFailure
from probelog.models.loading import load_classifier
from probelog.storage.schemas import WEIGHTS, Head
from probelog.weights.reader import MAX_LAYERS, Weights, layer_table
from tests.conformance.timm_models import trained
from tests.conformance.transformers_models import TINY, edge, make, processor
from tests.support.hub import hostile
from tests.support.paths import BENCH as SHARED_BENCH

BENCH = SHARED_BENCH / "hub"


def pixels(size: int = 32) -> Any:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("architecture", TINY)
def test_transformers_architectures(architecture: str, tmp_path: Path) -> None:
    model = make(architecture)
    model.save_pretrained(tmp_path)
    processor(architecture).save_pretrained(tmp_path)
    classifier = load_classifier(tmp_path)
    batch = pixels(edge(architecture) or 32)
    output = model(batch)
    expected = output.last_hidden_state if architecture.startswith("PPLCNet") else output.logits
    assert classifier.architecture == architecture
    assert classifier.library == "transformers"
    assert classifier.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert classifier.head is Head.SOFTMAX
    assert expected.std() > 0
    np.testing.assert_allclose(classifier.forward(batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_stored_dtypes_and_shards(dtype: str, tmp_path: Path) -> None:
    model = make("ViTForImageClassification").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="5KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load_classifier(tmp_path / "one"), load_classifier(tmp_path / "many")
    expected = model.float()(pixels()).logits
    for classifier in (one, many):
        assert classifier.dtype == dtype
        assert next(classifier.module.parameters()).dtype is torch.float32
        np.testing.assert_allclose(classifier.forward(pixels()), expected, rtol=1e-5, atol=1e-6)
    assert one.weight_digest == many.weight_digest
    flat = torch.cat([p.reshape(-1) for p in model.parameters()]).double()
    assert one.weight_mean == pytest.approx(flat.mean().item(), rel=1e-6)
    assert one.weight_std == pytest.approx(flat.std(unbiased=False).item(), rel=1e-6)
    assert one.parameters == flat.numel()


def test_same_weights_same_digest_whatever_the_config_says(tmp_path: Path) -> None:
    hostile.vit(tmp_path / "a")
    hostile.vit(tmp_path / "b", id2label={"0": "x", "1": "y", "2": "z"})
    assert load_classifier(tmp_path / "a").weight_digest == load_classifier(tmp_path / "b").weight_digest


def same_logits(folder: Path, other: Path) -> bool:
    """Whether two repositories count as the same model."""
    return load_classifier(folder).identity == load_classifier(other).identity


@pytest.mark.parametrize(
    ("file", "changes", "same"),
    [
        ("config.json", {"id2label": {"0": "x", "1": "y", "2": "z"}}, True),
        ("config.json", {"transformers_version": "4.1", "hidden_dropout_prob": 0.5}, True),
        ("config.json", {"auto_map": {"AutoModel": "modeling.Own"}}, True),
        ("config.json", {"hidden_act": "relu"}, False),
        ("config.json", {"layer_norm_eps": 0.1}, False),
        ("config.json", {"num_attention_heads": 1}, False),
        ("config.json", {"problem_type": "multi_label_classification"}, False),
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3]}, False),
        ("preprocessor_config.json", {"resample": 3}, False),
    ],
)
def test_identity(file: str, changes: dict[str, Any], same: bool, tmp_path: Path) -> None:
    hostile.vit(tmp_path / "a")
    hostile.vit(tmp_path / "b")
    config = json.loads((tmp_path / "b" / file).read_text())
    hostile.write_json(tmp_path / "b", file, config | changes)
    assert same_logits(tmp_path / "a", tmp_path / "b") is same
    assert len(load_classifier(tmp_path / "a").identity) == 16


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("google/vit", "google/vit"),
        ("/home/me/run", "/home/me/run"),
        ("a\ud800b", "a?b"),
        ("x" * 200, "x" * 200),
        ("x" * 201, None),
        ("", None),
        (7, None),
        (["a/b"], None),
        ({"a": "b"}, None),
    ],
)
def test_what_a_model_was_made_from_is_untrusted_text(name: object, kept: str | None, tmp_path: Path) -> None:
    make("ResNetForImageClassification").save_pretrained(tmp_path)
    identity = load_classifier(tmp_path).identity
    config = json.loads((tmp_path / "config.json").read_text())
    hostile.write_json(tmp_path, "config.json", config | {"_name_or_path": name})
    classifier = load_classifier(tmp_path)
    assert (classifier.name_or_path, classifier.identity) == (kept, identity)


def test_identity_of_timm_models(tmp_path: Path) -> None:
    inputs = {"input_size": [3, 32, 32], "crop_pct": 1.0, "num_classes": 3}
    hostile.timm_repository(tmp_path / "a")
    hostile.timm_repository(tmp_path / "labels", label_names=["x", "y", "z"])
    hostile.timm_repository(tmp_path / "dropout", model_args={"drop_rate": 0.3})
    hostile.timm_repository(tmp_path / "source", pretrained_cfg=inputs | {"url": "http://127.0.0.1:9/x"})
    hostile.timm_repository(tmp_path / "pool", model_args={"global_pool": "max"})
    hostile.timm_repository(tmp_path / "mean", pretrained_cfg=inputs | {"mean": [0.1, 0.1, 0.1]})
    for other, same in [
        ("labels", True),
        ("dropout", True),
        ("source", True),
        ("pool", False),
        ("mean", False),
    ]:
        assert same_logits(tmp_path / "a", tmp_path / other) is same, other


def test_identity_sees_weights_and_not_their_files(tmp_path: Path) -> None:
    model = make("ViTForImageClassification")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="5KB")
    model.classifier.bias.add_(1e-3)
    model.save_pretrained(tmp_path / "other")
    assert same_logits(tmp_path / "one", tmp_path / "many")
    assert not same_logits(tmp_path / "one", tmp_path / "other")


def test_facts_of_every_layer(tmp_path: Path) -> None:
    hostile.timm_repository(tmp_path)
    classifier = load_classifier(tmp_path)
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    assert [layer.tensor for layer in classifier.layers] == sorted(state)
    table = layer_table("a/\udce9", "0", classifier.layers)
    assert table.schema.equals(WEIGHTS, check_metadata=True)
    rows = {row["tensor"]: row for row in table.to_pylist()}
    for name, tensor in classifier.module.state_dict().items():
        row = rows[name]
        assert (row["repo"], row["shape"]) == ("a/?", list(tensor.shape))
        if not tensor.is_floating_point():
            assert row["mean"] == tensor.item()  # a counter of batches
            assert row["std"] is row["kurtosis"] is row["sketch"] is None
            continue
        assert row["mean"] == pytest.approx(tensor.mean().item(), abs=1e-6)
        assert row["std"] == pytest.approx(tensor.std(unbiased=False).item(), rel=1e-4)
        assert (row["sketch"] is not None) == (tensor.ndim >= 2)
        assert row["sketch"] is None or len(row["sketch"]) == 32
    assert 0 < classifier.seconds_sketch < classifier.seconds_weights


def test_very_many_tensors(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {f"layer.{i}.\n" + "x" * 400: np.full((2, 2), i, np.float32) for i in range(10_000)}
    save_file(tensors, tmp_path / "model.safetensors")
    start = time.process_time()
    read, facts = Weights(tmp_path).read()
    assert time.process_time() - start < 5  # 0.5 s on an idle machine
    assert len(read) == 10_000
    assert len(facts.layers) == MAX_LAYERS
    assert facts.mean == pytest.approx(4999.5)
    assert max(map(len, layer_table("a", "0", facts.layers)["tensor"].to_pylist())) == 300


@pytest.mark.parametrize(
    ("changes", "head"),
    [
        ({"problem_type": "multi_label_classification"}, Head.SIGMOID),
        ({"problem_type": "regression"}, Head.REGRESSION),
        ({"problem_type": "single_label_classification"}, Head.SOFTMAX),
        ({"problem_type": ["nonsense"]}, Head.SOFTMAX),
    ],
)
def test_heads(changes: dict[str, Any], head: Head, tmp_path: Path) -> None:
    hostile.vit(tmp_path, **changes)
    assert load_classifier(tmp_path).head is head


def test_one_logit(tmp_path: Path) -> None:
    make("ViTForImageClassification", num_labels=1).save_pretrained(tmp_path)
    classifier = load_classifier(tmp_path)
    assert classifier.head is Head.SINGLE
    assert classifier.forward(pixels()).shape == (2, 1)


def test_remote_code_beside_a_native_architecture_is_ignored(tmp_path: Path) -> None:
    hostile.vit(tmp_path / "a")
    hostile.vit(tmp_path / "b", auto_map={"AutoModelForImageClassification": "modeling.Own"})
    plain, mapped = load_classifier(tmp_path / "a"), load_classifier(tmp_path / "b")
    assert torch.equal(plain.forward(pixels(16)), mapped.forward(pixels(16)))


def test_no_architectures_means_the_model_types_own(tmp_path: Path) -> None:
    hostile.vit(tmp_path, architectures=None)
    assert load_classifier(tmp_path).architecture == "ViTForImageClassification"


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("test_resnet", {}),
        ("test_vit", {"img_size": 64}),
        ("test_vit", {"img_size": 64, "global_pool": "avg"}),
        ("test_convnext", {}),
        ("test_efficientnet", {"drop_rate": 0.2}),
        ("test_resnet", {"in_chans": 1}),
        ("test_byobnet", {}),
        ("test_mambaout", {}),
        ("mobilenetv3_small_050", {}),
        ("regnetx_002", {}),
        ("levit_128s", {}),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_timm_architectures(
    architecture: str, arguments: dict[str, Any], wrapped: bool, tmp_path: Path
) -> None:
    if not timm.is_model(architecture):
        pytest.skip(f"this timm has no {architecture}")
    from safetensors.torch import save_file
    from timm.models._hub import save_config_for_hf

    with torch.inference_mode(False):
        model = trained(architecture, arguments.get("img_size"), **arguments)
    state = model.state_dict()
    save_file(
        {f"timm_model.{k}": v for k, v in state.items()} if wrapped else state, tmp_path / "model.safetensors"
    )
    save_config_for_hf(model, str(tmp_path / "config.json"), model_config={"label_names": list("abcde")})
    if wrapped:
        config = json.loads((tmp_path / "config.json").read_text())
        hostile.write_json(tmp_path, "config.json", config | {"model_type": "timm_wrapper"})
    classifier = load_classifier(tmp_path)
    assert (classifier.library, classifier.architecture) == ("timm", architecture)
    assert classifier.labels == list("abcde")
    batch = torch.randn(2, *classifier.recipe.shape)
    assert classifier.recipe.channels == arguments.get("in_chans", 3)
    np.testing.assert_allclose(classifier.forward(batch), model(batch), rtol=1e-4, atol=1e-5)


def test_timm_config_of_older_exports_and_imagenet_labels(tmp_path: Path) -> None:
    hostile.timm_repository(tmp_path)
    flat = {
        "architecture": "test_resnet",
        "num_classes": 3,
        "input_size": [3, 40, 48],
        "labels": ["n01", "n02", 3],
    }
    hostile.write_json(tmp_path, "config.json", flat | {"label_descriptions": {"n01": "husky"}})
    classifier = load_classifier(tmp_path)
    assert classifier.labels == ["husky", "n02", "3"]
    assert classifier.recipe.shape == (3, 40, 48)


def test_allowed_pickle(tmp_path: Path) -> None:
    model = make("ResNetForImageClassification")
    model.save_pretrained(tmp_path)
    digest = load_classifier(tmp_path).weight_digest
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ItemFailure) as failure:
        load_classifier(tmp_path)
    assert failure.value.reason is FailureReason.UNSAFE_FORMAT
    classifier = load_classifier(tmp_path, allow_pickle=True)
    np.testing.assert_allclose(classifier.forward(pixels()), model(pixels()).logits, rtol=1e-4, atol=1e-5)
    assert classifier.weight_digest == digest
    torch.save({"x": torch.zeros(1).expand(10**9)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ItemFailure, match="corrupt-weights"):
        load_classifier(tmp_path, allow_pickle=True)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ItemFailure) as failure:
        load_classifier(tmp_path, allow_pickle=True)
    assert failure.value.reason in (FailureReason.CORRUPT_WEIGHTS, FailureReason.UNSAFE_FORMAT)


def test_output_of_another_shape(tmp_path: Path) -> None:
    hostile.vit(tmp_path)
    classifier = load_classifier(tmp_path)
    classifier.module.classifier = torch.nn.Identity()
    with pytest.raises(ItemFailure, match=r"config-mismatch.*\[2, 16\] for 2 images; 3 logits"):
        classifier.forward(pixels(16))


def test_nothing_is_asked_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    asked: list[object] = []

    def refuse(*address: object, **_: object) -> None:
        asked.append(address)
        raise AssertionError("a model was loaded with the help of the network")

    sources = {"hf_hub_id": "a/b", "url": "http://127.0.0.1:9/x.pth", "num_classes": 3}
    make("CLIPForImageClassification").save_pretrained(tmp_path / "a")
    hostile.timm_repository(tmp_path / "b", pretrained_cfg=sources)
    hostile.timm_repository(tmp_path / "c", architecture="hf-hub:a/b")
    hostile.timm_repository(tmp_path / "d", model_args={"pretrained": True}, pretrained_cfg=sources)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_classifier(tmp_path / "a").logits == 3
    assert load_classifier(tmp_path / "b").logits == 3
    # timm has checks of its own behind ours, so that the reason alone would not tell ours from theirs.
    for name, told in [("c", "'hf-hub:a/b' is not a model of timm"), ("d", "'pretrained' is not accepted")]:
        with pytest.raises(ItemFailure, match=f"unsupported.*{told}"):
            load_classifier(tmp_path / name)
    assert asked == []


def test_timm_learns_of_the_input_alone(tmp_path: Path) -> None:
    hostile.REPOSITORIES["timm-sources"][0](tmp_path / "r")
    module = load_classifier(tmp_path / "r").module
    for key in ("url", "file", "hf_hub_id", "custom_load"):
        assert not module.pretrained_cfg.get(key)


def bench() -> list[str]:
    return [row["id"] for row in json.loads((BENCH / "hub.json").read_text())] if BENCH.is_dir() else []


@pytest.mark.skipif(
    not BENCH.is_dir(), reason="the bench hub is not beside this checkout: bench models NOT tested"
)
def test_every_model_of_the_bench_equals_its_own_library() -> None:
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in [(64, 64), (90, 70)]
    ]
    for repo in bench():
        folder = BENCH / repo
        config = json.loads((folder / "config.json").read_text())
        classifier = load_classifier(folder)
        found = classifier.forward(
            classifier.recipe.normalise(torch.from_numpy(classifier.recipe.geometry(images)))
        )
        if "architecture" in config:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            data = timm.data.resolve_model_data_config(model)
            batch = torch.stack(
                [timm.data.create_transform(**data, is_training=False)(image) for image in images]
            )
            expected = model(batch)
        else:
            model = transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
            processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
            expected = model(**processor(images, return_tensors="pt")).logits
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4, err_msg=repo)

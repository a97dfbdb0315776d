"""Repositories that describe themselves in odd ways, indexed: the stored logits are those of their own libraries."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.image_utils import load_image

from pipelines.full import run_full
from pipelines.job.job import Job
from pipelines.job.progress import Report
from probelog.probes.probe_set import ProbeSet
from probelog.search.client import open_index
from probelog.storage.ledger import Ledger
from probelog.storage.store import Store
from tests.conformance import timm_models, transformers_models
from tests.conformance.compare import Answer
from tests.support.hub.faults import faulty
from tests.support.hub.hostile import write_json
from tests.support.worlds import tiny_encoders
from tests.support.worlds.tiny_world import TinyWorld

Run = Callable[[Path, Sequence[Image.Image]], Answer]
HALF, IMAGENET = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, {"image_mean": [0.485, 0.456, 0.406]}
PROBES = 40


def vit(folder: Path, **processor: Any) -> Path:
    transformers_models.make("ViTForImageClassification").save_pretrained(folder)
    write_json(
        folder, "preprocessor_config.json",
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}} | processor,
    )  # fmt: skip
    return folder


def nested_processor(folder: Path) -> Run:
    older = json.loads((vit(folder, **IMAGENET) / "preprocessor_config.json").read_text())
    write_json(folder, "processor_config.json", {"image_processor": older | HALF})
    return transformers_models.by_transformers


def feature_extractor(folder: Path) -> Run:
    vit(folder, image_processor_type=None, feature_extractor_type="ViTFeatureExtractor", **IMAGENET)
    return transformers_models.by_transformers


def no_normalisation(folder: Path) -> Run:
    vit(folder, do_normalize=None)
    return transformers_models.by_transformers


def filter_as_floating_point(folder: Path) -> Run:
    vit(folder, resample=3.0)
    return transformers_models.by_transformers


def infinite_length(folder: Path) -> Run:
    config = json.loads((vit(folder) / "config.json").read_text())
    write_json(folder, "config.json", config | {"max_length": math.inf})
    return transformers_models.by_transformers


def pp_lcnet(folder: Path) -> Run:
    name = "PPLCNetForImageClassification"
    transformers_models.make(name).save_pretrained(folder)
    transformers_models.processor(name).save_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    write_json(folder, "preprocessor_config.json", settings | {"resize_short": 128, "crop_size": 112})
    return transformers_models.by_transformers


def pretrained_defaults(folder: Path) -> Run:
    timm_models.saved(timm_models.trained("fbnetc_100"), folder)
    return timm_models.by_timm


def wrapper(folder: Path) -> Run:
    timm_models.saved(timm_models.trained("fbnetc_100"), folder, timm_models.as_wrapper)
    return timm_models.by_transformers


def another_size(folder: Path) -> Run:
    def of_the_source(config: dict[str, Any]) -> None:
        config["pretrained_cfg"] |= {"input_size": [3, 160, 160], "fixed_input_size": True}

    timm_models.saved(timm_models.trained("test_vit", 96, img_size=96), folder, of_the_source)
    return timm_models.by_timm


def of_any_size(folder: Path, switch: dict[str, Any], name: str, **arguments: Any) -> Run:
    """``switch`` lets a model take pictures of the source's size beside its own."""

    def of_the_source(config: dict[str, Any]) -> None:
        config["pretrained_cfg"] |= {"input_size": [3, 128, 128], "fixed_input_size": True}
        config["model_args"] |= {"img_size": 96} | switch

    model = timm_models.trained(name, 96, img_size=96, **switch, **arguments)
    timm_models.saved(model, folder, of_the_source)
    return timm_models.by_timm


def dynamic_size(folder: Path) -> Run:
    return of_any_size(folder, {"dynamic_img_size": True}, "test_vit")


def size_is_not_strict(folder: Path) -> Run:
    tiny = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    return of_any_size(folder, {"strict_img_size": False}, "swin_tiny_patch4_window7_224", **tiny)


def naflex(folder: Path) -> Run:
    timm_models.saved(timm_models.trained("test_vit", use_naflex=True), folder)
    return timm_models.by_timm


def without_counters(folder: Path, change: timm_models.Change = lambda config: None) -> Run:
    timm_models.saved(timm_models.trained("test_resnet"), folder, change)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    save_file(kept, folder / "model.safetensors")
    return timm_models.by_timm


def wrapper_without_counters(folder: Path) -> Run:
    without_counters(folder, timm_models.as_wrapper)
    return timm_models.by_transformers


def label_offset(folder: Path) -> Run:
    def offset(config: dict[str, Any]) -> None:
        config["num_classes"] = config["model_args"]["num_classes"] = 4
        config["pretrained_cfg"] |= {"num_classes": 4, "label_offset": 1}
        config["label_names"] = {"0": "ant", "1": "bee", "3": "cow"}

    timm_models.saved(timm_models.trained("test_convnext", num_classes=5), folder, offset)
    return timm_models.by_timm


ODD = (
    nested_processor, feature_extractor, no_normalisation, filter_as_floating_point, infinite_length,
    pp_lcnet, pretrained_defaults, wrapper, another_size, dynamic_size, size_is_not_strict, naflex, without_counters,
    wrapper_without_counters, label_offset,
)  # fmt: skip


def write_probes(file: Path) -> None:
    """Pictures of several shapes; every third is turned by its EXIF orientation. Their bytes are views."""
    images = []
    for seed in range(PROBES):
        sink, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = 6 if seed % 3 == 0 else 1
        tiny_encoders.photo(60 + seed, 90 - seed % 40, seed).save(sink, "JPEG", exif=exif, quality=95)
        images.append(sink.getvalue())
    pq.write_table(pa.table({"image": pa.array(images, pa.binary_view())}), file)


@pytest.mark.acceptance
def test_stored_logits_are_those_of_the_library(
    tiny_world: TinyWorld, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    runs = {f"odd/{make.__name__}": make(hub / "odd" / make.__name__) for make in ODD}
    write_probes(tmp_path / "probes.parquet")
    config = tiny_world.config(
        tmp_path / "store",
        probes=str(tmp_path / "probes.parquet"),
        probe_count=PROBES,
        scratch=str(tmp_path / "scratch"),
        workers=1,
    )
    with faulty(hub) as (endpoint, _):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        run = run_full(Job.of(config, Report(io.StringIO())))
    assert run.probed.failures == []
    store = Store(str(tmp_path / "store"))
    ledger = Ledger(store, f"observations/{run.probed.key}")
    (manifest,) = (tmp_path / "store").glob("probes/*/manifest.json")
    probes = ProbeSet.open(store, json.loads(manifest.read_text())["hash"])
    seen = [load_image(Image.open(io.BytesIO(probes.image_bytes(number)))) for number in range(PROBES)]
    stored = {}
    for model in ledger.models(run.probed.receipts):
        results = (
            ledger.sealed_result(receipt.name, model.repo, model.sha) for receipt in run.probed.receipts
        )
        (stored[model.repo],) = (result for result in results if result)
    assert stored.keys() == runs.keys()
    with torch.inference_mode():
        for repo, theirs in runs.items():
            model, observations = stored[repo]
            assert model.probes == list(range(PROBES))
            _, logits = theirs(hub / repo, seen)
            for row, expected in zip(observations.to_pylist(), logits.T.numpy(), strict=True):
                correlation = np.corrcoef(np.asarray(row["values"], np.float64), expected)[0, 1]
                assert correlation > 0.99999, (repo, row["logit"], correlation)
    index = open_index(str(tmp_path / "store"))
    assert [item.label for item in index.show("odd/label_offset").logits] == ["ant", "bee", "LABEL_2", "cow"]

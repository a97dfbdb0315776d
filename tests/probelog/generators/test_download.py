"""Which files of a generator are fetched from a real Hub on loopback, and what is refused before any weights are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.hubserver import running
from probelog.errors import FailureReason, ItemFailure
from probelog.generators.download import download_generator, foreseen_files, needed_files
from probelog.generators.layout import pipeline_layout
from probelog.generators.loading import LoadOptions, load_generator
from probelog.hub.client import HubClient
from probelog.hub.download import DownloadLimits
from probelog.hub.listing import ListingFilters, iter_pages
from probelog.hub.model_info import weights as weights_of
from tests.support.worlds import tiny_generators


@pytest.mark.parametrize(
    ("build", "pipeline", "parts"),
    [
        (tiny_generators.unconditional, "DDPMPipeline", ["unet"]),
        (tiny_generators.latent, "LDMPipeline", ["vqvae", "unet"]),
        (tiny_generators.class_to_image, "DiTPipeline", ["transformer", "vae"]),
    ],
)
def test_a_pipeline_is_fetched_folder_by_folder(
    build: Callable[[Path], None], pipeline: str, parts: list[str], tmp_path: Path
) -> None:
    repository = tmp_path / "hub" / "ada" / "umbrellas"
    build(repository)
    (repository / "pipeline.py").write_text("raise RuntimeError")
    (repository / parts[0] / "diffusion_pytorch_model.bin").write_bytes(b"no weights")
    with running(tmp_path / "hub") as endpoint, HubClient(endpoint) as client:
        filters = ListingFilters(libraries=(), pipeline_tag=None)
        rows = [row for page in iter_pages(filters, endpoint=endpoint) for row in page.rows]
        done = download_generator(client, rows[0], tmp_path / "here", limits=DownloadLimits())
    weights = [f"{part}/diffusion_pytorch_model.safetensors" for part in parts]
    assert done.files == (
        "model_index.json", *(f"{part}/config.json" for part in parts), "scheduler/scheduler_config.json", *weights,
    )  # fmt: skip
    assert sorted(foreseen_files([file.path for file in rows[0].files], False)) == sorted(done.files)
    assert {file.path for file in weights_of(rows[0].files)} == {*weights}
    assert load_generator(tmp_path / "here", LoadOptions(steps=2)).pipeline == pipeline


INDEX: dict[str, Any] = {
    "_class_name": "DDPMPipeline",
    "unet": ["diffusers", "UNet2DModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
}
UNET = "unet/diffusion_pytorch_model"
PLAIN = ["unet/config.json", "scheduler/scheduler_config.json"]


@pytest.mark.parametrize(
    ("names", "allow_pickle", "weights"),
    [
        ([f"{UNET}.bin", f"{UNET}.safetensors"], True, f"{UNET}.safetensors"),
        ([f"{UNET}.safetensors.index.json", f"{UNET}.fp16.safetensors"], False, f"{UNET}.safetensors.index.json"),
        ([f"{UNET}.fp16.safetensors", f"{UNET}.bin"], False, f"{UNET}.fp16.safetensors"),
        ([f"{UNET}.bin"], True, f"{UNET}.bin"),
        ([f"{UNET}.bin"], False, FailureReason.UNSAFE_FORMAT),
        (["unet/pytorch_model.ckpt"], True, FailureReason.UNSAFE_FORMAT),
        (["diffusion_pytorch_model.safetensors"], False, FailureReason.NOT_FOUND),
    ],
)  # fmt: skip
def test_the_best_weights_are_chosen(names: list[str], allow_pickle: bool, weights: object) -> None:
    layout = pipeline_layout(INDEX)
    listed = ["unet/config.json", *names]
    if isinstance(weights, FailureReason):
        with pytest.raises(ItemFailure) as failure:
            needed_files(layout, listed, allow_pickle)
        assert failure.value.reason is weights
    else:
        assert needed_files(layout, listed, allow_pickle) == (["unet/config.json"], [weights])


@pytest.mark.parametrize(
    ("names", "foreseen"),
    [
        (["config.json", "diffusion_pytorch_model.safetensors", "a.png"], 2),
        (["style.safetensors", "style-000010.safetensors", "README.md", "a.png"], ["README.md", "style.safetensors"]),
        ([f"images/{number}.png" for number in range(9)], 9),
        (["model_index.json", *PLAIN, f"{UNET}.safetensors.index.json", f"{UNET}-00001-of-00001.safetensors",
          f"{UNET}.non_ema.safetensors", "safety_checker/model.safetensors"], 5),
        (["model_index.json", *PLAIN, f"{UNET}.bin"], FailureReason.UNSAFE_FORMAT),
        (["model_index.json", *PLAIN[:1], f"{UNET}.safetensors"], FailureReason.UNSUPPORTED),
        (["model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json",
          "tokenizer/vocab.json", "text_encoder/config.json"], FailureReason.UNSUPPORTED),
        (["config.json", "model.safetensors"], FailureReason.NOT_FOUND),
        (["README.md"], FailureReason.NOT_A_GENERATOR),
    ],
)  # fmt: skip
def test_what_will_be_fetched_is_foreseen_from_names(names: list[str], foreseen: object) -> None:
    if isinstance(foreseen, FailureReason):
        with pytest.raises(ItemFailure) as failure:
            foreseen_files(names, False)
        assert failure.value.reason is foreseen
    else:
        found = foreseen_files(names, False)
        assert foreseen in (found, len(found))
        assert set(found) <= set(names)

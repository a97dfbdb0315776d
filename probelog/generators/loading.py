"""A downloaded repository as a generator that runs: whatever the uploader put into the folder.

What keeps this safe is what keeps classifiers safe (`probelog.models.loading`): configurations are data, reduced to known
keys; a closed list says which classes are built; sizes are justified by the weights before memory is taken; weights are
safetensors and every tensor has its place; the libraries get numbers and tensors, and never the folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probelog.errors import FailureReason, ItemFailure
from probelog.generators.adapters import load_adapter
from probelog.generators.assembly import LoadOptions, Parts, check_size, latents
from probelog.generators.gallery import load_gallery
from probelog.generators.layout import SCHEDULER_CONFIG, Layout, part_folder, read_layout, read_part
from probelog.generators.parts import networks
from probelog.generators.parts.schedule import NoiseSchedule
from probelog.generators.sampling import Generator
from probelog.generators.text_to_image import load_text_to_image
from probelog.models.config import tidy_labels
from probelog.weights.repository import read_json

if TYPE_CHECKING:
    import torch

_NUMBER = re.compile(r"[0-9]{1,6}", re.ASCII)

__all__ = ["LoadOptions", "load_generator"]


def load_generator(
    folder: Path, options: LoadOptions, base: Path | None = None, base_digest: str | None = None
) -> Generator:
    """The generator in a downloaded repository.

    Args:
        folder: of the repository.
        options: the operator's.
        base: the folder of an adapter's base.
        base_digest: that of the base's weights where they were loaded, and found sound, before.

    Raises:
        ItemFailure: with the reason why this model is not indexed.
    """
    layout = read_layout(folder)
    if layout.pipeline == "lora":
        return load_adapter(
            folder, layout, options, lambda chosen: _base(base, replace(chosen, known_digest=base_digest))
        )
    return _LOADERS[layout.pipeline](folder, layout, options)


def _base(folder: Path | None, options: LoadOptions) -> Generator:
    """The base of an adapter."""
    if folder is None:
        raise ItemFailure(FailureReason.MISSING_BASE, "an adapter without a base")
    layout = read_layout(folder)
    if layout.pipeline in ("lora", "gallery"):
        raise ItemFailure(FailureReason.CONFIG_MISMATCH, f"the adapter's base is itself a {layout.pipeline}")
    return _LOADERS[layout.pipeline](folder, layout, options)


def _unconditional(folder: Path, layout: Layout, options: LoadOptions) -> Generator:
    """A network of pixels with a schedule of noise, perhaps told a class."""
    import torch

    network = networks.unet(read_part(folder, layout, "unet"))
    height, width = networks.edges(network.settings["sample_size"])
    check_size(height, width, options.limits)
    place = part_folder(folder, layout, "scheduler")
    # In a flat repository there may be none: then the one that the network was most likely trained with.
    declared = read_json(place, SCHEDULER_CONFIG)
    if declared is None and layout.folders["scheduler"]:
        raise ItemFailure(FailureReason.NOT_FOUND, f"scheduler has no {SCHEDULER_CONFIG}")
    schedule = NoiseSchedule.read(declared or {}, latent=False)
    schedule.timesteps(options.steps)
    parts = Parts(folder, layout, options, {"unet": network})
    unet = parts.modules["unet"]
    classes = int(network.settings.get("num_class_embeds", 0))

    def draw(noise: torch.Tensor, conditions: Sequence[int]) -> torch.Tensor:
        labels = torch.tensor(conditions, device=noise.device) if classes else None

        def predict(sample: torch.Tensor, step: int) -> torch.Tensor:
            result: torch.Tensor = unet(sample, step, class_labels=labels, return_dict=False)[0]
            return result

        return schedule.sample(noise, options.steps, predict)

    return parts.generator(
        "unet",
        draw,
        conditioning="class" if classes else "none",
        shape=(network.settings.get("in_channels", 3), height, width),
        size=(height, width),
        function=[schedule.function, options.steps],
        class_names=_class_names(layout.settings.get("id2label"), classes),
        classes=classes,
    )


def _class_names(declared: object, classes: int) -> list[str]:
    """Names that a pipeline declares for all of its classes, fit to print; none where it declares none."""
    if not isinstance(declared, dict) or not declared or len(declared) > classes:
        return []
    return tidy_labels(
        {int(key): value for key, value in declared.items() if _NUMBER.fullmatch(key)}, classes
    )


def _decoder(folder: Path, layout: Layout, options: LoadOptions) -> Generator:
    """A decoder of latents that are drawn from the normal distribution its training pulled them to."""
    network = networks.vae(read_part(folder, layout, "vae"))
    height, width = networks.edges(network.settings.get("sample_size", 32))
    check_size(height, width, options.limits)
    factor = networks.decoder_factor(network)
    if height % factor or width % factor:
        raise ItemFailure(
            FailureReason.CORRUPT_CONFIG, f"pictures of {height} x {width} pixels are not decoded by {factor}"
        )
    parts = Parts(folder, layout, options, {"vae": network})
    vae: Any = parts.modules["vae"]

    def draw(noise: torch.Tensor, _conditions: Sequence[int]) -> torch.Tensor:
        result: torch.Tensor = vae.decode(latents(noise, network), return_dict=False)[0]
        return result

    return parts.generator(
        "vae",
        draw,
        shape=(network.settings.get("latent_channels", 4), height // factor, width // factor),
        size=(height, width),
    )


_LOADERS: Mapping[str, Callable[[Path, Layout, LoadOptions], Generator]] = {
    "DDPMPipeline": _unconditional,
    "DDIMPipeline": _unconditional,
    "PNDMPipeline": _unconditional,
    "UNet2DModel": _unconditional,
    "AutoencoderKL": _decoder,
    "StableDiffusionPipeline": load_text_to_image,
    "StableDiffusionXLPipeline": load_text_to_image,
    "gallery": load_gallery,
}

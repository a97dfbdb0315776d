"""A downloaded repository as a generator that runs: whatever the uploader put into the folder.

What keeps this safe is what keeps classifiers safe (`probelog.models.loading`): configurations are data, reduced to known
keys; a closed list says which classes are built; sizes are justified by the weights before memory is taken; weights are
safetensors and every tensor has its place; the libraries get numbers and tensors, and never the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from probelog.errors import FailureReason, ItemFailure
from probelog.generators.adapters import load_adapter
from probelog.generators.assembly import LoadOptions, Parts, check_size
from probelog.generators.class_to_image import load_class_to_image
from probelog.generators.gallery import load_gallery
from probelog.generators.layout import SCHEDULER_CONFIG, Layout, part_folder, read_layout, read_part
from probelog.generators.parts import decoders, networks
from probelog.generators.parts.decoders import DECODERS
from probelog.generators.parts.schedule import NoiseSchedule
from probelog.generators.sampling import Generator
from probelog.generators.text_to_image import load_text_to_image
from probelog.weights.repository import read_json

if TYPE_CHECKING:
    import torch

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
    """A network of pixels, or of latents with their decoder, and a schedule of noise; perhaps told a class."""
    import torch

    decoder = decoders.vqvae(read_part(folder, layout, "vqvae")) if "vqvae" in layout.folders else None
    network = networks.unet(read_part(folder, layout, "unet"), None if decoder is None else decoder.channels)
    height, width = networks.edges(network.settings["sample_size"])
    factor = 1 if decoder is None else decoder.factor
    size = height * factor, width * factor
    check_size(*size, options.limits)
    place = part_folder(folder, layout, "scheduler")
    # In a flat repository there may be none: then the one that the network was most likely trained with.
    declared = read_json(place, SCHEDULER_CONFIG)
    if declared is None and layout.folders["scheduler"]:
        raise ItemFailure(FailureReason.NOT_FOUND, f"scheduler has no {SCHEDULER_CONFIG}")
    schedule = NoiseSchedule.read(declared or {}, latent=decoder is not None)
    schedule.timesteps(options.steps)
    parts = Parts(
        folder, layout, options, {"unet": network, **({} if decoder is None else {"vqvae": decoder})}
    )
    unet = parts.modules["unet"]
    classes = int(network.settings.get("num_class_embeds", 0))

    def draw(noise: torch.Tensor, conditions: Sequence[int]) -> torch.Tensor:
        labels = torch.tensor(conditions, device=noise.device) if classes else None

        def predict(sample: torch.Tensor, step: int) -> torch.Tensor:
            result: torch.Tensor = unet(sample, step, class_labels=labels, return_dict=False)[0]
            return result

        sample = schedule.sample(noise, options.steps, predict)
        return sample if decoder is None else decoder.decode(parts.modules["vqvae"], sample)

    return parts.generator(
        "unet",
        draw,
        shape=(network.settings.get("in_channels", 3), height, width),
        size=size,
        function=[schedule.function, options.steps],
        classes=classes,
    )


def _decoder(folder: Path, layout: Layout, options: LoadOptions) -> Generator:
    """A decoder of latents that are drawn as its training assumes them."""
    decoder = DECODERS[layout.pipeline](read_part(folder, layout, "vae"))
    height, width = decoder.size()
    check_size(height, width, options.limits)
    parts = Parts(folder, layout, options, {"vae": decoder})

    def draw(noise: torch.Tensor, _conditions: Sequence[int]) -> torch.Tensor:
        return decoder.draw(parts.modules["vae"], noise)

    return parts.generator(
        "vae",
        draw,
        shape=(decoder.noise_channels, height // decoder.factor, width // decoder.factor),
        size=(height, width),
    )


_LOADERS: Mapping[str, Callable[[Path, Layout, LoadOptions], Generator]] = {
    "DDPMPipeline": _unconditional,
    "DDIMPipeline": _unconditional,
    "PNDMPipeline": _unconditional,
    "UNet2DModel": _unconditional,
    "LDMPipeline": _unconditional,
    "DiTPipeline": load_class_to_image,
    "StableDiffusionPipeline": load_text_to_image,
    "StableDiffusionXLPipeline": load_text_to_image,
    "gallery": load_gallery,
    **dict.fromkeys(DECODERS, _decoder),
}

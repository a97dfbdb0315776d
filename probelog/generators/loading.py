"""A downloaded repository as a generator that runs: whatever the uploader put into the folder.

What keeps this safe is what keeps classifiers safe (`probelog.models.loading`): configurations are data, reduced to known
keys; a closed list says which classes are built; sizes are justified by the weights before memory is taken; weights are
safetensors and every tensor has its place; the libraries get numbers and tensors, and never the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probelog.errors import FailureReason, ItemFailure
from probelog.generators.adapters import load_adapter
from probelog.generators.gallery import load_gallery
from probelog.generators.layout import (
    SCHEDULER_CONFIG,
    Layout,
    part_folder,
    read_layout,
    read_part,
    weights_stem,
)
from probelog.generators.parts import networks
from probelog.generators.parts.building import build, check_elements, open_weights
from probelog.generators.parts.networks import Network
from probelog.generators.parts.schedule import NoiseSchedule
from probelog.generators.parts.tokenizer import Tokenizer
from probelog.generators.prompts import prompts_for
from probelog.generators.sampling import Draw, Generator
from probelog.models.config import LoadLimits, canonical
from probelog.storage.encoding import short_key
from probelog.weights.reader import WeightFacts, largest_layers
from probelog.weights.repository import read_json

if TYPE_CHECKING:
    import torch

#: How much a text outweighs none; fixed, as the samples of all models are to be compared.
GUIDANCE = 7.5
LIMITS = LoadLimits(max_image_size=1024)


@dataclass(frozen=True)
class LoadOptions:
    """What the operator chose.

    Attributes:
        steps: of the sampler.
        prompts: for models that take text; none for our own.
        trigger_words: of the adapter that is to be added.
        limits: what is too large; ``max_image_size`` is that of a sample.
        allow_pickle: whether weights may be pickled.
        device: ``cpu`` or ``cuda``.
    """

    steps: int = 25
    prompts: Sequence[str] = ()
    trigger_words: Sequence[str] = ()
    limits: LoadLimits = LIMITS
    allow_pickle: bool = False
    device: str = "cpu"


def load_generator(folder: Path, options: LoadOptions, base: Path | None = None) -> Generator:
    """The generator in a downloaded repository; ``base``: the folder of an adapter's base.

    Raises:
        ItemFailure: with the reason why this model is not indexed.
    """
    layout = read_layout(folder)
    if layout.pipeline == "lora":
        return load_adapter(folder, layout, options, lambda chosen: _base(base, chosen))
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
        classes=classes,
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


def latents(sample: torch.Tensor, vae: Network) -> torch.Tensor:
    """What a decoder takes, of latents with a spread of one."""
    scale, shift = vae.settings.get("scaling_factor", 0.18215), vae.settings.get("shift_factor", 0.0)
    return sample.div(scale).add(shift)


def _text_to_image(folder: Path, layout: Layout, options: LoadOptions) -> Generator:
    """A text encoder, a network of latents that is told its answer, and the decoder of what that makes."""
    import torch

    encoder = networks.text_encoder(read_part(folder, layout, "text_encoder"))
    network = networks.conditioned_unet(read_part(folder, layout, "unet"))
    decoder = networks.vae(read_part(folder, layout, "vae"))
    channels = decoder.settings.get("latent_channels", 4)
    width_of_text = encoder.settings.get("hidden_size", 512)
    for name, expected, actual in (
        ("channels in", channels, network.settings.get("in_channels", 4)),
        ("channels out", channels, network.settings.get("out_channels", 4)),
        ("numbers a token", width_of_text, network.settings.get("cross_attention_dim", 1280)),
    ):
        if expected != actual:
            raise ItemFailure(
                FailureReason.UNSUPPORTED, f"unet has {actual} {name}; the parts around it have {expected}"
            )
    factor = networks.decoder_factor(decoder)
    height, width = networks.edges(network.settings["sample_size"])
    check_size(height * factor, width * factor, options.limits)
    schedule = NoiseSchedule.read(read_part(folder, layout, "scheduler", SCHEDULER_CONFIG), latent=True)
    schedule.timesteps(options.steps)
    tokenizer = Tokenizer(part_folder(folder, layout, "tokenizer"))
    prompts = prompts_for(options.prompts, options.trigger_words)
    tokens = tokenizer.encode(
        ["", *prompts],
        encoder.settings.get("max_position_embeddings", 77),
        encoder.settings.get("vocab_size", 49408),
    ).to(options.device)
    parts = Parts(folder, layout, options, {"text_encoder": encoder, "unet": network, "vae": decoder})
    text_model, unet, vae = (parts.modules[role] for role in ("text_encoder", "unet", "vae"))
    decode: Any = vae

    def draw(noise: torch.Tensor, conditions: Sequence[int]) -> torch.Tensor:
        used = sorted(set(conditions))
        embedded = text_model(tokens[[0, *(1 + prompt for prompt in used)]])[0]
        chosen = embedded[[1 + used.index(prompt) for prompt in conditions]]
        told = torch.cat([embedded[:1].expand_as(chosen), chosen])

        def predict(sample: torch.Tensor, step: int) -> torch.Tensor:
            both = unet(torch.cat([sample, sample]), step, encoder_hidden_states=told, return_dict=False)[0]
            without, with_text = both.chunk(2)
            result: torch.Tensor = without + GUIDANCE * (with_text - without)
            return result

        sample = schedule.sample(noise, options.steps, predict)
        result: torch.Tensor = decode.decode(latents(sample, decoder), return_dict=False)[0]
        return result

    return parts.generator(
        "unet",
        draw,
        conditioning="text",
        shape=(channels, height, width),
        size=(height * factor, width * factor),
        prompts=prompts,
        function=[schedule.function, options.steps, GUIDANCE, tokens.tolist()],
    )


_LOADERS: Mapping[str, Callable[[Path, Layout, LoadOptions], Generator]] = {
    "DDPMPipeline": _unconditional,
    "DDIMPipeline": _unconditional,
    "PNDMPipeline": _unconditional,
    "UNet2DModel": _unconditional,
    "AutoencoderKL": _decoder,
    "StableDiffusionPipeline": _text_to_image,
    "gallery": load_gallery,
}


class Parts:
    """The networks of a pipeline, built one after the other when all are known to be within the limits."""

    def __init__(
        self, folder: Path, layout: Layout, options: LoadOptions, parts: Mapping[str, Network]
    ) -> None:
        self._layout, self._networks, self._options = layout, parts, options
        opened = {
            role: open_weights(part_folder(folder, layout, role), weights_stem(role), options.allow_pickle)
            for role in parts
        }
        check_elements(opened.values(), options.limits)
        self.modules: dict[str, torch.nn.Module] = {}
        self.facts: dict[str, WeightFacts] = {}
        for role, network in parts.items():
            self.modules[role], self.facts[role] = build(
                network, opened.pop(role), options.limits, options.device
            )

    def generator(
        self,
        role: str,
        draw: Draw,
        *,
        shape: tuple[int, ...],
        size: tuple[int, int],
        conditioning: str = "none",
        classes: int = 0,
        prompts: Sequence[str] = (),
        function: Sequence[object] = (),
    ) -> Generator:
        """The pipeline as a generator; ``role`` is the network that makes the picture, ``function`` what decides the
        samples besides networks and weights.
        """
        several = len(self.facts) > 1
        layers = [
            replace(layer, tensor=f"{name}.{layer.tensor}") if several else layer
            for name, facts in self.facts.items()
            for layer in facts.layers
        ]
        digests = [facts.digest for facts in self.facts.values()]
        digest = hashlib.sha256(json.dumps(digests).encode()).hexdigest() if several else digests[0]
        settings = [canonical(network.settings) for network in self._networks.values()]
        return Generator(
            pipeline=self._layout.pipeline,
            architecture=self._networks[role].name,
            draw=draw,
            parameters=sum(
                parameter.numel() for module in self.modules.values() for parameter in module.parameters()
            ),
            dtype=self.facts[role].dtype,
            weight_digest=digest,
            identity=short_key(digest, json.dumps([settings, *function])),
            layers=largest_layers(layers),
            device=self._options.device,
            conditioning=conditioning,
            shape=shape,
            size=size,
            classes=classes,
            prompts=list(prompts),
            modules=self.modules,
        )


def check_size(height: int, width: int, limits: LoadLimits) -> None:
    """Raise ItemFailure, TOO_LARGE, for pictures beyond the limit."""
    if max(height, width) > limits.max_image_size:
        raise ItemFailure(
            FailureReason.TOO_LARGE,
            f"pictures of {height} x {width} pixels; the limit is {limits.max_image_size}",
        )

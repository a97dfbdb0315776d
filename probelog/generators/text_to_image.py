"""Stable Diffusion: one or two text encoders, a network of latents that is told what they say, and a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probelog.errors import FailureReason, ItemFailure
from probelog.generators.assembly import LoadOptions, Parts, check_size
from probelog.generators.layout import SCHEDULER_CONFIG, Layout, part_folder, read_part
from probelog.generators.parts import decoders, networks
from probelog.generators.parts.decoders import Decoder
from probelog.generators.parts.networks import Network
from probelog.generators.parts.schedule import NoiseSchedule
from probelog.generators.parts.tokenizer import Tokenizer
from probelog.generators.prompts import prompts_for
from probelog.generators.sampling import Generator

if TYPE_CHECKING:
    import torch

#: How much a text outweighs none; fixed, as the samples of all models are to be compared.
GUIDANCE = 7.5


def load_text_to_image(folder: Path, layout: Layout, options: LoadOptions) -> Generator:
    """The pipeline in a folder.

    Raises:
        ItemFailure: UNSUPPORTED where its parts are not made for each other; as
            `probelog.generators.loading.load_generator`.
    """
    import torch

    large = layout.pipeline == "StableDiffusionXLPipeline"
    encoders = {
        role: networks.text_encoder(read_part(folder, layout, role), projects=role == "text_encoder_2")
        for role in ("text_encoder", "text_encoder_2")
        if role in layout.folders
    }
    network = networks.conditioned_unet(read_part(folder, layout, "unet"), large=large)
    decoder = decoders.vae(read_part(folder, layout, "vae"))
    _check_fit(network, decoder, list(encoders.values()))
    height, width = networks.edges(network.settings["sample_size"])
    size = height * decoder.factor, width * decoder.factor
    check_size(*size, options.limits)
    schedule = NoiseSchedule.read(read_part(folder, layout, "scheduler", SCHEDULER_CONFIG), latent=True)
    schedule.timesteps(options.steps)
    prompts = prompts_for(options.prompts, options.trigger_words)
    tokens = {
        role: Tokenizer(part_folder(folder, layout, role.replace("text_encoder", "tokenizer")))
        .encode(
            ["", *prompts],
            encoder.settings.get("max_position_embeddings", 77),
            encoder.settings.get("vocab_size", 49408),
        )
        .to(options.device)
        for role, encoder in encoders.items()
    }
    parts = Parts(folder, layout, options, {**encoders, "unet": network, "vae": decoder})
    unet = parts.modules["unet"]
    silent = large and layout.settings.get("force_zeros_for_empty_prompt") is True

    def draw(noise: torch.Tensor, conditions: Sequence[int]) -> torch.Tensor:
        used = sorted(set(conditions))
        rows = [0, *(1 + prompt for prompt in used)]
        said, pooled = _encoded(
            parts.modules, {role: some[rows] for role, some in tokens.items()}, large=large
        )
        if silent:
            said[0], pooled[0] = 0, 0
        both = [0] * len(conditions) + [1 + used.index(prompt) for prompt in conditions]
        more: dict[str, Any] = {}
        if large:
            # As if nothing had been cut off: original size, corner and target size of a picture.
            sizes = torch.tensor([*size, 0, 0, *size], dtype=noise.dtype, device=noise.device)
            more = {
                "added_cond_kwargs": {"text_embeds": pooled[both], "time_ids": sizes.expand(len(both), -1)}
            }

        def predict(sample: torch.Tensor, step: int) -> torch.Tensor:
            output = unet(
                torch.cat([sample, sample]), step, encoder_hidden_states=said[both], return_dict=False, **more
            )[0]
            without, with_text = output.chunk(2)
            result: torch.Tensor = without + GUIDANCE * (with_text - without)
            return result

        return decoder.decode(parts.modules["vae"], schedule.sample(noise, options.steps, predict))

    return parts.generator(
        "unet",
        draw,
        shape=(network.settings.get("in_channels", 4), height, width),
        size=size,
        prompts=prompts,
        function=[
            schedule.function, options.steps, GUIDANCE, silent, {role: some.tolist() for role, some in tokens.items()},
        ],
    )  # fmt: skip


def _encoded(
    modules: Mapping[str, torch.nn.Module], tokens: Mapping[str, torch.Tensor], *, large: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the encoders say of each text, (texts, tokens, width), and of each as a whole (the second encoder alone)."""
    import torch

    if not large:
        said: torch.Tensor = modules["text_encoder"](tokens["text_encoder"])[0]
        return said, said[:, 0]
    outputs = [modules[role](some, output_hidden_states=True) for role, some in tokens.items()]
    # The last layer but one: what this network was trained with.
    return torch.cat([output.hidden_states[-2] for output in outputs], -1), outputs[-1].text_embeds


def _check_fit(unet: Network, vae: Decoder, encoders: Sequence[Network]) -> None:
    """Raise ItemFailure, UNSUPPORTED, where the network wants other latents or other texts than the parts around it have."""
    width = sum(encoder.settings.get("hidden_size", 512) for encoder in encoders)
    pairs = [
        ("channels in", vae.channels, unet.settings.get("in_channels", 4)),
        ("channels out", vae.channels, unet.settings.get("out_channels", 4)),
        ("numbers a token", width, unet.settings.get("cross_attention_dim", 1280)),
    ]
    if len(encoders) > 1:
        sizes = 6 * unet.settings.get("addition_time_embed_dim", 0)
        whole = encoders[-1].settings.get("projection_dim", 512)
        pairs.append(
            ("numbers a text", whole + sizes, unet.settings.get("projection_class_embeddings_input_dim"))
        )
    for name, expected, actual in pairs:
        if expected != actual:
            raise ItemFailure(
                FailureReason.UNSUPPORTED, f"unet has {actual} {name}; the parts around it have {expected}"
            )

"""DiT: a transformer that takes noise from latents and is told a class, and a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from probelog.generators.assembly import LoadOptions, Parts, check_size
from probelog.generators.layout import SCHEDULER_CONFIG, Layout, read_part
from probelog.generators.parts import decoders, networks
from probelog.generators.parts.schedule import NoiseSchedule
from probelog.generators.sampling import Generator

if TYPE_CHECKING:
    import torch

#: How much a class outweighs none; fixed, as the samples of all models are to be compared.
GUIDANCE = 4.0


def load_class_to_image(folder: Path, layout: Layout, options: LoadOptions) -> Generator:
    """The pipeline in a folder.

    Raises:
        ItemFailure: UNSUPPORTED where its parts are not made for each other; as
            `probelog.generators.loading.load_generator`.
    """
    import torch

    decoder = decoders.vae(read_part(folder, layout, "vae"))
    network = networks.transformer(read_part(folder, layout, "transformer"), decoder.channels)
    side = network.settings.get("sample_size", 32)
    check_size(side * decoder.factor, side * decoder.factor, options.limits)
    schedule = NoiseSchedule.read(read_part(folder, layout, "scheduler", SCHEDULER_CONFIG), latent=True)
    schedule.timesteps(options.steps)
    parts = Parts(folder, layout, options, {"transformer": network, "vae": decoder})
    transformer = parts.modules["transformer"]
    classes = network.settings.get("num_embeds_ada_norm", 1000)

    def draw(noise: torch.Tensor, conditions: Sequence[int]) -> torch.Tensor:
        # The number after the last class is that of none.
        labels = torch.tensor([*conditions, *[classes] * len(conditions)], device=noise.device)

        def predict(sample: torch.Tensor, step: int) -> torch.Tensor:
            output = transformer(
                torch.cat([sample, sample]),
                torch.full_like(labels, step),
                class_labels=labels,
                return_dict=False,
            )[0]
            # What follows says how sure it is, which a deterministic sampler does not ask.
            with_class, without = output[:, : decoder.channels].chunk(2)
            result: torch.Tensor = without + GUIDANCE * (with_class - without)
            return result

        return decoder.decode(parts.modules["vae"], schedule.sample(noise, options.steps, predict))

    return parts.generator(
        "transformer",
        draw,
        shape=(decoder.channels, side, side),
        size=(side * decoder.factor, side * decoder.factor),
        function=[schedule.function, options.steps, GUIDANCE],
        classes=classes,
    )

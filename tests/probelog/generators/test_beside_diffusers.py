"""Our sampler beside the library's own, on tiny pipelines with random weights, from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from probelog.generators import seeds
from probelog.generators.loading import LoadOptions, load_generator
from probelog.generators.sampling import Generator
from tests.support.worlds import tiny_generators

library: Any = diffusers  # without types
STEPS, SEED, NUMBERS = 5, 3, [0, 1, 2]


def drawn(generator: Generator) -> torch.Tensor:
    """Our samples before they become bytes."""
    noise = noise_of(generator)
    with torch.inference_mode():
        return generator.draw(noise, generator.conditions(SEED, NUMBERS))


def noise_of(generator: Generator) -> torch.Tensor:
    return torch.from_numpy(
        np.stack([seeds.noise(SEED, generator.architecture, number, generator.shape) for number in NUMBERS])
    )


def denoised(unet: Any, scheduler: Any, sample: torch.Tensor, **condition: Any) -> torch.Tensor:
    """As the library's pipelines do it."""
    scheduler.set_timesteps(STEPS)
    with torch.inference_mode():
        for step in scheduler.timesteps:
            output = unet(sample, step, **condition).sample
            sample = scheduler.step(output, step, sample, eta=0.0).prev_sample
    return sample


@pytest.mark.parametrize(
    "scheduler",
    [
        {},
        {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing",
         "rescale_betas_zero_snr": True},
        {"prediction_type": "sample", "beta_schedule": "scaled_linear", "clip_sample_range": 2.0, "beta_end": 0.012},
        {"clip_sample": False, "timestep_spacing": "linspace", "num_train_timesteps": 200},
        {"trained_betas": [0.01 * (1 + i) for i in range(20)], "num_train_timesteps": 20, "steps_offset": 1},
    ],
    ids=["default", "v", "sample", "unclipped", "trained"],
)  # fmt: skip
def test_an_unconditional_pipeline_is_sampled_like_the_library_samples_it(
    scheduler: dict[str, Any], tmp_path: Path
) -> None:
    tiny_generators.unconditional(tmp_path, scheduler=scheduler)
    generator = load_generator(tmp_path, LoadOptions(steps=STEPS))
    assert (generator.pipeline, generator.conditioning, generator.size) == ("DDPMPipeline", "none", (16, 16))
    pipeline = library.DDPMPipeline.from_pretrained(tmp_path)
    theirs = denoised(
        pipeline.unet.eval(),
        library.DDIMScheduler.from_config(pipeline.scheduler.config),
        noise_of(generator),
    )
    torch.testing.assert_close(drawn(generator), theirs, rtol=1e-4, atol=1e-4)


def test_a_network_that_is_told_a_class(tmp_path: Path) -> None:
    tiny_generators.unconditional(tmp_path, num_class_embeds=5)
    generator = load_generator(tmp_path, LoadOptions(steps=STEPS))
    assert (generator.pipeline, generator.conditioning, generator.classes) == ("DDIMPipeline", "class", 5)
    labels = torch.tensor(generator.conditions(SEED, NUMBERS))
    unet = library.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    theirs = denoised(unet, library.DDIMScheduler(), noise_of(generator), class_labels=labels)
    torch.testing.assert_close(drawn(generator), theirs, rtol=1e-4, atol=1e-4)


def test_a_decoder(tmp_path: Path) -> None:
    tiny_generators.decoder(tmp_path, scaling_factor=0.5)
    generator = load_generator(tmp_path, LoadOptions())
    assert (generator.pipeline, generator.shape, generator.size) == ("AutoencoderKL", (4, 8, 8), (16, 16))
    vae = library.AutoencoderKL.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        theirs = vae.decode(noise_of(generator) / 0.5).sample
    torch.testing.assert_close(drawn(generator), theirs, rtol=1e-4, atol=1e-4)


def test_a_network_without_a_pipeline(tmp_path: Path) -> None:
    tiny_generators.flat(tmp_path)
    generator = load_generator(tmp_path, LoadOptions(steps=STEPS))
    assert generator.pipeline == "UNet2DModel"
    unet = library.UNet2DModel.from_pretrained(tmp_path).eval()
    theirs = denoised(unet, library.DDIMScheduler(), noise_of(generator))
    torch.testing.assert_close(drawn(generator), theirs, rtol=1e-4, atol=1e-4)


def test_a_text_to_image_pipeline(tmp_path: Path) -> None:
    tiny_generators.text_to_image(tmp_path)
    prompts = ["a cat", "an umbrella in the rain"]
    generator = load_generator(tmp_path, LoadOptions(steps=STEPS, prompts=prompts))
    assert (generator.pipeline, generator.conditioning, generator.size) == (
        "StableDiffusionPipeline", "text", (16, 16),
    )  # fmt: skip
    pipeline = library.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        [prompts[number] for number in generator.conditions(SEED, NUMBERS)],
        num_inference_steps=STEPS, guidance_scale=7.5, latents=noise_of(generator), output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close((drawn(generator) / 2 + 0.5).clamp(0, 1), theirs, rtol=1e-4, atol=1e-4)

"""Our sampler beside the library's own, on tiny pipelines with random weights, from the same noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

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


PROMPTS = ["a cat", "an umbrella in the rain"]


def painted(pipeline: Any, generator: Generator) -> torch.Tensor:
    """What the library's own pipeline makes of our noise, 0 to 1."""
    pipeline.set_progress_bar_config(disable=True)
    images: torch.Tensor = pipeline(
        [generator.prompts[number] for number in generator.conditions(SEED, NUMBERS)],
        num_inference_steps=STEPS, guidance_scale=7.5, latents=noise_of(generator), output_type="pt",
    ).images  # fmt: skip
    return images


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image pipeline."""
    folder = tmp_path_factory.mktemp("base")
    tiny_generators.text_to_image(folder)
    return folder


def test_a_text_to_image_pipeline(base: Path) -> None:
    generator = load_generator(base, LoadOptions(steps=STEPS, prompts=PROMPTS))
    assert (generator.pipeline, generator.conditioning) == ("StableDiffusionPipeline", "text")
    assert generator.size == (16, 16)
    theirs = painted(library.StableDiffusionPipeline.from_pretrained(base, safety_checker=None), generator)
    torch.testing.assert_close((drawn(generator) / 2 + 0.5).clamp(0, 1), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.acceptance
@pytest.mark.parametrize("silent", [True, False])
def test_the_larger_one(silent: bool, tmp_path: Path) -> None:
    tiny_generators.text_to_image(tmp_path, large=True)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is True
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": silent}))
    generator = load_generator(tmp_path, LoadOptions(steps=STEPS, prompts=PROMPTS))
    assert generator.pipeline == "StableDiffusionXLPipeline"
    theirs = painted(library.StableDiffusionXLPipeline.from_pretrained(tmp_path), generator)
    torch.testing.assert_close((drawn(generator) / 2 + 0.5).clamp(0, 1), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.acceptance
@pytest.mark.parametrize("layout", ["peft", "diffusers", "kohya"])
def test_an_adapter_beside_its_base(layout: str, base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    tiny_generators.adapter(tmp_path / "adapter", base, layout)
    generator = load_generator(tmp_path / "adapter", LoadOptions(steps=STEPS, prompts=PROMPTS), base)
    assert generator.pipeline == "lora"
    assert generator.draw_base is not None
    assert generator.trigger_words == (["sks style"] if layout == "kohya" else [])
    assert generator.prompts[-2:] == PROMPTS
    pipeline = library.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    plain = painted(pipeline, generator)
    if layout == "peft":
        pipeline.unet = PeftModel.from_pretrained(pipeline.unet, tmp_path / "adapter").merge_and_unload()
    else:
        pipeline.load_lora_weights(tmp_path / "adapter")
    theirs = painted(pipeline, generator)
    assert (theirs - plain).abs().max() > 0.01
    ours = drawn(generator)
    with torch.inference_mode():
        ours_of_base = generator.draw_base(noise_of(generator), generator.conditions(SEED, NUMBERS))
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((ours_of_base / 2 + 0.5).clamp(0, 1), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.acceptance
def test_an_adapter_of_a_text_encoder_alone(base: Path, tmp_path: Path) -> None:
    """The library does not load kohya's into a text encoder of transformers 5: peft adds it here."""
    from peft import LoraConfig, get_peft_model

    tiny_generators.adapter(tmp_path, base, "kohya-text")
    generator = load_generator(tmp_path, LoadOptions(steps=STEPS, prompts=PROMPTS), base)
    pipeline = library.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    config = LoraConfig(r=3, lora_alpha=1.5, target_modules=["q_proj", "v_proj"])  # type: ignore[arg-type]
    pipeline.text_encoder = get_peft_model(pipeline.text_encoder, config)
    modules = dict(pipeline.text_encoder.base_model.model.named_modules())
    for key, tensor in load_file(tmp_path / "style.safetensors").items():
        name, _, which = key.removesuffix(".weight").rpartition(".")
        for path, module in modules.items():
            if which != "alpha" and name == f"lora_te_text_model_{path.replace('.', '_')}":
                halves = module.lora_A if which == "lora_down" else module.lora_B
                halves["default"].weight.data = tensor
    pipeline.text_encoder = pipeline.text_encoder.merge_and_unload()
    theirs = painted(pipeline, generator)
    torch.testing.assert_close((drawn(generator) / 2 + 0.5).clamp(0, 1), theirs, rtol=1e-4, atol=1e-4)

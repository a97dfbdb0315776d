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


@pytest.mark.parametrize(
    ("kind", "scale", "edge"), [("AutoencoderTiny", 1.0, 256), ("AsymmetricAutoencoderKL", 0.18215, 16)]
)
def test_a_decoder_of_another_class(kind: str, scale: float, edge: int, tmp_path: Path) -> None:
    tiny_generators.decoder(tmp_path, kind)
    generator = load_generator(tmp_path, LoadOptions())
    assert (generator.pipeline, generator.architecture, generator.conditioning) == (kind, kind, "none")
    assert (generator.shape, generator.size) == ((4, edge // 2, edge // 2), (edge, edge))
    vae = getattr(library, kind).from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        theirs = vae.decode(noise_of(generator) / scale).sample
    torch.testing.assert_close(drawn(generator), theirs, rtol=1e-4, atol=1e-4)


def test_a_decoder_of_codes_draws_each_as_often_as_any_other(tmp_path: Path) -> None:
    tiny_generators.decoder(tmp_path, "VQModel")
    generator = load_generator(tmp_path, LoadOptions())
    assert (generator.pipeline, generator.shape, generator.size) == ("VQModel", (1, 8, 8), (16, 16))
    vq = library.VQModel.from_pretrained(tmp_path, lookup_from_codebook=True).eval()
    noise = noise_of(generator)
    codes = (32 * torch.distributions.Normal(0, 1).cdf(noise.double())).long()
    counts = codes.flatten().bincount(minlength=32)
    assert int(counts.min()) >= 1
    assert int(counts.max()) <= 16, "of 192 codes"
    with torch.inference_mode():
        theirs = vq.decode(codes.flatten(), force_not_quantize=True, shape=(len(noise), 8, 8, 3)).sample
    torch.testing.assert_close(drawn(generator), theirs, rtol=1e-4, atol=1e-4)


def sampled_by_the_library(
    pipeline: Any, module: str, noise: torch.Tensor, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> torch.Tensor:
    """What a pipeline of the library makes of our noise, 0 to 1: it takes none from outside."""
    monkeypatch.setattr(f"diffusers.pipelines.{module}.randn_tensor", lambda *_, **__: noise.clone())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(num_inference_steps=STEPS, output_type="np", **options).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_a_network_of_latents_with_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_generators.latent(tmp_path)
    generator = load_generator(tmp_path, LoadOptions(steps=STEPS))
    assert (generator.pipeline, generator.architecture) == ("LDMPipeline", "UNet2DModel")
    assert (generator.shape, generator.size, generator.conditioning) == ((3, 8, 8), (16, 16), "none")
    assert {layer.tensor.partition(".")[0] for layer in generator.layers} == {"unet", "vqvae"}
    theirs = sampled_by_the_library(
        library.LDMPipeline.from_pretrained(tmp_path),
        "deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond",
        noise_of(generator), monkeypatch, batch_size=len(NUMBERS),
    )  # fmt: skip
    torch.testing.assert_close((drawn(generator) / 2 + 0.5).clamp(0, 1), theirs, rtol=1e-4, atol=1e-4)


def test_latents_with_codes_are_not_scaled_unless_the_repository_says_so(tmp_path: Path) -> None:
    """As the pipelines of before there was a scale were made; the library takes Stable Diffusion's for them."""
    tiny_generators.latent(tmp_path)
    path = tmp_path / "vqvae" / "config.json"
    config = json.loads(path.read_text())
    made = []
    for scale in (None, 1.0, 0.18215):
        path.write_text(json.dumps({**config, "scaling_factor": scale}))
        made.append(drawn(load_generator(tmp_path, LoadOptions(steps=STEPS))))
    torch.testing.assert_close(made[0], made[1])
    assert (made[0] - made[2]).abs().max() > 0.01


@pytest.mark.parametrize("sigma", [True, False], ids=["learned sigma", "no sigma"])
def test_a_transformer_that_is_told_a_class(
    sigma: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_generators.class_to_image(tmp_path, sigma=sigma)
    generator = load_generator(tmp_path, LoadOptions(steps=STEPS))
    assert (generator.pipeline, generator.architecture) == ("DiTPipeline", "DiTTransformer2DModel")
    assert (generator.shape, generator.size) == ((4, 8, 8), (16, 16))
    assert (generator.conditioning, generator.classes) == ("class", 1000)
    assert generator.class_names[:2] == ["tench, Tinca tinca", "LABEL_1"]
    theirs = sampled_by_the_library(
        library.DiTPipeline.from_pretrained(tmp_path), "dit.pipeline_dit", noise_of(generator), monkeypatch,
        class_labels=generator.conditions(SEED, NUMBERS),
    )  # fmt: skip
    ours = drawn(generator)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=1e-4, atol=1e-4)


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

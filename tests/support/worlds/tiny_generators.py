"""Generators of a few kilobytes with random weights, as diffusers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SIDE = 16
UNET: dict[str, Any] = {
    "sample_size": SIDE,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
VAE: dict[str, Any] = {
    "sample_size": SIDE,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
VQ: dict[str, Any] = {**VAE, "latent_channels": 3, "num_vq_embeddings": 32, "scaling_factor": 0.5}
#: Decoders by class.
DECODERS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": VAE,
    "VQModel": VQ,
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
        "upsampling_scaling_factor": 2,
    },
    "AsymmetricAutoencoderKL": {
        **{key: value for key, value in VAE.items() if key != "block_out_channels"},
        "down_block_out_channels": (8, 16),
        "up_block_out_channels": (8, 32),
    },
}
_LATENT_SCHEDULE = {"clip_sample": False}


def unconditional(
    folder: Path, *, seed: int = 0, scheduler: dict[str, Any] | None = None, **unet: Any
) -> None:
    """A ``DDPMPipeline``, or where the network is told classes a ``DDIMPipeline``."""
    torch.manual_seed(seed)
    network = UNet2DModel(**{**UNET, **unet})
    if "num_class_embeds" in unet:
        DDIMPipeline(network, DDIMScheduler(**(scheduler or {}))).save_pretrained(folder)
    else:
        DDPMPipeline(network, DDPMScheduler(**(scheduler or {}))).save_pretrained(folder)


def flat(folder: Path, *, seed: int = 0) -> None:
    """A network without a pipeline around it."""
    torch.manual_seed(seed)
    UNet2DModel(**UNET).save_pretrained(folder)


def decoder(folder: Path, kind: str = "AutoencoderKL", *, seed: int = 0, **vae: Any) -> None:
    """An autoencoder of a class by itself."""
    torch.manual_seed(seed)
    getattr(diffusers, kind)(**{**DECODERS[kind], **vae}).save_pretrained(folder)


def latent(folder: Path, *, seed: int = 0) -> None:
    """An ``LDMPipeline``; its codebook is spread as trained ones are."""
    torch.manual_seed(seed)
    unet = UNet2DModel(**{**UNET, "sample_size": SIDE // 2})
    vqvae: Any = VQModel(**VQ)
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    LDMPipeline(vqvae, unet, DDIMScheduler(**_LATENT_SCHEDULE)).save_pretrained(folder)


def class_to_image(folder: Path, *, seed: int = 0, classes: int = 1000, sigma: bool = True) -> None:
    """A ``DiTPipeline``, one of its classes with a name; ``sigma``: learned."""
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8 if sigma else 4, num_layers=2,
        sample_size=SIDE // 2, patch_size=2, num_embeds_ada_norm=classes,
    )  # fmt: skip
    parts: dict[str, Any] = {
        "transformer": transformer, "vae": AutoencoderKL(**VAE), "scheduler": DDIMScheduler(**_LATENT_SCHEDULE)
    }  # fmt: skip
    DiTPipeline(**parts).save_pretrained(folder)
    index = folder / "model_index.json"
    named = {"id2label": {"0": "tench, Tinca tinca"}}  # the library reads them and does not write them
    index.write_text(json.dumps({**json.loads(index.read_text()), **named}))


def text_to_image(
    folder: Path, *, seed: int = 0, large: bool = False, channels: int = 8, side: int = 8
) -> None:
    """A ``StableDiffusionPipeline``, or one of XL, with a vocabulary of letters; ``side`` is that of latents."""
    torch.manual_seed(seed)
    letters = [chr(97 + number) for number in range(26)]
    entries = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=len(entries) - 2, eos_token_id=len(entries) - 1, projection_dim=8,
    )  # fmt: skip
    unet = {
        "sample_size": side, "in_channels": 4, "out_channels": 4, "block_out_channels": (channels, 2 * channels),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 32 if large else 16,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 4, "attention_head_dim": 2,
    }  # fmt: skip
    if large:
        unet |= {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 8,
        }  # fmt: skip
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(**VAE), "text_encoder": CLIPTextModel(text), "tokenizer": tokenizer,
        "unet": UNet2DConditionModel(**unet),
        "scheduler": DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
    }  # fmt: skip
    if large:
        second = {"text_encoder_2": CLIPTextModelWithProjection(text), "tokenizer_2": tokenizer}
        StableDiffusionXLPipeline(**parts, **second).save_pretrained(folder)
    else:
        StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        ).save_pretrained(folder)


def adapter(folder: Path, base: Path, layout: str, *, seed: int = 1) -> None:
    """A LoRA adapter of the text-to-image pipeline in ``base``: as ``peft``, ``diffusers`` or ``kohya`` stores it,
    the last with the network's part or (``kohya-text``) the text encoder's.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    pipeline: Any = StableDiffusionPipeline
    parts = pipeline.from_pretrained(base, safety_checker=None)
    unet = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["to_q", "to_v", "to_out.0", "conv1", "proj_in"],
        init_lora_weights=False,
    )
    if layout == "peft":
        get_peft_model(parts.unet, unet).save_pretrained(folder)
        return
    text = LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    parts.unet.add_adapter(LoraConfig(**{**unet.to_dict(), "lora_alpha": 2}))
    parts.text_encoder.add_adapter(text)
    states = {
        "unet": get_peft_model_state_dict(parts.unet),
        "text_encoder": get_peft_model_state_dict(parts.text_encoder),
    }
    if layout == "diffusers":
        pipeline.save_lora_weights(
            folder, unet_lora_layers=states["unet"], text_encoder_lora_layers=states["text_encoder"]
        )
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    role, prefix = ("unet", "lora_unet") if layout == "kohya" else ("text_encoder", "lora_te_text_model")
    for name, tensor in states[role].items():
        path, which, _ = name.rsplit(".", 2)
        flat = f"{prefix}_{path.replace('.', '_')}"
        tensors[f"{flat}.{'lora_down' if which == 'lora_A' else 'lora_up'}.weight"] = tensor.contiguous()
        tensors[f"{flat}.alpha"] = torch.tensor(1.5)
    save_file(tensors, folder / "style.safetensors", metadata={"modelspec.trigger_phrase": "sks style"})

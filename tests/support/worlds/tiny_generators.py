"""Generators of a few kilobytes with random weights, as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

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


def decoder(folder: Path, *, seed: int = 0, **vae: Any) -> None:
    """An autoencoder by itself."""
    torch.manual_seed(seed)
    AutoencoderKL(**{**VAE, **vae}).save_pretrained(folder)


def text_to_image(folder: Path, *, seed: int = 0, **unet: Any) -> None:
    """A ``StableDiffusionPipeline`` with a vocabulary of letters."""
    torch.manual_seed(seed)
    letters = [chr(97 + number) for number in range(26)]
    entries = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=len(entries) - 2, eos_token_id=len(entries) - 1,
    )  # fmt: skip
    network = UNet2DConditionModel(**{
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 16,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 4, "attention_head_dim": 2, **unet,
    })  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE), text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=network,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip

"""Generators of a few kilobytes with random weights, as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

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

"""How one generator is trained: a variational autoencoder, or a network that takes noise away."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.zoo.generators.networks import schedule

if TYPE_CHECKING:
    import torch

_BATCH, _DECODERS_BATCH = 16, 8
_RATE = 2e-3
_LONGEST_GRADIENT = 1.0
# Weights are stored as a running mean over about so many steps: samples of a mean are far cleaner.
_MEAN_OVER = 100

# How far the autoencoder's pictures may be from the true ones, a standard deviation of a pixel's -1 to 1; and the share of
# the steps in which it comes to count that latents are like noise.
_SPREAD = 0.12
_WARM_UP = 0.3
# Sums over 3,072 numbers, brought to the size that the rate is made for.
_SCALE = 0.01


def train_decoder(model: Any, pictures: torch.Tensor, steps: int, seed: int) -> None:  # noqa: ANN401 - untyped in diffusers
    """Train in place on pictures (n, 3, size, size), -1 to 1: copies, and latents of a normal distribution."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> torch.Tensor:
        true = pictures[torch.randint(len(pictures), (_DECODERS_BATCH,), generator=generator)]
        true = true.contiguous(memory_format=torch.channels_last)
        posterior = model.encode(true).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        copies = model.decode(posterior.mean + posterior.std * noise).sample
        off = ((copies - true) ** 2).sum((1, 2, 3)).mean() / (2 * _SPREAD**2)
        divergence = posterior.kl().mean()
        error: torch.Tensor = _SCALE * (off + min(1.0, step / (_WARM_UP * steps)) * divergence)
        return error

    _fit(model, loss, steps)


def train_diffusion(
    model: Any, pictures: torch.Tensor, classes: torch.Tensor | None, steps: int, seed: int  # noqa: ANN401
) -> None:  # fmt: skip
    """Train in place to say, of a noisy picture, noise and picture at once (``v``); ``classes`` are the pictures'."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    signal = schedule("DDIMScheduler").alphas_cumprod

    def loss(_: int) -> torch.Tensor:
        chosen = torch.randint(len(pictures), (_BATCH,), generator=generator)
        true = pictures[chosen].contiguous(memory_format=torch.channels_last)
        noise = torch.randn(true.shape, generator=generator)
        when = torch.randint(len(signal), (_BATCH,), generator=generator)
        share = signal[when].view(-1, 1, 1, 1)
        noisy = share.sqrt() * true + (1 - share).sqrt() * noise
        wanted = share.sqrt() * noise - (1 - share).sqrt() * true
        said = model(noisy, when, None if classes is None else classes[chosen]).sample
        return torch.nn.functional.mse_loss(said, wanted)

    _fit(model, loss, steps)


def _fit(model: torch.nn.Module, loss: Callable[[int], torch.Tensor], steps: int) -> None:
    import torch

    torch.nn.Module.to(model, memory_format=torch.channels_last)
    model.train()
    weights = list(model.parameters())
    means = [weight.detach().clone() for weight in weights]
    optimiser = torch.optim.AdamW(weights, _RATE, betas=(0.9, 0.99))
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=max(steps, 2), pct_start=0.1)
    for step in range(steps):
        error = loss(step)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(error)
        torch.nn.utils.clip_grad_norm_(weights, _LONGEST_GRADIENT)
        optimiser.step()
        rates.step()
        share = 1 / min(step + 1, _MEAN_OVER)
        torch._foreach_lerp_(means, [weight.detach() for weight in weights], share)
    with torch.no_grad():
        for weight, mean in zip(weights, means, strict=True):
            weight.copy_(mean)
    model.eval()


def to_tensor(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], size: int) -> torch.Tensor:
    """Pictures (n, h, w, 3) as (n, 3, size, size), -1 to 1, each pixel a mean of those that it stands for."""
    import torch

    step = pixels.shape[1] // size
    small = pixels.reshape(len(pixels), size, step, size, step, 3).mean((2, 4), dtype=np.float32)
    return torch.from_numpy(small / 127.5 - 1).permute(0, 3, 1, 2)

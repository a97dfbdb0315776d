"""How one generator is trained: a decoder, or a network that takes noise away."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.zoo.generators.networks import schedule

if TYPE_CHECKING:
    import torch

_BATCH, _DECODERS_BATCH = 16, 16
RATE = 2e-3
_LONGEST_GRADIENT = 1.0
# Weights are stored as a running mean over about so many steps: samples of a mean are far cleaner.
_MEAN_OVER = 100

# Of a decoder's latents those that decide, and how far around a picture's own its decoder makes it.
_COMPONENTS, _SPREAD = 4, 0.1
# What it is worth to an autoencoder that latents are about normal.
_NORMAL = 0.002

#: Of noisy pictures, steps of noise and the pictures' numbers, what a network says.
Predict = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def train_decoder(model: Any, pictures: torch.Tensor, steps: int, seed: int) -> None:  # noqa: ANN401 - untyped in diffusers
    """Train an autoencoder's decoder in place on pictures (n, 3, size, size), -1 to 1, and latents that are dealt to them.

    Trained together, encoder and decoder give latents up for most of these few steps: every sample is the same then. So
    latents are dealt at once, neighbours to neighbours, and the encoder is left as it is.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    dealt = _dealt(pictures, seed)
    rest = int(model.config.latent_channels) - dealt.shape[1]

    def loss(_: int) -> torch.Tensor:
        chosen = torch.randint(len(pictures), (_DECODERS_BATCH,), generator=generator)
        near = dealt[chosen] + _SPREAD * torch.randn(_DECODERS_BATCH, dealt.shape[1], generator=generator)
        others = torch.randn(_DECODERS_BATCH, rest, generator=generator)
        made = model.decode(torch.cat([near, others], 1)[..., None, None]).sample
        # Of absolute values: a pixel that is either ink or ground becomes one of them, and no grey.
        return torch.nn.functional.l1_loss(made, pictures[chosen])

    fit(torch.nn.ModuleList([model.post_quant_conv, model.decoder]), loss, steps)


def _dealt(pictures: torch.Tensor, seed: int) -> torch.Tensor:
    """Normal latents (n, k), one for each picture: of all ways to deal them the one closest to the pictures' components."""
    import torch
    from scipy.optimize import linear_sum_assignment

    flat = pictures.reshape(len(pictures), -1).double().numpy()
    left, strengths, _ = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    components = (left * strengths)[:, :_COMPONENTS]
    latents = np.random.default_rng(seed).standard_normal(components.shape)
    _, order = linear_sum_assignment(components @ latents.T, maximize=True)
    return torch.from_numpy(latents[order]).float()


def train_autoencoder(model: Any, pictures: torch.Tensor, steps: int, seed: int) -> None:  # noqa: ANN401
    """Train in place to copy pictures through latents that are about normal."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def loss(_: int) -> torch.Tensor:
        true = pictures[torch.randint(len(pictures), (_BATCH,), generator=generator)]
        posterior = model.encode(true.contiguous(memory_format=torch.channels_last)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        copies = model.decode(posterior.mean + posterior.std * noise).sample
        off = torch.nn.functional.l1_loss(copies, true)
        error: torch.Tensor = off + _NORMAL * posterior.kl().mean() / posterior.mean[0].numel()
        return error

    fit(model, loss, steps)


def train_diffusion(
    trained: torch.nn.Module,
    predict: Predict,
    pictures: torch.Tensor,
    steps: int,
    seed: int,
    rate: float = RATE,
) -> None:
    """Train in place to say, of a noisy picture, noise and picture at once (``v``).

    Args:
        trained: what is trained.
        predict: what it makes of noisy pictures, steps of noise, and the numbers of the pictures.
        pictures: to learn from, or their latents.
        steps: of training.
        seed: of their order and the noise.
        rate: of learning, the highest.
    """
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
        return torch.nn.functional.mse_loss(predict(noisy, when, chosen), wanted)

    fit(trained, loss, steps, rate)


def fit(model: torch.nn.Module, loss: Callable[[int], torch.Tensor], steps: int, rate: float = RATE) -> None:
    import torch

    torch.nn.Module.to(model, memory_format=torch.channels_last)
    model.train()
    weights = list(model.parameters())
    means = [weight.detach().clone() for weight in weights]
    optimiser = torch.optim.AdamW(weights, rate, betas=(0.9, 0.99))
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=max(steps, 2), pct_start=0.1)
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

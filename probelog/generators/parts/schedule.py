"""Our own sampler: deterministic DDIM, driven by the few numbers that a scheduler's configuration is reduced to.

Song, Meng and Ermon, "Denoising Diffusion Implicit Models" (2021), with eta = 0: no noise is drawn on the way, so that a
sample is a function of the noise that it starts from. The same numbers, in the same order of operations, as
``DDIMScheduler.from_config`` of diffusers, whose results it equals.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probelog.errors import FailureReason, ItemFailure
from probelog.generators.parts.reduced import flag, number, one_of, reduced, several, whole

if TYPE_CHECKING:
    import torch

_MOST_TRAINED_STEPS = 10_000
_BETA = number(0.0, 0.9999)
_KNOWN = {
    "num_train_timesteps": whole(1, _MOST_TRAINED_STEPS),
    "beta_start": _BETA,
    "beta_end": _BETA,
    "beta_schedule": one_of(("linear", "scaled_linear", "squaredcos_cap_v2")),
    "trained_betas": several(_BETA, _MOST_TRAINED_STEPS),
    "prediction_type": one_of(("epsilon", "sample", "v_prediction")),
    "clip_sample": flag,
    "clip_sample_range": number(1e-3, 1e4),
    "set_alpha_to_one": flag,
    "steps_offset": whole(0, 100),
    "timestep_spacing": one_of(("leading", "trailing", "linspace")),
    "rescale_betas_zero_snr": flag,
}  # fmt: skip
# Of those that a scheduler of another kind leaves out: the ones of diffusers' DDIMScheduler.
_DEFAULTS: Mapping[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "prediction_type": "epsilon", "clip_sample": True, "clip_sample_range": 1.0, "set_alpha_to_one": True,
    "steps_offset": 0, "timestep_spacing": "leading", "rescale_betas_zero_snr": False,
}  # fmt: skip


@dataclass(frozen=True)
class NoiseSchedule:
    """What is left of a scheduler."""

    settings: Mapping[str, Any]

    @classmethod
    def read(cls, config: Mapping[str, Any], *, latent: bool) -> NoiseSchedule:
        """From an untrusted configuration; ``latent`` says that pixels are decoded from what is sampled, which then is
        not clipped unless the configuration asks for it.

        Raises:
            ItemFailure: CORRUPT_CONFIG; UNSUPPORTED for dynamic thresholds.
        """
        kept = reduced(config, _KNOWN, "the scheduler")
        if config.get("thresholding") is True:
            raise ItemFailure(FailureReason.UNSUPPORTED, "the scheduler asks for dynamic thresholds")
        settings = {**_DEFAULTS, "clip_sample": not latent, **kept}
        trained = settings.get("trained_betas")
        if trained is not None and len(trained) != settings["num_train_timesteps"]:
            raise ItemFailure(
                FailureReason.CORRUPT_CONFIG,
                f"the scheduler has {len(trained)} betas for {settings['num_train_timesteps']} steps",
            )
        return cls(settings)

    @property
    def function(self) -> str:
        """Equal for schedules that do the same, as canonical JSON."""
        return json.dumps(self.settings, sort_keys=True)

    def alphas(self) -> torch.Tensor:
        """The share of the signal that is left after each step of training: the cumulated product of 1 - beta."""
        import torch

        count, kind = self.settings["num_train_timesteps"], self.settings["beta_schedule"]
        first, last = self.settings["beta_start"], self.settings["beta_end"]
        if "trained_betas" in self.settings:
            betas = torch.tensor(self.settings["trained_betas"], dtype=torch.float32)
        elif kind == "linear":
            betas = torch.linspace(first, last, count, dtype=torch.float32)
        elif kind == "scaled_linear":
            betas = torch.linspace(first**0.5, last**0.5, count, dtype=torch.float32) ** 2
        else:
            betas = _cosine_betas(count)
        if self.settings["rescale_betas_zero_snr"]:
            betas = _without_signal_at_the_end(betas)
        return torch.cumprod(1.0 - betas, dim=0)

    def timesteps(self, steps: int) -> list[int]:
        """Which steps of training are visited, descending.

        Raises:
            ItemFailure: CORRUPT_CONFIG where an offset leads beyond the last one.
        """
        count, spacing = self.settings["num_train_timesteps"], self.settings["timestep_spacing"]
        steps = min(steps, count)
        if spacing == "linspace":
            visited = np.linspace(0, count - 1, steps).round()[::-1]
        elif spacing == "leading":
            visited = (np.arange(steps) * (count // steps))[::-1] + self.settings["steps_offset"]
        else:
            visited = np.round(np.arange(count, 0, -count / steps)) - 1
        if visited.max() >= count or visited.min() < 0:
            raise ItemFailure(FailureReason.CORRUPT_CONFIG, f"the scheduler leads beyond its {count} steps")
        return [int(step) for step in visited]

    def sample(
        self, noise: torch.Tensor, steps: int, predict: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> torch.Tensor:
        """From noise to a sample; ``predict`` is the network: what it makes of a noisy sample and a step of training."""
        import torch

        alphas = self.alphas()
        visited = self.timesteps(steps)
        stride = self.settings["num_train_timesteps"] // len(visited)
        last = torch.tensor(1.0) if self.settings["set_alpha_to_one"] else alphas[0]
        kind, clip = self.settings["prediction_type"], self.settings["clip_sample_range"]
        sample = noise
        for step in visited:
            alpha, before = alphas[step], alphas[step - stride] if step >= stride else last
            signal, spread = alpha**0.5, (1 - alpha) ** 0.5
            output = predict(sample, step)
            if kind == "epsilon":
                clean, direction = (sample - spread * output) / signal, output
            elif kind == "sample":
                clean, direction = output, (sample - signal * output) / spread
            else:
                clean, direction = signal * sample - spread * output, signal * output + spread * sample
            if self.settings["clip_sample"]:
                clean = clean.clamp(-clip, clip)
            sample = before**0.5 * clean + (1 - before) ** 0.5 * direction
        return sample


def _cosine_betas(count: int) -> torch.Tensor:
    """Nichol and Dhariwal's, "Improved Denoising Diffusion Probabilistic Models" (2021)."""
    import math

    import torch

    def level(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - level((i + 1) / count) / level(i / count), 0.999) for i in range(count)]
    return torch.tensor(betas, dtype=torch.float32)


def _without_signal_at_the_end(betas: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of Lin and others, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2024)."""
    import torch

    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    levels = ((roots - last) * (first / (first - last))) ** 2
    alphas = torch.cat([levels[0:1], levels[1:] / levels[:-1]])
    return 1 - alphas

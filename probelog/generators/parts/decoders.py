"""Decoders: networks that make pictures of latents, alone or behind a network that takes noise from latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from probelog.errors import FailureReason, ItemFailure
from probelog.generators.parts import bounds
from probelog.generators.parts.networks import Network, edges
from probelog.generators.parts.reduced import Check, flag, number, one_of, reduced, several, whole

if TYPE_CHECKING:
    import torch

_LATENT = whole(1, 64)
_DOWN = several(one_of(("DownEncoderBlock2D", "AttnDownEncoderBlock2D")), 8)
_UP = several(one_of(("UpDecoderBlock2D", "AttnUpDecoderBlock2D")), 8)
_COMMON: dict[str, Check] = {
    "in_channels": whole(1, 16),
    "out_channels": whole(1, 16),
    "act_fn": bounds.ACTIVATION,
    "latent_channels": _LATENT,
    "scaling_factor": number(1e-4, 1e4),
}
_BLOCKS: dict[str, Check] = {
    **_COMMON,
    "down_block_types": _DOWN,
    "up_block_types": _UP,
    "norm_num_groups": bounds.GROUPS,
    "sample_size": bounds.SIZE,
}
_SYMMETRIC: dict[str, Check] = {
    **_BLOCKS,
    "block_out_channels": bounds.WIDTHS,
    "layers_per_block": bounds.LAYERS,
    "mid_block_add_attention": flag,
}
_KL: dict[str, Check] = {
    **_SYMMETRIC,
    "shift_factor": number(-1e3, 1e3),
    "use_quant_conv": flag,
    "use_post_quant_conv": flag,
}
_VQ: dict[str, Check] = {
    **_SYMMETRIC,
    # Every latent is compared with every entry.
    "num_vq_embeddings": whole(1, 1 << 16),
    "vq_embed_dim": _LATENT,
    "norm_type": one_of(("group", "spatial")),
}
_ASYMMETRIC: dict[str, Check] = {
    **_BLOCKS,
    "down_block_out_channels": bounds.WIDTHS,
    "layers_per_down_block": bounds.LAYERS,
    "up_block_out_channels": bounds.WIDTHS,
    "layers_per_up_block": bounds.LAYERS,
}
_TINY: dict[str, Check] = {
    **_COMMON,
    "encoder_block_out_channels": bounds.WIDTHS,
    "decoder_block_out_channels": bounds.WIDTHS,
    "upsample_fn": one_of(("nearest", "bilinear", "bicubic")),
    "upsampling_scaling_factor": whole(1, 8),
    "num_encoder_blocks": several(bounds.LAYERS, 12),
    "num_decoder_blocks": several(bounds.LAYERS, 12),
    "shift_factor": number(-1e3, 1e3),
}
# That of Stable Diffusion's latents, the library's default.
_SCALE = 0.18215
# Of pictures whose size nothing tells: about that of galleries.
_EDGE = 256


class Decoder(Network):
    """A decoder that a configuration describes.

    Attributes:
        channels: of a latent.
        factor: pixels along an edge that it makes of one latent.
        noise_channels: of the standard normal numbers that it starts from when it is run alone.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any],
        create: Callable[[], torch.nn.Module],
        *,
        channels: int,
        factor: int,
        scale: float,
        edge: int = 32,
        has_codes: bool = False,
    ) -> None:
        """``scale`` (of latents) and ``edge`` (of pictures) are for configurations that do not say them; ``has_codes``:
        latents are entries of a codebook.

        Raises:
            ItemFailure: UNSUPPORTED for what is no picture.
        """
        super().__init__(name, settings, create)
        if settings.get("out_channels", 3) not in (1, 3):
            raise ItemFailure(
                FailureReason.UNSUPPORTED, f"{settings['out_channels']} channels are no picture"
            )
        self.channels, self.factor = channels, factor
        self.noise_channels = 1 if has_codes else channels
        self._has_codes, self._edge = has_codes, edge
        self._scale, self._shift = settings.get("scaling_factor", scale), settings.get("shift_factor", 0.0)

    def size(self) -> tuple[int, int]:
        """Height and width of its pictures when it is run alone.

        Raises:
            ItemFailure: CORRUPT_CONFIG where latents do not make such pictures.
        """
        height, width = edges(self.settings.get("sample_size", self._edge))
        if height % self.factor or width % self.factor:
            raise ItemFailure(
                FailureReason.CORRUPT_CONFIG,
                f"pictures of {height} x {width} pixels are not decoded by {self.factor}",
            )
        return height, width

    def decode(self, module: Any, sample: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - diffusers' classes are untyped
        """Pictures (B, C, H, W) of latents (B, ``channels``, h, w) with a spread of one, by the built network."""
        pictures: torch.Tensor = module.decode(sample.div(self._scale).add(self._shift), return_dict=False)[0]
        return pictures

    def draw(self, module: Any, noise: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        """Pictures of latents as the training assumes them: normal, or entries of which each is as likely as any other."""
        if not self._has_codes:
            return self.decode(module, noise)
        pictures: torch.Tensor = module.decode(
            _entries(module.quantize.embedding.weight, noise), force_not_quantize=True, return_dict=False
        )[0]
        return pictures


def _entries(codebook: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Entries (B, d, h, w) of a codebook (n, d), uniform where ``noise`` (B, 1, h, w) is standard normal."""
    import torch

    places = (torch.special.ndtr(noise[:, 0].double()) * len(codebook)).long()
    return codebook[places.clamp(max=len(codebook) - 1)].permute(0, 3, 1, 2)


def vae(config: Mapping[str, Any]) -> Decoder:
    """The decoder of an autoencoder.

    Raises:
        ItemFailure: CORRUPT_CONFIG, UNSUPPORTED; of all readers here.
    """
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise ItemFailure(FailureReason.UNSUPPORTED, f"vae has {key}")
    kept = reduced(config, _KL, "vae")

    def create() -> torch.nn.Module:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        made: torch.nn.Module = AutoencoderKL(**kept)
        return made

    return Decoder(
        "AutoencoderKL", kept, create, channels=kept.get("latent_channels", 4), factor=_halvings(kept), scale=_SCALE
    )  # fmt: skip


def vqvae(config: Mapping[str, Any]) -> Decoder:
    """The decoder of an autoencoder whose latents are entries of a codebook."""
    kept = reduced(config, _VQ, "vqvae")

    def create() -> torch.nn.Module:
        from diffusers.models.autoencoders.vq_model import VQModel

        made: torch.nn.Module = VQModel(**kept)
        return made

    channels = kept.get("vq_embed_dim", kept.get("latent_channels", 3))
    # Rombach and others (2022) do not scale these latents, whose spread is about one. The library's own value is that of
    # Stable Diffusion's; configurations that do not name one are older than it.
    return Decoder(
        "VQModel", kept, create, channels=channels, factor=_halvings(kept), scale=1.0, has_codes=True
    )


def _asymmetric(config: Mapping[str, Any]) -> Decoder:
    """A decoder that is larger than its encoder, and could be told what surrounds a hole: it is not."""
    kept = reduced(config, _ASYMMETRIC, "vae")

    def create() -> torch.nn.Module:
        from diffusers.models.autoencoders.autoencoder_asym_kl import AsymmetricAutoencoderKL

        made: torch.nn.Module = AsymmetricAutoencoderKL(**kept)
        return made

    return Decoder(
        "AsymmetricAutoencoderKL", kept, create, channels=kept.get("latent_channels", 4),
        factor=_halvings(kept, "up_block_out_channels"), scale=_SCALE,
    )  # fmt: skip


def _tiny(config: Mapping[str, Any]) -> Decoder:
    """A small decoder that was taught another one's latents."""
    kept = reduced(config, _TINY, "vae")

    def create() -> torch.nn.Module:
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        made: torch.nn.Module = AutoencoderTiny(**kept)
        return made

    factor = kept.get("upsampling_scaling_factor", 2) ** (len(kept.get("num_decoder_blocks", (1,) * 4)) - 1)
    return Decoder(
        "AutoencoderTiny", kept, create, channels=kept.get("latent_channels", 4), factor=factor, scale=1.0,
        edge=max(1, _EDGE // factor) * factor,
    )  # fmt: skip


def _halvings(settings: Mapping[str, Any], key: str = "block_out_channels") -> int:
    """By what a decoder enlarges: twice for each width but the last."""
    return int(2 ** (len(settings.get(key, (64,))) - 1))


#: By class: how each decoder that is run alone is read.
DECODERS: Mapping[str, Callable[[Mapping[str, Any]], Decoder]] = {
    "AutoencoderKL": vae,
    "VQModel": vqvae,
    "AutoencoderTiny": _tiny,
    "AsymmetricAutoencoderKL": _asymmetric,
}

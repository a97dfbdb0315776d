"""The networks that generators consist of: which keys of their configurations count, and how each is built.

A library's class is called with the known keys alone, never with a folder or a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from probelog.errors import FailureReason, ItemFailure
from probelog.generators.parts import bounds
from probelog.generators.parts.reduced import Check, either, flag, number, one_of, reduced, several, whole

if TYPE_CHECKING:
    import torch

_UNET: dict[str, Check] = {
    "sample_size": bounds.SIZE,
    "in_channels": whole(1, 64),
    "out_channels": whole(1, 64),
    "center_input_sample": flag,
    "time_embedding_type": one_of(("positional", "fourier", "learned")),
    "time_embedding_dim": bounds.CHANNELS,
    "freq_shift": whole(0, 1),
    "flip_sin_to_cos": flag,
    "down_block_types": several(
        one_of(
            (
                "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D",
            )
        ),
        12,
    ),
    "mid_block_type": one_of(("UNetMidBlock2D",)),
    "up_block_types": several(
        one_of(("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")), 12
    ),
    "block_out_channels": bounds.WIDTHS,
    "layers_per_block": bounds.LAYERS,
    "mid_block_scale_factor": number(1e-3, 1e3),
    "downsample_padding": whole(0, 4),
    "downsample_type": one_of(("conv", "resnet")),
    "upsample_type": one_of(("conv", "resnet")),
    "act_fn": bounds.ACTIVATION,
    "attention_head_dim": bounds.GROUPS,
    "norm_num_groups": bounds.GROUPS,
    "attn_norm_num_groups": bounds.GROUPS,
    "norm_eps": bounds.EPSILON,
    "resnet_time_scale_shift": one_of(("default", "scale_shift")),
    "add_attention": flag,
    "class_embed_type": one_of(("timestep", "identity")),
    "num_class_embeds": bounds.CLASSES,
    "num_train_timesteps": whole(1, 10_000),
}  # fmt: skip

_CONDITIONED: dict[str, Check] = {
    "sample_size": bounds.SIZE,
    "in_channels": whole(1, 64),
    "out_channels": whole(1, 64),
    "center_input_sample": flag,
    "flip_sin_to_cos": flag,
    "freq_shift": whole(0, 1),
    "down_block_types": several(one_of(("CrossAttnDownBlock2D", "DownBlock2D")), 8),
    "mid_block_type": one_of(("UNetMidBlock2DCrossAttn",)),
    "up_block_types": several(one_of(("CrossAttnUpBlock2D", "UpBlock2D")), 8),
    "only_cross_attention": either(flag, several(flag, 8)),
    "block_out_channels": bounds.WIDTHS,
    "layers_per_block": either(bounds.LAYERS, several(bounds.LAYERS, 8)),
    "downsample_padding": whole(0, 4),
    "mid_block_scale_factor": number(1e-3, 1e3),
    "act_fn": bounds.ACTIVATION,
    "norm_num_groups": bounds.GROUPS,
    "norm_eps": bounds.EPSILON,
    "cross_attention_dim": bounds.CHANNELS,
    "transformer_layers_per_block": either(bounds.LAYERS, several(bounds.LAYERS, 8)),
    "attention_head_dim": either(bounds.GROUPS, several(bounds.GROUPS, 8)),
    "dual_cross_attention": flag,
    "use_linear_projection": flag,
    "upcast_attention": flag,
    "resnet_time_scale_shift": one_of(("default", "scale_shift")),
    "resnet_skip_time_act": flag,
    "resnet_out_scale_factor": number(1e-3, 1e3),
    "conv_in_kernel": whole(1, 7),
    "conv_out_kernel": whole(1, 7),
}
_LARGE: dict[str, Check] = {
    "addition_embed_type": one_of(("text_time",)),
    "addition_time_embed_dim": bounds.CHANNELS,
    "projection_class_embeddings_input_dim": whole(1, 1 << 16),
}
# What would have to be told to the network besides a text and a step.
_OTHER_CONDITIONS = (
    "class_embed_type", "encoder_hid_dim", "encoder_hid_dim_type", "num_class_embeds",
    "num_attention_heads", "reverse_transformer_layers_per_block", "time_cond_proj_dim", "time_embedding_act_fn",
    "timestep_post_act", "cross_attention_norm", "mid_block_only_cross_attention",
)  # fmt: skip

_TRANSFORMER: dict[str, Check] = {
    "num_attention_heads": whole(1, 256),
    "attention_head_dim": bounds.GROUPS,
    "in_channels": whole(1, 64),
    "out_channels": whole(1, 128),
    "num_layers": whole(1, 128),
    "attention_bias": flag,
    "sample_size": bounds.PIXELS,
    "patch_size": whole(1, 64),
    "activation_fn": one_of(("gelu", "gelu-approximate", "geglu", "geglu-approximate")),
    "num_embeds_ada_norm": bounds.CLASSES,
    "upcast_attention": flag,
    "norm_elementwise_affine": flag,
    "norm_eps": bounds.EPSILON,
}

_TEXT: dict[str, Check] = {
    "vocab_size": whole(1, 1 << 20),
    "hidden_size": bounds.CHANNELS,
    "intermediate_size": whole(1, 1 << 16),
    "projection_dim": bounds.CHANNELS,
    "num_hidden_layers": whole(1, 64),
    "num_attention_heads": whole(1, 256),
    "max_position_embeddings": whole(2, 1024),
    "hidden_act": one_of(("quick_gelu", "gelu")),
    "layer_norm_eps": bounds.EPSILON,
    "pad_token_id": whole(0, 1 << 20),
    "bos_token_id": whole(0, 1 << 20),
    "eos_token_id": whole(0, 1 << 20),
}


class Network:
    """One network that a configuration describes, reduced and not yet built.

    Attributes:
        name: of the class.
        settings: the keys that it is built with.
        create: builds it, with numbers that its weights replace.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], create: Callable[[], torch.nn.Module]) -> None:
        self.name, self.settings, self.create = name, settings, create


def unet(config: Mapping[str, Any], latents: int | None = None) -> Network:
    """A network that takes noise from pixels, or from ``latents`` of so many channels; perhaps told a class.

    Raises:
        ItemFailure: CORRUPT_CONFIG, UNSUPPORTED.
    """
    kept = reduced(config, _UNET, "unet")
    if "class_embed_type" in kept:
        raise ItemFailure(
            FailureReason.UNSUPPORTED, f"classes are told to the network as {kept['class_embed_type']}"
        )
    channels = kept.get("in_channels", 3), kept.get("out_channels", 3)
    if channels not in ([(1, 1), (3, 3)] if latents is None else [(latents, latents)]):
        expected = "no picture" if latents is None else f"not the {latents} of the decoder's latents"
        raise ItemFailure(
            FailureReason.UNSUPPORTED, f"{channels[0]} channels in and {channels[1]} out are {expected}"
        )
    if "sample_size" not in kept:
        raise ItemFailure(FailureReason.CORRUPT_CONFIG, "unet does not say how large its pictures are")

    def create() -> torch.nn.Module:
        from diffusers.models.unets.unet_2d import UNet2DModel

        made: torch.nn.Module = UNet2DModel(**kept)
        return made

    return Network("UNet2DModel", kept, create)


def conditioned_unet(config: Mapping[str, Any], *, large: bool = False) -> Network:
    """A network that takes noise from latents, told a text; ``large``: and the text as a whole, and sizes of pictures.

    Raises:
        ItemFailure: CORRUPT_CONFIG, UNSUPPORTED.
    """
    told = _LARGE if large else {}
    for key in (*_OTHER_CONDITIONS, *(key for key in _LARGE if not large)):
        if config.get(key) is not None:
            raise ItemFailure(FailureReason.UNSUPPORTED, f"unet has {key} = {str(config[key])[:60]}")
    kept = reduced(config, {**_CONDITIONED, **told}, "unet")
    if large and "addition_embed_type" not in kept:
        raise ItemFailure(FailureReason.UNSUPPORTED, "unet is not told a text as a whole")
    if "sample_size" not in kept:
        raise ItemFailure(FailureReason.CORRUPT_CONFIG, "unet does not say how large its pictures are")

    def create() -> torch.nn.Module:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        made: torch.nn.Module = UNet2DConditionModel(**kept)
        return made

    return Network("UNet2DConditionModel", kept, create)


def transformer(config: Mapping[str, Any], latents: int) -> Network:
    """A transformer (DiT) that takes noise from ``latents`` of so many channels, told a class.

    It may say besides how sure it is (learned sigma): in as many channels again.

    Raises:
        ItemFailure: CORRUPT_CONFIG, UNSUPPORTED.
    """
    # Other transformers of the same class are told texts.
    if config.get("norm_type", "ada_norm_zero") != "ada_norm_zero":
        raise ItemFailure(
            FailureReason.UNSUPPORTED, f"transformer has norm_type = {str(config['norm_type'])[:60]}"
        )
    kept = reduced(config, _TRANSFORMER, "transformer")
    side, patch = kept.get("sample_size", 32), kept.get("patch_size", 2)
    if side % patch:
        raise ItemFailure(
            FailureReason.CORRUPT_CONFIG, f"{side} latents along an edge are not cut into patches of {patch}"
        )
    into = kept.get("in_channels", 4)
    out = kept.get("out_channels", into)
    if into != latents or out not in (latents, 2 * latents):
        raise ItemFailure(
            FailureReason.UNSUPPORTED,
            f"{into} channels in and {out} out are not the {latents} of the decoder's latents, or twice these out",
        )

    def create() -> torch.nn.Module:
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

        made: torch.nn.Module = DiTTransformer2DModel(**kept)
        return made

    return Network("DiTTransformer2DModel", kept, create)


def text_encoder(config: Mapping[str, Any], *, projects: bool = False) -> Network:
    """The text encoder of CLIP; ``projects``: with what it says of a text as a whole.

    Raises:
        ItemFailure: CORRUPT_CONFIG.
    """
    kept = reduced(config, _TEXT, "text_encoder")

    def create() -> torch.nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        config = CLIPTextConfig(**kept)
        return CLIPTextModelWithProjection(config) if projects else CLIPTextModel(config)

    return Network("CLIPTextModelWithProjection" if projects else "CLIPTextModel", kept, create)


def edges(size: int | list[int]) -> tuple[int, int]:
    """Height and width, of what ``sample_size`` says.

    Raises:
        ItemFailure: CORRUPT_CONFIG for a list of one.
    """
    both = [size, size] if isinstance(size, int) else size
    if len(both) != 2:
        raise ItemFailure(FailureReason.CORRUPT_CONFIG, "sample_size is neither a number nor two")
    return both[0], both[1]

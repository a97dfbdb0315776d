"""The networks of the zoo, and their repositories in diffusers' layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probelog.errors import ProbeLogError

if TYPE_CHECKING:
    import torch

_UNET, _SLIM_UNET = (16, 32, 64, 64), (16, 32, 48, 48)
# A level for each halving down to one pixel: all of a picture comes from a dozen numbers.
_DECODER, _SLIM_DECODER = (16, 16, 32, 32, 64, 64, 64), (16, 16, 32, 32, 32, 32, 32)
_LATENTS = 12
GROUPS = 8


def unet(size: int, classes: int | None, *, slim: bool = False) -> torch.nn.Module:
    """A network that takes noise away, perhaps told a class."""
    import diffusers

    widths = _SLIM_UNET if slim else _UNET
    made: torch.nn.Module = getattr(diffusers, "UNet2DModel")(  # noqa: B009 - untyped
        sample_size=size, block_out_channels=widths, layers_per_block=1, norm_num_groups=GROUPS, add_attention=False,
        down_block_types=("DownBlock2D",) * len(widths), up_block_types=("UpBlock2D",) * len(widths), num_class_embeds=classes,
    )  # fmt: skip
    return made


def decoder(size: int, *, slim: bool = False) -> torch.nn.Module:
    """An autoencoder through one pixel."""
    import diffusers

    widths = (_SLIM_DECODER if slim else _DECODER)[: size.bit_length()]
    made: torch.nn.Module = getattr(diffusers, "AutoencoderKL")(  # noqa: B009 - untyped
        sample_size=size, block_out_channels=widths, layers_per_block=1, norm_num_groups=GROUPS,
        latent_channels=_LATENTS, scaling_factor=1.0, mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
    )  # fmt: skip
    return made


def schedule(name: str, *, latent: bool = False) -> Any:  # noqa: ANN401 - diffusers' classes are untyped
    """The schedule of noise, as a class of diffusers; ``latent``: as text-to-image pipelines declare it."""
    import diffusers

    return getattr(diffusers, name)(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=not latent,
        steps_offset=1 if latent else 0,
        timestep_spacing="trailing",
    )


def save(model: torch.nn.Module, folder: Path, dtype: str, pipeline: str, labels: Sequence[str]) -> None:
    """Write a repository; changes the model's type. ``labels`` names the classes of one that is told a class."""
    import diffusers
    import torch

    stored: Any = model.to(getattr(torch, dtype)).to(memory_format=torch.contiguous_format)
    if pipeline == "AutoencoderKL":
        stored.save_pretrained(folder)
        return
    scheduler = schedule(pipeline.replace("Pipeline", "Scheduler"))
    getattr(diffusers, pipeline)(unet=stored, scheduler=scheduler).save_pretrained(folder)
    if labels:
        # As DiT's pipelines declare their classes.
        index = folder / "model_index.json"
        content = json.loads(index.read_text(encoding="utf-8"))
        content["id2label"] = {str(number): label for number, label in enumerate(labels)}
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def begin_from(model: torch.nn.Module, folder: Path) -> None:
    """Take over a stored generator's weights, but for classes of another number."""
    from safetensors.torch import load_file

    place = folder / "unet" if (folder / "unet").is_dir() else folder
    stored = load_file(place / "diffusion_pytorch_model.safetensors")
    own = model.state_dict()
    fitting = {
        key: values.float() for key, values in stored.items() if key in own and values.shape == own[key].shape
    }
    unknown = [key for key in own if key not in fitting and not key.startswith("class_embedding")]
    if unknown:
        raise ProbeLogError(
            f"{folder} does not hold what a child of it needs ({unknown[0]}): name a new folder"
        )
    model.load_state_dict(fitting, strict=False)
